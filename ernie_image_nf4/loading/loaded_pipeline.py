"""The class of the pipelines that `load` returns: upstream's, whose calls take turns."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from diffusers import ErnieImagePipeline

from ..errors import InvalidSettings
from ..fast.float16 import no_autocast
from ..fast.prompt_enhancer import is_fast
from ..fast.random_state import drawing_as_caller
from ..fast.step_plan import ALL_STEPS, Skipping, cache_interval, check_skipping
from ..fast.subclassing import become, named_as_upstream
from ..fast.transformer import computation_dtype, refuse_for_nf4
from ..fast.turns import Turn
from ..upstream.pipelines import execution_device
from . import lora
from .skipping import SteppedTransformer, stepped

logger = logging.getLogger(__name__)

CALL = inspect.signature(ErnieImagePipeline.__call__)
# Methods that change weights, or where they are, or read them all.
IN_TURN = (
    "delete_adapters", "disable_lora", "enable_lora", "enable_model_cpu_offload", "encode_prompt",
    "maybe_free_model_hooks", "remove_all_hooks", "set_adapters", "unfuse_lora", "unload_lora_weights",
)  # fmt: skip
# With NF4: an illegal memory access, or tensors without data.
BREAK_NF4 = ("enable_group_offload", "enable_sequential_cpu_offload")


class PipelineTurn(Turn):
    """The turn of a pipeline.

    Attributes:
        drawing: Whether the thread that holds the turn is in a call of the pipeline.
        noise_is_drawn: To be called when the picture's noise is drawn.
        transformer: What the call finds in the transformer's place, if it skips something.
    """

    drawing = False
    noise_is_drawn: Callable[[], None] | None = None
    transformer: SteppedTransformer | None = None


@named_as_upstream
class LoadedPipeline(ErnieImagePipeline):
    """An ``ErnieImagePipeline`` that several threads may call: one waits for the other.

    Upstream keeps what belongs to a picture in the pipeline and its scheduler, so nothing else would be right. A
    callback must not wait for another thread that calls the same pipeline.

    Attributes:
        turn: Which thread is in a call.
        skipping: What its pictures leave out, see `set_skipping`.
    """

    turn: PipelineTurn
    skipping: Skipping = Skipping()

    # diffusers reads the names of its arguments.
    @functools.wraps(ErnieImagePipeline.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # of `from_pipe`, for example: `load` makes an upstream pipeline one of these
        self.turn = PipelineTurn()

    @functools.wraps(ErnieImagePipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = CALL.bind(self, *args, **kwargs)
        with taking_turn(self):
            if self.turn.drawing:
                raise InvalidSettings(
                    "A callback called the pipeline that is drawing: collect what to draw, and draw it after the call."
                )
            self.turn.drawing = True
            try:
                with (
                    _default_device_is_cpu(),
                    in_own_precision(self),
                    self._own_generator(call),
                    stepped(self, self.skipping) as pipe,
                ):
                    self._call_as(pipe, call)
                    return ErnieImagePipeline.__call__(*call.args, **call.kwargs)
            finally:
                self.turn.drawing = False

    @functools.wraps(ErnieImagePipeline.to)
    def to(self, *args: Any, **kwargs: Any) -> Any:
        with taking_turn(self):
            dtype = next((each for each in (*args, *kwargs.values()) if isinstance(each, torch.dtype)), None)
            if dtype is not None and getattr(self.transformer, "is_loaded_in_4bit", False):
                loaded = computation_dtype(self.transformer)
                if dtype != loaded:
                    raise InvalidSettings(
                        f"NF4 weights keep the dtype that they were loaded for, {loaded}, and a VAE in {dtype} can't "
                        f"go on from them: load(..., dtype={dtype}) makes the whole pipeline so."
                    )
                if dtype == torch.float16:  # parts of it are in float32, and have to stay so
                    args = tuple(each for each in args if each is not dtype)
                    kwargs = {name: value for name, value in kwargs.items() if value is not dtype}
            return ErnieImagePipeline.to(self, *args, **kwargs) if args or kwargs else self

    @functools.wraps(ErnieImagePipeline.load_lora_weights)
    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        lora.check_peft()
        if adapter_name is not None:
            lora.check_name(adapter_name)
        sources = {name: kwargs.pop(name) for name in lora.SOURCE_OPTIONS if name in kwargs}
        with taking_turn(self):
            state, file = lora.as_diffusers_lora(pretrained_model_name_or_path_or_dict, self.transformer, **sources)
            before = lora.known_adapters(self)
            super().load_lora_weights(state, adapter_name=adapter_name, hotswap=hotswap, **kwargs)
            new = [name for name in lora.known_adapters(self) if name not in before]
            lora.note_file(self, [adapter_name] if hotswap and adapter_name else new, file)

    @functools.wraps(ErnieImagePipeline.fuse_lora)
    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        if getattr(self.transformer, "is_loaded_in_4bit", False):
            raise InvalidSettings(
                "fuse_lora would round LoRA and weights to NF4 anew, and unfuse_lora couldn't take that back: leave it "
                "loaded beside the weights, or fuse it into the original with diffusers and quantize that."
            )
        super().fuse_lora(*args, **kwargs)

    @functools.wraps(ErnieImagePipeline.save_pretrained)
    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        with taking_turn(self), lora.without_adapters(self) as adapters:
            super().save_pretrained(save_directory, *args, **kwargs)
        if adapters:
            logger.warning(
                "%s was saved without its LoRAs (%s): keep their files, and load them again with load_lora.",
                save_directory,
                ", ".join(adapters),
            )

    def _call_as(self, pipe: ErnieImagePipeline, call: inspect.BoundArguments) -> None:
        """Let upstream's code run as another pipeline, whose callback gets this one all the same."""
        callback = call.arguments.get("callback_on_step_end")
        if pipe is self or callback is None:
            call.arguments["self"] = pipe
            return
        call.arguments |= {"self": pipe, "callback_on_step_end": lambda _, *step: callback(self, *step)}

    @contextmanager
    def _own_generator(self, call: inspect.BoundArguments) -> Iterator[None]:
        """Give a call on a CUDA GPU without a generator one of its own, see `random_state`.

        Not if the prompt enhancer is upstream's, which samples from the global state.
        """
        device, given = execution_device(self), call.arguments.get("generator")
        if device.type != "cuda" or given is not None or (self.pe is not None and not is_fast(self.pe)):
            yield
            return
        generator = torch.Generator(device)
        call.arguments["generator"] = generator
        with drawing_as_caller(generator) as hand_over:
            self.turn.noise_is_drawn = hand_over
            try:
                yield
            finally:
                self.turn.noise_is_drawn = None

    @functools.wraps(ErnieImagePipeline.progress_bar)
    def progress_bar(self, *args: Any, **kwargs: Any) -> Any:
        # Upstream asks for it between the noise and the first step, whose scheduler and callbacks may draw numbers.
        if self.turn.drawing and self.turn.noise_is_drawn is not None:
            self.turn.noise_is_drawn()
        return super().progress_bar(*args, **kwargs)


