"""From a prompt to PNG files that say how they were made: check the settings, draw, save."""

from __future__ import annotations

import math
import os
import secrets
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DeviceUnavailable, InvalidSettings
from ..repository.components import PIXELS_PER_PATCH
from ..repository.metadata import Recommended, installed_versions, read_metadata_if_ours

if TYPE_CHECKING:  # checks come before anything heavy is imported
    import torch
    from diffusers import ErnieImagePipeline
    from PIL import Image

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Settings:
    """What makes a picture, apart from the weights.

    Attributes:
        prompt: What to draw.
        negative_prompt: What not to draw.
        height: Pixels, a multiple of 16.
        width: Pixels, a multiple of 16.
        num_inference_steps: Denoising steps.
        guidance_scale: Weight of the prompt against the negative prompt; up to 1 there is no guidance, in half the time.
        seed: Of the initial latents and of the prompt enhancer's sampling.
        use_pe: Whether the prompt enhancer rewrites the prompt.
    """

    prompt: str
    negative_prompt: str
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    use_pe: bool = True


@dataclass(frozen=True)
class Drawing:
    """A picture and how it came about.

    Attributes:
        image: The picture.
        settings: What it was drawn with.
        revised_prompt: What the prompt enhancer made of the prompt, None without it.
        seconds: Wall time of the whole call.
        batch_size: Pictures that were denoised together.
        fp8: Whether the transformer's blocks multiplied in fp8.
    """

    image: Image.Image
    settings: Settings
    revised_prompt: str | None
    seconds: float
    batch_size: int = 1
    fp8: bool = False


def check_settings(
    prompt: str,
    *,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int | None = None,
    count: int = 1,
) -> None:
    """Refuse what can't work before anything is loaded; None stands for the recommended value.

    Raises:
        InvalidSettings: Blank prompt, size not a positive multiple of 16, fewer than 1 step or picture, guidance that is
            no finite number, seed out of range.
    """
    if not prompt.strip():
        raise InvalidSettings("The prompt is empty: say what to draw.")
    for name, value in (("Height", height), ("Width", width)):
        if value is not None and (value < PIXELS_PER_PATCH or value % PIXELS_PER_PATCH):
            nearest = max(PIXELS_PER_PATCH, round(value / PIXELS_PER_PATCH) * PIXELS_PER_PATCH)
            raise InvalidSettings(f"{name} {value} is not a positive multiple of {PIXELS_PER_PATCH}: try {nearest}.")
    for name, value in (("steps", steps), ("count", count)):
        if value is not None and value < 1:
            raise InvalidSettings(f"{value} is too few for {name}: use 1 or more.")
    if guidance is not None and not math.isfinite(guidance):
        raise InvalidSettings(f"Guidance {guidance} is not a finite number: try 4.0, or 1.0 for none.")
    if seed is not None and not 0 <= seed <= seed + count - 1 <= MAX_SEED:
        raise InvalidSettings(f"Seed {seed} is out of range: use 0 to {MAX_SEED}.")


def output_paths(output: Path, count: int) -> list[Path]:
    """Where the pictures go: `output` itself for one, ``out-1.png``, ``out-2.png`` ... beside it for several."""
    if count == 1:
        return [output]
    digits = len(str(count))
    return [output.with_name(f"{output.stem}-{number:0{digits}}{output.suffix}") for number in range(1, count + 1)]


def check_output(path: Path) -> None:
    """Refuse a path to which no picture can be written, by trying it.

    Raises:
        InvalidSettings: Not a .png, a folder, in no folder, or in one that can't be written to.
    """
    if path.suffix.lower() != ".png":
        raise InvalidSettings(f"Output {path} is no .png file: pictures are written as PNG, name it so.")
    if path.is_dir():
        raise InvalidSettings(f"Output {path} is a folder: name a .png file in it.")
    if not path.parent.is_dir():
        raise InvalidSettings(f"Output folder {path.parent} doesn't exist: make it first, or name another.")
    _check_writable(path.parent)


def make_output_folder(path: Path) -> None:
    """The folder for many pictures, made unless it is there.

    Raises:
        InvalidSettings: It can't be made, or not be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidSettings(f"Output folder {path} can't be made ({error.strerror}): name another.") from error
    _check_writable(path)


def _check_writable(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidSettings(
            f"Output folder {folder} can't be written to ({error.strerror}): name another."
        ) from error


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
    """One picture for each path, with seeds counting up, each yielded when its file is there.

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
    settings = Settings(
        prompt=prompt,
        negative_prompt=negative,
        height=recommended.height if height is None else height,
        width=recommended.width if width is None else width,
        num_inference_steps=recommended.num_inference_steps if steps is None else steps,
        guidance_scale=recommended.guidance_scale if guidance is None else guidance,
        seed=secrets.randbelow(2**32) if seed is None else seed,
        use_pe=use_pe,
    )
    for number, path in enumerate(paths):
        drawing = draw(pipe, replace(settings, seed=settings.seed + number))
        save_png(drawing, path, model=name)
        yield drawing, path


