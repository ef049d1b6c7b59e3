"""Several texts decoded by kernels in one step: a batch with a row a text.

A step of one text waits for the weights to be read. The rows share that and round as alone, so a text doesn't depend on
the others. Each has its part of the cache, its random generator and its settings. It is prefilled alone, as the modules
serve that, and where it ends the next text takes its row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from .decode_request import DecodeRequest
from .decode_step import DecodeStep
from .decoder import (
    LOOK_BACK,
    CopyToHost,
    DecodeBuffers,
    capture_decode_step,
    decode_one_token,
    empty_buffers,
    first_capacity,
    new_buffers,
    prefill,
    rounded_up,
)
from .module_tensors import captured_state
from .streams import CaptureStream


class Text(NamedTuple):
    """A text under way.

    Attributes:
        request: Number of its request.
        length: Tokens of its input.
        most: Most new tokens.
        start: Number of the batch's step before which its first token came.
    """

    request: int
    length: int
    most: int
    start: int

    def tokens_after(self, steps: int) -> int:
        """Tokens of the text when the batch has done this many steps, unless it has ended earlier."""
        return self.length + min(steps - self.start + 1, self.most)


class DecodeBatch:
    """Rows that texts are decoded in.

    The cache has room for the longest text in it and grows with that, up to what the requests may need: rounding by the
    kernels doesn't depend on it. The model isn't kept: that owns the batch, and has to go without garbage collection.

    Attributes:
        step: Kernels that serve it.
        stream: To capture on; None where there is no CUDA.
        generators: Random generators of the rows.
        largest_top_k: Of the requests.
        limit: Capacity that is enough for each text that is decoded.
        buffers: What the rows are decoded with.
        state: What their captured step hangs on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        step: DecodeStep,
        requests: Sequence[DecodeRequest],
        rows: int,
        stream: CaptureStream | None,
    ) -> None:
        self.step, self.stream = step, stream
        device = model.get_input_embeddings().weight.device
        self.generators = tuple(torch.Generator(device) for _ in range(rows))
        self.limit = 0
        self.largest_top_k = largest_top_k(requests)
        self.state = captured_state(model)
        self.buffers = self._new_buffers(model, max(map(first_capacity_of, requests[:rows])))

    def serves(self, model: PreTrainedModel, requests: Sequence[DecodeRequest], rows: int) -> bool:
        """Whether these requests can be decoded in the same rows, once those before them have ended."""
        return (
            rows == len(self.generators)
            and largest_top_k(requests) <= self.largest_top_k
            and captured_state(model) == self.state
        )

    def start(self, model: PreTrainedModel, row: int, request: DecodeRequest, seed: int) -> None:
        """Prefill a text and let a row go on with it."""
        generator = self.generators[row]
        ids = request.input_ids.to(generator.device)
        capacity = first_capacity(ids.shape[1])
        self.make_room(model, capacity)
        alone = new_buffers(model, request, capacity, generator)
        alone.step = self.step
        generator.manual_seed(seed)
        prefill(model, alone, ids, request)
        self.buffers.continue_from(alone, slice(row, row + 1))

    def make_room(self, model: PreTrainedModel, tokens: int) -> None:
        """Let the cache have room for texts of this many tokens."""
        if tokens <= self.buffers.capacity:
            return
        smaller = self.buffers
        self.buffers = self._new_buffers(model, grown_capacity(smaller.capacity, tokens, self.limit))
        self.buffers.continue_from(smaller)

    def decode(self, model: PreTrainedModel) -> None:
        """One more token in each row whose text has not ended."""
        if self.buffers.graph:
            self.buffers.graph.replay()
        else:
            decode_one_token(model, self.buffers, None)

    def _new_buffers(self, model: PreTrainedModel, capacity: int) -> DecodeBuffers:
        buffers = empty_buffers(model, len(self.generators), capacity, self.largest_top_k, self.generators)
        buffers.step = self.step
        if self.stream is not None:
            capture_decode_step(model, buffers, None, self.stream)
        return buffers


def largest_top_k(requests: Sequence[DecodeRequest]) -> int:
    """Of requests that `may_share_steps`."""
    return max(request.sampling.top_k for request in requests if request.sampling is not None)


def first_capacity_of(request: DecodeRequest) -> int:
    return first_capacity(request.input_ids.shape[1])


def most_capacity(requests: Sequence[DecodeRequest]) -> int:
    """Capacity that is enough for each of the requests."""
    return max(
        max(first_capacity_of(each), rounded_up(each.input_ids.shape[1] + each.max_new_tokens)) for each in requests
    )


def grown_capacity(capacity: int, tokens: int, limit: int) -> int:
    """Capacity of the cache that follows one of this capacity. Both are there for a moment.

    Args:
        capacity: Of the cache that is too small.
        tokens: That there has to be room for.
        limit: Tokens that no text exceeds.
    """
    return max(tokens, min(2 * capacity, limit))


def may_share_steps(request: DecodeRequest) -> bool:
    """Whether a row of a batch serves a request: it has one text, and the step's kernel samples as it asks for."""
    return len(request.input_ids) == 1 and request.sampling is not None


def decode_together(
    model: PreTrainedModel, batch: DecodeBatch, requests: Sequence[DecodeRequest], seeds: Sequence[int]
) -> list[torch.Tensor]:
    """Prefill and decode texts, in order; each takes the first row that is free.

    Args:
        model: The prompt enhancer, on its device.
        batch: Rows to decode in, which serve these requests.
        requests: What to decode.
        seeds: Of the texts' generators.

    Returns:
        Input and new tokens of each, (1, length + new) int64 on the model's device.
    """
    batch.limit = most_capacity(requests)
    waiting = deque(range(len(requests)))
    rows: list[Text | None] = [None] * len(batch.generators)
    history: list[torch.Tensor] = []  # newest tokens before each step
    pending: deque[tuple[int, list[Text | None], CopyToHost]] = deque()
    found: dict[int, tuple[int, int, int]] = {}  # row, first step and last step of a request's tokens
    while waiting or any(rows):
        for row, text in enumerate(rows):
            if text is None and waiting:
                request = requests[number := waiting.popleft()]
                batch.start(model, row, request, seeds[number])
                rows[row] = Text(number, request.input_ids.shape[1], request.max_new_tokens, len(history))
        pending.append((len(history), rows.copy(), CopyToHost(batch.buffers.ended)))
        history.append(batch.buffers.token.clone())
        batch.make_room(model, max(text.tokens_after(len(history)) for text in rows if text is not None))
        batch.decode(model)
        if len(pending) > LOOK_BACK:
            step, texts, ended = pending.popleft()
            for row, has_ended in enumerate(ended.wait().flatten().tolist()):
                text = texts[row]
                if has_ended and text is not None and rows[row] is text:
                    rows[row] = None
                    found[text.request] = row, text.start, step
    tokens = torch.cat(history, 1)
    texts_found = [found[number] for number in range(len(requests))]
    return [
        torch.cat([request.input_ids.to(tokens.device), tokens[row : row + 1, first : last + 1]], 1)
        for request, (row, first, last) in zip(requests, texts_found, strict=True)
    ]