@contextmanager
def _default_device_is_cpu() -> Iterator[None]:
    """Upstream makes sigmas on the default device and gives them to numpy."""
    with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        yield


def in_own_precision(pipe: ErnieImagePipeline) -> AbstractContextManager[None]:
    """Let models that are in 16 bits already compute in the dtypes they were loaded for.

    Autocast, whose default is float16, would overflow in them, and save nothing.
    """
    if pipe.transformer is None or computation_dtype(pipe.transformer) == torch.float32:
        return nullcontext()
    return no_autocast(execution_device(pipe))


@contextmanager
def taking_turn(pipe: ErnieImagePipeline) -> Iterator[None]:
    """Keep other threads from a pipeline of `load` for several calls in a row. Another pipeline is left as it is."""
    if not isinstance(pipe, LoadedPipeline):
        yield
        return
    with pipe.turn.take(execution_device(pipe)):
        yield


def set_skipping(
    pipe: ErnieImagePipeline, *, guidance_until: float | None = ALL_STEPS, cache: int | bool | None = False
) -> None:
    """Let a pipeline compute less for its next pictures, which then differ from those that it draws otherwise.

    Nothing is loaded anew. Without arguments, or with None, it computes everything again, and draws what it drew
    before, to the bit. Pictures of a batch don't depend on each other. `generate_batch` notes the settings in files and
    manifest.

    Args:
        pipe: The pipeline, as from `load`.
        guidance_until: Share of the denoising steps with guidance, above 0 to 1: 0.5 is the first half of them. Those
            after it leave out the negative prompt and take about half the time. At least one step has guidance.
        cache: Every how many steps the transformer is computed. In between, its last prediction is used again. True is
            3, False every step. The first 15% of the steps and the last one are always computed.

    Raises:
        InvalidSettings: A value that can't work, or a pipeline that isn't from `load`.

    Example:
        >>> pipe = load("user/ERNIE-Image-NF4")
        >>> set_skipping(pipe, guidance_until=0.5, cache=True)
        >>> pipe("an orange cat on a wooden desk").images[0].save("cat.png")
    """
    check_skipping(guidance_until, cache)
    until = ALL_STEPS if guidance_until is None else float(guidance_until)
    _skip(pipe, Skipping(until, cache_interval(cache or False)))


