"""Rounding to fp8 (e4m3) with one scale a row, and the product of two such matrices.

fp8 keeps four significant bits of a value. A row is divided by its scale so that its largest magnitude becomes fp8's
largest, 448; the product multiplies the scales back in. Weights stay NF4 in memory and are dequantized to fp8 for each
product.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState, dequantize_4bit

from ...repository.nf4_format import block_scales
from .elementwise import triton_kernels

KERNELS = "triton_fp8"
FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
SMALLEST = 1e-30  # rows of smaller magnitudes are scaled as if they had this one: no division by zero
MULTIPLE = 16  # both sides of a weight have to be multiples of it for `scaled_product`


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of `x`, (N, H), as fp8 (N, H), each divided by its scale, and the scales, (N, 1) float32."""
    if kernels := triton_kernels(x, KERNELS):
        return kernels.quantize_rows(x)
    return divide_rows(x.float(), x.float().abs().amax(1, keepdim=True))


def gelu_times_rows(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` of ``gelu(gate) * up``, (N, H) each, with the exact (erf) GELU."""
    if kernels := triton_kernels(gate, KERNELS):
        return kernels.gelu_times_rows(gate, up)
    value = F.gelu(gate.float()) * up.float()
    return divide_rows(value, value.abs().amax(1, keepdim=True))


def weight_to_fp8(codes: torch.Tensor, state: QuantState) -> tuple[torch.Tensor, torch.Tensor]:
    """An NF4 weight as fp8 (out, in), each row divided by its scale, and the scales, (out, 1) float32.

    A row's largest magnitude is taken to be the largest of its blocks' scales: no value is larger.

    Args:
        codes: The weight as bitsandbytes packs it, two codes a byte.
        state: Its quantization state.
    """
    rows, columns = state.shape
    if kernels := triton_kernels(codes, KERNELS):
        outer = (state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize) if state.nested else ()
        return kernels.weight_to_fp8(codes, state.absmax, state.code, rows, columns, state.blocksize, *outer)
    weight = dequantize_4bit(codes, with_dtype(state, torch.float32)).view(rows, columns)
    return divide_rows(weight, block_scales(state).view(rows, -1).abs().amax(1, keepdim=True))


def with_dtype(state: QuantState, dtype: torch.dtype) -> QuantState:
    """A quantization state that dequantizes to another dtype. Its tensors are shared."""
    state = copy.copy(state)
    state.dtype = dtype
    return state


def divide_rows(values: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`values`, (N, H) float32, as fp8 by the largest magnitude of each row, (N, 1) float32; and the rows' scales."""
    largest = largest.clamp(min=SMALLEST)
    # A tensor, as the kernel divides: PyTorch divides by a Python number less exactly, which decides ties otherwise.
    limit = torch.full_like(largest, LARGEST)
    return (values * (limit / largest)).to(FP8), largest / limit


def scaled_product(
    x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """``(x * scale) @ (weight * weight_scale).T``, (N, out) bfloat16.

    Args:
        x: (N, in) fp8.
        scale: (N, 1) float32.
        weight: (out, in) fp8.
        weight_scale: (out, 1) float32.
    """
    return F.scaled_mm(
        x,
        weight.t(),
        scale,
        F.ScalingType.RowWise,
        weight_scale.t(),
        F.ScalingType.RowWise,
        output_dtype=torch.bfloat16,
        use_fast_accum=True,  # Hopper sums with fewer bits, which costs little beside the rounding to fp8
    )
