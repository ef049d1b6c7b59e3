"""Offloaded parts own their weights: deleting one frees them at once, and a copy computes with its own."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from diffusers import ErnieImagePipeline
from torch import nn

from ernie_image_nf4 import load
from ernie_image_nf4.fast.module_tensors import tensors_of
from ernie_image_nf4.memory.host_embeddings import HostEmbedding, enable_host_embeddings, unused_modules
from ernie_image_nf4.memory.offload import OffloadHook, enable_offload
from ernie_image_nf4.repository.components import COMPONENT
from ernie_image_nf4.upstream.offloading import hook_of

CPU = torch.device("cpu")
NAMES = ("pe", "text_encoder", "transformer", "vae")
COPIES = [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]


@pytest.fixture
def no_garbage_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def offloaded(repository: Path, memory: str) -> ErnieImagePipeline:
    pipe = load(repository, device="cpu", dtype="float32")
    for name in NAMES:
        for module in getattr(pipe, name).modules():
            weight = getattr(module, "weight", None)
            if getattr(weight, "module", None) is module:
                weight.module = None  # bitsandbytes' own cycle between a layer and its weight
    enable_offload(pipe, CPU, stream_blocks=memory == "stream")
    pipe.set_progress_bar_config(disable=True)
    pipe("a cat", height=32, width=32, num_inference_steps=2, use_pe=False)
    for layer in pipe.text_encoder.language_model.layers:
        vars(layer).pop("forward", None)  # transformers 5.0 leaves the method there, a cycle of its own
    return pipe


def weights_of(module: nn.Module) -> list[weakref.ReferenceType]:
    """Of all that holds a component's memory: tensors, arenas, and blocks in host and device memory."""
    weights = hook_of(module).weights
    arenas = [weights.arena, *(weights.streamed.arenas if weights.streamed else ())]
    held = [*module.parameters(), *module.buffers(), *arenas]
    for arena in arenas:
        held += [*(block.memory for block in arena.host_blocks), *arena.device_blocks]
    return [weakref.ref(each) for each in held]


def alive(references: list[weakref.ReferenceType]) -> int:
    return sum(reference() is not None for reference in references)


@pytest.mark.parametrize("memory", ["offload", "stream"])
def test_a_deleted_pipeline_frees_all_weights(repository: Path, no_garbage_collector: None, memory: str):
    pipe = offloaded(repository, memory)
    references = {name: weights_of(getattr(pipe, name)) for name in NAMES}
    assert hook_of(pipe.vae).weights.arena.device_blocks
    assert all(alive(each) == len(each) for each in references.values())
    del pipe
    assert {name: alive(each) for name, each in references.items()} == dict.fromkeys(NAMES, 0)


@pytest.mark.parametrize("name", ["transformer", "vae"])  # prefetched by another one, and on the device
def test_a_deleted_component_frees_its_weights(repository: Path, no_garbage_collector: None, name: str):
    pipe = offloaded(repository, "offload")
    references = weights_of(getattr(pipe, name))
    setattr(pipe, name, None)
    assert alive(references) == 0
    pipe.encode_prompt("a cat", CPU)  # neither offloads nor prefetches what is gone


def test_a_deleted_text_encoder_frees_what_was_never_offloaded(repository: Path, no_garbage_collector: None):
    pipe = load(repository, device="cpu")
    excluded = unused_modules(pipe.text_encoder, COMPONENT["text_encoder"].unused)
    enable_offload(pipe, CPU, excluded=excluded)
    table = weakref.ref(pipe.text_encoder.get_input_embeddings().weight)
    del excluded
    assert table() is not None
    pipe.text_encoder = None
    assert table() is None


def predict(transformer: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    config = transformer.config
    with torch.no_grad():
        return transformer(
            torch.randn(1, config.in_channels, 4, 4, generator=generator),
            torch.tensor([500.0]),
            torch.randn(1, 3, config.text_in_dim, generator=generator),
            torch.tensor([3]),
            return_dict=False,
        )[0]


@pytest.mark.parametrize("memory", ["offload", "stream"])
@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle"])
def test_a_copy_of_an_offloaded_transformer_is_a_plain_one_with_its_own_weights(
    repository: Path, memory: str, copied: Callable[[nn.Module], nn.Module]
):
    transformer = offloaded(repository, memory).transformer
    expected = predict(transformer)
    hook = hook_of(transformer)
    assert hook.weights.arena.device_blocks
    twin = copied(transformer)
    assert not hook.weights.arena.device_blocks  # copied from host memory
    assert not isinstance(hook_of(twin), OffloadHook)
    assert torch.equal(predict(twin), expected)
    addresses = {tensor.data_ptr() for tensor in tensors(transformer)}
    for tensor in tensors(twin):
        assert tensor.data_ptr() not in addresses
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        tensor.zero_()
    assert not torch.equal(predict(twin), expected)
    assert torch.equal(predict(transformer), expected)


def tensors(module: nn.Module) -> list[torch.Tensor]:
    return [getattr(owner, name) for owner, name in tensors_of(module)]


def test_hooks_of_a_copy_can_be_removed_as_those_of_the_original(repository: Path):
    transformer = offloaded(repository, "offload").transformer
    twin = copy.deepcopy(transformer)
    remove_hook_from_module(twin, recurse=True)
    assert hook_of(twin) is None
    assert isinstance(hook_of(transformer), OffloadHook)
    assert torch.equal(predict(twin), predict(transformer))


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle"])
def test_a_copy_of_a_host_embedding_looks_up_its_own_rows(
    repository: Path, no_garbage_collector: None, copied: Callable[[nn.Module], nn.Module]
):
    encoder = load(repository, device="cpu", dtype="float32").text_encoder
    enable_host_embeddings(encoder, COMPONENT["text_encoder"].unused)
    table, ids = encoder.get_input_embeddings(), torch.tensor([[1, 5]])
    twin = copied(table)
    assert type(twin) is HostEmbedding
    assert torch.equal(twin(ids), table(ids))
    twin.weight.data.zero_()
    assert not twin(ids).any()
    assert table(ids).any()
    reference = weakref.ref(twin.weight)
    del twin
    assert reference() is None


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["offload", "stream"])
def test_on_a_gpu_copies_are_in_host_memory(repository: Path, memory: str):
    pipe = load(repository, device="cuda", memory=memory)
    pipe.set_progress_bar_config(disable=True)
    pipe("a cat", height=32, width=32, num_inference_steps=2)
    for name in NAMES:
        twin = copy.deepcopy(getattr(pipe, name))
        assert {tensor.device.type for tensor in tensors(twin)} == {"cpu"}, name
    pipe("a cat", height=32, width=32, num_inference_steps=2)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["resident", "offload", "stream"])
def test_on_a_gpu_a_deleted_pipeline_frees_all_weights(repository: Path, no_garbage_collector: None, memory: str):
    pipe = load(repository, device="cuda", memory=memory)
    pipe.set_progress_bar_config(disable=True)
    pipe("a cat", height=32, width=32, num_inference_steps=3)
    if memory == "resident":
        references = {name: [weakref.ref(weight) for weight in getattr(pipe, name).parameters()] for name in NAMES}
    else:
        references = {name: weights_of(getattr(pipe, name)) for name in NAMES}
    del pipe
    assert {name: alive(each) for name, each in references.items()} == dict.fromkeys(NAMES, 0)
