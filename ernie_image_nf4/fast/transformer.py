"""The transformer's forward pass with less work between its products; its modules and weights stay upstream's.

What changes against ``ErnieImageTransformer2DModel.forward``: rows of different lengths are packed one behind the other, so that
padding isn't computed (guidance pairs a prompt with an empty one), the modulation is broadcast instead of copied to every token, sine and
cosine of the rotary embedding are taken once instead of in every layer, and the element-wise work is fused (``kernels.py``). On CUDA all
of it is made to give upstream's bits; the results differ by rounding where others choose their kernels by the number of tokens.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ErnieImageTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_ernie_image import ErnieImageTransformer2DModelOutput
from torch import nn

from .cuda_graphs import StepGraph
from .ops import elementwise as kernels
from .products import apply_layers, apply_to_gelu, is_in_fp8

MINIMUM_HEAD_SIZE = 8  # two fours, as the kernels add
ROW_COUNTS = 64  # of batches up to 8 there are 12, with guidance and without


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


@contextmanager
def several_pictures(transformer: ErnieImageTransformer2DModel, count: int) -> Iterator[None]:
    """Tell the fast forward pass that its rows are of `count` pictures at the same timestep: first one row of each, then another ...

    What rounds by the number of rows is then computed picture by picture, so that each is what it is alone.
    """
    transformer._pictures = count
    try:
        yield
    finally:
        del transformer._pictures


def predict(
    self: ErnieImageTransformer2DModel,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    text: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """The prediction (B, C, height, width), from what `forward` is given."""
    size, pictures = self.patch_size, vars(self).get("_pictures", 1)
    rows, columns = latents.shape[2] // size, latents.shape[3] // size
    packing, rotary = positions(self, lengths, text.shape[1], rows, columns, latents.dtype, pictures)
    conditioning = self.time_embedding(self.time_proj(timestep[::pictures]).to(latents.dtype))
    modulation = self.adaLN_modulation(conditioning).chunk(6, -1)

    embedded = [
        embed(self, latents[n::pictures].contiguous(), text[n::pictures, : packing.texts[n]].contiguous())
        for n in range(pictures)
    ]
    x = torch.cat(
        [embedded[row % pictures][row // pictures, None, :length] for row, length in enumerate(packing.lengths)], 1
    )
    with many_shapes(self):
        for block in self.layers:
            x = block(x, rotary, modulation, packing)
    parts = x.split(packing.lengths, 1)
    sample = latents.new_empty(len(latents), self.out_channels, *latents.shape[2:])
    for n, whole in enumerate(embedded):
        sample[n::pictures] = unembed(self, parts[n::pictures], torch.zeros_like(whole), conditioning, rows, columns)
    return sample


@contextmanager
def many_shapes(transformer: ErnieImageTransformer2DModel) -> Iterator[None]:
    """Let compiled blocks be compiled for every number of rows, and once for lengths that are equal by chance and for those that aren't."""
    if transformer.layers[0]._compiled_call_impl is None:
        yield
        return
    with (
        torch._dynamo.config.patch(recompile_limit=ROW_COUNTS),
        torch.fx.experimental._config.patch(use_duck_shape=False),
    ):
        yield


