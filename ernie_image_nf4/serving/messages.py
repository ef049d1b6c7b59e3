"""What the server and a worker tell each other through their pipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..generation.settings import Settings


@dataclass(frozen=True)
class WorkerOptions:
    """What a worker loads.

    Attributes:
        model: Folder or Hub id as the user gave it, None for the repository of this package.
        folder: Where the repository lies.
        device: As for `load`.
        loading: Further arguments of `load`.
        loras: Files of the LoRAs that the server offers, by their SHA-256.
    """

    model: str | None
    folder: str
    device: str | None = None
    loading: dict[str, Any] = field(default_factory=dict)
    loras: dict[str, Path] = field(default_factory=dict)


# To a worker


@dataclass(frozen=True)
class Task:
    """A picture of a batch. `number` is unique in the life of a server."""

    number: int
    settings: Settings


@dataclass(frozen=True)
class Draw:
    """A batch: pictures of one shape."""

    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Drop:
    """Nobody waits for these pictures any more. Those that are finished may be among them."""

    numbers: frozenset[int]


# From a worker


@dataclass(frozen=True)
class Ready:
    """The model is loaded.

    Attributes:
        device: On which.
        devices: All that the machine has of this kind.
    """

    device: str
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Unable:
    """The model can't be loaded, for a reason that the user can mend."""

    text: str


@dataclass(frozen=True)
class Idle:
    """The worker waits for a batch.

    Attributes:
        pixels_at_once: Of how many pictures together there is room for, by free memory. None for one picture at a time.
        batch_sizes: Pixels of a picture -> the batch size that an out-of-memory error left.
    """

    pixels_at_once: int | None
    batch_sizes: dict[int, int]


@dataclass(frozen=True)
class TextRevised:
    """The prompt enhancer has written a picture's prompt."""

    number: int
    prompt: str


@dataclass(frozen=True)
class StepDone:
    """Pictures have had this many denoising steps."""

    numbers: tuple[int, ...]
    step: int


@dataclass(frozen=True)
class Drawn:
    """A finished picture, as the bytes of its PNG file."""

    number: int
    png: bytes
    revised_prompt: str | None
    batch_size: int


@dataclass(frozen=True)
class Failed:
    """Why there is no picture."""

    number: int
    text: str
