"""A block of the transformer on packed tokens: attention and feed-forward layer, with fused work between products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from diffusers.models.transformers.transformer_ernie_image import (
    ErnieImageSharedAdaLNBlock,
    ErnieImageSingleStreamAttnProcessor,
)

from ..upstream.models import is_hooked
from . import float16
from .attention import attend_rows
from .linear import Tokens, WideTokens, apply_layers, apply_to_gelu, apply_to_rows, input_for
from .ops import eight_bit, elementwise
from .packing import Packing
from .subclassing import named_as_upstream

Rotary = tuple[torch.Tensor, torch.Tensor]


class Pending(NamedTuple):
    """Packed tokens, (1, N, H), to which the last block's output is yet to be added.

    The next block adds it in the same pass over memory as its norm.

    Attributes:
        tokens: The tokens.
        branch: What ``gate_mlp`` times this is to be added of; None for nothing.
    """

    tokens: torch.Tensor
    branch: torch.Tensor | None


@named_as_upstream
class FastErnieImageBlock(ErnieImageSharedAdaLNBlock):
    """A block that also takes packed tokens. Called as upstream calls it, it is upstream's."""

    def forward(
        self,
        x: torch.Tensor | Pending,
        rotary_pos_emb: torch.Tensor | Rotary,
        temb: Sequence[torch.Tensor],
        attention_mask: torch.Tensor | Packing | None = None,
    ) -> torch.Tensor | Pending:
        """The block's output, of the kind and shape of `x`.

        Args:
            x: (1, N, H) packed tokens, also `Pending` ones, or what upstream's block takes.
            rotary_pos_emb: Cosine and sine, (1, N, D) each, of packed tokens.
            temb: Shift, scale and gate of the attention, then of the feed-forward layer, (B, H) each.
            attention_mask: How the tokens are packed.
        """
        if not isinstance(attention_mask, Packing):
            return super().forward(x, rotary_pos_emb, temb, attention_mask)
        packing = attention_mask
        if packing.mixed:
            assert isinstance(x, torch.Tensor)
            return float16.block_forward(self, x, cast(Rotary, rotary_pos_emb), temb, packing)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = temb
        attention, mlp, rows = cast(Any, self.self_attention), self.mlp, packing.rows
        norm, mlp_norm = self.adaLN_sa_ln, self.adaLN_mlp_ln
        before, pending = (x.tokens, x.branch) if isinstance(x, Pending) else (x, None)
        to = input_for(before, attention.to_q, attention.to_k, attention.to_v)
        total, hidden = add_and_norm(before, pending, gate_mlp, norm, scale_msa, shift_msa, rows, to)
        branch = attend(attention, hidden, cast(Rotary, rotary_pos_emb), packing)
        to = input_for(total, mlp.gate_proj, mlp.up_proj)
        total, hidden = add_and_norm(total, branch, gate_msa, mlp_norm, scale_mlp, shift_mlp, rows, to)
        gate, up = apply_layers(hidden, mlp.gate_proj, mlp.up_proj)
        output = apply_to_gelu(gate, up, mlp.linear_fc2)
        if isinstance(x, Pending):
            return Pending(total, output)
        return elementwise.gated_add(total, output, gate_mlp, rows)


def calls_all_modules(block: Any) -> bool:
    """Whether a block has to be upstream's, which calls each of its modules.

    Hooks on the attention, the feed-forward layer or a norm wait for such a call, and so does an attention processor of
    somebody's own. Hooks on the linear layers don't: those are called here as well.
    """
    attention = block.self_attention
    parts = attention, block.mlp, block.adaLN_sa_ln, block.adaLN_mlp_ln, attention.norm_q, attention.norm_k
    return type(attention.processor) is not ErnieImageSingleStreamAttnProcessor or any(map(is_hooked, parts))


def add_and_norm(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor,
    norm: Any,
    scale: torch.Tensor,
    shift: torch.Tensor,
    rows: torch.Tensor,
    to: eight_bit.Format | WideTokens | None,
) -> tuple[torch.Tensor, Tokens]:
    """``x + gate * branch``, and its modulated norm.

    Args:
        x: (1, N, H) packed tokens.
        branch: (1, N, H); None to add nothing.
        gate: (B, H).
        norm: An RMS norm.
        scale: (B, H), of the modulation.
        shift: As `scale`.
        rows: (N,) int64, batch row of each token.
        to: What the norm is needed in, as of `input_for`.
    """
    modulation = norm.weight, scale, shift, norm.eps, rows
    if isinstance(to, eight_bit.Format):
        if branch is None:
            return x, eight_bit.modulated_norm_rows(x, *modulation, to)
        return eight_bit.gated_add_norm_rows(x, branch, gate, *modulation, to)
    out = None if to is None else to.tokens
    if branch is None:
        total, normed = x, elementwise.modulated_norm(x, *modulation, out)
    else:
        total, normed = elementwise.gated_add_norm(x, branch, gate, *modulation, out)
    return total, normed if to is None else to


def attend(attention: Any, x: Tokens, rotary: Rotary, packing: Packing) -> torch.Tensor:
    """Self-attention of an ``ErnieImageAttention`` on packed tokens, (1, N, H), row by row."""
    query, key, value = (
        part.unflatten(-1, (attention.heads, -1))
        for part in apply_layers(x, attention.to_q, attention.to_k, attention.to_v, joined=not packing.is_exact)
    )
    query = elementwise.norm_rotary(query, attention.norm_q.weight, *rotary, attention.norm_q.eps)
    key = elementwise.norm_rotary(key, attention.norm_k.weight, *rotary, attention.norm_k.eps)
    rows, out = attend_rows(attention, query, key, value, packing), attention.to_out[0]
    to = input_for(query.flatten(2), out)
    if to is None:
        return apply_to_rows(rows, out, alone=packing.has_long_rows and not packing.is_exact)
    if isinstance(to, eight_bit.Format):
        return apply_layers(eight_bit.quantize_parts(rows, to), out)[0]
    for row, place in zip(rows, to.tokens.split(packing.lengths, 1), strict=True):
        place.copy_(row)
    return apply_layers(to, out)[0]
