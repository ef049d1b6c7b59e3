"""Components that wait in host memory and come to the GPU when they are called.

diffusers' ``enable_model_cpu_offload`` moves tensor by tensor, from pageable memory (4 GB/s on an H100's host), and copies the weights
back although nothing changed them. Here a component's weights, its quantization states included, lie in a few pinned blocks: each
comes over at the speed of the bus, and leaving is letting go of the copy. The hooks are accelerate's, where
diffusers looks for them, so the pipeline stays a plain one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import ErnieImagePipeline
from torch import nn

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

    def point_to(self, blocks: list[torch.Tensor]) -> None:
        """Let the tensor be its bytes in `blocks`."""
        count = self.shape.numel() * self.dtype.itemsize
        view = blocks[self.block][self.offset : self.offset + count].view(self.dtype).view(self.shape)
        setattr(self.owner, self.attribute, view)


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
                copy.record_stream(stream)
            self.ready = torch.cuda.Event()
            self.ready.record(stream)

    def bring(self, stream: torch.cuda.Stream | None) -> None:
        """Let the module's tensors be those on the device."""
        self.prefetch(stream)
        if self.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(self.ready)
        for slot in self.slots:
            slot.point_to(self.on_device)

    def leave(self) -> None:
        """Let the module's tensors be those of the host again, and free the copies."""
        for slot in self.slots:
            slot.point_to(self.host)
        self.on_device, self.ready = [], None


def tensors_of(module: nn.Module) -> Iterator[tuple[object, str]]:
    """Owner and attribute of every distinct parameter, buffer and tensor of a quantization state below `module`."""
    seen = set()
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        yield tensor, "data"
        state = getattr(tensor, "quant_state", None)
        for owner, names in (
            (state, ("absmax", "code", "offset")),
            (getattr(state, "state2", None), ("absmax", "code")),
        ):
            yield from ((owner, name) for name in names if owner is not None and torch.is_tensor(getattr(owner, name)))


def host_weights(module: nn.Module, device: torch.device) -> HostWeights:
    """Move the tensors of `module` into blocks of host memory."""
    found = [(owner, name, getattr(owner, name).contiguous()) for owner, name in tensors_of(module)]
    places, sizes = [], []
    for _, _, tensor in found:
        size = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if not sizes or sizes[-1] + size > BLOCK_BYTES:
            sizes.append(0)
        places.append((len(sizes) - 1, sizes[-1]))
        sizes[-1] += size
    host = [torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda") for size in sizes]
    slots = []
    for (owner, name, tensor), (block, offset) in zip(found, places, strict=True):
        slot = Slot(owner, name, tensor.dtype, tensor.shape, block, offset)
        slot.point_to(host)
        getattr(owner, name).copy_(tensor)
        slots.append(slot)
    return HostWeights(slots, host, device)


class OffloadHook(ModelHook):
    """Brings its component to the device when it is called, after the one before has left.

    Attributes:
        execution_device: Where diffusers finds the device to compute on.
        following: The component that is called next; it is fetched meanwhile if both fit where the largest one does.
    """

    def __init__(self, weights: HostWeights, turns: Turns) -> None:
        self.weights, self.turns = weights, turns
        self.execution_device = weights.device
        self.following: OffloadHook | None = None

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        if self.turns.current is not self:
            if self.turns.current is not None:
                self.turns.current.weights.leave()
            self.turns.current = self
            self.weights.bring(self.turns.stream)
            following = self.following
            if following is not None and self.weights.bytes + following.weights.bytes <= self.turns.limit:
                following.weights.prefetch(self.turns.stream)
        return args, kwargs


@dataclass
class Turns:
    """Whose turn it is among the components of a pipeline.

    Attributes:
        stream: Copies run on it; None where there is no CUDA.
        limit: Bytes of weights that may be on the device at once.
        current: The hook of the component there now.
    """

    stream: torch.cuda.Stream | None
    limit: int
    current: OffloadHook | None = None


def enable_offload(pipe: ErnieImagePipeline, device: torch.device) -> None:
    """Let all components of `pipe` (now on the CPU) wait in host memory and take turns on `device`."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    order = [modules[name] for name in pipe.model_cpu_offload_seq.split("->") if name in modules]
    weights = [host_weights(module, device) for module in order]
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    turns = Turns(stream, limit=max(part.bytes for part in weights))
    hooks = [OffloadHook(part, turns) for part in weights]
    for hook, following in itertools.pairwise(hooks):
        hook.following = following
    for module, hook in zip(order, hooks, strict=True):
        add_hook_to_module(module, hook)
