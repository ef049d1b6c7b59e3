"""CUDA graphs: how work is captured, and a picture's denoising step as one.

Python starts the kernels of a step one by one. Where the CPU is slow or busy and the picture small, the GPU waits for
it; a graph starts all of them at once.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from ..upstream.models import is_hooked, version_of
from .streams import CaptureStream

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# While one thread captures, no other does: torch allows one capture at a time in a process. Held as well to draw from
# torch's global random state, which is another one for a moment as a capture begins.
CAPTURING = threading.Lock()


class Graph(torch.cuda.CUDAGraph):
    """A CUDA graph whose capture leaves torch's global random state alone.

    torch 2.11 sets the device's default generator to capturing, whether the graph draws from it or not, and refuses
    whatever another thread draws meanwhile ("Offset increment outside graph capture"). So the default generator has
    another state, a copy of its own, for the moment in which the capture begins.
    """

    def capture_begin(self, *args: Any, **kwargs: Any) -> None:
        """As of `torch.cuda.CUDAGraph`."""
        default = torch.cuda.default_generators[torch.cuda.current_device()]
        own = default.graphsafe_get_state()
        default.graphsafe_set_state(default.clone_state())
        try:
            super().capture_begin(*args, **kwargs)
        finally:
            default.graphsafe_set_state(own)


def capture(
    work: Callable[[], Result],
    on: CaptureStream,
    *,
    warm_up: bool = False,
    generators: Sequence[torch.Generator] = (),
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Record the kernels that `work` starts on the stream's device, which has to be the current one.

    Args:
        work: Reads and writes tensors whose addresses stay. It draws no random numbers but from `generators`.
        on: To capture on. The owner of the graph keeps it as long as the graph.
        warm_up: Whether to run `work` once before, so that what is allocated or compiled the first time isn't recorded.
        generators: Random generators that `work` draws from. After an error they can't be used any more.

    Returns:
        The graph, and what `work` returned: tensors that each replay writes anew.

    Raises:
        RuntimeError: Too little memory, or `work` does what can't be captured, such as waiting for the GPU.
    """
    device, stream = on.device, on.stream
    current = torch.cuda.current_stream(device)
    graph = Graph()
    for generator in generators:
        graph.register_generator_state(generator)
    # The outer context brings the current stream back: a capture that fails leaves its own.
    with CAPTURING, torch.cuda.stream(current):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            small = torch.zeros(16, 16, device=device, dtype=torch.bfloat16)
            small @ small  # cuBLAS's workspace: allocated during the capture, it would be freed with the graph
            if warm_up:
                work()
        current.wait_stream(stream)
        with _no_garbage_collection():
            try:
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    output = work()
            except BaseException:
                on.abandon()
                raise
    return graph, output


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """No garbage collection meanwhile: an object that waits for the GPU as it is collected ends the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Predictor(Protocol):
    """What `CapturedStep` captures: a transformer, and the method that computes its prediction."""

    def predict(
        self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """The prediction (B, C, height, width).

        Args:
            latents: (B, C, height, width).
            timestep: (B,).
            text: (B, T, width).
            lengths: (B,), of the texts.
        """
        ...

    def modules(self) -> Iterator[nn.Module]: ...

    def has_upstream_blocks(self) -> bool:
        """Whether somebody's own code runs within blocks."""
        ...


class CapturedStep:
    """One denoising step of one picture as a CUDA graph, captured in the second step: the first compiles and allocates.

    A picture is recognized by its tensors of text and lengths, which the pipeline passes to every step. Its first
    step runs in Python, and so do all steps of a model with hooks, which may do something in between. What a callback
    does to the transformer's code between two steps is not noticed. Whoever changes adapters, strengths aside, has to
    call `release`.
    """

    def __init__(self) -> None:
        self.picture: tuple | None = None
        self.tried = False
        self.failed = False
        self.stream: CaptureStream | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[torch.Tensor, torch.Tensor] | None = None
        self.output: torch.Tensor | None = None

    def predict(
        self,
        transformer: Predictor,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        lengths: torch.Tensor,
    ) -> torch.Tensor:
        """``transformer.predict(...)``, replayed where it has been captured."""
        picture = (text, lengths, *map(version_of, (text, lengths)), *map(_kind, (latents, timestep)))
        if not _same(picture, self.picture):
            self.release()
            self.picture, self.tried = picture, False
        elif not self.tried:
            self.tried = True
            if not self.failed and may_be_captured(transformer, latents):
                self._capture(transformer, latents, timestep, text, lengths)
        if self.graph is None or self.inputs is None or self.output is None:
            return transformer.predict(latents, timestep, text, lengths)
        for kept, given in zip(self.inputs, (latents, timestep), strict=True):
            kept.copy_(given)
        self.graph.replay()
        return self.output.clone()

    def release(self) -> None:
        """Drop the graph and the memory that it works in. The rest of the picture goes through Python."""
        if self.graph is not None and self.stream is not None:
            # Replays ran on the current stream, but the memory goes back to the capturing stream's.
            self.stream.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        self.graph = self.inputs = self.output = None

    def _capture(
        self,
        transformer: Predictor,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        lengths: torch.Tensor,
    ) -> None:
        device = latents.device
        inputs = latents.clone(), timestep.clone()
        try:
            if self.stream is None or self.stream.device != device:
                self.stream = CaptureStream(device)
            with torch.cuda.device(device):
                graph, output = capture(lambda: transformer.predict(*inputs, text, lengths), self.stream)
        except RuntimeError as error:  # too little memory, or something that only works outside of a capture
            self.failed, self.stream = True, None
            logger.info("Steps aren't captured as a CUDA graph: %s", next(iter(str(error).splitlines()), ""))
            return
        self.graph, self.inputs, self.output = graph, inputs, output


def may_be_captured(transformer: Predictor, latents: torch.Tensor) -> bool:
    """Whether a step on these latents can be captured, and is the same work each time."""
    if not latents.is_cuda or torch.is_autocast_enabled("cuda") or torch.cuda.is_current_stream_capturing():
        return False
    return is_undisturbed(transformer) and not transformer.has_upstream_blocks()


def is_undisturbed(transformer: Predictor) -> bool:
    """Whether no module has hooks, which may do something else in each step.

    The transformer itself may have an offloading hook: it runs before the step.
    """
    return not any(is_hooked(module, except_offload=module is transformer) for module in transformer.modules())


def _kind(tensor: torch.Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.device


def _same(one: tuple, other: tuple | None) -> bool:
    """Whether two pictures are one: text and lengths by identity, the rest by value."""
    return other is not None and one[0] is other[0] and one[1] is other[1] and one[2:] == other[2:]
