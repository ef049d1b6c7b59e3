"""The synthetic repository: the published architecture and byte counts, random weights."""

from __future__ import annotations

import filecmp
import shutil
from importlib.resources import as_file, files
from pathlib import Path

import pytest
import torch
from conftest import skeleton, stored, weight_files
from diffusers import ErnieImagePipeline
from full_size import hollow_file
from safetensors.torch import load_file

from ernie_image_nf4 import load
from ernie_image_nf4.errors import InvalidSettings
from ernie_image_nf4.generation.single import draw_and_save
from ernie_image_nf4.quantization import synthetic
from ernie_image_nf4.quantization.convert import quantize
from ernie_image_nf4.quantization.layer_selection import plan_weights
from ernie_image_nf4.quantization.synthetic import synthesize, tensor_specs
from ernie_image_nf4.repository.components import COMPONENT, COMPONENTS, QUANTIZED, Component
from ernie_image_nf4.repository.metadata import Recommended, read_metadata
from ernie_image_nf4.repository.safetensors_io import file_bytes

# Published byte counts of the weight files: baidu/ERNIE-Image in bfloat16, and its NF4 release.
ORIGINAL_BYTES = {"transformer": 16067025160, "text_encoder": 7698241104, "pe": 7663346520}
NF4_BYTES = {"transformer": 4146045428, "text_encoder": 2585177824, "pe": 2367115496}


@pytest.mark.parametrize("component", QUANTIZED, ids=lambda component: component.name)
def test_full_size_has_the_published_byte_counts(component: Component, tmp_path: Path) -> None:
    with as_file(files("ernie_image_nf4") / "quantization" / "configs" / "full") as configs:
        shutil.copytree(configs, tmp_path, dirs_exist_ok=True)
    model = skeleton(component, tmp_path / component.name)
    assert file_bytes(tensor_specs(model, duplicate_lm_head=True)) == pytest.approx(
        ORIGINAL_BYTES[component.name], abs=2000
    )
    hollow_file(tmp_path / component.name / component.weights, tensor_specs(model, duplicate_lm_head=False))
    plan = plan_weights(stored(tmp_path, component))
    # Up to 5 digits fewer in the settings of each of some 250 weights.
    assert file_bytes(plan.specs()) == pytest.approx(NF4_BYTES[component.name], abs=2000)


def test_the_same_seed_gives_the_same_files(original: Path, tmp_path: Path) -> None:
    again = synthesize(tmp_path / original.name, preset="tiny", progress=False)
    other = synthesize(tmp_path / "other", preset="tiny", seed=1, progress=False)
    for component in COMPONENTS:
        for file in (original / component.name).iterdir():
            assert filecmp.cmp(file, again / component.name / file.name, shallow=False), file
        for file in weight_files(original, component):
            assert not filecmp.cmp(file, other / component.name / file.name, shallow=False), file


def test_it_is_a_pipeline_of_the_release(original: Path) -> None:
    pipe = ErnieImagePipeline.from_pretrained(original, torch_dtype=torch.float32)
    assert {name: type(part).__name__ for name, part in pipe.components.items()} == {
        component.name: component.class_name for component in COMPONENTS
    }
    weight = load_file(original / "text_encoder" / "model.safetensors")[
        "language_model.model.layers.0.mlp.up_proj.weight"
    ]
    assert weight.dtype == torch.bfloat16
    assert weight.float().std() == pytest.approx(0.02, rel=0.05)


def test_weights_are_sharded_and_the_head_stored_twice_as_in_the_release(original: Path) -> None:
    shards = weight_files(original, COMPONENT["transformer"])
    assert [file.name for file in shards] == [
        f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)
    ]
    weights = load_file(original / "pe" / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_neither_is_done_on_request(tmp_path: Path) -> None:
    folder = synthesize(tmp_path / "plain", preset="tiny", shards=False, duplicate_lm_head=False, progress=False)
    assert [file.name for file in weight_files(folder, COMPONENT["transformer"])] == [
        "diffusion_pytorch_model.safetensors"
    ]
    assert "lm_head.weight" not in load_file(folder / "pe" / "model.safetensors")


def test_turbo_is_of_full_size_and_known_for_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert synthetic.SIZES["turbo"] == "full"
    monkeypatch.setitem(synthetic.SIZES, "turbo", "tiny")  # the full one takes 31.6 GB
    turbo = synthesize(tmp_path / "ERNIE-Turbo", preset="turbo", progress=False)
    assert "`baidu/ERNIE-Image-Turbo`" in (turbo / "README.md").read_text()
    made = quantize(turbo, tmp_path / "ERNIE-Turbo-NF4", device="cpu", progress=False)
    assert read_metadata(made).recommended == Recommended(1024, 1024, num_inference_steps=8, guidance_scale=1.0)
    pipe = load(made, device="cpu", dtype="float32")
    paths = [tmp_path / "one.png"]
    ((drawing, _),) = draw_and_save(pipe, paths, "a cat", height=32, width=32, seed=0)
    assert (drawing.settings.num_inference_steps, drawing.settings.guidance_scale) == (8, 1.0)


def test_an_unknown_preset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="choose one of full, turbo, tiny"):
        synthesize(tmp_path / "new", preset="medium")


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(InvalidSettings, match="exists already: name a new folder"):
        synthesize(tmp_path, preset="tiny")
