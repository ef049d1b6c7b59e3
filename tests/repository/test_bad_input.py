"""A repository that can't work gives one line that says what was found and what to do, before a weight is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ernie_image_nf4.errors import InvalidRepository
from ernie_image_nf4.repository.components import COMPONENTS, QUANTIZED
from ernie_image_nf4.repository.record import open_repository

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4146045428\n"
AGAIN = "download the repository again"
PARTS_WITH_WEIGHTS = [component for component in COMPONENTS if component.weights]


def problem(folder: Path, prompt_enhancer: bool = True) -> str:
    with pytest.raises(InvalidRepository) as caught:
        open_repository(folder, prompt_enhancer=prompt_enhancer)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_a_sound_repository_has_no_problem(repository):
    assert [*open_repository(repository).components] == [c.name for c in COMPONENTS]
    assert [*open_repository(repository, prompt_enhancer=False).components] == [
        c.name for c in COMPONENTS if not c.optional
    ]


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.name)
def test_a_component_folder_is_missing(copy, component):
    (copy / component.name).rename(copy / "elsewhere")
    assert re.search(f"Folder .*/{component.name} is missing: {AGAIN}", problem(copy))


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.name)
def test_a_configuration_is_missing(copy, component):
    (copy / component.name / component.config).unlink()
    assert re.search(f"{component.name}/{component.config} is missing: {AGAIN}", problem(copy))


@pytest.mark.parametrize("component", PARTS_WITH_WEIGHTS, ids=lambda component: component.name)
def test_a_weight_file_is_missing(copy, component):
    (copy / component.name / component.weights).unlink()
    assert re.search(f"{component.name}/{component.weights} is missing: {AGAIN}", problem(copy))


@pytest.mark.parametrize("component", PARTS_WITH_WEIGHTS, ids=lambda component: component.name)
@pytest.mark.parametrize("kept", [-1, 1000, 8, 3, 0], ids=lambda kept: f"[:{kept}]")
def test_a_weight_file_is_truncated(copy, component, kept):
    path = copy / component.name / component.weights
    path.write_bytes(path.read_bytes()[:kept])
    assert re.search(rf"{component.weights} \(\d+ bytes\) is truncated or corrupt.*: {AGAIN}", problem(copy))


@pytest.mark.parametrize("content", [b"not safetensors at all, just text", b"\xff" * 100, b"\x00" * 100])
def test_a_weight_file_is_corrupt(copy, content):
    (copy / "transformer" / QUANTIZED[0].weights).write_bytes(content)
    assert "truncated or corrupt" in problem(copy)


def test_a_shard_is_missing_or_truncated(copy):
    weights = copy / "transformer" / QUANTIZED[0].weights
    shard = weights.with_name("model-00001-of-00001.safetensors")
    weights.rename(shard)
    index = weights.with_name(f"{weights.name}.index.json")
    index.write_text(json.dumps({"weight_map": {"a": shard.name}}))
    open_repository(copy)
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "truncated or corrupt" in problem(copy)
    shard.unlink()
    assert f"{shard.name} is missing" in problem(copy)
    index.write_text("{}")
    assert "lists no weight files" in problem(copy)


@pytest.mark.parametrize("component", PARTS_WITH_WEIGHTS, ids=lambda component: component.name)
def test_a_git_lfs_pointer_in_place_of_a_weight_file(copy, component):
    (copy / component.name / component.weights).write_text(POINTER)
    assert re.search("Git LFS pointer.*git lfs pull.*hf download", problem(copy))


def test_a_git_lfs_pointer_in_place_of_a_tokenizer(copy):
    (copy / "tokenizer" / "tokenizer.json").write_text(POINTER)
    assert "Git LFS pointer" in problem(copy)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "model.pt"])
def test_weights_as_a_pickle_only(copy, name):
    weights = copy / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name(name))
    assert re.search(rf"as a pickle only \({name}\).*use a safetensors release", problem(copy))


def test_no_tokenizer_in_its_folder(copy):
    (copy / "tokenizer" / "tokenizer.json").unlink()
    assert re.search(f"tokenizer/tokenizer.json is missing: {AGAIN}", problem(copy))


def test_no_model_index(copy):
    (copy / "model_index.json").unlink()
    assert "has no model_index.json: name a folder or Hub id of an ErnieImagePipeline" in problem(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\N{SNOWMAN}"])
def test_a_model_index_that_is_none(copy, text):
    (copy / "model_index.json").write_text(text, encoding="utf-8")
    assert re.search(f"model_index.json (is not JSON|holds no JSON object).*: {AGAIN}", problem(copy))


def test_a_model_index_in_another_encoding(copy):
    (copy / "model_index.json").write_bytes(b"\xff\xfe{}")
    assert "is not JSON" in problem(copy)


def test_a_configuration_that_is_not_json(copy):
    (copy / "vae" / "config.json").write_text("{")
    assert "vae/config.json is not JSON" in problem(copy)


def test_another_pipeline(copy):
    edit_index(copy, lambda index: index.update(_class_name="FluxPipeline"))
    assert "is of a FluxPipeline, this package loads ErnieImagePipeline" in problem(copy)


def test_a_model_index_without_a_component(copy):
    edit_index(copy, lambda index: index.pop("vae"))
    assert re.search(f"names no 'vae': {AGAIN}", problem(copy))


def test_half_a_prompt_enhancer(copy):
    edit_index(copy, lambda index: index.pop("pe_tokenizer"))
    assert "names only 'pe': load without the prompt enhancer" in problem(copy)
    open_repository(copy, prompt_enhancer=False)


@pytest.mark.parametrize(
    "entry", [["diffusers"], ["diffusers", "AutoencoderKLFlux2", "more"], "vae", 2, {"a": 1, "b": 2}]
)
def test_a_component_that_is_no_pair_of_library_and_class(copy, entry):
    edit_index(copy, lambda index: index.update(vae=entry))
    assert f"vae is {entry}, expected ['diffusers', 'AutoencoderKLFlux2']" in problem(copy)
