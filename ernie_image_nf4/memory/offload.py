"""Components, or blocks of the transformer, that wait in pinned host memory and come to the GPU when they are called.

diffusers' ``enable_model_cpu_offload`` moves tensor by tensor from pageable memory, and copies the weights back although nothing
changed them; its group offloading doesn't know bitsandbytes' quantization states. Here leaving is letting go of the copy.
The hooks are accelerate's, where diffusers looks for them, so the pipeline stays a plain one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import ErnieImagePipeline
from torch import nn

from ..fast.module_tensors import tensors_of
from .pinned_memory import registered_memory
from .tensor_arena import HostWeights, host_weights

PINNING_THREADS = 4  # copying to pinned memory is most of the time that loading takes here


class StreamedBlocks(nn.ModuleList):
    """The transformer's blocks, each of which comes to the device while the ones before it compute.

    Two are there at a time. Whoever iterates over the list, as both forward passes do, gets each block with its weights in place.
    A list of upstream's becomes one by a change of its class, so that names and state dict stay as they are.
    """

    def __iter__(self) -> Iterator[nn.Module]:
        weights: list[HostWeights] | None = vars(self).get("weights")
        if weights is None:
            yield from super().__iter__()
            return
        for number, block in enumerate(super().__iter__()):
            weights[number].bring(self.stream)
            weights[(number + 1) % len(weights)].prefetch(self.stream)  # behind the last one the next step's first
            yield block
            weights[number].leave()

    def leave(self) -> None:
        """Free what is on the device."""
        for part in self.weights:
            if part.on_device:
                part.leave()


class OffloadHook(ModelHook):
    """Brings its component to the device when it is called, after the one before has left.

    Attributes:
        execution_device: Where diffusers finds the device to compute on.
        following: The component that is called next; it is fetched meanwhile if both fit where the largest one does.
        on_offload: Called before the component leaves, for whoever holds on to the addresses of its weights.
    """

    def __init__(
        self,
        weights: HostWeights,
        turns: Turns,
        excluded: Iterable[nn.Module] = (),
        blocks: StreamedBlocks | None = None,
    ) -> None:
        self.weights, self.turns, self.excluded, self.blocks = weights, turns, excluded, blocks
        self.execution_device = weights.device
        self.following: OffloadHook | None = None
        self.on_offload: Callable[[], None] | None = None

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        if self.turns.current is not self:
            self.turns.end()
            self.weights.bring(self.turns.stream)
            self.turns.current = self  # not before, lest a component that found no room be taken for there
            self._bring_adapters(module)
            following = self.following
            if following is not None and self.weights.bytes + following.weights.bytes <= self.turns.limit:
                following.weights.prefetch(self.turns.stream)
        return args, kwargs

    def _bring_adapters(self, module: nn.Module) -> None:
        """Move what the module didn't have when it was offloaded (a LoRA is small) to the device, where it stays."""
        parts = [self.weights, *(self.blocks.weights if self.blocks is not None else ())]
        known = {id(slot.owner) for part in parts for slot in part.slots}
        for owner, name in tensors_of(module, self.excluded):
            if id(owner) not in known:
                setattr(owner, name, getattr(owner, name).to(self.execution_device))

    def leave(self) -> None:
        if self.on_offload is not None:
            self.on_offload()
        self.weights.leave()
        if self.blocks is not None:
            self.blocks.leave()


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

    def end(self) -> None:
        """Let the component that is there leave, and give its memory back: blocks of weights don't fit a picture's tensors."""
        if self.current is not None:
            self.current.leave()
            self.current = None
        if self.stream is not None:
            torch.cuda.empty_cache()


def enable_offload(
    pipe: ErnieImagePipeline, device: torch.device, *, excluded: Iterable[nn.Module] = (), stream_blocks: bool = False
) -> int:
    """Let all components of `pipe` (now on the CPU) wait in host memory and take turns on `device`.

    Args:
        pipe: The pipeline.
        device: Where to compute.
        excluded: Modules whose weights stay where they are.
        stream_blocks: Whether the transformer comes block by block, in every step anew, for devices that it doesn't fit into.

    Returns:
        Bytes of the largest component, streamed blocks aside: what the device has room for.
    """
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    order = [modules[name] for name in pipe.model_cpu_offload_seq.split("->") if name in modules]
    turns = Turns(torch.cuda.Stream(device) if device.type == "cuda" else None, limit=0)
    blocks = pipe.transformer.layers
    excluded = [*excluded, blocks] if stream_blocks else [*excluded]
    jobs = [(module, excluded) for module in order] + [(block, ()) for block in blocks if stream_blocks]
    with registered_memory(device), ThreadPoolExecutor(PINNING_THREADS) as pool:
        weights = list(pool.map(lambda job: host_weights(job[0], device, job[1]), jobs))
    if stream_blocks:
        blocks.__class__ = StreamedBlocks
        blocks.weights, blocks.stream = weights[len(order) :], turns.stream
    hooks = []
    for module, part in zip(order, weights, strict=False):
        streamed = blocks if stream_blocks and module is pipe.transformer else None
        hooks.append(OffloadHook(part, turns, [each for each in excluded if each is not blocks], streamed))
        add_hook_to_module(module, hooks[-1])
    turns.limit = max(hook.weights.bytes for hook in hooks)
    for hook, following in itertools.pairwise(hooks):
        hook.following = following
    return turns.limit


def free_device(pipe: ErnieImagePipeline) -> None:
    """Let the component of an offloaded pipeline that is on the device leave."""
    hook = getattr(pipe.transformer, "_hf_hook", None)
    if isinstance(hook, OffloadHook):
        hook.turns.end()
