"""Device, dtype and memory mode are decided by pure functions; here for machines of every kind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from full_size import full_size_weights

from ernie_image_nf4.errors import DeviceUnavailable, InvalidSettings
from ernie_image_nf4.loading.pipeline import decide_placement
from ernie_image_nf4.memory.placement import (
    MEMORY_MODES,
    Placement,
    choose_device,
    choose_dtype,
    choose_memory,
    device_counts,
    find_device,
)
from ernie_image_nf4.memory.precision import Precision
from ernie_image_nf4.memory.requirements import GIB, MODES, WeightBytes, mode_needs, without_optional
from ernie_image_nf4.repository.record import Repository, StoredComponent

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
FLOAT32 = Precision(torch.float32)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"cuda": 2, "xpu": 1, "mps": 1, "cpu": 1}, "cuda:0"),
        ({"cuda": 0, "xpu": 1, "cpu": 1}, "xpu:0"),
        ({"cuda": 0, "xpu": 0, "mps": 1, "cpu": 1}, "mps"),
        ({"cpu": 1}, "cpu"),
    ],
)
def test_the_best_device_is_taken(counts, expected):
    assert str(choose_device(None, counts)) == expected


@pytest.mark.parametrize(
    ("requested", "expected"),
    [("cuda", "cuda:0"), ("cuda:1", "cuda:1"), (torch.device("cuda", 1), "cuda:1"), ("cpu", "cpu")],
)
def test_the_device_asked_for_is_taken(requested, expected):
    assert str(choose_device(requested, {"cuda": 2, "cpu": 1})) == expected


@pytest.mark.parametrize("requested", ["cuda", "xpu", "mps"])
def test_a_device_that_is_not_there(requested):
    with pytest.raises(DeviceUnavailable, match=f"no {requested.upper()} device.*device='cpu'"):
        choose_device(requested, {"cpu": 1})


def test_a_device_number_that_is_not_there():
    with pytest.raises(DeviceUnavailable, match=r"has 2 \(numbered from 0\): use cuda:1 or lower"):
        choose_device("cuda:2", {"cuda": 2, "cpu": 1})


@pytest.mark.parametrize("requested", ["gpu", "meta", "cuda:x", ""])
def test_a_device_that_is_none(requested):
    with pytest.raises(InvalidSettings, match="is none of cuda, xpu, mps, cpu"):
        choose_device(requested, {"cuda": 1, "cpu": 1})


def test_this_machine_has_a_device():
    assert device_counts()["cpu"] == 1
    assert find_device(None).type in device_counts()


@pytest.mark.parametrize(
    ("device", "capability", "cpu_has_bfloat16", "expected"),
    [
        ("cuda", (9, 0), False, torch.bfloat16),
        ("cuda", (8, 0), False, torch.bfloat16),
        ("cuda", (7, 5), False, torch.float16),
        ("cuda", (7, 0), True, torch.float16),
        ("cuda", (6, 1), True, torch.float32),
        ("cpu", None, True, torch.bfloat16),
        ("cpu", None, False, torch.float32),
        ("xpu", None, False, torch.bfloat16),
        ("mps", None, False, torch.bfloat16),
    ],
)
def test_dtype_follows_the_hardware(device, capability, cpu_has_bfloat16, expected):
    assert choose_dtype(None, torch.device(device), capability, cpu_has_bfloat16) == expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_float16_that_overflows_is_no_default(capability, expected):
    assert choose_dtype(None, CUDA, capability, scaled=False) == expected
    assert choose_dtype("float16", CUDA, capability, scaled=False) == torch.float16


@pytest.mark.parametrize("requested", ["float16", "torch.float16", torch.float16])
def test_the_dtype_asked_for_is_taken(requested):
    assert choose_dtype(requested, CUDA, (9, 0)) == torch.float16


@pytest.mark.parametrize("requested", ["int8", "half-ish", torch.float64])
def test_a_dtype_that_cannot_work(requested):
    with pytest.raises(InvalidSettings, match="is none of bfloat16, float16, float32"):
        choose_dtype(requested, CUDA)


@pytest.fixture(scope="module")
def weights(full_size: dict[str, StoredComponent]) -> dict[str, WeightBytes]:
    return full_size_weights(full_size)


def memory(requested: str, free_gib: float, weights: dict[str, WeightBytes], **options: Any) -> str:
    options = {"pixels": 1024**2} | options
    return choose_memory(requested, CUDA, weights=weights, free_bytes=int(free_gib * GIB), **options)[0]


# Free memory within a process, CUDA's context paid: a card's, less what a desktop and the context take.
@pytest.mark.parametrize(
    ("free_gib", "with_enhancer", "without"),
    [
        (22.5, "resident", "resident"),  # cards of 24 GB
        (14.5, "resident", "resident"),  # 16
        (10.5, "resident", "resident"),  # 12, as with 11.0 GiB free before the process starts
        (9.8, "offload", "resident"),
        (7.3, "offload", "offload"),
        (6.7, "offload", "offload"),  # 8
        (5.9, "offload", "offload"),
        (5.7, "stream", "stream"),
        (4.7, "stream", "stream"),  # 6
        (2.9, "stream", "stream"),  # 4
        (2.75, "stream", "stream"),
        (2.7, None, "stream"),
        (1.95, None, "stream"),
        (1.9, None, None),
    ],
)
def test_auto_takes_the_first_mode_in_which_a_picture_fits(weights, free_gib, with_enhancer, without):
    for parts, expected in ((weights, with_enhancer), (without_optional(weights), without)):
        if expected is None:
            with pytest.raises(DeviceUnavailable):
                memory("auto", free_gib, parts)
        else:
            assert memory("auto", free_gib, parts) == expected


def test_auto_takes_no_mode_that_runs_out_where_another_does_not(weights):
    """Where a mode is taken, it has room for a picture of the recommended size, or stream has for a smaller one."""
    needs = mode_needs(weights, 1024**2)
    for tenths in range(28, 120):
        mode = memory("auto", tenths / 10, weights)
        assert needs[mode] <= tenths / 10 * GIB or mode == "stream"
        assert mode == next((mode for mode in MODES if needs[mode] <= tenths / 10 * GIB), "stream")


def test_auto_streams_rather_than_refuse_where_a_smaller_picture_fits(weights):
    assert memory("auto", 3, weights, pixels=4096**2) == "stream"


def test_pictures_that_are_not_decoded_in_tiles_take_more(weights):
    assert memory("auto", 10.5, weights, tiled=False) == "offload"
    assert memory("auto", 10.5, weights) == "resident"


def test_wider_dtypes_take_more(full_size):
    in_float32 = full_size_weights(full_size, precision=FLOAT32)
    assert memory("auto", 10.5, in_float32, precision=FLOAT32) == "offload"
    assert memory("auto", 6.7, in_float32, precision=FLOAT32) == "stream"


def test_auto_says_why(weights):
    def reason(free: int) -> str:
        return choose_memory("auto", CUDA, weights=weights, free_bytes=free, pixels=1024**2)[1]

    needs = "it takes 9.9 GiB for resident, 5.9 GiB for offload, 2.9 GiB for stream"
    assert reason(5 * GIB) == f"5.0 GiB free; {needs}"
    assert reason(int(2.8 * GIB)) == f"2.7 GiB free; {needs}, and less for a smaller picture or a short prompt"


@pytest.mark.parametrize(
    ("requested", "free_gib"), [("resident", 10), ("resident", 8.6), ("offload", 4.6), ("stream", 2.72), ("stream", 80)]
)
def test_the_mode_asked_for_is_taken_where_a_small_picture_fits(weights, requested, free_gib):
    assert memory(requested, free_gib, weights) == requested


@pytest.mark.parametrize(
    ("requested", "free_gib", "needed", "cures"),
    [
        ("resident", 8, 8.6, ["memory='offload' (--memory offload), which needs 4.6", "--no-pe), which needs 6.2"]),
        ("resident", 4, 8.6, ["memory='stream' (--memory stream), which needs 2.8"]),
        ("resident", 2, 8.6, ["(--memory stream --no-pe), which needs 2.0"]),
        ("offload", 4, 4.6, ["memory='stream' (--memory stream), which needs 2.8"]),
        ("stream", 2.5, 2.8, ["prompt_enhancer=False (--no-pe), which needs 2.0"]),
        ("auto", 2.5, 2.8, ["prompt_enhancer=False (--no-pe), which needs 2.0"]),
        ("auto", 1, 2.8, []),
    ],
)
def test_too_little_memory_is_found_before_loading_and_what_helps_is_named(weights, requested, free_gib, needed, cures):
    with pytest.raises(DeviceUnavailable) as refused:
        memory(requested, free_gib, weights)
    cures = [f"{cure} GiB" for cure in cures]
    text = str(refused.value)
    assert f" needs {needed} GiB on cuda:0, where {free_gib:.1f} GiB are free: " in text
    assert text.endswith("device='cpu' (--device cpu).")
    assert all(cure in text for cure in cures)
    assert text.count("which needs") == len(cures)


@pytest.mark.parametrize("requested", MEMORY_MODES)
def test_figures_of_a_refusal_are_true(weights, requested):
    """What is free is less than what is needed, as written, and a cure that is named works."""
    refusals = 0
    for free_gib in [hundredths / 100 for hundredths in range(10, 900, 7)]:
        try:
            memory(requested, free_gib, weights)
        except DeviceUnavailable as refused:
            text = str(refused)
        else:
            continue
        refusals += 1
        needed, free = map(float, re.search(r"needs ([\d.]+) GiB on cuda:0, where ([\d.]+)", text).groups())
        assert free < needed
        assert -0.001 < free_gib - free < 0.101
        for other in re.findall(r"--memory (\w+)\)", text):
            assert memory(other, free_gib, weights) == other
        if alone := re.search(r"\((?:--memory (\w+) )?--no-pe\)", text):
            memory(alone[1] or requested, free_gib, without_optional(weights))
    assert refusals > 30


def test_a_refusal_without_the_prompt_enhancer_does_not_offer_to_leave_it_out(weights):
    with pytest.raises(DeviceUnavailable) as refused:
        memory("stream", 1, without_optional(weights))
    assert "--no-pe" not in str(refused.value)


@pytest.mark.parametrize(
    ("fast", "dtype", "takes"),
    [
        (True, torch.bfloat16, "9.9 GiB for resident, 5.9 GiB for offload, 2.9 GiB for stream"),
        (True, torch.float16, "11.4 GiB for resident, 6.4 GiB for offload, 3.4 GiB for stream"),
        (True, torch.float32, "12.7 GiB for resident, 7.6 GiB for offload, 4.4 GiB for stream"),
        ("exact", torch.float16, "9.9 GiB for resident, 5.9 GiB for offload, 2.9 GiB for stream"),
        ("exact", torch.bfloat16, "9.9 GiB for resident, 5.9 GiB for offload, 2.9 GiB for stream"),
        (False, torch.bfloat16, "14.7 GiB for resident, 6.0 GiB for offload, 6.0 GiB for stream"),
    ],
)
def test_a_repository_is_placed_by_its_files_and_by_how_it_runs(full_size, monkeypatch, fast, dtype, takes):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * GIB, 80 * GIB))
    placement, reason = decide_placement(Repository(Path(), {}, full_size), CUDA, dtype, "auto", fast)
    mixed = fast is True and dtype == torch.float16
    assert placement == Placement(CUDA, dtype, "stream", bool(fast), exact=fast == "exact", mixed=mixed)
    assert f"it takes {takes}" in reason


@pytest.mark.parametrize("device", [CPU, torch.device("mps")])
def test_a_device_in_the_machines_own_memory_is_always_resident(device):
    for requested in ("auto", "resident"):
        assert choose_memory(requested, device, weights={}, free_bytes=None, pixels=1)[0] == "resident"
    for requested in ("offload", "stream"):
        with pytest.raises(InvalidSettings, match="use memory='auto' or 'resident'"):
            choose_memory(requested, device, weights={}, free_bytes=None, pixels=1)


def test_a_memory_mode_that_is_none():
    with pytest.raises(InvalidSettings, match="is none of auto, resident, offload, stream"):
        memory("swap", 80, {})
