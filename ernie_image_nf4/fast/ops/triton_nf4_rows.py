"""Triton kernels of products of a few rows with NF4 weights, for decoding a few texts at once.

With one token a step is bound by reading weights, 4 bits each, so a product must undo NF4 as fast as memory delivers
it. Eight codes are read as one 32-bit word. Their numbers come from a table of 16 bfloat16 values in eight registers,
by byte permutations (``prmt``), four codes an instruction: no look-up in memory. Norms, the residual stream and the
gate of the feed-forward layer are part of the products that they belong to.

Eight neighbours of the input meet the eight codes of a word. So that threads read neighbouring bytes, inputs and what
products hand on are in planes (`in_planes`): all first values of words, then all second ones, and so on.

Each text's sums are taken in the same order however many texts there are, so a text doesn't depend on the others.
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import QuantState

from ...repository.nf4_format import BLOCK_SIZE, NESTED_BLOCK_SIZE
from .triton_launch import NO_FMA, on_its_device
from .triton_nf4 import INTERPRETED, number_words, numbers_on

CODES_A_WORD = 8
ALIGNMENT = 16  # bytes, of a weight's codes: what a thread reads at a time
WORDS = 128  # of a weight's row that are read at a time
# Columns of a weight's product that a program of each kernel computes, and its warps: ``benchmarks/decode_step.py
# --sweep`` tries others.
COLUMNS, ADDED_COLUMNS, GATED_COLUMNS = 8, 8, 16
WARPS, ADDED_WARPS, GATED_WARPS = 2, 8, 4


class PackedWeight(NamedTuple):
    """An NF4 weight with double quantization, as bitsandbytes stores it.

    Attributes:
        codes: (out * in / 8,) int32, eight codes each.
        absmax: (out * in / 64,) uint8, levels of the blocks' scales.
        outer: (groups,) float32, scales of the groups of 256 blocks.
        offset: () float32, to be added to the blocks' scales.
        levels: (256,) float32, what the levels stand for.
        rows: out.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    outer: torch.Tensor
    offset: torch.Tensor
    levels: torch.Tensor
    rows: int


