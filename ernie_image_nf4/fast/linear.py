"""Products of the transformer's blocks: as the layers compute them, or in fp8 where a layer was chosen for it."""

from __future__ import annotations

from typing import TypeGuard

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from ..upstream.models import is_hooked
from .ops import elementwise, fp8
from .subclassing import named_as_upstream


@named_as_upstream
class Fp8Linear4bit(Linear4bit):
    """An NF4 layer whose products with a fast block are in fp8. Called as a module, it is upstream's."""

    def multiply(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The layer's output, (N, out) bfloat16.

        Args:
            x: (N, in) fp8.
            scale: (N, 1) float32, scales of the rows of `x`.
        """
        weight, weight_scale = fp8.weight_to_fp8(self.weight, self.weight.quant_state)
        out = fp8.scaled_product(x, scale, weight, weight_scale)
        return out if self.bias is None else out + self.bias.to(out.dtype)


def multiplies_in_fp8(layer: nn.Module) -> TypeGuard[Fp8Linear4bit]:
    """Whether a layer's products are in fp8. One with hooks, which expect a call, or in an adapter isn't."""
    return isinstance(layer, Fp8Linear4bit) and not is_hooked(layer)


def apply_layers(x: torch.Tensor, *layers: nn.Module) -> list[torch.Tensor]:
    """``[layer(x) for layer in layers]``. Those in fp8 share one rounding of `x`, (..., in) bfloat16."""
    if not any(map(multiplies_in_fp8, layers)):
        return [layer(x) for layer in layers]
    rounded, scale = fp8.quantize_rows(x.flatten(0, -2))
    return [
        layer.multiply(rounded, scale).unflatten(0, x.shape[:-1]) if multiplies_in_fp8(layer) else layer(x)
        for layer in layers
    ]


def apply_to_gelu(gate: torch.Tensor, up: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """``layer(gelu(gate) * up)``, (..., out). For a layer in fp8, ``gelu(gate) * up`` is rounded once, to fp8."""
    if not multiplies_in_fp8(layer):
        return layer(elementwise.gelu_times(gate, up))
    rounded, scale = fp8.gelu_times_rows(gate.flatten(0, -2), up.flatten(0, -2))
    return layer.multiply(rounded, scale).unflatten(0, gate.shape[:-1])
