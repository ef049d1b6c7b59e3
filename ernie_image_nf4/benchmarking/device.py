"""The device under test: its name, its clock, its memory."""

from __future__ import annotations

import gc
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from ..repository.metadata import installed_versions

GIB = 1024**3
LONG_S = 1.0  # of calls so far, after which more would show little


def describe_machine(device: str) -> dict[str, Any]:
    """Name of the device, versions of the libraries, and the command that runs."""
    cuda = device.startswith("cuda")
    return {
        "machine": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "versions": installed_versions() | {"python": platform.python_version()},
        "command": " ".join(["python", "-m", "ernie_image_nf4", *sys.argv[1:]]),
    }


def synchronize(device: str) -> None:
    """Wait for all kernels on a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def best_seconds(function: Callable[[], object], device: str, repeats: int = 5) -> float:
    """Shortest wall time of a few calls, after one that warms up: `repeats`, or 3 if they take longer than a second."""
    function()
    seconds: list[float] = []
    while len(seconds) < 3 or (len(seconds) < repeats and sum(seconds) < LONG_S):
        synchronize(device)
        began = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def reserved_memory(device: str) -> dict[str, float]:
    """Memory in GiB that PyTorch's allocator holds on a GPU now; nothing on other devices."""
    return {"reserved_gib": torch.cuda.memory_reserved(device) / GIB} if device.startswith("cuda") else {}


def peak_memory(device: str) -> dict[str, float]:
    """Peaks in GiB since `reset_peak_memory`; nothing on other devices than GPUs."""
    if not device.startswith("cuda"):
        return {}
    return {
        "peak_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        "peak_allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
    }


def free_unused_memory() -> None:
    """Give the memory back to the GPU that PyTorch's allocator keeps for later, if this process uses one."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def reset_peak_memory(device: str) -> None:
    """Give unused memory back to the GPU and start new peaks."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
