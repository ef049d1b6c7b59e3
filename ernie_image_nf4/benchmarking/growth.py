"""How the time of a denoising step grows with size and batch."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from ..fast.transformer import computation_dtype
from ..loading.pipeline import load
from ..repository.components import PIXELS_PER_PATCH
from .device import best_seconds
from .predictions import TEXT_LENGTHS

SIZES, BATCHES = (512, 768, 1024, 1536), (1, 2, 4)
FLOPS_A_PRODUCT = 2  # A multiplication and an addition
LARGE_PRODUCT = 8192  # Rows and columns of the matrices whose product shows the GPU's rate


def measure_growth(model: str | Path, device: str) -> dict[str, Any]:
    """Time of a step with guidance by size and batch, and over its floor: the time that its products alone would take.

    Returns:
        ``tflop_per_s``, the rate of one large matrix product, and ``rows`` with size, batch, ``step_ms``, ``tflop`` of
        the step's products, and ``over_floor``.
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
    return {"tflop_per_s": rate / 1e12, "rows": rows}


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


def _product_rate(device: str, dtype: torch.dtype) -> float:
    """Floating point operations a second of one large matrix product."""
    a, b = (torch.randn(LARGE_PRODUCT, LARGE_PRODUCT, device=device, dtype=dtype) for _ in range(2))
    return FLOPS_A_PRODUCT * LARGE_PRODUCT**3 / best_seconds(lambda: a @ b, device)
