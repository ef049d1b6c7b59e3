"""Offloading: weights wait in host memory, and are copied to the GPU when their component, or block, is called.

diffusers' ``enable_model_cpu_offload`` moves tensor by tensor from pageable memory, and copies the weights back
although nothing changed them; its group offloading doesn't know bitsandbytes' quantization states. Here page-locked
blocks are copied, the next component's while the one before computes, and offloading only frees the copy. The hooks
stand where diffusers looks for accelerate's, so the pipeline stays a plain one.

Who refers to whom: module -> `OffloadHook` -> `ComponentWeights` -> `HostArena` -> parameters. Nothing refers back to
a module, so that a component that is deleted frees its memory at once.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import ErnieImagePipeline
from torch import nn

from ..fast.adapters import stacks_in
from ..fast.module_tensors import tensors_of
from ..fast.subclassing import Runtime, become, named_as_upstream
from ..fast.transformer import runtime_of
from ..fast.turns import Turn
from ..upstream.offloading import TorchModelHook, hook_of
from .tensor_arena import HostArena, arenas_of, host_arenas


@dataclass(eq=False)
class StreamingRuntime(Runtime):
    """What `StreamedBlocks` keeps beside its blocks.

    Attributes:
        arenas: Weights of each block; none in a copy, whose blocks own their weights.
        adapters: What each block's adapters hold; empty if there are none.
        stream: Copies run on it; None where there is no CUDA.
    """

    arenas: list[HostArena] = field(default_factory=list)
    adapters: list[HostArena] = field(default_factory=list)
    stream: torch.cuda.Stream | None = None

    def of_block(self, number: int) -> list[HostArena]:
        """All that comes with a block, counted on from the first after the last."""
        return [each[number % len(each)] for each in (self.arenas, self.adapters) if each]

    def offload(self) -> None:
        """Free all copies on the device."""
        for arena in (*self.arenas, *self.adapters):
            if arena.device_blocks:
                arena.offload()


@named_as_upstream
class StreamedBlocks(nn.ModuleList):
    """The transformer's blocks, of which two at a time are on the device: one computes while the next one is copied.

    Whoever iterates over the list, as upstream's and the fast forward pass do, gets each block with its weights on the
    device.
    """

    runtime: StreamingRuntime

    def __iter__(self) -> Iterator[nn.Module]:
        runtime, stream = self.runtime, self.runtime.stream
        if not runtime.arenas:
            yield from super().__iter__()
            return
        for number, block in enumerate(super().__iter__()):
            for arena in runtime.of_block(number):
                arena.onload(stream)
            for arena in runtime.of_block(number + 1):  # after the last: the first, for the next step
                arena.prefetch(stream)
            yield block
            for arena in runtime.of_block(number):
                arena.offload()


@dataclass(eq=False)
class ComponentWeights:
    """The weights of an offloaded component.

    Attributes:
        arena: All weights, but those of streamed blocks.
        adapters: What came after `enable_offload`, such as LoRAs, but those of streamed blocks; None without any.
        streamed: Runtime of the streamed blocks, if the component has some.
        following: The component that is called next, as long as it exists; None for the last one.
        on_offload: Called before the weights leave the device, to drop what holds their addresses. Must not refer to
            the module.
    """

    arena: HostArena
    adapters: HostArena | None = None
    streamed: StreamingRuntime | None = None
    following: weakref.ReferenceType[ComponentWeights] | None = None
    on_offload: Callable[[], None] | None = None

    def offload(self) -> None:
        """Let the module's tensors be those in host memory, and free the copies."""
        if self.on_offload is not None:
            self.on_offload()
        self.arena.offload()
        if self.adapters is not None:
            self.adapters.offload()
        if self.streamed is not None:
            self.streamed.offload()

    @property
    def bytes(self) -> int:
        """Bytes that `onload` brings."""
        return self.arena.bytes + (self.adapters.bytes if self.adapters is not None else 0)

    def onload(self, stream: torch.cuda.Stream | None) -> None:
        """Let the module's tensors, those of streamed blocks aside, be copies on the device."""
        self.arena.onload(stream)
        if self.adapters is not None:
            self.adapters.onload(stream)

    def drop_adapters(self) -> None:
        """Leave adapters, all of them in host memory, to whoever changes them."""
        self.adapters = None
        if self.streamed is not None:
            self.streamed.adapters = []

    def take_adapters(self, module: nn.Module, excluded: Iterable[nn.Module]) -> None:
        """Keep adapters in host memory, from where they come with their component or block. Former ones are let go.

        The component isn't on the device.
        """
        blocks = list(module.layers.children()) if self.streamed is not None else []  # type: ignore[union-attr]
        excluded = list(excluded)
        wanted = [
            list(self.later_tensors(module, [*excluded, *blocks])),
            *(list(self.later_tensors(block, excluded)) for block in blocks),
        ]
        streamed = self.streamed.adapters if self.streamed is not None else []
        there = [*([] if self.adapters is None else [self.adapters]), *streamed]
        if {id(owner) for each in wanted for owner, _ in each} == {
            id(slot.owner) for each in there for slot in each.slots
        }:
            return
        device = self.arena.device
        self.adapters = arenas_of(wanted[:1], device)[0] if wanted[0] else None
        if self.streamed is not None:
            self.streamed.adapters = arenas_of(wanted[1:], device) if any(wanted[1:]) else []

    def later_tensors(self, module: nn.Module, excluded: Iterable[nn.Module] = ()) -> Iterator[tuple[object, str]]:
        """Owner and attribute of each tensor that the module got after `enable_offload`, such as a LoRA's."""
        arenas = [self.arena, *(self.streamed.arenas if self.streamed is not None else ())]
        known = {id(slot.owner) for arena in arenas for slot in arena.slots}
        left_out = {id(part) for each in excluded for part in each.modules()}
        for stack in stacks_in(module, left_out):
            known |= {id(parameter) for parameter in stack.parameters}
            yield stack, "data"
        yield from ((owner, name) for owner, name in tensors_of(module, excluded) if id(owner) not in known)


