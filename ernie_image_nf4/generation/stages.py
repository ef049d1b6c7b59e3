"""Groups of pictures: all prompts are enhanced, then encoded, then denoised in batches, then decoded one by one.

So offloading moves each component once a group. Noise and the enhancer's sampling are seeded row by row, and only
denoising works on several pictures at once. In batches of one, the default on a CPU, a picture is equal to the bit
however pictures are grouped; larger batches change how products are rounded.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from diffusers import ErnieImagePipeline
from PIL import Image
from tqdm import tqdm

from ..errors import NotFinite
from ..fast.transformer import several_pictures
from ..loading.loaded_pipeline import in_own_precision, skipping_as, taking_turn
from ..memory.apply import memory_mode
from ..memory.decode_check import is_finite, noted
from ..upstream.pipelines import execution_device
from .computation import computation_of
from .enhancement import enhance_all
from .failures import check_latents, check_picture, explained
from .image_file import Drawing
from .loras import LoraFiles, loras_as
from .schedule import Picture, find_batch_size, groups
from .seeding import initial_latents
from .settings import Settings

logger = logging.getLogger(__name__)

GROUP = 16  # pictures for which offloading moves a component once; as many are lost when the process is killed

CPU_THREADS = threading.Lock()  # held while torch's number of threads is another one

# By the pixels of a picture, the batch size that an out-of-memory error left.
Limits = dict[int, int]


class DrawingStopped(Exception):
    """Raised by whoever looks on, to end a group at once."""


@dataclass(frozen=True)
class Watch:
    """Looks on while a group is drawn. Either function may raise `DrawingStopped`.

    Attributes:
        on_texts: Called with the settings of all pictures, and their prompts as the enhancer wrote them.
        on_step: Called after each denoising step with the settings of a batch, and the number of its steps so far. On a
            GPU the step may still be computed.
    """

    on_texts: Callable[[Sequence[Settings], Sequence[str | None]], None]
    on_step: Callable[[Sequence[Settings], int], None]


def draw_in_groups(
    pipe: ErnieImagePipeline, pictures: Iterable[Picture], batch_size: int | None = None, loras: LoraFiles | None = None
) -> Iterator[tuple[Picture, Drawing | str]]:
    """Draw in this process. Yields each picture with its drawing, or with the reason why there is none.

    Args:
        pipe: The pipeline, as from `load`.
        pictures: What to draw, of any shapes.
        batch_size: Pictures to denoise together at most; None chooses by free memory.
        loras: Has those that pictures name. Each group finds its own in the pipeline.
    """
    limits: Limits = {}

    def size(picture: Picture) -> int:
        found = batch_size or find_batch_size(pipe, picture.settings)
        return min(found, limits.get(picture.settings.height * picture.settings.width, found))

    for group in groups(pictures, size, GROUP if memory_mode(pipe) != "resident" else 1):
        if loras is not None:
            loras.load(pipe, {use for batch in group for picture in batch for use in picture.settings.lora})
        yield from draw_group_or_each(pipe, group, limits)


def draw_group_or_each(
    pipe: ErnieImagePipeline,
    group: Sequence[Sequence[Picture]],
    limits: Limits,
    *,
    watch: Watch | None = None,
    one_thread: bool = True,
) -> Iterator[tuple[Picture, Drawing | str]]:
    """`draw_group`. If it fails, each picture that is left is drawn alone, so that one bad row spoils no other.

    Raises:
        DrawingStopped: By the watch.
    """
    left = [picture for batch in group for picture in batch]
    settings = [[picture.settings for picture in batch] for batch in group]
    try:
        for result in draw_group(pipe, settings, limits, watch=watch, one_thread=one_thread):
            yield left.pop(0), result
        return
    except DrawingStopped:
        raise
    except Exception as error:  # whatever it is, the other rows go on
        logger.debug("A group failed.", exc_info=True)
        reason = str(explained(pipe, left[0].settings, error) or f"{type(error).__name__}: {error}")
    clear_device_cache(garbage_collection=True)  # out here, where no traceback holds tensors any more
    if len(left) == 1:
        yield left[0], reason
        return
    for picture in left:
        yield from draw_group_or_each(pipe, [[picture]], limits, watch=watch, one_thread=one_thread)


def draw_group(
    pipe: ErnieImagePipeline,
    batches: Sequence[Sequence[Settings]],
    limits: Limits,
    *,
    watch: Watch | None = None,
    one_thread: bool = True,
) -> Iterator[Drawing | str]:
    """Enhance, encode, denoise and decode pictures, each stage for all of them before the next.

    Yields each drawing, or why it came to nothing: numbers that aren't finite.

    Args:
        pipe: The pipeline, as from `load`.
        batches: What to denoise together: of what `schedule.shape` says is the same in each.
        limits: Gets the batch sizes that the memory turned out to allow.
        watch: Is told how it goes.
        one_thread: Whether a CPU computes in one thread, so that a picture doesn't depend on how many there are.

    Raises:
        DrawingStopped: By the watch.
    """
    settings = [each for batch in batches for each in batch]
    with _group_calls(pipe) as calls:
        started = time.perf_counter()
        with taking_turn(pipe), in_own_precision(pipe), _threads(pipe, one_thread):
            revised = enhance_all(calls, settings)
            if watch is not None:
                watch.on_texts(settings, revised)
            prompts = [each.prompt if text is None else text for each, text in zip(settings, revised, strict=True)]
            negatives = [each.negative_prompt for each in settings if each.guidance_scale > 1]
            embeddings = encode(calls, [*prompts, *negatives])
            shared = (time.perf_counter() - started) / len(settings)
            denoised: list[Denoised] = []
            for batch in batches:
                texts = [embeddings[prompt] for prompt in prompts[len(denoised) : len(denoised) + len(batch)]]
                uncond = [embeddings.get(each.negative_prompt) for each in batch]
                denoised += denoise(calls, batch, texts, uncond, limits, watch=watch)
        for each, prompt, text, result in zip(settings, prompts, revised, denoised, strict=True):
            started = time.perf_counter()
            try:
                # Not while the caller has the drawing: it may go on in another thread.
                with taking_turn(pipe), in_own_precision(pipe), _threads(pipe, one_thread):
                    image = decode(calls, each, embeddings[prompt], result.latents)
            except NotFinite as error:
                yield str(error)
                continue
            seconds = shared + result.seconds + time.perf_counter() - started
            yield Drawing(image, each, text, seconds, result.batch_size, **computation_of(pipe))


def encode(pipe: ErnieImagePipeline, texts: Iterable[str]) -> dict[str, torch.Tensor]:
    """Embeddings of each different text, (tokens, text_in_dim), on the CPU: a few MB each, for up to a group."""
    return {text: pipe.encode_prompt(text, execution_device(pipe))[0].cpu() for text in dict.fromkeys(texts)}


@dataclass(frozen=True)
class Denoised:
    """Latents of one picture, and what they cost.

    Attributes:
        latents: (1, channels, height / 16, width / 16) on the CPU.
        batch_size: Pictures that were denoised together.
        seconds: Its share of the wall time.
    """

    latents: torch.Tensor
    batch_size: int
    seconds: float


def denoise(
    pipe: ErnieImagePipeline,
    batch: Sequence[Settings],
    texts: Sequence[torch.Tensor],
    negatives: Sequence[torch.Tensor | None],
    limits: Limits,
    *,
    watch: Watch | None = None,
) -> list[Denoised]:
    """Latents of a batch. Those that aren't finite are drawn once more, alone: a neighbour may have spoiled them."""
    results = _denoise_together(pipe, batch, texts, negatives, limits, watch=watch)
    for number, result in enumerate(results):
        if result.batch_size > 1 and not is_finite(result.latents):
            one = slice(number, number + 1)
            results[one] = _denoise_together(pipe, batch[one], texts[one], negatives[one], limits, watch=watch)
    return results


