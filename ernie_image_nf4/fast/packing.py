"""Rows of different lengths, packed one behind the other without their padding.

The pipeline pads the texts of a batch to the longest one, and guidance pairs a prompt with an empty one: most of the
padding is computed for nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

LONG_ROW = 2048  # tokens


class Packing(NamedTuple):
    """How rows are packed.

    Attributes:
        lengths: Tokens of each row, image and text.
        pixels: Tokens of an image.
        texts: For each picture, the tokens that its texts are padded to when it is drawn alone.
        rows: (N,) int64, batch row of each packed token, counted within its picture.
        masks: For each row None, or (1, 1, 1, length) zeros. They mask nothing, but make scaled dot-product attention
            take the kernels that upstream's masks lead to, and round as these do. Without, it takes faster ones.
        mixed: Whether blocks are to compute as in `float16.block_forward`.
    """

    lengths: tuple[int, ...]
    pixels: int
    texts: tuple[int, ...]
    rows: torch.Tensor
    masks: tuple[torch.Tensor | None, ...]
    mixed: bool

    @property
    def is_exact(self) -> bool:
        """Whether blocks are to round as upstream's."""
        return self.masks[0] is not None

    @property
    def has_long_rows(self) -> bool:
        """Whether a product of one row leaves hardly more multiprocessors idle than one of all rows.

        Texts don't count: in them pictures of a batch differ.
        """
        return self.pixels >= LONG_ROW


def pack(
    text_lens: torch.Tensor, text: int, pixels: int, dtype: torch.dtype, pictures: int, masked: bool, mixed: bool
) -> Packing:
    """How to pack rows of an image and a text each.

    Waits for the GPU, which costs nothing: the pipeline has just waited itself, to read the timestep.

    Args:
        text_lens: (B,) int64, tokens of each text.
        text: Tokens that the texts are padded to.
        pixels: Tokens of an image.
        dtype: dtype of the masks.
        pictures: Pictures that the rows belong to, first one row of each, then the next row of each ...
        masked: Whether there are masks.
        mixed: As of `Packing`.
    """
    counts, device = text_lens.tolist(), text_lens.device
    lengths = tuple(pixels + count for count in counts)
    texts = tuple(max(counts[n::pictures]) for n in range(pictures)) if pictures > 1 else (text,)
    rows = torch.arange(len(counts), device=device) // pictures
    masks = tuple(torch.zeros(1, 1, 1, length, dtype=dtype, device=device) if masked else None for length in lengths)
    return Packing(lengths, pixels, texts, rows.repeat_interleave(torch.tensor(lengths, device=device)), masks, mixed)


def token_positions(rows: int, columns: int, text: int, text_lens: torch.Tensor) -> torch.Tensor:
    """Positions of the tokens of padded rows, (B, rows * columns + text, 3) float32.

    Image tokens are at (text length, y, x), text tokens at (index, 0, 0), as in
    ``ErnieImageTransformer2DModel.forward``.

    Args:
        rows: Patches of an image from top to bottom.
        columns: Patches from left to right.
        text: Tokens that the texts are padded to.
        text_lens: (B,) int64, tokens of each text.
    """
    device = text_lens.device
    image = torch.stack(
        torch.broadcast_tensors(
            text_lens.float().view(-1, 1, 1),
            torch.arange(rows, device=device, dtype=torch.float32).view(1, -1, 1),
            torch.arange(columns, device=device, dtype=torch.float32).view(1, 1, -1),
        ),
        -1,
    ).flatten(1, 2)
    index = F.pad(torch.arange(text, device=device, dtype=torch.float32)[:, None], (0, 2))
    return torch.cat([image, index.expand(len(text_lens), -1, -1)], 1)


def packed_rotary(
    angles: torch.Tensor, lengths: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, (1, N, D) each, of packed tokens, from the angles (B, S, D) of padded rows."""
    packed = torch.cat([row[None, :length] for row, length in zip(angles, lengths, strict=True)], 1)
    return packed.cos().to(dtype), packed.sin().to(dtype)
