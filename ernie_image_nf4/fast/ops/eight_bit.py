"""Rounding to int8 or fp8 (e4m3) with one scale a row, and the product of two such matrices.

A row is divided by its scale so that its largest magnitude becomes the format's largest, 127 or 448; the product
multiplies the scales back in. int8 has evenly spaced numbers and its sums are exact; before rounding, inputs and
weights are rotated (``rotation``), which brings values near to a normal distribution. fp8 keeps four significant bits
of large and small values alike. Weights stay NF4 in memory and are converted for each product.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState, dequantize_4bit

from ...repository.nf4_format import block_scales
from ...upstream.models import int8_matmul
from .elementwise import gated_add, modulated_norm, triton_kernels
from .rotation import GROUP, rotate_rows

KERNELS, PRODUCT_KERNELS = "triton_eight_bit", "triton_int8"
TENSOR_CORES = (8, 0)  # capability from which Triton multiplies with them; cuBLAS does on Turing (7.5) as well
SMALLEST = 1e-30  # rows of smaller magnitudes are scaled as if they had this one: no division by zero
MULTIPLE = 16  # both sides of a weight have to be multiples of it
ROWS_AT_ONCE = 2048  # whose sums are 96 MiB with the feed-forward layers of the full-size model
MAX_WIDTH = 16384  # of a row, which the kernels round in one piece


@dataclass(frozen=True)
class Format:
    """A format of 8 bits.

    Attributes:
        name: As ``load`` takes it.
        dtype: Of its values.
        largest: Its largest number.
        rotated: Whether inputs and weights are rotated before they are rounded.
    """

    name: str
    dtype: torch.dtype
    largest: float
    rotated: bool


INT8 = Format("int8", torch.int8, 127.0, rotated=True)
FP8 = Format("fp8", torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max, rotated=False)

Rounded = tuple[torch.Tensor, torch.Tensor]
"""Values in 8 bits, (N, H), and the scales of their rows, (N, 1) float32."""


class RoundedTokens(NamedTuple):
    """Tokens that are there in 8 bits only.

    Attributes:
        rounded: Values and scales, N rows.
        to: The format.
        shape: Of the tokens, (..., H) with N rows.
        dtype: Of what they are multiplied to.
    """

    rounded: Rounded
    to: Format
    shape: torch.Size
    dtype: torch.dtype


def fits(state: QuantState) -> bool:
    """Whether a weight of this NF4 state is of a shape that can be multiplied in 8 bits."""
    rows, columns = state.shape
    return (
        rows % MULTIPLE == 0
        and columns % max(MULTIPLE, GROUP) == 0
        and columns <= MAX_WIDTH
        and columns % state.blocksize == 0
    )


def quantize_rows(x: torch.Tensor, to: Format) -> Rounded:
    """Rows of `x`, (N, H), of any dtype, in 8 bits."""
    if kernels := triton_kernels(x, KERNELS):
        return kernels.quantize_rows(x, to)
    return round_rows(x.float(), to)


def quantize_parts(parts: Sequence[torch.Tensor], to: Format) -> RoundedTokens:
    """`quantize_rows` of tokens that are there in parts, (1, N, H) each, without joining them before."""
    like, width = parts[0], parts[0].shape[-1]
    shape = torch.Size((1, sum(part.shape[1] for part in parts), width))
    if kernels := triton_kernels(like, KERNELS):
        rounded = empty_rows(like, shape[1], width, to)
        first = 0
        for part in parts:
            rows = slice(first, first := first + part.shape[1])
            kernels.quantize_rows(part[0], to, (rounded[0][rows], rounded[1][rows]))
    else:
        rounded = round_rows(torch.cat([part[0] for part in parts]).float(), to)
    return RoundedTokens(rounded, to, shape, like.dtype)


def gelu_times_rows(gate: torch.Tensor, up: torch.Tensor, to: Format) -> Rounded:
    """`quantize_rows` of ``gelu(gate) * up``, (N, H) each, with the exact (erf) GELU."""
    if kernels := triton_kernels(gate, KERNELS):
        return kernels.gelu_times_rows(gate, up, to)
    return round_rows(F.gelu(gate.float()) * up.float(), to)


def modulated_norm_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    rows: torch.Tensor | None,
    to: Format,
) -> RoundedTokens:
    """`quantize_rows` of ``elementwise.modulated_norm``, which isn't rounded to 16 bits in between."""
    if kernels := triton_kernels(x, KERNELS):
        _, rounded = kernels.gated_add_norm_rows(x, None, None, weight, scale, shift, eps, rows, to)
    else:
        normed = modulated_norm(x.float(), weight.float(), scale, shift, eps, rows)
        rounded = round_rows(normed.flatten(0, -2), to)
    return RoundedTokens(rounded, to, x.shape, x.dtype)


def gated_add_norm_rows(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    rows: torch.Tensor | None,
    to: Format,
) -> tuple[torch.Tensor, RoundedTokens]:
    """``elementwise.gated_add``, and `modulated_norm_rows` of the sum."""
    if kernels := triton_kernels(x, KERNELS):
        total, rounded = kernels.gated_add_norm_rows(x, branch, gate, weight, scale, shift, eps, rows, to)
        return total, RoundedTokens(rounded, to, x.shape, x.dtype)
    total = gated_add(x, branch, gate, rows)
    return total, modulated_norm_rows(total, weight, scale, shift, eps, rows, to)


