"""Products of the transformer's blocks in fp8 (e4m3), as an option: faster on GPUs that have fp8, for some precision.

Weights stay NF4 in memory. For a product they are dequantized to fp8 with one scale for each row instead of to bfloat16, the inputs
get one scale for each token, and ``torch._scaled_mm`` multiplies both. fp8 keeps four significant bits of a value.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit
from diffusers import ErnieImageTransformer2DModel
from torch import nn

from ..errors import InvalidSettings
from ..repository.nf4_format import block_scales
from .cuda_graphs import forget_graph, is_hooked
from .ops import elementwise as kernels

KERNELS = "triton_fp8"
FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
SMALLEST = 1e-30  # rows without a larger magnitude are scaled as if they had this one
CAPABILITY = (8, 9)  # Ada; then Hopper and Blackwell
MULTIPLE = 16  # that both sides of a weight have to be for `torch._scaled_mm`
INSTEAD = "leave fp8 (--fp8) out"


def check_fp8(device: torch.device, dtype: torch.dtype, fast: bool) -> None:
    """Refuse settings with which there are no products in fp8.

    Raises:
        InvalidSettings: Not a GPU on which PyTorch multiplies fp8, another dtype than bfloat16, or upstream's code paths were asked for.
    """
    if device.type != "cuda":
        raise InvalidSettings(f"Products in fp8 need a CUDA GPU, the device is {device}: {INSTEAD}.")
    if dtype != torch.bfloat16:
        raise InvalidSettings(f"Products in fp8 give bfloat16, the dtype is {dtype}: leave dtype or {INSTEAD}.")
    if not fast:
        raise InvalidSettings(f"Products in fp8 are part of the fast code paths: leave fast=False or {INSTEAD}.")
    if importlib.util.find_spec("triton") is None:
        raise InvalidSettings(f"Products in fp8 need Triton, which isn't installed: {INSTEAD}.")
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        raise InvalidSettings(
            f"Products in fp8 need compute capability {_dotted(CAPABILITY)} (RTX 40 or newer, H100), "
            f"{name} has {_dotted(capability)}: {INSTEAD}."
        )
    try:
        _try_product(device)
    except RuntimeError as error:  # of builds for Windows and ROCm
        reason = next(iter(str(error).splitlines()), "")
        raise InvalidSettings(
            f"PyTorch {torch.__version__} has no products in fp8 for {name} ({reason}): {INSTEAD}."
        ) from error


def _try_product(device: torch.device) -> None:
    values, scale = (torch.ones(MULTIPLE, width, device=device) for width in (MULTIPLE, 1))
    scaled_product(values.to(FP8), scale, values.to(FP8), scale)


def enable_fp8(transformer: ErnieImageTransformer2DModel) -> None:
    """Let the NF4 layers in this transformer's blocks multiply in fp8, where its fast forward pass calls them (`apply_layers`).

    Raises:
        InvalidSettings: The transformer isn't in bfloat16, keeps to upstream's forward pass, or has no such layer.
    """
    if transformer.dtype != torch.bfloat16:
        raise InvalidSettings(f"Products in fp8 give bfloat16, the transformer is in {transformer.dtype}: {INSTEAD}.")
    if "forward" not in vars(transformer.layers[0]):
        raise InvalidSettings(f"Products in fp8 are part of the fast forward pass, which is not in use: {INSTEAD}.")
    chosen = [layer for layer in _layers(transformer) if _fits(layer.weight.quant_state)]
    if not chosen:
        raise InvalidSettings(
            f"No layer of the transformer's blocks is in NF4 and of a size that fp8 takes: {INSTEAD}."
        )
    kernels.define_operators(KERNELS)
    for module in (transformer, *chosen):
        module._fp8 = True
    forget_graph(transformer)


def disable_fp8(transformer: ErnieImageTransformer2DModel) -> None:
    """Let all layers multiply in bfloat16 again."""
    for module in (transformer, *_layers(transformer)):
        vars(module).pop("_fp8", None)
    forget_graph(transformer)


def is_in_fp8(transformer: nn.Module) -> bool:
    """Whether `enable_fp8` has been called."""
    return getattr(transformer, "_fp8", False)


def _layers(transformer: ErnieImageTransformer2DModel) -> list[Linear4bit]:
    # Iterating over blocks that are streamed would bring them to the GPU.
    return [module for module in transformer.layers.modules() if isinstance(module, Linear4bit)]


def _fits(state: QuantState) -> bool:
    rows, columns = state.shape
    return rows % MULTIPLE == 0 and columns % MULTIPLE == 0 and columns % state.blocksize == 0


def apply_layers(x: torch.Tensor, *layers: nn.Module) -> list[torch.Tensor]:
    """``[layer(x) for layer in layers]``, for those in fp8 with the rounded `x`, (..., in) bfloat16, in common."""
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


def multiplies_in_fp8(layer: nn.Module) -> bool:
    """Whether `enable_fp8` has chosen this layer. One with hooks, which expect to be called, and one that an adapter wraps multiply as ever."""
    return getattr(layer, "_fp8", False) and not is_hooked(layer)


def fp8_linear(x: torch.Tensor, scale: torch.Tensor, layer: Linear4bit) -> torch.Tensor:
    """A product with the layer's weight, (N, out) bfloat16.

    Args:
        x: (N, in) fp8.
        scale: (N, 1) float32, by which the rows of `x` are to be multiplied.
        layer: The layer.
    """
    weight, weight_scale = weight_to_fp8(layer.weight, layer.weight.quant_state)
    out = scaled_product(x, scale, weight, weight_scale)
    return out if layer.bias is None else out + layer.bias.to(out.dtype)


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
    # Hopper adds faster with fewer bits, which costs little beside the rounding to fp8.
    return torch._scaled_mm(
        x, weight.t(), scale_a=scale, scale_b=weight_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )


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


def _rounded(values: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest = largest.clamp(min=SMALLEST)
    limit = torch.full_like(largest, LARGEST)  # by a number PyTorch divides less exactly, which decides ties otherwise
    return (values * (limit / largest)).to(FP8), largest / limit


def _dotted(capability: Sequence[int]) -> str:
    return ".".join(map(str, capability))
