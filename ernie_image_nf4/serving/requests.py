"""What can be asked for: a request, the server's limits, and the check that refuses what is outside them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ..errors import InvalidRequest, InvalidSettings
from ..fast.step_plan import ALL_STEPS, EVERY_STEP
from ..generation.settings import check_settings
from ..repository.components import PIXELS_PER_PATCH
from ..repository.metadata import Recommended

MAX_LORA_STRENGTH = 4.0
MAX_GUIDANCE = 100.0


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """What one request asks to draw.

    Attributes:
        prompt: What to draw.
        negative_prompt: What not to draw.
        width: Pixels, a multiple of 16.
        height: Pixels, a multiple of 16.
        steps: Denoising steps.
        guidance_scale: Weight of the prompt against the negative prompt, 1 for none.
        guidance_until: Share of the steps with guidance, as for `set_skipping`.
        cache: Every how many steps the transformer is computed, likewise.
        seed: Of the first picture, the next ones count up. None: the engine takes a random one.
        count: Pictures.
        use_pe: Whether the prompt enhancer rewrites the prompt.
        lora: Names that the server offers, each with its strength.
    """

    prompt: str
    negative_prompt: str = ""
    width: int
    height: int
    steps: int
    guidance_scale: float
    guidance_until: float = ALL_STEPS
    cache: int = EVERY_STEP
    seed: int | None = None
    count: int = 1
    use_pe: bool = True
    lora: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Limits:
    """What a server allows.

    Attributes:
        max_pixels: Width times height of a picture.
        max_steps: Denoising steps of a picture.
        max_count: Pictures of a request.
        max_prompt_characters: Of the prompt, and of the negative prompt.
        max_body_bytes: Of a request to the endpoint.
        queue_length: Pictures that may wait. Further requests are refused until there are fewer.
        seconds: From a request's arrival to its last picture.
    """

    max_pixels: int = 2048 * 2048
    max_steps: int = 100
    max_count: int = 10
    max_prompt_characters: int = 8000
    max_body_bytes: int = 256 * 1024
    queue_length: int = 64
    seconds: float = 600.0


def recommended_within(limits: Limits, recommended: Recommended) -> Recommended:
    """What a request that names no size and no steps gets: the model's, as far as the server allows it."""
    width, height = size_within(limits, recommended.width, recommended.height)
    steps = min(recommended.num_inference_steps, limits.max_steps)
    return replace(recommended, width=width, height=height, num_inference_steps=steps)


def size_within(limits: Limits, width: int, height: int) -> tuple[int, int]:
    """A size in pixels, or where the server doesn't allow it a smaller one of about the same shape."""
    scale = min(1.0, (limits.max_pixels / (width * height)) ** 0.5)
    width, height = (max(1, int(side * scale) // PIXELS_PER_PATCH) * PIXELS_PER_PATCH for side in (width, height))
    return width, height


def check_request(request: DrawRequest, limits: Limits, *, lora_names: Collection[str]) -> None:
    """Refuse a request that can't be drawn or that the server doesn't allow.

    Args:
        request: What is asked for.
        limits: What is allowed.
        lora_names: The adapters that the server offers.

    Raises:
        InvalidRequest: With the field of `DrawRequest` at fault; ``size`` for width times height.
    """
    for field in ("prompt", "negative_prompt"):
        _check_text(field, getattr(request, field), limits.max_prompt_characters)
    with _naming("prompt"):
        check_settings(request.prompt)
    for field in ("width", "height", "steps", "count"):
        with _naming(field):
            check_settings("-", **{field: getattr(request, field)})
    with _naming("guidance_scale"):
        check_settings("-", guidance=request.guidance_scale)
    with _naming("guidance_until"):
        check_settings("-", guidance_until=request.guidance_until)
    with _naming("cache"):
        check_settings("-", cache=request.cache)
    with _naming("seed"):
        check_settings("-", seed=request.seed, count=request.count)

    if request.width * request.height > limits.max_pixels:
        raise InvalidRequest(
            "size",
            f"{request.width}x{request.height} is larger than this server draws: at most {limits.max_pixels} pixels.",
        )
    for field, most in (("steps", limits.max_steps), ("count", limits.max_count), ("guidance_scale", MAX_GUIDANCE)):
        if getattr(request, field) > most:
            raise InvalidRequest(
                field, f"{getattr(request, field)} is too many for {field}: this server allows up to {most}."
            )
    _check_lora(request.lora, lora_names)


def _check_text(field: str, text: str, longest: int) -> None:
    if len(text) > longest:
        raise InvalidRequest(field, f"{field} has {len(text)} characters: this server takes up to {longest}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise InvalidRequest(
            field, f"{field} is no valid Unicode text at character {error.start}: send it as UTF-8."
        ) from error


def _check_lora(lora: tuple[tuple[str, float], ...], lora_names: Collection[str]) -> None:
    names = [name for name, _ in lora]
    for name, strength in lora:
        if name not in lora_names:
            offered = ", ".join(lora_names) or "none"
            raise InvalidRequest("lora", f"No LoRA is called {name!r} here: this server offers {offered}.")
        if not -MAX_LORA_STRENGTH <= strength <= MAX_LORA_STRENGTH:
            raise InvalidRequest(
                "lora", f"Strength {strength} is out of range: use {-MAX_LORA_STRENGTH} to {MAX_LORA_STRENGTH}."
            )
    if len(set(names)) < len(names):
        raise InvalidRequest("lora", "A LoRA is named twice: name it once, with the sum of the strengths.")


@contextmanager
def _naming(field: str) -> Iterator[None]:
    """Let an error of `check_settings` name the field."""
    try:
        yield
    except InvalidSettings as error:
        raise InvalidRequest(field, str(error)) from error
