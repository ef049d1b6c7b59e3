"""Products of the transformer's blocks: as the layers compute them, or in 8 bits where a layer was chosen for it."""

from __future__ import annotations

from typing import ClassVar, TypeGuard

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from ..upstream.models import is_hooked
from .ops import eight_bit, elementwise
from .ops.eight_bit import FP8, INT8, Format
from .subclassing import named_as_upstream


@named_as_upstream
class Int8Linear4bit(Linear4bit):
    """An NF4 layer whose products with a fast block are in int8. Called as a module, it is upstream's."""

    products: ClassVar[Format] = INT8


@named_as_upstream
class Fp8Linear4bit(Linear4bit):
    """An NF4 layer whose products with a fast block are in fp8. Called as a module, it is upstream's."""

    products: ClassVar[Format] = FP8


EightBitLayer = Int8Linear4bit | Fp8Linear4bit
LAYERS: dict[str, type[EightBitLayer]] = {layer.products.name: layer for layer in (Int8Linear4bit, Fp8Linear4bit)}


def multiplies_in_eight_bits(layer: nn.Module) -> TypeGuard[EightBitLayer]:
    """Whether a layer's products are in 8 bits. One with hooks, which expect a call, or in an adapter isn't."""
    return isinstance(layer, EightBitLayer) and not is_hooked(layer)


def apply_layers(x: torch.Tensor, *layers: nn.Module) -> list[torch.Tensor]:
    """``[layer(x) for layer in layers]``. Those in 8 bits share one rounding of `x`, (..., in)."""
    formats = {layer.products for layer in layers if multiplies_in_eight_bits(layer)}
    rounded = {each: eight_bit.quantize_rows(x.flatten(0, -2), each) for each in formats}
    return [
        multiply(layer, *rounded[layer.products], x.dtype).unflatten(0, x.shape[:-1])
        if multiplies_in_eight_bits(layer)
        else layer(x)
        for layer in layers
    ]


def apply_to_gelu(gate: torch.Tensor, up: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """``layer(gelu(gate) * up)``, (..., out). For a layer in 8 bits, ``gelu(gate) * up`` is rounded once, to these."""
    if not multiplies_in_eight_bits(layer):
        return layer(elementwise.gelu_times(gate, up))
    rounded = eight_bit.gelu_times_rows(gate.flatten(0, -2), up.flatten(0, -2), layer.products)
    return multiply(layer, *rounded, gate.dtype).unflatten(0, gate.shape[:-1])


def multiply(layer: EightBitLayer, x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The layer's output, (N, out).

    Args:
        layer: The layer.
        x: (N, in) in the layer's format.
        scale: (N, 1) float32, scales of the rows of `x`.
        dtype: Of the output.
    """
    weight, weight_scale = eight_bit.quantize_weight(layer.weight, layer.weight.quant_state, layer.products)
    out = eight_bit.scaled_product(x, scale, weight, weight_scale, dtype)
    return out if layer.bias is None else out + layer.bias.to(dtype)
