"""Models in float16 that don't overflow: float32 where values may be large, float16 in what takes the time.

ERNIE-Image overflows in plain float16. Where models are *mixed*:

- The transformer keeps the residual stream, norms and modulation in float32. Its blocks multiply in float16, by inputs
  that were divided by a power of two each (``ops/float16.py``), and its attention, of normed queries and keys, is in
  float16. What is outside of the blocks is in float32, weights and all: it is little.
- The text encoder and the prompt enhancer, whose residual streams have outliers, compute in float32. They take few
  tokens, and reading NF4 weights takes most of their time. Only tables of embeddings and layers that aren't NF4 keep
  16 bits, for which a product is scaled as in the transformer.
- The VAE is in float32, as it takes little of a picture's time.

Which weights have which dtype is decided in ``memory/precision.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .attention import attend_rows
from .linear import apply_layers
from .ops import float16
from .packing import Packing
from .subclassing import become, named_as_upstream


def block_forward(
    block: Any,
    x: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    temb: Sequence[torch.Tensor],
    packing: Packing,
) -> torch.Tensor:
    """A transformer block's output, (1, N, H) float32.

    Its layers are called with float16 and have no bias, so that what they give has the scale of what they took.

    Args:
        block: An ``ErnieImageSharedAdaLNBlock``, in float16.
        x: (1, N, H) float32, packed tokens.
        rotary: Cosine and sine, (1, N, D) each.
        temb: Shift, scale and gate of the attention, then of the feed-forward layer, (B, H) float32 each.
        packing: How the tokens are packed.
    """
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = temb
    norm, mlp_norm, mlp, rows = block.adaLN_sa_ln, block.adaLN_mlp_ln, block.mlp, packing.rows
    hidden, scale = float16.modulated_norm(x, norm.weight, scale_msa, shift_msa, norm.eps, rows)
    branch, branch_scale = attend(block.self_attention, hidden, scale, rotary, packing)
    x, hidden, scale = float16.gated_add_norm(
        x, branch, branch_scale, gate_msa, mlp_norm.weight, scale_mlp, shift_mlp, mlp_norm.eps, rows
    )
    gate, up = apply_layers(hidden, mlp.gate_proj, mlp.up_proj)
    hidden, scale = float16.gelu_times(gate, up, scale)
    return float16.gated_add(x, *_product(hidden, scale, mlp.linear_fc2), gate_mlp, rows)


def attend(
    attention: Any, x: torch.Tensor, scale: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], packing: Packing
) -> tuple[torch.Tensor, torch.Tensor]:
    """Self-attention of an ``ErnieImageAttention`` on values with scales: values, (1, N, H) float16, and scales."""
    query, key, value = (
        part.unflatten(-1, (attention.heads, -1))
        for part in apply_layers(x, attention.to_q, attention.to_k, attention.to_v, joined=not packing.is_exact)
    )
    query = float16.norm_rotary(query, scale, attention.norm_q.weight, *rotary, attention.norm_q.eps)
    key = float16.norm_rotary(key, scale, attention.norm_k.weight, *rotary, attention.norm_k.eps)
    # All values of a row have the same scale, and so has their sum.
    out, scale = float16.scaled(torch.cat(attend_rows(attention, query, key, value, packing), 1), scale)
    return _product(out, scale, attention.to_out[0])


def _product(x: torch.Tensor, scale: torch.Tensor, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    return apply_layers(x, layer)[0], scale


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Switches autocast off on a device that has it: models in 16 bits have their dtypes where they belong."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


@named_as_upstream
class ScaledLinear(nn.Linear):
    """A layer with a weight in float16 that takes and gives float32. With anything else, it is upstream's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) float32 -> (..., out) float32."""
        if input.dtype != torch.float32 or self.weight.dtype != torch.float16:
            return super().forward(input)
        values, scale = float16.scaled(input)
        out = F.linear(values, self.weight).float() * scale
        return out if self.bias is None else out + self.bias.float()


@named_as_upstream
class WideEmbedding(nn.Embedding):
    """A table in 16 bits that gives rows in float32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Token ids of any shape -> their rows, (..., width) float32."""
        return super().forward(input).float()


def make_text_model_mixed(model: nn.Module) -> None:
    """Let a text model, whose NF4 layers compute in float32, take and give float32 in its other layers as well."""
    mixed = {nn.Linear: ScaledLinear, nn.Embedding: WideEmbedding}
    for module in model.modules():
        if type(module) in mixed:
            become(module, mixed[type(module)])
