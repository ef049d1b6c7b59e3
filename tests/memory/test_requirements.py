"""What each memory mode takes, against what was measured: full-size weights by the headers of their files."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from conftest import CHECKOUT
from diffusers import ErnieImagePipeline
from full_size import full_size_weights

from ernie_image_nf4.memory.precision import BFLOAT16, Precision
from ernie_image_nf4.memory.requirements import (
    GIB,
    KERNEL_BYTES,
    MODES,
    WORK,
    WeightBytes,
    mode_needs,
    weight_bytes,
    without_optional,
)
from ernie_image_nf4.repository.record import StoredComponent

RUN = json.loads((CHECKOUT / "benchmarks" / "benchmark_h100.json").read_text(encoding="utf-8"))
ARMS: dict[str, dict[str, Any]] = {arm["name"]: arm for arm in RUN["arms"]}
MIB = 1024**2
FLOAT32 = Precision(torch.float32)


@pytest.fixture(scope="module")
def weights(full_size: dict[str, StoredComponent]) -> dict[str, WeightBytes]:
    return full_size_weights(full_size)


def test_weights_on_the_device_are_those_that_were_loaded(weights):
    measured = ARMS["resident"]["loading_peak_allocated_gib"] * GIB
    assert sum(part.whole for part in weights.values()) == pytest.approx(measured, rel=0.001)


def test_components_are_in_the_order_in_which_a_pipeline_calls_them():
    assert "->".join(WORK) == ErnieImagePipeline.model_cpu_offload_seq


def test_of_a_streamed_component_two_blocks_are_there_and_what_is_in_none(weights):
    transformer = weights["transformer"]
    assert transformer.blocks == 36 * transformer.largest_block
    assert transformer.at_once("stream") == transformer.whole - 34 * transformer.largest_block
    assert transformer.at_once("offload") == transformer.unstreamed("offload") == transformer.whole
    assert transformer.unstreamed("stream") == transformer.whole - transformer.blocks
    assert {weights[name].blocks for name in ("pe", "text_encoder", "vae")} == {0}


def test_what_text_to_image_does_not_need_stays_on_the_host_if_fast(full_size):
    part = full_size["text_encoder"]
    both = [weight_bytes(part, fast=fast, precision=BFLOAT16).whole for fast in (True, False)]
    assert both[1] - both[0] > 0.9 * GIB
    assert both[1] == pytest.approx(part.bytes, rel=0.01)


def test_unquantized_weights_take_what_their_dtype_does(full_size, weights):
    in_float32 = full_size_weights(full_size, precision=FLOAT32)
    table = 131072 * 3072 * 2  # the enhancer's embedding table in bfloat16
    assert in_float32["pe"].whole - weights["pe"].whole == pytest.approx(table, rel=0.01)
    assert in_float32["vae"].whole == pytest.approx(2 * weights["vae"].whole, rel=0.001)


@pytest.mark.parametrize(
    ("mode", "size", "enhancer", "measured"),
    [
        ("resident", 512, True, ARMS["resident"]["peak_reserved_gib"]),
        ("offload", 512, True, ARMS["offload"]["peak_reserved_gib"]),
        ("offload", 1024, False, ARMS["offload"]["large"]["peak_reserved_gib"]),
        ("stream", 512, True, ARMS["stream"]["peak_reserved_gib"]),
        ("stream", 1024, False, ARMS["stream"]["large"]["peak_reserved_gib"]),
    ],
)
def test_a_mode_takes_what_was_measured_for_it(weights, mode: str, size: int, enhancer: bool, measured: float):
    """Of the enhancer's 256 tokens. Resident had room to reserve more than it needs at 1024x1024."""
    drawn_with = weights if enhancer else without_optional(weights)
    need = mode_needs(drawn_with, size**2, long_text=False)[mode] - KERNEL_BYTES
    assert measured - 0.01 <= need / GIB <= 1.05 * measured


def test_a_streamed_mode_takes_its_largest_component_not_the_sum_of_the_largest(weights):
    pe, encoder, transformer, vae = (weights[name] for name in ("pe", "text_encoder", "transformer", "vae"))
    with_enhancer, without = (mode_needs(each, 1024**2)["stream"] for each in (weights, without_optional(weights)))
    assert pe.whole < with_enhancer < pe.whole + 0.7 * GIB
    assert transformer.at_once("stream") + vae.whole < without < with_enhancer
    assert encoder.whole < without


def test_text_and_pixels_cost_what_they_add(weights):
    short, long = (mode_needs(weights, 1024**2, long_text=text) for text in (False, True))
    assert all(0.1 * GIB < long[mode] - short[mode] < 0.3 * GIB for mode in MODES)
    small, large = (mode_needs(weights, pixels) for pixels in (512**2, 2048**2))
    assert large["offload"] - small["offload"] == pytest.approx(1.16 * (4 - 1 / 4) * GIB, rel=1e-6)


def test_a_picture_decoded_in_one_piece_takes_more_than_a_tile(weights):
    tiled, whole = (mode_needs(weights, 1024**2, tiled=tiled) for tiled in (True, False))
    assert whole["stream"] == weights["vae"].whole + int(5.5 * GIB) + KERNEL_BYTES
    assert tiled["stream"] < whole["stream"]
    assert tiled["resident"] + 3.8 * GIB < whole["resident"]


def test_where_the_vae_may_decode_as_a_whole_the_mode_has_room_for_it(weights):
    """Within the bytes of the largest component, as `enable_offload` returns them."""
    for pixels in range(256**2, 1024**2, 256 * 64):
        for mode in ("offload", "stream"):
            limit = max(part.unstreamed(mode) for part in weights.values())
            if (whole := pixels * 5.5 * GIB / MIB) <= limit:
                assert weights["vae"].whole + whole <= mode_needs(weights, pixels)[mode]


def test_a_component_that_comes_while_another_works_is_counted():
    parts = {"text_encoder": WeightBytes(2 * GIB), "transformer": WeightBytes(2 * GIB), "vae": WeightBytes(4 * GIB)}
    assert mode_needs(parts, 0, long_text=False)["offload"] == int(4.23 * GIB) + KERNEL_BYTES
    parts["transformer"] = WeightBytes(2 * GIB + 1)  # does not fit where the VAE does, beside the text encoder
    assert mode_needs(parts, 0, long_text=False)["offload"] == 4 * GIB + KERNEL_BYTES


def test_float16_takes_more_than_bfloat16_and_less_than_float32(weights):
    precisions = (BFLOAT16, Precision(torch.float16, mixed=True), FLOAT32)
    for mode in MODES:
        bfloat16, mixed, float32 = (mode_needs(weights, 1024**2, precision=each)[mode] for each in precisions)
        assert bfloat16 < mixed <= float32
    for component, factors in {"transformer": (1, 1.25, 2), "text_encoder": (1, 2, 2), "vae": (1, 2, 2)}.items():
        assert tuple(each.work_factor(component) for each in precisions) == factors


def test_wider_dtypes_take_more(full_size, weights):
    in_float32 = full_size_weights(full_size, precision=FLOAT32)
    for mode, need in mode_needs(in_float32, 1024**2, precision=FLOAT32).items():
        assert need > mode_needs(weights, 1024**2)[mode] + GIB
