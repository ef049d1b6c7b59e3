"""How the Triton kernels are launched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

NO_FMA = {"enable_fp_fusion": False}  # PyTorch's kernels round products before they add


def on_its_device(launch: Callable[..., Result]) -> Callable[..., Result]:
    """Launch on the first tensor's device: Triton takes the current one."""

    @functools.wraps(launch)
    def guarded(x: torch.Tensor, *args: object) -> Result:
        with torch.cuda.device_of(x):
            return launch(x, *args)

    return guarded
