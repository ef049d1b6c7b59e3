"""Triton kernels of ``elementwise``; imported only where Triton works.

Sums are taken in the order of PyTorch's own kernels, and products are not fused with sums where PyTorch rounds in
between. So the results are upstream's bit for bit, also after the thousands of operations of a picture.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .triton_launch import NO_FMA, on_its_device

ELEMENTS = 1024  # a program of `_gelu_times`
TOKENS = 4  # a program of `_modulated_norm`, one warp each
COLUMNS = 512  # of a row that are normalized at a time: each such part is stored before the next is loaded


@triton.jit
def _fours(values, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """(ROWS, 4 * COUNT) -> (ROWS, COUNT): sums of four neighbours, left to right."""
    even, odd = tl.split(tl.reshape(values, (ROWS, COUNT, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first + second + third + fourth


@triton.jit
def _halves(values, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """(ROWS, COUNT) -> (ROWS, 1): the upper half is added to the lower until one is left. COUNT: 1, 2, 4 ... 32."""
    for step in tl.static_range(1, 6):
        if COUNT >> step > 0:
            left, right = tl.split(tl.permute(tl.reshape(values, (ROWS, 2, COUNT >> step)), (0, 2, 1)))
            values = left + right
    return values


@triton.jit
def _input(x_pointer, branch_pointer, gate_pointer, place, gate_place, inside, HAS_BRANCH: tl.constexpr):
    """Values of ``x``, or of ``x + gate * branch``."""
    x = tl.load(x_pointer + place, inside, 0.0)
    if HAS_BRANCH:
        branch = tl.load(branch_pointer + place, inside, 0.0).to(tl.float32)
        gate = tl.load(gate_pointer + gate_place, inside, 0.0).to(tl.float32)
        x = (x.to(tl.float32) + (gate * branch).to(x.dtype).to(tl.float32)).to(x.dtype)
    return x


@triton.jit(do_not_specialize=["count", "tokens"])  # they change with the prompt's length
def _modulated_norm(
    x_pointer, branch_pointer, gate_pointer, weight_pointer, scale_pointer, shift_pointer, total_pointer, out_pointer,
    rows_pointer, count, tokens, eps, modulation_stride, out_stride, WIDTH: tl.constexpr, HAS_BRANCH: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_MODULATION: tl.constexpr, HAS_ROWS: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """An optional gated addition, an optional norm and an optional modulation, for TOKENS tokens a program.

    A row is read twice, the second time from the GPU's cache: for its mean square and for the result. What a gated
    addition came to is read instead of what it was computed from. The mean square is summed as ``torch.mean`` does: a
    warp takes a row, each lane sums 4 of every 128 values into four sums, these are added, then the upper half of the
    lanes to the lower one.
    """
    token = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    here = token < count
    row = tl.load(rows_pointer + token, here, 0) if HAS_ROWS else token // tokens
    squares = tl.zeros((TOKENS, 128), tl.float32)
    for start in tl.range(0, WIDTH, 128, loop_unroll_factor=8):
        column = start + tl.arange(0, 128)[None, :]
        inside, place = here & (column < WIDTH), token * WIDTH + column
        modulation = row * modulation_stride + column
        x = _input(x_pointer, branch_pointer, gate_pointer, place, modulation, inside, HAS_BRANCH)
        if HAS_BRANCH:
            tl.store(total_pointer + place, x, inside)
        squares += x.to(tl.float32) * x.to(tl.float32)
    if HAS_NORM:
        if HAS_BRANCH:
            tl.debug_barrier()  # other threads of the program stored what this one reads
        mean = _halves(_fours(squares, TOKENS, 32), TOKENS, 32) * (1.0 / WIDTH)
        inverse = tl.rsqrt(mean + eps)
        for start in tl.range(0, WIDTH, COLUMNS):
            column = start + tl.arange(0, COLUMNS)[None, :]
            inside, place = here & (column < WIDTH), token * WIDTH + column
            modulation = row * modulation_stride + column
            x = tl.load((total_pointer if HAS_BRANCH else x_pointer) + place, inside, 0.0)
            weight = tl.load(weight_pointer + column, column < WIDTH, 0.0).to(tl.float32)
            value = (x.to(tl.float32) * inverse).to(x.dtype).to(tl.float32) * weight
            if HAS_MODULATION:
                scale = tl.load(scale_pointer + modulation, inside, 0.0).to(tl.float32)
                shift = tl.load(shift_pointer + modulation, inside, 0.0).to(tl.float32)
                value = value.to(x.dtype).to(tl.float32) * (1 + scale) + shift
            tl.store(out_pointer + token * out_stride + column, value.to(x.dtype), inside)


@on_its_device
def modulated_norm(x, weight, scale, shift, eps, rows=None, out=None) -> torch.Tensor:
    """As ``elementwise.modulated_norm``."""
    x = x.contiguous()
    batch, tokens, width = x.shape
    out = torch.empty_like(x) if out is None else out
    _modulated_norm[(triton.cdiv(batch * tokens, TOKENS),)](
        x, x, x, weight, scale, shift, x, out, x if rows is None else rows, batch * tokens, tokens, eps,
        scale.stride(0), out.stride(1), width, False, True, True, rows is not None, TOKENS, COLUMNS, num_warps=TOKENS,
        **NO_FMA,
    )  # fmt: skip
    return out


@on_its_device
def gated_add_norm(
    x, branch, gate, weight, scale, shift, eps, rows=None, out=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``elementwise.gated_add_norm``."""
    x = x.contiguous()
    batch, tokens, width = x.shape
    total, out = torch.empty_like(x), torch.empty_like(x) if out is None else out
    _modulated_norm[(triton.cdiv(batch * tokens, TOKENS),)](
        x, branch.contiguous(), gate, weight, scale, shift, total, out, x if rows is None else rows, batch * tokens,
        tokens, eps, scale.stride(0), out.stride(1), width, True, True, True, rows is not None, TOKENS, COLUMNS,
        num_warps=TOKENS, **NO_FMA,
    )  # fmt: skip
    return total, out


