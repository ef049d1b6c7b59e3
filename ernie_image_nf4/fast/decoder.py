"""Fast decoding: a static key/value cache and one captured decode step, sampling included.

Upstream's ``generate`` waits for Python, which starts every kernel of every token: 32 to 55 ms a token for the
full-size prompt enhancer on an H100. Here the whole step (embedding, layers, logits, warping, sampling, end test) is
one CUDA graph: 5.1 ms by the model's modules, and less by kernels of its own (`decode_step`). On other devices the same
step runs uncaptured, which is how its results are tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch
from transformers import PreTrainedModel, StaticCache
from transformers.models.ministral3.modeling_ministral3 import Ministral3Model

from ..upstream.attention import EfficientAttention
from ..upstream.models import cache_argument
from . import decode_step
from .cuda_graphs import capture
from .decode_request import DecodeRequest
from .decode_step import DecodeStep
from .module_tensors import captured_state
from .prefill import forward_prompt
from .streams import CaptureStream

CACHE_ARGUMENT = cache_argument(Ministral3Model.forward)
CACHE_STEP = 512  # tokens by which the cache's capacity is rounded up; 54 MB for the full-size enhancer
LOOK_BACK = 4  # steps under way before the end of a finished one is looked at, so that the GPU never waits for Python


# Of `DecodeBuffers`, what each row has of its own beside its part of the cache.
ROW_STATE = (
    "token", "position", "count", "minimum", "most", "ended", "end", "padding", "temperature", "top_k", "top_p",
)  # fmt: skip


@dataclass
class DecodeBuffers:
    """What one decode step reads and writes, at addresses that stay. Each row is a text.

    Attributes:
        cache: Keys and values, `capacity` tokens long.
        capacity: Tokens that there is room for.
        token: (rows, 1) int64, the newest token.
        position: (rows, 1) int64, its position. That of a text that has ended stays.
        count: (rows, 1) int64, new tokens so far.
        minimum: (rows, 1) int64, new tokens before which no end token may come.
        most: (rows, 1) int64, new tokens with which a text has ended.
        ended: (rows, 1) bool, whether the text has its end token or all of its tokens.
        end: (rows, vocabulary) bool, True at end tokens.
        padding: (rows, 1) int64, the token that follows the end while other rows go on.
        temperature: (rows, 1) float32, as the step's kernel samples; 0 for the likeliest token.
        top_k: (rows, 1) int64, 0 for all.
        top_p: (rows, 1) float32.
        largest_top_k: No row's `top_k` is larger.
        generators: Random generators to sample from: one for all rows or one for each; none if all are greedy.
        step: Kernels that the step is computed by; None if by the model's modules.
        graph: The step, where it is captured.
    """

    cache: StaticCache
    capacity: int
    token: torch.Tensor
    position: torch.Tensor
    count: torch.Tensor
    minimum: torch.Tensor
    most: torch.Tensor
    ended: torch.Tensor
    end: torch.Tensor
    padding: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    largest_top_k: int
    generators: tuple[torch.Generator, ...]
    step: DecodeStep | None = None
    graph: torch.cuda.CUDAGraph | None = None

    def reset(self, request: DecodeRequest) -> None:
        """Start the texts of a request, one in each row."""
        self.cache.reset()
        for state in (self.position, self.count, self.ended, self.end):
            state.zero_()
        self.end[:, list(request.eos_token_ids)] = True
        self.padding.fill_(request.pad_token_id)
        self.minimum.fill_(request.min_new_tokens)
        self.most.fill_(min(request.max_new_tokens, torch.iinfo(self.most.dtype).max))
        if request.sampling is not None:
            self.temperature.fill_(request.sampling.temperature)
            self.top_k.fill_(min(request.sampling.top_k, self.end.shape[1]))
            self.top_p.fill_(request.sampling.top_p)

    def continue_from(self, others: DecodeBuffers, rows: slice = slice(None)) -> None:
        """Take over the texts of other buffers, which have no more capacity, into these rows."""
        for old, new in zip(others.cache.layers, self.cache.layers, strict=True):
            new.keys[rows, :, : others.capacity].copy_(old.keys)
            new.values[rows, :, : others.capacity].copy_(old.values)
            if torch.is_tensor(getattr(old, "cumulative_length", None)):
                new.cumulative_length.copy_(old.cumulative_length)
        for name in ROW_STATE:
            getattr(self, name)[rows].copy_(getattr(others, name))


@dataclass
class DecodeSlot:
    """What one text at a time is decoded with.

    There are buffers for each capacity: rounding may depend on it, and a text must not depend on those before it.

    Attributes:
        generator: Random generator to sample from, on the model's device. torch's global one is the process's, and
            other threads draw from it, too.
        stream: To capture on, and to decode on if there are several slots; None where there is no CUDA.
        find_step: Finds kernels for the model's steps; None for none.
        buffers: By capacity. A later call of the same kind takes them again.
        settings: What the graphs of the buffers were captured for.
    """

    generator: torch.Generator
    stream: CaptureStream | None = None
    find_step: Callable[[PreTrainedModel], DecodeStep | None] | None = None
    buffers: dict[int, DecodeBuffers] = field(default_factory=dict)
    settings: tuple = ()

    def buffers_for(self, model: PreTrainedModel, request: DecodeRequest, capacity: int) -> DecodeBuffers:
        """Buffers of this kind and capacity, as they were left, or new ones with a captured step."""
        weight = model.get_input_embeddings().weight
        settings = (*request.settings, weight.device, captured_state(model))
        if self.settings != settings:
            self.buffers.clear()  # before new ones take their memory
            self.settings = settings
        if capacity not in self.buffers:
            buffers = new_buffers(model, request, capacity, self.generator)
            if self.find_step is not None and len(request.input_ids) <= decode_step.MOST_TEXTS:
                buffers.step = self.find_step(model)
            if self.stream is not None and not decode_step.is_disturbed(model):
                capture_decode_step(model, buffers, request, self.stream)
            self.buffers[capacity] = buffers
        return self.buffers[capacity]


def decode_n_tokens(
    model: PreTrainedModel, slot: DecodeSlot, request: DecodeRequest, ids: torch.Tensor, seed: int | None = None
) -> Generator[None, None, torch.Tensor]:
    """Prefill and decode a text. Yields after each step has been started, so that several texts can take turns.

    Args:
        model: The model, on its device.
        slot: What to decode with.
        request: What to decode.
        ids: Its input on the model's device, (batch, length) int64.
        seed: Sets the slot's generator; None leaves it as it is.

    Returns:
        Input and new tokens, (batch, length + new) int64.
    """
    length = ids.shape[1]
    buffers = slot.buffers_for(model, request, first_capacity(length))
    buffers.reset(request)
    if seed is not None:
        slot.generator.manual_seed(seed)
    tokens, pending = [], []

    prefill(model, buffers, ids, request)
    for step in range(request.max_new_tokens):
        if step:
            if length + step > buffers.capacity:
                smaller, buffers = buffers, slot.buffers_for(model, request, 2 * buffers.capacity)
                buffers.reset(request)
                buffers.continue_from(smaller)
            if buffers.graph:
                buffers.graph.replay()
            else:
                decode_one_token(model, buffers, request)
        tokens.append(buffers.token.clone())
        pending.append(CopyToHost(buffers.ended))
        if len(pending) > LOOK_BACK and bool(pending.pop(0).wait().all()):
            break
        yield
    return torch.cat([ids, trim(torch.cat(tokens, 1), buffers.end)], 1)


def new_buffers(
    model: PreTrainedModel, request: DecodeRequest, capacity: int, generator: torch.Generator
) -> DecodeBuffers:
    """Buffers for the texts of a request, on the model's device."""
    largest_top_k = 0 if request.sampling is None else request.sampling.top_k
    generators = (generator,) if request.do_sample else ()
    buffers = empty_buffers(model, len(request.input_ids), capacity, largest_top_k, generators)
    buffers.reset(request)
    return buffers


