"""Pinned host memory, got in a faster way than the driver's."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

logger = logging.getLogger(__name__)

# PyTorch's settings of how it gets pinned memory, and their defaults. With the first ones, threads touch ordinary memory and
# have it locked, where the driver takes page after page.
REGISTERED = "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
ALLOCATED = "pinned_use_cuda_host_register:False,pinned_num_register_threads:1"
TRIAL_BYTES = 1024**2


@contextmanager
def registered_memory(device: torch.device) -> Iterator[None]:
    """Let PyTorch register memory as pinned instead of allocating it so, which is slow, while the context lasts.

    Only the environment variable ``PYTORCH_CUDA_ALLOC_CONF`` sets this publicly, before CUDA starts. What it says about pinned memory stays.

    Args:
        device: That the memory is for. Nothing changes unless it is a CUDA device.
    """
    change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if device.type != "cuda" or change is None or torch.cuda.get_allocator_backend() != "native":
        yield
        return
    settings = allocator_settings()
    if "pinned" in settings:
        yield
        return
    beside = f"{settings}," if settings else ""  # what isn't named may be reset
    try:
        try:
            change(beside + REGISTERED)
            torch.empty(TRIAL_BYTES, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:  # not every system can
            logger.info("Pinned memory is allocated, not registered: %s", next(iter(str(error).splitlines()), ""))
            change(beside + ALLOCATED)
        yield
    finally:
        change(beside + ALLOCATED)
        change(settings)


def allocator_settings() -> str:
    """PyTorch's. PyTorch 2.11 can't be asked: those of the environment, and what was changed since isn't known."""
    if current := getattr(torch._C, "_accelerator_getAllocatorSettings", None):  # not in PyTorch 2.11
        return current()
    return os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF", "")
