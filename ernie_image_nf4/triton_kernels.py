"""The Triton side of ``kernels.py``; imported only where Triton is."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

ELEMENTS = 1024  # a program of the purely element-wise kernel


def _on_its_device(launch):
    """Triton launches on the current device, whichever the first tensor's is."""

    @functools.wraps(launch)
    def guarded(x, *args):
        with torch.cuda.device_of(x):
            return launch(x, *args)

    return guarded


@triton.jit(do_not_specialize=["tokens"])  # which differ from prompt to prompt
def _modulated_norm(
    x_pointer, branch_pointer, gate_pointer, weight_pointer, scale_pointer, shift_pointer, total_pointer, out_pointer,
    rows_pointer, tokens, width, eps, modulation_stride, HAS_BRANCH: tl.constexpr, HAS_NORM: tl.constexpr, HAS_MODULATION: tl.constexpr,
    HAS_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a token: an optional gated addition, then an optional norm, then an optional modulation."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    if HAS_ROWS:
        modulation = tl.load(rows_pointer + row) * modulation_stride + column
    else:
        modulation = (row // tokens) * modulation_stride + column
    x = tl.load(x_pointer + row * width + column, inside, 0.0)
    dtype = x.dtype
    if HAS_BRANCH:
        branch = tl.load(branch_pointer + row * width + column, inside, 0.0).to(tl.float32)
        gate = tl.load(gate_pointer + modulation, inside, 0.0).to(tl.float32)
        x = (x.to(tl.float32) + (gate * branch).to(dtype).to(tl.float32)).to(dtype)
        tl.store(total_pointer + row * width + column, x, inside)
    if HAS_NORM:
        value = x.to(tl.float32)
        value = value * tl.rsqrt(tl.sum(value * value) / width + eps)
        weight = tl.load(weight_pointer + column, inside, 0.0).to(tl.float32)
        value = (value.to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
        if HAS_MODULATION:
            scale = tl.load(scale_pointer + modulation, inside, 0.0).to(tl.float32)
            shift = tl.load(shift_pointer + modulation, inside, 0.0).to(tl.float32)
            value = value * (1 + scale) + shift
        tl.store(out_pointer + row * width + column, value.to(dtype), inside)


@_on_its_device
def modulated_norm(x, branch, gate, weight, scale, shift, eps, rows=None) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``kernels.gated_add_norm``; without `branch` the first result is `x` itself."""
    x = x.contiguous()
    batch, tokens, width = x.shape
    total = torch.empty_like(x) if branch is not None else x
    out = torch.empty_like(x)
    _modulated_norm[(batch * tokens,)](
        x, x if branch is None else branch.contiguous(), scale if gate is None else gate, weight, scale, shift, total, out,
        x if rows is None else rows, tokens, width, eps, scale.stride(0), branch is not None, True, True, rows is not None,
        triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return total, out


@_on_its_device
def rms_norm(x, weight, eps) -> torch.Tensor:
    """See ``kernels.rms_norm``."""
    x = x.contiguous()
    width = x.shape[-1]
    out = torch.empty_like(x)
    _modulated_norm[(x.numel() // width,)](
        x, x, x, weight, x, x, x, out,
        x, 1, width, eps, 0, False, True, False, False, triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return out


@_on_its_device
def gated_add(x, branch, gate, rows=None) -> torch.Tensor:
    """See ``kernels.gated_add``."""
    x = x.contiguous()
    batch, tokens, width = x.shape
    total = torch.empty_like(x)
    _modulated_norm[(batch * tokens,)](
        x, branch.contiguous(), gate, x, x, x, total, x,
        x if rows is None else rows, tokens, width, 0.0, gate.stride(0), True, False, False, rows is not None,
        triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return total


@triton.jit
def _norm_rotary(
    x_pointer, weight_pointer, cos_pointer, sin_pointer, out_pointer, heads, eps, row_stride,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One program a token, all of its heads: the two halves of each head are held apart."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    half = tl.arange(0, HALF)[None, :]
    inside = head < heads
    offset = head * (2 * HALF) + half
    a = tl.load(x_pointer + row * row_stride + offset, inside, 0.0)
    b = tl.load(x_pointer + row * row_stride + offset + HALF, inside, 0.0)
    dtype = a.dtype
    a, b = a.to(tl.float32), b.to(tl.float32)
    scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
    a = (a * scale * tl.load(weight_pointer + half).to(tl.float32)).to(dtype).to(tl.float32)
    b = (b * scale * tl.load(weight_pointer + half + HALF).to(tl.float32)).to(dtype).to(tl.float32)
    angle = row * (2 * HALF) + half
    cos_a, sin_a = tl.load(cos_pointer + angle).to(tl.float32), tl.load(sin_pointer + angle).to(tl.float32)
    cos_b, sin_b = (
        tl.load(cos_pointer + angle + HALF).to(tl.float32),
        tl.load(sin_pointer + angle + HALF).to(tl.float32),
    )
    out = row * heads * (2 * HALF) + offset
    first = (a * cos_a).to(dtype).to(tl.float32) - (b * sin_a).to(dtype).to(tl.float32)
    tl.store(out_pointer + out, first.to(dtype), inside)
    second = (b * cos_b).to(dtype).to(tl.float32) + (a * sin_b).to(dtype).to(tl.float32)
    tl.store(out_pointer + out + HALF, second.to(dtype), inside)


@_on_its_device
def norm_rotary(x, weight, cos, sin, eps) -> torch.Tensor:
    """See ``kernels.norm_rotary``."""
    batch, tokens, heads, size = x.shape
    if x.stride(3) != 1 or x.stride(2) != size or x.stride(0) != tokens * x.stride(1):
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _norm_rotary[(batch * tokens,)](
        x, weight, cos.contiguous(), sin.contiguous(), out, heads, eps, x.stride(1),
        triton.next_power_of_2(heads), size // 2, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["count"])
def _gelu_times(gate_pointer, up_pointer, out_pointer, count, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    gate = tl.load(gate_pointer + index, inside, 0.0)
    dtype = gate.dtype
    value = gate.to(tl.float32)
    value = 0.5 * value * (1 + tl.erf(value * 0.7071067811865476))
    up = tl.load(up_pointer + index, inside, 0.0).to(tl.float32)
    tl.store(out_pointer + index, (value.to(dtype).to(tl.float32) * up).to(dtype), inside)


@_on_its_device
def gelu_times(gate, up) -> torch.Tensor:
    """See ``kernels.gelu_times``."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _gelu_times[(triton.cdiv(gate.numel(), ELEMENTS),)](gate, up, out, gate.numel(), ELEMENTS, num_warps=4)
    return out