def quantize_weight(codes: torch.Tensor, state: QuantState, to: Format) -> Rounded:
    """An NF4 weight in 8 bits, (out, in), and the scales of its rows, (out, 1) float32.

    Args:
        codes: The weight as bitsandbytes packs it, two codes a byte.
        state: Its quantization state, one that `fits`.
        to: The format.
    """
    return quantize_weights([(codes, state)], to)


def quantize_weights(weights: Sequence[tuple[torch.Tensor, QuantState]], to: Format) -> Rounded:
    """`quantize_weight` of several weights of one width, one below the other."""
    like, columns = weights[0][0], weights[0][1].shape[1]
    joined = empty_rows(like, sum(state.shape[0] for _, state in weights), columns, to)
    first = 0
    for codes, state in weights:
        rows = slice(first, first := first + state.shape[0])
        _quantize_into((joined[0][rows], joined[1][rows]), codes, state, to)
    return joined


def _quantize_into(into: Rounded, codes: torch.Tensor, state: QuantState, to: Format) -> None:
    if kernels := triton_kernels(codes, KERNELS):
        outer = (state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize) if state.nested else ()
        kernels.quantize_weight(codes, state.absmax, into, state.blocksize, to, *outer)
        return
    rows, columns = state.shape
    weight = dequantize_4bit(codes, with_dtype(state, torch.float32)).view(rows, columns)
    found = round_rows(weight, to, block_scales(state).view(rows, -1).abs().amax(1, keepdim=True))
    for part, values in zip(into, found, strict=True):
        part.copy_(values)


def empty_rows(like: torch.Tensor, rows: int, width: int, to: Format) -> Rounded:
    """(rows, width) of a format and (rows, 1) float32 scales, on the device of `like`."""
    return like.new_empty(rows, width, dtype=to.dtype), like.new_empty(rows, 1, dtype=torch.float32)


def with_dtype(state: QuantState, dtype: torch.dtype) -> QuantState:
    """A quantization state that dequantizes to another dtype. Its tensors are shared."""
    state = copy.copy(state)
    state.dtype = dtype
    return state


def round_rows(x: torch.Tensor, to: Format, bound: torch.Tensor | None = None) -> Rounded:
    """Rows in 8 bits, by PyTorch's own operations.

    Args:
        x: (N, H) float32.
        to: The format.
        bound: (N, 1) float32, of each row a number no smaller than its magnitudes; None for the largest of them.
    """
    unit: torch.Tensor | float = 1.0
    if to.rotated:
        x, unit = rotate_rows(x, x.abs().amax(1, keepdim=True) if bound is None else bound)
    largest = x.abs().amax(1, keepdim=True).clamp(min=SMALLEST)
    # A tensor, as the kernel divides: PyTorch divides by a Python number less exactly, which decides ties otherwise.
    limit = torch.full_like(largest, to.largest)
    scaled = x * (limit / largest)
    return (scaled if to.dtype.is_floating_point else scaled.round()).to(to.dtype), largest / limit * unit


def scaled_product(
    x: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """``(x * scale) @ (weight * weight_scale).T``, (N, out) of a dtype, which for fp8 is bfloat16.

    Args:
        x: (N, in) int8 or fp8.
        scale: (N, 1) float32.
        weight: (out, in), dtype of `x`.
        weight_scale: (out, 1) float32.
        dtype: Of the result.
        low_rank: (N, rank) and (out, rank) of that dtype, whose product is added.
    """
    if x.dtype == INT8.dtype and (kernels := triton_kernels(x, PRODUCT_KERNELS)) and has_tensor_cores(x.device):
        return kernels.scaled_product(x, scale, weight, weight_scale, dtype, low_rank)
    out = _scaled_product(x, scale, weight, weight_scale, dtype)
    return out if low_rank is None else out.addmm_(low_rank[0], low_rank[1].t())


def _scaled_product(
    x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    if x.dtype == INT8.dtype:
        out = x.new_empty(len(x), len(weight), dtype=dtype)
        # Some rows at a time: sums take four bytes each, as int32 and as float32.
        for part, rows, row_scale in zip(*(each.split(ROWS_AT_ONCE) for each in (out, x, scale)), strict=True):
            part.copy_(int8_matmul(rows, weight.t()).float().mul_(row_scale).mul_(weight_scale.t()))
        return out
    return F.scaled_mm(
        x,
        weight.t(),
        scale,
        F.ScalingType.RowWise,
        weight_scale.t(),
        F.ScalingType.RowWise,
        output_dtype=dtype,
        use_fast_accum=True,  # Hopper sums with fewer bits, which costs little beside the rounding to fp8
    )


def has_tensor_cores(device: torch.device) -> bool:
    """Whether Triton knows the tensor cores of a CUDA device."""
    return torch.cuda.get_device_capability(device) >= TENSOR_CORES
