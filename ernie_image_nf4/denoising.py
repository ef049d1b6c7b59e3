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
from .graphs import StepGraph

MINIMUM_HEAD_SIZE = 8  # two fours, as the kernels add


def enable_fast_denoising(transformer: ErnieImageTransformer2DModel, *, graph: bool = False) -> None:
    """Replace the forward methods of this one transformer and of its blocks. `disable_fast_denoising` undoes it.

    One with heads of another size than a power of two, which the kernels need, is left as it is.

    Args:
        transformer: The transformer.
        graph: Whether the steps of a picture may be captured as a CUDA graph. Its weights have to stay where they are then until
            `forget_graph` is called.
    """
    head_size = transformer.config.hidden_size // transformer.config.num_attention_heads
    if head_size & (head_size - 1) or head_size < MINIMUM_HEAD_SIZE:
        return
    kernels.define_operators()
    if graph:
        transformer._step_graph = StepGraph(predict)
    transformer.forward = types.MethodType(forward, transformer)
    for block in transformer.layers:
        block.forward = types.MethodType(block_forward, block)


def forget_graph(transformer: ErnieImageTransformer2DModel) -> None:
    """Drop the CUDA graph of a picture's steps, if there is one, with the memory that it works in."""
    graph = vars(transformer).get("_step_graph")
    if graph is not None:
        graph.forget()


def disable_fast_denoising(transformer: ErnieImageTransformer2DModel) -> None:
    """Give the forward methods back to upstream."""
    vars(transformer).pop("_step_graph", None)
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
    graph = vars(self).get("_step_graph")
    step = predict if graph is None else graph
    sample = step(self, hidden_states, timestep, text_bth, text_lens)
    return ErnieImageTransformer2DModelOutput(sample=sample) if return_dict else (sample,)


