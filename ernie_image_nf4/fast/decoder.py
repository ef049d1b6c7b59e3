"""Fast decoding for the prompt enhancer: a static cache and one captured decode step, sampling included.

Upstream's ``generate`` waits for Python, which starts every kernel of every token. Here the whole step (embedding, layers, logits,
warping, sampling, end test) is one CUDA graph. On other devices the same step runs uncaptured, which is how its results are tested
without a GPU.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, StaticCache
from transformers.generation import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.models.ministral3 import modeling_ministral3
from transformers.models.ministral3.modeling_ministral3 import Ministral3Model, Ministral3RMSNorm

from .cuda_graphs import capture
from .module_tensors import tensors_of
from .ops import elementwise as kernels

ARGUMENTS = {
    "attention_mask", "do_sample", "eos_token_id", "input_ids", "max_new_tokens", "min_new_tokens", "pad_token_id", "temperature",
    "top_k", "top_p",
}  # fmt: skip
# These work on the logits alone, with constants: they can be captured. Minimum lengths are part of the step itself.
WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
MINIMUM = (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor)
CACHE_STEP = 512  # tokens by which the static cache grows; 54 MB for the full-size enhancer
# Without cuDNN's, which in PyTorch 2.11 on an H100 gave other last bits now and then for the same decode step.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
LOOK_BACK = 4  # decode steps under way before a finished one is looked at, so that the GPU never waits for Python


@dataclass(frozen=True)
class Request:
    """A call of ``generate`` that the fast path can serve.

    Attributes:
        input_ids: (batch, length) int64, no padding.
        max_new_tokens: Tokens to generate at most.
        min_new_tokens: Tokens before which no end token may come.
        do_sample: Whether to sample from the warped distribution, or to take the likeliest token.
        warpers: Temperature, top-k and top-p as upstream's own warpers, in upstream's order.
        eos_token_ids: Tokens that end a text; may be empty.
        pad_token_id: What follows the end token where other rows of the batch go on.
    """

    input_ids: torch.Tensor
    max_new_tokens: int
    min_new_tokens: int
    do_sample: bool
    warpers: LogitsProcessorList
    eos_token_ids: tuple[int, ...]
    pad_token_id: int

    @property
    def settings(self) -> tuple:
        """All that a captured step depends on, apart from the cache's size."""
        warpers = tuple((type(item).__name__, *sorted(vars(item).items())) for item in self.warpers)
        return len(self.input_ids), self.do_sample, warpers, self.eos_token_ids, self.pad_token_id


def enable_fast_decoding(model: PreTrainedModel) -> None:
    """Let ``model.generate`` serve by a captured step the calls that it can, and all others by upstream's code.

    ``model.generate`` keeps its meaning: greedy decoding gives upstream's tokens, unless rounding decides between two that are
    about equally likely; sampling draws from the same distribution (from torch's global random state, though not the same
    draws). `disable_fast_decoding` undoes it.
    """
    upstream, decoder = model.generate, Decoder(model)

    @functools.wraps(upstream)
    def generate(*args, **kwargs):
        request = find_request(model, args, kwargs)
        return decoder.generate(request) if request else upstream(*args, **kwargs)

    model.generate, generate.decoder = generate, decoder
    for norm in norms(model):
        norm.forward = types.MethodType(fused_norm, norm)


def disable_fast_decoding(model: PreTrainedModel) -> None:
    """Give ``model.generate``, and its norms, back to upstream."""
    vars(model).pop("generate", None)
    for norm in norms(model):
        vars(norm).pop("forward", None)


def norms(model: PreTrainedModel) -> list[Ministral3RMSNorm]:
    """The norms, several kernels each as upstream has them."""
    return [module for module in model.modules() if isinstance(module, Ministral3RMSNorm)]


