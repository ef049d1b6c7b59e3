"""A text's prefill in a few operations a layer, for prompt enhancers whose steps kernels compute.

A prompt of a hundred tokens is soon computed, and calling the model's modules for it takes Python long. This is the
same forward pass in fewer operations: weights are dequantized by one kernel each, query, key and value are one product,
and residuals are added by the products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from transformers import PreTrainedModel

from ..upstream.attention import ALIGNMENT, masked_attention
from . import decode_step
from .linear import dequantized
from .ops import elementwise

if TYPE_CHECKING:
    from .decode_step import DecodeStep
    from .decoder import DecodeBuffers


def forward_prompt(model: PreTrainedModel, step: DecodeStep, buffers: DecodeBuffers, ids: torch.Tensor) -> torch.Tensor:
    """Logits behind the last token, (1, vocabulary) bfloat16. Keys and values go into the cache.

    Args:
        model: The prompt enhancer, on its device.
        step: Kernels that serve it: they know all of its parts.
        buffers: Of one row, as `DecodeBuffers.reset` leaves them.
        ids: The text, (1, length) int64.
    """
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    x = model.model.embed_tokens(ids)
    cosine, sine = (each[0, :, None] for each in model.model.rotary_emb(x, positions)[:2])
    first, second = sine.chunk(2, -1)
    rotary = cosine, torch.cat([-first, second], -1)
    scale = decode_step.query_scale(model, positions).to(x.dtype)[:, None, None]
    seen = -(-ids.shape[1] // ALIGNMENT) * ALIGNMENT  # of the cache: what lies behind the text is masked as well
    mask = x.new_full((ids.shape[1], seen), -torch.inf).triu(1)[None, None]
    x = x[0]
    for layer, cache in zip(model.model.layers, buffers.cache.layers, strict=True):
        query, key, value, output, gate, up, down = decode_step.projections(layer)
        heads = _product(_normed(x, layer.input_layernorm), query, key, value)
        heads = heads.unflatten(1, (-1, layer.self_attn.head_dim))
        x = torch.addmm(
            x, _attended(heads, rotary, scale, cache, mask, layer.self_attn.scaling), _weight(x, output).t()
        )
        normed = _normed(x, layer.post_attention_layernorm)
        x = torch.addmm(x, F.silu(_product(normed, gate)) * _product(normed, up), _weight(x, down).t())
    return step.kernels.head_product(model.model.norm(x[-1:]), model.lm_head.weight)


def _attended(
    heads: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    scale: torch.Tensor,
    cache: Any,
    mask: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """A layer's attention, (length, query heads * D).

    Args:
        heads: (length, heads, D): queries, keys and values.
        rotary: Cosine and sine, (length, 1, D) each, the latter negated in the first half of a head.
        scale: Factors of the queries, (length, 1, 1).
        cache: The layer's part of the cache. Keys and values are written to its start.
        mask: (1, 1, length, seen): what is added to the logits of the cache's first `seen` tokens.
        scaling: Of the logits.
    """
    length, total, width = heads.shape
    shared = cache.keys.shape[1]
    rotated = heads[:, : total - shared]
    rotated = rotated * rotary[0] + rotated.roll(width // 2, -1) * rotary[1]
    query, key = rotated.split([total - 2 * shared, shared], 1)
    cache.keys[0, :, :length] = key.transpose(0, 1)
    cache.values[0, :, :length] = heads[:, total - shared :].transpose(0, 1)
    repeated = (-1, -1, query.shape[1] // shared, -1, -1)
    keys, values = (
        each[:, :, None, : mask.shape[-1]].expand(repeated).flatten(1, 2) for each in (cache.keys, cache.values)
    )
    attended = masked_attention((query * scale).transpose(0, 1)[None], keys, values, mask, scaling)
    return attended[0].transpose(0, 1).flatten(1)


def _normed(x: torch.Tensor, norm: Any) -> torch.Tensor:
    return elementwise.rms_norm(x, norm.weight, norm.variance_epsilon)


def _product(x: torch.Tensor, *layers: Linear4bit) -> torch.Tensor:
    """What the layers make of `x`, (length, in), one behind the other: (length, sum of out)."""
    return F.linear(x, _weight(x, *layers))


def _weight(x: torch.Tensor, *layers: Linear4bit) -> torch.Tensor:
    """The layers' weights in the dtype of `x`, one below the other."""
    return dequantized([(layer.weight, layer.weight.quant_state) for layer in layers], x.dtype)
