"""Texts of the prompt enhancer for several pictures: decoded together or not, they are those of single mode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Ministral3Config

from ernie_image_nf4 import load
from ernie_image_nf4.fast.decode_batch import grown_capacity
from ernie_image_nf4.fast.decoder import first_capacity, rounded_up
from ernie_image_nf4.fast.prompt_enhancer import FastPromptEnhancer, make_prompt_enhancer_fast
from ernie_image_nf4.generation import enhancement
from ernie_image_nf4.generation.enhancement import (
    DECODE_SLOT_BYTES,
    choose_decode_slots,
    enhance,
    enhance_all,
    find_decode_slots,
)
from ernie_image_nf4.generation.prompt_file import Row
from ernie_image_nf4.generation.schedule import plan_pictures
from ernie_image_nf4.generation.settings import Settings
from ernie_image_nf4.memory.placement import GIB
from ernie_image_nf4.memory.precision import Precision
from ernie_image_nf4.quantization import synthetic


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("memory", ["resident", pytest.param("offload", marks=pytest.mark.gpu)])
def test_texts_written_together_are_those_of_single_mode(repository, monkeypatch, device, memory):
    if device == "cpu" and memory != "resident":
        pytest.skip("a CPU has no offloading")
    pipe = load(repository, device=device, memory=memory)
    if device == "cpu":
        make_prompt_enhancer_fast(pipe.pe)
    rows = [Row("a cat", seed=3), Row("一只猫", seed=4), Row("a dog", seed=3), Row("a very long prompt " * 9, seed=9)]
    settings = [
        picture.settings for picture in plan_pictures(rows, Settings("", "", 64, 64, 1, 1.0, seed=0, use_pe=True))
    ]
    settings.insert(2, replace(settings[0], use_pe=False))
    expected = [enhance(pipe, each) for each in settings]
    calls, together = [], FastPromptEnhancer.generate_together
    monkeypatch.setattr(FastPromptEnhancer, "generate_together", lambda *args: calls.append(args) or together(*args))
    monkeypatch.setattr(enhancement, "find_decode_slots", lambda pipe: 3)
    assert enhance_all(pipe, settings) == expected
    assert expected[2] is None
    assert len(set(expected)) == len(expected)
    assert [len(requests) for _, requests, _, _ in calls] == [4]


def test_texts_are_written_one_by_one_where_several_take_too_much_memory(repository, monkeypatch):
    pipe = load(repository, device="cpu")
    make_prompt_enhancer_fast(pipe.pe)
    settings = [Settings("a cat", "", 64, 64, 1, 1.0, seed=seed, use_pe=True) for seed in range(2)]

    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(enhancement, "find_decode_slots", lambda pipe: 2)
    monkeypatch.setattr(FastPromptEnhancer, "generate_together", out_of_memory)
    assert enhance_all(pipe, settings) == [enhance(pipe, each) for each in settings]


@pytest.mark.parametrize(("free_gib", "count"), [(0.5, 1), (1.9, 1), (2.2, 2), (80, 4)])
def test_as_many_texts_are_written_at_a_time_as_fit_the_memory(free_gib, count):
    assert choose_decode_slots(free_gib * GIB) == count
    assert choose_decode_slots(None) == 1


@pytest.mark.parametrize("precision", [Precision(torch.float16, mixed=True), Precision(torch.float32)])
def test_texts_in_float32_take_twice_the_memory(precision):
    for free_gib in (1, 2, 3, 4.5, 80):
        assert choose_decode_slots(free_gib * GIB, precision) == choose_decode_slots((free_gib + 1) / 2 * GIB)


def test_the_pipelines_own_precision_counts(repository, monkeypatch):
    monkeypatch.setattr(enhancement, "execution_device", lambda pipe: torch.device("cuda"))
    monkeypatch.setattr(enhancement, "free_memory", lambda device: 3 * GIB)
    counts = [find_decode_slots(load(repository, device="cpu", dtype=dtype)) for dtype in ("bfloat16", "float16")]
    assert counts == [4, 2]


def test_a_row_of_the_full_size_enhancers_cache_fits_what_a_text_may_take():
    config = Ministral3Config.from_pretrained(Path(synthetic.__file__).parent / "configs" / "full" / "pe")
    bytes_a_token = (
        2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * torch.bfloat16.itemsize
    )
    capacity, limit = first_capacity(512), rounded_up(512 + 2048)  # of a long prompt and a text that is far longer
    while capacity < limit:
        larger = grown_capacity(capacity, capacity + 1, limit)
        assert (capacity + larger) * bytes_a_token < DECODE_SLOT_BYTES
        capacity = larger
    assert capacity == limit


def test_requests_that_fast_decoding_does_not_serve_are_left_to_upstream(repository, monkeypatch):
    pipe = load(repository, device="cpu")
    make_prompt_enhancer_fast(pipe.pe)
    settings = [Settings("a cat", "", 64, 64, 1, 1.0, seed=seed, use_pe=True) for seed in range(2)]
    expected = [enhance(pipe, each) for each in settings]
    monkeypatch.setattr(enhancement, "find_decode_slots", lambda pipe: 2)
    monkeypatch.setattr(FastPromptEnhancer, "decode_request", lambda *_, **__: None)
    monkeypatch.setattr(FastPromptEnhancer, "generate_together", lambda *_: pytest.fail("was asked"))
    assert enhance_all(pipe, settings) == expected


def test_nothing_is_decoded_together_without_a_prompt_enhancer(repository, monkeypatch):
    pipe = load(repository, device="cpu", prompt_enhancer=False)
    settings = [Settings("a cat", "", 64, 64, 1, 1.0, seed=seed, use_pe=True) for seed in range(2)]
    assert enhance_all(pipe, settings) == [None, None]
