"""A calibration that is killed keeps what it found, and ends with the bytes of one that wasn't."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from test_resumable_output import IMPORTED, assert_same_files

from ernie_image_nf4.quantization import block_rounding, calibration_data
from ernie_image_nf4.quantization.block_rounding import LayerRounding, block_name
from ernie_image_nf4.quantization.convert import quantize
from ernie_image_nf4.quantization.resumable_output import CHECKPOINTS, WORK_FOLDER, Checkpoints, resumable_output
from ernie_image_nf4.repository.integrity import verify
from ernie_image_nf4.repository.metadata import Recommended

KILLS = int(os.environ.get("ERNIE_IMAGE_NF4_KILLS", "2"))
PROMPTS = ["An orange cat on a desk.", "沙滩上的一只螃蟹。"]
OPTIONS = {"device": "cpu", "calibrate": PROMPTS, "recommended": Recommended(64, 64, 2, 4.0), "progress": False}


def calibrate(source: Path, output: Path) -> None:
    torch.set_num_threads(1)  # as in this process: threads share sums in another order
    quantize(source, output, **OPTIONS)


@pytest.fixture(scope="module")
def whole(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nobody interrupted."""
    return quantize(original, tmp_path_factory.mktemp("whole") / "NF4", **OPTIONS)


@pytest.fixture(scope="module")
def start() -> Callable[[Path, Path], BaseProcess]:
    """Starts `calibrate` in a process of its own, a fork of one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)

    def start(source: Path, output: Path) -> BaseProcess:
        process = context.Process(target=calibrate, args=(source, output))
        process.start()
        return process

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (Path(__file__).parents[2], Path(__file__).parent))))
        first = context.Process(target=int)
        first.start()
        first.join()
    return start


def checkpoints(output: Path) -> set[str]:
    return {path.stem for path in (output / WORK_FOLDER / CHECKPOINTS).glob("*.safetensors")}


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    original: Path, whole: Path, tmp_path: Path, start: Callable[[Path, Path], BaseProcess]
) -> None:
    began = time.monotonic()
    process = start(original, tmp_path / "first" / "NF4")
    process.join()
    duration = time.monotonic() - began
    assert_same_files(tmp_path / "first" / "NF4", whole)
    output, moments, found = tmp_path / "killed" / "NF4", random.Random(0), []
    while len(found) < KILLS:
        process = start(original, output)
        time.sleep(moments.uniform(0.2, 0.9) * duration)
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was faster
            assert_same_files(output, whole)
            shutil.rmtree(output)
            continue
        found.append(sorted(checkpoints(output)))
    print(f"A whole run takes {duration:.1f} s. Checkpoints at each kill: {found}")
    if not output.exists() or (output / WORK_FOLDER).exists():
        process = start(original, output)
        process.join()
        assert process.exitcode == 0
    assert_same_files(output, whole)
    assert all(report.ok for report in verify(output))


@pytest.fixture
def interrupted(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is left of a run that was interrupted in the second block."""
    round_layers = LayerRounding.round_layers

    def interrupt(rounding: LayerRounding, owner: torch.nn.Module, prefix: str, *rest: object) -> None:
        if prefix == "layers.1.":
            raise KeyboardInterrupt
        round_layers(rounding, owner, prefix, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(LayerRounding, "round_layers", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize(original, tmp_path / "NF4", **OPTIONS)
    return tmp_path / "NF4"


def test_nothing_that_was_found_is_found_again(
    original: Path, whole: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert block_name(0) in checkpoints(interrupted)
    assert block_name(1) not in checkpoints(interrupted)
    rounded = []
    round_weights = block_rounding.round_weights

    def count(weights: list[torch.Tensor], *rest: object, **options: object) -> list:
        rounded.append(len(weights))
        return round_weights(weights, *rest, **options)

    monkeypatch.setattr(block_rounding, "round_weights", count)
    for name in ("draw_step", "find_sensitivities", "encode_texts"):
        monkeypatch.setattr(f"ernie_image_nf4.quantization.calibration.{name}", lambda *_: pytest.fail("found again"))
    quantize(original, interrupted, **OPTIONS)
    assert sum(rounded) == len(calibration_data.LAYERS)  # those of the second block
    assert_same_files(interrupted, whole)


def test_a_checkpoint_that_has_changed_is_made_again(original: Path, whole: Path, interrupted: Path) -> None:
    for name in (block_name(0), "sensitivity-000-008"):
        file = interrupted / WORK_FOLDER / CHECKPOINTS / f"{name}.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    quantize(original, interrupted, **OPTIONS)
    assert_same_files(interrupted, whole)


def test_checkpoints_are_gone_when_the_transformer_is_there(whole: Path) -> None:
    assert not (whole / WORK_FOLDER).exists()


def test_checkpoints_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).T, "b": torch.ones((), dtype=torch.bfloat16)}

    def interrupted() -> None:
        with resumable_output(tmp_path / "output", {}) as made:
            made.checkpoints.keep("one", tensors)
            (made.checkpoints.folder / "two.new").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with resumable_output(tmp_path / "output", {}) as made:
        assert [path.name for path in made.checkpoints.folder.iterdir()] == ["one.safetensors"]
        found = made.checkpoints.find("one")
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        assert made.checkpoints.find("two") is None
        made.checkpoints.discard()
        assert made.checkpoints.find("one") is None


@pytest.mark.gpu
def test_runs_on_a_gpu_give_the_same_bytes(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one is interrupted and goes on."""
    options = OPTIONS | {"device": "cuda", "recommended": Recommended(256, 256, 2, 4.0)}
    whole = quantize(original, tmp_path / "whole" / "NF4", **options)
    keep = Checkpoints.keep

    def interrupt(kept: Checkpoints, name: str, tensors: dict[str, torch.Tensor]) -> None:
        keep(kept, name, tensors)
        if name == last:
            raise KeyboardInterrupt

    for last in ("drawing-00", "sensitivity-000-008", block_name(0)):  # noqa: B007
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "keep", interrupt)
            with pytest.raises(KeyboardInterrupt):
                quantize(original, tmp_path / "interrupted" / "NF4", **options)
    assert_same_files(quantize(original, tmp_path / "interrupted" / "NF4", **options), whole)
