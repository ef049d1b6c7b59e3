"""The transformer's forward pass with less work between its products; its modules and weights stay upstream's.

What changes against ``ErnieImageTransformer2DModel.forward``: rows of different lengths are packed one behind the other, so that
padding is neither computed nor masked (guidance pairs a prompt with an empty one), the modulation is broadcast instead of copied to
every token, sine and cosine of the rotary embedding are taken once instead of in every layer, and the element-wise work is fused
(``kernels.py``). The results differ by rounding alone.
"""

from __future__ import annotations

import types
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ErnieImageTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_ernie_image import ErnieImageTransformer2DModelOutput
from torch import nn

from . import kernels


def enable_fast_denoising(transformer: ErnieImageTransformer2DModel) -> None:
    """Replace the forward methods of this one transformer and of its blocks. `disable_fast_denoising` undoes it.

    One with heads of another size than a power of two, which the kernels need, is left as it is.
    """
    head_size = transformer.config.hidden_size // transformer.config.num_attention_heads
    if head_size & (head_size - 1):
        return
    transformer.forward = types.MethodType(forward, transformer)
    for block in transformer.layers:
        block.forward = types.MethodType(block_forward, block)


def disable_fast_denoising(transformer: ErnieImageTransformer2DModel) -> None:
    """Give the forward methods back to upstream."""
    for module in (transformer, *transformer.layers):
        if hasattr(module, "_hf_hook"):  # accelerate's wrapper stays
            module._old_forward = types.MethodType(type(module).forward, module)
        else:
            vars(module).pop("forward", None)


def forward(
    self: ErnieImageTransformer2DModel,
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    text_bth: torch.Tensor,
    text_lens: torch.Tensor,
    return_dict: bool = True,
) -> ErnieImageTransformer2DModelOutput | tuple[torch.Tensor]:
    """As upstream's: latents (B, C, height, width), timestep (B,), text (B, T, width) with its lengths (B,)."""
    if torch.is_grad_enabled():
        return type(self).forward(self, hidden_states, timestep, text_bth, text_lens, return_dict)
    batch, _, height, width = hidden_states.shape
    size = self.patch_size
    rows, columns = height // size, width // size
    pixels = rows * columns
    packing, rotary = positions(self, text_lens, text_bth.shape[1], rows, columns, hidden_states.dtype)
    if self.text_proj is not None and text_bth.numel():
        text_bth = self.text_proj(text_bth)
    x = torch.cat([self.x_embedder(hidden_states), text_bth], 1)
    if packing is not None:
        x = packed(x, packing)

    conditioning = self.time_embedding(self.time_proj(timestep).to(x.dtype))
    modulation = self.adaLN_modulation(conditioning).chunk(6, -1)
    for block in self.layers:
        x = block(x, rotary, modulation, packing)
    if packing is not None:
        x = torch.stack([row[:pixels] for row in x[0].split(packing.lengths)])
    x = self.final_norm(x[:, :pixels].transpose(0, 1), conditioning).type_as(x)
    patches = self.final_linear(x).transpose(0, 1)
    patches = patches.reshape(batch, rows, columns, size, size, self.out_channels).permute(0, 5, 1, 3, 2, 4)
    sample = patches.reshape(batch, self.out_channels, height, width)
    return ErnieImageTransformer2DModelOutput(sample=sample) if return_dict else (sample,)


def positions(
    self: ErnieImageTransformer2DModel, text_lens: torch.Tensor, text: int, rows: int, columns: int, dtype: torch.dtype
) -> tuple[Packing | None, tuple[torch.Tensor, torch.Tensor]]:
    """How rows are packed, and cosine and sine of their tokens' rotary angles, (B, S, D) or (1, N, D) each.

    All steps of a picture have the same, given in the same tensor of lengths: they are kept until another one comes.
    """
    version = None if text_lens.is_inference() else text_lens._version
    key = (version, text, rows, columns, dtype)
    kept = vars(self).get("_positions")
    if kept is not None and kept[0] is text_lens and kept[1] == key:
        return kept[2]
    angles = self.pos_embed(token_positions(rows, columns, text, text_lens)).squeeze(2)
    rotary = angles.cos().to(dtype), angles.sin().to(dtype)
    packing = pack(text_lens, rows * columns, angles.shape[1])
    if packing is not None:
        rotary = packed(rotary[0], packing), packed(rotary[1], packing)
    self._positions = (text_lens, key, (packing, rotary))
    return packing, rotary


