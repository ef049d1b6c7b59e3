"""NF4 of one weight, with the scale of each block searched for the least squared error.

bitsandbytes takes a block's largest magnitude as its scale. The format allows any other number, negative ones too. The
search takes the scale of least squared error, after the scale's own quantization to 8 bits: 0.81 times the squared
error on normal weights, 0.81 to 0.82 times on those of trained transformers.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from bitsandbytes.functional import (
    QuantState,
    create_dynamic_map,
    dequantize_4bit,
    get_4bit_type,
    quantize_4bit,
    quantize_blockwise,
)
from torch.nn.functional import embedding_bag, pad

from ..fast.ops.nf4_panels import nearest
from ..repository.nf4_format import (
    BLOCK_SIZE,
    DTYPES,
    NESTED_BLOCK_SIZE,
    NF4Weight,
    block_scales,
    nested_state,
    pack,
    quant_state,
)
from .weight_pieces import map_pieces, split

# Scales to try, in units of a block's largest magnitude. The best ones lie between 0.84 and 1.1, or around 1.38, where
# the largest value is stored as 0.72 x 1.38. Their negatives are tried too, since the NF4 table isn't symmetric.
RATIOS = [0.84 * (1.4 / 0.84) ** (step / 15) for step in range(16)]
GRID = 512  # steps from 0 to a block's largest magnitude; values are rounded to them for the search alone
TINY = torch.finfo(torch.float32).tiny


def quantize_nf4(weight: torch.Tensor, *, block_size: int = BLOCK_SIZE, scale_search: bool = True) -> NF4Weight:
    """NF4 of a weight with double quantization. ``bitsandbytes.functional.dequantize_4bit`` undoes it.

    Args:
        weight: float32, float16 or bfloat16 tensor of any shape, on the device that does the work.
        block_size: Values that share one scale.
        scale_search: Whether to search the scales of least squared error. Without, the result is bit for bit that of
            ``bitsandbytes.functional.quantize_4bit``; with it too, if the search finds no smaller error, as for a
            weight that was NF4 before.

    Returns:
        Packed codes and the quantization state with nested scales. Searched scales are of either sign if rows are whole
        blocks, and positive otherwise.

    Raises:
        ValueError: The dtype isn't one of the three.
    """
    if weight.dtype not in DTYPES:
        raise ValueError(f"NF4 is made from {DTYPES}, not from {weight.dtype}")
    weight = weight.detach()
    stock = _quantize_by_absmax(weight, block_size)
    if not scale_search:
        return stock
    searched = _quantize_by_search(weight, block_size)
    return min(searched, stock, key=lambda made: squared_error(weight, *made)[0])


def squared_error(weight: torch.Tensor, packed: torch.Tensor, state: QuantState) -> tuple[float, float]:
    """Squared error of NF4 against the weight that it was made from.

    Returns:
        Sum of squared differences, and sum of the weight's squares. Both are NaN or infinite if a value of the weight
        is, or if the squares overflow float32, as they do around 1e16.
    """

    def compare(values: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        piece = QuantState(absmax, values.shape, state.code, state.blocksize, state.quant_type, values.dtype)
        # reshape: bitsandbytes takes a single byte of codes for a transposed weight
        restored = dequantize_4bit(codes, piece).reshape(values.shape).float()
        values = values.float()
        return torch.stack([restored.sub_(values).square_().sum(), values.square().sum()])

    sums = map_pieces(compare, *split(weight, packed, block_scales(state), state.blocksize))
    error, squares = torch.stack(sums).double().sum(0).tolist()
    return error, squares


def _quantize_by_absmax(weight: torch.Tensor, block_size: int) -> NF4Weight:
    """NF4 as ``bitsandbytes.functional.quantize_4bit`` makes it: a block's scale is its largest magnitude."""

    def quantize_piece(values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
        piece, state = quantize_4bit(values, blocksize=block_size, compress_statistics=False, quant_type="nf4")
        codes.copy_(piece)
        scales.copy_(state.absmax)

    packed, absmax = _empty(weight, block_size, torch.float32)
    map_pieces(quantize_piece, *split(weight, packed, absmax, block_size))
    offset = absmax.mean()
    levels, nested = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)
    return packed, quant_state(weight.shape, weight.dtype, block_size, levels, nested, offset)