def skipping_of(pipe: ErnieImagePipeline) -> Skipping:
    """What a pipeline leaves out; one that isn't from `load` leaves out nothing."""
    return pipe.skipping if isinstance(pipe, LoadedPipeline) else Skipping()


@contextmanager
def skipping_as(pipe: ErnieImagePipeline, skipping: Skipping) -> Iterator[None]:
    """`set_skipping` while the context lasts. The thread has the pipeline's turn.

    Raises:
        InvalidSettings: There is something to skip, and the pipeline isn't from `load`.
    """
    before = skipping_of(pipe)
    _skip(pipe, skipping)
    try:
        yield
    finally:
        _skip(pipe, before)


def _skip(pipe: ErnieImagePipeline, skipping: Skipping) -> None:
    with taking_turn(pipe):
        if isinstance(pipe, LoadedPipeline):
            pipe.skipping = skipping
        elif not skipping.is_off:
            raise InvalidSettings(
                f"Only a pipeline of load() can leave out steps, not this {type(pipe).__name__}: load it with load(), "
                "or leave out guidance_until and cache."
            )


def make_pipeline_take_turns(pipe: ErnieImagePipeline) -> None:
    """Make an upstream pipeline a `LoadedPipeline`."""
    become(pipe, LoadedPipeline)
    pipe.turn = PipelineTurn()


def _in_turn(name: str) -> Callable:
    @functools.wraps(getattr(ErnieImagePipeline, name))
    def method(self: LoadedPipeline, *args: Any, **kwargs: Any) -> Any:
        with taking_turn(self), in_own_precision(self):
            return getattr(super(LoadedPipeline, self), name)(*args, **kwargs)

    return method


def _unless_nf4(name: str) -> Callable:
    @functools.wraps(getattr(ErnieImagePipeline, name))
    def method(self: LoadedPipeline, *args: Any, **kwargs: Any) -> Any:
        for part in self.components.values():
            refuse_for_nf4(part, name)
        return getattr(super(LoadedPipeline, self), name)(*args, **kwargs)

    return method


for _name in filter(lambda name: hasattr(ErnieImagePipeline, name), IN_TURN):
    setattr(LoadedPipeline, _name, _in_turn(_name))
for _name in filter(lambda name: hasattr(ErnieImagePipeline, name), BREAK_NF4):
    setattr(LoadedPipeline, _name, _unless_nf4(_name))
