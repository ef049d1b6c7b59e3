"""README and docs/: valid for the Hub, short, and true of the code."""

from __future__ import annotations

import json
import re
import shutil
from importlib.resources import as_file, files
from pathlib import Path

import pytest
import torch
from conftest import skeleton, stored
from doc_pages import read
from huggingface_hub import ModelCard

from ernie_image_nf4.loading.pipeline import device_bytes
from ernie_image_nf4.memory.placement import GIB, choose_memory, mode_bytes, working_bytes
from ernie_image_nf4.quantization.layer_selection import DEFAULT_KEEP, plan_weights
from ernie_image_nf4.quantization.synthetic import tensor_specs
from ernie_image_nf4.repository.components import COMPONENTS
from ernie_image_nf4.repository.safetensors_io import TensorSpec

README = read("README.md")


def test_front_matter_is_a_model_card_of_the_hub() -> None:
    data = ModelCard(README).data
    assert data.license == "apache-2.0"
    assert data.library_name == "diffusers"
    assert data.pipeline_tag == "text-to-image"
    assert data.base_model is None, "the mini is not derived from ERNIE-Image"


def test_it_fits_a_card() -> None:
    assert len(README.splitlines()) <= 220


def hollow_file(file: Path, specs: dict[str, TensorSpec]) -> None:
    """A safetensors file of these tensors with a hole in place of the values: full size, but no bytes on the disk."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, spec in specs.items():
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (end, end + spec.bytes)}
        end += spec.bytes
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


@pytest.fixture(scope="module")
def full_size_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Component -> bytes of its weights on the device, of the full-size model as `quantize` makes it."""
    folder = tmp_path_factory.mktemp("full-size")
    with as_file(files("ernie_image_nf4") / "quantization" / "configs" / "full") as configs:
        shutil.copytree(configs, folder, dirs_exist_ok=True)
    weights = {}
    for component in COMPONENTS:
        if component.weights:
            file = folder / component.name / component.weights
            hollow_file(file, tensor_specs(skeleton(component, folder / component.name), duplicate_lm_head=False))
            if component.quantized:
                hollow_file(file, plan_weights(stored(folder, component), DEFAULT_KEEP).specs())
            weights[component.name] = device_bytes(stored(folder, component), fast=True)
    return weights


@pytest.mark.parametrize("page", ["README.md", "docs/memory-modes.md"])
def test_the_tables_of_cards_are_what_auto_takes_at_full_size(page: str, full_size_weights: dict[str, int]) -> None:
    rows = re.findall(r"^\| ([\d.]+) GiB[^|]* \| `(\w+)` \|", read(page), re.MULTILINE)
    assert [mode for _, mode in rows] == ["resident", "offload", "stream"]
    room = working_bytes(1024**2, fast=True)
    for free, mode in rows:
        least = (mode_bytes(full_size_weights)[mode] + room) / GIB
        assert least <= float(free) < least + 0.1
        chosen, _ = choose_memory(
            "auto",
            torch.device("cuda", 0),
            weight_bytes=full_size_weights,
            free_bytes=int(float(free) * GIB),
            working_bytes=room,
        )
        assert chosen == mode


def test_host_memory_is_that_of_the_weights(full_size_weights: dict[str, int]) -> None:
    total, enhancer = sum(full_size_weights.values()) / GIB, full_size_weights["pe"] / GIB
    assert README.count(f"| {total:.1f} GiB, pinned |") == 2
    assert f"saves {enhancer:.1f} GiB in `resident`" in README
    modes = " ".join(read("docs/memory-modes.md").split())
    assert f"that is {total:.1f} GiB, or {total - enhancer:.1f} GiB with `prompt_enhancer=False`" in modes
