"""What the text encoder needs on the device to encode text: its layers, and neither vision tower nor embedding table.

At full size the vision tower has 0.2 GiB as NF4, and of the embedding table's 0.75 GiB a prompt needs a few rows.
"""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Mistral3Model


def unused_modules(model: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """The modules below `model` that have one of these names, at any depth."""
    return [child for parent in model.modules() for name, child in parent.named_children() if name in names]


def enable_host_embeddings(text_encoder: Mistral3Model, unused: tuple[str, ...]) -> None:
    """Let the embedding table be wherever it is: its rows follow the token ids to their device.

    Args:
        text_encoder: The text encoder.
        unused: Names of the modules that are to stay in host memory, as in `unused_modules`; the embedding table is one.
    """
    table = text_encoder.get_input_embeddings()
    table.forward = types.MethodType(_look_up, table)
    for parent in list(text_encoder.modules()):
        for name in unused:
            if (
                name in parent._modules
            ):  # to the end, because upstream takes the first parameter's device for the model's
                parent._modules[name] = parent._modules.pop(name)


def _look_up(self: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    """Token ids of any shape on any device -> their rows, on that device."""
    return F.embedding(ids.to(self.weight.device), self.weight, self.padding_idx).to(ids.device)
