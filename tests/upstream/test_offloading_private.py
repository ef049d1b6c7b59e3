"""Offloading without the private names that it reaches for: upstream's own way, and no error while drawing."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from ernie_image_nf4 import load
from ernie_image_nf4.memory.apply import apply_placement, memory_mode
from ernie_image_nf4.memory.placement import Placement
from ernie_image_nf4.upstream import offloading
from ernie_image_nf4.upstream.offloading import TorchModelHook, hook_of, hooks_are_found


class Recorder(TorchModelHook):
    def __init__(self) -> None:
        self.calls: list[nn.Module] = []

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        self.calls.append(module)
        return args, kwargs


def test_a_hook_is_called_before_the_forward_pass_until_accelerate_removes_it():
    module, hook = nn.Linear(2, 2), Recorder()
    hook.attach(module)
    assert hook_of(module) is hook
    assert "forward" not in vars(module)
    module(torch.ones(2))
    assert hook.calls == [module]
    remove_hook_from_module(module)
    module(torch.ones(2))
    assert hook.calls == [module]
    assert hook_of(module) is None


def test_accelerate_can_chain_it_with_another_hook():
    module, hook = nn.Linear(2, 2), Recorder()
    hook.attach(module)
    add_hook_to_module(module, ModelHook(), append=True)
    assert isinstance(hook_of(module), SequentialHook)
    module(torch.ones(2))
    assert set(hook.calls) == {module}
    remove_hook_from_module(module)
    hook.calls.clear()
    module(torch.ones(2))
    assert not hook.calls


def test_accelerate_keeps_hooks_where_they_are_looked_for():
    assert hooks_are_found()


@pytest.mark.parametrize("memory", ["offload", "stream"])
def test_where_accelerate_keeps_hooks_elsewhere_diffusers_offloads(
    repository: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, memory: str
):
    monkeypatch.setattr(offloading, "HOOK", "_renamed_hook")
    pipe = load(repository, device="cpu")
    chosen = []
    monkeypatch.setattr(type(pipe), "enable_model_cpu_offload", lambda self, device: chosen.append(device))
    with caplog.at_level(logging.INFO, logger="ernie_image_nf4"):
        apply_placement(pipe, Placement(torch.device("cpu"), torch.float32, memory, fast=memory == "offload"))
    assert chosen == [torch.device("cpu")]
    assert "diffusers" in caplog.text
    assert hook_of(pipe.transformer) is None
    assert memory_mode(pipe) == "resident"
    assert pipe("a cat", height=32, width=32, num_inference_steps=1, use_pe=False).images
