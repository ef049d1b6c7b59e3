"""What a calibration takes at full size, and what is said where there isn't enough."""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path

import psutil
import pytest
import torch
from conftest import skeleton, stored
from full_size import hollow_file

from ernie_image_nf4.errors import DeviceUnavailable, DiskFull
from ernie_image_nf4.memory.requirements import GIB
from ernie_image_nf4.quantization.calibration import calibrate_transformer, plan_calibration
from ernie_image_nf4.quantization.calibration_data import plan_drawings
from ernie_image_nf4.quantization.calibration_needs import (
    CHECKPOINT_BYTES,
    SEGMENTS,
    Shapes,
    choose_segment,
    chunk_samples,
    device_needs,
    find_shapes,
    host_needs,
    tokens_on_host,
)
from ernie_image_nf4.quantization.convert import quantize
from ernie_image_nf4.quantization.layer_selection import plan_weights
from ernie_image_nf4.quantization.resumable_output import resumable_output
from ernie_image_nf4.quantization.synthetic import tensor_specs
from ernie_image_nf4.repository.components import COMPONENT
from ernie_image_nf4.repository.metadata import Recommended
from ernie_image_nf4.repository.record import Repository, open_repository

CUDA = torch.device("cuda:0")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Shapes:
    """Of 64 prompts of 100 tokens at full size."""
    folder = tmp_path_factory.mktemp("full-size-original")
    with as_file(files("ernie_image_nf4") / "quantization" / "configs" / "full") as configs:
        shutil.copytree(configs, folder, dirs_exist_ok=True)
    parts = {}
    for component in (COMPONENT["transformer"], COMPONENT["text_encoder"]):
        specs = tensor_specs(skeleton(component, folder / component.name), duplicate_lm_head=False)
        hollow_file(folder / component.name / component.weights, specs)
        parts[component.name] = stored(folder, component)
    recorded = sum(len(drawing.recorded) for drawing in plan_drawings(64, 50, guided=True))
    return find_shapes(Repository(folder, {}, parts), torch.bfloat16, 1024, [1, 100] * recorded, 128)


def test_full_size_fits_a_card_of_12_gb_and_one_of_8(shapes: Shapes) -> None:
    needs = device_needs(shapes, SEGMENTS[0])
    assert set(needs) == {"texts", "drawing", "sensitivities", "rounding"}
    assert max(needs.values()) < 10 * GIB
    assert choose_segment(shapes, CUDA, 11 * GIB, 32 * GIB) == SEGMENTS[0]
    assert choose_segment(shapes, CUDA, int(7.2 * GIB), 32 * GIB) in SEGMENTS


def test_the_host_needs_less_than_24_gib(shapes: Shapes) -> None:
    for segment in SEGMENTS:
        assert host_needs(shapes, segment, pinned=True) < 24 * GIB
        assert chunk_samples(shapes, segment) * shapes.token_bytes([1124]) * (36 // segment + 1) <= CHECKPOINT_BYTES
    assert tokens_on_host(shapes, SEGMENTS[0]) >= 2 * shapes.token_bytes(shapes.tokens)  # the original's and the other


def test_a_smaller_device_gets_fewer_blocks_at_once(shapes: Shapes) -> None:
    needs = [max(device_needs(shapes, segment).values()) for segment in SEGMENTS]
    assert needs == sorted(needs, reverse=True)
    large = replace(shapes, text_encoder=0)
    needs = [max(device_needs(large, segment).values()) for segment in SEGMENTS]
    assert choose_segment(large, CUDA, needs[1], 32 * GIB) == SEGMENTS[1]


def test_a_device_that_is_too_small_is_told_what_would_do(shapes: Shapes) -> None:
    for free, host, message in (
        (3 * GIB, 64 * GIB, r"takes about \d+\.\d GiB of cuda:0, of which 3\.0 GiB are free: .* or --device cpu"),
        (11 * GIB, 6 * GIB, r"takes about \d+\.\d GiB of the host's memory, of which 6\.0 GiB are free: "),
        (None, 6 * GIB, r"of the host's memory for --device .*, of which 6\.0 GiB are free: .* more of it"),
    ):
        with pytest.raises(DeviceUnavailable, match=message) as caught:
            choose_segment(shapes, CUDA if free else torch.device("cpu"), free, host)
        assert "\n" not in str(caught.value)
        assert "without --calibrate" in str(caught.value)


def test_memory_and_disk_are_checked_before_anything_is_computed(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"device": "cpu", "calibrate": ["A cat."], "recommended": Recommended(64, 64, 4, 4.0), "progress": False}
    monkeypatch.setattr(
        "ernie_image_nf4.quantization.calibration.encode_texts", lambda *_: pytest.fail("something was computed")
    )
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": GIB}))
        with pytest.raises(DeviceUnavailable, match="Calibration takes about"):
            quantize(original, tmp_path / "output", **options)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1_200_000))
    with pytest.raises(DiskFull, match=r"needs 0\.0 GB more"):
        quantize(original, tmp_path / "output", **options)
    quantize(original, tmp_path / "output", device="cpu", progress=False)  # takes less


@pytest.mark.gpu
def test_a_gpu_takes_no_more_than_was_estimated(original: Path, tmp_path: Path) -> None:
    """Of blocks so small that the rest counts, and which PyTorch rounds up."""
    source = open_repository(original)
    plan = plan_weights(source.components["transformer"])
    device = torch.device("cuda", torch.cuda.current_device())
    calibration = plan_calibration(source, plan, ["A cat."], Recommended(512, 512, 4, 4.0), device)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with resumable_output(tmp_path / "output", {}) as made:
        calibrate_transformer(calibration, made.checkpoints, progress=False)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= max(device_needs(calibration.shapes, calibration.segment).values())
