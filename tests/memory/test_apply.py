"""A placement carried out: which hooks, classes and budgets a pipeline gets in each memory mode."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import captured
from diffusers import AutoencoderKLFlux2, ErnieImagePipeline

from ernie_image_nf4 import load
from ernie_image_nf4.memory.apply import apply_placement, memory_mode
from ernie_image_nf4.memory.offload import OffloadHook, enable_offload
from ernie_image_nf4.memory.placement import Placement
from ernie_image_nf4.memory.vae_tiling import TiledVAE
from ernie_image_nf4.upstream.offloading import hook_of

NAMES = ("pe", "text_encoder", "transformer", "vae")


def placed(repository: Path, memory: str, *, fast: bool) -> ErnieImagePipeline:
    pipe = load(repository, device="cpu", dtype="float32")
    apply_placement(pipe, Placement(torch.device("cpu"), torch.float32, memory, fast))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: ErnieImagePipeline) -> object:
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", height=32, width=32, num_inference_steps=2, generator=generator, use_pe=False).images[0]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("memory", ["resident", "offload", "stream"])
def test_the_memory_mode_is_the_one_that_was_asked_for(
    repository: Path, monkeypatch: pytest.MonkeyPatch, memory: str, fast: bool
):
    theirs = []
    monkeypatch.setattr(ErnieImagePipeline, "enable_model_cpu_offload", lambda self, device: theirs.append(device))
    pipe = placed(repository, memory, fast=fast)
    if memory == "offload" and not fast:
        assert theirs == [torch.device("cpu")]
        return
    assert not theirs
    assert memory_mode(pipe) == memory
    hooks = [hook_of(getattr(pipe, name)) for name in NAMES]
    assert all(isinstance(hook, OffloadHook) for hook in hooks) == (memory != "resident")
    assert draw(pipe) == draw(placed(repository, "resident", fast=fast))


@pytest.mark.parametrize("memory", ["resident", "offload", "stream"])
def test_the_vae_decodes_in_the_room_of_the_largest_component(repository: Path, memory: str):
    pipe = placed(repository, memory, fast=True)
    assert isinstance(pipe.vae, TiledVAE)
    hook = hook_of(pipe.vae)
    assert pipe.vae.runtime.budget == (None if memory == "resident" else hook.scheduler.limit)
    if memory != "resident":
        largest = max(hook_of(getattr(pipe, name)).weights.arena.bytes for name in NAMES)
        assert hook.scheduler.limit == largest


@pytest.mark.parametrize("memory", ["resident", "offload"])  # streamed blocks aren't captured
def test_the_captured_step_is_freed_before_decoding(repository: Path, memory: str):
    pipe = placed(repository, memory, fast=True)
    steps, alive = [], []

    def on_step_end(pipe: ErnieImagePipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        steps.append(captured(pipe.transformer))
        return tensors

    pipe.vae.decoder.register_forward_pre_hook(lambda *_: alive.append([each() is not None for each in steps]))
    pipe("a cat", height=32, width=32, num_inference_steps=1, use_pe=False, callback_on_step_end=on_step_end)
    assert alive == [[False]]


def test_the_captured_step_is_freed_as_the_weights_leave(repository: Path):
    """It reads their addresses."""
    pipe = placed(repository, "offload", fast=True)
    pipe("a cat", height=32, width=32, num_inference_steps=1, use_pe=False, output_type="latent")
    step = captured(pipe.transformer)
    pipe.encode_prompt("a cat", torch.device("cpu"))
    assert step() is None


def test_a_pipeline_that_is_not_fast_keeps_upstreams_code(repository: Path):
    pipe = placed(repository, "stream", fast=False)
    assert isinstance(pipe.vae, AutoencoderKLFlux2)
    assert not isinstance(pipe.vae, TiledVAE)
    assert hook_of(pipe.transformer).on_offload is None


@pytest.mark.parametrize("stream_blocks", [False, True])
def test_a_copied_pipeline_is_resident_and_draws_the_same(repository: Path, stream_blocks: bool):
    pipe = placed(repository, "resident", fast=False)
    expected = draw(pipe)
    enable_offload(pipe, torch.device("cpu"), stream_blocks=stream_blocks)
    twin = ErnieImagePipeline(**{name: copy.deepcopy(part) for name, part in pipe.components.items()})
    twin.set_progress_bar_config(disable=True)
    assert memory_mode(twin) == "resident"
    assert draw(twin) == expected