def described_model(pipe: ErnieImagePipeline, model: str | None = None) -> tuple[Recommended, str]:
    """The settings that the pipeline's repository recommends, and its name; `model` where it gives itself none."""
    folder = Path(pipe.name_or_path)
    metadata = read_metadata_if_ours(folder)
    if metadata is None:
        return Recommended(), model or folder.resolve().name
    return metadata.recommended, metadata.name


def draw(pipe: ErnieImagePipeline, settings: Settings) -> Drawing:
    """One picture. The same settings give the same picture again on the same machine, prompt enhancer included.

    The initial latents are drawn on the CPU in float32, so that a seed means the same noise on every device and in every
    dtype. The prompt enhancer samples from torch's global random state, which is seeded for the call and then restored.

    Args:
        pipe: The pipeline, as from `load`.
        settings: What to draw, and how.

    Raises:
        DeviceUnavailable: The device's memory ran out. The pipeline can go on with a smaller picture.
    """
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    from ..fast.products import is_in_fp8
    from ..memory.offload import offload_all

    started = time.perf_counter()
    with seeded(settings.seed, pipe._execution_device):
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
        except RuntimeError as error:  # torch.OutOfMemoryError is one; for the CPU there is no other
            if not should_reduce_batch_size(error):
                raise
            message = memory_ran_out(pipe, settings)
            # The frames of the failed call hold its tensors, and a smaller picture is to fit next.
            traceback.clear_frames(error.__traceback__)
            offload_all(pipe)
            pipe.maybe_free_model_hooks()  # of diffusers' own offloading
            clear_device_cache(garbage_collection=True)
            raise DeviceUnavailable(message) from error
    revised = result.revised_prompts[0] if result.revised_prompts else None
    seconds = time.perf_counter() - started
    return Drawing(result.images[0], settings, revised, seconds, fp8=is_in_fp8(pipe.transformer))


def memory_ran_out(pipe: ErnieImagePipeline, settings: Settings) -> str:
    """What to say when a picture doesn't fit, and what to do."""
    from ..memory.apply import memory_mode

    device, mode = pipe._execution_device, memory_mode(pipe)
    smaller = None if device.type in ("cpu", "mps") else {"resident": "offload", "offload": "stream"}.get(mode)
    cure = f"load with memory={smaller!r} (--memory {smaller}) or draw" if smaller else "draw"
    return f"The memory of {device} ran out at {settings.width}x{settings.height}: {cure} a smaller size."


def initial_latents(pipe: ErnieImagePipeline, settings: Settings) -> torch.Tensor:
    """Gaussian noise of shape (1, channels, height / 16, width / 16), in the transformer's dtype on its device."""
    import torch

    shape = (
        1,
        pipe.transformer.config.in_channels,
        settings.height // pipe.vae_scale_factor,
        settings.width // pipe.vae_scale_factor,
    )
    noise = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(settings.seed))
    return noise.to(pipe._execution_device, pipe.transformer.dtype)


def save_png(drawing: Drawing, path: Path, *, model: str) -> None:
    """Write a picture with its settings as PNG text chunks; whoever reads `path` sees the whole file or none.

    The chunks: prompt, revised_prompt (if any), negative_prompt, seed, steps, guidance_scale, width, height, fp8 (if it was), model,
    versions.

    Args:
        drawing: What to write.
        path: The file, replaced if it exists.
        model: Name of the model, for the chunk of that name.

    Raises:
        InvalidSettings: The file can't be written, e.g. because the disk is full.
    """
    from PIL.PngImagePlugin import PngInfo

    settings = drawing.settings
    chunks = {
        "prompt": settings.prompt,
        "negative_prompt": settings.negative_prompt,
        "seed": settings.seed,
        "steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "width": settings.width,
        "height": settings.height,
        "model": model,
        "versions": ", ".join(f"{name} {version}" for name, version in installed_versions().items()),
    }
    if drawing.fp8:
        chunks["fp8"] = True
    if drawing.revised_prompt is not None:
        chunks["revised_prompt"] = drawing.revised_prompt
    info = PngInfo()
    for key, value in chunks.items():
        info.add_text(key, str(value))  # Pillow turns what isn't Latin-1 into an iTXt chunk, in UTF-8
    try:
        with replacing(path) as temporary:
            drawing.image.save(temporary, format="PNG", pnginfo=info)
    except OSError as error:
        raise InvalidSettings(f"{path} could not be written ({error.strerror}): make room, or name another.") from error


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global random state on the CPU and one device while the context lasts."""
    import torch

    # MPS has one generator and no device index to restore it by: it stays seeded.
    forked = [device.index or 0] if device.type in ("cuda", "xpu") else []
    with torch.random.fork_rng(forked, device_type=device.type if forked else "cuda"):
        torch.manual_seed(seed)
        yield


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file in the same folder that takes the place of `path` at the end, or vanishes if that isn't reached."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
