"""Picture files: where they go, and how they are written, with their settings inside and whole or not at all.

PNG keeps settings in text chunks. JPEG and WebP keep them in EXIF, as a JSON object in the tag UserComment.

Nothing heavy is imported, so that paths are checked before a model is loaded.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DiskFull, InvalidSettings, WriteFailed
from ..fast.step_plan import ALL_STEPS, EVERY_STEP
from ..repository.disk import is_full
from ..repository.metadata import installed_versions
from .settings import Settings

if TYPE_CHECKING:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo


@dataclass(frozen=True)
class ImageFormat:
    """A format that pictures are written in.

    Attributes:
        suffixes: Endings of its files' names. The first is that of `generate_batch`.
        max_side: Pixels that a side can have.
        options: For `PIL.Image.Image.save`.
    """

    suffixes: tuple[str, ...]
    max_side: int
    options: dict[str, int] = field(default_factory=dict)


# By Pillow's names in lower case. JPEG keeps its colours at full resolution.
FORMATS = {
    "png": ImageFormat((".png",), 2**31 - 1),
    "jpeg": ImageFormat((".jpg", ".jpeg"), 65500, {"quality": 95, "subsampling": 0}),
    "webp": ImageFormat((".webp",), 16383, {"quality": 95}),
}
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
UNICODE = b"UNICODE\0"  # How a UserComment begins whose text is UTF-16


@dataclass(frozen=True)
class Drawing:
    """A picture and how it came about.

    Attributes:
        image: The picture.
        settings: What it was drawn with.
        revised_prompt: The prompt as the prompt enhancer rewrote it, None without it.
        seconds: Wall time of drawing it.
        batch_size: Pictures that were denoised together.
        products: ``"int8"`` or ``"fp8"`` if the transformer's blocks multiplied in it.
        dtype: Of the computation, ``"bfloat16"`` for example.
        fast: ``"exact"`` if the pipeline was loaded so, and it made a difference.
    """

    image: Image.Image
    settings: Settings
    revised_prompt: str | None
    seconds: float
    batch_size: int = 1
    products: str | None = None
    dtype: str | None = None
    fast: str | None = None


def output_paths(output: Path, count: int) -> list[Path]:
    """Where the pictures go: `output` itself for one, ``out-1.png``, ``out-2.png`` ... beside it for several."""
    if count == 1:
        return [output]
    digits = len(str(count))
    return [output.with_name(f"{output.stem}-{number:0{digits}}{output.suffix}") for number in range(1, count + 1)]


def check_output(path: Path) -> None:
    """Refuse a path to which no picture can be written, by trying it.

    Raises:
        InvalidSettings: Of no known format, a folder, in no folder or one that can't be written to, or too long a name.
    """
    format_of(path)
    if os.path.isdir(path):  # which takes names of any length
        raise InvalidSettings(f"Output {path} is a folder: name a picture's file in it.")
    if not path.parent.is_dir():
        raise InvalidSettings(f"Output folder {path.parent} doesn't exist: make it first, or name another.")
    _check_writable(path.parent)
    check_name(path)


def check_name(path: Path) -> None:
    """Refuse a file name that the file system refuses, by making the file that a picture is first written to.

    Raises:
        InvalidSettings: The name is too long, as a rule.
    """
    temporary = _temporary(path)
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise InvalidSettings(f"Output {path} can't be written ({error.strerror}): use a shorter name.") from error


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


def format_of(path: Path) -> str:
    """The format that a file name's ending stands for: ``"png"``, ``"jpeg"`` or ``"webp"``.

    Raises:
        InvalidSettings: It stands for none of them.
    """
    for name, image_format in FORMATS.items():
        if path.suffix.lower() in image_format.suffixes:
            return name
    raise InvalidSettings(f"Output {path} is none of PNG (.png), JPEG (.jpg, .jpeg) and WebP (.webp): name it so.")


def check_side(image_format: str, width: int, height: int) -> None:
    """Refuse a picture that a format has no room for.

    Raises:
        InvalidSettings: A side is too long.
    """
    longest = FORMATS[image_format].max_side
    if max(width, height) > longest:
        raise InvalidSettings(f"{width}x{height} is too large for {image_format}, up to {longest} a side: use PNG.")


def save_picture(drawing: Drawing, path: Path, *, model: str, revision: str | None = None) -> None:
    """Write a picture with its settings, in the format of the file name's ending. Readers see the whole file or none.

    The settings are prompt, revised_prompt (if any), negative_prompt, seed, steps, guidance_scale, width, height,
    model, revision (if any), versions, dtype, products (if in 8 bits), fast (if ``"exact"``), guidance_until and cache
    (if steps left anything out), and lora (if any). `read_settings` has them back.

    Args:
        drawing: What to write.
        path: The file, replaced if it exists.
        model: Name of the model.
        revision: Commit of a Hub repository.

    Raises:
        InvalidSettings: The ending stands for no format.
        DiskFull: The disk is full.
        WriteFailed: The file can't be written, or its format has no room for the settings.
    """
    image_format = format_of(path)
    try:
        with writing(path), replacing(path) as temporary:
            _encode(drawing, temporary, image_format, _described(drawing, model, revision))
    except ValueError as error:  # Pillow's, for EXIF beyond the 64 KiB that JPEG has room for
        raise WriteFailed(f"{path} has no room for its settings ({error}): use PNG for prompts this long.") from error


def png_bytes(drawing: Drawing, *, model: str, revision: str | None = None) -> bytes:
    """The bytes of the PNG file that `save_picture` writes with these arguments."""
    buffer = io.BytesIO()
    _encode(drawing, buffer, "png", _described(drawing, model, revision))
    return buffer.getvalue()


def read_settings(path: Path) -> dict[str, str]:
    """The settings that `save_picture` wrote into a PNG, JPEG or WebP file. Empty for another picture.

    Raises:
        OSError: The file isn't there or is no picture.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngImageFile

    with Image.open(path) as image:
        if isinstance(image, PngImageFile):
            return dict(image.text)
        comment = image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT, b"")
    if not isinstance(comment, bytes) or not comment.startswith(UNICODE):
        return {}
    try:
        settings = json.loads(comment.removeprefix(UNICODE).decode("utf-16-be"))
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def _encode(drawing: Drawing, target: Path | io.BytesIO, image_format: str, settings: dict[str, str]) -> None:
    kept = _png_chunks(settings) if image_format == "png" else {"exif": _exif(settings)}
    drawing.image.save(target, format=image_format, **kept, **FORMATS[image_format].options)


