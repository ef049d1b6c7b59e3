"""NF4 weights that come out of a pickle."""

from __future__ import annotations

from typing import Any

from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

SETTINGS = ("quant_state", "blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized")


def restore_nf4_weights(model: nn.Module) -> None:
    """Make the weights of a model's NF4 layers ``Params4bit`` again.

    torch's pickles of a parameter forget its class (torch 2.11 to 2.13). As a plain parameter an NF4 weight computes
    where it is, but moves without its quantization state.
    """
    for layer in model.modules():
        if isinstance(layer, Linear4bit) and not isinstance(layer.weight, Params4bit):
            weight: Any = layer.weight
            settings = {name: getattr(weight, name) for name in SETTINGS}
            layer.weight = Params4bit(weight.data, requires_grad=weight.requires_grad, **settings)
