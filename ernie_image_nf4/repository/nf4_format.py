"""NF4 of one tensor, in bitsandbytes' own format: 4-bit codes in blocks that share a scale, the scales quantized once more.

A weight of n values becomes n/2 bytes of codes, one 8-bit scale (absmax) for each block of 64 values, one float32 for each 256
scales, and the offset that was subtracted from the scales: 4.127 bits a value. Format and names are those of
``bitsandbytes.functional.QuantState`` (QLoRA, https://arxiv.org/abs/2305.14314, sections 3 and "Double Quantization").

bitsandbytes takes a block's largest magnitude for its scale. Any other number is as good to whoever reads the format, negative
ones too, since a weight is read as code times scale. The scale search looks for the one of least squared error, after its own
quantization: 0.81 times the squared error on normal weights, 0.81 to 0.82 on those of trained transformers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from bitsandbytes.functional import (
    QuantState,
    create_dynamic_map,
    dequantize_4bit,
    dequantize_blockwise,
    get_4bit_type,
    quantize_4bit,
    quantize_blockwise,
)
from torch.nn.functional import embedding_bag, pad

from .safetensors_io import TensorSpec

BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUANT_STATE = "quant_state.bitsandbytes__nf4"

# Values handled at a time. bitsandbytes' CPU code makes several float32 and int32 copies of what it is given; pieces that stay
# near a core's cache, one worker thread a core, are faster. On busy cores PyTorch's own threads would wait for each other at
# every operation, which takes longest with small pieces. On a GPU they bound the memory.
CPU_PIECE, GPU_PIECE = 1 << 19, 1 << 25

# The scales that the search tries, in units of a block's largest magnitude. Least errors lie between 0.84 and 1.1, and around
# 1.38, where the largest value gets the code of 0.72. Their negatives too: NF4's two sides aren't each other's mirror image.
RATIOS = [0.84 * (1.4 / 0.84) ** (step / 15) for step in range(16)]
GRID = 512  # To this many parts of a block's largest magnitude values are rounded for the search, and only for it.
TINY = torch.finfo(torch.float32).tiny


def quantize_nf4(
    weight: torch.Tensor, *, block_size: int = BLOCK_SIZE, scale_search: bool = True
) -> tuple[torch.Tensor, QuantState]:
    """NF4 of a weight with double quantization. ``bitsandbytes.functional.dequantize_4bit`` undoes it.

    Args:
        weight: float32, float16 or bfloat16 tensor of any shape, on the device that does the work.
        block_size: Values that share one scale.
        scale_search: Whether to look for the scales of least squared error. Without, the result is bit for bit that of
            ``bitsandbytes.functional.quantize_4bit``. With it, it is that too if no less error is found, as for a weight that
            was NF4 before.

    Returns:
        The packed codes, uint8 of shape (ceil(n / 2), 1), and the quantization state with nested scales. Searched scales are
        of either sign if rows are whole blocks, and positive otherwise.

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


def _quantize_by_absmax(weight: torch.Tensor, block_size: int) -> tuple[torch.Tensor, QuantState]:
    """NF4 as ``bitsandbytes.functional.quantize_4bit`` makes it: the scale of a block is its largest magnitude."""
    packed, absmax = _empty(weight, block_size)

    def quantize_piece(values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
        piece, state = quantize_4bit(values, blocksize=block_size, compress_statistics=False, quant_type="nf4")
        codes.copy_(piece)
        scales.copy_(state.absmax)

    _map(quantize_piece, *_pieces(weight, packed, absmax, block_size))
    offset = absmax.mean()
    return packed, _state(weight, block_size, *quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE), offset)


