"""How Triton kernels read NF4: the numbers of the codes come from registers, by byte permutations (``prmt``).

A look-up in memory takes longer than reading the codes does. One ``prmt`` takes a byte each of a table of eight for
four codes, so two and a third that chooses between them serve a table of 16.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import get_4bit_type
from triton import knobs

from .triton_launch import NO_FMA, on_its_device

INTERPRETED = knobs.runtime.interpret  # Triton's interpreter knows no assembly
BYTES = 2048  # of a weight's codes that a program dequantizes
WARPS = 4
EXACT = get_4bit_type("nf4", device="cpu")
NUMBERS = EXACT.bfloat16()
# Of four codes in the lower half of `index`: bits 0 to 2 of each, and from bit 3 whether it is above 7.
PREPARE = """and.b32 index, {word}, 0x77777777;
shr.u32 choice, {word}, 1;
and.b32 choice, choice, 0x44444444;
or.b32 choice, choice, 0x32103210;
"""
NEXT_FOUR = "shr.u32 index, index, 16;\nshr.u32 choice, choice, 16;\n"


def _planes(numbers: torch.Tensor, names: tuple[str, ...]) -> str:
    """Assembly: the bytes of four codes' numbers, all of their lowest bytes into the first register of `names` ..."""
    table = numbers.view(torch.uint8).reshape(16, -1).tolist()
    lines = []
    for byte, name in enumerate(names):
        # The bytes of codes 0 to 3, 4 to 7, 8 to 11 and 12 to 15, the first in the lowest place.
        a, b, c, d = (
            "0x" + "".join(f"{table[4 * four + place][byte]:02x}" for place in (3, 2, 1, 0)) for four in range(4)
        )
        lines += [
            f"prmt.b32 small, {a}, {b}, index;",
            f"prmt.b32 large, {c}, {d}, index;",
            f"prmt.b32 {name}, small, large, choice;",
        ]
    return "\n".join(lines) + "\n"


def _two_pairs(first: str, second: str) -> str:
    """Assembly: four codes to two pairs of numbers in bfloat16."""
    return (
        _planes(NUMBERS, ("low", "high"))
        + f"prmt.b32 {first}, low, high, 0x5140;\nprmt.b32 {second}, low, high, 0x7362;\n"
    )


def _four_numbers(first: str, second: str, third: str, fourth: str) -> str:
    """Assembly: four codes to their numbers in float32."""
    return (
        _planes(EXACT, ("low", "lower", "higher", "high"))
        + f"""prmt.b32 small, low, lower, 0x5140;
prmt.b32 large, higher, high, 0x5140;
prmt.b32 {first}, small, large, 0x5410;
prmt.b32 {second}, small, large, 0x7632;
prmt.b32 small, low, lower, 0x7362;
prmt.b32 large, higher, high, 0x7362;
prmt.b32 {third}, small, large, 0x5410;
prmt.b32 {fourth}, small, large, 0x7632;
"""
    )


# The eight codes of the word $4, as four pairs of bfloat16. bitsandbytes packs the first of two codes into the upper
# half of a byte, so the first number of a pair is in its upper half.
DECODE_WORD = tl.constexpr(
    "{\n.reg .b32 index, choice, small, large, low, high;\n"
    + PREPARE.format(word="$4")
    + _two_pairs("$0", "$1")
    + NEXT_FOUR
    + _two_pairs("$2", "$3")
    + "}"
)
# Four bytes in $8: the numbers of their upper halves in $0 to $3, of their lower halves in $4 to $7.
DECODE_BYTES = tl.constexpr(
    "{\n.reg .b32 index, choice, small, large, low, lower, higher, high;\n"
    + PREPARE.format(word="$8")
    + _four_numbers("$4", "$0", "$5", "$1")
    + NEXT_FOUR
    + _four_numbers("$6", "$2", "$7", "$3")
    + "}"
)


