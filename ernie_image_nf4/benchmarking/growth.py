"""How the time of a denoising step grows with size and batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..fast.ops import eight_bit
from ..fast.ops.rotation import GROUP
from ..fast.transformer import computation_dtype
from ..loading.pipeline import load
from ..repository.components import PIXELS_PER_PATCH
from .device import best_seconds
from .predictions import TEXT_LENGTHS

SIZES, BATCHES = (512, 768, 1024, 1536), (1, 2, 4)
FLOPS_A_PRODUCT = 2  # A multiplication and an addition
LARGE_PRODUCT = 8192  # Rows and columns of the matrices whose product shows the GPU's rate
PRODUCTS_IN_A_ROW = 20  # so that starting one takes no part of the time
INT8_ROWS = (2200, 8448)  # Tokens of a step with guidance and a prompt of some words, at 512x512 and at 1024x1024


def measure_growth(model: str | Path, device: str) -> dict[str, Any]:
    """Time of a step with guidance by size and batch, and over its floor: the time that its products alone would take.

    Returns:
        ``tflop_per_s``, the rate of one large matrix product, ``rows`` with size, batch, ``step_ms``, ``tflop`` of the
        step's products, and ``over_floor``, and ``int8_products``, see `compare_int8`.
    """
    pipe = load(model, device=device, memory="resident", prompt_enhancer=False)
    config, dtype = pipe.transformer.config, pipe.transformer.dtype
    rate = _product_rate(device, computation_dtype(pipe.transformer))
    text_tokens = max(TEXT_LENGTHS)
    rows = []
    for size in SIZES:
        for batch in BATCHES:
            side = size // PIXELS_PER_PATCH
            inputs = {
                "hidden_states": torch.randn(2 * batch, config.in_channels, side, side, device=device, dtype=dtype),
                "timestep": torch.full((2 * batch,), 500.0, device=device, dtype=dtype),
                "text_bth": torch.randn(2 * batch, text_tokens, config.text_in_dim, device=device, dtype=dtype),
                "text_lens": torch.full((2 * batch,), text_tokens, device=device),
            }
            with torch.no_grad():
                seconds = best_seconds(functools.partial(pipe.transformer, **inputs), device)
            operations = step_operations(config, 2 * batch, side * side + text_tokens)
            rows.append(
                {
                    "size": size,
                    "batch": batch,
                    "step_ms": 1000 * seconds,
                    "tflop": operations / 1e12,
                    "over_floor": seconds * rate / operations,
                }
            )
    shape = (config.ffn_hidden_size, config.hidden_size)
    return {"tflop_per_s": rate / 1e12, "rows": rows, "int8_products": compare_int8(INT8_ROWS, shape, device)}


def step_operations(config: Any, rows: int, tokens: int) -> float:
    """Floating point operations of the matrix products of one forward pass of the transformer, attention included.

    Args:
        config: Of the transformer.
        rows: Of the batch.
        tokens: Of a row, text included.
    """
    width, inner = config.hidden_size, config.ffn_hidden_size
    attention = 4 * width * width + 2 * tokens * width  # Projections; queries with keys, and with values
    feed_forward = 3 * width * inner
    return FLOPS_A_PRODUCT * rows * tokens * (attention + feed_forward) * config.num_layers


def compare_int8(rows: Sequence[int], shape: tuple[int, int], device: str) -> list[dict[str, float]]:
    """TFLOP/s of products with a weight of a feed-forward layer, in bfloat16 and in int8 with scales.

    Args:
        rows: Of the inputs.
        shape: (out, in) of the weight.
        device: To compute on.

    Returns:
        For each number of rows ``rows``, ``bfloat16``, ``int8`` and ``speedup``. Nothing for a weight that can't be
        rotated.
    """
    if shape[1] % GROUP:
        return []
    weight = torch.randn(shape, device=device)
    int8_weight, bfloat16_weight = eight_bit.quantize_rows(weight, eight_bit.INT8), weight.bfloat16()
    found = []
    for count in rows:
        x = torch.randn(count, shape[1], device=device)
        int8_x, bfloat16_x = eight_bit.quantize_rows(x, eight_bit.INT8), x.bfloat16()
        products: tuple[Callable[[], object], ...] = (
            functools.partial(F.linear, bfloat16_x, bfloat16_weight),
            functools.partial(eight_bit.scaled_product, *int8_x, *int8_weight, torch.bfloat16),
        )
        operations = FLOPS_A_PRODUCT * PRODUCTS_IN_A_ROW * count * shape[0] * shape[1]
        rates = [operations / best_seconds(functools.partial(_repeat, each), device) / 1e12 for each in products]
        found.append({"rows": count, "bfloat16": rates[0], "int8": rates[1], "speedup": rates[1] / rates[0]})
    return found


def _repeat(product: Callable[[], object]) -> None:
    for _ in range(PRODUCTS_IN_A_ROW):
        product()


def _product_rate(device: str, dtype: torch.dtype) -> float:
    """Floating point operations a second of one large matrix product."""
    a, b = (torch.randn(LARGE_PRODUCT, LARGE_PRODUCT, device=device, dtype=dtype) for _ in range(2))
    return FLOPS_A_PRODUCT * LARGE_PRODUCT**3 / best_seconds(lambda: a @ b, device)
