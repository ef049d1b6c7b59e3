"""Which dtype each part of a pipeline computes in, and its weights that aren't NF4 have."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCKS = "layers"  # the list of blocks of a component that can be streamed; of the transformer


@dataclass(frozen=True)
class Precision:
    """dtypes of a pipeline.

    Attributes:
        dtype: As it was asked for. If not `mixed`, of everything.
        mixed: Whether float16, which overflows, is only where it pays and is safe (``fast/float16.py``): in the
            products of the transformer's blocks and in tables of embeddings. All else is in float32 then.
    """

    dtype: torch.dtype
    mixed: bool = False

    def of_weight(self, component: str, name: str, dimensions: int) -> torch.dtype:
        """dtype of a weight that isn't NF4.

        Args:
            component: Name of its component.
            name: Its own name, as stored.
            dimensions: How many it has.
        """
        if component in ("text_encoder", "pe") and self.mixed:
            return self.dtype if dimensions > 1 else torch.float32
        return self.of_products(component, name)

    def of_products(self, component: str, layer: str) -> torch.dtype:
        """dtype in which an NF4 layer multiplies. `layer`: its name."""
        blocks = component == "transformer" and layer.startswith(f"{BLOCKS}.")
        return self.dtype if blocks or not self.mixed else torch.float32

    def of_activations(self) -> torch.dtype:
        """dtype of what components give each other: embeddings, latents, predictions."""
        return torch.float32 if self.mixed else self.dtype

    def work_factor(self, component: str) -> float:
        """Memory of a component beside its weights, over what it takes in bfloat16.

        All estimates go by it: of memory modes (``requirements.py``), and of how many pictures and texts there is room
        for at once (``generation/``).

        A full-size transformer's step takes most at the end of a block. Counted in 16 bits a token and width, gate, up
        and their product are 9 then. In bfloat16 there are 7 more: the tokens before the first block, the two parts of
        what this block was given, its own sum and norm, and the outputs of its two halves. Where it is mixed, there are
        10 more: in float32, so 2 each, the tokens before the first block, before this one, in its middle and after it,
        and the outputs of its two halves. That makes 19 over 16; a little is for what is in float32 around the blocks.
        """
        if self.mixed and component == "transformer":
            return 1.25
        return self.of_activations().itemsize / torch.bfloat16.itemsize


BFLOAT16 = Precision(torch.bfloat16)
