"""NF4 weights put into models directly: the same models as upstream's loading gives, with less of its Python."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bitsandbytes
import pytest
import torch

from ernie_image_nf4.loading import assembly as nf4_loading
from ernie_image_nf4.loading.assembly import direct_loading, mapped_files
from ernie_image_nf4.loading.device_reader import MAPS, mappings_of
from ernie_image_nf4.loading.pipeline import _diffusers_nf4_on, load_component
from ernie_image_nf4.memory.placement import Placement
from ernie_image_nf4.repository.components import COMPONENT, QUANTIZED, Component
from ernie_image_nf4.repository.resolve import weight_files
from ernie_image_nf4.repository.safetensors_io import StoredTensor, TensorSpec

CPU = torch.device("cpu")
components = pytest.mark.parametrize("component", QUANTIZED, ids=lambda part: part.name)


def loaded(folder: Path, component: Component, *, fast: bool, check: bool = True) -> torch.nn.Module:
    with _diffusers_nf4_on(CPU):
        return load_component(folder, component, Placement(CPU, torch.bfloat16, "resident", fast), check=check)


def layers(model: torch.nn.Module) -> dict[str, bitsandbytes.nn.Linear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}


def assert_equal(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Configuration, attributes and weights."""
    assert dict(one.config.to_dict() if hasattr(one.config, "to_dict") else one.config) == dict(
        other.config.to_dict() if hasattr(other.config, "to_dict") else other.config
    )
    assert vars(one).keys() == vars(other).keys()
    assert_equal_weights(one, other)


def assert_equal_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """State, quantization state and the marks that both libraries leave."""
    ours, upstreams = one.state_dict(), other.state_dict()
    assert ours.keys() == upstreams.keys()
    assert all(torch.equal(ours[key], upstreams[key]) and ours[key].dtype == upstreams[key].dtype for key in ours)
    for name, buffer in one.named_buffers():
        assert torch.equal(buffer, other.get_buffer(name))
    for name, layer in layers(one).items():
        weight, expected = layer.weight, layers(other)[name].weight
        assert vars(layer).keys() == vars(layers(other)[name]).keys()
        assert vars(weight).keys() == vars(expected).keys()
        assert (layer.quant_state is weight.quant_state) == (layers(other)[name].quant_state is expected.quant_state)
        assert (weight.shape, weight.requires_grad) == (expected.shape, expected.requires_grad)
        state, expected_state = weight.quant_state, expected.quant_state
        assert (state.shape, state.dtype, state.blocksize) == (
            expected_state.shape,
            expected_state.dtype,
            expected_state.blocksize,
        )
        assert torch.equal(
            bitsandbytes.functional.dequantize_4bit(weight.data, state),
            bitsandbytes.functional.dequantize_4bit(expected.data, expected_state),
        )


@components
@pytest.mark.parametrize("check", [True, False])
def test_the_model_is_upstreams(repository, component, check):
    assert_equal(loaded(repository, component, fast=True, check=check), loaded(repository, component, fast=False))


@components
def test_upstream_gets_no_nf4_weight_and_all_others(repository, component, monkeypatch):
    module, name = nf4_loading.LOADERS[component.library]
    upstream, seen = getattr(module, name), set()

    def noted(model, state_dict, *args, **kwargs):
        seen.update(state_dict)
        return upstream(model, state_dict, *args, **kwargs)

    monkeypatch.setattr(module, name, noted)
    model = loaded(repository, component, fast=True)
    assert seen
    assert not any("absmax" in name or "quant_state" in name for name in seen)
    assert getattr(module, name) is noted  # put back
    if MAPS.exists():  # where the device's copy is found by address
        (file,) = weight_files(repository, component)
        ranges = [each for each, _ in mappings_of(file)]
        for layer in layers(model).values():
            assert any(layer.weight.data_ptr() in each for each in ranges)


@components
def test_it_can_be_saved_and_loaded_again_in_several_files(repository, component, tmp_path):
    folder = tmp_path / component.name
    loaded(repository, component, fast=True).save_pretrained(folder, max_shard_size="40KB")
    assert len(weight_files(tmp_path, component)) > 1
    shutil.copy(repository / "model_index.json", tmp_path)
    # Not with upstream's loading of these files: of a weight that is split among two, diffusers makes nothing.
    assert_equal_weights(loaded(tmp_path, component, fast=True), loaded(repository, component, fast=False))


@components
def test_without_the_function_of_upstream_it_loads_everything_itself(repository, component, monkeypatch):
    module, _ = nf4_loading.LOADERS[component.library]
    monkeypatch.setitem(nf4_loading.LOADERS, component.library, (module, "a_function_of_another_version"))
    monkeypatch.setattr(nf4_loading, "put_into", None)
    assert_equal(loaded(repository, component, fast=True), loaded(repository, component, fast=False))


def test_what_another_thread_loads_meanwhile_is_upstreams(repository, monkeypatch):
    module, name = nf4_loading.LOADERS["diffusers"]
    monkeypatch.setattr(module, name, lambda model, state_dict: ("upstream", sorted(state_dict)))
    weight = nf4_loading.NF4Weight(
        "a.weight", "a.weight", {"": StoredTensor(Path("none"), 0, TensorSpec("U8", (1,)))}, {}
    )
    with direct_loading("diffusers", [weight]), ThreadPoolExecutor(1) as pool:
        result = pool.submit(getattr(module, name), None, {"a.weight": 0, "b": 1}).result()
    assert result == ("upstream", ["a.weight", "b"])


def test_a_tensor_at_an_odd_place_is_copied(tmp_path):
    file, values = tmp_path / "weights", torch.randn(5)
    file.write_bytes(b"odd" + values.numpy().tobytes())
    view = mapped_files()
    assert torch.equal(view(StoredTensor(file, 3, TensorSpec("F32", (5,)))), values)
    assert view(StoredTensor(file, 1, TensorSpec("U8", (2,)))).tolist() == list(b"dd")


def test_the_files_stay_as_they_are(copy):
    component = COMPONENT["pe"]
    (file,) = weight_files(copy, component)
    before = file.read_bytes()
    for layer in layers(loaded(copy, component, fast=True)).values():
        layer.weight.data.zero_()
    assert file.read_bytes() == before
