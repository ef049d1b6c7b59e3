"""Offloaded components: the same pictures, one component at a time on the device, nothing copied back.

Host and device may be the same memory: on a CPU the arenas, the scheduler and the hooks are tested, on a GPU the
copies as well.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ernie_image_nf4 import load
from ernie_image_nf4.fast.module_tensors import tensors_of
from ernie_image_nf4.memory import tensor_arena
from ernie_image_nf4.memory.apply import memory_mode
from ernie_image_nf4.memory.host_embeddings import enable_host_embeddings, unused_modules
from ernie_image_nf4.memory.offload import OffloadHook, StreamedBlocks, enable_offload, offload_all
from ernie_image_nf4.memory.tensor_arena import host_arenas
from ernie_image_nf4.repository.components import COMPONENT
from ernie_image_nf4.upstream.offloading import hook_of

CPU = torch.device("cpu")
NAMES = ("pe", "text_encoder", "transformer", "vae")


def draw(pipe, size: int = 32) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(0)
    return np.asarray(
        pipe("a cat", height=size, width=size, num_inference_steps=2, generator=generator, use_pe=False).images[0]
    )


def hooks_of(pipe) -> dict[str, OffloadHook]:
    return {name: hook_of(getattr(pipe, name)) for name in NAMES}


def on_device(pipe) -> list[str]:
    return [name for name, hook in hooks_of(pipe).items() if hook.weights.arena.device_blocks]


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
def test_moving_to_an_arena_onload_and_offload_change_no_tensor(
    repository: Path, monkeypatch: pytest.MonkeyPatch, block: int
):
    monkeypatch.setattr(tensor_arena, "BLOCK_BYTES", block)
    module = load(repository, device="cpu").transformer
    before = snapshot(module)
    (arena,) = host_arenas([(module, ())], CPU)
    for change in (lambda: None, lambda: arena.onload(None), arena.offload, lambda: arena.onload(None)):
        change()
        assert all(torch.equal(a, b) for a, b in zip(before, snapshot(module), strict=True))
    parameter = module.layers[0].mlp.gate_proj.weight
    assert parameter.data_ptr() in range(
        min(block.data_ptr() for block in arena.device_blocks),
        max(block.data_ptr() + len(block) for block in arena.device_blocks),
    )


def test_components_are_on_the_device_in_turn_and_draw_the_same(repository: Path):
    pipe = load(repository, device="cpu")
    expected = draw(pipe)
    enable_offload(pipe, CPU)
    weights = hook_of(pipe.vae).weights
    for _ in range(2):
        assert np.array_equal(draw(pipe), expected)
        assert hook_of(pipe.vae).scheduler.resident is weights
        assert on_device(pipe) == ["vae"]


def test_the_next_component_is_prefetched_only_if_both_fit(repository: Path):
    pipe = load(repository, device="cpu")
    enable_offload(pipe, CPU)
    encoder, transformer = hook_of(pipe.text_encoder), hook_of(pipe.transformer)
    encoder.scheduler.limit = encoder.weights.arena.bytes + transformer.weights.arena.bytes
    pipe.encode_prompt("a cat", CPU)
    assert on_device(pipe) == ["text_encoder", "transformer"]
    offload_all(pipe)
    assert on_device(pipe) == []
    encoder.scheduler.limit -= 1
    pipe.encode_prompt("a cat", CPU)
    assert on_device(pipe) == ["text_encoder"]


def test_a_prefetched_component_that_is_not_called_makes_room_for_another(repository: Path):
    """As after a call for latents: the VAE is on its way, and the next call begins with the text encoder."""
    pipe = load(repository, device="cpu")
    expected = draw(pipe)
    enable_offload(pipe, CPU, stream_blocks=True)
    scheduler = hook_of(pipe.vae).scheduler
    scheduler.limit = 1 << 30
    options = {"height": 32, "width": 32, "num_inference_steps": 1, "use_pe": False}
    pipe("a cat", output_type="latent", **options)
    assert on_device(pipe) == ["transformer", "vae"]
    scheduler.limit = 0
    pipe.encode_prompt("a dog", CPU)
    assert on_device(pipe) == ["text_encoder"]
    assert np.array_equal(draw(pipe), expected)


def test_streamed_blocks_are_onloaded_one_ahead_and_draw_the_same(repository: Path):
    pipe = load(repository, device="cpu")
    expected = draw(pipe)
    whole = sum(part.nbytes for part in snapshot(pipe.transformer))
    enable_offload(pipe, CPU, stream_blocks=True)
    blocks = pipe.transformer.layers
    assert isinstance(blocks, StreamedBlocks)
    arenas = blocks.runtime.arenas
    assert hook_of(pipe.transformer).weights.arena.bytes + sum(arena.bytes for arena in arenas[2:]) < whole
    there = []
    for block in blocks.children():
        block.register_forward_pre_hook(
            lambda *_: there.append([number for number, arena in enumerate(arenas) if arena.device_blocks])
        )
    assert np.array_equal(draw(pipe), expected)
    steps = [sorted({number, (number + 1) % len(arenas)}) for number in range(len(arenas))]
    assert there == steps * 2
    assert not any(arena.device_blocks for arena in arenas)  # offloaded with the transformer


def test_a_streamed_transformer_saves_and_lists_its_blocks_as_before(repository: Path, tmp_path: Path):
    transformer = load(repository, device="cpu").transformer
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    pipe = load(repository, device="cpu")
    enable_offload(pipe, CPU, stream_blocks=True)
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


@pytest.mark.parametrize("memory", ["offload", "stream"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_adapters_loaded_into_offloaded_components_are_onloaded_with_them(repository: Path, device: str, memory: str):
    expected = load(repository, device=device, dtype="float32", memory="resident")
    if device == "cpu":
        pipe = load(repository, device="cpu", dtype="float32")
        enable_offload(pipe, CPU, stream_blocks=memory == "stream")
    else:
        pipe = load(repository, device=device, dtype="float32", memory=memory)
    before = draw(pipe)
    for each in (expected, pipe):
        add_lora(each.transformer)
    after = draw(pipe)
    assert not np.array_equal(after, before)
    assert np.array_equal(after, draw(expected))


@pytest.mark.parametrize("stream_blocks", [False, True])
def test_what_came_after_offloading_is_an_adapter(repository: Path, stream_blocks: bool):
    pipe = load(repository, device="cpu", dtype="float32")
    enable_offload(pipe, CPU, stream_blocks=stream_blocks)
    weights = hook_of(pipe.transformer).weights
    assert not list(weights.later_tensors(pipe.transformer))
    add_lora(pipe.transformer)
    loras = [weight for name, weight in pipe.transformer.named_parameters() if "lora" in name]
    found = [owner for owner, _ in weights.later_tensors(pipe.transformer)]
    assert {id(owner) for owner in found} == {id(weight) for weight in loras}


def test_a_component_that_found_no_room_is_onloaded_again(repository: Path, monkeypatch: pytest.MonkeyPatch):
    pipe = load(repository, device="cpu")
    expected = draw(pipe)
    enable_offload(pipe, CPU)
    hook = hook_of(pipe.transformer)
    monkeypatch.setattr(
        hook.weights.arena, "onload", lambda stream: (_ for _ in ()).throw(torch.OutOfMemoryError("full"))
    )
    with pytest.raises(torch.OutOfMemoryError):
        draw(pipe)
    assert hook.scheduler.resident is None
    monkeypatch.undo()
    assert np.array_equal(draw(pipe), expected)


def test_offload_all_frees_what_was_prefetched_too_and_tells_before(repository: Path):
    pipe = load(repository, device="cpu")
    enable_offload(pipe, CPU)
    hooks = hooks_of(pipe)
    pipe.encode_prompt("a cat", CPU)
    hooks["transformer"].weights.arena.prefetch(None)
    assert on_device(pipe) == ["text_encoder", "transformer"]
    told = []
    hooks["text_encoder"].on_offload = lambda: told.extend(on_device(pipe))
    offload_all(pipe)
    assert "text_encoder" in told
    assert on_device(pipe) == []
    assert hooks["vae"].scheduler.resident is None


def test_a_pipeline_without_our_hooks_has_nothing_to_offload(pipe):
    offload_all(pipe)


def test_what_is_called_before_a_component_is_offloaded(repository: Path):
    pipe = load(repository, device="cpu")
    enable_offload(pipe, CPU)
    told = []
    hook_of(pipe.transformer).on_offload = lambda: told.append(on_device(pipe))
    draw(pipe)
    assert told == [["transformer"]]


@pytest.mark.parametrize("stream_blocks", [False, True])
def test_diffusers_finds_hooks_and_device_and_can_remove_them(repository: Path, stream_blocks: bool):
    pipe = load(repository, device="cpu")
    before = draw(pipe)
    enable_offload(pipe, CPU, stream_blocks=stream_blocks)
    assert memory_mode(pipe) == ("stream" if stream_blocks else "offload")
    hooks = hooks_of(pipe)
    for hook in hooks.values():
        hook.execution_device = torch.device("meta")
    assert pipe._execution_device == torch.device("meta")
    for hook in hooks.values():
        hook.execution_device = CPU
    draw(pipe)
    pipe.maybe_free_model_hooks()
    assert hooks_of(pipe) == hooks
    assert on_device(pipe) == ["vae"]

    pipe.remove_all_hooks()
    assert memory_mode(pipe) == "resident"
    assert not any(hook.weights.arena.device_blocks for hook in hooks.values())
    assert type(pipe.transformer.layers) is torch.nn.ModuleList
    del hooks, hook
    assert np.array_equal(draw(pipe), before)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["offload", "stream"])
def test_on_a_gpu_removed_hooks_leave_everything_in_host_memory(repository: Path, memory: str):
    pipe = load(repository, device="cuda", memory=memory)
    add_lora(pipe.transformer)
    before = draw(pipe)
    pipe.remove_all_hooks()
    for name in NAMES:
        assert {tensor.device.type for tensor in snapshot(getattr(pipe, name))} == {"cpu"}, name
    pipe.enable_model_cpu_offload(device="cuda")
    assert np.array_equal(draw(pipe), before)