def _described(drawing: Drawing, model: str, revision: str | None) -> dict[str, str]:
    """What a file says about its picture."""
    settings = drawing.settings
    described: dict[str, object] = {
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
    if settings.guidance_until != ALL_STEPS:
        described["guidance_until"] = settings.guidance_until
    if settings.cache != EVERY_STEP:
        described["cache"] = settings.cache
    if revision is not None:
        described["revision"] = revision
    computation = {"dtype": drawing.dtype, "products": drawing.products, "fast": drawing.fast}
    described |= {name: value for name, value in computation.items() if value is not None}
    if settings.lora:
        described["lora"] = "; ".join(map(str, settings.lora))
    if drawing.revised_prompt is not None:
        described["revised_prompt"] = drawing.revised_prompt
    return {key: str(value) for key, value in described.items()}


def _png_chunks(settings: dict[str, str]) -> dict[str, PngInfo]:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in settings.items():
        info.add_text(key, value)  # Pillow writes text beyond Latin-1 as an iTXt chunk, in UTF-8
    return {"pnginfo": info}


def _exif(settings: dict[str, str]) -> bytes:
    """EXIF with the settings as JSON in the UserComment."""
    from PIL import Image

    exif = Image.Exif()
    exif.endian = ">"  # Some readers take the comment's UTF-16 for big-endian whatever the rest is
    exif[EXIF_IFD] = {USER_COMMENT: UNICODE + json.dumps(settings, ensure_ascii=False).encode("utf-16-be")}
    # Pillow knows no type for this tag and writes BYTE (1), where the standard, and some readers, want UNDEFINED (7).
    entry = USER_COMMENT.to_bytes(2, "big")
    return exif.tobytes().replace(entry + b"\0\1", entry + b"\0\7", 1)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file in the same folder that replaces `path` at the end, or is removed after an error."""
    temporary = _temporary(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the system while `path` is written, as ones that say what to do.

    Raises:
        DiskFull: The disk is full.
        WriteFailed: Any other one.
    """
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise DiskFull(
                f"{path} could not be written: the disk is full. Free some space and run the command again."
            ) from error
        reason = error.strerror or error
        raise WriteFailed(f"{path} could not be written ({reason}): mend that, or name another.") from error


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left of files that they were writing."""
    for suffix in (".jsonl", *(suffix for each in FORMATS.values() for suffix in each.suffixes)):
        for leftover in folder.glob(f".*{suffix}.[0-9]*.tmp"):
            leftover.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _check_writable(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidSettings(
            f"Output folder {folder} can't be written to ({error.strerror}): name another."
        ) from error
