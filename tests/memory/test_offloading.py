"""Components that wait in host memory: the same pictures, one component at a time on the device, nothing copied back.

Host and device may be the same memory: on a CPU the blocks, turns and hooks are tested, on a GPU the copies as well.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ernie_image_nf4 import load
from ernie_image_nf4.fast.module_tensors import tensors_of
from ernie_image_nf4.fast.transformer import enable_fast_denoising
from ernie_image_nf4.memory import tensor_arena as weight_blocks
from ernie_image_nf4.memory.host_embeddings import enable_host_embeddings, unused_modules
from ernie_image_nf4.memory.offload import StreamedBlocks, enable_offload, free_device
from ernie_image_nf4.memory.tensor_arena import host_weights
from ernie_image_nf4.repository.components import COMPONENT


def draw(pipe, size: int = 32) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(0)
    return np.asarray(
        pipe("a cat", height=size, width=size, num_inference_steps=2, generator=generator, use_pe=False).images[0]
    )


def snapshot(module: torch.nn.Module) -> list[torch.Tensor]:
    return [getattr(owner, name).clone() for owner, name in tensors_of(module)]


def test_every_tensor_is_found_once_with_its_quantization_state(repository: Path):
    pe = load(repository, device="cpu").pe
    tensors = [getattr(owner, name) for owner, name in tensors_of(pe)]
    stored = [tensor for name, tensor in pe.state_dict().items() if "bitsandbytes__" not in name]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    # The tied output embedding is one tensor here and two in the state dict; buffers that aren't saved are here alone.
    saved = {tensor.data_ptr() for tensor in stored if tensor.numel() > 256}
    assert saved <= {tensor.data_ptr() for tensor in tensors}


@pytest.mark.parametrize("block", [256, 10_000, 1 << 27])
def test_moving_to_blocks_and_back_changes_no_tensor(repository: Path, monkeypatch: pytest.MonkeyPatch, block: int):
    monkeypatch.setattr(weight_blocks, "BLOCK_BYTES", block)
    module = load(repository, device="cpu").transformer
    before = snapshot(module)
    weights = host_weights(module, torch.device("cpu"))
    for change in (lambda: None, lambda: weights.bring(None), weights.leave, lambda: weights.bring(None)):
        change()
        assert all(torch.equal(a, b) for a, b in zip(before, snapshot(module), strict=True))
    parameter = module.layers[0].mlp.gate_proj.weight
    assert parameter.data_ptr() in range(
        min(block.data_ptr() for block in weights.on_device),
        max(block.data_ptr() + len(block) for block in weights.on_device),
    )


def test_components_take_turns_and_draw_the_same(repository: Path):
    pipe = load(repository, device="cpu")
    expected = draw(pipe)
    enable_offload(pipe, torch.device("cpu"))
    hooks = {name: getattr(pipe, name)._hf_hook for name in ("pe", "text_encoder", "transformer", "vae")}
    for _ in range(2):
        assert np.array_equal(draw(pipe), expected)
        assert hooks["vae"].turns.current is hooks["vae"]
        assert [name for name, hook in hooks.items() if hook.weights.on_device] == ["vae"]


def test_the_next_component_is_fetched_ahead_only_if_both_fit(repository: Path):
    pipe = load(repository, device="cpu")
    enable_offload(pipe, torch.device("cpu"))
    encoder, transformer = pipe.text_encoder._hf_hook, pipe.transformer._hf_hook
    encoder.turns.limit = encoder.weights.bytes + transformer.weights.bytes
    pipe.encode_prompt("a cat", torch.device("cpu"))
    assert transformer.weights.on_device
    transformer.weights.leave()
    encoder.turns.current, encoder.turns.limit = None, encoder.turns.limit - 1
    pipe.encode_prompt("a cat", torch.device("cpu"))
    assert not transformer.weights.on_device


def test_streamed_blocks_come_one_ahead_and_draw_the_same(repository: Path):
    pipe = load(repository, device="cpu")
    expected = draw(pipe)
    whole = sum(part.nbytes for part in snapshot(pipe.transformer))
    enable_offload(pipe, torch.device("cpu"), stream_blocks=True)
    blocks = pipe.transformer.layers
    assert isinstance(blocks, StreamedBlocks)
    assert pipe.transformer._hf_hook.weights.bytes + sum(part.bytes for part in blocks.weights[2:]) < whole
    there = []
    for block in list(blocks._modules.values()):
        block.register_forward_pre_hook(
            lambda *_: there.append([number for number, part in enumerate(blocks.weights) if part.on_device])
        )
    assert np.array_equal(draw(pipe), expected)
    count = len(blocks.weights)
    steps = [sorted({number, (number + 1) % count}) for number in range(count)]
    assert there == steps * 2
    assert not any(part.on_device for part in blocks.weights)  # they have left with the transformer


def test_a_streamed_transformer_saves_and_lists_its_blocks_as_before(repository: Path, tmp_path: Path):
    transformer = load(repository, device="cpu").transformer
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    pipe = load(repository, device="cpu")
    enable_offload(pipe, torch.device("cpu"), stream_blocks=True)
    assert len(pipe.transformer.layers) == len(transformer.layers)
    after = pipe.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_modules_left_out_stay_where_they_are(repository: Path):
    encoder = load(repository, device="cpu").text_encoder
    unused = unused_modules(encoder, COMPONENT["text_encoder"].unused)
    assert {type(part).__name__ for part in unused} >= {"PixtralVisionModel", "Embedding"}
    kept = {id(owner) for part in unused for owner, _ in tensors_of(part)}
    found = {id(owner) for owner, _ in tensors_of(encoder, unused)}
    assert kept
    assert found
    assert not kept & found
    assert kept | found == {id(owner) for owner, _ in tensors_of(encoder)}


def test_the_text_encoder_is_where_its_layers_are(repository: Path):
    encoder = load(repository, device="cpu").text_encoder
    ids = torch.tensor([[1, 5, 7]])
    expected = encoder(ids).last_hidden_state
    names = list(encoder.state_dict())
    enable_host_embeddings(encoder, COMPONENT["text_encoder"].unused)
    first = next(name for name, _ in encoder.named_parameters())
    assert first.startswith("language_model.layers.0.")
    assert sorted(encoder.state_dict()) == sorted(names)
    assert torch.equal(encoder(ids).last_hidden_state, expected)


@pytest.mark.gpu
def test_on_a_gpu_only_one_component_is_there_and_the_picture_is_the_same(repository: Path):
    expected = draw(load(repository, device="cuda", memory="resident"))
    pipe = load(repository, device="cuda", memory="offload")
    assert np.array_equal(draw(pipe), expected)
    assert pipe.transformer.layers[0].mlp.gate_proj.weight.device.type == "cpu"
    assert pipe.transformer._hf_hook.weights.host[0].is_pinned()
    assert pipe._execution_device.type == "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("fast", [True, False])
def test_on_a_gpu_a_streamed_transformer_draws_the_same(repository: Path, fast: bool):
    expected = draw(load(repository, device="cuda", memory="resident", fast=fast))
    pipe = load(repository, device="cuda", memory="stream", fast=fast)
    for _ in range(2):
        assert np.array_equal(draw(pipe), expected)
    assert {tensor.device.type for tensor in pipe.transformer.parameters()} == {"cpu"}


@pytest.mark.gpu
def test_what_text_to_image_never_uses_stays_off_the_gpu(repository: Path):
    pipe = load(repository, device="cuda", memory="resident")
    unused = unused_modules(pipe.text_encoder, COMPONENT["text_encoder"].unused)
    assert {tensor.device.type for part in unused for tensor in part.parameters()} == {"cpu"}
    assert pipe.text_encoder.device.type == pipe.device.type == "cuda"


def add_lora(transformer: torch.nn.Module) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    transformer.add_adapter(config)


@pytest.mark.parametrize("stream_blocks", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_adapters_loaded_into_offloaded_components_come_along(repository: Path, device: str, stream_blocks: bool):
    expected = load(repository, device=device, dtype="float32", memory="resident")
    pipe = load(repository, device="cpu", dtype="float32")
    if device == "cuda":
        enable_fast_denoising(pipe.transformer)
    enable_offload(pipe, torch.device(device), stream_blocks=stream_blocks)
    before = draw(pipe)
    for each in (expected, pipe):
        add_lora(each.transformer)
    after = draw(pipe)
    assert not np.array_equal(after, before)
    assert np.array_equal(after, draw(expected))


def test_a_component_that_found_no_room_is_brought_again(repository: Path, monkeypatch: pytest.MonkeyPatch):
    pipe = load(repository, device="cpu")
    expected = draw(pipe)
    enable_offload(pipe, torch.device("cpu"))
    weights = pipe.transformer._hf_hook.weights
    monkeypatch.setattr(weights, "bring", lambda stream: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        draw(pipe)
    assert pipe.transformer._hf_hook.turns.current is None
    monkeypatch.undo()
    assert np.array_equal(draw(pipe), expected)
    free_device(pipe)
    assert not any(
        getattr(pipe, name)._hf_hook.weights.on_device for name in ("pe", "text_encoder", "transformer", "vae")
    )
