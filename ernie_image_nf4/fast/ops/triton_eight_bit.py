"""Triton kernels of ``eight_bit``: activations and NF4 weights in 8 bits with one scale a row. One program a row.

A row is held as groups of values, (COUNT, GROUP), whose rotation is a product with a small matrix. Tensor cores make it
cheaper than additions would be.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .eight_bit import SMALLEST, Format, Rounded, empty_rows
from .rotation import GROUP, hadamard
from .triton_launch import NO_FMA, on_its_device
from .triton_nf4 import INTERPRETED, number_bytes, numbers_on

VALUES_A_WARP = 1024  # of an activation's row
WEIGHTS_A_WARP = 1024  # of a weight's row


@triton.jit
def _largest_bits(x):
    """The largest magnitude as the bits of a float32. Those of NaN are larger than any number's."""
    return tl.max(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1), 0)


@triton.jit
def _unit(bits):
    """As ``rotation.rotate_rows``: the power of two at or below a float32, given its bits, and the inverse."""
    exponent = tl.minimum(tl.maximum(bits >> 23, 1), 253)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _store_rounded(
    x, unit, out_pointer, scale_pointer, row, width, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
    COUNT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Store a row in 8 bits and its scale."""
    largest = _largest_bits(x).to(tl.float32, bitcast=True)
    largest = tl.where(largest < SMALLEST, SMALLEST, largest)  # which leaves NaN as it is
    tl.store(scale_pointer + row, tl.math.div_rn(largest, LARGEST) * unit)
    x *= tl.math.div_rn(LARGEST, largest)
    column = tl.arange(0, COUNT)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    if out_pointer.dtype.element_ty == tl.int8:
        # 1.5 * 2^23 leaves no bits for fractions: the sum is rounded to the nearest, its low bits are the whole number.
        x = (x + 12582912.0).to(tl.int32, bitcast=True)
    tl.store(out_pointer + row * width + column, x.to(out_pointer.dtype.element_ty), column < width)


@triton.jit
def _rotated(x, COUNT: tl.constexpr, GROUP: tl.constexpr):
    """(COUNT, GROUP) times the matrix of ``rotation`` by additions: of four neighbours, then of those four apart ..."""
    STAGES: tl.constexpr = 3 if GROUP == 64 else (4 if GROUP == 256 else 2)
    for _ in tl.static_range(STAGES):
        even, odd = tl.split(tl.reshape(x, (COUNT, GROUP // 4, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        half = (first + second + third + fourth) * 0.5
        x = tl.join(tl.join(half - fourth, half - second), tl.join(half - third, half - first))
        x = tl.reshape(tl.permute(tl.reshape(x, (COUNT, GROUP // 4, 4)), (0, 2, 1)), (COUNT, GROUP))
    return x


@triton.jit
def _matrix(pointer, FIRST: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr):
    """Every STEP-th row of the (GROUP, GROUP) matrix of a rotation."""
    row = FIRST + STEP * tl.arange(0, GROUP // STEP)
    return tl.load(pointer + row[:, None] * GROUP + tl.arange(0, GROUP)[None, :])


@triton.jit
def _turned(x, matrix_pointer, TENSOR_CORES: tl.constexpr, COUNT: tl.constexpr, GROUP: tl.constexpr):
    """(COUNT, GROUP) float32 of magnitudes below 2, rounded to float16 and rotated."""
    x = x.to(tl.float16)
    if TENSOR_CORES:
        return tl.dot(x, _matrix(matrix_pointer, 0, 1, GROUP))
    else:
        return _rotated(x.to(tl.float32), COUNT, GROUP)


@triton.jit
def _quantize_rows(
    x_pointer, up_pointer, matrix_pointer, out_pointer, scale_pointer, width, IS_GELU: tl.constexpr,
    ROTATED: tl.constexpr, TENSOR_CORES: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
    COUNT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COUNT)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside, place = column < width, row * width + column
    x = tl.load(x_pointer + place, inside, 0.0).to(tl.float32)
    if IS_GELU:
        up = tl.load(up_pointer + place, inside, 0.0).to(tl.float32)
        x = x * 0.5 * (1 + tl.erf(x * 0.7071067811865476)) * up
    unit = 1.0
    if ROTATED:
        unit, inverse = _unit(_largest_bits(x))
        x = _turned(x * inverse, matrix_pointer, TENSOR_CORES, COUNT, GROUP)
    _store_rounded(x, unit, out_pointer, scale_pointer, row, width, LARGEST, SMALLEST, COUNT, GROUP)


@on_its_device
def quantize_rows(x: torch.Tensor, to: Format, into: Rounded | None = None) -> Rounded:
    """As ``eight_bit.quantize_rows``. `into`: memory for the result."""
    return _launch_rows(x, x, to, is_gelu=False, into=into)


@on_its_device
def gelu_times_rows(gate: torch.Tensor, up: torch.Tensor, to: Format) -> Rounded:
    """As ``eight_bit.gelu_times_rows``."""
    return _launch_rows(gate, up, to, is_gelu=True)


def _launch_rows(x: torch.Tensor, up: torch.Tensor, to: Format, is_gelu: bool, into: Rounded | None = None) -> Rounded:
    x, up = x.contiguous(), up.contiguous()
    rows, width = x.shape
    out, scale = empty_rows(x, rows, width, to) if into is None else into
    count = max(16, triton.next_power_of_2(triton.cdiv(width, GROUP)))
    _quantize_rows[(rows,)](
        x, up, hadamard(GROUP, x.device), out, scale, width, is_gelu, to.rotated, rotates_by_tensor_cores(x.device),
        to.largest, SMALLEST, count, GROUP, num_warps=_warps(count * GROUP, VALUES_A_WARP), **NO_FMA,
    )  # fmt: skip
    return out, scale


@triton.jit(do_not_specialize=["tokens"])  # they change with the prompt's length
def _norm_rows(
    x_pointer, branch_pointer, gate_pointer, weight_pointer, shift_pointer, modulation_pointer, rows_pointer,
    total_pointer, matrix_pointer, out_pointer, scale_pointer, tokens, width, eps, modulation_stride,
    HAS_BRANCH: tl.constexpr, HAS_ROWS: tl.constexpr, ROTATED: tl.constexpr, TENSOR_CORES: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr, COUNT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """An optional gated addition, a norm and a modulation, whose result is stored in 8 bits only."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_pointer + token) if HAS_ROWS else token // tokens
    column = tl.arange(0, COUNT)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside, place, modulation = column < width, token * width + column, row * modulation_stride + column
    x = tl.load(x_pointer + place, inside, 0.0)
    if HAS_BRANCH:
        branch = tl.load(branch_pointer + place, inside, 0.0).to(tl.float32)
        branch *= tl.load(gate_pointer + modulation, inside, 0.0).to(tl.float32)
        x = (x.to(tl.float32) + branch.to(x.dtype).to(tl.float32)).to(x.dtype)
        tl.store(total_pointer + place, x, inside)
    x = x.to(tl.float32)
    x *= tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / width + eps)
    x *= tl.load(weight_pointer + column, inside, 0.0).to(tl.float32)
    x *= 1 + tl.load(modulation_pointer + modulation, inside, 0.0).to(tl.float32)
    x += tl.load(shift_pointer + modulation, inside, 0.0).to(tl.float32)
    unit = 1.0
    if ROTATED:
        unit, inverse = _unit(_largest_bits(x))
        x = _turned(x * inverse, matrix_pointer, TENSOR_CORES, COUNT, GROUP)
    _store_rounded(x, unit, out_pointer, scale_pointer, token, width, LARGEST, SMALLEST, COUNT, GROUP)