def _denoise_together(
    pipe: ErnieImagePipeline,
    batch: Sequence[Settings],
    texts: Sequence[torch.Tensor],
    negatives: Sequence[torch.Tensor | None],
    limits: Limits,
    *,
    watch: Watch | None = None,
) -> list[Denoised]:
    """`denoise` in one go. If the memory runs out the batch is halved, and `limits` gets the size that is left."""
    first = batch[0]
    started = time.perf_counter()
    try:
        with (
            several_pictures(pipe.transformer, len(batch)),
            skipping_as(pipe, first.skipping),
            loras_as(pipe, first.lora),
        ):
            result = pipe(
                prompt_embeds=list(texts),
                negative_prompt_embeds=list(negatives) if first.guidance_scale > 1 else None,
                height=first.height,
                width=first.width,
                num_inference_steps=first.num_inference_steps,
                guidance_scale=first.guidance_scale,
                latents=torch.cat([initial_latents(pipe, settings) for settings in batch]),
                output_type="latent",
                callback_on_step_end=_callback(watch, batch),
            )
        latents = getattr(result, "images", result).cpu()  # diffusers 0.38 returns the latents themselves
        seconds = (time.perf_counter() - started) / len(batch)
        return [Denoised(one, len(batch), seconds) for one in latents.split(1)]
    except RuntimeError as error:
        if len(batch) == 1 or not should_reduce_batch_size(error):
            raise
    clear_device_cache(garbage_collection=True)  # out here, where no traceback holds tensors any more
    half = len(batch) // 2
    limits[first.height * first.width] = half
    logger.info(
        "The memory ran out with %d pictures of %dx%d at once: %d.", len(batch), first.width, first.height, half
    )
    parts = [slice(start, start + half) for start in range(0, len(batch), half)]
    return [
        result
        for part in parts
        for result in _denoise_together(pipe, batch[part], texts[part], negatives[part], limits, watch=watch)
    ]