@dataclass(eq=False)
class OffloadScheduler:
    """Which of a pipeline's components is on the device.

    Attributes:
        stream: Copies run on it; None where there is no CUDA.
        limit: Bytes of weights that may be on the device at once.
        turn: Held while components are exchanged, and while one must stay. The pipeline's, so that a component that is
            called by itself waits for the picture that another thread draws.
    """

    stream: torch.cuda.Stream | None
    limit: int
    turn: Turn = field(default_factory=Turn)
    _resident: weakref.ReferenceType[ComponentWeights] | None = None
    _prefetched: weakref.ReferenceType[ComponentWeights] | None = None

    @property
    def resident(self) -> ComponentWeights | None:
        """Weights of the component that is on the device."""
        return None if self._resident is None else self._resident()

    def onload(self, weights: ComponentWeights) -> None:
        """Put a component on the device in place of the one that is there."""
        prefetched = self._prefetched() if self._prefetched is not None else None
        if prefetched is not None and prefetched is not weights:
            prefetched.offload()  # Another one is called first: `limit` has no room for a third.
        self._prefetched = None
        self.offload_resident()
        weights.onload(self.stream)
        self._resident = weakref.ref(weights)  # Set only after onload: an OOM must not mark it resident.

    def prefetch_following(self, weights: ComponentWeights) -> None:
        """Start copying the component that is called after this one, if both fit where the largest one does."""
        following = None if weights.following is None else weights.following()
        if following is not None and weights.bytes + following.bytes <= self.limit:
            following.arena.prefetch(self.stream)
            self._prefetched = weights.following

    def offload(self, weights: ComponentWeights) -> None:
        """Free a component's copy on the device, a prefetched one as well."""
        weights.offload()
        if self.resident is weights:
            self._resident = None

    def offload_resident(self) -> None:
        """Offload the component that is on the device, if any, and give its memory back to CUDA.

        PyTorch's caching allocator would keep the memory, in blocks whose size fits no tensor of a picture.
        """
        if (resident := self.resident) is not None:
            self.offload(resident)
        if self.stream is not None:
            torch.cuda.empty_cache()


