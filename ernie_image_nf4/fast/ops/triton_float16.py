"""Triton kernels of ``float16``; imported only where Triton works. One program a token, whose values stay in registers.

Nothing here has to give upstream's bits: sums are taken as Triton likes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .float16 import LARGEST, NORM
from .triton_launch import NO_FMA, on_its_device


@triton.jit
def _power_of_two(largest, EXPONENT: tl.constexpr):
    """As ``float16.power_of_two``."""
    bits = (largest.to(tl.int32, bitcast=True) >> 23) + (1 - EXPONENT)
    return (tl.minimum(tl.maximum(bits, 1), 254) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _norm(
    x_pointer, branch_pointer, branch_scale_pointer, gate_pointer, weight_pointer, scale_pointer, shift_pointer,
    total_pointer, out_pointer, out_scale_pointer, rows_pointer, width, root, eps, modulation_stride,
    HAS_BRANCH: tl.constexpr, HAS_NORM: tl.constexpr, NORM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """An optional gated addition, and an optional modulated norm. `root`: of the width."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside, place = column < width, token * width + column
    modulation = tl.load(rows_pointer + token) * modulation_stride + column
    x = tl.load(x_pointer + place, inside, 0.0)
    if HAS_BRANCH:
        branch = tl.load(branch_pointer + place, inside, 0.0).to(tl.float32) * tl.load(branch_scale_pointer + token)
        x += tl.load(gate_pointer + modulation, inside, 0.0) * branch
        tl.store(total_pointer + place, x, inside)
    if HAS_NORM:
        factor = tl.load(weight_pointer + column, inside, 0.0).to(tl.float32)
        factor *= 1 + tl.load(scale_pointer + modulation, inside, 0.0)
        shift = tl.load(shift_pointer + modulation, inside, 0.0)
        largest = tl.max(tl.abs(factor), 0) * root + tl.sqrt(tl.sum(shift * shift, 0))
        divisor = _power_of_two(largest, NORM)
        share = tl.math.div_rn(1.0, divisor)
        value = x * tl.rsqrt(tl.sum(x * x, 0) / width + eps) * (factor * share) + shift * share
        tl.store(out_pointer + place, value.to(tl.float16), inside)
        tl.store(out_scale_pointer + token, divisor)


def _launch_norm(x, branch, branch_scale, gate, weight, scale, shift, eps, rows, with_branch, with_norm):
    """`_norm` with what it writes: sum, values and scales. What isn't asked for is `x`."""
    x = x.contiguous()
    width = x.shape[-1]
    tokens = x.numel() // width
    total = torch.empty_like(x) if with_branch else x
    values = torch.empty_like(x, dtype=torch.float16) if with_norm else x
    scales = x.new_empty(*x.shape[:-1], 1) if with_norm else x
    block = triton.next_power_of_2(width)
    _norm[(tokens,)](
        x, branch, branch_scale, gate, weight, scale, shift, total, values, scales, rows, width, width**0.5, eps,
        (scale if with_norm else gate).stride(0), with_branch, with_norm, NORM, block,
        num_warps=_warps(block), **NO_FMA,
    )  # fmt: skip
    return total, values, scales


@on_its_device
def modulated_norm(x, weight, scale, shift, eps, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``float16.modulated_norm``."""
    return _launch_norm(x, x, x, x, weight, scale, shift, eps, rows, False, True)[1:]


@on_its_device
def gated_add_norm(x, branch, branch_scale, gate, weight, scale, shift, eps, rows):
    """As ``float16.gated_add_norm``."""
    branch, branch_scale = branch.contiguous(), branch_scale.contiguous()
    return _launch_norm(x, branch, branch_scale, gate, weight, scale, shift, eps, rows, True, True)


@on_its_device
def gated_add(x, branch, branch_scale, gate, rows) -> torch.Tensor:
    """As ``float16.gated_add``."""
    branch, branch_scale = branch.contiguous(), branch_scale.contiguous()
    return _launch_norm(x, branch, branch_scale, gate, x, x, x, 0.0, rows, True, False)[0]


@triton.jit
def _norm_rotary(
    x_pointer, x_scale_pointer, weight_pointer, cos_pointer, sin_pointer, out_pointer, heads, eps, row_stride,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """All heads of a token. The halves of a head are separate values."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    half = tl.arange(0, HALF)[None, :]
    inside = head < heads
    offset = head * (2 * HALF) + half
    x_scale = tl.load(x_scale_pointer + row)
    a = tl.load(x_pointer + row * row_stride + offset, inside, 0.0).to(tl.float32) * x_scale
    b = tl.load(x_pointer + row * row_stride + offset + HALF, inside, 0.0).to(tl.float32) * x_scale
    scale = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)[:, None]
    a *= scale * tl.load(weight_pointer + half).to(tl.float32)
    b *= scale * tl.load(weight_pointer + half + HALF).to(tl.float32)
    angle = row * (2 * HALF) + half
    cos_a, sin_a = tl.load(cos_pointer + angle).to(tl.float32), tl.load(sin_pointer + angle).to(tl.float32)
    cos_b = tl.load(cos_pointer + angle + HALF).to(tl.float32)
    sin_b = tl.load(sin_pointer + angle + HALF).to(tl.float32)
    out = out_pointer + row * heads * (2 * HALF) + offset
    tl.store(out, (a * cos_a - b * sin_a).to(tl.float16), inside)
    tl.store(out + HALF, (b * cos_b + a * sin_b).to(tl.float16), inside)


