"""Weights of linear layers as a pipeline uses them: their error and their size."""

from __future__ import annotations

import re
from typing import Any, TypeAlias

import torch
from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from ..repository.components import QUANTIZED
from .records import WeightError, relative_error

Model: TypeAlias = ModelMixin | PreTrainedModel

# The prompt enhancer takes no part: evaluations draw without it.
COMPARED_COMPONENTS = tuple(component for component in QUANTIZED if not component.optional)
IDENTITY_ROWS = 2048  # Rows of the identity matrix that go through a layer at once
BFLOAT16_BYTES = 2  # Repositories store unquantized values as bfloat16, whatever dtype computes with them


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Name -> linear layer, for all of a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def effective_weight(layer: nn.Module, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """The matrix (out_features, columns) that a linear layer multiplies with, whatever library quantized it.

    A quantized layer is applied to the identity matrix without its bias: this gives what its own kernels make of the
    stored values.

    Args:
        layer: A linear layer, on the device where it runs.
        columns: Its in_features.
        dtype: Of its activations.
    """
    linear: Any = layer
    weight = linear.weight
    if type(layer) is nn.Linear and type(weight) is nn.Parameter:
        return weight.detach()
    identity = torch.eye(columns, dtype=dtype, device=weight.device)
    bias, linear.bias = linear.bias, None
    try:
        return torch.cat([layer(part).clone() for part in identity.split(IDENTITY_ROWS)]).T
    finally:
        linear.bias = bias


def weight_error(reference: dict[str, torch.Tensor], model: Model) -> WeightError:
    """Relative error of a model's linear layers.

    Args:
        reference: Name of a layer -> its original weight.
        model: The model, with layers of the same names.
    """
    squares: dict[str, tuple[float, float]] = {}
    for name, weight in reference.items():
        candidate = effective_weight(model.get_submodule(name), weight.shape[1], model.dtype).float()
        original = weight.to(candidate.device).float()
        squares[name] = ((candidate - original).square().sum().item(), original.square().sum().item())
    kinds: dict[str, list[tuple[float, float]]] = {}
    for name, pair in squares.items():
        kinds.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), []).append(pair)
    return WeightError(
        overall=relative_error(*map(sum, zip(*squares.values(), strict=True))),
        by_kind={kind: relative_error(*map(sum, zip(*pairs, strict=True))) for kind, pairs in kinds.items()},
        modules={name: relative_error(*pair) for name, pair in squares.items()},
    )


def stored_bytes(model: nn.Module, shapes: dict[str, torch.Size]) -> dict[str, int]:
    """Name -> bytes as stored, for each tensor of a model's state dict, scales and other quantization state included.

    Args:
        model: The model.
        shapes: Shapes of the original's state dict. Floating point tensors of the original's shape count as bfloat16.
    """
    sizes = {}
    for name, tensor in model.state_dict().items():
        same_shape = shapes.get(name) == tensor.shape
        plain = same_shape and tensor.is_floating_point() and not hasattr(tensor, "__tensor_flatten__")
        sizes[name] = tensor.numel() * BFLOAT16_BYTES if plain else _bytes(tensor)
    return sizes


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; of a wrapper subclass (torchao, quanto) those of its inner tensors."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(_bytes(getattr(tensor, name)) for name in names)


def bits_per_weight(sizes: dict[str, int], weights: dict[str, torch.Tensor]) -> float:
    """Bits a value of the linear layers, scales included and biases not.

    Args:
        sizes: As from `stored_bytes`.
        weights: Name of a linear layer -> its original weight.
    """
    stored = sum(
        size
        for name, size in sizes.items()
        if not name.endswith(".bias") and any(parent in weights for parent in _parents(name))
    )
    return round(8 * stored / sum(weight.numel() for weight in weights.values()), 4)


def _parents(name: str) -> list[str]:
    """``a.b.c`` -> ``a.b``, ``a``: the layer that a tensor belongs to is one of them."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1)]
