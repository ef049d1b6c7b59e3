"""What pictures and manifests say about how they were computed, and what that means for a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_batch import run

from ernie_image_nf4 import Row, load
from ernie_image_nf4.fast.transformer import make_transformer_fast
from ernie_image_nf4.generation.computation import computation_of
from ernie_image_nf4.generation.image_file import read_settings
from ernie_image_nf4.generation.manifest import MANIFEST, read_manifest
from ernie_image_nf4.generation.single import draw_and_save

DTYPES = ("bfloat16", "float16", "float32")


def loaded(repository: Path, dtype: str, **options):
    return load(repository, device="cpu", dtype=dtype, prompt_enhancer=False, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fast", [True, "exact", False])
def test_the_dtype_is_that_which_was_asked_for(repository, dtype, fast):
    computation = computation_of(loaded(repository, dtype, fast=fast))
    assert computation == {"products": None, "dtype": dtype, "fast": None}  # on a CPU, nothing is faster or exact


def test_exact_predictions_are_noted(repository):
    pipe = loaded(repository, "float32")
    make_transformer_fast(pipe.transformer, capture_steps=False, exact=True)
    assert computation_of(pipe)["fast"] == "exact"


@pytest.mark.gpu
@pytest.mark.parametrize(("fast", "noted"), [(True, None), ("exact", "exact"), (False, None)])
def test_on_a_gpu_exact_pictures_say_so(repository, tmp_path, fast, noted):
    pipe = load(repository, dtype="bfloat16", fast=fast)
    (record,) = run(pipe, tmp_path, [Row("a cat")])
    assert (record.dtype, record.fast) == ("bfloat16", noted)
    assert read_settings(tmp_path / record.file).get("fast") == noted


def test_pictures_and_manifest_note_it(repository, tmp_path):
    pipe = loaded(repository, "bfloat16")
    (record,) = run(pipe, tmp_path, [Row("a cat")])
    ((_, path),) = draw_and_save(pipe, [tmp_path / "one.png"], "a cat", height=32, width=32, steps=1)
    assert (record.dtype, record.fast) == ("bfloat16", None)
    assert json.loads((tmp_path / MANIFEST).read_text())["dtype"] == "bfloat16"
    for file in (tmp_path / record.file, path):
        settings = read_settings(file)
        assert settings["dtype"] == "bfloat16"
        assert not {"fast", "products"} & settings.keys()


def test_what_failed_is_drawn_in_another_dtype_and_the_rest_stays(repository, tmp_path):
    rows = [Row("a cat", name="good"), Row("a cat", seed=1, name="bad")]
    pipe = loaded(repository, "bfloat16")

    run(pipe, tmp_path, rows[:1])
    handle = pipe.transformer.register_forward_hook(lambda *step: (step[-1][0] * float("nan"),))
    run(pipe, tmp_path, rows)
    handle.remove()
    assert [record.error is None for record in read_manifest(tmp_path / MANIFEST)] == [True, False]
    (again,) = run(loaded(repository, "float32"), tmp_path, rows)
    assert again.settings.seed == 1
    assert [record.dtype for record in read_manifest(tmp_path / MANIFEST)] == ["bfloat16", "float32"]


def test_a_run_from_before_it_was_noted_goes_on(repository, tmp_path):
    pipe = loaded(repository, "float32")
    run(pipe, tmp_path, [Row("a cat"), Row("a dog")])
    manifest = tmp_path / MANIFEST
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for values in lines:
        del values["dtype"], values["fast"], values["guidance_until"], values["cache"], values["lora"]
    manifest.write_text("".join(json.dumps(values) + "\n" for values in lines))
    assert run(pipe, tmp_path, [Row("a cat"), Row("a dog")]) == []
    assert {record.dtype for record in read_manifest(manifest)} == {None}
