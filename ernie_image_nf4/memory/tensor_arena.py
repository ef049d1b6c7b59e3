"""A module's tensors in a few blocks of memory, which are copied from host to device as a whole.

A full-size component has hundreds of tensors, quantization states included. Copied one by one from pageable memory they
arrive at 4 GB/s; a few page-locked blocks arrive at the speed of the bus.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import nn

from ..fast.module_tensors import tensors_of
from .pinned_memory import PinnedBlock, allocate, log_failure, page_lock

# Large enough for the speed of the bus, small enough to be filled by several threads at once, and a power of two, to
# which PyTorch rounds its own pinned allocations up.
BLOCK_BYTES = 128 * 1024**2
ALIGNMENT = 256  # that of CUDA's own allocations
FILL_THREADS = 4  # With one, filling takes most of the time of a load with offloading.


@dataclass(frozen=True)
class TensorSlot:
    """A tensor of a module, and where it lies in the blocks.

    Attributes:
        owner: What holds the tensor: a parameter or buffer (then `attribute` is ``"data"``), or a quantization state.
        attribute: Its name there.
        dtype: dtype of the tensor.
        shape: Shape of the tensor.
        block: Index of its block.
        offset: Of its first byte in the block.
    """

    owner: object
    attribute: str
    dtype: torch.dtype
    shape: torch.Size
    block: int
    offset: int

    @property
    def bytes(self) -> slice:
        """The tensor's bytes in its block."""
        return slice(self.offset, self.offset + self.shape.numel() * self.dtype.itemsize)

    def view(self, block: torch.Tensor) -> torch.Tensor:
        """The tensor in `block`, (bytes,) uint8. It shares the block's storage."""
        return block[self.bytes].view(self.dtype).view(self.shape)

    def host_view(self, block: torch.Tensor) -> torch.Tensor:
        """The tensor in a block of host memory, with a storage of its own on the same memory.

        A deep copy or a pickle of a tensor takes the whole storage along: as a `view`, it would be 128 MiB for each
        tensor.
        """
        return torch.from_numpy(block.numpy()[self.bytes]).view(self.dtype).view(self.shape)

    def point_to(self, tensor: torch.Tensor) -> None:
        """Let the module's tensor be this one."""
        setattr(self.owner, self.attribute, tensor)


def plan_slots(tensors: Iterable[tuple[object, str]]) -> tuple[list[TensorSlot], list[int]]:
    """A slot for each tensor, in the order of blocks and offsets, and the bytes of each block.

    Args:
        tensors: Owner and attribute of each, as from `tensors_of`.
    """
    slots: list[TensorSlot] = []
    sizes: list[int] = []
    for owner, name in tensors:
        tensor = getattr(owner, name)
        size = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if not sizes or sizes[-1] + size > BLOCK_BYTES:
            sizes.append(0)
        slots.append(TensorSlot(owner, name, tensor.dtype, tensor.shape, len(sizes) - 1, sizes[-1]))
        sizes[-1] += size
    return slots, sizes


@dataclass(eq=False)
class HostArena:
    """All tensors of a module in host memory, of which the device gets a copy on demand. Nothing is ever copied back.

    Attributes:
        slots: The module's tensors.
        host_blocks: Blocks of host memory, page-locked for CUDA.
        host_views: Each slot's tensor in the host blocks.
        device: Device that `onload` copies to.
        device_blocks: The copies; empty while there are none.
        copied: CUDA event after the latest copies.
    """

    slots: list[TensorSlot]
    host_blocks: list[PinnedBlock]
    host_views: list[torch.Tensor]
    device: torch.device
    device_blocks: list[torch.Tensor] = field(default_factory=list)
    copied: torch.cuda.Event | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all blocks, on either side."""
        return sum(len(block.memory) for block in self.host_blocks)

    @torch.compiler.disable
    def prefetch(self, stream: torch.cuda.Stream | None) -> None:
        """Start copying to the device on `stream`, None without CUDA; `onload` waits for the copies."""
        if self.device_blocks:
            return
        copies = [torch.empty(len(block.memory), dtype=torch.uint8, device=self.device) for block in self.host_blocks]
        if stream is not None:
            # The device memory may still be in use by work that was queued before it was freed.
            stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # None changes nothing
            for copy, block in zip(copies, self.host_blocks, strict=True):
                copy.copy_(block.memory, non_blocking=stream is not None)
        if stream is not None:
            self.copied = torch.cuda.Event()
            self.copied.record(stream)
        self.device_blocks = copies

    @torch.compiler.disable
    def onload(self, stream: torch.cuda.Stream | None) -> None:
        """Let the module's tensors be the copies on the device."""
        self.prefetch(stream)
        self._wait_for_copies()
        for slot in self.slots:
            slot.point_to(slot.view(self.device_blocks[slot.block]))

    @torch.compiler.disable
    def offload(self) -> None:
        """Let the module's tensors be those in host memory, and free the copies."""
        self._wait_for_copies()
        for slot, view in zip(self.slots, self.host_views, strict=True):
            slot.point_to(view)
        self.device_blocks = []

    def __del__(self) -> None:
        # Memory of neither side may be freed under a copy. An error here means that CUDA is lost.
        if self.copied is not None:
            with suppress(RuntimeError):
                self.copied.synchronize()

    def _wait_for_copies(self) -> None:
        """Let later work on the current stream, and whoever gets the device memory next, wait for copies under way."""
        if self.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)


def host_arenas(modules: Iterable[tuple[nn.Module, Iterable[nn.Module]]], device: torch.device) -> list[HostArena]:
    """Move the tensors of several modules into arenas in host memory, from which they are copied to `device` on demand.

    Args:
        modules: The modules, on the host, each with the modules below it whose tensors stay where they are.
        device: Device of the computation.
    """
    return arenas_of((tensors_of(module, excluded) for module, excluded in modules), device)


def arenas_of(tensors: Iterable[Iterable[tuple[object, str]]], device: torch.device) -> list[HostArena]:
    """Move tensors into arenas, one for each list of owners and attributes. As `host_arenas`."""
    plans = [plan_slots(each) for each in tensors]
    with ThreadPoolExecutor(FILL_THREADS) as pool:
        filled = [
            [
                pool.submit(_fill_block, [slot for slot in slots if slot.block == number], size, device)
                for number, size in enumerate(sizes)
            ]
            for slots, sizes in plans
        ]
        arenas = []
        for (slots, _), futures in zip(plans, filled, strict=True):
            parts = [future.result() for future in futures]
            views = [view for _, its_views in parts for view in its_views]
            arenas.append(HostArena(slots, [block for block, _ in parts], views, device))
    log_failure(block for arena in arenas for block in arena.host_blocks)
    return arenas


def _fill_block(slots: list[TensorSlot], size: int, device: torch.device) -> tuple[PinnedBlock, list[torch.Tensor]]:
    """Move the tensors of one block's slots into a new block; returns the block, and the tensors in it."""
    memory = allocate(size)
    for slot in slots:
        slot.view(memory).copy_(getattr(slot.owner, slot.attribute))
    block = page_lock(memory, device)
    views = [slot.host_view(block.memory) for slot in slots]
    for slot, view in zip(slots, views, strict=True):
        slot.point_to(view)
    return block, views
