"""Components that wait in host memory: the same pictures, one component at a time on the device, nothing copied back.

Host and device may be the same memory: on a CPU the blocks, turns and hooks are tested, on a GPU the copies as well.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ernie_image_nf4 import load, offloading
from ernie_image_nf4.offloading import enable_offload, host_weights, tensors_of


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
    monkeypatch.setattr(offloading, "BLOCK_BYTES", block)
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


@pytest.mark.gpu
def test_on_a_gpu_only_one_component_is_there_and_the_picture_is_the_same(repository: Path):
    expected = draw(load(repository, device="cuda", memory="resident"))
    pipe = load(repository, device="cuda", memory="offload")
    assert np.array_equal(draw(pipe), expected)
    assert pipe.transformer.layers[0].mlp.gate_proj.weight.device.type == "cpu"
    assert pipe.transformer._hf_hook.weights.host[0].is_pinned()
    assert pipe._execution_device.type == "cuda"
