"""One prompt: a picture, or several that differ by their seed."""

from __future__ import annotations

import secrets
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from accelerate.utils.memory import clear_device_cache
from diffusers import ErnieImagePipeline

from ..fast.random_state import SeededDraws
from ..loading.loaded_pipeline import skipping_as, skipping_of, taking_turn
from ..memory.decode_check import noted
from ..memory.offload import offload_all as free_device
from .computation import computation_of
from .failures import check_picture, explained
from .image_file import Drawing, check_side, format_of, save_picture
from .loras import LoraFiles, active_uses, loras_as, noting
from .seeding import initial_latents
from .settings import Settings, complete_settings, described_model, hub_revision, warn_of_unused_negative


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
    guidance_until: float | None = None,
    cache: int | bool | None = None,
    lora: Sequence[str] = (),
    lora_files: LoraFiles | None = None,
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
        guidance_until: As for `set_skipping`; None for what is set on the pipeline.
        cache: Likewise.
        lora: LoRAs for these pictures alone, each ``FILE`` or ``FILE:STRENGTH``; none for what is on in the pipeline.
        lora_files: Where they have been found already.

    Raises:
        InvalidSettings: A path's format has no room for the size.
        InvalidLora: A LoRA isn't there, or doesn't fit the model.
        DeviceUnavailable: As `draw`.
        NotFinite: See there. Files of the pictures before stay.
    """
    recommended, name = described_model(pipe, model)
    loras = lora_files or LoraFiles()
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
        skipping=skipping_of(pipe),
        guidance_until=guidance_until,
        cache=cache,
        lora=loras.find(lora),
    )
    for path in paths:
        check_side(format_of(path), settings.width, settings.height)
    warn_of_unused_negative([settings])
    active = active_uses(pipe)
    loras.load(pipe, settings.lora)
    try:
        for number, path in enumerate(paths):
            drawing = draw(pipe, replace(settings, seed=settings.seed + number))
            drawing = replace(drawing, settings=noting(drawing.settings, active))
            save_picture(drawing, path, model=name, revision=hub_revision(pipe))
            yield drawing, path
    finally:
        loras.unload(pipe)


def draw(pipe: ErnieImagePipeline, settings: Settings) -> Drawing:
    """Draw one picture. The same settings give the same picture again on the same machine, prompt enhancer included.

    The prompt enhancer samples by the seed. torch's global random state stays as it is.

    Args:
        pipe: The pipeline, as from `load`.
        settings: What to draw, and how. Its LoRAs are there already, see `LoraFiles.load`.

    Raises:
        InvalidSettings: There is something to leave out, and the pipeline isn't from `load`.
        DeviceUnavailable: The device's memory ran out. The pipeline can go on with a smaller picture.
        NotFinite: Latents or picture hold NaN or infinity, or the picture one single value.
    """
    started = time.perf_counter()
    with (
        taking_turn(pipe),
        loras_as(pipe, settings.lora),
        skipping_as(pipe, settings.skipping),
        SeededDraws(settings.seed),
        noted() as notes,
    ):
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
        except RuntimeError as error:
            reason = explained(pipe, settings, error)
            if reason is None:
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the tensors of the failed call
            _free_device(pipe)
            raise reason from error
    check_picture(pipe, settings, result.images[0], notes)
    revised = result.revised_prompts[0] if result.revised_prompts else None
    seconds = time.perf_counter() - started
    return Drawing(result.images[0], settings, revised, seconds, **computation_of(pipe))


def _free_device(pipe: ErnieImagePipeline) -> None:
    """Offload what a failed call left on the device, so that a smaller picture fits next."""
    free_device(pipe)
    pipe.maybe_free_model_hooks()  # of diffusers' own offloading
    clear_device_cache(garbage_collection=True)
