"""What is said of each generation of cards is what `load` does there."""

from __future__ import annotations

import pytest
import torch

from ernie_image_nf4.loading.cards import describe_device, generation_of
from ernie_image_nf4.repository.record import open_repository


@pytest.mark.parametrize(
    ("capability", "name", "dtype", "products", "attention"),
    [
        ((7, 5), "Turing", torch.float16, ["int8"], "memory-efficient"),
        ((8, 6), "Ampere", torch.bfloat16, ["int8"], "FlashAttention"),
        ((8, 7), "Ampere", torch.bfloat16, ["int8"], "FlashAttention"),
        ((8, 9), "Ada", torch.bfloat16, ["int8", "fp8"], "FlashAttention"),
        ((9, 0), "Hopper", torch.bfloat16, ["int8", "fp8"], "FlashAttention"),
        ((12, 1), "Blackwell", torch.bfloat16, ["int8", "fp8"], "FlashAttention"),
    ],
)
def test_a_card_belongs_to_a_generation(capability, name, dtype, products, attention):
    generation = generation_of(capability)
    assert generation is not None
    assert (generation.name, generation.dtype, generation.products) == (name, dtype, products)
    assert generation.attention == attention


def test_a_card_before_the_first_generation_has_none():
    assert generation_of((7, 0)) is None


def test_the_cpu_is_described_with_what_load_takes_there(repository):
    lines = dict(line.split(maxsplit=1) for line in describe_device(open_repository(repository), "cpu"))
    assert lines["device"] == "cpu"
    assert lines["dtype"] in ("float32", "bfloat16")
    assert lines["memory"] == "resident: it works in the machine's own memory"


@pytest.mark.gpu
def test_the_card_at_hand_is_described(repository):
    lines = dict(line.split(maxsplit=1) for line in describe_device(open_repository(repository)))
    assert torch.cuda.get_device_name() in lines["card"]
    assert lines["memory"].startswith("resident: ")
    assert lines["products"].split(", ")[0] == lines["dtype"].partition(":")[0]
