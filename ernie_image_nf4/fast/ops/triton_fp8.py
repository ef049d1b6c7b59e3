"""Triton kernels of ``fp8``: activations and NF4 weights rounded to fp8 with one scale a row. One program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .fp8 import FP8, LARGEST, SMALLEST
from .triton_launch import NO_FMA, on_its_device

VALUES = 4096  # of a weight's row that are converted at a time
VALUES_A_THREAD = 64  # enough to make up for the work that each thread does once


@triton.jit
def _inverse_scale(largest, scale_pointer, row, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    """Factor that makes a row's largest magnitude fp8's largest. Stores its inverse, the row's scale."""
    largest = tl.maximum(largest, SMALLEST)
    tl.store(scale_pointer + row, tl.math.div_rn(largest, LARGEST))
    return tl.math.div_rn(LARGEST, largest)


@triton.jit
def _quantize_rows(
    x_pointer, out_pointer, scale_pointer, width, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    x = tl.load(x_pointer + row * width + column, inside, 0.0).to(tl.float32)
    x *= _inverse_scale(tl.max(tl.abs(x), 0), scale_pointer, row, LARGEST, SMALLEST)
    tl.store(out_pointer + row * width + column, x.to(out_pointer.dtype.element_ty), inside)


@on_its_device
def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``fp8.quantize_rows``."""
    x = x.contiguous()
    rows, width = x.shape
    out, scale = _empty_rows(x, rows, width)
    _quantize_rows[(rows,)](
        x, out, scale, width, LARGEST, SMALLEST, triton.next_power_of_2(width), num_warps=8, **NO_FMA
    )
    return out, scale


@triton.jit
def _gelu_times_rows(
    gate_pointer, up_pointer, out_pointer, scale_pointer, width, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside, place = column < width, row * width + column
    gate = tl.load(gate_pointer + place, inside, 0.0).to(tl.float32)
    up = tl.load(up_pointer + place, inside, 0.0).to(tl.float32)
    value = gate * 0.5 * (1 + tl.erf(gate * 0.7071067811865476)) * up
    value *= _inverse_scale(tl.max(tl.abs(value), 0), scale_pointer, row, LARGEST, SMALLEST)
    tl.store(out_pointer + place, value.to(out_pointer.dtype.element_ty), inside)


@on_its_device
def gelu_times_rows(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``fp8.gelu_times_rows``."""
    gate, up = gate.contiguous(), up.contiguous()
    rows, width = gate.shape
    out, scale = _empty_rows(gate, rows, width)
    _gelu_times_rows[(rows,)](
        gate, up, out, scale, width, LARGEST, SMALLEST, triton.next_power_of_2(width), num_warps=16, **NO_FMA
    )
    return out, scale


@triton.jit
def _block_scales(
    absmax_pointer, outer_absmax_pointer, outer_table_pointer, offset_pointer, place, inside, NESTED: tl.constexpr,
    OUTER_SIZE: tl.constexpr,
):  # fmt: skip
    absmax = tl.load(absmax_pointer + place, inside, 0)
    if NESTED:
        outer = tl.load(outer_absmax_pointer + place // OUTER_SIZE, inside, 0.0)
        absmax = tl.load(outer_table_pointer + absmax.to(tl.int32)) * outer + tl.load(offset_pointer)
    return tl.where(inside, absmax, 0.0)


@triton.jit
def _weight_to_fp8(
    codes_pointer, absmax_pointer, table_pointer, outer_absmax_pointer, outer_table_pointer, offset_pointer,
    out_pointer, scale_pointer, NESTED: tl.constexpr, OUTER_SIZE: tl.constexpr, BYTES: tl.constexpr,
    COUNT: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """A row is COUNT blocks of BYTES bytes, two codes a byte, the first in the upper half. CHUNK blocks at a time."""
    row = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, PADDED)
    scales = _block_scales(
        absmax_pointer, outer_absmax_pointer, outer_table_pointer, offset_pointer, row * COUNT + every, every < COUNT,
        NESTED, OUTER_SIZE,
    )  # fmt: skip
    inverse = _inverse_scale(tl.max(tl.abs(scales), 0), scale_pointer, row, LARGEST, SMALLEST)
    for start in tl.range(0, COUNT, CHUNK):
        block = start + tl.arange(0, CHUNK)[:, None]
        inside, place = block < COUNT, row * COUNT + block
        scale = inverse * _block_scales(
            absmax_pointer, outer_absmax_pointer, outer_table_pointer, offset_pointer, place, inside, NESTED, OUTER_SIZE
        )
        codes = tl.load(codes_pointer + place * BYTES + tl.arange(0, BYTES)[None, :], inside, 0).to(tl.int32)
        first = tl.load(table_pointer + (codes >> 4)) * scale
        second = tl.load(table_pointer + (codes & 15)) * scale
        values = tl.reshape(tl.join(first, second), (CHUNK, 2 * BYTES))
        at = place * (2 * BYTES) + tl.arange(0, 2 * BYTES)[None, :]
        tl.store(out_pointer + at, values.to(out_pointer.dtype.element_ty), inside)


@on_its_device
def weight_to_fp8(
    codes, absmax, table, rows, columns, block_size, outer_absmax=None, outer_table=None, offset=None, outer_size=1
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``fp8.weight_to_fp8``; the parts of a quantization state one by one."""
    out, scale = _empty_rows(codes, rows, columns)
    blocks = columns // block_size
    nested = outer_absmax is not None
    outer = (outer_absmax, outer_table, offset) if nested else (absmax, absmax, absmax)
    padded = triton.next_power_of_2(blocks)
    chunk = min(padded, max(1, VALUES // block_size))
    _weight_to_fp8[(rows,)](
        codes, absmax, table, *outer, out, scale, nested, outer_size, block_size // 2, blocks, padded, chunk, LARGEST,
        SMALLEST, num_warps=max(1, chunk * block_size // (32 * VALUES_A_THREAD)), **NO_FMA,
    )  # fmt: skip
    return out, scale


def _empty_rows(like: torch.Tensor, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, width) fp8 and (rows, 1) float32 scales, on the device of `like`."""
    return like.new_empty(rows, width, dtype=FP8), like.new_empty(rows, 1, dtype=torch.float32)
