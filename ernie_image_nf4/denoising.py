"""The transformer's forward pass with less work between its products; its modules and weights stay upstream's.

What changes against ``ErnieImageTransformer2DModel.forward``: the modulation is broadcast instead of copied to every token, sine and
cosine of the rotary embedding are taken once instead of in every layer, padded rows attend without a mask (each row has its own
length), and the element-wise work is fused (``kernels.py``). The results differ by rounding alone.
"""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from diffusers import ErnieImageTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_ernie_image import ErnieImageTransformer2DModelOutput
from torch import nn

from . import kernels


def enable_fast_denoising(transformer: ErnieImageTransformer2DModel) -> None:
    """Replace the forward methods of this one transformer and of its blocks. `disable_fast_denoising` undoes it."""
    transformer.forward = types.MethodType(forward, transformer)
    for block in transformer.layers:
        block.forward = types.MethodType(block_forward, block)


def disable_fast_denoising(transformer: ErnieImageTransformer2DModel) -> None:
    """Give the forward methods back to upstream."""
    for module in (transformer, *transformer.layers):
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
    if self.text_proj is not None and text_bth.numel():
        text_bth = self.text_proj(text_bth)
    x = torch.cat([self.x_embedder(hidden_states), text_bth], 1)

    angles = self.pos_embed(token_positions(rows, columns, text_bth.shape[1], text_lens)).squeeze(2)
    rotary = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    lengths = row_lengths(text_lens, pixels, x.shape[1])
    if lengths is not None and self.layers[0]._compiled_call_impl is not None:
        # Lengths are constants to the compiler, which would compile anew for every prompt: a mask is not.
        lengths = (torch.arange(x.shape[1], device=x.device) < pixels + text_lens[:, None])[:, None, None]

    conditioning = self.time_embedding(self.time_proj(timestep).to(x.dtype))
    modulation = self.adaLN_modulation(conditioning).chunk(6, -1)
    for block in self.layers:
        x = block(x, rotary, modulation, lengths)
    x = self.final_norm(x[:, :pixels].transpose(0, 1), conditioning).type_as(x)
    patches = self.final_linear(x).transpose(0, 1)
    patches = patches.reshape(batch, rows, columns, size, size, self.out_channels).permute(0, 5, 1, 3, 2, 4)
    sample = patches.reshape(batch, self.out_channels, height, width)
    return ErnieImageTransformer2DModelOutput(sample=sample) if return_dict else (sample,)


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


def row_lengths(text_lens: torch.Tensor, pixels: int, tokens: int) -> tuple[int, ...] | None:
    """Tokens of each row that are not padding, or None where no row has any.

    Waits for the GPU, which the pipeline has just done itself to read the timestep.
    """
    lengths = tuple(pixels + length for length in text_lens.tolist())
    return None if all(length == tokens for length in lengths) else lengths


def block_forward(
    self: nn.Module,
    x: torch.Tensor,
    rotary_pos_emb: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    temb: tuple[torch.Tensor, ...],
    attention_mask: torch.Tensor | tuple[int, ...] | None = None,
) -> torch.Tensor:
    """A block on (B, S, H) with the modulation (B, H) of each row; called the way upstream calls it, it is upstream's.

    `rotary_pos_emb` holds cosine and sine, (B, S, D) each; `attention_mask` a bool mask (B, 1, 1, S), the rows' lengths, or None.
    """
    if not isinstance(rotary_pos_emb, tuple):
        return type(self).forward(self, x, rotary_pos_emb, temb, attention_mask)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = temb
    norm, mlp_norm, mlp = self.adaLN_sa_ln, self.adaLN_mlp_ln, self.mlp
    hidden = kernels.modulated_norm(x, norm.weight, scale_msa, shift_msa, norm.eps)
    hidden = attend(self.self_attention, hidden, rotary_pos_emb, attention_mask)
    x, hidden = kernels.gated_add_norm(x, hidden, gate_msa, mlp_norm.weight, scale_mlp, shift_mlp, mlp_norm.eps)
    hidden = mlp.linear_fc2(kernels.gelu_times(mlp.gate_proj(hidden), mlp.up_proj(hidden)))
    return kernels.gated_add(x, hidden, gate_mlp)


def attend(
    attention: nn.Module,
    x: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | tuple[int, ...] | None,
) -> torch.Tensor:
    """Self-attention on (B, S, H). Rows of different lengths attend one by one, which needs no mask and so takes flash kernels."""
    query, key, value = (
        projection(x).unflatten(-1, (attention.heads, -1))
        for projection in (attention.to_q, attention.to_k, attention.to_v)
    )
    query = kernels.norm_rotary(query, attention.norm_q.weight, *rotary, attention.norm_q.eps)
    key = kernels.norm_rotary(key, attention.norm_k.weight, *rotary, attention.norm_k.eps)
    if isinstance(mask, tuple):
        out = torch.zeros_like(query)
        for row, length in enumerate(mask):
            part = slice(row, row + 1), slice(length)
            out[part] = scaled_attention(attention, query[part], key[part], value[part], None)
    else:
        out = scaled_attention(attention, query, key, value, mask)
    return attention.to_out[0](out.flatten(2, 3))


def scaled_attention(
    attention: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """(B, S, heads, D) through whichever attention backend has been set on the model."""
    processor = attention.processor
    return dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=mask,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    )