def _quantize_by_search(weight: torch.Tensor, block_size: int) -> tuple[torch.Tensor, QuantState]:
    """NF4 with the scales of least squared error, each one of those that 8 bits can have in its group of 256 blocks.

    For codes q of the values w, the error is least with the scale t = w.q / q.q, and q.q (s - t)^2 more with another scale s.
    So two sums for each ratio that is tried tell the error of its codes with whatever scale is stored in the end. The offset of
    the scales is 0, about which the map of the 8-bit scales is symmetric and finest.

    Negative scales need rows of whole blocks: with others bitsandbytes 0.50 reads neighbours' scales on CPUs with AVX-512, which
    is a small mistake only as long as all have the same sign.
    """
    packed, absmax = _empty(weight, block_size)
    nested_absmax = absmax.new_empty(-(-absmax.numel() // NESTED_BLOCK_SIZE))
    absmax = torch.empty_like(absmax, dtype=torch.uint8)
    signed = weight.shape[-1:].numel() % block_size == 0
    levels, sums = create_dynamic_map().to(weight.device), code_sums(signed).to(weight.device)
    largest_scale = torch.finfo(weight.dtype).max

    def quantize_piece(
        values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group_scales: torch.Tensor
    ) -> None:
        padding = scales.numel() * block_size - values.numel()
        blocks = pad(values.float(), (0, padding)).view(-1, block_size)
        largest, ideal, squares, error = search_scales(blocks, sums)
        best = ideal.gather(1, error.argmin(1, keepdim=True)).mul_(largest)
        padding = group_scales.numel() * NESTED_BLOCK_SIZE - scales.numel()
        group_scales.copy_(pad(best.view(-1), (0, padding)).view(-1, NESTED_BLOCK_SIZE).abs().amax(1))
        group_scales.clamp_(TINY, largest_scale)

        # Now in units of the group's scale, in which the levels that 8 bits can have are known.
        unit = group_scales.repeat_interleave(NESTED_BLOCK_SIZE)[: scales.numel(), None]
        scales.copy_(choose_levels(largest, ideal, squares, error, unit, levels))
        scale = levels[scales.int()].view(-1, 1) * unit

        nearest_codes = nearest(blocks / scale.where(scale != 0, torch.inf), nf4).byte().view(-1, 2)
        codes.copy_((nearest_codes[: codes.numel(), :1] << 4) | nearest_codes[: codes.numel(), 1:])

    nf4 = get_4bit_type("nf4", device=weight.device)
    pieces = _pieces(weight, packed, absmax, block_size)
    groups = -(-pieces[2][0].numel() // NESTED_BLOCK_SIZE)
    _map(quantize_piece, *pieces, nested_absmax.split(groups))
    nested = QuantState(absmax=nested_absmax, code=levels, blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32)
    return packed, _state(weight, block_size, absmax, nested, torch.zeros((), device=weight.device))


def search_scales(
    blocks: torch.Tensor, sums: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the search knows of blocks before their scales are quantized.

    Args:
        blocks: float32, (blocks, block_size).
        sums: `code_sums`, on the same device.

    Returns:
        Each block's largest magnitude, (blocks, 1); and for the codes of each ratio, (blocks, ratios): the scale of least error
        in units of that magnitude, q.q, and the squared error less the sum of the values' squares.
    """
    largest = blocks.abs().amax(1, keepdim=True).clamp_min_(TINY)
    # Two sums over a block for each of 32 ratios, as one sum of table rows: less work for all of them than
    # dividing, rounding to codes and summing is for one. The clamp is for NaN.
    index = (blocks / largest).mul_(GRID).round_().int().add_(GRID).clamp_(0, 2 * GRID)
    products, squares = embedding_bag(index, sums, mode="sum").chunk(2, dim=1)
    ideal = products / squares.clamp_min(TINY)
    return largest, ideal, squares, -products * ideal


def choose_levels(
    largest: torch.Tensor,
    ideal: torch.Tensor,
    squares: torch.Tensor,
    error: torch.Tensor,
    unit: torch.Tensor,
    levels: torch.Tensor,
) -> torch.Tensor:
    """The 8-bit level of least error of each block, given what `search_scales` returns (and this overwrites) and the scale of
    its group, (blocks, 1)."""
    ratio = largest / unit
    ideal *= ratio
    level = nearest(ideal, levels)
    error = error.mul_(ratio.square()).addcmul_(squares, (levels[level] - ideal).square_())
    return level.gather(1, error.argmin(1, keepdim=True)).view(-1)


def assemble(
    codes: torch.Tensor, levels: torch.Tensor, nested_absmax: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, QuantState]:
    """NF4 of given codes and scales.

    Args:
        codes: Index of each value's number in NF4's table, of the shape of the weight.
        levels: Index of each block's scale in the map of the 8-bit scales, in the order of the values.
        nested_absmax: float32, what the scales of each group of 256 blocks are multiples of.
        dtype: Of the weight.

    Returns:
        As of `quantize_nf4`.
    """
    pairs = codes.byte().reshape(-1, 2)
    packed = (pairs[:, :1] << 4) | pairs[:, 1:]
    code = create_dynamic_map().to(codes.device)
    nested = QuantState(absmax=nested_absmax, code=code, blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32)
    weight = torch.empty((), dtype=dtype, device=codes.device).expand(codes.shape)
    block_size = codes.numel() // levels.numel()
    return packed, _state(weight, block_size, levels.byte(), nested, torch.zeros((), device=codes.device))


@functools.cache
def code_sums(signed: bool) -> torch.Tensor:
    """For each value of the search's grid, from -1 to 1: what it adds to the sums w.q and q.q, ratio by ratio."""
    values = torch.arange(-GRID, GRID + 1, device="cpu")[:, None] / GRID
    ratios = torch.tensor(RATIOS + [-ratio for ratio in RATIOS] if signed else RATIOS, device="cpu")
    code = get_4bit_type("nf4", device="cpu")
    codes = code[nearest(values / ratios, code)]
    return torch.cat([values * codes, codes.square()], dim=1)


def nearest(values: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """Index of the nearest number in a sorted code."""
    return torch.bucketize(values, (code[1:] + code[:-1]) / 2, out_int32=True)


def _empty(weight: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for a weight's packed codes and its scales."""
    packed = torch.empty((-(-weight.numel() // 2), 1), dtype=torch.uint8, device=weight.device)
    return packed, torch.empty(-(-weight.numel() // block_size), dtype=torch.float32, device=weight.device)


def _state(
    weight: torch.Tensor, block_size: int, absmax: torch.Tensor, nested: QuantState, offset: torch.Tensor
) -> QuantState:
    return QuantState(
        absmax=absmax,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=block_size,
        code=get_4bit_type("nf4", device=weight.device),
        quant_type="nf4",
        offset=offset,
        state2=nested,
    )


def squared_error(weight: torch.Tensor, packed: torch.Tensor, state: QuantState) -> tuple[float, float]:
    """How far NF4 is from the weight it was made from, after both quantizations.

    Returns:
        The sum of squared differences, and the sum of the weight's squares. Both are NaN or infinite if a value of the weight
        is, or if the squares overflow float32, as they do around 1e16.
    """

    def compare_piece(values: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        piece = QuantState(absmax, values.shape, state.code, state.blocksize, state.quant_type, values.dtype)
        # reshape, because bitsandbytes takes codes of a single byte for those of a transposed weight
        restored = dequantize_4bit(codes, piece).reshape(values.shape).float()
        values = values.float()
        return torch.stack([restored.sub_(values).square_().sum(), values.square().sum()])

    sums = _map(compare_piece, *_pieces(weight, packed, block_scales(state), state.blocksize))
    error, squares = torch.stack(sums).double().sum(0).tolist()
    return error, squares


def block_scales(state: QuantState) -> torch.Tensor:
    """The scales of the blocks, (blocks,) float32; those that are quantized themselves as what they stand for."""
    return dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax


def state_tensors(state: QuantState) -> dict[str, torch.Tensor]:
    """The quantization state as the tensors that are stored beside the codes, by the suffix of their names."""
    return state.as_dict(packed=True)


def stored_specs(shape: tuple[int, ...], dtype: torch.dtype, block_size: int = BLOCK_SIZE) -> dict[str, TensorSpec]:
    """What a weight's NF4 takes up, before it is made: the stored tensors by name suffix, ``""`` for the codes.

    All sizes are exact but that of the settings, which is the largest possible: they hold the offset as decimal text.
    """
    values = torch.Size(shape).numel()
    blocks = -(-values // block_size)
    settings = {
        "quant_type": "nf4",
        "blocksize": block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": shape,
        "nested_blocksize": NESTED_BLOCK_SIZE,
        "nested_dtype": "float32",
        "nested_offset": 1.2345678901234567e-10,  # as long as a float32 gets in JSON
    }
    return {
        "": TensorSpec("U8", (-(-values // 2), 1)),
        ".absmax": TensorSpec("U8", (blocks,)),
        ".quant_map": TensorSpec("F32", (16,)),
        ".nested_absmax": TensorSpec("F32", (-(-blocks // NESTED_BLOCK_SIZE),)),
        ".nested_quant_map": TensorSpec("F32", (256,)),
        f".{QUANT_STATE}": TensorSpec("U8", (len(json.dumps(settings)),)),
    }


# What a weight's NF4 is stored as, by suffixes of its name.
SUFFIXES = tuple(stored_specs((1,), torch.bfloat16))


def _pieces(
    weight: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, block_size: int
) -> tuple[tuple[torch.Tensor, ...], ...]:
    """Values, codes and scales in order, in flat pieces of whole groups of 256 blocks (the last may be shorter)."""
    piece = CPU_PIECE if weight.device.type == "cpu" else GPU_PIECE
    blocks = NESTED_BLOCK_SIZE * max(piece // (NESTED_BLOCK_SIZE * block_size), 1)
    values = blocks * block_size
    return weight.reshape(-1).split(values), packed.split(values // 2), absmax.split(blocks)


def _map(function: Callable[..., Any], *pieces: Sequence[torch.Tensor]) -> list[Any]:
    """`function` of each piece. On a CPU several at a time, each in a thread of its own."""
    threads = torch.get_num_threads()
    if pieces[0][0].device.type != "cpu" or len(pieces[0]) == 1 or threads == 1:
        return [function(*parts) for parts in zip(*pieces, strict=True)]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as workers:
            return list(workers.map(function, *pieces))
    finally:
        torch.set_num_threads(threads)  # the workers' setting is the default of all threads started later
