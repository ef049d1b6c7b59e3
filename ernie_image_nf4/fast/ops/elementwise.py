"""Element-wise work between matrix products: one Triton kernel each, and the same in plain torch.

An upstream block spends more time on these small float32 operations than on its products, as each is a pass over memory
of its own. The kernels do each group in one pass. They add and round in the order of PyTorch's kernels, so the results
are the same bits.

Shapes: B batch, S tokens, N packed tokens, H width, D head size.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from types import ModuleType

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

KERNELS = "triton_elementwise"


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton works on a CUDA device: it comes with torch on Linux, needs a C compiler and capability 7.0.

    ROCm's devices count as CUDA's, but some kernels are in part NVIDIA's assembly, and others sum by warps of 32.
    """
    if torch.version.hip is not None:
        return False
    capability = torch.cuda.get_device_capability(device)
    if importlib.util.find_spec("triton") is None or capability < (7, 0):
        return False
    dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16  # the transformer's, mostly
    probe = torch.zeros(1, dtype=dtype, device=device)
    try:
        kernel_module(KERNELS).gelu_times(probe, probe)
    # Triton, its compiler and the system raise classes of their own, and plain torch is right after any of them.
    except Exception as error:
        logger.info("Triton doesn't work here (%s): PyTorch's own kernels are used.", error)
        return False
    return True


def triton_kernels(x: torch.Tensor, module: str = KERNELS) -> ModuleType | None:
    """The module of Triton kernels for a tensor, or None for plain torch.

    Args:
        x: The tensor.
        module: Name of a module of this package. Its functions have the names and arguments of the plain ones.
    """
    if not x.is_cuda or torch.compiler.is_compiling():
        return None
    return kernel_module(module) if has_triton(x.device) else None


@functools.cache
def kernel_module(name: str) -> ModuleType:
    """A module of Triton kernels of this package, imported when it is first needed."""
    return importlib.import_module(f".{name}", __package__)


def modulated_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMS norm, then ``* (1 + scale) + shift``.

    Args:
        x: (B, S, H), or (1, N, H) with `rows`.
        weight: (H,), of the norm.
        scale: (B, H).
        shift: (B, H).
        eps: Added to the mean square.
        rows: (N,) int64, batch row of each packed token. None: every row has S tokens.
        out: Memory for the result, (1, N, H). Its tokens may be apart.

    Returns:
        Shape and dtype of `x`.
    """
    if kernels := triton_kernels(x):
        return kernels.modulated_norm(x, weight, scale, shift, eps, rows, out)
    variance = x.float().pow(2).mean(-1, keepdim=True)
    normed = (x * torch.rsqrt(variance + eps)).to(x.dtype) * weight
    return _into(out, (normed.float() * (1 + _by_token(scale, rows)) + _by_token(shift, rows)).to(x.dtype))


def _into(out: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    return values if out is None else out.copy_(values)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of the last dimension. Rounds as transformers: to the dtype of `x` before the product with `weight`."""
    if kernels := triton_kernels(x):
        return kernels.rms_norm(x, weight, eps)
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
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gated_add`, and `modulated_norm` of the sum. Returns both, shape and dtype of `x` each; `out` is the norm's."""
    if kernels := triton_kernels(x):
        return kernels.gated_add_norm(x, branch, gate, weight, scale, shift, eps, rows, out)
    total = gated_add(x, branch, gate, rows)
    return total, modulated_norm(total, weight, scale, shift, eps, rows, out)


def gated_add(
    x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """``x + gate * branch``: (B, S, H) with `gate` (B, H), or packed as in `modulated_norm`."""
    if kernels := triton_kernels(x):
        return kernels.gated_add(x, branch, gate, rows)
    return x + (_by_token(gate, rows) * branch.float()).to(x.dtype)


def _by_token(modulation: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """(B, H) as float32 that broadcasts over tokens: (B, 1, H), or (1, N, H) for packed ones."""
    modulation = modulation.float()
    return modulation.unsqueeze(1) if rows is None else modulation[rows].unsqueeze(0)


def norm_rotary(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    """RMS norm of each head, then the rotary embedding that rotates halves.

    Args:
        x: (B, S, heads, D).
        weight: (D,), of the norm.
        cos: (B, S, D), cosine of each angle.
        sin: (B, S, D).
        eps: Added to the mean square.

    Returns:
        (B, S, heads, D), dtype of `x`.
    """
    if kernels := triton_kernels(x):
        return kernels.norm_rotary(x, weight, cos, sin, eps)
    x = F.rms_norm(x, weight.shape, weight, eps)
    first, second = x.chunk(2, -1)
    rotated = torch.cat((-second, first), -1)
    return x * cos.to(x.dtype).unsqueeze(2) + rotated * sin.to(x.dtype).unsqueeze(2)


def gelu_times(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``gelu(gate) * up``, elementwise, with the exact (erf) GELU. `out`: memory for it, whose rows may be apart."""
    if kernels := triton_kernels(gate):
        return kernels.gelu_times(gate, up, out)
    return _into(out, up * F.gelu(gate))
