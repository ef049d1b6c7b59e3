"""Attention of packed tokens, row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from ..upstream.models import attention_backend, attention_dispatch
from .packing import Packing


def attend_rows(
    attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing
) -> list[torch.Tensor]:
    """Attention of each row by itself, (1, length, heads * D), of packed queries, keys and values, (1, N, heads, D).

    One call for all rows would round by how many there are, and each picture would depend on its neighbours.
    """
    each = zip(*(part.split(packing.lengths, dim=1) for part in (query, key, value)), packing.masks, strict=True)
    return [scaled_attention(attention, *row).flatten(2, 3) for row in each]


def scaled_attention(
    attention: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """(1, S, heads, D), by the attention backend set on the model. One of the user's choice may know no masks."""
    options, dispatch = attention_backend(attention), cast(Callable, attention_dispatch())
    return dispatch(query, key, value, attn_mask=mask if options["backend"] is None else None, **options)
