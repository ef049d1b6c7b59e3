"""Device, dtype and memory mode are decided by pure functions; here for machines of every kind."""

from __future__ import annotations

import pytest
import torch

from ernie_image_nf4.errors import DeviceUnavailable, InvalidSettings
from ernie_image_nf4.memory.placement import (
    GIB,
    choose_device,
    choose_dtype,
    choose_memory,
    device_counts,
    find_device,
    working_bytes,
)

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
# Bytes of the published NF4 weights.
FULL_SIZE = {"transformer": 4146045428, "text_encoder": 2585177824, "pe": 2367115496, "vae": 168121878}


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


@pytest.mark.parametrize("requested", ["float16", "torch.float16", torch.float16])
def test_the_dtype_asked_for_is_taken(requested):
    assert choose_dtype(requested, CUDA, (9, 0)) == torch.float16


@pytest.mark.parametrize("requested", ["int8", "half-ish", torch.float64])
def test_a_dtype_that_cannot_work(requested):
    with pytest.raises(InvalidSettings, match="is none of bfloat16, float16, float32"):
        choose_dtype(requested, CUDA)


def memory(requested: str, free_gib: float, *, working_gib: float = 1.5, weights: dict[str, int] = FULL_SIZE) -> str:
    return choose_memory(
        requested, CUDA, weight_bytes=weights, free_bytes=int(free_gib * GIB), working_bytes=int(working_gib * GIB)
    )[0]


@pytest.mark.parametrize(
    ("free_gib", "expected"), [(24, "resident"), (10.3, "resident"), (10, "offload"), (5.4, "offload"), (5, "stream")]
)
def test_auto_takes_the_first_mode_in_which_a_picture_fits(free_gib, expected):
    assert memory("auto", free_gib) == expected


def test_auto_streams_rather_than_refuse_where_a_smaller_picture_fits():
    assert memory("auto", 4, working_gib=6) == "stream"


def test_auto_says_why():
    _, reason = choose_memory("auto", CUDA, weight_bytes=FULL_SIZE, free_bytes=5 * GIB, working_bytes=GIB * 3 // 2)
    assert reason == "5.0 GiB free; it takes 10.1 GiB for resident, 5.4 GiB for offload, 3.9 GiB for stream"


def test_a_picture_decoded_in_tiles_takes_the_memory_of_one():
    assert working_bytes(1024**2, fast=False) == 5.5 * GIB
    assert working_bytes(1024**2, fast=True) == working_bytes(512**2, fast=True) == 1.375 * GIB
    assert working_bytes(64**2, fast=True) == 1 * GIB


def test_leaving_the_prompt_enhancer_out_saves_its_memory():
    smaller = {name: size for name, size in FULL_SIZE.items() if name != "pe"}
    assert memory("auto", 9, weights=smaller) == "resident"
    assert memory("auto", 9) == "offload"


@pytest.mark.parametrize("requested", ["resident", "offload", "stream"])
def test_the_mode_asked_for_is_taken(requested):
    assert memory(requested, 10) == requested


@pytest.mark.parametrize(
    ("requested", "free_gib", "cure"),
    [
        ("resident", 8, "memory='stream'"),
        ("offload", 4, "memory='stream'"),
        ("stream", 3, "prompt_enhancer=False"),
        ("auto", 3, "device='cpu'"),
    ],
)
def test_too_little_memory_is_found_before_loading(requested, free_gib, cure):
    with pytest.raises(DeviceUnavailable, match=cure):
        memory(requested, free_gib)


@pytest.mark.parametrize("device", [CPU, torch.device("mps")])
def test_a_device_in_the_machines_own_memory_is_always_resident(device):
    for requested in ("auto", "resident"):
        assert choose_memory(requested, device, weight_bytes=FULL_SIZE, free_bytes=None)[0] == "resident"
    for requested in ("offload", "stream"):
        with pytest.raises(InvalidSettings, match="use memory='auto' or 'resident'"):
            choose_memory(requested, device, weight_bytes=FULL_SIZE, free_bytes=None)


def test_a_memory_mode_that_is_none():
    with pytest.raises(InvalidSettings, match="is none of auto, resident, offload, stream"):
        memory("swap", 80)
