"""The text encoder alone, on its device: the transformer and all else are not loaded."""

from __future__ import annotations

from collections.abc import Sequence

import diffusers
import torch

from ..memory.host_embeddings import enable_host_embeddings, unused_modules
from ..memory.precision import Precision
from ..repository.record import Repository
from .assembly import TensorSource, assemble, keep_as_stored, move_rest
from .tokenizers import load_tokenizer


@torch.no_grad()
def encode_texts(
    repository: Repository, texts: Sequence[str], device: torch.device, dtype: torch.dtype
) -> list[torch.Tensor]:
    """What the transformer is given for each text, (tokens, text_in_dim), on the CPU.

    The weights are mapped; what encoding needs of them is copied to the device and freed afterwards. The embedding
    table and the vision tower stay on the host.
    """
    part = repository.components["text_encoder"]
    model = assemble(part, TensorSource(), Precision(dtype))
    keep_as_stored(model)
    if device.type != "cpu":
        enable_host_embeddings(model, part.component.unused)
        move_rest(model, device, unused_modules(model, part.component.unused))
    pipe = diffusers.ErnieImagePipeline(
        text_encoder=model,
        tokenizer=load_tokenizer(repository.components["tokenizer"]),
        transformer=None,
        vae=None,
        scheduler=None,
    )
    return [pipe.encode_prompt(text, device)[0].cpu() for text in texts]


def count_tokens(repository: Repository, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, without loading a model."""
    tokenizer = load_tokenizer(repository.components["tokenizer"])
    ids = tokenizer(list(texts), add_special_tokens=True, truncation=True, padding=False)["input_ids"]
    return [max(len(each), 1) for each in ids]
