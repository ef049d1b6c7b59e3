"""Killed at any moment, `quantize` leaves nothing that passes for finished, and goes on from what is."""

from __future__ import annotations

import filecmp
import json
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import diffusers
import pytest
import torch
import transformers

import ernie_image_nf4
from ernie_image_nf4 import load
from ernie_image_nf4.errors import InvalidRepository, InvalidSettings
from ernie_image_nf4.quantization.convert import quantize
from ernie_image_nf4.quantization.resumable_output import WORK_FOLDER, resumable_output
from ernie_image_nf4.repository.components import COMPONENT, COMPONENTS, QUANTIZED
from ernie_image_nf4.repository.integrity import verify

# How often, and how much there is to do meanwhile: each layer of each component has 13 million weights.
KILLS = int(os.environ.get("ERNIE_IMAGE_NF4_KILLS", "2"))
LAYERS = int(os.environ.get("ERNIE_IMAGE_NF4_KILL_LAYERS", "1"))
SIZES = {
    "transformer": {
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "ffn_hidden_size": 3072,
        "text_in_dim": 1024,
        "num_layers": LAYERS,
    },
    "text": {
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 64,
        "intermediate_size": 3072,
        "num_hidden_layers": LAYERS,
    },
}
TRANSFORMER = COMPONENT["transformer"]
IMPORTED = [
    "ernie_image_nf4.quantization.convert",
    "torch._dynamo",
    "diffusers.models.transformers.transformer_ernie_image",
    "transformers.models.mistral3.modeling_mistral3",
    "transformers.models.ministral3.modeling_ministral3",
]


@pytest.fixture(scope="session")
def medium(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`original` with larger components, which gives a killer time to aim."""
    folder = Path(shutil.copytree(original, tmp_path_factory.mktemp("medium") / "ERNIE-Medium"))
    for component in QUANTIZED:
        config = json.loads((folder / component.name / component.config).read_text())
        if component.library == "diffusers":
            model = getattr(diffusers, component.class_name).from_config(config | SIZES["transformer"])
        else:
            config.get("text_config", config).update(SIZES["text"])
            model_class = getattr(transformers, component.class_name)
            model = model_class(model_class.config_class.from_dict(config))
        shutil.rmtree(folder / component.name)
        model.to(torch.bfloat16).save_pretrained(folder / component.name)
    return folder


@pytest.fixture(scope="session")
def start() -> Callable[[Path, Path], BaseProcess]:
    """Starts `quantize` in a process of its own; all of them are forks of one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)

    def start(source: Path, output: Path) -> BaseProcess:
        process = context.Process(target=quantize, args=(source, output), kwargs={"device": "cpu", "progress": False})
        process.start()
        return process

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        first = context.Process(target=int)
        first.start()
        first.join()
    return start


def is_accepted(output: Path) -> bool:
    """Whether `verify` and `load` take the folder for a repository; they must agree."""
    try:
        assert all(report.ok for report in verify(output))
        load(output, device="cpu")
    except InvalidRepository:
        with pytest.raises(InvalidRepository):
            load(output, device="cpu")
        return False
    return True


def assert_same_files(one: Path, other: Path) -> None:
    """The same files with the same bytes, those of the work folder apart."""

    def files(folder: Path) -> list[Path]:
        paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        return sorted(path for path in paths if path.parts[0] != WORK_FOLDER)

    assert files(one) == files(other)
    assert [file for file in files(one) if not filecmp.cmp(one / file, other / file, shallow=False)] == []


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    medium: Path, tmp_path: Path, start: Callable[[Path, Path], BaseProcess]
) -> None:
    whole, output = tmp_path / "whole" / "NF4", tmp_path / "killed" / "NF4"
    began = time.monotonic()
    start(medium, whole).join()
    duration = time.monotonic() - began
    moments, finished = random.Random(0), []
    while len(finished) < KILLS:
        process = start(medium, output)
        time.sleep(moments.uniform(0, duration))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was faster
            assert_same_files(output, whole)
            shutil.rmtree(output)
            continue
        finished.append(sum((output / component.name).exists() for component in COMPONENTS))
        if output.exists() and is_accepted(output):
            assert_same_files(output, whole)
    print(f"A whole run takes {duration:.1f} s. Finished components at each kill: {finished}")
    if not output.exists() or (output / WORK_FOLDER).exists():
        process = start(medium, output)
        process.join()
        assert process.exitcode == 0
    assert not (output / WORK_FOLDER).exists()
    assert is_accepted(output)
    assert_same_files(output, whole)