@on_its_device
def norm_rotary(x, x_scale, weight, cos, sin, eps) -> torch.Tensor:
    """As ``float16.norm_rotary``."""
    batch, tokens, heads, size = x.shape
    if x.stride(3) != 1 or x.stride(2) != size or x.stride(0) != tokens * x.stride(1):
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.float16, device=x.device)
    _norm_rotary[(batch * tokens,)](
        x, x_scale.contiguous(), weight, cos.contiguous(), sin.contiguous(), out, heads, eps, x.stride(1),
        triton.next_power_of_2(heads), size // 2, num_warps=4, **NO_FMA,
    )  # fmt: skip
    return out


@triton.jit
def _gelu_times(
    gate_pointer, up_pointer, scale_pointer, out_pointer, out_scale_pointer, width, LARGEST: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside, place = column < width, row * width + column
    scale = tl.load(scale_pointer + row)
    gate = tl.load(gate_pointer + place, inside, 0.0).to(tl.float32) * scale
    up = tl.load(up_pointer + place, inside, 0.0).to(tl.float32) * scale
    value = gate * 0.5 * (1 + tl.erf(gate * 0.7071067811865476)) * up
    divisor = _power_of_two(tl.max(tl.abs(value), 0), LARGEST)
    tl.store(out_pointer + place, (value * tl.math.div_rn(1.0, divisor)).to(tl.float16), inside)
    tl.store(out_scale_pointer + row, divisor)


@on_its_device
def gelu_times(gate, up, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``float16.gelu_times``."""
    gate, up = gate.contiguous(), up.contiguous()
    values, scales, width, block = _empty_rows(gate)
    _gelu_times[(scales.numel(),)](
        gate, up, scale.contiguous(), values, scales, width, LARGEST, block, num_warps=_warps(block), **NO_FMA
    )
    return values, scales


@triton.jit
def _scaled(
    x_pointer, x_scale_pointer, out_pointer, out_scale_pointer, width, HAS_SCALE: tl.constexpr, LARGEST: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside, place = column < width, row * width + column
    x = tl.load(x_pointer + place, inside, 0.0).to(tl.float32)
    divisor = _power_of_two(tl.max(tl.abs(x), 0), LARGEST)
    tl.store(out_pointer + place, (x * tl.math.div_rn(1.0, divisor)).to(tl.float16), inside)
    if HAS_SCALE:
        divisor *= tl.load(x_scale_pointer + row)
    tl.store(out_scale_pointer + row, divisor)


@on_its_device
def scaled(x, x_scale=None) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``float16.scaled``."""
    x = x.contiguous()
    values, scales, width, block = _empty_rows(x)
    _scaled[(scales.numel(),)](
        x, x if x_scale is None else x_scale.contiguous(), values, scales, width, x_scale is not None, LARGEST, block,
        num_warps=_warps(block), **NO_FMA,
    )  # fmt: skip
    return values, scales


def _empty_rows(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Values and scales of rows, their width, and the power of two that it fits in."""
    values = torch.empty_like(like, dtype=torch.float16)
    scales = like.new_empty(*like.shape[:-1], 1, dtype=torch.float32)
    return values, scales, like.shape[-1], triton.next_power_of_2(like.shape[-1])


def _warps(block: int) -> int:
    """For a row of so many values: 16 or 32 a thread."""
    return min(16, max(1, block // 512))
