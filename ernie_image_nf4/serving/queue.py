"""The queue: pictures wait in the order of their arrival, and those of one shape are taken out together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from ..generation.settings import LoraUse, Settings
from .requests import DrawRequest

MAX_BATCH = 8  # as in `generation.schedule`, which imports torch; a test compares them

Shape = tuple[int, int, int, float, float, int, tuple[LoraUse, ...]]


@dataclass(eq=False)
class Pending:
    """A picture that waits or is being drawn.

    Attributes:
        owner: Identifies the request that it belongs to.
        index: Of the request's pictures, which one.
        settings: What to draw, and how.
        alone: Whether it is to be drawn in a batch of its own: the worker that had it died, and if it is to blame, its
            neighbours aren't to suffer again.
    """

    owner: int
    index: int
    settings: Settings
    alone: bool = False

    @property
    def shape(self) -> Shape:
        """What pictures of a batch have in common."""
        each = self.settings
        size = each.height, each.width, each.num_inference_steps
        return *size, each.guidance_scale, each.guidance_until, each.cache, each.lora

    @property
    def pixels(self) -> int:
        return self.settings.height * self.settings.width


def pictures_of(request: DrawRequest, owner: int, seed: int, loras: Mapping[str, LoraUse]) -> list[Pending]:
    """The pictures of a request.

    Args:
        request: What to draw.
        owner: Identifies the request.
        seed: Of the first picture, the next ones count up.
        loras: Those that the server offers, by name.
    """
    lora = tuple(replace(loras[name], strength=float(strength)) for name, strength in request.lora)
    return [
        Pending(
            owner,
            index,
            Settings(
                prompt=request.prompt,
                negative_prompt=request.negative_prompt,
                height=request.height,
                width=request.width,
                num_inference_steps=request.steps,
                guidance_scale=float(request.guidance_scale),
                seed=seed + index,
                use_pe=request.use_pe,
                guidance_until=float(request.guidance_until),
                cache=request.cache,
                lora=lora,
            ),
        )
        for index in range(request.count)
    ]


@dataclass
class PictureQueue:
    """Pictures that wait, the oldest first."""

    waiting: list[Pending] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.waiting)

    def add(self, pictures: list[Pending]) -> None:
        """Put pictures at the end."""
        self.waiting += pictures

    def put_back(self, pictures: list[Pending]) -> None:
        """Put pictures at the front: they had their turn, and their worker died."""
        self.waiting[:0] = pictures

    def take(self, batch_size: Callable[[Pending], int], at_most: int = MAX_BATCH) -> list[Pending]:
        """Take out the oldest picture, and with it, by age, those of its shape that its batch has room for.

        Args:
            batch_size: How many pictures like this one can be drawn together.
            at_most: Pictures to take.
        """
        if not self.waiting:
            return []
        first = self.waiting[0]
        alike = [each for each in self.waiting if each.shape == first.shape and not each.alone]
        batch = [first] if first.alone else alike[: min(at_most, batch_size(first))]
        self.waiting = [each for each in self.waiting if not any(each is taken for taken in batch)]
        return batch

    def remove(self, owner: int) -> list[Pending]:
        """Take out what waits of a request."""
        removed = [each for each in self.waiting if each.owner == owner]
        self.waiting = [each for each in self.waiting if each.owner != owner]
        return removed

    def positions(self) -> Iterator[tuple[int, int]]:
        """Each request of which the first waiting picture is still here, and how many pictures are before that."""
        seen: set[int] = set()
        for position, each in enumerate(self.waiting):
            if each.owner not in seen:
                seen.add(each.owner)
                yield each.owner, position
