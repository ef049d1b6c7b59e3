"""What the page's form holds: values to a request, a picture's own settings to values, and the shapes it offers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InvalidRequest, InvalidSettings
from ..fast.step_plan import ALL_STEPS, EVERY_STEP
from ..generation.image_file import read_settings
from ..generation.settings import LoraUse, read_noted_loras
from ..repository.components import PIXELS_PER_PATCH
from ..repository.metadata import Recommended
from .page_texts import Refusal
from .requests import DrawRequest, Limits, check_request, size_within

MAX_GUIDANCE = 20.0  # of the slider
LORA_STRENGTHS = (0.0, 2.0)  # likewise, within what a request may ask for
SHAPES = {"1:1": 1.0, "4:3": 4 / 3, "3:2": 3 / 2, "16:9": 16 / 9, "3:4": 3 / 4, "2:3": 2 / 3, "9:16": 9 / 16}
MAX_SEED_DIGITS = 30
# Fields that can be left blank by mistake -> key of their label
NUMBERS = {
    "width": "width",
    "height": "height",
    "steps": "steps",
    "guidance_scale": "guidance",
    "guidance_until": "guidance_until",
    "cache": "cache",
    "count": "count",
}
WHOLE_NUMBERS = ("width", "height", "steps", "count", "cache")
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")  # those that the package writes, by Pillow's names
# Sliders for what steps leave out: least, most, what leaves out nothing, and step
SKIPPING = {"guidance_until": (0.05, 1.0, ALL_STEPS, 0.05), "cache": (1, 8, EVERY_STEP, 1)}


def shape_sizes(recommended: Recommended, limits: Limits) -> dict[str, tuple[int, int]]:
    """Width and height in pixels for each shape, of about as many pixels as the recommended size, in whole patches."""
    pixels = recommended.width * recommended.height
    return {name: size_within(limits, *_size(ratio, pixels)) for name, ratio in SHAPES.items()}


def _size(ratio: float, pixels: int) -> tuple[int, int]:
    sides = math.sqrt(pixels * ratio), math.sqrt(pixels / ratio)
    width, height = (max(1, round(side / PIXELS_PER_PATCH)) * PIXELS_PER_PATCH for side in sides)
    return width, height


def request_of(values: Mapping[str, Any], lora: Mapping[str, float]) -> DrawRequest:
    """The request that the form's values make.

    Args:
        values: By the names of `DrawRequest`'s fields, as the form's parts give them. The seed is text, blank for none.
        lora: Name -> strength of the adapters that are chosen.

    Raises:
        Refusal: A number was left out, the prompt is blank, or the seed is no whole number.
    """
    if not values["prompt"].strip():
        raise Refusal("no_prompt")
    for field, key in NUMBERS.items():
        if values[field] is None:
            raise Refusal("missing", field=key)
    seed = values["seed"].strip()
    if seed and not (seed.isdecimal() and len(seed) <= MAX_SEED_DIGITS):
        raise Refusal("not_a_seed", found=seed[:40])
    whole = {field: int(values[field]) for field in WHOLE_NUMBERS}
    return DrawRequest(**{**values, **whole, "seed": int(seed) if seed else None, "lora": tuple(lora.items())})


def read_request(path: Path, name: str, limits: Limits, loras: Mapping[str, LoraUse]) -> tuple[DrawRequest, str | None]:
    """The request that a picture was drawn by, and its prompt as the enhancer rewrote it.

    Args:
        path: The file.
        name: What to call it in messages.
        limits: What the server draws. Larger pictures aren't read either.
        loras: Those that the server offers, by name.

    Raises:
        Refusal: It is no picture, too large, holds no settings, or some that can't be drawn here.
    """
    _check_picture(path, name, limits)
    try:
        settings = read_settings(path)
    except (OSError, ValueError, SyntaxError) as error:  # a damaged file; SyntaxError is Pillow's for broken chunks
        raise Refusal("no_picture", name=name) from error
    if not {"prompt", "seed", "steps"} <= settings.keys():
        raise Refusal("no_settings", name=name)
    try:
        request = _parse(settings, loras)
        check_request(request, limits, lora_names=loras)
    except (InvalidRequest, InvalidSettings) as error:
        raise Refusal("bad_settings", name=name, reason=str(error)) from error
    return request, str(settings["revised_prompt"]) if request.use_pe else None


def max_file_bytes(limits: Limits) -> int:
    """Bytes of the largest file that is read as a picture: its pixels uncompressed, and 1 MiB of settings."""
    return 4 * limits.max_pixels + 2**20


def too_large(name: str, limits: Limits) -> Refusal:
    """Says that a file has too many bytes."""
    return Refusal("too_large", name=name, most=max_file_bytes(limits) // 10**6)


def _check_picture(path: Path, name: str, limits: Limits) -> None:
    """Refuse a file by its size in bytes and the size in its header, before its pixels are decoded."""
    from PIL import Image

    if path.stat().st_size > max_file_bytes(limits):
        raise too_large(name, limits)
    try:
        with Image.open(path, formats=PICTURE_FORMATS) as image:
            pixels = image.width * image.height
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Refusal("no_picture", name=name) from error
    if pixels > limits.max_pixels:
        raise Refusal("too_many_pixels", name=name, pixels=f"{pixels:,}", most=f"{limits.max_pixels:,}")


def _parse(settings: Mapping[str, str], loras: Mapping[str, LoraUse]) -> DrawRequest:
    """A picture's settings as a request for one picture.

    Raises:
        InvalidSettings: One is missing or no number, or there is no such LoRA here.
    """
    guidance = _number(settings, "guidance_scale")
    _check_range("guidance_scale", guidance, 0, MAX_GUIDANCE)
    skipping: dict[str, Any] = {}
    for name, (least, most, usual, _) in SKIPPING.items():
        skipping[name] = _number(settings, name, type(usual)) if name in settings else usual
        _check_range(name, skipping[name], least, most)
    return DrawRequest(
        prompt=str(settings["prompt"]),
        negative_prompt=str(settings.get("negative_prompt", "")),
        width=_number(settings, "width", int),
        height=_number(settings, "height", int),
        steps=_number(settings, "steps", int),
        guidance_scale=guidance,
        seed=_number(settings, "seed", int),
        use_pe="revised_prompt" in settings,
        lora=tuple(_offered(use, loras) for use in read_noted_loras(str(settings.get("lora", "")))),
        **skipping,
    )


def _offered(use: LoraUse, loras: Mapping[str, LoraUse]) -> tuple[str, float]:
    """A picture's LoRA by the name under which the server offers its file, and its strength."""
    name = next((name for name, offered in loras.items() if offered.sha256 == use.sha256), None)
    if name is None:
        raise InvalidSettings(f"its LoRA {use.file} isn't offered here.")
    _check_range(f"LoRA {name}: strength", use.strength, *LORA_STRENGTHS)
    return name, use.strength


def _check_range(name: str, value: float, least: float, most: float) -> None:
    """Refuse what the form's slider has no place for."""
    if not least <= value <= most:
        raise InvalidSettings(f"{name} {value} is out of range: use {least:g} to {most:g}.")


def _number(settings: Mapping[str, str], key: str, kind: type = float) -> Any:
    if key not in settings:
        raise InvalidSettings(f"{key} is missing.")
    try:
        return kind(settings[key])
    except (ValueError, TypeError) as error:
        found = str(settings[key])[:40]
        raise InvalidSettings(f"{key} is {found!r}, not a {'whole ' if kind is int else ''}number.") from error