def token_positions(rows: int, columns: int, text: int, text_lens: torch.Tensor) -> torch.Tensor:
    """(B, rows * columns + text, 3) float32: image tokens are (text length, y, x), text tokens (index, 0, 0)."""
    options = {"device": text_lens.device, "dtype": torch.float32}
    image = torch.stack(
        torch.broadcast_tensors(
            text_lens.float().view(-1, 1, 1),
            torch.arange(rows, **options).view(1, -1, 1),
            torch.arange(columns, **options).view(1, 1, -1),
        ),
        -1,
    ).flatten(1, 2)
    index = F.pad(torch.arange(text, **options)[:, None], (0, 2)).expand(len(text_lens), -1, -1)
    return torch.cat([image, index], 1)


class Packing(NamedTuple):
    """Rows of different lengths, one behind the other without their padding.

    Attributes:
        lengths: Tokens of each row.
        kept: (N,) int64, where the tokens were when all rows had the same length, rows counted on.
        rows: (N,) int64, the row of each token.
    """

    lengths: tuple[int, ...]
    kept: torch.Tensor
    rows: torch.Tensor


def pack(text_lens: torch.Tensor, pixels: int, tokens: int) -> Packing | None:
    """How to pack rows of `tokens` tokens, of which `pixels` and the text's length are no padding. None for a single row without any.

    Several of the same length are packed too: otherwise blocks would be compiled a second time for the rare prompt as long as the
    empty one. Waits for the GPU, which the pipeline has just done itself to read the timestep.
    """
    lengths = tuple(pixels + length for length in text_lens.tolist())
    if lengths == (tokens,):
        return None
    kept = torch.cat(
        [
            torch.arange(row * tokens, row * tokens + length, device=text_lens.device)
            for row, length in enumerate(lengths)
        ]
    )
    return Packing(lengths, kept, kept // tokens)


def packed(x: torch.Tensor, packing: Packing) -> torch.Tensor:
    """(B, S, ...) -> (1, N, ...). The result is no view, which compiled blocks would tell apart from other blocks' inputs."""
    return x.flatten(0, 1).unsqueeze(0)[:, packing.kept]


def block_forward(
    self: nn.Module,
    x: torch.Tensor,
    rotary_pos_emb: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    temb: tuple[torch.Tensor, ...],
    attention_mask: torch.Tensor | Packing | None = None,
) -> torch.Tensor:
    """A block on (B, S, H), or packed on (1, N, H), with the modulation (B, H) of each row; called as upstream does, it is upstream's.

    `rotary_pos_emb` holds cosine and sine, (B, S, D) or (1, N, D) each; `attention_mask` how rows are packed, None if they aren't.
    """
    if not isinstance(rotary_pos_emb, tuple):
        return type(self).forward(self, x, rotary_pos_emb, temb, attention_mask)
    packing = attention_mask
    rows = None if packing is None else packing.rows
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = temb
    norm, mlp_norm, mlp = self.adaLN_sa_ln, self.adaLN_mlp_ln, self.mlp
    hidden = kernels.modulated_norm(x, norm.weight, scale_msa, shift_msa, norm.eps, rows)
    hidden = attend(self.self_attention, hidden, rotary_pos_emb, packing)
    x, hidden = kernels.gated_add_norm(x, hidden, gate_msa, mlp_norm.weight, scale_mlp, shift_mlp, mlp_norm.eps, rows)
    hidden = mlp.linear_fc2(kernels.gelu_times(mlp.gate_proj(hidden), mlp.up_proj(hidden)))
    return kernels.gated_add(x, hidden, gate_mlp, rows)


def attend(
    attention: nn.Module, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], packing: Packing | None
) -> torch.Tensor:
    """Self-attention on (B, S, H) or packed (1, N, H). Packed rows attend one by one, without a mask: that takes flash kernels."""
    query, key, value = (
        projection(x).unflatten(-1, (attention.heads, -1))
        for projection in (attention.to_q, attention.to_k, attention.to_v)
    )
    query = kernels.norm_rotary(query, attention.norm_q.weight, *rotary, attention.norm_q.eps)
    key = kernels.norm_rotary(key, attention.norm_k.weight, *rotary, attention.norm_k.eps)
    if packing is None:
        out = scaled_attention(attention, query, key, value)
    else:
        each = zip(*(part.split(packing.lengths, dim=1) for part in (query, key, value)), strict=True)
        out = torch.cat([scaled_attention(attention, *row) for row in each], dim=1)
    return attention.to_out[0](out.flatten(2, 3))


def scaled_attention(attention: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(B, S, heads, D) through whichever attention backend has been set on the model."""
    processor = attention.processor
    return dispatch_attention_fn(
        query,
        key,
        value,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    )