@pytest.fixture
def interrupted(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is left of a run that was interrupted when the VAE's turn came."""
    copyfile = shutil.copyfile

    def interrupt(source: Path, target: Path) -> None:
        if Path(target).parent.name == "vae":
            raise KeyboardInterrupt
        copyfile(source, target)

    output = tmp_path / "ERNIE-Tiny-NF4"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize(original, output, device="cpu", progress=False)
    assert sorted(path.name for path in output.iterdir()) == [WORK_FOLDER, "pe", "text_encoder", "transformer"]
    return output


def test_finished_components_are_kept(original: Path, repository: Path, interrupted: Path) -> None:
    weights = interrupted / TRANSFORMER.name / TRANSFORMER.weights
    before = weights.stat()
    quantize(original, interrupted, device="cpu", progress=False)
    assert (weights.stat().st_ino, weights.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert_same_files(interrupted, repository)


def test_finished_components_that_have_changed_are_made_again(
    original: Path, repository: Path, interrupted: Path
) -> None:
    weights = interrupted / TRANSFORMER.name / TRANSFORMER.weights
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    quantize(original, interrupted, device="cpu", progress=False)
    assert_same_files(interrupted, repository)


def test_a_component_that_was_noted_but_not_moved_is_kept(original: Path, repository: Path, interrupted: Path) -> None:
    (interrupted / "pe").rename(interrupted / WORK_FOLDER / "pe")
    quantize(original, interrupted, device="cpu", progress=False)
    assert_same_files(interrupted, repository)


def test_an_interrupted_run_is_not_continued_with_other_settings(original: Path, interrupted: Path) -> None:
    with pytest.raises(InvalidSettings, match="unfinished run with different layers to keep"):
        quantize(original, interrupted, device="cpu", keep=["transformer.final_linear"], progress=False)
    assert (interrupted / TRANSFORMER.name).exists()


def test_an_interrupted_run_is_not_continued_with_another_source(
    original: Path, interrupted: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(original, tmp_path / "source"))
    (source / TRANSFORMER.name / "config.json").touch()
    with pytest.raises(InvalidSettings, match="unfinished run with different source files"):
        quantize(source, interrupted, device="cpu", progress=False)


@pytest.mark.parametrize("package", ["ernie-image-nf4", "torch", "bitsandbytes"])
def test_an_interrupted_run_is_not_continued_with_another_version(
    original: Path, interrupted: Path, package: str
) -> None:
    path = interrupted / WORK_FOLDER / "state.json"
    state = json.loads(path.read_text())
    assert state["job"]["versions"]["ernie-image-nf4"] == ernie_image_nf4.__version__
    state["job"]["versions"][package] = "0.0.1"
    path.write_text(json.dumps(state))
    with pytest.raises(InvalidSettings, match="unfinished run with different versions"):
        quantize(original, interrupted, device="cpu", progress=False)


def test_killed_while_clearing_up_it_only_clears_up(original: Path, copy: Path, repository: Path) -> None:
    (copy / WORK_FOLDER).mkdir()
    quantize(original, copy, device="cpu", progress=False)
    assert not (copy / WORK_FOLDER).exists()
    assert_same_files(copy, repository)


def test_a_run_that_finished_nothing_leaves_nothing(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "cat", interrupt)  # in the first weight
    with pytest.raises(KeyboardInterrupt):
        quantize(original, tmp_path / "output", device="cpu", progress=False)
    assert not (tmp_path / "output").exists()


def test_a_second_run_into_the_folder_stops(original: Path, tmp_path: Path) -> None:
    with resumable_output(tmp_path / "output", {}) as made:
        with pytest.raises(InvalidSettings, match="Another run is writing to"):
            quantize(original, made.output, device="cpu", progress=False)
        assert (made.work / "state.json").exists()