def _callback(watch: Watch | None, batch: Sequence[Settings]) -> Callable[..., dict[str, Any]] | None:
    """The pipeline's callback that tells the watch of each step."""
    if watch is None:
        return None
    on_step = watch.on_step

    def tell(pipe: ErnieImagePipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(batch, step + 1)
        return tensors

    return tell


def decode(pipe: ErnieImagePipeline, settings: Settings, text: torch.Tensor, latents: torch.Tensor) -> Image.Image:
    """The picture of finished latents. One at a time: decoding needs more memory a picture than denoising.

    Upstream has no function for what comes after denoising. Its pipeline does that alone when there are no steps.

    Raises:
        NotFinite: Latents or picture hold NaN or infinity, or the picture one single value.
    """
    check_latents(pipe, settings, latents)
    with noted() as notes:
        image = pipe(
            prompt_embeds=[text],
            height=settings.height,
            width=settings.width,
            num_inference_steps=0,
            guidance_scale=1.0,
            latents=latents.to(execution_device(pipe)),
        ).images[0]
    check_picture(pipe, settings, image, notes)
    return image


class _GroupCalls:
    """Mixed into a pipeline's class for the calls of a group: no progress bar, and no offloading after each call.

    A pipeline ends each call by offloading everything and adding its hooks anew. For a group that is due once, at its
    end.
    """

    def progress_bar(self, iterable: Iterable | None = None, total: int | None = None) -> tqdm:
        return tqdm(iterable, total=total, disable=True)

    def maybe_free_model_hooks(self) -> None:
        pass


@functools.cache
def _group_class(pipeline_class: type) -> type:
    return type(pipeline_class.__name__, (_GroupCalls, pipeline_class), {})


@contextmanager
def _group_calls(pipe: ErnieImagePipeline) -> Iterator[ErnieImagePipeline]:
    """The same pipeline for the calls of a group: of a class with `_GroupCalls`, and sharing all attributes."""
    pipeline_class: Any = type(pipe)
    calls: Any = object.__new__(_group_class(pipeline_class))
    calls.__dict__ = pipe.__dict__
    try:
        yield calls
    finally:
        pipe.maybe_free_model_hooks()


def _threads(pipe: ErnieImagePipeline, one: bool) -> AbstractContextManager[None]:
    return _computing_alone(pipe) if one else nullcontext()


@contextmanager
def _computing_alone(pipe: ErnieImagePipeline) -> Iterator[None]:
    """On a CPU, compute in one thread: how many there are changes how sums are rounded.

    accelerate chooses their number by that of processes. It is the process's, so groups of several threads take turns.
    """
    if execution_device(pipe).type != "cpu":
        yield
        return
    with CPU_THREADS:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
