"""One prompt: a picture, or several that differ by their seed."""

from __future__ import annotations

import secrets
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from diffusers import ErnieImagePipeline

from ..errors import DeviceUnavailable
from ..fast.products import is_in_fp8
from ..fast.random_state import SeededDraws
from ..loading.loaded_pipeline import taking_turn
from ..memory.apply import memory_mode
from ..memory.offload import offload_all as free_device
from ..upstream.pipelines import execution_device
from .image_file import Drawing, save_png
from .seeding import initial_latents
from .settings import Settings, complete_settings, described_model


def draw_and_save(
    pipe: ErnieImagePipeline,
    paths: Sequence[Path],
    prompt: str,
    *,
    model: str | None = None,
    negative: str = "",
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int | None = None,
    use_pe: bool = True,
) -> Iterator[tuple[Drawing, Path]]:
    """Draw one picture for each path, with seeds counting up. Each is yielded once its file is there.

    Args:
        pipe: The pipeline, as from `load`.
        paths: Files to write, see `output_paths`.
        prompt: What to draw.
        model: Name to note in the files where the repository gives itself none.
        negative: What not to draw.
        height: Pixels; None for what the pipeline's repository recommends, as for the next three.
        width: Pixels.
        steps: Denoising steps.
        guidance: Guidance scale.
        seed: Of the first picture; None for a random one.
        use_pe: Whether the prompt enhancer rewrites the prompt.
    """
    recommended, name = described_model(pipe, model)
    settings = complete_settings(
        recommended,
        prompt,
        negative=negative,
        height=height,
        width=width,
        steps=steps,
        guidance=guidance,
        seed=secrets.randbelow(2**32) if seed is None else seed,
        use_pe=use_pe,
    )
    for number, path in enumerate(paths):
        drawing = draw(pipe, replace(settings, seed=settings.seed + number))
        save_png(drawing, path, model=name)
        yield drawing, path


def draw(pipe: ErnieImagePipeline, settings: Settings) -> Drawing:
    """Draw one picture. The same settings give the same picture again on the same machine, prompt enhancer included.

    The prompt enhancer samples by the seed. torch's global random state stays as it is.

    Args:
        pipe: The pipeline, as from `load`.
        settings: What to draw, and how.

    Raises:
        DeviceUnavailable: The device's memory ran out. The pipeline can go on with a smaller picture.
    """
    started = time.perf_counter()
    with taking_turn(pipe), SeededDraws(settings.seed):
        try:
            result = pipe(
                prompt=settings.prompt,
                negative_prompt=settings.negative_prompt,
                height=settings.height,
                width=settings.width,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                latents=initial_latents(pipe, settings),
                use_pe=settings.use_pe,
            )
        except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU has no error of its own
            if not should_reduce_batch_size(error):
                raise
            message = memory_ran_out(pipe, settings)
            traceback.clear_frames(error.__traceback__)  # they hold the tensors of the failed call
            _free_device(pipe)
            raise DeviceUnavailable(message) from error
    revised = result.revised_prompts[0] if result.revised_prompts else None
    seconds = time.perf_counter() - started
    return Drawing(result.images[0], settings, revised, seconds, fp8=is_in_fp8(pipe.transformer))


def memory_ran_out(pipe: ErnieImagePipeline, settings: Settings) -> str:
    """The message for a picture that doesn't fit the device's memory, with what to do."""
    device, mode = execution_device(pipe), memory_mode(pipe)
    smaller = None if device.type in ("cpu", "mps") else {"resident": "offload", "offload": "stream"}.get(mode)
    cure = f"load with memory={smaller!r} (--memory {smaller}) or draw" if smaller else "draw"
    return f"The memory of {device} ran out at {settings.width}x{settings.height}: {cure} a smaller size."


def _free_device(pipe: ErnieImagePipeline) -> None:
    """Offload what a failed call left on the device, so that a smaller picture fits next."""
    free_device(pipe)
    pipe.maybe_free_model_hooks()  # of diffusers' own offloading
    clear_device_cache(garbage_collection=True)
