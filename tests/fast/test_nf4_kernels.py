"""NF4 read by byte permutations: the assembly, instruction by instruction, and what kernels make of it."""

from __future__ import annotations

import re

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit

pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA")

from ernie_image_nf4.fast.ops import triton_nf4

WORDS = [
    int.from_bytes(bytes([byte, 255 - byte, byte ^ 0x5A, (byte * 7) % 256]), "little") for byte in range(256)
]  # each byte at each place


@pytest.mark.parametrize("word", WORDS[::3] + WORDS[1::3])
def test_the_assembly_decodes_all_bytes(word):
    codes = [code for byte in word.to_bytes(4, "little") for code in (byte >> 4, byte & 15)]
    table = get_4bit_type("nf4", device="cpu")
    short, exact = (list(map(int, bits)) for bits in (table.bfloat16().view(torch.int16), table.view(torch.int32)))
    pairs = executed(triton_nf4.DECODE_WORD.value, "$4", word, 4)
    assert [half for pair in pairs for half in (pair >> 16, pair & 0xFFFF)] == [short[code] & 0xFFFF for code in codes]
    numbers = executed(triton_nf4.DECODE_BYTES.value, "$8", word, 8)
    assert numbers == [exact[code] & 0xFFFFFFFF for code in (*codes[::2], *codes[1::2])]


def executed(assembly: str, source: str, word: int, results: int) -> list[int]:
    """What a few PTX instructions leave in ``$0``, ``$1`` ..., by what the PTX manual says of each."""
    registers = {source: word}

    def value(name: str) -> int:
        return int(name, 0) if name[0].isdigit() else registers[name]

    for line in re.sub(r"[{}]", "", assembly).split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        operation, into, *names = re.split(r"[\s,]+", line.strip())
        a, b, *selector = map(value, names)
        if operation == "and.b32":
            registers[into] = a & b
        elif operation == "or.b32":
            registers[into] = a | b
        elif operation == "shr.u32":
            registers[into] = a >> b
        else:
            assert operation == "prmt.b32"
            both = a.to_bytes(4, "little") + b.to_bytes(4, "little")
            chosen = [selector[0] >> 4 * place & 15 for place in range(4)]
            assert max(chosen) < 8  # 8 and more would repeat a sign
            registers[into] = int.from_bytes(bytes(both[each] for each in chosen), "little")
    return [registers[f"${number}"] for number in range(results)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(4096, 4096), (7, 96), (1, 2)])
def test_weights_are_dequantized_to_bitsandbytes_bits(dtype, nested, shape):
    weight = torch.randn(shape, device="cuda").to(dtype)
    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=nested, blocksize=64)
    found = torch.empty_like(weight)
    triton_nf4.dequantize(codes, state, found)
    # bitsandbytes transposes what has a single row of codes.
    assert torch.equal(found, dequantize_4bit(codes, state).view(shape))
