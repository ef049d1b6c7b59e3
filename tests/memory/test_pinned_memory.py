"""Pinned memory by registering: PyTorch's settings are as they were afterwards, and the caller's own come first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ernie_image_nf4 import load
from ernie_image_nf4.memory.pinned_memory import ALLOCATED, REGISTERED, allocator_settings, registered_memory


class AllocatorSettings:
    """PyTorch's, which tell each change."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, text: str, *, refused: bool = False) -> None:
        self.text, self.changes, self.refused = text, [], refused
        self.empty = torch.empty
        monkeypatch.setattr(torch, "empty", self.allocate)
        monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: self.text, raising=False)
        monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", self.change)
        monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")

    def change(self, text: str) -> None:
        self.text = text
        self.changes.append(text)

    def allocate(self, *args, pin_memory: bool = False, **kwargs) -> torch.Tensor:
        if pin_memory and self.refused and REGISTERED in self.text:
            raise RuntimeError("operation not supported")
        return self.empty(*args, **kwargs)


@pytest.mark.parametrize("own", ["", "max_split_size_mb:512"])
@pytest.mark.parametrize("refused", [False, True])
def test_memory_is_registered_beside_the_callers_settings_and_they_come_back(
    monkeypatch: pytest.MonkeyPatch, own: str, refused: bool
):
    settings = AllocatorSettings(monkeypatch, own, refused=refused)
    beside = f"{own}," if own else ""
    with registered_memory(torch.device("cuda")):
        assert settings.text == beside + (ALLOCATED if refused else REGISTERED)
    assert settings.changes[-2:] == [beside + ALLOCATED, own]


def test_without_a_way_to_ask_for_settings_the_environment_says_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(torch._C, "_accelerator_getAllocatorSettings", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    assert allocator_settings() == ""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert allocator_settings() == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    assert allocator_settings() == "max_split_size_mb:512"


@pytest.mark.parametrize(("device", "own"), [("cpu", ""), ("cuda", "pinned_use_background_threads:True")])
def test_settings_stay_without_a_gpu_and_where_the_caller_has_some_for_pinned_memory(
    monkeypatch: pytest.MonkeyPatch, device: str, own: str
):
    settings = AllocatorSettings(monkeypatch, own)
    with registered_memory(torch.device(device)):
        pass
    assert settings.changes == []


@pytest.mark.gpu
def test_on_a_gpu_weights_wait_in_registered_memory(repository: Path, monkeypatch: pytest.MonkeyPatch):
    settings: list[str] = []
    change = torch._C._accelerator_setAllocatorSettings
    monkeypatch.setattr(
        torch._C, "_accelerator_setAllocatorSettings", lambda text: (settings.append(text), change(text))
    )
    before = allocator_settings()
    pipe = load(repository, device="cuda", memory="offload")
    assert [text.removeprefix(f"{before},") for text in settings] == [REGISTERED, ALLOCATED, before]
    assert all(block.is_pinned() for block in pipe.transformer._hf_hook.weights.host)
    assert allocator_settings() == before
