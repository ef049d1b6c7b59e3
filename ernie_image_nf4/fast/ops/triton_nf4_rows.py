"""Triton kernels of products of a few rows with NF4 weights, for decoding a few texts at once.

With one token a step is bound by reading weights, 4 bits each, so a product must undo NF4 as fast as memory delivers
it. Eight codes are read as one 32-bit word. Their numbers come from a table of 16 bfloat16 values in eight registers,
by byte permutations (``prmt``), four codes an instruction: no look-up in memory. Norms, the residual stream and the
gate of the feed-forward layer are part of the products that they belong to.

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
from .triton_nf4 import INTERPRETED, lower, number_words, numbers_on, upper

CODES_A_WORD = 8
ALIGNMENT = 16  # bytes, of a weight's codes: what a thread reads at a time
WORDS = 128  # of a weight's row that are read at a time
COLUMNS = 8  # of the result that a program computes; of two weights at once half of them
WARPS = 4


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
def _inputs(x_pointer, norm_pointer, pair, NORM: tl.constexpr):
    """Two neighbours of a text's input, times the norm's weight, and their squares."""
    values = tl.load(x_pointer + pair)
    even, odd = lower(values), upper(values)
    squares = tl.fma(even, even, odd * odd)
    if NORM:
        weight = tl.load(norm_pointer + pair)
        even, odd = even * lower(weight), odd * upper(weight)
    return even, odd, squares


@triton.jit
def _plus(total, numbers, x):
    return tl.fma(numbers, tl.broadcast_to(x[None, :], numbers.shape), total)


@triton.jit
def _dot(
    x_pointer, norm_pointer, codes_pointer, absmax_pointer, outer_pointer, offset_pointer, levels_pointer,
    numbers_pointer, column, eps, WIDTH: tl.constexpr, TEXTS: tl.constexpr, NORM: tl.constexpr, COLUMNS: tl.constexpr,
    WORDS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """For each text a (COLUMNS,) float32 tensor: its input, normed, times some rows of a weight."""
    words = tl.arange(0, WORDS)
    offset = tl.load(offset_pointer)
    sums, squares = (), ()
    for _ in tl.static_range(TEXTS):
        sums = sums + (tl.zeros((COLUMNS, WORDS), tl.float32),)
        squares = squares + (tl.zeros((WORDS,), tl.float32),)
    first = column.to(tl.int64) * WIDTH
    for start in tl.range(0, WIDTH // 8, WORDS):
        word = start + words
        at = first[:, None] // 8 + word[None, :]
        n = number_words(tl.load(codes_pointer + at), numbers_pointer, INTERPRETED)
        scale = _scales(absmax_pointer, outer_pointer, offset, levels_pointer, at // 8)
        new_sums, new_squares = (), ()
        for text in tl.static_range(TEXTS):
            x = x_pointer + text * (WIDTH // 2)
            a, b, square0 = _inputs(x, norm_pointer, 4 * word, NORM)
            c, d, square1 = _inputs(x, norm_pointer, 4 * word + 1, NORM)
            e, f, square2 = _inputs(x, norm_pointer, 4 * word + 2, NORM)
            g, h, square3 = _inputs(x, norm_pointer, 4 * word + 3, NORM)
            part = n[0] * a[None, :]
            part = _plus(part, n[1], b)
            part = _plus(part, n[2], c)
            part = _plus(part, n[3], d)
            part = _plus(part, n[4], e)
            part = _plus(part, n[5], f)
            part = _plus(part, n[6], g)
            part = _plus(part, n[7], h)
            new_sums = new_sums + (tl.fma(part, scale, sums[text]),)
            new_squares = new_squares + (squares[text] + (square0 + square1) + (square2 + square3),)
        sums, squares = new_sums, new_squares
    results = ()
    for text in tl.static_range(TEXTS):
        total = tl.sum(sums[text], 1)
        if NORM:
            total *= tl.rsqrt(tl.sum(squares[text], 0) / WIDTH + eps)
        results = results + (total,)
    return results


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
        at = text * rows + column
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
        tl.store(out_pointer + text * rows + column, out.to(tl.bfloat16))


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
        x: (texts, in) bfloat16.
        norm: (in,) bfloat16, weight of an RMS norm.
        eps: Of the norm.
        weights: One to three `PackedWeight`.
    """
    rows = [weight.rows for weight in weights] + [0] * (3 - len(weights))
    weights = [*weights, *[weights[-1]] * (3 - len(weights))]
    out = x.new_empty(len(x), sum(rows))
    _products[(sum(rows) // COLUMNS,)](
        _pairs(x), _pairs(norm), out, numbers_on(x.device), *(part for weight in weights for part in weight[:5]),
        *rows, eps, x.shape[1], len(x), COLUMNS, _words(x.shape[1]), INTERPRETED, num_warps=WARPS, **NO_FMA,
    )  # fmt: skip
    return out


@on_its_device
def added_product(x, residual, weight) -> torch.Tensor:
    """``residual + x @ weight.T``, (texts, out) bfloat16. `x`: (texts, in) bfloat16."""
    out = torch.empty_like(residual)
    _added_product[(weight.rows // COLUMNS,)](
        _pairs(x), residual, out, numbers_on(x.device), *weight, x.shape[1], len(x), COLUMNS, _words(x.shape[1]),
        INTERPRETED, num_warps=WARPS, **NO_FMA,
    )  # fmt: skip
    return out


@on_its_device
def gated_products(x, norm, eps, gate, up) -> torch.Tensor:
    """``silu(norm(x) @ gate.T) * (norm(x) @ up.T)``, (texts, out) bfloat16, as of `products`."""
    out = x.new_empty(len(x), gate.rows)
    _gated_products[(gate.rows // (COLUMNS // 2),)](
        _pairs(x), _pairs(norm), out, numbers_on(x.device), *gate[:5], *up[:5], gate.rows, eps, x.shape[1], len(x),
        COLUMNS // 2, _words(x.shape[1]), INTERPRETED, num_warps=WARPS, **NO_FMA,
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
        and state.shape[0] % COLUMNS == 0
        and state.shape[1] % BLOCK_SIZE == 0
    )


def _pairs(x: torch.Tensor) -> torch.Tensor:
    """Neighbours of bfloat16 values in one int32 each."""
    return x.contiguous().view(torch.int32)


def _words(width: int) -> int:
    """Words of a row of a weight that are read at a time: a power of two that divides them."""
    words = width // CODES_A_WORD
    return min(WORDS, words & -words)