def empty_buffers(
    model: PreTrainedModel, rows: int, capacity: int, largest_top_k: int, generators: tuple[torch.Generator, ...]
) -> DecodeBuffers:
    """Buffers in which all texts have ended, on the model's device."""
    vocabulary, device = model.config.vocab_size, model.get_input_embeddings().weight.device
    cache = StaticCache(config=model.config, max_cache_len=capacity)
    cache.early_initialization(
        rows, model.config.num_key_value_heads, model.config.head_dim, activation_dtype(model), device
    )

    def numbers(dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.zeros(rows, 1, dtype=dtype, device=device)

    return DecodeBuffers(
        cache=cache,
        capacity=capacity,
        token=numbers(),
        position=numbers(),
        count=numbers(),
        minimum=numbers(),
        most=numbers(),
        ended=numbers(torch.bool).fill_(True),
        end=torch.zeros(rows, vocabulary, dtype=torch.bool, device=device),
        padding=numbers(),
        temperature=numbers(torch.float32),
        top_k=numbers(),
        top_p=numbers(torch.float32),
        largest_top_k=min(largest_top_k, vocabulary),
        generators=generators,
    )


def activation_dtype(model: PreTrainedModel) -> torch.dtype:
    """dtype between the layers, in which the norms are. Tables of embeddings may keep 16 bits."""
    return model.model.norm.weight.dtype


def prefill(model: PreTrainedModel, buffers: DecodeBuffers, ids: torch.Tensor, request: DecodeRequest | None) -> None:
    """Run the prompt, (batch, length), through the model and sample the first token.

    `request` is None as in `decode_one_token`.
    """
    if buffers.step is not None and len(ids) == 1:
        logits = forward_prompt(model, buffers.step, buffers, ids)
    else:
        logits = forward(model, buffers, ids, torch.arange(ids.shape[1], device=ids.device)[None])
    buffers.position.fill_(ids.shape[1])
    sample(buffers, logits, request)


def decode_one_token(model: PreTrainedModel, buffers: DecodeBuffers, request: DecodeRequest | None) -> None:
    """The newest token in, the next one out. Everything stays on the device: this is what is captured.

    `request` is None where rows have settings of their own, which only the step's kernels know.
    """
    if buffers.step is None:
        # All texts that go on are at the same position.
        logits = forward(model, buffers, buffers.token, buffers.position.amax(0, keepdim=True))
    else:
        logits = decode_step.forward(model, buffers.step, buffers)
    sample(buffers, logits, request)
    buffers.position.add_(~buffers.ended)


def capture_decode_step(
    model: PreTrainedModel, buffers: DecodeBuffers, request: DecodeRequest | None, stream: CaptureStream
) -> None:
    """Record `decode_one_token` as the CUDA graph of `buffers`. The random states stay as they were."""
    kept = [generator.get_state() for generator in buffers.generators]
    buffers.graph, _ = capture(
        lambda: decode_one_token(model, buffers, request), stream, warm_up=True, generators=buffers.generators
    )
    for generator, state in zip(buffers.generators, kept, strict=True):
        generator.set_state(state)


def forward(model: PreTrainedModel, buffers: DecodeBuffers, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits behind the last token, (batch, vocabulary). `positions`: (1, length), of `ids`."""
    # A mask in full: to make one itself, upstream would look from Python at how far the cache is filled.
    mask = torch.arange(buffers.capacity, device=ids.device) <= positions[..., None]
    if ids.is_cuda:  # what attention makes of a mask, once instead of in every layer
        mask = torch.zeros_like(mask, dtype=activation_dtype(model)).masked_fill_(~mask, -torch.inf)
    with EfficientAttention() if ids.is_cuda else nullcontext():
        output = model.model(
            input_ids=ids,
            position_ids=positions.expand(len(ids), -1),
            attention_mask=mask[None].expand(len(ids), -1, -1, -1),
            use_cache=True,
            cache_position=positions[0],
            **{cast(str, CACHE_ARGUMENT): buffers.cache},
        )
    return model.lm_head(output.last_hidden_state[:, -1])


def sample(buffers: DecodeBuffers, logits: torch.Tensor, request: DecodeRequest | None) -> None:
    """Set `buffers.token` to the next token, or to the padding token where the text has ended."""
    logits = logits.masked_fill(buffers.end & (buffers.count < buffers.minimum), -torch.inf)
    if buffers.step is not None and (request is None or request.sampling is not None):
        token = decode_step.sample(buffers.step, buffers, logits)
    elif request is not None and request.do_sample:
        probabilities = request.warpers(None, logits.float()).softmax(-1)
        token = multinomial_sample_one_no_sync(probabilities, buffers.generators[0])
    else:
        token = logits.argmax(-1, keepdim=True)
    buffers.token.copy_(torch.where(buffers.ended, buffers.padding, token))
    buffers.count.add_(1)
    buffers.ended.logical_or_(buffers.end.gather(1, buffers.token) | (buffers.count >= buffers.most))


def multinomial_sample_one_no_sync(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One draw from each row of `probabilities`, (batch, vocabulary): (batch, 1) int64, without waiting for the GPU.

    The function of gpt-fast, by exponential clocks: the index of the least q / p, with q ~ Exp(1), is drawn with
    probability p.
    """
    q = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / q).argmax(-1, keepdim=True)


def trim(tokens: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """New tokens, (batch, new), up to the end token of the longest text: without those decoded while looking back."""
    has_end = end.gather(1, tokens)
    ends = torch.where(has_end.any(1), has_end.int().argmax(1) + 1, tokens.shape[1])
    return tokens[:, : int(ends.max())]


def first_capacity(length: int) -> int:
    """Capacity that a text of this input starts with. Its prefill may round by it."""
    return rounded_up(length + CACHE_STEP // 2)


def rounded_up(length: int) -> int:
    """A cache's capacity for this many tokens."""
    return -(-length // CACHE_STEP) * CACHE_STEP


class CopyToHost:
    """A small tensor on its way to the host, which doesn't wait for it until it is asked for."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if not tensor.is_cuda:
            self._host = tensor.clone()
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> torch.Tensor:
        """The copy."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