class OffloadHook(TorchModelHook):
    """Onloads its component when it is called. Copies and pickles of the component are plain modules in host memory.

    Attributes:
        weights: The component's weights.
        scheduler: The pipeline's.
        execution_device: Device of the computation, which diffusers asks the hook for.
    """

    def __init__(
        self, weights: ComponentWeights, scheduler: OffloadScheduler, excluded: Iterable[nn.Module] = ()
    ) -> None:
        self.weights, self.scheduler = weights, scheduler
        self.execution_device = weights.arena.device
        self._excluded = weakref.WeakSet(excluded)
        self._adapters: tuple = ()

    @property
    def on_offload(self) -> Callable[[], None] | None:
        """As `ComponentWeights.on_offload`."""
        return self.weights.on_offload

    @on_offload.setter
    def on_offload(self, callback: Callable[[], None] | None) -> None:
        self.weights.on_offload = callback

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Let torch call the hook, and the transformer's blocks be streamed if their weights are."""
        if self.weights.streamed is not None:
            blocks: Any = module.layers
            become(blocks, StreamedBlocks)
            blocks.runtime = self.weights.streamed
        return super().init_hook(module)

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Make the module a plain one in host memory."""
        self._offload()
        for owner, name in self.weights.later_tensors(module, self._excluded):
            setattr(owner, name, getattr(owner, name).cpu())
        if self.weights.streamed is not None:
            blocks: Any = module.layers
            blocks.__class__ = nn.ModuleList
            del blocks.runtime, blocks.__module__  # as `become` set it
        return super().detach_hook(module)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        """Put the component on the device. Called by torch before the forward pass, by diffusers before ``decode``."""
        with self.scheduler.turn.take(self.execution_device):
            if self._adapters_changed(module):
                self.scheduler.offload(self.weights)
                self.weights.drop_adapters()
            if self.scheduler.resident is not self.weights:
                self._prepare_adapters(module)
                self.scheduler.onload(self.weights)
                self.scheduler.prefetch_following(self.weights)
        return args, kwargs

    @contextmanager
    def keeping(self, module: nn.Module) -> Iterator[None]:
        with self.scheduler.turn.take(self.execution_device):
            self.pre_forward(module)
            yield

    def _offload(self) -> None:
        with self.scheduler.turn.take(self.execution_device):
            self.scheduler.offload(self.weights)

    def _adapters_changed(self, module: nn.Module) -> bool:
        """Whether peft's calls have changed what has to come with a component, which may be on the device already."""
        runtime = runtime_of(module)
        if runtime is not None:
            return not runtime.adapters.is_current(module, exact=runtime.exact)
        config = getattr(module, "peft_config", None) or {}
        before, self._adapters = self._adapters, tuple(config.values())
        return len(before) != len(config) or any(
            one is not other for one, other in zip(before, config.values(), strict=True)
        )

    def _prepare_adapters(self, module: nn.Module) -> None:
        runtime = runtime_of(module)
        if runtime is not None:
            runtime.prepare_adapters(module)
        self.weights.take_adapters(module, self._excluded)

    def __reduce__(self) -> tuple:
        # A module's hooks are copied before its children: offloaded now, those are copied from host memory.
        self._offload()
        return super().__reduce__()


def enable_offload(
    pipe: ErnieImagePipeline,
    device: torch.device,
    *,
    excluded: Iterable[nn.Module] = (),
    stream_blocks: bool = False,
    turn: Turn | None = None,
) -> int:
    """Keep all components of `pipe` in host memory, and put one at a time on `device`, when it is called.

    Args:
        pipe: The pipeline, on the CPU.
        device: Device of the computation.
        excluded: Modules whose weights stay where they are.
        stream_blocks: Whether the transformer is copied block by block, in every step anew: for devices that it doesn't
            fit into.
        turn: Held by whoever uses the pipeline, if it has one.

    Returns:
        Bytes of the largest component, streamed blocks aside: what the device has room for.
    """
    components = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    modules = [components[name] for name in pipe.model_cpu_offload_seq.split("->") if name in components]
    excluded, blocks = list(excluded), pipe.transformer.layers
    not_in_arena = [*excluded, blocks] if stream_blocks else excluded
    streamed = [(block, ()) for block in blocks] if stream_blocks else []
    arenas = host_arenas([*((module, not_in_arena) for module in modules), *streamed], device)

    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    weights = [ComponentWeights(arena) for arena in arenas[: len(modules)]]
    if stream_blocks:
        weights[modules.index(pipe.transformer)].streamed = StreamingRuntime(arenas[len(modules) :], stream=stream)
    for each, following in itertools.pairwise(weights):
        each.following = weakref.ref(following)
    scheduler = OffloadScheduler(stream, limit=max(each.arena.bytes for each in weights), turn=turn or Turn())
    for module, each in zip(modules, weights, strict=True):
        OffloadHook(each, scheduler, excluded).attach(module)
    return scheduler.limit


def offload_all(pipe: ErnieImagePipeline) -> None:
    """Free the device memory of all components of a pipeline with `OffloadHook`s; of another pipeline, nothing."""
    hooks = [hook for part in pipe.components.values() if isinstance(hook := hook_of(part), OffloadHook)]
    if not hooks:
        return
    scheduler = hooks[0].scheduler
    with scheduler.turn.take(hooks[0].execution_device):
        for hook in hooks:
            hook.scheduler.offload(hook.weights)
        scheduler.offload_resident()
