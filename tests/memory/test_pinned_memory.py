"""Page-locked memory: locked where it lies, unlocked before it is freed, still there for tensors that live longer."""

from __future__ import annotations

import contextlib
import logging
import weakref
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ernie_image_nf4 import load
from ernie_image_nf4.memory.pinned_memory import PAGE_BYTES, allocate, log_failure, page_lock, pinned_buffer
from ernie_image_nf4.upstream.offloading import hook_of

CUDA = torch.device("cuda", 0)
NAMES = ("pe", "text_encoder", "transformer", "vae")


class Driver:
    """CUDA's part, as torch shows it: what is page-locked, in bytes by address."""

    cudaError = SimpleNamespace(success=0)

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, refuses: bool = False, torch_can: bool = True) -> None:
        self.locked: dict[int, int] = {}
        self.launches, self.allocated = 0, 0
        self.refuses, self.torch_can, self.empty = refuses, torch_can, torch.empty
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "check_error", self.check_error)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch, "ones", self.launch)
        monkeypatch.setattr(torch, "empty", self.allocate)

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if not self.refuses:
            self.locked[address] = size
        return 801 if self.refuses else 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0

    def check_error(self, code: int) -> None:
        if code:
            raise RuntimeError(f"operation not supported ({code})")

    def launch(self, *args, **kwargs) -> None:
        """Raises the error that the call before left behind."""
        self.launches += 1
        raise RuntimeError("CUDA error: operation not supported")

    def allocate(self, *args, pin_memory: bool = False, **kwargs) -> torch.Tensor:
        if pin_memory and not self.torch_can:
            raise RuntimeError("out of memory")
        self.allocated += pin_memory
        return self.empty(*args, **kwargs)


def filled(size: int) -> torch.Tensor:
    return allocate(size).copy_(torch.arange(size) % 251)


@pytest.mark.parametrize("size", [1, PAGE_BYTES, 3 * PAGE_BYTES + 5])
def test_memory_has_pages_of_its_own(size: int):
    blocks = [allocate(size) for _ in range(20)]
    assert all(len(block) == size and block.data_ptr() % PAGE_BYTES == 0 for block in blocks)
    for block in blocks:
        room = block.untyped_storage()
        assert block.data_ptr() + -(-size // PAGE_BYTES) * PAGE_BYTES <= room.data_ptr() + room.nbytes()


def test_a_block_is_locked_where_it_lies_and_unlocked_with_its_owner(monkeypatch: pytest.MonkeyPatch):
    driver = Driver(monkeypatch)
    memory = filled(1000)
    block = page_lock(memory, CUDA)
    assert block.memory is memory
    assert driver.locked == {memory.data_ptr(): 1000}
    view = memory[10:20]
    del block
    assert driver.locked == {}
    assert view.tolist() == list(range(10, 20))


def test_a_block_is_unlocked_while_its_memory_is_there(monkeypatch: pytest.MonkeyPatch):
    driver = Driver(monkeypatch)
    block = page_lock(filled(1000), CUDA)
    memory, seen = weakref.ref(block.memory), []
    unregister = driver.cudaHostUnregister
    driver.cudaHostUnregister = lambda address: seen.append(memory() is not None) or unregister(address)
    block = page_lock(filled(2000), CUDA)
    memory = weakref.ref(block.memory)
    del block
    assert seen == [True]
    assert memory() is None


@pytest.mark.parametrize("torch_can", [True, False])
def test_what_the_system_refuses_to_lock_keeps_its_content_and_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, torch_can: bool
):
    driver = Driver(monkeypatch, refuses=True, torch_can=torch_can)
    blocks = [page_lock(filled(300), CUDA) for _ in range(3)]
    assert driver.allocated == (3 if torch_can else 0)
    assert driver.launches == 3  # the error doesn't wait for somebody else's kernel
    assert all(torch.equal(block.memory, filled(300)) for block in blocks)
    with caplog.at_level(logging.INFO, logger="ernie_image_nf4"):
        log_failure(blocks)
    assert [record.getMessage() for record in caplog.records] == [
        "Host memory is page-locked by PyTorch's slower way, since cudaHostRegister failed: "
        "operation not supported (801)"
    ]
    del blocks  # nothing to unlock


def test_only_cuda_needs_page_locked_memory(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    driver = Driver(monkeypatch)
    with caplog.at_level(logging.INFO, logger="ernie_image_nf4"):
        block = pinned_buffer(100, torch.device("cpu"))
    assert len(block.memory) == 100
    assert driver.locked == {}
    assert not caplog.records


def test_a_buffer_can_be_filled_outside_of_inference_mode(monkeypatch: pytest.MonkeyPatch):
    Driver(monkeypatch)
    with torch.inference_mode():
        block = pinned_buffer(100, CUDA)
    assert block.memory.add_(1).sum() == 100


def is_page_locked(memory: torch.Tensor) -> bool:
    """CUDA refuses to lock pages again. (`is_pinned` of some versions of PyTorch knows only what PyTorch allocated.)"""
    cudart = torch.cuda.cudart()
    if int(cudart.cudaHostRegister(memory.data_ptr(), len(memory), 0)) == 0:
        cudart.cudaHostUnregister(memory.data_ptr())
        return False
    with suppress(RuntimeError):  # CUDA keeps the error until the next kernel launch
        torch.ones(1, device=CUDA)
    return True


@pytest.mark.gpu
def test_on_a_gpu_a_block_is_page_locked_while_its_owner_lives():
    block = page_lock(filled(1 << 20), CUDA)
    assert block.failure is None
    whole, view = block.memory, block.memory[100:200]
    assert is_page_locked(whole)
    assert torch.equal(whole.to(CUDA, non_blocking=True).cpu(), filled(1 << 20))
    del block
    assert not is_page_locked(whole)
    assert view.tolist() == [number % 251 for number in range(100, 200)]


@pytest.mark.gpu
def test_on_a_gpu_a_refused_lock_leaves_no_error_behind():
    memory = filled(1 << 20)
    block = page_lock(memory, CUDA)
    again = page_lock(memory, CUDA)  # which CUDA refuses
    assert again.failure
    assert again.memory.is_pinned()
    assert torch.equal(again.memory, memory)
    assert torch.full((4,), 2.0, device=CUDA).add_(1).sum() == 12
    torch.cuda.synchronize()
    del block


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["offload", "stream"])
def test_on_a_gpu_weights_wait_in_page_locked_memory(repository: Path, memory: str):
    pipe = load(repository, device="cuda", memory=memory)
    for name in NAMES:
        weights = hook_of(getattr(pipe, name)).weights
        for arena in (weights.arena, *(weights.streamed.arenas if weights.streamed else ())):
            assert all(block.failure is None and is_page_locked(block.memory) for block in arena.host_blocks)
