"""Every Triton kernel of a decode step, compiled for each card that decodes by them: it fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import QuantState
from compiling import CARDS, check_fit, compile_launched, launches, skip_unless_known

from ernie_image_nf4.fast import decode_step
from ernie_image_nf4.fast.ops import triton_decode, triton_nf4, triton_nf4_rows

pytestmark = pytest.mark.slow
DECODING = [card for card in CARDS if card >= decode_step.CAPABILITY]


def launch_decode_step(texts: int) -> None:
    """Of the full-size prompt enhancer."""
    width, heads, key_heads, dim, inner, vocabulary = 3072, 32, 8, 128, 9216, 131072
    x, norm = torch.empty(texts, width, dtype=torch.bfloat16), torch.empty(width, dtype=torch.bfloat16)
    key, up = (packed(rows, width) for rows in (key_heads * dim, inner))
    qkv = triton_nf4_rows.products(x, norm, 1e-5, [packed(heads * dim, width), key, key])
    angles, cache = torch.empty(2, texts, dim, dtype=torch.bfloat16), torch.empty(2, texts, key_heads, 512, dim)
    position, scale = torch.zeros(texts, dtype=torch.int64), torch.ones(texts, dtype=torch.bfloat16)
    attended = triton_decode.attention(qkv, *angles, scale, position, *cache.bfloat16(), 0.1)
    triton_nf4_rows.added_product(attended, x, packed(width, heads * dim))
    triton_nf4_rows.gated_products(x, norm, 1e-5, up, up)
    state = QuantState(torch.empty(64, dtype=torch.uint8), torch.Size([64, 64]), torch.empty(256), 64)
    state.nested, state.offset, state.state2 = (
        True,
        torch.empty(()),
        QuantState(torch.empty(1), None, torch.empty(256), 256),
    )
    triton_nf4.dequantize(torch.empty(2048, dtype=torch.uint8), state, torch.empty(64, 64, dtype=torch.bfloat16))
    logits = triton_decode.head_product(x, torch.empty(vocabulary, width, dtype=torch.bfloat16))
    settings, top_k = torch.empty(texts, 1), torch.zeros(texts, 1, dtype=torch.int64)
    for ranked in (None, logits[:, :50]):
        triton_decode.sample(logits, logits.float(), ranked, settings, top_k, settings)


def packed(rows: int, columns: int) -> triton_nf4_rows.PackedWeight:
    blocks = rows * columns // 64
    return triton_nf4_rows.PackedWeight(
        torch.empty(blocks * 8, dtype=torch.int32), torch.empty(blocks, dtype=torch.uint8), torch.empty(blocks // 256),
        torch.empty(()), torch.empty(256), rows,
    )  # fmt: skip


@pytest.mark.parametrize("card", DECODING, ids=lambda card: f"sm_{card[0]}{card[1]}")
def test_every_kernel_fits_the_card(card: tuple[int, int], tmp_path: Path):
    skip_unless_known(card, tmp_path)
    # Several texts take what one takes, and more: one of the cards is enough for a single one.
    for texts in (1, decode_step.MOST_TEXTS) if card == DECODING[0] else (decode_step.MOST_TEXTS,):
        kernels = compile_launched(card, lambda texts=texts: launch_decode_step(texts), tmp_path)
        check_fit(kernels, card)
        assert {kernel.name for kernel in kernels} == launches(triton_decode, triton_nf4, triton_nf4_rows)