@triton.jit
def number_words(word, numbers_pointer, INTERPRETED: tl.constexpr):
    """Eight float32 tensors: the numbers of a word's codes, in their order in the weight."""
    if INTERPRETED:
        # Shifts of the earlier code in the upper half of its byte, then the later one.
        return (
            tl.load(numbers_pointer + ((word >> 4) & 15)).to(tl.float32),
            tl.load(numbers_pointer + (word & 15)).to(tl.float32),
            tl.load(numbers_pointer + ((word >> 12) & 15)).to(tl.float32),
            tl.load(numbers_pointer + ((word >> 8) & 15)).to(tl.float32),
            tl.load(numbers_pointer + ((word >> 20) & 15)).to(tl.float32),
            tl.load(numbers_pointer + ((word >> 16) & 15)).to(tl.float32),
            tl.load(numbers_pointer + ((word >> 28) & 15)).to(tl.float32),
            tl.load(numbers_pointer + ((word >> 24) & 15)).to(tl.float32),
        )
    else:
        first, second, third, fourth = tl.inline_asm_elementwise(
            DECODE_WORD, "=&r,=&r,=&r,=&r,r", [word], (tl.int32, tl.int32, tl.int32, tl.int32), True, 1
        )
        return (
            upper(first), lower(first), upper(second), lower(second),
            upper(third), lower(third), upper(fourth), lower(fourth),
        )  # fmt: skip


@triton.jit
def upper(pair):
    """The number in the upper half of two bfloat16, as float32."""
    return (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def lower(pair):
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def number_bytes(codes, table_pointer, INTERPRETED: tl.constexpr):
    """Two float32 tensors: the numbers of the first and of the second codes of bytes."""
    if INTERPRETED:
        whole = codes.to(tl.int32)
        return tl.load(table_pointer + (whole >> 4)), tl.load(table_pointer + (whole & 15))
    else:
        return tl.inline_asm_elementwise(
            DECODE_BYTES, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [codes], (tl.float32, tl.float32), True, 4
        )


@triton.jit
def _dequantize(
    codes_pointer, absmax_pointer, levels_pointer, outer_pointer, offset_pointer, table_pointer, out_pointer, count,
    NESTED: tl.constexpr, BLOCK: tl.constexpr, OUTER: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr,
    BYTES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = place < count
    first, second = number_bytes(tl.load(codes_pointer + place, inside, 0), table_pointer, INTERPRETED)
    block = place // (BLOCK // 2)
    scale = tl.load(absmax_pointer + block, inside, 0)
    if NESTED:
        outer = tl.load(outer_pointer + block // OUTER, inside, 0.0)
        scale = tl.load(levels_pointer + scale.to(tl.int32)) * outer + tl.load(offset_pointer)
    values = tl.reshape(tl.join(first * scale, second * scale), (2 * BYTES,))
    at = tl.program_id(0).to(tl.int64) * 2 * BYTES + tl.arange(0, 2 * BYTES)
    there = at if STRIDE == WIDTH else at // WIDTH * STRIDE + at % WIDTH
    tl.store(out_pointer + there, values.to(out_pointer.dtype.element_ty), at < 2 * count)


@on_its_device
def dequantize(codes, state, out) -> None:
    """An NF4 weight of an even number of values: the bits of ``dequantize_4bit``.

    Args:
        codes: As bitsandbytes packs them, uint8.
        state: ``QuantState``.
        out: Where to write it, of the weight's shape and any dtype. Its rows may be apart.
    """
    width, stride = (1, 1) if out.is_contiguous() else (out.shape[1], out.stride(0))
    outer = (state.state2.code, state.state2.absmax, state.offset) if state.nested else (state.absmax,) * 3
    _dequantize[(triton.cdiv(codes.numel(), BYTES),)](
        codes, state.absmax, *outer, numbers_on(codes.device, exact=True), out, codes.numel(), state.nested,
        state.blocksize, state.state2.blocksize if state.nested else 1, width, stride, BYTES, INTERPRETED,
        num_warps=WARPS, **NO_FMA,
    )  # fmt: skip


@functools.cache
def numbers_on(device: torch.device, exact: bool = False) -> torch.Tensor:
    """The 16 numbers of NF4 on a device, in bfloat16 or as they are, in float32."""
    return (EXACT if exact else NUMBERS).to(device)
