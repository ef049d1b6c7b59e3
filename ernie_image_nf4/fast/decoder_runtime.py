"""What the prompt enhancer decodes with, kept from call to call: one text, or several at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from ..upstream.offloading import hook_of, kept_on_device
from .decode_batch import DecodeBatch, decode_together, may_share_steps
from .decode_request import DecodeRequest
from .decode_step import MOST_TEXTS, DecodeStep
from .decode_trial import TriedStep
from .decoder import CACHE_STEP, DecodeSlot, decode_n_tokens
from .random_state import drawing_as_caller
from .streams import CaptureStream
from .subclassing import Runtime
from .turns import Turn

logger = logging.getLogger(__name__)

Text = Generator[None, None, torch.Tensor]  # a text under way, which returns its tokens


class DecoderRuntime(Runtime):
    """What a fast prompt enhancer keeps beside its weights: buffers with captured steps, for calls of the same kind.

    Attributes:
        turn: Held while texts are decoded.
        slot: What one call at a time is decoded with; None before the first.
        batch: What several texts are decoded with by kernels; None before the first, and after long ones.
        exact: Whether steps are to be computed as upstream does; a setting, which copies keep.
        find_step: Finds kernels for decode steps; None for none.
        streams: Of the model's device: one for `slot`, then one for each slot of `generate_together`.
    """

    def __init__(self, exact: bool = False) -> None:
        self.turn = Turn()
        self.slot: DecodeSlot | None = None
        self.batch: DecodeBatch | None = None
        self.exact = exact
        self.find_step: Callable[[PreTrainedModel], DecodeStep | None] | None = None if exact else TriedStep()
        self.streams: list[CaptureStream] = []

    def __reduce__(self) -> tuple:
        return type(self), (self.exact,)

    def generate(self, model: PreTrainedModel, request: DecodeRequest) -> torch.Tensor:
        """Input and new tokens, (batch, length + new) int64 on the input's device, as from upstream's ``generate``."""
        with self._onloaded(model) as device:
            if self.slot is None or self.slot.generator.device != device:
                self.slot = self._new_slot(device, 0)
            ids = request.input_ids.to(device)
            with drawing_as_caller(self.slot.generator):
                return _run(decode_n_tokens(model, self.slot, request, ids)).to(request.input_ids.device)

    def generate_together(
        self, model: PreTrainedModel, requests: Sequence[DecodeRequest], seeds: Sequence[int], count: int
    ) -> list[torch.Tensor]:
        """What `generate` gives for each request after ``torch.manual_seed(seed)``; `count` are decoded at a time.

        A step of one text leaves much of the GPU idle. Several texts are rows of one step where kernels serve that,
        `MOST_TEXTS` at most. Else they take turns, each with buffers, a stream and a random state of its own: their
        steps run at once. Either way they are the same as alone, so no text depends on the others.
        """
        count = min(count, len(requests))
        with self._onloaded(model) as device:
            step = self._find_shared_step(model, requests, count)
            slots: list[DecodeSlot] = []
            try:
                if step is not None:
                    batch = self._batch_for(model, step, requests, min(count, MOST_TEXTS), device)
                    texts = decode_together(model, batch, requests, seeds)
                    if batch.buffers.capacity > CACHE_STEP:
                        self.batch = None  # a large cache leaves its memory to the pictures
                else:
                    slots += [self._new_slot(device, 1 + number) for number in range(count)]
                    texts = _take_turns(model, slots, requests, seeds, device)
                return [text.to(request.input_ids.device) for text, request in zip(texts, requests, strict=True)]
            finally:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)  # before the memory of slots goes, in which steps may be

    def _find_shared_step(
        self, model: PreTrainedModel, requests: Sequence[DecodeRequest], count: int
    ) -> DecodeStep | None:
        """Kernels for steps of several texts, None where these can't share steps."""
        if self.find_step is None or count < 2 or not all(map(may_share_steps, requests)):
            return None
        return self.find_step(model)

    def _batch_for(
        self,
        model: PreTrainedModel,
        step: DecodeStep,
        requests: Sequence[DecodeRequest],
        rows: int,
        device: torch.device,
    ) -> DecodeBatch:
        """The rows of the last call, if they serve these requests as well, or new ones."""
        if self.batch is None or not self.batch.serves(model, requests, rows):
            self.batch = None  # before new ones take their memory
            self.batch = DecodeBatch(model, step, requests, rows, self._stream(device, 1))
        return self.batch

    def release(self) -> None:
        """Drop all buffers: their graphs read weights that are about to move."""
        self.batch = None
        if self.slot is not None:
            self.slot.buffers.clear()

    def _new_slot(self, device: torch.device, number: int) -> DecodeSlot:
        on = self._stream(device, number)
        if on is not None:
            on.stream.wait_stream(torch.cuda.current_stream(device))
        return DecodeSlot(torch.Generator(device), on, self.find_step)

    def _stream(self, device: torch.device, number: int) -> CaptureStream | None:
        """The stream of this number, the same one while the model stays on a device; None if there is none."""
        if device.type != "cuda":
            return None
        if self.streams and self.streams[0].device != device:
            self.streams.clear()
        try:
            while len(self.streams) <= number:
                self.streams.append(CaptureStream(device))
        except RuntimeError as error:
            logger.info("Tokens are decoded without a CUDA graph: %s", error)
            return None
        return self.streams[number]

    @contextmanager
    def _onloaded(self, model: PreTrainedModel) -> Iterator[torch.device]:
        """The device of the model, onloaded as a call of its ``forward`` would do it."""
        hook = hook_of(model)
        weight = model.get_input_embeddings().weight
        with (
            kept_on_device(model),
            # Of a model that is to be onloaded by upstream's hook, the hook's device.
            self.turn.take(torch.device(getattr(hook, "execution_device", None) or weight.device)),
            # No inference mode: buffers outlive the call, and later calls may not be in it.
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            tells = hasattr(hook, "on_offload")
            if hook is not None:
                hook.pre_forward(model)
                if tells:
                    hook.on_offload = self.release
            weight = model.get_input_embeddings().weight
            try:
                # Graphs are captured on the current device, whichever the model's is.
                with torch.cuda.device_of(weight):
                    yield weight.device
            except BaseException:
                self.slot = self.batch = None  # a failed capture spoils its generators and stream
                self.streams.clear()
                raise
            finally:
                if hook is not None and not tells:
                    self.release()


def _run(text: Text) -> torch.Tensor:
    """Decode a text to its end."""
    while True:
        try:
            next(text)
        except StopIteration as end:
            return end.value


def _take_turns(
    model: PreTrainedModel,
    slots: Sequence[DecodeSlot],
    requests: Sequence[DecodeRequest],
    seeds: Sequence[int],
    device: torch.device,
) -> list[torch.Tensor]:
    """Let each slot start one step in turn, until all texts are decoded."""
    done: dict[int, torch.Tensor] = {}
    waiting = iter(range(len(requests)))
    busy: dict[int, tuple[int, Text | None]]
    busy = {number: (next(waiting), None) for number in range(len(slots))}
    while busy:
        for number, (index, text) in list(busy.items()):
            slot, request = slots[number], requests[index]
            with torch.cuda.stream(None if slot.stream is None else slot.stream.stream):
                if text is None:
                    text = decode_n_tokens(model, slot, request, request.input_ids.to(device), seeds[index])
                    busy[number] = index, text
                try:
                    next(text)
                except StopIteration as end:
                    done[index] = end.value
                    busy.pop(number)
                    if (following := next(waiting, None)) is not None:
                        busy[number] = following, None
    for slot in slots:
        if slot.stream is not None:
            torch.cuda.current_stream(device).wait_stream(slot.stream.stream)
    return [done[index] for index in range(len(requests))]