@on_its_device
def gated_add_norm_rows(x, branch, gate, weight, scale, shift, eps, rows, to) -> tuple[torch.Tensor, Rounded]:
    """As ``eight_bit.gated_add_norm_rows``, and without a branch ``modulated_norm_rows`` with `x` before it."""
    x = x.contiguous()
    batch, tokens, width = x.shape
    has_branch = branch is not None
    total = torch.empty_like(x) if has_branch else x
    out, out_scale = empty_rows(x, batch * tokens, width, to)
    count = max(16, triton.next_power_of_2(triton.cdiv(width, GROUP)))
    _norm_rows[(batch * tokens,)](
        x, branch.contiguous() if has_branch else x, gate if has_branch else x, weight, shift, scale,
        x if rows is None else rows, total, hadamard(GROUP, x.device), out, out_scale, tokens, width, eps,
        scale.stride(0), has_branch, rows is not None, to.rotated, rotates_by_tensor_cores(x.device), to.largest,
        SMALLEST, count, GROUP, num_warps=_warps(count * GROUP, VALUES_A_WARP), **NO_FMA,
    )  # fmt: skip
    return total, (out, out_scale)


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
def _quantize_weight(
    codes_pointer, absmax_pointer, table_pointer, outer_absmax_pointer, outer_table_pointer, offset_pointer,
    matrix_pointer, out_pointer, scale_pointer, NESTED: tl.constexpr, OUTER_SIZE: tl.constexpr, BYTES: tl.constexpr,
    BLOCKS: tl.constexpr, PADDED: tl.constexpr, ROTATED: tl.constexpr, TENSOR_CORES: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr, GROUP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A row is BLOCKS blocks of BYTES bytes, two codes a byte, the first in the upper half."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, PADDED)[:, None]
    inside, place = block < BLOCKS, row * BLOCKS + block
    scale = _block_scales(
        absmax_pointer, outer_absmax_pointer, outer_table_pointer, offset_pointer, place, inside, NESTED, OUTER_SIZE
    )
    codes = tl.load(codes_pointer + place * BYTES + tl.arange(0, BYTES)[None, :], inside, 0)
    COUNT: tl.constexpr = PADDED * BYTES * 2 // GROUP
    unit = 1.0
    if ROTATED:
        unit, inverse = _unit(_largest_bits(scale))  # no value is larger than its block's scale
        scale *= inverse
    first, second = number_bytes(codes, table_pointer, INTERPRETED)
    first, second = first * scale, second * scale
    if ROTATED:
        first, second = first.to(tl.float16), second.to(tl.float16)
    if ROTATED and TENSOR_CORES:  # first and second values of the pairs apart, which spares bringing them in order
        x = tl.dot(tl.reshape(first, (COUNT, GROUP // 2)), _matrix(matrix_pointer, 0, 2, GROUP))
        x = tl.dot(tl.reshape(second, (COUNT, GROUP // 2)), _matrix(matrix_pointer, 1, 2, GROUP), x)
    else:
        x = tl.reshape(tl.join(first, second), (COUNT, GROUP)).to(tl.float32)
        if ROTATED:
            x = _rotated(x, COUNT, GROUP)
    _store_rounded(
        x, unit, out_pointer, scale_pointer, row, BLOCKS * BYTES * 2, LARGEST, SMALLEST, COUNT, GROUP
    )  # fmt: skip


@on_its_device
def quantize_weight(
    codes, absmax, into, block_size, to, outer_absmax=None, outer_table=None, offset=None, outer_size=1
) -> None:
    """As ``eight_bit.quantize_weight`` into such tensors; the parts of a quantization state one by one."""
    out, scale = into
    rows, columns = out.shape
    blocks = columns // block_size
    nested = outer_absmax is not None
    outer = (outer_absmax, outer_table, offset) if nested else (absmax, absmax, absmax)
    padded = triton.next_power_of_2(max(blocks, triton.cdiv(16 * GROUP, block_size)))
    _quantize_weight[(rows,)](
        codes, absmax, numbers_on(codes.device, exact=True), *outer, hadamard(GROUP, codes.device), out, scale, nested,
        outer_size, block_size // 2, blocks, padded, to.rotated, rotates_by_tensor_cores(codes.device), to.largest,
        SMALLEST, GROUP, INTERPRETED, num_warps=_warps(padded * block_size, WEIGHTS_A_WARP), **NO_FMA,
    )  # fmt: skip


def rotates_by_tensor_cores(device: torch.device) -> bool:
    """Whether groups are rotated by tensor cores, which Triton knows from Ampere on.

    Those of compute capability 10 keep results in a memory of their own, where Triton 3.6 finds no row's largest value.
    """
    major, _ = torch.cuda.get_device_capability(device)
    return major in (8, 9, 12)


def _warps(values: int, values_a_warp: int) -> int:
    return min(16, max(1, values // values_a_warp))
