"""A module's tensors in a few blocks of memory, which move between host and device as a whole.

A full-size component has many tensors, quantization states included. Moved one by one from pageable memory they
come slowly; a few pinned blocks come at the speed of the bus.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from ..fast.module_tensors import tensors_of

# PyTorch rounds pinned allocations up to a power of two: blocks of one leave no more than a block's rest unused.
BLOCK_BYTES = 128 * 1024**2
ALIGNMENT = 256


@dataclass(frozen=True)
class Slot:
    """A tensor of a module, and where it lies.

    Attributes:
        owner: What holds it: a parameter or buffer (then `attribute` is ``"data"``), or a quantization state.
        attribute: Its name there.
        dtype: Of the tensor.
        shape: Of the tensor.
        block: Index of the block of memory that it lies in.
        offset: Of its first byte in that block.
    """

    owner: object
    attribute: str
    dtype: torch.dtype
    shape: torch.Size
    block: int
    offset: int

    def view(self, blocks: list[torch.Tensor]) -> torch.Tensor:
        """The tensor's bytes in `blocks`, as the tensor."""
        count = self.shape.numel() * self.dtype.itemsize
        return blocks[self.block][self.offset : self.offset + count].view(self.dtype).view(self.shape)

    def point_to(self, tensor: torch.Tensor) -> None:
        setattr(self.owner, self.attribute, tensor)


def slots_of(module: nn.Module, excluded: Iterable[nn.Module] = ()) -> tuple[list[Slot], list[int]]:
    """A place for each of `tensors_of`, and the bytes of the blocks."""
    slots, sizes = [], []
    for owner, name in tensors_of(module, excluded):
        tensor = getattr(owner, name)
        size = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if not sizes or sizes[-1] + size > BLOCK_BYTES:
            sizes.append(0)
        slots.append(Slot(owner, name, tensor.dtype, tensor.shape, len(sizes) - 1, sizes[-1]))
        sizes[-1] += size
    return slots, sizes


@dataclass
class HostWeights:
    """All tensors of a module in blocks of host memory, of which the device gets a copy on demand.

    Attributes:
        slots: The module's tensors.
        host: Blocks of host memory, 1-D uint8, pinned where there is CUDA.
        device: Where `bring` copies to.
        on_device: The copies, empty while the module is away.
        ready: After which the copies are there.
    """

    slots: list[Slot]
    host: list[torch.Tensor]
    device: torch.device
    on_device: list[torch.Tensor] = field(default_factory=list)
    ready: torch.cuda.Event | None = None
    _host_views: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self._host_views = [slot.view(self.host) for slot in self.slots]

    @property
    def bytes(self) -> int:
        return sum(len(block) for block in self.host)

    def prefetch(self, stream: torch.cuda.Stream | None) -> None:
        """Start copying to the device; `bring` waits for it."""
        if self.on_device:
            return
        self.on_device = [torch.empty_like(block, device=self.device, pin_memory=False) for block in self.host]
        if stream is None:
            for copy, block in zip(self.on_device, self.host, strict=True):
                copy.copy_(block)
            return
        # The memory may still be in use by work that was queued before it was freed.
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for copy, block in zip(self.on_device, self.host, strict=True):
                copy.copy_(block, non_blocking=True)
            self.ready = torch.cuda.Event()
            self.ready.record(stream)

    def bring(self, stream: torch.cuda.Stream | None) -> None:
        """Let the module's tensors be those on the device."""
        self.prefetch(stream)
        self._wait()
        for slot in self.slots:
            slot.point_to(slot.view(self.on_device))

    def leave(self) -> None:
        """Let the module's tensors be those of the host again, and free the copies."""
        self._wait()
        for slot, view in zip(self.slots, self._host_views, strict=True):
            slot.point_to(view)
        self.on_device, self.ready = [], None

    def __del__(self) -> None:
        self._wait()

    def _wait(self) -> None:
        """Let this stream's later work, and whoever gets the memory next, wait for a copy under way."""
        if self.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(self.ready)


def host_weights(module: nn.Module, device: torch.device, excluded: Iterable[nn.Module] = ()) -> HostWeights:
    """Move the tensors of `module` into blocks of host memory, from which they come to `device` on demand."""
    slots, sizes = slots_of(module, excluded)
    host = [torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda") for size in sizes]
    for slot in slots:
        view = slot.view(host)
        view.copy_(getattr(slot.owner, slot.attribute))
        slot.point_to(view)
    return HostWeights(slots, host, device)
