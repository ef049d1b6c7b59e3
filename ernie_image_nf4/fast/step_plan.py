"""Which denoising steps compute what, decided before the first one.

Two ways to do less than upstream, both off by default:

- *Guidance for a part of the steps.* Afterwards only the prompt's half of the batch is computed.
- *A cache.* The transformer is computed in some steps only, and its prediction is used again in those after.

A schedule decides, not the pictures: rows of a batch stay independent of each other, nothing waits for the GPU, and the
steps that are computed are the same work each time, so that they can be CUDA graphs. diffusers' caches can't serve
here: ERNIE-Image's transformer has no ``enable_cache``, its blocks aren't registered with the hooks, and where they
decide, they wait for the GPU in each step.

What is kept between steps is the prediction. On the mini it comes closer to the pictures of all steps than what the
blocks added to their input (as TeaCache and first-block caches keep it), and than a straight line through the last two
predictions (as TaylorSeer draws it).

Nothing heavy is imported, so that settings are checked before a model is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import InvalidSettings

ALL_STEPS, EVERY_STEP = 1.0, 1  # off
DEFAULT_CACHE = 3  # what `cache=True` stands for
# Share of the steps that are computed whatever the cache, from the first on: in them the prediction changes most.
FIRST_SHARE = 0.15


@dataclass(frozen=True)
class Skipping:
    """What denoising leaves out.

    Attributes:
        guidance_until: Share of the steps that have guidance, above 0 to 1. At least the first step has.
        cache: Every how many steps the transformer is computed; 1 for all of them.
    """

    guidance_until: float = ALL_STEPS
    cache: int = EVERY_STEP

    @property
    def is_off(self) -> bool:
        return self == Skipping()


class Step(NamedTuple):
    """What one step does.

    Attributes:
        guided: Whether the negative prompt counts.
        computed: Whether the transformer is computed.
    """

    guided: bool
    computed: bool


def check_skipping(guidance_until: float | None = None, cache: int | bool | None = None) -> None:
    """Refuse what can't work; None isn't checked.

    Raises:
        InvalidSettings: Not above 0 to 1, or no whole number from 1 on.
    """
    if guidance_until is not None and not (_is_number(guidance_until) and 0 < guidance_until <= 1):
        raise InvalidSettings(
            f"{guidance_until!r} is no share of the steps for guidance_until: use a number above 0 to 1, such as 0.5. "
            "Without any guidance, set the guidance scale to 1."
        )
    if cache is not None and not isinstance(cache, bool) and not (isinstance(cache, int) and cache >= 1):
        raise InvalidSettings(
            f"{cache!r} is no number of steps for cache: use a whole number, {DEFAULT_CACHE} to compute about every "
            f"{DEFAULT_CACHE}rd step, 1 for all."
        )


def cache_interval(cache: int | bool) -> int:
    """Every how many steps the transformer is computed: True stands for the default interval, False for each step."""
    if isinstance(cache, bool):
        return DEFAULT_CACHE if cache else EVERY_STEP
    return cache


def plan_steps(count: int, skipping: Skipping) -> list[Step]:
    """What each of so many steps does. The first and the last are always computed."""
    guided = max(1, math.floor(skipping.guidance_until * count + 0.5))
    first = math.ceil(FIRST_SHARE * count)
    return [
        Step(step < guided, step < first or (step - first + 1) % skipping.cache == 0 or step == count - 1)
        for step in range(count)
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
