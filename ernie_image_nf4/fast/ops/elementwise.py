"""Triton kernels for the element-wise work between the transformer's matrix products, and the same in plain torch.

An upstream block spends more time on these small float32 operations than on its products: each is a pass over memory of its own.
The kernels do each group in one pass, and add and round as upstream's do, so that the results are the same bits.
Shapes: B batch, S tokens, H width, N heads, D head size.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from contextlib import suppress

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

KERNELS = "triton_elementwise"


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton works on a CUDA device: torch brings it on Linux, but it needs a C compiler and compute capability 7.0."""
    capability = torch.cuda.get_device_capability(device)
    if importlib.util.find_spec("triton") is None or capability < (7, 0):
        return False
    dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16  # as the transformer will need, mostly
    probe = torch.zeros(1, dtype=dtype, device=device)
    try:
        _triton().gelu_times(probe, probe)
    except (
        Exception
    ) as error:  # of Triton, its compiler or the system's: each has its own, and none matters to the result
        logger.info("Triton doesn't work here (%s): PyTorch's own kernels are used.", error)
        return False
    return True


def prepare_triton() -> None:
    """Let Triton hash its own files, by which it finds compiled kernels: hundreds of MB, for which it hardly needs Python's lock.

    Else the first kernel waits for it. Does nothing where there is no Triton, or one that has this in another place.
    """
    with suppress(Exception):
        importlib.import_module("triton.runtime.cache").triton_key()


def define_operators(module: str = KERNELS) -> None:
    """Make the kernels of a module known to torch.compile, where there are any."""
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
        _triton(module)


def fused(x: torch.Tensor, module: str = KERNELS):
    """What holds the kernels for a tensor: Triton's functions, the same as operators while torch.compile traces, or None for plain torch.

    Args:
        x: The tensor.
        module: Of this package, that has the functions.
    """
    if torch.compiler.is_compiling():
        return torch.ops.ernie_image_nf4 if x.is_cuda else None
    return _triton(module) if x.is_cuda and has_triton(x.device) else None


def modulated_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMS norm, then ``* (1 + scale) + shift``.

    Args:
        x: (B, S, H), or (1, N, H) with `rows`.
        weight: (H,), of the norm.
        scale: (B, H).
        shift: (B, H).
        eps: Added to the mean square.
        rows: (N,) int64, which of the B rows each token belongs to; None if all rows have S tokens.

    Returns:
        As `x`.
    """
    if kernel := fused(x):
        return kernel.modulated_norm(x, weight, scale, shift, eps, rows)
    variance = x.float().pow(2).mean(-1, keepdim=True)
    normed = (x * torch.rsqrt(variance + eps)).to(x.dtype) * weight
    return (normed.float() * (1 + _by_token(scale, rows)) + _by_token(shift, rows)).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of the last dimension, as transformers rounds it: to the dtype of `x` before the weight (H,) is multiplied."""
    if kernel := fused(x):
        return kernel.rms_norm(x, weight, eps)
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return weight * (x.float() * torch.rsqrt(variance + eps)).to(x.dtype)


def gated_add_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gated_add`, then `modulated_norm` of the sum. Returns both, each as `x`."""
    if kernel := fused(x):
        return kernel.gated_add_norm(x, branch, gate, weight, scale, shift, eps, rows)
    total = gated_add(x, branch, gate, rows)
    return total, modulated_norm(total, weight, scale, shift, eps, rows)


def gated_add(
    x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """``x + gate * branch``: (B, S, H), with `gate` (B, H); or packed as in `modulated_norm`."""
    if kernel := fused(x):
        return kernel.gated_add(x, branch, gate, rows)
    return x + (_by_token(gate, rows) * branch.float()).to(x.dtype)


def _by_token(modulation: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """(B, H) as float32 that broadcasts over tokens: (B, 1, H), or (1, N, H) for packed ones."""
    modulation = modulation.float()
    return modulation.unsqueeze(1) if rows is None else modulation[rows].unsqueeze(0)


def norm_rotary(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    """RMS norm of each head, then the rotary embedding, halves rotated.

    Args:
        x: (B, S, N, D).
        weight: (D,), of the norm.
        cos: (B, S, D), cosine of each angle.
        sin: (B, S, D).
        eps: Added to the mean square.

    Returns:
        (B, S, N, D), dtype of `x`.
    """
    if kernel := fused(x):
        return kernel.norm_rotary(x, weight, cos, sin, eps)
    x = F.rms_norm(x, weight.shape, weight, eps)
    first, second = x.chunk(2, -1)
    rotated = torch.cat((-second, first), -1)
    return x * cos.to(x.dtype).unsqueeze(2) + rotated * sin.to(x.dtype).unsqueeze(2)


def gelu_times(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``gelu(gate) * up``, elementwise, with the exact (erf) GELU."""
    if kernel := fused(gate):
        return kernel.gelu_times(gate, up)
    return up * F.gelu(gate)


@functools.cache
def _triton(module: str = KERNELS):
    return importlib.import_module(f".{module}", __package__)
