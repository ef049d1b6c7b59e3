"""Fast decoding: a static key/value cache and one captured decode step, sampling included.

Upstream's ``generate`` waits for Python, which starts every kernel of every token: 32 to 55 ms a token for the
full-size prompt enhancer on an H100. Here the whole step (embedding, layers, logits, warping, sampling, end test) is
one CUDA graph: 5.1 ms. On other devices the same step runs uncaptured, which is how its results are tested without a
GPU.
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
from .module_tensors import tensors_of
from .streams import CaptureStream

CACHE_ARGUMENT = cache_argument(Ministral3Model.forward)
CACHE_STEP = 512  # tokens by which the cache's capacity is rounded up; 54 MB for the full-size enhancer
LOOK_BACK = 4  # steps under way before the end of a finished one is looked at, so that the GPU never waits for Python


@dataclass
class DecodeBuffers:
    """What one decode step reads and writes, at addresses that stay.

    Attributes:
        cache: Keys and values, `capacity` tokens long.
        capacity: Tokens that there is room for.
        token: (batch, 1) int64, the newest token.
        position: (1, 1) int64, its position.
        count: () int64, new tokens so far.
        minimum: () int64, new tokens before which no end token may come.
        ended: (batch, 1) bool, whether the text has its end token.
        end: (vocabulary,) bool, True at end tokens.
        generator: Random generator to sample from, that of the slot.
        step: Kernels that the step is computed by; None if by the model's modules.
        graph: The step, where it is captured.
    """

    cache: StaticCache
    capacity: int
    token: torch.Tensor
    position: torch.Tensor
    count: torch.Tensor
    minimum: torch.Tensor
    ended: torch.Tensor
    end: torch.Tensor
    generator: torch.Generator
    step: DecodeStep | None = None
    graph: torch.cuda.CUDAGraph | None = None

    def reset(self, minimum: int) -> None:
        """Start a text of at least `minimum` new tokens."""
        self.cache.reset()
        for counter in (self.position, self.count, self.ended):
            counter.zero_()
        self.minimum.fill_(minimum)

    def continue_from(self, smaller: DecodeBuffers) -> None:
        """Take over a text from buffers that have no room for more of it."""
        self.reset(0)
        for old, new in zip(smaller.cache.layers, self.cache.layers, strict=True):
            new.keys[:, :, : smaller.capacity].copy_(old.keys)
            new.values[:, :, : smaller.capacity].copy_(old.values)
            if torch.is_tensor(getattr(old, "cumulative_length", None)):
                new.cumulative_length.copy_(old.cumulative_length)
        for name in ("token", "position", "count", "minimum", "ended"):
            getattr(self, name).copy_(getattr(smaller, name))


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
        # A graph reads weights, those of adapters too, where they were when it was captured.
        addresses = tuple(getattr(owner, name).data_ptr() for owner, name in tensors_of(model))
        settings = (*request.settings, weight.device, addresses)
        if self.settings != settings:
            self.buffers.clear()  # before new ones take their memory
            self.settings = settings
        if capacity not in self.buffers:
            buffers = new_buffers(model, request, capacity, self.generator)
            if self.find_step is not None and len(request.input_ids) <= decode_step.MOST_TEXTS:
                buffers.step = self.find_step(model)
            if self.stream is not None:
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
    buffers = slot.buffers_for(model, request, _rounded_up(length + CACHE_STEP // 2))
    buffers.reset(request.min_new_tokens)
    if seed is not None:
        slot.generator.manual_seed(seed)
    tokens, pending = [], []

    prefill(model, buffers, ids, request)
    for step in range(request.max_new_tokens):
        if step:
            if length + step > buffers.capacity:
                smaller, buffers = buffers, slot.buffers_for(model, request, 2 * buffers.capacity)
                buffers.continue_from(smaller)
            if buffers.graph:
                buffers.graph.replay()
            else:
                decode_one_token(model, buffers, request)
        tokens.append(buffers.token.clone())
        pending.append(_copy_to_host(buffers.ended))
        if len(pending) > LOOK_BACK and _all_true(*pending.pop(0)):
            break
        yield
    return torch.cat([ids, trim(torch.cat(tokens, 1), buffers.end)], 1)


def new_buffers(
    model: PreTrainedModel, request: DecodeRequest, capacity: int, generator: torch.Generator
) -> DecodeBuffers:
    """Empty buffers on the model's device."""
    batch, device = len(request.input_ids), model.get_input_embeddings().weight.device
    end = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
    end[list(request.eos_token_ids)] = True
    cache = StaticCache(config=model.config, max_cache_len=capacity)
    cache.early_initialization(
        batch, model.config.num_key_value_heads, model.config.head_dim, activation_dtype(model), device
    )
    return DecodeBuffers(
        cache=cache,
        capacity=capacity,
        token=torch.zeros(batch, 1, dtype=torch.long, device=device),
        position=torch.zeros(1, 1, dtype=torch.long, device=device),
        count=torch.zeros((), dtype=torch.long, device=device),
        minimum=torch.zeros((), dtype=torch.long, device=device),
        ended=torch.zeros(batch, 1, dtype=torch.bool, device=device),
        end=end,
        generator=generator,
    )