@on_its_device
def rms_norm(x, weight, eps) -> torch.Tensor:
    """As ``elementwise.rms_norm``."""
    x = x.contiguous()
    width = x.shape[-1]
    count = x.numel() // width
    out = torch.empty_like(x)
    _modulated_norm[(triton.cdiv(count, TOKENS),)](
        x, x, x, weight, x, x, x, out, x, count, 1, eps, 0, width, width, False, True, False, False, TOKENS, COLUMNS,
        num_warps=TOKENS, **NO_FMA,
    )  # fmt: skip
    return out


@on_its_device
def gated_add(x, branch, gate, rows=None) -> torch.Tensor:
    """As ``elementwise.gated_add``."""
    x = x.contiguous()
    batch, tokens, width = x.shape
    total = torch.empty_like(x)
    _modulated_norm[(triton.cdiv(batch * tokens, TOKENS),)](
        x, branch.contiguous(), gate, x, x, x, total, x, x if rows is None else rows, batch * tokens, tokens, 0.0,
        gate.stride(0), width, width, True, False, False, rows is not None, TOKENS, COLUMNS, num_warps=TOKENS, **NO_FMA,
    )  # fmt: skip
    return total


@triton.jit
def _norm_rotary(
    x_pointer, weight_pointer, cos_pointer, sin_pointer, out_pointer, heads, eps, row_stride,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One program a token, with all of its heads. The halves of a head are separate values.

    Squares are summed as ``F.rms_norm`` does: four neighbours in a lane, then the upper half of the lanes to the lower
    one.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    half = tl.arange(0, HALF)[None, :]
    inside = head < heads
    offset = head * (2 * HALF) + half
    a = tl.load(x_pointer + row * row_stride + offset, inside, 0.0)
    b = tl.load(x_pointer + row * row_stride + offset + HALF, inside, 0.0)
    dtype = a.dtype
    a, b = a.to(tl.float32), b.to(tl.float32)
    squares = _fours(a * a, HEADS, HALF // 4) + _fours(b * b, HEADS, HALF // 4)
    scale = tl.rsqrt(_halves(squares, HEADS, HALF // 4) / (2 * HALF) + eps)
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


@on_its_device
def norm_rotary(x, weight, cos, sin, eps) -> torch.Tensor:
    """As ``elementwise.norm_rotary``."""
    batch, tokens, heads, size = x.shape
    if x.stride(3) != 1 or x.stride(2) != size or x.stride(0) != tokens * x.stride(1):
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _norm_rotary[(batch * tokens,)](
        x, weight, cos.contiguous(), sin.contiguous(), out, heads, eps, x.stride(1),
        triton.next_power_of_2(heads), size // 2, num_warps=4, **NO_FMA,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["count"])
def _gelu_times(
    gate_pointer,
    up_pointer,
    tail_pointer,
    out_pointer,
    count,
    HAS_TAIL: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    gate = tl.load(gate_pointer + index, inside, 0.0)
    dtype = gate.dtype
    value = gate.to(tl.float32)
    value = (value * 0.5 * (1 + tl.erf(value * 0.7071067811865476))).to(dtype)
    if HAS_TAIL:
        bits = gate.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        in_tail = bits >= 0xC000
        value = tl.where(in_tail, tl.load(tail_pointer + (bits - 0xC000), in_tail & inside, 0.0), value)
    up = tl.load(up_pointer + index, inside, 0.0).to(tl.float32)
    there = index if STRIDE == WIDTH else index // WIDTH * STRIDE + index % WIDTH
    tl.store(out_pointer + there, (value.to(tl.float32) * up).to(dtype), inside)


@on_its_device
def gelu_times(gate, up, out=None) -> torch.Tensor:
    """As ``elementwise.gelu_times``."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate) if out is None else out
    # Rows that lie behind each other are one, whatever their width: the kernel is compiled once for these.
    apart = not out.is_contiguous()
    width, stride = (out.shape[-1], out.stride(-2)) if apart else (1, 1)
    has_tail = gate.dtype.itemsize == 2
    _gelu_times[(triton.cdiv(gate.numel(), ELEMENTS),)](
        gate, up, gelu_tail(gate.dtype, gate.device) if has_tail else gate, out, gate.numel(), has_tail, width,
        stride, ELEMENTS,
        num_warps=4, **NO_FMA,
    )  # fmt: skip
    return out


@functools.cache
def gelu_tail(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(16384,) PyTorch's GELU of every value up to -2 of a 16-bit dtype: those of the bits 0xC000 to 0xFFFF.

    There ``1 + erf`` cancels, so the last bits by which Triton's erf differs from that of PyTorch's CUDA version show
    in the result.
    """
    bits = torch.arange(0xC000 - 0x10000, 0, dtype=torch.int16, device=device)
    return torch.nn.functional.gelu(bits.view(dtype))
