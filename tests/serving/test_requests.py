"""What the server takes and what it refuses, before anything is drawn."""

from __future__ import annotations

import math

import pytest

from ernie_image_nf4.errors import InvalidRequest, InvalidSettings
from ernie_image_nf4.generation import schedule
from ernie_image_nf4.repository.metadata import Recommended
from ernie_image_nf4.serving import queue
from ernie_image_nf4.serving.lora import named_loras
from ernie_image_nf4.serving.requests import DrawRequest, Limits, check_request, recommended_within

LIMITS = Limits(max_pixels=64 * 64, max_steps=10, max_count=3, max_prompt_characters=20)
GOOD = {"prompt": "a cat", "width": 64, "height": 64, "steps": 10, "guidance_scale": 4.0, "count": 3}


def test_what_is_within_the_limits_is_taken():
    check_request(DrawRequest(**GOOD, lora=(("style", 0.5),)), LIMITS, lora_names=("style",))


@pytest.mark.parametrize(
    ("field", "change", "text"),
    [
        ("prompt", {"prompt": "  "}, "empty"),
        ("prompt", {"prompt": "x" * 21}, "up to 20"),
        ("prompt", {"prompt": "\ud83d"}, "Unicode"),
        ("negative_prompt", {"negative_prompt": "x" * 21}, "up to 20"),
        ("width", {"width": 50}, "try 48"),
        ("height", {"height": 0}, "multiple of 16"),
        ("size", {"width": 80}, "at most 4096 pixels"),
        ("steps", {"steps": 0}, "1 or more"),
        ("steps", {"steps": 11}, "up to 10"),
        ("count", {"count": 4}, "up to 3"),
        ("guidance_scale", {"guidance_scale": math.nan}, "finite"),
        ("guidance_scale", {"guidance_scale": 1e9}, "up to 100"),
        ("guidance_until", {"guidance_until": 0.0}, "no share of the steps"),
        ("guidance_until", {"guidance_until": math.nan}, "no share of the steps"),
        ("cache", {"cache": 0}, "no number of steps"),
        ("seed", {"seed": 2**63 - 2}, "out of range"),
        ("seed", {"seed": -1}, "out of range"),
        ("lora", {"lora": (("../../etc/passwd", 1.0),)}, "offers style"),
        ("lora", {"lora": (("style", math.inf),)}, "out of range"),
        ("lora", {"lora": (("style", 1.0), ("style", 1.0))}, "twice"),
    ],
)
def test_what_is_not_is_refused_with_the_field(field, change, text):
    with pytest.raises(InvalidRequest, match=text) as raised:
        check_request(DrawRequest(**{**GOOD, **change}), LIMITS, lora_names=("style",))
    assert raised.value.field == field


@pytest.mark.parametrize(
    ("max_pixels", "size", "expected"),
    [
        (1024 * 1024, (1024, 1024), (1024, 1024)),
        (512 * 512, (1024, 1024), (512, 512)),
        (500 * 500, (1376, 768), (656, 368)),
        (10, (768, 1376), (16, 16)),
    ],
)
def test_what_a_request_leaves_out_is_what_the_server_allows(max_pixels, size, expected):
    width, height = size
    found = recommended_within(Limits(max_pixels=max_pixels, max_steps=10), Recommended(height, width, 50, 3.0))
    assert (found.width, found.height, found.num_inference_steps, found.guidance_scale) == (*expected, 10, 3.0)
    assert recommended_within(Limits(), Recommended()) == Recommended()


def test_batches_are_as_large_as_generate_batch_makes_them():
    assert queue.MAX_BATCH == schedule.MAX_BATCH


def test_loras_are_offered_by_a_name_of_their_own_or_the_files():
    assert named_loras(["a/style.safetensors", "ink=b/x.safetensors"]) == {
        "style": "a/style.safetensors",
        "ink": "b/x.safetensors",
    }
    with pytest.raises(InvalidSettings, match="Two LoRAs"):
        named_loras(["a/ink.safetensors", "ink=b"])
    with pytest.raises(InvalidSettings, match="plain word"):
        named_loras(["a b.safetensors"])
