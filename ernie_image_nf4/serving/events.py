"""What happens to a request, in the order in which it happens."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Queued:
    """The request waits. Comes again whenever its place has changed.

    Attributes:
        position: Pictures of other requests that are drawn before its first one.
    """

    position: int


@dataclass(frozen=True)
class Started:
    """A worker has begun with the request's first picture."""


@dataclass(frozen=True)
class Revised:
    """The prompt enhancer has rewritten the prompt. Comes once, for the first picture.

    Attributes:
        prompt: As it is drawn.
    """

    prompt: str


@dataclass(frozen=True)
class Step:
    """A denoising step is done.

    Attributes:
        step: How many are done, from 1.
        steps: How many there are.
        picture: Of the request's pictures, which one, from 0.
    """

    step: int
    steps: int
    picture: int


@dataclass(frozen=True)
class Picture:
    """A picture is finished. They may come in any order.

    Attributes:
        index: Of the request's pictures, which one, from 0.
        image: The picture, opened from `png`.
        png: The file as ``generate`` writes it, settings included.
        seed: What it was drawn with.
        revised_prompt: The prompt as the enhancer rewrote it, None without it.
    """

    index: int
    image: Image.Image
    png: bytes
    seed: int
    revised_prompt: str | None


Event = Queued | Started | Revised | Step | Picture
