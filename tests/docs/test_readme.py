"""README and docs/: valid for the Hub, short, and true of the code."""

from __future__ import annotations

import re

import pytest
import torch
from doc_pages import read
from full_size import full_size_weights
from huggingface_hub import ModelCard

from ernie_image_nf4.memory.placement import choose_memory
from ernie_image_nf4.memory.requirements import GIB, MODES, WeightBytes, mode_needs
from ernie_image_nf4.repository.record import StoredComponent

README = read("README.md")


def test_front_matter_is_a_model_card_of_the_hub() -> None:
    data = ModelCard(README).data
    assert data.license == "apache-2.0"
    assert data.library_name == "diffusers"
    assert data.pipeline_tag == "text-to-image"
    assert data.base_model is None, "the mini is not derived from ERNIE-Image"


def test_it_fits_a_card() -> None:
    assert len(README.splitlines()) <= 220


CONTEXT = GIB // 2  # of CUDA, as on an H100: gone before the free memory is asked for


@pytest.fixture(scope="module")
def weights(full_size: dict[str, StoredComponent]) -> dict[str, WeightBytes]:
    return full_size_weights(full_size)


def chosen(weights: dict[str, WeightBytes], free: float) -> str:
    """The mode for pictures of 1024x1024 that `auto` takes on a card of which so many GiB are free."""
    device, inside = torch.device("cuda", 0), int(free * GIB) - CONTEXT
    return choose_memory("auto", device, weights=weights, free_bytes=inside, pixels=1024**2)[0]


def test_the_table_of_cards_is_what_auto_takes_at_full_size(weights: dict[str, WeightBytes]) -> None:
    rows = re.findall(r"^\| (\d+) GB \| ([\d.]+) GiB \| `(\w+)` \|", README, re.MULTILINE)
    assert [(card, mode) for card, _, mode in rows] == [
        ("12", "resident"),
        ("8", "offload"),
        ("6", "stream"),
        ("4", "stream"),
    ]
    for _, free, mode in rows:
        assert chosen(weights, float(free)) == mode
    assert chosen(weights, 15) == chosen(weights, 23) == "resident"


def test_the_limits_of_the_modes_are_those_of_auto_at_full_size(weights: dict[str, WeightBytes]) -> None:
    page = read("docs/memory-modes.md")
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) GiB \| ([\d.]+) GiB \|", page, re.MULTILINE)
    assert [mode for mode, *_ in rows] == list(MODES)
    without = {name: part for name, part in weights.items() if name != "pe"}
    for mode, *limits in rows:
        for each, limit in zip((weights, without), map(float, limits), strict=True):
            need = (mode_needs(each, 1024**2)[mode] + CONTEXT) / GIB
            assert need <= limit < need + 0.1
            assert chosen(each, limit) == mode


def test_host_memory_is_that_of_the_weights(weights: dict[str, WeightBytes]) -> None:
    total, enhancer = sum(part.whole for part in weights.values()) / GIB, weights["pe"].whole / GIB
    assert f"{total:.1f} GiB of pinned memory" in " ".join(README.split())
    assert f"saves {enhancer:.1f} GiB in `resident`" in README
    modes = " ".join(read("docs/memory-modes.md").split())
    assert f"that is {total:.1f} GiB, or {total - enhancer:.1f} GiB with `prompt_enhancer=False`" in modes
