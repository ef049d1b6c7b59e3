"""Every Triton kernel of the transformer, compiled for each card: it fits, and int8 is multiplied by tensor cores."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from compiling import CARDS, MOST_SPILLED, check_fit, compile_launched, launches, on_each_card, skip_unless_known

from ernie_image_nf4.fast.ops import (
    eight_bit,
    triton_eight_bit,
    triton_elementwise,
    triton_float16,
    triton_int8,
    triton_nf4_panels,
)
from ernie_image_nf4.fast.ops.eight_bit import FP8, INT8
from ernie_image_nf4.fast.products import CAPABILITY

pytestmark = pytest.mark.slow

KERNELS = (triton_elementwise, triton_eight_bit, triton_float16, triton_int8, triton_nf4_panels)
TENSOR_CORES = r"mma\.sync\S*\.s8\.s8|wgmma\.mma_async\S*\.s8\.s8|tcgen05\.mma\S*kind::i8"
# Triton left Turing's tensor cores in its version 3.3: cuBLAS multiplies there, instead of this kernel.
PRODUCT = "_scaled_product"
HIDDEN, INNER, HEADS = 4096, 12288, 32  # of the full-size transformer


def launch_all(capability: tuple[int, int]) -> None:
    """Call what launches kernels, for tensors of a step at full size."""
    dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
    x, modulation = torch.empty(1, 3, HIDDEN, dtype=dtype), torch.empty(1, HIDDEN, dtype=dtype)
    weight, rows = modulation[0], torch.zeros(3, dtype=torch.int64)
    triton_elementwise.gated_add_norm(x, x, modulation, weight, modulation, modulation, 1e-6, rows)
    head = torch.empty(1, 3, HIDDEN // HEADS, dtype=dtype)
    triton_elementwise.norm_rotary(x.unflatten(2, (HEADS, -1)), head[0, 0], head, head, 1e-6)
    triton_elementwise.gelu_times(x, x)
    launch_float16()
    launch_panels()
    for to in (INT8, FP8):
        if capability >= CAPABILITY[to.name][0]:
            launch_eight_bits(to, dtype)
    if capability >= eight_bit.TENSOR_CORES:
        multiply(dtype)


def launch_float16() -> None:
    x, modulation = torch.empty(1, 3, HIDDEN), torch.empty(1, HIDDEN)
    values, scale, rows = x.half(), torch.empty(1, 3, 1), torch.zeros(3, dtype=torch.int64)
    triton_float16.gated_add_norm(
        x, values, scale, modulation, modulation[0], modulation, modulation, 1e-6, rows
    )  # fmt: skip
    head = torch.empty(1, 3, HIDDEN // HEADS)
    triton_float16.norm_rotary(values.unflatten(2, (HEADS, -1)), scale, head[0, 0], head, head, 1e-6)
    inner = torch.empty(1, 3, INNER, dtype=torch.float16)
    triton_float16.gelu_times(inner, inner, scale)
    triton_float16.scaled(values, scale)


def launch_panels() -> None:
    panel, square, table = torch.empty(64, INNER), torch.empty(64, 64), torch.empty(16)
    triton_nf4_panels.round_panel(panel, panel, square, panel[0], table)
    triton_nf4_panels.descend_panel(panel, square, panel[0], panel.byte(), table)


def launch_eight_bits(to: eight_bit.Format, dtype: torch.dtype) -> None:
    x, inner = torch.empty(3, HIDDEN, dtype=dtype), torch.empty(3, INNER, dtype=dtype)
    if to is INT8:  # in fp8 it is the next one without the GELU
        triton_eight_bit.quantize_rows(x, to)
    triton_eight_bit.gelu_times_rows(inner, inner, to)
    packed, modulation, rows = x[None], torch.empty(1, HIDDEN, dtype=dtype), torch.zeros(3, dtype=torch.int64)
    triton_eight_bit.gated_add_norm_rows(
        packed, packed, modulation, modulation[0], modulation, modulation, 1e-6, rows, to
    )  # fmt: skip
    codes, absmax = (torch.empty(16 * INNER // size, dtype=torch.uint8) for size in (2, 64))
    outer, levels = torch.empty(16 * INNER // 64 // 256), torch.empty(256)
    into = eight_bit.empty_rows(codes, 16, INNER, to)
    triton_eight_bit.quantize_weight(codes, absmax, into, 64, to, outer, levels, torch.zeros(()), 256)


def multiply(dtype: torch.dtype) -> None:
    x, weight = (torch.empty(rows, HIDDEN, dtype=torch.int8) for rows in (300, INNER))
    arguments = x, torch.empty(300, 1), weight, torch.empty(INNER, 1), dtype
    triton_int8.scaled_product(*arguments)
    triton_int8.scaled_product(*arguments, (torch.empty(300, 48, dtype=dtype), torch.empty(INNER, 48, dtype=dtype)))


@on_each_card
def test_every_kernel_fits_the_card(card: tuple[int, int], tmp_path: Path):
    skip_unless_known(card, tmp_path)
    kernels = compile_launched(card, lambda: launch_all(card), tmp_path)
    check_fit(kernels, card)
    products = [kernel for kernel in kernels if kernel.name == PRODUCT]
    assert all(re.search(TENSOR_CORES, kernel.ptx) for kernel in products)
    assert bool(products) == (card >= eight_bit.TENSOR_CORES)
    assert {kernel.name for kernel in kernels} == launches(*KERNELS) - (set() if products else {PRODUCT})


def test_a_tile_that_is_too_large_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(triton_int8, "TILES", {(8, 0): triton_int8.Tile(64, 64, 64, 1, 15)})
    kernels = compile_launched((8, 6), lambda: multiply(torch.bfloat16), tmp_path)
    assert len(kernels) == 2  # with LoRAs and without
    for kernel in kernels:
        assert kernel.shared > CARDS[8, 6][1]
        assert kernel.spilled > MOST_SPILLED