def activation_dtype(model: PreTrainedModel) -> torch.dtype:
    """dtype between the layers, in which the norms are. Tables of embeddings may keep 16 bits."""
    return model.model.norm.weight.dtype


def prefill(model: PreTrainedModel, buffers: DecodeBuffers, ids: torch.Tensor, request: DecodeRequest) -> None:
    """Run the prompt, (batch, length), through the model and sample the first token."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    logits = forward(model, buffers, ids, positions)
    buffers.position.fill_(ids.shape[1])
    sample(buffers, logits, request)


def decode_one_token(model: PreTrainedModel, buffers: DecodeBuffers, request: DecodeRequest) -> None:
    """The newest token in, the next one out. Everything stays on the device: this is what is captured."""
    if buffers.step is None:
        logits = forward(model, buffers, buffers.token, buffers.position)
    else:
        logits = decode_step.forward(model, buffers.step, buffers)
    buffers.position.add_(1)
    sample(buffers, logits, request)


def capture_decode_step(
    model: PreTrainedModel, buffers: DecodeBuffers, request: DecodeRequest, stream: CaptureStream
) -> None:
    """Record `decode_one_token` as the CUDA graph of `buffers`. The random state stays as it was."""
    generator = buffers.generator
    kept = generator.get_state()
    buffers.graph, _ = capture(
        lambda: decode_one_token(model, buffers, request), stream, warm_up=True, generator=generator
    )
    generator.set_state(kept)


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


def sample(buffers: DecodeBuffers, logits: torch.Tensor, request: DecodeRequest) -> None:
    """Set `buffers.token` to the next token, or to the padding token where the text has ended."""
    if request.do_sample and buffers.step is not None and decode_step.nucleus(request.warpers) is not None:
        _take(buffers, decode_step.sample(buffers.step, buffers, logits, request), request)
        return
    logits = logits.float().masked_fill(buffers.end & (buffers.count < buffers.minimum), -torch.inf)
    if request.do_sample:
        token = multinomial_sample_one_no_sync(request.warpers(None, logits).softmax(-1), buffers.generator)
    else:
        token = logits.argmax(-1, keepdim=True)
    _take(buffers, token, request)


def _take(buffers: DecodeBuffers, token: torch.Tensor, request: DecodeRequest) -> None:
    """Go on with these tokens, (batch, 1), or with padding where the text has ended."""
    buffers.token.copy_(torch.where(buffers.ended, request.pad_token_id, token))
    buffers.ended.logical_or_(buffers.end[buffers.token])
    buffers.count.add_(1)


def multinomial_sample_one_no_sync(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One draw from each row of `probabilities`, (batch, vocabulary): (batch, 1) int64, without waiting for the GPU.

    The function of gpt-fast, by exponential clocks: the index of the least q / p, with q ~ Exp(1), is drawn with
    probability p.
    """
    q = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / q).argmax(-1, keepdim=True)


def trim(tokens: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """New tokens, (batch, new), up to the end token of the longest text: without those decoded while looking back."""
    has_end = end[tokens]
    ends = torch.where(has_end.any(1), has_end.int().argmax(1) + 1, tokens.shape[1])
    return tokens[:, : int(ends.max())]


def _rounded_up(length: int) -> int:
    return -(-length // CACHE_STEP) * CACHE_STEP


def _copy_to_host(ended: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """`ended` on its way to the host, and the event after which it is there."""
    if not ended.is_cuda:
        return ended.clone(), None
    host = torch.empty(ended.shape, dtype=torch.bool, pin_memory=True)
    host.copy_(ended, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(ended.device))
    return host, event


def _all_true(host: torch.Tensor, event: torch.cuda.Event | None) -> bool:
    if event is not None:
        event.synchronize()
    return bool(host.all())