def fused_norm(self: Ministral3RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """As upstream's forward, in one kernel where there are kernels. Gradients need upstream's."""
    if torch.is_grad_enabled():
        return type(self).forward(self, x)
    return kernels.rms_norm(x, self.weight, self.variance_epsilon)


def find_request(model: PreTrainedModel, args: tuple, kwargs: dict) -> Request | None:
    """The call ``model.generate(*args, **kwargs)`` as a `Request`, or None if the fast path doesn't know all it asks for."""
    input_ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    if args or not ARGUMENTS.issuperset(kwargs) or input_ids is None or input_ids.ndim != 2 or 0 in input_ids.shape:
        return None
    if model.config._attn_implementation != "sdpa" or (mask is not None and not bool(mask.all())):
        return None
    options = {key: value for key, value in kwargs.items() if key not in ("input_ids", "attention_mask")}
    config, unknown = model._prepare_generation_config(None, **options)
    if (
        unknown
        or config.max_new_tokens is None
        or (config.num_beams or 1) > 1
        or (config.num_return_sequences or 1) > 1
    ):
        return None
    model._prepare_special_tokens(config, device=input_ids.device)
    length = input_ids.shape[1]
    processors = model._get_logits_processor(
        config, input_ids_seq_length=length, device=input_ids.device, model_kwargs={}
    )
    warpers = [item for item in processors if isinstance(item, WARPERS)]
    if any(not isinstance(item, (*WARPERS, *MINIMUM)) for item in processors) or config.pad_token_id is None:
        return None
    eos = config.eos_token_id
    return Request(
        input_ids=input_ids,
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=max(config.min_new_tokens or 0, (config.min_length or 0) - length),
        do_sample=bool(config.do_sample),
        warpers=LogitsProcessorList(warpers if config.do_sample else []),
        eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        pad_token_id=config.pad_token_id,
    )


@dataclass
class State:
    """What one decode step reads and changes, at addresses that stay.

    Attributes:
        cache: Keys and values, `capacity` tokens long.
        token: (batch, 1) int64, the newest token.
        position: (1, 1) int64, its position.
        count: () int64, new tokens so far.
        minimum: () int64, new tokens before which no end token may come.
        ended: (batch, 1) bool, whether the text has its end token.
        end: (vocabulary,) bool, True at end tokens.
        generator: To sample from; None for the global random state.
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
    generator: torch.Generator | None = None
    graph: torch.cuda.CUDAGraph | None = field(default=None)

    def reset(self, minimum: int) -> None:
        self.cache.reset()
        for counter in (self.position, self.count, self.ended):
            counter.zero_()
        self.minimum.fill_(minimum)

    def continue_from(self, smaller: State) -> None:
        """Take over a text from a state that has no room for more of it."""
        self.reset(0)
        for old, new in zip(smaller.cache.layers, self.cache.layers, strict=True):
            new.keys[:, :, : smaller.capacity].copy_(old.keys)
            new.values[:, :, : smaller.capacity].copy_(old.values)
            if torch.is_tensor(getattr(old, "cumulative_length", None)):
                new.cumulative_length.copy_(old.cumulative_length)
        for name in ("token", "position", "count", "minimum", "ended"):
            getattr(self, name).copy_(getattr(smaller, name))


@dataclass
class Writer:
    """What one text at a time is written with.

    There is one state for each capacity: rounding may depend on it, and a text is not to depend on those before it.

    Attributes:
        generator: To sample from; None for the global random state.
        stream: To capture on, and to work on if texts are written together; None where there is no CUDA.
        states: By capacity; those of an earlier call of the same kind are used again.
        settings: What the states' graphs were captured for.
    """

    generator: torch.Generator | None = None
    stream: torch.cuda.Stream | None = None
    states: dict[int, State] = field(default_factory=dict)
    settings: tuple = ()


class Decoder:
    """Prefill and decode of one model; keeps states and their graphs for the next call of the same kind."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.writer = Writer()
        self.streams: list[torch.cuda.Stream] = []
        self.lock = threading.Lock()

    def generate(self, request: Request) -> torch.Tensor:
        """Input and new tokens, (batch, length + new) int64 on the input's device, as upstream's ``generate`` returns them."""
        with self._model_in_place() as device:
            self.writer.stream = self._stream(device, 0)
            text = self._write(self.writer, request, request.input_ids.to(device))
            return _finished(text).to(request.input_ids.device)

    def generate_together(self, requests: Sequence[Request], seeds: Sequence[int], count: int) -> list[torch.Tensor]:
        """As `generate` for each request, the random state seeded with its seed; `count` texts are written at a time.

        A step of one text leaves much of the GPU idle. Here several texts take turns, each with a state, a stream and a random
        state of its own: their steps run at once, and are the same as alone, so that no text depends on the others.
        """
        with self._model_in_place() as device:
            writers = [self._new_writer(device, number) for number in range(min(count, len(requests)))]
            try:
                texts = self._take_turns(writers, requests, seeds, device)
                return [text.to(request.input_ids.device) for text, request in zip(texts, requests, strict=True)]
            finally:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)  # before memory goes that steps under way work in

    def _take_turns(
        self, writers: Sequence[Writer], requests: Sequence[Request], seeds: Sequence[int], device: torch.device
    ) -> list[torch.Tensor]:
        """Let each writer start a step in turn, until all texts are written."""
        texts: list[torch.Tensor | None] = [None] * len(requests)
        waiting = iter(range(len(requests)))
        busy = {number: (next(waiting), None) for number in range(len(writers))}
        while busy:
            for number, (index, text) in list(busy.items()):
                writer, request = writers[number], requests[index]
                with torch.cuda.stream(writer.stream):
                    if text is None:
                        text = self._write(writer, request, request.input_ids.to(device), seeds[index])
                        busy[number] = index, text
                    try:
                        next(text)
                    except StopIteration as end:
                        texts[index] = end.value
                        busy.pop(number)
                        if (following := next(waiting, None)) is not None:
                            busy[number] = following, None
        for writer in writers:
            if writer.stream is not None:
                torch.cuda.current_stream(device).wait_stream(writer.stream)
        return texts

    def forget(self) -> None:
        """Drop all states: their graphs read weights that are about to move."""
        self.writer.states.clear()

    def _new_writer(self, device: torch.device, number: int) -> Writer:
        stream = self._stream(device, 1 + number)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))
        return Writer(torch.Generator(device), stream)

    def _stream(self, device: torch.device, number: int) -> torch.cuda.Stream | None:
        """The same for each number while the model stays on a device."""
        if device.type != "cuda":
            return None
        if self.streams and self.streams[0].device != device:
            self.streams.clear()
        while len(self.streams) <= number:
            self.streams.append(torch.cuda.Stream(device))
        return self.streams[number]

    @contextmanager
    def _model_in_place(self) -> Iterator[torch.device]:
        """The device of the model, which an offloaded one is brought to, as upstream's forward would do."""
        hook = getattr(self.model, "_hf_hook", None)
        # The state outlives the call, and others may not be in inference mode.
        with self.lock, torch.inference_mode(False), torch.no_grad():
            if hook is not None:
                hook.pre_forward(self.model)
            if hasattr(hook, "on_leaving"):
                hook.on_leaving = self.forget
            weight = self.model.get_input_embeddings().weight
            try:
                # Graphs are captured on the current device, whichever the model's is.
                with torch.cuda.device_of(weight):
                    yield weight.device
            except BaseException:
                self.forget()
                raise
            finally:
                if hook is not None and not hasattr(hook, "on_leaving"):
                    self.forget()

    def _write(
        self, writer: Writer, request: Request, ids: torch.Tensor, seed: int | None = None
    ) -> Generator[None, None, torch.Tensor]:
        """Start one step after the other, and yield in between; returns input and new tokens, (batch, length + new)."""
        length = ids.shape[1]
        state = self._state(writer, request, _rounded(length + CACHE_STEP // 2))
        state.reset(request.min_new_tokens)
        if seed is not None:
            writer.generator.manual_seed(seed)
        tokens, pending = [], []

        prefill(self.model, state, ids, request)
        for step in range(request.max_new_tokens):
            if step:
                if length + step > state.capacity:
                    smaller, state = state, self._state(writer, request, 2 * state.capacity)
                    state.continue_from(smaller)
                if state.graph:
                    state.graph.replay()
                else:
                    decode(self.model, state, request)
            tokens.append(state.token.clone())
            pending.append(_copied(state.ended))
            if len(pending) > LOOK_BACK and _all_true(pending.pop(0)):
                break
            yield
        return torch.cat([ids, trimmed(torch.cat(tokens, 1), state.end)], 1)

    def _state(self, writer: Writer, request: Request, capacity: int) -> State:
        """The state of this kind and capacity, as it was left, or a new one."""
        weight = self.model.get_input_embeddings().weight
        # A graph reads weights where they were when it was captured, adapters included.
        addresses = tuple(getattr(owner, name).data_ptr() for owner, name in tensors_of(self.model))
        settings = (*request.settings, weight.device, addresses)
        if writer.settings != settings:
            writer.states.clear()  # before new ones take their memory
            writer.settings = settings
        if capacity not in writer.states:
            state = new_state(self.model, request, capacity, writer.generator)
            if weight.is_cuda:
                capture_decode(self.model, state, request, writer.stream)
            writer.states[capacity] = state
        return writer.states[capacity]


def _finished(text: Generator[None, None, torch.Tensor]) -> torch.Tensor:
    while True:
        try:
            next(text)
        except StopIteration as end:
            return end.value


def new_state(
    model: PreTrainedModel, request: Request, capacity: int, generator: torch.Generator | None = None
) -> State:
    """An empty state on the model's device."""
    embeddings = model.get_input_embeddings().weight
    batch, device = len(request.input_ids), embeddings.device
    end = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
    end[list(request.eos_token_ids)] = True
    cache = StaticCache(config=model.config, max_cache_len=capacity)
    cache.early_initialization(batch, model.config.num_key_value_heads, model.config.head_dim, embeddings.dtype, device)
    return State(
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


def prefill(model: PreTrainedModel, state: State, ids: torch.Tensor, request: Request) -> None:
    """Run the prompt, (batch, length), through the model and choose the first token."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    logits = forward(model, state, ids, positions)
    state.position.fill_(ids.shape[1])
    choose(state, logits, request)


def decode(model: PreTrainedModel, state: State, request: Request) -> None:
    """One step: the newest token in, the next one out. Everything stays on the device; this is what is captured."""
    logits = forward(model, state, state.token, state.position)
    state.position.add_(1)
    choose(state, logits, request)


def forward(model: PreTrainedModel, state: State, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits behind the last token, (batch, vocabulary) float32. `positions`: (1, length) of `ids`."""
    # Given in full, so that upstream needs no Python-side look at how far the cache is filled.
    mask = torch.arange(state.capacity, device=ids.device) <= positions[..., None]
    with sdpa_kernel(ATTENTION), lean_layers(model.dtype):
        output = model.model(
            input_ids=ids,
            position_ids=positions.expand(len(ids), -1),
            attention_mask=mask[None].expand(len(ids), -1, -1, -1),
            use_cache=True,
            cache_position=positions[0],
            **{CACHE: state.cache},
        )
    return model.lm_head(output.last_hidden_state[:, -1]).float()


# transformers renamed the argument in 5.24.
CACHE = "cache" if "cache" in inspect.signature(Ministral3Model.forward).parameters else "past_key_values"
MODELING = threading.RLock()  # whose functions are exchanged
ROTARY = "apply_rotary_pos_emb"
ATTENTION_SCALES = ("get_llama_4_attn_scale", "_get_llama_4_attn_scale")  # its names in versions of transformers


@contextmanager
def lean_layers(dtype: torch.dtype) -> Iterator[None]:
    """Let the layers do the same to the same values with fewer small operations, while the context lasts; other threads get upstream's.

    What depends on the positions alone is computed in the first layer for all of them, and queries and keys are rotated together: with
    one token a step takes as long as starting its operations does, whatever they compute. A transformers that lacks one of
    the functions, by the names that are known here, keeps its layers.
    """
    owner = threading.get_ident()
    scale_name = next((name for name in ATTENTION_SCALES if hasattr(modeling_ministral3, name)), None)
    if scale_name is None or not hasattr(modeling_ministral3, ROTARY):
        yield
        return
    with MODELING:
        scale, rotate = (getattr(modeling_ministral3, name) for name in (scale_name, ROTARY))
        scale_once = _remembered(lambda *args: scale(*args).to(dtype))
        # Halves exchanged, and the sine of the first negated, are halves exchanged and the first negated.
        signed = _remembered(lambda sine: torch.cat([-sine.chunk(2, -1)[0], sine.chunk(2, -1)[1]], -1))

        def lean_scale(*args):
            return (scale_once if threading.get_ident() == owner else scale)(*args)

        def lean_rotate(query, key, cosine, sine, unsqueeze_dim=1):
            if threading.get_ident() != owner:
                return rotate(query, key, cosine, sine, unsqueeze_dim=unsqueeze_dim)
            both = torch.cat([query, key], unsqueeze_dim)
            exchanged = both.roll(both.shape[-1] // 2, -1)
            both = both * cosine.unsqueeze(unsqueeze_dim) + exchanged * signed(sine).unsqueeze(unsqueeze_dim)
            return both.split([query.shape[unsqueeze_dim], key.shape[unsqueeze_dim]], unsqueeze_dim)

        setattr(modeling_ministral3, scale_name, lean_scale)
        setattr(modeling_ministral3, ROTARY, lean_rotate)
        try:
            yield
        finally:
            setattr(modeling_ministral3, scale_name, scale)
            setattr(modeling_ministral3, ROTARY, rotate)


def _remembered(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`function`, which is called again only with another first argument."""
    last: list = [None, None]

    def remembering(tensor, *args):
        if last[0] is not tensor:
            last[:] = tensor, function(tensor, *args)
        return last[1]

    return remembering


def choose(state: State, logits: torch.Tensor, request: Request) -> None:
    """Set `state.token` to the next token, or to the padding token where the text has ended."""
    logits = logits.masked_fill(state.end & (state.count < state.minimum), -torch.inf)
    if request.do_sample:
        probabilities = request.warpers(None, logits).softmax(-1)
        # Exponential clocks: the index of the least e / p, with e ~ Exp(1), is drawn with probability p.
        token = (probabilities / torch.empty_like(probabilities).exponential_(generator=state.generator)).argmax(
            -1, keepdim=True
        )
    else:
        token = logits.argmax(-1, keepdim=True)
    state.token.copy_(torch.where(state.ended, request.pad_token_id, token))
    state.ended.logical_or_(state.end[state.token])
    state.count.add_(1)


def capture_decode(model: PreTrainedModel, state: State, request: Request, stream: torch.cuda.Stream) -> None:
    """Record `decode` as a CUDA graph of `state`. The random state is left as it was."""
    device, generator = state.token.device, state.generator
    kept = torch.cuda.get_rng_state(device) if generator is None else generator.get_state()
    state.graph, _ = capture(lambda: decode(model, state, request), stream, warm_up=True, generator=generator)
    if generator is None:
        torch.cuda.set_rng_state(kept, device)
    else:
        generator.set_state(kept)


def trimmed(tokens: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """New tokens, (batch, new), up to the end token of the longest text: what was decoded while looking back goes."""
    has_end = end[tokens]
    ends = torch.where(has_end.any(1), has_end.int().argmax(1) + 1, tokens.shape[1])
    return tokens[:, : int(ends.max())]


def _rounded(length: int) -> int:
    return -(-length // CACHE_STEP) * CACHE_STEP


def _copied(ended: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """`ended` on its way to the host, and the event after which it is there."""
    if not ended.is_cuda:
        return ended.clone(), None
    host = torch.empty(ended.shape, dtype=torch.bool, pin_memory=True)
    host.copy_(ended, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(ended.device))
    return host, event


def _all_true(copy: tuple[torch.Tensor, torch.cuda.Event | None]) -> bool:
    host, event = copy
    if event is not None:
        event.synchronize()
    return bool(host.all())
