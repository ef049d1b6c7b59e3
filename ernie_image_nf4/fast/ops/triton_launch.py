"""What the Triton kernels have in common: how they are launched, and how torch.compile knows them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

AS_WRITTEN = {"enable_fp_fusion": False}  # a product and a sum are rounded apart
# torch.compile calls these and doesn't look inside: what it fuses itself it rounds in other places.
OPERATORS = torch.library.Library("ernie_image_nf4", "DEF")


def on_its_device(launch: Callable) -> Callable:
    """Triton launches on the current device, whichever the first tensor's is."""

    @functools.wraps(launch)
    def guarded(x, *args):
        with torch.cuda.device_of(x):
            return launch(x, *args)

    return guarded


def define(kernel: Callable, schema: str, shapes: Callable) -> None:
    """Make an operator of a function that launches a kernel.

    Args:
        kernel: The function.
        schema: Its arguments and results, in PyTorch's notation.
        shapes: From the same arguments, results without values.
    """
    OPERATORS.define(f"{kernel.__name__}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    OPERATORS.impl(kernel.__name__, kernel, "CUDA")
    torch.library.register_fake(f"ernie_image_nf4::{kernel.__name__}", shapes, lib=OPERATORS)
