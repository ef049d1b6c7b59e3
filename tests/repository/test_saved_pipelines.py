"""Folders that `save_pretrained` writes in other ways than `load` expects: what they are, and what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import stored

from ernie_image_nf4 import load, quantize, verify
from ernie_image_nf4.errors import InvalidRepository
from ernie_image_nf4.repository.components import COMPONENTS
from ernie_image_nf4.repository.record import open_repository

WITH_WEIGHTS = [component for component in COMPONENTS if component.weights]


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(InvalidRepository, match=message):
        load(folder, device="cpu")
    assert not all(report.ok for report in verify(folder))


# A LoRA


@pytest.fixture(scope="module")
def lora(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the transformer, as diffusers saves one."""
    peft = pytest.importorskip("peft")
    pipe = load(repository, device="cpu", prompt_enhancer=False)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    folder = tmp_path_factory.mktemp("lora")
    layers = peft.get_peft_model_state_dict(pipe.transformer)
    diffusers.ErnieImagePipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    return folder


def save_with(source: Path, lora: Path, folder: Path, *before: str) -> Path:
    """Load a repository and the LoRA, call some of the pipeline's methods, and save it, as diffusers alone does."""
    pipe = load(source, device="cpu")
    for method in ("load_lora_weights", *before):
        getattr(diffusers.ErnieImagePipeline, method)(pipe, *([lora] if method == "load_lora_weights" else []))
    diffusers.ErnieImagePipeline.save_pretrained(pipe, folder)
    return folder


@pytest.mark.parametrize("kind", ["original", "repository"])
def test_saved_with_a_lora_loaded(request, lora, tmp_path, kind):
    folder = save_with(request.getfixturevalue(kind), lora, tmp_path / "saved")
    message = (
        r"transformer/diffusion_pytorch_model\.safetensors was saved with a LoRA loaded \(.*\.to_q\.base_layer\.weight"
        r".*pipe\.unload_lora_weights\(\).*pipe\.fuse_lora\(\).*load_lora after load"
    )
    refuse(folder, message)
    with pytest.raises(InvalidRepository, match=message):
        quantize(folder, tmp_path / "nf4", device="cpu", progress=False)


@pytest.mark.parametrize("before", [("unload_lora_weights",), ("fuse_lora", "unload_lora_weights")], ids=str)
def test_saved_as_that_line_says(original, lora, tmp_path, before):
    folder = save_with(original, lora, tmp_path / "saved", *before)
    weights = load(folder, device="cpu").transformer.state_dict()
    before_saving = load(original, device="cpu").transformer.state_dict()
    same = all(torch.equal(weights[key], tensor) for key, tensor in before_saving.items())
    assert same == ("fuse_lora" not in before)


# Variants


def rename_variant(folder: Path) -> None:
    """Do what the line says, for all components."""
    for path in folder.glob("*/*fp16*"):
        if "-of-" not in path.name:  # an index names its shards
            path.rename(path.with_name(path.name.replace(".fp16", "")))


@pytest.fixture(scope="module")
def variant(pipe: diffusers.ErnieImagePipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variant") / "saved"
    pipe.save_pretrained(folder, variant="fp16")
    return folder


def test_saved_as_a_variant(variant, tmp_path):
    folder = Path(shutil.copytree(variant, tmp_path / "copy"))
    refuse(
        folder,
        r"transformer/diffusion_pytorch_model\.fp16\.safetensors was saved with variant='fp16', .* "
        r"rename the file to diffusion_pytorch_model\.safetensors, in a folder of your own, or save again",
    )
    rename_variant(folder)
    load(folder, device="cpu")


@pytest.mark.parametrize("component", WITH_WEIGHTS, ids=lambda component: component.name)
def test_a_variant_in_one_component(copy, component):
    weights = copy / component.name / component.weights
    moved = weights.rename(weights.with_suffix(".bf16.safetensors"))
    refuse(copy, f"{moved} was saved with variant='bf16'")


def test_a_variant_in_shards(original, tmp_path):
    """Its index has sizes as large as models are."""
    pipe = load(original, device="cpu")
    pipe.save_pretrained(tmp_path / "saved", variant="fp16", max_shard_size="100KB")
    index = tmp_path / "saved" / "transformer" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(index.read_text().replace('"total_size": ', '"total_size": 1000000'))
    refuse(
        tmp_path / "saved",
        r"index\.fp16\.json was saved with variant='fp16', .* rename the file to .*safetensors\.index\.json,",
    )
    rename_variant(tmp_path / "saved")
    load(tmp_path / "saved", device="cpu")


def test_a_variant_beside_the_weights_is_left_alone(copy):
    for component in WITH_WEIGHTS:
        weights = copy / component.name / component.weights
        shutil.copy(weights, weights.with_suffix(".fp16.safetensors"))
    opened = open_repository(copy)
    assert [part.files for part in opened.components.values() if part.component.weights] == [
        stored(copy, component).files for component in WITH_WEIGHTS
    ]
    load(copy, device="cpu")
