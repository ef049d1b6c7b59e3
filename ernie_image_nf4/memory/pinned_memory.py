"""Page-locked host memory, which a GPU copies at the speed of the bus while Python and the GPU go on.

Ordinary memory is allocated, filled by several threads, and then page-locked where it lies (``cudaHostRegister``). The
usual ``torch.empty(pin_memory=True)`` is the fallback: there the driver takes page after page in one thread before
anything is filled, and PyTorch keeps what is freed for its own next allocations.
"""

from __future__ import annotations

import logging
import mmap
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress

import torch

logger = logging.getLogger(__name__)

PAGE_BYTES = mmap.PAGESIZE


class PinnedBlock:
    """A block of host memory that is page-locked as long as this object lives.

    Tensors that share the memory may live longer: the memory stays with them, as pageable memory. Copies to and from
    the GPU must have ended by then.

    Attributes:
        memory: (size,) uint8.
        failure: Why cudaHostRegister failed; None if it didn't, or was not needed.
    """

    def __init__(
        self, memory: torch.Tensor, unlock: Callable[[int], object] | None = None, failure: str | None = None
    ) -> None:
        self.memory, self.failure = memory, failure
        if unlock is not None:
            # Runs while `self.memory` still exists, so before the memory is freed. Not at exit: the system unlocks the
            # pages of a process that ends, and CUDA may have ended already.
            weakref.finalize(self, unlock, memory.data_ptr()).atexit = False


def allocate(size: int) -> torch.Tensor:
    """Ordinary host memory, (size,) uint8, on pages of its own: page locks are for whole pages and must not overlap."""
    pages = -(-size // PAGE_BYTES) * PAGE_BYTES
    memory = torch.empty(PAGE_BYTES + pages, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % PAGE_BYTES
    return memory[start : start + size]


def page_lock(memory: torch.Tensor, device: torch.device) -> PinnedBlock:
    """Page-lock memory, best after it was filled by several threads: the driver would make missing pages in one.

    If cudaHostRegister fails, the content is copied to memory that PyTorch page-locks. If that fails as well, the
    memory stays pageable, which copies only slower.

    Args:
        memory: (size,) uint8 from `allocate`.
        device: Device that the memory is copied to. Only CUDA needs a page lock.

    Returns:
        The block, whose `memory` replaces the argument.
    """
    if device.type != "cuda" or not len(memory):
        return PinnedBlock(memory)
    cudart = torch.cuda.cudart()
    with torch.cuda.device(device):  # Else CUDA makes a context on the first GPU, too.
        try:
            torch.cuda.check_error(cudart.cudaHostRegister(memory.data_ptr(), len(memory), 0))
        except RuntimeError as error:
            failure = str(error)
        else:
            return PinnedBlock(memory, cudart.cudaHostUnregister)
        # CUDA keeps the error until a kernel launch of this thread, which raises it: this one does.
        with suppress(RuntimeError):
            torch.ones(1, device=device)
    try:
        pinned = torch.empty(len(memory), dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError:
        return PinnedBlock(memory, failure=failure)
    return PinnedBlock(pinned.copy_(memory), failure=failure)


def pinned_buffer(size: int, device: torch.device) -> PinnedBlock:
    """A block of page-locked memory to be filled again and again, such as a staging buffer between files and a GPU.

    Args:
        size: Bytes.
        device: Device that copies it; see `page_lock`.
    """
    with torch.inference_mode(False):  # Tensors made in inference mode can't be filled outside of it.
        # Zeroing makes the pages in PyTorch's threads.
        block = page_lock(allocate(size).zero_(), device)
    log_failure([block])
    return block


def log_failure(blocks: Iterable[PinnedBlock]) -> None:
    """Say in one line at INFO that blocks could not be page-locked where they lay."""
    failure = next((block.failure for block in blocks if block.failure), None)
    if failure:
        logger.info("Host memory is page-locked by PyTorch's slower way, since cudaHostRegister failed: %s", failure)
