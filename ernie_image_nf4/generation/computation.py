"""How a pipeline computes, as far as pictures and manifests note it."""

from __future__ import annotations

from typing import TypedDict

from diffusers import ErnieImagePipeline

from ..fast.products import products_of
from ..fast.transformer import computation_dtype, is_exact


class Computation(TypedDict):
    """The fields that `Drawing` and `Record` have of it."""

    products: str | None
    dtype: str
    fast: str | None


def computation_of(pipe: ErnieImagePipeline) -> Computation:
    """How a pipeline computes now."""
    transformer = pipe.transformer
    return Computation(
        products=products_of(transformer),
        dtype=str(computation_dtype(transformer)).removeprefix("torch."),
        fast="exact" if is_exact(transformer) else None,
    )