def embed(self: ErnieImageTransformer2DModel, latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Tokens of latents (B, C, height, width) and text (B, T, width): (B, S, H)."""
    if self.text_proj is not None and text.numel():
        text = self.text_proj(text)
    return torch.cat([self.x_embedder(latents), text], 1)


def unembed(
    self: ErnieImageTransformer2DModel,
    parts: Sequence[torch.Tensor],
    whole: torch.Tensor,
    conditioning: torch.Tensor,
    rows: int,
    columns: int,
) -> torch.Tensor:
    """The prediction (B, C, height, width) of B rows without padding, (1, length, H) each.

    `whole`, (B, S, H) zeros, gets the rows: computed with the padding, they are rounded as upstream's are.
    """
    for row, part in zip(whole, parts, strict=True):
        row[: part.shape[1]] = part[0]
    x = self.final_norm(whole.transpose(0, 1), conditioning).type_as(whole)
    patches = self.final_linear(x)[: rows * columns].transpose(0, 1)
    size = self.patch_size
    patches = patches.reshape(len(whole), rows, columns, size, size, self.out_channels).permute(0, 5, 1, 3, 2, 4)
    return patches.reshape(len(whole), self.out_channels, rows * size, columns * size)


def positions(
    self: ErnieImageTransformer2DModel,
    text_lens: torch.Tensor,
    text: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    pictures: int,
) -> tuple[Packing, tuple[torch.Tensor, torch.Tensor]]:
    """How rows are packed, and cosine and sine of their tokens' rotary angles, (1, N, D) each.

    All steps of a picture have the same, given in the same tensor of lengths: they are kept until another one comes.
    """
    version = None if text_lens.is_inference() else text_lens._version
    masked = not is_in_fp8(self)  # which isn't made to round as upstream does
    key = (version, text, rows, columns, dtype, pictures, masked)
    kept = vars(self).get("_positions")
    if kept is not None and kept[0] is text_lens and kept[1] == key:
        return kept[2]
    packing = pack(text_lens, text, rows * columns, dtype, pictures, masked)
    angles = self.pos_embed(token_positions(rows, columns, text, text_lens)).squeeze(2)
    angles = torch.cat([row[None, :length] for row, length in zip(angles, packing.lengths, strict=True)], 1)
    self._positions = (text_lens, key, (packing, (angles.cos().to(dtype), angles.sin().to(dtype))))
    return self._positions[2]


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
        texts: Of each picture, to how many tokens its texts are padded when it is alone.
        rows: (N,) int64, of which of its picture's rows each token is.
        masks: (1, 1, 1, length) zeros for each row. They mask nothing, but scaled dot-product attention takes other kernels without
            a mask, which round differently from those that upstream's masks lead to, and are faster. None where that is welcome.
    """

    lengths: tuple[int, ...]
    texts: tuple[int, ...]
    rows: torch.Tensor
    masks: tuple[torch.Tensor | None, ...]


def pack(text_lens: torch.Tensor, text: int, pixels: int, dtype: torch.dtype, pictures: int, masked: bool) -> Packing:
    """How to pack rows of `pixels` tokens and a text each, which is padded to `text` tokens.

    Waits for the GPU, which the pipeline has just done itself to read the timestep.
    """
    counts, device = text_lens.tolist(), text_lens.device
    lengths = tuple(pixels + count for count in counts)
    texts = tuple(max(counts[n::pictures]) for n in range(pictures)) if pictures > 1 else (text,)
    rows = torch.arange(len(counts), device=device) // pictures
    masks = tuple(torch.zeros(1, 1, 1, length, dtype=dtype, device=device) if masked else None for length in lengths)
    return Packing(lengths, texts, rows.repeat_interleave(torch.tensor(lengths, device=device)), masks)


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
    gate, up = apply_layers(hidden, mlp.gate_proj, mlp.up_proj)
    return kernels.gated_add(x, apply_to_gelu(gate, up, mlp.linear_fc2), gate_mlp, rows)


def attend(
    attention: nn.Module, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], packing: Packing
) -> torch.Tensor:
    """Self-attention on packed tokens, (1, N, H), row by row."""
    query, key, value = (
        part.unflatten(-1, (attention.heads, -1))
        for part in apply_layers(x, attention.to_q, attention.to_k, attention.to_v)
    )
    query = kernels.norm_rotary(query, attention.norm_q.weight, *rotary, attention.norm_q.eps)
    key = kernels.norm_rotary(key, attention.norm_k.weight, *rotary, attention.norm_k.eps)
    each = zip(*(part.split(packing.lengths, dim=1) for part in (query, key, value)), packing.masks, strict=True)
    out = torch.cat([scaled_attention(attention, *row) for row in each], dim=1)
    return apply_layers(out.flatten(2, 3), attention.to_out[0])[0]


def scaled_attention(
    attention: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
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
