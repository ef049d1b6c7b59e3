"""Picture files: where they go, and how they are written, with their settings inside and whole or not at all.

Nothing heavy is imported, so that paths are checked before a model is loaded.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidSettings
from ..repository.metadata import installed_versions
from .settings import Settings

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Drawing:
    """A picture and how it came about.

    Attributes:
        image: The picture.
        settings: What it was drawn with.
        revised_prompt: The prompt as the prompt enhancer rewrote it, None without it.
        seconds: Wall time of drawing it.
        batch_size: Pictures that were denoised together.
        fp8: Whether the transformer's blocks multiplied in fp8.
    """

    image: Image.Image
    settings: Settings
    revised_prompt: str | None
    seconds: float
    batch_size: int = 1
    fp8: bool = False


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
    """Make the folder for many pictures, unless it is there.

    Raises:
        InvalidSettings: It can't be made, or not be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidSettings(f"Output folder {path} can't be made ({error.strerror}): name another.") from error
    _check_writable(path)


def save_png(drawing: Drawing, path: Path, *, model: str) -> None:
    """Write a picture with its settings as PNG text chunks. Readers of `path` see the whole file or none.

    Chunks are prompt, revised_prompt (if any), negative_prompt, seed, steps, guidance_scale, width, height, model,
    versions, and fp8 (if it was).

    Args:
        drawing: What to write.
        path: The file, replaced if it exists.
        model: Name of the model, for the chunk of that name.

    Raises:
        InvalidSettings: The file can't be written, e.g. because the disk is full.
    """
    from PIL.PngImagePlugin import PngInfo

    settings = drawing.settings
    chunks: dict[str, object] = {
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
        info.add_text(key, str(value))  # Pillow writes text beyond Latin-1 as an iTXt chunk, in UTF-8
    try:
        with replacing(path) as temporary:
            drawing.image.save(temporary, format="PNG", pnginfo=info)
    except OSError as error:
        raise InvalidSettings(f"{path} could not be written ({error.strerror}): make room, or name another.") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file in the same folder that replaces `path` at the end, or is removed after an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_writable(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidSettings(
            f"Output folder {folder} can't be written to ({error.strerror}): name another."
        ) from error