def predict(
    self: ErnieImageTransformer2DModel,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    text: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """The prediction (B, C, height, width), from what `forward` is given."""
    batch, _, height, width = latents.shape
    size = self.patch_size
    rows, columns = height // size, width // size
    pixels = rows * columns
    packing, rotary = positions(self, lengths, text.shape[1], rows, columns, latents.dtype)
    if self.text_proj is not None and text.numel():
        text = self.text_proj(text)
    whole = torch.cat([self.x_embedder(latents), text], 1)
    x = packed(whole, packing)

    conditioning = self.time_embedding(self.time_proj(timestep).to(x.dtype))
    modulation = self.adaLN_modulation(conditioning).chunk(6, -1)
    for block in self.layers:
        x = block(x, rotary, modulation, packing)
    x = unpacked(x, packing, whole)
    x = self.final_norm(x.transpose(0, 1), conditioning).type_as(x)
    patches = self.final_linear(x)[:pixels].transpose(0, 1)
    patches = patches.reshape(batch, rows, columns, size, size, self.out_channels).permute(0, 5, 1, 3, 2, 4)
    return patches.reshape(batch, self.out_channels, height, width)


def positions(
    self: ErnieImageTransformer2DModel, text_lens: torch.Tensor, text: int, rows: int, columns: int, dtype: torch.dtype
) -> tuple[Packing, tuple[torch.Tensor, torch.Tensor]]:
    """How rows are packed, and cosine and sine of their tokens' rotary angles, (1, N, D) each.

    All steps of a picture have the same, given in the same tensor of lengths: they are kept until another one comes.
    """
    version = None if text_lens.is_inference() else text_lens._version
    key = (version, text, rows, columns, dtype)
    kept = vars(self).get("_positions")
    if kept is not None and kept[0] is text_lens and kept[1] == key:
        return kept[2]
    angles = self.pos_embed(token_positions(rows, columns, text, text_lens)).squeeze(2)
    packing = pack(text_lens, rows * columns, angles.shape[1], dtype)
    rotary = packed(angles.cos().to(dtype), packing), packed(angles.sin().to(dtype), packing)
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
    """Rows, one behind the other without their padding.

    Attributes:
        lengths: Tokens of each row.
        kept: (N,) int64, where the tokens were when all rows had the same length, rows counted on.
        rows: (N,) int64, the row of each token.
        masks: (1, 1, 1, length) zeros for each row. They mask nothing, but scaled dot-product attention takes other kernels without
            a mask, which round differently from those that upstream's masks lead to.
    """

    lengths: tuple[int, ...]
    kept: torch.Tensor
    rows: torch.Tensor
    masks: tuple[torch.Tensor, ...]


def pack(text_lens: torch.Tensor, pixels: int, tokens: int, dtype: torch.dtype) -> Packing:
    """How to pack rows of `tokens` tokens, of which `pixels` and the text's length are no padding.

    Waits for the GPU, which the pipeline has just done itself to read the timestep.
    """
    device = text_lens.device
    lengths = tuple(pixels + length for length in text_lens.tolist())
    kept = torch.cat(
        [torch.arange(row * tokens, row * tokens + length, device=device) for row, length in enumerate(lengths)]
    )
    masks = tuple(torch.zeros(1, 1, 1, length, dtype=dtype, device=device) for length in lengths)
    return Packing(lengths, kept, kept // tokens, masks)


def packed(x: torch.Tensor, packing: Packing) -> torch.Tensor:
    """(B, S, ...) -> (1, N, ...). The result is no view, which compiled blocks would tell apart from other blocks' inputs."""
    return x.flatten(0, 1).unsqueeze(0)[:, packing.kept]


def unpacked(x: torch.Tensor, packing: Packing, whole: torch.Tensor) -> torch.Tensor:
    """(1, N, H) -> (B, S, H), as `whole`, with zeros for padding. What follows rounds as upstream does by computing as many rows."""
    out = torch.zeros_like(whole)
    out.flatten(0, 1)[packing.kept] = x[0]
    return out


def block_forward(
    self: nn.Module,
    x: torch.Tensor,
    rotary_pos_emb: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    temb: tuple[torch.Tensor, ...],
    attention_mask: torch.Tensor | Packing | None = None,
) -> torch.Tensor:
    """A block on packed tokens, (1, N, H), with the modulation (B, H) of each row; called as upstream does, it is upstream's.

    `rotary_pos_emb` holds cosine and sine, (1, N, D) each; `attention_mask` how rows are packed.
    """
    if not isinstance(rotary_pos_emb, tuple):
        return type(self).forward(self, x, rotary_pos_emb, temb, attention_mask)
    packing = attention_mask
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = temb
    norm, mlp_norm, mlp, rows = self.adaLN_sa_ln, self.adaLN_mlp_ln, self.mlp, packing.rows
    hidden = kernels.modulated_norm(x, norm.weight, scale_msa, shift_msa, norm.eps, rows)
    hidden = attend(self.self_attention, hidden, rotary_pos_emb, packing)
    x, hidden = kernels.gated_add_norm(x, hidden, gate_msa, mlp_norm.weight, scale_mlp, shift_mlp, mlp_norm.eps, rows)
    hidden = mlp.linear_fc2(kernels.gelu_times(mlp.gate_proj(hidden), mlp.up_proj(hidden)))
    return kernels.gated_add(x, hidden, gate_mlp, rows)


def attend(
    attention: nn.Module, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], packing: Packing
) -> torch.Tensor:
    """Self-attention on packed tokens, (1, N, H), row by row."""
    query, key, value = (
        projection(x).unflatten(-1, (attention.heads, -1))
        for projection in (attention.to_q, attention.to_k, attention.to_v)
    )
    query = kernels.norm_rotary(query, attention.norm_q.weight, *rotary, attention.norm_q.eps)
    key = kernels.norm_rotary(key, attention.norm_k.weight, *rotary, attention.norm_k.eps)
    each = zip(*(part.split(packing.lengths, dim=1) for part in (query, key, value)), packing.masks, strict=True)
    out = torch.cat([scaled_attention(attention, *row) for row in each], dim=1)
    return attention.to_out[0](out.flatten(2, 3))


def scaled_attention(
    attention: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """(1, S, heads, D) through whichever attention backend has been set on the model; one that was chosen may know no masks."""
    processor = attention.processor
    return dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=mask if processor._attention_backend is None else None,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    )