@triton.jit
def _scales(absmax_pointer, outer_pointer, offset, levels_pointer, block):
    """Scales of blocks of a weight."""
    level = tl.load(absmax_pointer + block).to(tl.int32)
    return tl.load(levels_pointer + level) * tl.load(outer_pointer + block // 256) + offset


@triton.jit
def _input(x_pointer, norm_pointer, at, NORM: tl.constexpr):
    """One plane of a text's input, times the norm's weight, and the squares."""
    x = tl.load(x_pointer + at).to(tl.float32)
    square = x * x
    if NORM:
        x *= tl.load(norm_pointer + at).to(tl.float32)
    return x, square


@triton.jit
def _plus(total, numbers, x):
    return tl.fma(numbers, tl.broadcast_to(x[None, :], numbers.shape), total)


@triton.jit
def _dot(
    x_pointer, norm_pointer, codes_pointer, absmax_pointer, outer_pointer, offset_pointer, levels_pointer,
    numbers_pointer, column, eps, WIDTH: tl.constexpr, TEXTS: tl.constexpr, NORM: tl.constexpr, COLUMNS: tl.constexpr,
    WORDS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """For each text a (COLUMNS,) float32 tensor: its input, normed, times some rows of a weight.

    Products of a block's 64 codes are summed before they are scaled.
    """
    PLANE: tl.constexpr = WIDTH // 8
    words = tl.arange(0, WORDS)
    blocks = tl.arange(0, WORDS // 8)
    offset = tl.load(offset_pointer)
    sums, squares = (), ()
    for _ in tl.static_range(TEXTS):
        sums = sums + (tl.zeros((COLUMNS, WORDS // 8), tl.float32),)
        squares = squares + (tl.zeros((WORDS,), tl.float32),)
    first = column.to(tl.int64) * PLANE
    for start in tl.range(0, PLANE, WORDS):
        word = start + words
        at = first[:, None] + word[None, :]
        n = number_words(tl.load(codes_pointer + at), numbers_pointer, INTERPRETED)
        block = first[:, None] // 8 + (start // 8 + blocks)[None, :]
        scale = _scales(absmax_pointer, outer_pointer, offset, levels_pointer, block)
        new_sums, new_squares = (), ()
        for text in tl.static_range(TEXTS):
            x = x_pointer + text * WIDTH
            a, square0 = _input(x, norm_pointer, word, NORM)
            b, square1 = _input(x, norm_pointer, word + PLANE, NORM)
            c, square2 = _input(x, norm_pointer, word + 2 * PLANE, NORM)
            d, square3 = _input(x, norm_pointer, word + 3 * PLANE, NORM)
            e, square4 = _input(x, norm_pointer, word + 4 * PLANE, NORM)
            f, square5 = _input(x, norm_pointer, word + 5 * PLANE, NORM)
            g, square6 = _input(x, norm_pointer, word + 6 * PLANE, NORM)
            h, square7 = _input(x, norm_pointer, word + 7 * PLANE, NORM)
            part = n[0] * a[None, :]
            part = _plus(part, n[1], b)
            part = _plus(part, n[2], c)
            part = _plus(part, n[3], d)
            part = _plus(part, n[4], e)
            part = _plus(part, n[5], f)
            part = _plus(part, n[6], g)
            part = _plus(part, n[7], h)
            part = tl.sum(tl.reshape(part, (COLUMNS, WORDS // 8, 8)), 2)
            square = ((square0 + square1) + (square2 + square3)) + ((square4 + square5) + (square6 + square7))
            new_sums = new_sums + (tl.fma(part, scale, sums[text]),)
            new_squares = new_squares + (squares[text] + square,)
        sums, squares = new_sums, new_squares
    results = ()
    for text in tl.static_range(TEXTS):
        total = tl.sum(sums[text], 1)
        if NORM:
            total *= tl.rsqrt(tl.sum(squares[text], 0) / WIDTH + eps)
        results = results + (total,)
    return results


@triton.jit
def place_of(column, ROWS):
    """Where a value lies among ROWS values in planes."""
    return column % 8 * (ROWS // 8) + column // 8


@triton.jit
def _products(
    x_pointer, norm_pointer, out_pointer, numbers_pointer,
    codes0, absmax0, outer0, offset0, levels0, codes1, absmax1, outer1, offset1, levels1,
    codes2, absmax2, outer2, offset2, levels2, rows0, rows1, rows2, eps,
    WIDTH: tl.constexpr, TEXTS: tl.constexpr, COLUMNS: tl.constexpr, WORDS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Products of a normed input with up to three weights, beside each other in the result."""
    start = tl.program_id(0) * COLUMNS
    column = start + tl.arange(0, COLUMNS)
    codes, absmax, outer, offset, levels = codes0, absmax0, outer0, offset0, levels0
    own = column
    if start >= rows0 + rows1:
        codes, absmax, outer, offset, levels = codes2, absmax2, outer2, offset2, levels2
        own = column - rows0 - rows1
    elif start >= rows0:
        codes, absmax, outer, offset, levels = codes1, absmax1, outer1, offset1, levels1
        own = column - rows0
    found = _dot(
        x_pointer, norm_pointer, codes, absmax, outer, offset, levels, numbers_pointer, own, eps,
        WIDTH, TEXTS, True, COLUMNS, WORDS, INTERPRETED,
    )  # fmt: skip
    for text in tl.static_range(TEXTS):
        tl.store(out_pointer + text * (rows0 + rows1 + rows2) + column, found[text].to(tl.bfloat16))


@triton.jit
def _added_product(
    x_pointer, residual_pointer, out_pointer, numbers_pointer, codes, absmax, outer, offset, levels, rows,
    WIDTH: tl.constexpr, TEXTS: tl.constexpr, COLUMNS: tl.constexpr, WORDS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The residual stream plus a product."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    found = _dot(
        x_pointer, x_pointer, codes, absmax, outer, offset, levels, numbers_pointer, column, 0.0,
        WIDTH, TEXTS, False, COLUMNS, WORDS, INTERPRETED,
    )  # fmt: skip
    for text in tl.static_range(TEXTS):
        at = text * rows + place_of(column, rows)
        residual = tl.load(residual_pointer + at).to(tl.float32)
        tl.store(out_pointer + at, (residual + found[text].to(tl.bfloat16).to(tl.float32)).to(tl.bfloat16))


@triton.jit
def _gated_products(
    x_pointer, norm_pointer, out_pointer, numbers_pointer, codes0, absmax0, outer0, offset0, levels0,
    codes1, absmax1, outer1, offset1, levels1, rows, eps,
    WIDTH: tl.constexpr, TEXTS: tl.constexpr, COLUMNS: tl.constexpr, WORDS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """``silu(x @ gate.T) * (x @ up.T)`` of a normed input."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    gate = _dot(
        x_pointer, norm_pointer, codes0, absmax0, outer0, offset0, levels0, numbers_pointer, column, eps,
        WIDTH, TEXTS, True, COLUMNS, WORDS, INTERPRETED,
    )  # fmt: skip
    up = _dot(
        x_pointer, norm_pointer, codes1, absmax1, outer1, offset1, levels1, numbers_pointer, column, eps,
        WIDTH, TEXTS, True, COLUMNS, WORDS, INTERPRETED,
    )  # fmt: skip
    for text in tl.static_range(TEXTS):
        rounded = gate[text].to(tl.bfloat16).to(tl.float32)
        opened = (rounded / (1 + tl.exp(-rounded))).to(tl.bfloat16).to(tl.float32)
        out = opened * up[text].to(tl.bfloat16).to(tl.float32)
        tl.store(out_pointer + text * rows + place_of(column, rows), out.to(tl.bfloat16))


def pack(codes: torch.Tensor, state: QuantState) -> PackedWeight:
    """A weight, (out, in), as the kernels read it. Shares the memory of `codes` and `state`."""
    return PackedWeight(
        codes.view(-1).view(torch.int32), state.absmax, state.state2.absmax, state.offset, state.state2.code,
        state.shape[0],
    )  # fmt: skip


@on_its_device
def products(x, norm, eps, weights) -> torch.Tensor:
    """``norm(x) @ weight.T`` for up to three weights, beside each other: (texts, sum of out) bfloat16.

    Args:
        x: (texts, in) bfloat16, in planes.
        norm: (in,) bfloat16, weight of an RMS norm, in planes.
        eps: Of the norm.
        weights: One to three `PackedWeight`.
    """
    rows = [weight.rows for weight in weights] + [0] * (3 - len(weights))
    weights = [*weights, *[weights[-1]] * (3 - len(weights))]
    out = x.new_empty(len(x), sum(rows))
    _products[(sum(rows) // COLUMNS,)](
        x.contiguous(), norm, out, numbers_on(x.device), *(part for weight in weights for part in weight[:5]),
        *rows, eps, x.shape[1], len(x), COLUMNS, _words(x.shape[1]), INTERPRETED, num_warps=WARPS, **NO_FMA,
    )  # fmt: skip
    return out


@on_its_device
def added_product(x, residual, weight) -> torch.Tensor:
    """``residual + x @ weight.T``, (texts, out) bfloat16. `x`: (texts, in) bfloat16. All of them in planes."""
    out = torch.empty_like(residual)
    _added_product[(weight.rows // ADDED_COLUMNS,)](
        x.contiguous(), residual, out, numbers_on(x.device), *weight, x.shape[1], len(x), ADDED_COLUMNS,
        _words(x.shape[1]), INTERPRETED, num_warps=ADDED_WARPS, **NO_FMA,
    )  # fmt: skip
    return out


@on_its_device
def gated_products(x, norm, eps, gate, up) -> torch.Tensor:
    """``silu(norm(x) @ gate.T) * (norm(x) @ up.T)``, (texts, out) bfloat16 in planes, arguments as of `products`."""
    out = x.new_empty(len(x), gate.rows)
    _gated_products[(gate.rows // GATED_COLUMNS,)](
        x.contiguous(), norm, out, numbers_on(x.device), *gate[:5], *up[:5], gate.rows, eps, x.shape[1], len(x),
        GATED_COLUMNS, _words(x.shape[1]), INTERPRETED, num_warps=GATED_WARPS, **NO_FMA,
    )  # fmt: skip
    return out


def fits(codes: torch.Tensor, state: QuantState) -> bool:
    """Whether the kernels can read a weight. On the CPU it may lie in a file as it is, aligned to single bytes."""
    return (
        codes.data_ptr() % ALIGNMENT == 0
        and state.quant_type == "nf4"
        and state.nested
        and state.blocksize == BLOCK_SIZE
        and state.state2.blocksize == NESTED_BLOCK_SIZE
        and len(state.shape) == 2
        and not any(state.shape[0] % columns for columns in (COLUMNS, ADDED_COLUMNS, GATED_COLUMNS))
        and state.shape[1] % BLOCK_SIZE == 0
    )


def in_planes(x: torch.Tensor) -> torch.Tensor:
    """(..., width) as the kernels read it: all first values of words of 8, then all second ones ..."""
    return x.unflatten(-1, (-1, CODES_A_WORD)).transpose(-1, -2).flatten(-2)


def in_order(x: torch.Tensor) -> torch.Tensor:
    """What `in_planes` was given."""
    return x.unflatten(-1, (CODES_A_WORD, -1)).transpose(-1, -2).flatten(-2)


def _words(width: int) -> int:
    """Words of a row of a weight that are read at a time: a power of two that divides them."""
    words = width // CODES_A_WORD
    return min(WORDS, words & -words)
