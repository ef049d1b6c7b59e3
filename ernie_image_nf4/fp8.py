"""Products of the transformer's blocks in fp8 (e4m3), as an option: about half their time on GPUs that have fp8, for some precision.

Weights stay NF4 in memory. For a product they are dequantized to fp8 with one scale for each row instead of to bfloat16, the inputs
get one scale for each token, and ``torch._scaled_mm`` multiplies both. fp8 keeps four significant bits of a value: each product
is about 3.5% off, where NF4 itself is 8 to 9% off the original.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit
from diffusers import ErnieImageTransformer2DModel
from torch import nn

from . import kernels
from .errors import InvalidSettings

KERNELS = "triton_fp8"
FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
SMALLEST = 1e-30  # largest magnitude of a row that can still be divided by
CAPABILITY = (8, 9)  # Ada; then Hopper and Blackwell
MULTIPLE = 16  # that both sides of a weight have to be for `torch._scaled_mm`
INSTEAD = "leave fp8 (--fp8) out"


def check_fp8(device: torch.device, dtype: torch.dtype, fast: bool) -> None:
    """Refuse settings with which there are no products in fp8.

    Raises:
        InvalidSettings: Not a GPU with fp8, another dtype than bfloat16, or upstream's code paths were asked for.
    """
    if device.type != "cuda":
        raise InvalidSettings(f"Products in fp8 need a CUDA GPU, the device is {device}: {INSTEAD}.")
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        raise InvalidSettings(
            f"Products in fp8 need compute capability {_dotted(CAPABILITY)} (RTX 40 or newer, H100), "
            f"{torch.cuda.get_device_name(device)} has {_dotted(capability)}: {INSTEAD}."
        )
    if dtype != torch.bfloat16:
        raise InvalidSettings(f"Products in fp8 give bfloat16, the dtype is {dtype}: leave dtype or {INSTEAD}.")
    if not fast:
        raise InvalidSettings(f"Products in fp8 are part of the fast code paths: leave fast=False or {INSTEAD}.")
    if not kernels.has_triton(device):
        raise InvalidSettings(f"Products in fp8 need Triton, which doesn't work here: {INSTEAD}.")


def enable_fp8(transformer: ErnieImageTransformer2DModel) -> None:
    """Let the NF4 layers in this transformer's blocks multiply in fp8, where its fast forward pass calls them (`apply_layers`)."""
    kernels.define_operators(KERNELS)
    transformer._fp8 = True
    for layer in _layers(transformer):
        state = layer.weight.quant_state
        rows, columns = state.shape
        if rows % MULTIPLE == 0 and columns % MULTIPLE == 0 and columns % state.blocksize == 0:
            layer._fp8 = True


def disable_fp8(transformer: ErnieImageTransformer2DModel) -> None:
    """Let all layers multiply in bfloat16 again."""
    vars(transformer).pop("_fp8", None)
    for layer in _layers(transformer):
        vars(layer).pop("_fp8", None)


def _layers(transformer: ErnieImageTransformer2DModel) -> list[Linear4bit]:
    return [module for block in transformer.layers for module in block.modules() if isinstance(module, Linear4bit)]


def apply_layers(x: torch.Tensor, *layers: nn.Module) -> list[torch.Tensor]:
    """``[layer(x) for layer in layers]``, for those in fp8 with the rounded `x`, (..., in) bfloat16, in common.

    A layer that an adapter has wrapped multiplies as ever.
    """
    if not any(map(multiplies_in_fp8, layers)):
        return [layer(x) for layer in layers]
    rounded, scale = quantize_rows(x.flatten(0, -2))
    return [
        fp8_linear(rounded, scale, layer).unflatten(0, x.shape[:-1]) if multiplies_in_fp8(layer) else layer(x)
        for layer in layers
    ]


def apply_to_gelu(gate: torch.Tensor, up: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """``layer(gelu(gate) * up)``, (..., out); for a layer in fp8 the product is rounded once, to fp8."""
    if not multiplies_in_fp8(layer):
        return layer(kernels.gelu_times(gate, up))
    rounded, scale = gelu_times_rows(gate.flatten(0, -2), up.flatten(0, -2))
    return fp8_linear(rounded, scale, layer).unflatten(0, gate.shape[:-1])


def multiplies_in_fp8(module: nn.Module) -> bool:
    """Whether `enable_fp8` has set this layer, or for a transformer its layers, to multiply in fp8."""
    return getattr(module, "_fp8", False)


def fp8_linear(x: torch.Tensor, scale: torch.Tensor, layer: Linear4bit) -> torch.Tensor:
    """A product with the layer's weight, (N, out) bfloat16.

    Args:
        x: (N, in) fp8.
        scale: (N, 1) float32, by which the rows of `x` are to be multiplied.
        layer: The layer.
    """
    weight, weight_scale = weight_to_fp8(layer.weight, layer.weight.quant_state)
    out = torch._scaled_mm(
        x, weight.t(), scale_a=scale, scale_b=weight_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return out if layer.bias is None else out + layer.bias.to(out.dtype)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (N, H) in fp8, each divided by its scale, and the scales, (N, 1) float32."""
    if kernel := kernels.fused(x, KERNELS):
        return kernel.quantize_rows(x)
    return _rounded(x.float(), x.float().abs().amax(1, keepdim=True))


def gelu_times_rows(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``gelu(gate) * up`` of rows (N, H) as from `quantize_rows`, with the exact (erf) GELU."""
    if kernel := kernels.fused(gate, KERNELS):
        return kernel.gelu_times_rows(gate, up)
    value = F.gelu(gate.float()) * up.float()
    return _rounded(value, value.abs().amax(1, keepdim=True))


def weight_to_fp8(codes: torch.Tensor, state: QuantState) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in NF4 as fp8 (out, in), each row divided by its scale, and the scales, (out, 1) float32.

    A row's scale is that of the block with the largest one: no value is larger.
    """
    rows, columns = state.shape
    if kernel := kernels.fused(codes, KERNELS):
        outer = (state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize) if state.nested else ()
        return kernel.weight_to_fp8(codes, state.absmax, state.code, rows, columns, state.blocksize, *outer)
    weight = dequantize_4bit(codes, with_dtype(state, torch.float32)).view(rows, columns)
    return _rounded(weight, block_scales(state).view(rows, -1).abs().amax(1, keepdim=True))


def with_dtype(state: QuantState, dtype: torch.dtype) -> QuantState:
    """A quantization state that dequantizes to another dtype."""
    state = copy.copy(state)
    state.dtype = dtype
    return state


def block_scales(state: QuantState) -> torch.Tensor:
    """The scales of the blocks, float32, where they are quantized themselves as what they stand for."""
    if not state.nested:
        return state.absmax.float()
    outer = state.state2
    return (
        outer.code[state.absmax.long()] * outer.absmax.repeat_interleave(outer.blocksize)[: len(state.absmax)]
        + state.offset
    )


def _rounded(values: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest = largest.clamp(min=SMALLEST)
    return (values * (LARGEST / largest)).to(FP8), largest / LARGEST


def _dotted(capability: Sequence[int]) -> str:
    return ".".join(map(str, capability))