def _quantize_by_search(weight: torch.Tensor, block_size: int) -> NF4Weight:
    """NF4 with the block scales of least squared error among those that 8 bits can hold in a group of 256 blocks.

    The offset of the scales is 0, about which the map of 8-bit scales is symmetric and finest. Negative scales need
    rows of whole blocks: with others bitsandbytes 0.50 reads neighbours' scales on CPUs with AVX-512, a small mistake
    only as long as all have the same sign.
    """
    signed = weight.shape[-1:].numel() % block_size == 0
    sums = code_sums(signed).to(weight.device)
    table, levels = get_4bit_type("nf4", device=weight.device), create_dynamic_map().to(weight.device)
    largest_scale = torch.finfo(weight.dtype).max

    def quantize_piece(
        values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group_scales: torch.Tensor
    ) -> None:
        padding = scales.numel() * block_size - values.numel()
        blocks = pad(values.float(), (0, padding)).view(-1, block_size)
        found = search_scales(blocks, sums)
        group_scales.copy_(group_maxima(found.best())).clamp_(TINY, largest_scale)
        unit = group_scales.repeat_interleave(NESTED_BLOCK_SIZE)[: scales.numel(), None]
        scales.copy_(choose_levels(found, unit, levels))
        scale = levels[scales.int()].view(-1, 1) * unit
        nearest_codes = nearest(blocks / scale.where(scale != 0, torch.inf), table)
        codes.copy_(pack(nearest_codes)[: codes.numel()])

    packed, absmax = _empty(weight, block_size, torch.uint8)
    groups = -(-absmax.numel() // NESTED_BLOCK_SIZE)
    nested_absmax = torch.empty(groups, dtype=torch.float32, device=weight.device)
    pieces = split(weight, packed, absmax, block_size)
    groups_per_piece = -(-pieces[2][0].numel() // NESTED_BLOCK_SIZE)
    map_pieces(quantize_piece, *pieces, nested_absmax.split(groups_per_piece))
    return packed, quant_state(weight.shape, weight.dtype, block_size, absmax, nested_state(nested_absmax))


class ScaleCandidates(NamedTuple):
    """What each of `RATIOS` gives each block, before scales are quantized. w: values; q: their NF4 table entries.

    Attributes:
        absmax: Largest magnitude of the block, (blocks, 1).
        scales: w.q / q.q, the scale of least error for these codes, in units of `absmax`, (blocks, ratios).
        squares: q.q, (blocks, ratios).
        errors: Squared error with that scale, less w.w, in units of `absmax` squared, (blocks, ratios).
    """

    absmax: torch.Tensor
    scales: torch.Tensor
    squares: torch.Tensor
    errors: torch.Tensor

    def best(self) -> torch.Tensor:
        """Each block's scale of least error, (blocks,)."""
        return self.scales.gather(1, self.errors.argmin(1, keepdim=True)).mul_(self.absmax).view(-1)


def search_scales(blocks: torch.Tensor, sums: torch.Tensor) -> ScaleCandidates:
    """The candidates for the scale of each block.

    For codes q of the values w the error is least with the scale t = w.q / q.q, and larger by q.q (s - t)^2 with
    another scale s. So two sums for each ratio tell the error of its codes with whatever scale is stored in the end.

    Args:
        blocks: float32, (blocks, block_size).
        sums: `code_sums`, on the same device.
    """
    absmax = blocks.abs().amax(1, keepdim=True).clamp_min_(TINY)
    # A table row holds what a value adds to w.q and q.q of every ratio, so that one sum of rows gives all of them. That
    # is less work than dividing, rounding to codes and summing for a single ratio. The clamp is for NaN.
    index = (blocks / absmax).mul_(GRID).round_().int().add_(GRID).clamp_(0, 2 * GRID)
    products, squares = embedding_bag(index, sums, mode="sum").chunk(2, dim=1)
    scales = products / squares.clamp_min(TINY)
    return ScaleCandidates(absmax, scales, squares, -products * scales)


def choose_levels(found: ScaleCandidates, unit: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The 8-bit level of least error of each block, (blocks,) int32. Overwrites `found`.

    Args:
        found: The candidates.
        unit: Scale of each block's group, (blocks, 1).
        levels: The map of 8-bit scales, (256,).
    """
    ratio = found.absmax / unit
    scales = found.scales.mul_(ratio)
    level = nearest(scales, levels)
    errors = found.errors.mul_(ratio.square()).addcmul_(found.squares, (levels[level] - scales).square_())
    return level.gather(1, errors.argmin(1, keepdim=True)).view(-1)


def group_maxima(scales: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of the block scales in each group of 256, (groups,)."""
    padding = -len(scales) % NESTED_BLOCK_SIZE
    return pad(scales, (0, padding)).view(-1, NESTED_BLOCK_SIZE).abs().amax(1)


@functools.cache
def code_sums(signed: bool) -> torch.Tensor:
    """What each value of the search's grid, from -1 to 1, adds to w.q and q.q: (2 GRID + 1, 2 ratios) float32.

    Args:
        signed: Whether the ratios' negatives are tried too.
    """
    values = torch.arange(-GRID, GRID + 1, device="cpu")[:, None] / GRID
    ratios = torch.tensor(RATIOS + [-ratio for ratio in RATIOS] if signed else RATIOS, device="cpu")
    table = get_4bit_type("nf4", device="cpu")
    numbers = table[nearest(values / ratios, table)]
    return torch.cat([values * numbers, numbers.square()], dim=1)


def _empty(weight: torch.Tensor, block_size: int, absmax_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for a weight's packed codes and block scales."""
    packed = torch.empty((-(-weight.numel() // 2), 1), dtype=torch.uint8, device=weight.device)
    return packed, torch.empty(-(-weight.numel() // block_size), dtype=absmax_dtype, device=weight.device)
