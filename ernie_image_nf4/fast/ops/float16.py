"""What a transformer block computes between products in float16: in float32, so that nothing overflows.

float16 ends at 65,504 and has 11 significant bits, bfloat16 has range and 8 bits. So what may be large (the residual
stream, sums of products) is kept in float32, and what a product in float16 takes is divided by a power of two, which
costs no bit. The power is the token's *scale*: values times scale are what is meant. Products are linear, so their
output has the scale of their input, and whoever reads it next multiplies the scale back in.

Divided like that, a product can overflow only if its weight has rows of a norm beyond 16,000: a hundred thousand times
that of real ones. Nor is anything lost at the other end: float16's finest step, 2**-24, is small beside the rounding of
a row's typical values.

Shapes: N packed tokens, H width, D head size. Scales: (1, N, 1) float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .elementwise import triton_kernels

KERNELS = "triton_float16"
# A row of values has a norm of at most 2**NORM where its norm is known, else values of at most 2**LARGEST each: of
# 12,288, the width of the feed-forward layer, the norm is 3.5 at most.
NORM, LARGEST = 2, -5
INFINITE = 255  # the exponent's bits of infinity and NaN in float32


def modulated_norm(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMS norm, then ``* (1 + scale) + shift``: values and scales.

    All tokens of a row have one scale, so that attention may add values of different ones.

    Args:
        x: (1, N, H) float32.
        weight: (H,), of the norm.
        scale: (B, H) float32.
        shift: (B, H) float32.
        eps: Added to the mean square.
        rows: (N,) int64, batch row of each token.

    Returns:
        (1, N, H) float16, and the scales.
    """
    if kernels := triton_kernels(x, KERNELS):
        return kernels.modulated_norm(x, weight, scale, shift, eps, rows)
    factor = weight.float() * (1 + scale)
    # A normed token's norm is at most the root of H.
    largest = factor.abs().amax(1, keepdim=True) * math.sqrt(x.shape[-1]) + shift.norm(dim=1, keepdim=True)
    divisor = power_of_two(largest, NORM)
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    values = normed * (factor / divisor)[rows] + (shift / divisor)[rows]
    return values.half(), divisor[rows].unsqueeze(0)


def gated_add_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    branch_scale: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    rows: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`gated_add`, and `modulated_norm` of the sum: the sum, values and scales."""
    if kernels := triton_kernels(x, KERNELS):
        return kernels.gated_add_norm(x, branch, branch_scale, gate, weight, scale, shift, eps, rows)
    total = gated_add(x, branch, branch_scale, gate, rows)
    return total, *modulated_norm(total, weight, scale, shift, eps, rows)


def gated_add(
    x: torch.Tensor, branch: torch.Tensor, branch_scale: torch.Tensor, gate: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """``x + gate * branch * branch_scale``, (1, N, H) float32.

    Args:
        x: (1, N, H) float32.
        branch: (1, N, H) float16.
        branch_scale: Its scales.
        gate: (B, H) float32.
        rows: (N,) int64, batch row of each token.
    """
    if kernels := triton_kernels(x, KERNELS):
        return kernels.gated_add(x, branch, branch_scale, gate, rows)
    return x + gate[rows] * (branch.float() * branch_scale)


def norm_rotary(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    """RMS norm of each head, then the rotary embedding that rotates halves; needs no scale any more.

    Args:
        x: (1, N, heads, D) float16.
        x_scale: Its scales.
        weight: (D,), of the norm.
        cos: (1, N, D), cosine of each angle.
        sin: (1, N, D).
        eps: Added to the mean square.

    Returns:
        (1, N, heads, D) float16.
    """
    if kernels := triton_kernels(x, KERNELS):
        return kernels.norm_rotary(x, x_scale, weight, cos, sin, eps)
    value = x.float() * x_scale.unsqueeze(2)
    value = value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + eps) * weight.float()
    first, second = value.chunk(2, -1)
    rotated = torch.cat((-second, first), -1)
    return (value * cos.float().unsqueeze(2) + rotated * sin.float().unsqueeze(2)).half()


def gelu_times(gate: torch.Tensor, up: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``gelu(gate) * up``, with the exact (erf) GELU: values and scales.

    Args:
        gate: (1, N, H) float16.
        up: (1, N, H) float16.
        scale: The scales of both.

    Returns:
        (1, N, H) float16, and the scales.
    """
    if kernels := triton_kernels(gate, KERNELS):
        return kernels.gelu_times(gate, up, scale)
    return scaled(F.gelu(gate.float() * scale) * (up.float() * scale))


def scaled(x: torch.Tensor, x_scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Values in float16 and scales of `x`, each token by its own largest magnitude.

    Args:
        x: (..., H) float16 or float32.
        x_scale: The scales that it has already, (..., 1) float32.

    Returns:
        (..., H) float16, and the scales, (..., 1) float32.
    """
    if kernels := triton_kernels(x, KERNELS):
        return kernels.scaled(x, x_scale)
    x = x.float()
    divisor = power_of_two(x.abs().amax(-1, keepdim=True), LARGEST)
    return (x / divisor).half(), divisor if x_scale is None else divisor * x_scale


def power_of_two(largest: torch.Tensor, exponent: int) -> torch.Tensor:
    """The power of two by which `largest`, float32 and not negative, is divided to lie below ``2**exponent``.

    It then is at least half of that, but for magnitudes at the ends of float32's range. Infinity stays infinite.
    """
    bits = (largest.view(torch.int32) >> 23) + (1 - exponent)  # of float32's exponent
    return (bits.clamp(1, INFINITE - 1) << 23).view(torch.float32)
