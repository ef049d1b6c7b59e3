"""CUDA graphs: how they are captured, and the denoising step as one.

Python starts the kernels of a step one by one: where the CPU is slow or busy and the picture small, the GPU waits for it. A graph starts
them all at once.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

CAPTURING = threading.Lock()  # parts of torch's random state know only of one capture at a time


def capture(
    work: Callable[[], Any],
    stream: torch.cuda.Stream,
    *,
    warm_up: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Record what `work` starts on the stream's device, which has to be the current one.

    Args:
        work: Reads and writes tensors that stay where they are.
        stream: To capture on. Each keeper of graphs has its own, and keeps it: cuBLAS has a workspace for each stream that it has worked
            on, in which no two graphs may work at once, and which newer versions of torch free when one of the stream's graphs goes.
        warm_up: Whether to run it once before, so that what is allocated or compiled the first time isn't recorded.
        generator: That `work` draws from, if not from the global random state.

    Returns:
        The graph, and what `work` returned: tensors that each replay writes anew.

    Raises:
        RuntimeError: Too little memory, or `work` does what can't be captured, such as waiting for the GPU.
    """
    device = stream.device
    current = torch.cuda.current_stream(device)
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    collecting = gc.isenabled()
    with CAPTURING, torch.cuda.stream(current):  # which a capture that fails doesn't come back to
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            small = torch.zeros(16, 16, device=device, dtype=torch.bfloat16)
            small @ small  # allocates cuBLAS's memory outside of the graph's, which goes with the graph
            if warm_up:
                work()
        current.wait_stream(stream)
        gc.disable()  # what is collected may wait for copies of its own, which ends a capture
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                output = work()
        except BaseException:
            _end_capture(stream)
            raise
        finally:
            if collecting:
                gc.enable()
    return graph, output


def _end_capture(stream: torch.cuda.Stream) -> None:
    """Let torch's random state know that the capture is over: one that failed may not have come to that, another one does."""
    with (
        suppress(RuntimeError),
        torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"),
    ):
        torch.zeros(1, device=stream.device)


class StepGraph:
    """One denoising step of one picture as a CUDA graph: captured in the second step, after everything has been compiled in the first.

    A picture is known by its tensors of text and lengths, which the pipeline gives to each step anew. Calls that aren't a picture's
    later steps go through Python as ever, and so does everything where hooks or adapters may want to do something in between. What a
    callback does to the transformer's code between two steps is not seen, other than by adding an adapter.
    """

    def __init__(self, step: Callable[..., torch.Tensor]) -> None:
        self.step = step
        self.picture: tuple | None = None
        self.tried = False
        self.failed = False
        self.stream: torch.cuda.Stream | None = None
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
            if not self.failed and may_be_captured(transformer, latents):
                self._capture(transformer, latents, timestep, text, lengths)
        elif getattr(transformer, "peft_config", None):
            self.forget()
        if self.graph is None:
            return self.step(transformer, latents, timestep, text, lengths)
        for kept, given in zip(self.inputs, (latents, timestep), strict=True):
            kept.copy_(given)
        self.graph.replay()
        return self.output.clone()

    def forget(self) -> None:
        """Drop the graph and the memory that it works in; the rest of the picture goes through Python."""
        if self.graph is not None:  # replays run on the current stream, its memory is the other one's
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        self.graph = self.inputs = self.output = None

    def _capture(
        self, transformer: nn.Module, latents: torch.Tensor, timestep: torch.Tensor, *text: torch.Tensor
    ) -> None:
        device = latents.device
        if self.stream is None or self.stream.device != device:
            self.stream = torch.cuda.Stream(device)
        inputs = latents.clone(), timestep.clone()
        try:
            with torch.cuda.device(device):
                graph, output = capture(lambda: self.step(transformer, *inputs, *text), self.stream)
        except RuntimeError as error:  # too little memory, or something that only works outside of a capture
            self.failed = True
            logger.info("Steps aren't captured as a CUDA graph: %s", next(iter(str(error).splitlines()), ""))
            return
        self.graph, self.inputs, self.output = graph, inputs, output


def forget_graph(transformer: nn.Module) -> None:
    """Drop the CUDA graph of a picture's steps, if there is one, with the memory that it works in."""
    graph = vars(transformer).get("_step_graph")
    if graph is not None:
        graph.forget()


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
    return not any(is_hooked(module, accelerate=module is not transformer) for module in transformer.modules())


def is_hooked(module: nn.Module, *, accelerate: bool = True) -> bool:
    """Whether hooks of torch, diffusers or `accelerate` want to know when a module is called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or hasattr(module, "_diffusers_hook")
        or (accelerate and hasattr(module, "_hf_hook"))
    )


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _kind(tensor: torch.Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.device


def _same(one: tuple, other: tuple | None) -> bool:
    """Tensors by identity, the rest by value."""
    return other is not None and one[0] is other[0] and one[1] is other[1] and one[2:] == other[2:]
