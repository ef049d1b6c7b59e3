"""CUDA graphs: how they are captured, and the denoising step as one.

Python starts some 900 kernels a step, which takes it about as long as the GPU takes to run them at 512x512 on an H100: on a slower or
busy CPU the GPU waits. A graph starts them all at once.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)


CAPTURING = threading.Lock()  # what another thread starts on the stream would be captured too


@functools.cache
def capture_stream(device: torch.device, number: int = 0) -> torch.cuda.Stream:
    """A stream that graphs are captured on: the same for all that don't run at once.

    cuBLAS keeps 32 MiB for each stream that it has worked on, in which no two graphs may work at once.
    """
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        small = torch.zeros(16, 16, device=device, dtype=torch.bfloat16)
        small @ small  # allocates them outside of any graph's memory, which goes with the graph
    return stream


def capture(
    work: Callable[[], Any],
    device: torch.device,
    *,
    warm_up: bool = False,
    stream: torch.cuda.Stream | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Record what `work` starts on `device`, the current one. Other threads may go on using the GPU.

    Args:
        work: Reads and writes tensors that stay where they are.
        device: Where.
        warm_up: Whether to run it once before, so that what is allocated or compiled the first time isn't recorded.
        stream: To capture on; by default the device's first.
        generator: That `work` draws from, if not from the global random state.

    Returns:
        The graph, and what `work` returned: tensors that each replay writes anew.
    """
    with CAPTURING:
        stream = stream or capture_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        if warm_up:
            with torch.cuda.stream(stream):
                work()
            torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if generator is not None:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            output = work()
    return graph, output


class StepGraph:
    """One denoising step of one picture as a CUDA graph: captured in the second step, after everything has been compiled in the first.

    A picture is known by its tensors of text and lengths, which the pipeline gives to each step anew. Calls that aren't a picture's
    later steps go through Python as ever, and so does everything where hooks or adapters may want to do something in between.
    """

    def __init__(self, step: Callable[..., torch.Tensor]) -> None:
        self.step = step
        self.picture: tuple | None = None
        self.tried = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[torch.Tensor, torch.Tensor] | None = None
        self.output: torch.Tensor | None = None

    def __call__(
        self,
        transformer: nn.Module,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        lengths: torch.Tensor,
    ) -> torch.Tensor:
        """As the step: latents (B, C, height, width), timestep (B,), text (B, T, width), lengths (B,) -> (B, C, height, width)."""
        picture = (text, lengths, *map(_version, (text, lengths)), *map(_kind, (latents, timestep)))
        if not _same(picture, self.picture):
            self.forget()
            self.picture, self.tried = picture, False
        elif not self.tried:
            self.tried = True
            if may_be_captured(transformer, latents):
                self._capture(transformer, latents, timestep, text, lengths)
        if self.graph is None:
            return self.step(transformer, latents, timestep, text, lengths)
        for kept, given in zip(self.inputs, (latents, timestep), strict=True):
            kept.copy_(given)
        self.graph.replay()
        return self.output.clone()

    def forget(self) -> None:
        """Drop the graph and the memory that it works in; the rest of the picture goes through Python."""
        self.graph = self.inputs = self.output = None

    def _capture(
        self, transformer: nn.Module, latents: torch.Tensor, timestep: torch.Tensor, *text: torch.Tensor
    ) -> None:
        device = latents.device
        torch.cuda.empty_cache()  # what the first step worked in: the graph has memory of its own
        inputs = latents.clone(), timestep.clone()
        try:
            with torch.cuda.device(device):
                graph, output = capture(lambda: self.step(transformer, *inputs, *text), device)
        except RuntimeError as error:  # too little memory, or something that only works outside of a capture
            logger.info("Steps aren't captured as a CUDA graph: %s", next(iter(str(error).splitlines()), ""))
            return
        self.graph, self.inputs, self.output = graph, inputs, output


def may_be_captured(transformer: nn.Module, latents: torch.Tensor) -> bool:
    """Whether a step on these latents can be captured, and is the same work each time."""
    if not latents.is_cuda or torch.is_autocast_enabled("cuda") or torch.cuda.is_current_stream_capturing():
        return False
    return is_undisturbed(transformer)


def is_undisturbed(transformer: nn.Module) -> bool:
    """Whether nothing hooked into the model, and no adapter, may want to do something else in each step.

    The transformer itself may have a hook of accelerate's: it runs before the step.
    """
    if getattr(transformer, "peft_config", None):
        return False
    return not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or hasattr(module, "_diffusers_hook")
        or (hasattr(module, "_hf_hook") and module is not transformer)
        for module in transformer.modules()
    )


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _kind(tensor: torch.Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.device


def _same(one: tuple, other: tuple | None) -> bool:
    """Tensors by identity, the rest by value."""
    return other is not None and one[0] is other[0] and one[1] is other[1] and one[2:] == other[2:]
