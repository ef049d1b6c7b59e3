"""The text encoder without what encoding text doesn't need on the device: the vision tower, and the embedding table.

At full size the vision tower takes 0.2 GiB in NF4, and of the embedding table's 0.75 GiB a prompt needs a few rows.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import Mistral3Model

from ..fast.subclassing import become, named_as_upstream


@named_as_upstream
class HostEmbedding(nn.Embedding):
    """An embedding table that may lie in host memory: token ids are looked up there, and the rows follow them back."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Token ids of any shape on any device -> their rows, on that device."""
        return super().forward(input.to(self.weight.device)).to(input.device)


@named_as_upstream
class WideHostEmbedding(HostEmbedding):
    """A `HostEmbedding` in 16 bits that gives rows in float32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `HostEmbedding.forward`."""
        return super().forward(input).float()


def unused_modules(model: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """The modules below `model` that have one of these names, at any depth."""
    return [child for parent in model.modules() for name, child in parent.named_children() if name in names]


def enable_host_embeddings(text_encoder: Mistral3Model, unused: tuple[str, ...], *, wide: bool = False) -> None:
    """Let the text encoder run on one device while its embedding table lies in host memory.

    Args:
        text_encoder: The text encoder.
        unused: Names of the modules that stay in host memory, as for `unused_modules`; the embedding table's is one of
            them.
        wide: Whether the rows are to be float32, whatever the table is.
    """
    embeddings = text_encoder.get_input_embeddings()
    become(embeddings, HostEmbedding)
    if wide:
        become(embeddings, WideHostEmbedding)
    for parent in list(text_encoder.modules()):
        children = dict(parent.named_children())
        for name in unused:
            if name in children:  # Moved to the end: upstream takes the first parameter's device for the model's.
                delattr(parent, name)
                parent.add_module(name, children[name])
