"""Triton kernel of ``eight_bit``: the product of two int8 matrices with a scale a row each, in one pass.

Tensor cores add in int32, which is exact, and the scales come in before a sum is first stored. cuBLAS gives int32
sums, 4 bytes a value that have to be read again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from .triton_launch import NO_FMA, on_its_device


@dataclass(frozen=True)
class Tile:
    """What a program computes, and how.

    Attributes:
        rows: Of the result.
        columns: Of the result.
        depth: Columns of the inputs that are multiplied at a time. Rows of an input are its multiples.
        warps: That share the work.
        stages: Parts of the inputs that are in shared memory at a time.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# By compute capability, from which one on; so large that registers and shared memory hold them.
TILES = {
    (8, 0): Tile(128, 128, 128, 8, 3),  # 164 KiB of shared memory
    (8, 6): Tile(128, 128, 128, 8, 3),  # 100 KiB
    (9, 0): Tile(128, 256, 128, 8, 4),  # 228 KiB; sums of 4 warps together
    (12, 0): Tile(128, 128, 128, 8, 3),  # 100 KiB
}
RANKS = 16  # columns of the factors of a low-rank product that are multiplied at a time
TILES_ABREAST = 8  # rows of tiles that are computed side by side, so that the columns' weights are in the cache


@triton.jit(do_not_specialize=["rows", "rank"])  # rows change with the prompt's length
def _scaled_product(
    x_pointer, scale_pointer, weight_pointer, weight_scale_pointer, inner_pointer, up_pointer, out_pointer, rows,
    columns, rank, inner_stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    HAS_LOW_RANK: tl.constexpr, RANKS: tl.constexpr, ABREAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    first = program // (ABREAST * across) * ABREAST
    abreast = min(down - first, ABREAST)
    place = program % (ABREAST * across)
    row = (first + place % abreast) * ROWS + tl.arange(0, ROWS)
    column = place // abreast * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    # Beyond the last row or column others are computed again, and not stored: no masks in the loop.
    x_pointers = x_pointer + (row % rows)[:, None].to(tl.int64) * WIDTH + depth[None, :]
    weight_pointers = weight_pointer + (column % columns)[None, :].to(tl.int64) * WIDTH + depth[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.int32)
    for _ in tl.range(0, WIDTH, DEPTH):
        total = tl.dot(tl.load(x_pointers), tl.load(weight_pointers), total, out_dtype=tl.int32)
        x_pointers += DEPTH
        weight_pointers += DEPTH
    scale = tl.load(scale_pointer + row, row < rows, 0.0)
    weight_scale = tl.load(weight_scale_pointer + column, column < columns, 0.0)
    out = total.to(tl.float32) * scale[:, None] * weight_scale[None, :]
    if HAS_LOW_RANK:
        for start in tl.range(0, rank, RANKS, num_stages=1):
            k = start + tl.arange(0, RANKS)
            inner_place = row[:, None].to(tl.int64) * inner_stride + k[None, :]
            inner = tl.load(inner_pointer + inner_place, (row < rows)[:, None] & (k < rank)[None, :], 0.0)
            up_place = column[None, :].to(tl.int64) * rank + k[:, None]
            up = tl.load(up_pointer + up_place, (column < columns)[None, :] & (k < rank)[:, None], 0.0)
            out = tl.dot(inner, up, out, input_precision="ieee")
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out_pointer + at, out.to(out_pointer.dtype.element_ty), inside)


@on_its_device
def scaled_product(x, scale, weight, weight_scale, dtype, low_rank=None) -> torch.Tensor:
    """As ``eight_bit.scaled_product``."""
    (rows, width), columns = x.shape, len(weight)
    inner, up = (x, x) if low_rank is None else (low_rank[0], low_rank[1].contiguous())
    rank = 0 if low_rank is None else up.shape[1]
    tile = tile_of(torch.cuda.get_device_capability(x.device), width)
    out = torch.empty(rows, columns, dtype=dtype, device=x.device)
    _scaled_product[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
        x, scale, weight, weight_scale, inner, up, out, rows, columns, rank, inner.stride(0), width, tile.rows,
        tile.columns, tile.depth, low_rank is not None, RANKS, TILES_ABREAST,
        num_warps=tile.warps, num_stages=tile.stages, **NO_FMA,
    )  # fmt: skip
    return out


def tile_of(capability: tuple[int, int], width: int) -> Tile:
    """The tile for a GPU of this compute capability and inputs with so many columns, a multiple of 64."""
    tile = TILES[max(known for known in TILES if known <= capability)]
    return tile if width % tile.depth == 0 else replace(tile, depth=64)
