"""Which steps have guidance and which are computed, for any number of steps."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from conftest import CHECKOUT

from ernie_image_nf4.errors import InvalidSettings
from ernie_image_nf4.fast.step_plan import DEFAULT_CACHE, Skipping, cache_interval, check_skipping, plan_steps


def computed(count: int, cache: int) -> list[int]:
    return [number for number, step in enumerate(plan_steps(count, Skipping(cache=cache))) if step.computed]


def guided(count: int, share: float) -> list[bool]:
    return [step.guided for step in plan_steps(count, Skipping(guidance_until=share))]


@pytest.mark.parametrize("count", [0, 1, 2, 8, 25, 50])
def test_by_default_every_step_is_computed_with_guidance(count):
    assert plan_steps(count, Skipping()) == [(True, True)] * count
    assert Skipping().is_off


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(8, 0.5, 4), (50, 0.5, 25), (25, 0.5, 13), (25, 0.3, 8), (100, 0.07, 7), (8, 1.0, 8), (8, 0.01, 1), (1, 0.5, 1)],
)
def test_guidance_is_for_the_first_part_of_the_steps_and_at_least_one(count, share, expected):
    assert guided(count, share) == [True] * expected + [False] * (count - expected)


@pytest.mark.parametrize(
    ("count", "cache", "expected"),
    [
        (25, 3, [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24]),
        (12, 2, [0, 1, 3, 5, 7, 9, 11]),
        (12, 4, [0, 1, 5, 9, 11]),
        (8, 3, [0, 1, 4, 7]),
        (3, 100, [0, 2]),
        (1, 3, [0]),
    ],
)
def test_a_cache_computes_the_first_steps_every_nth_and_the_last(count, cache, expected):
    assert computed(count, cache) == expected


def test_the_default_cache_leaves_out_more_than_half_of_the_steps_that_the_model_recommends():
    assert cache_interval(True) == DEFAULT_CACHE
    assert cache_interval(False) == 1
    assert cache_interval(4) == 4
    for count in (25, 50):
        assert len(computed(count, DEFAULT_CACHE)) < 0.5 * count


@pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan"), float("inf"), "half", True, [0.5]])
def test_a_share_that_cannot_work_is_refused(share):
    with pytest.raises(InvalidSettings, match="is no share of the steps for guidance_until: use a number above 0 to 1"):
        check_skipping(guidance_until=share)


@pytest.mark.parametrize("cache", [0, -1, 2.5, "often", [3]])
def test_a_cache_that_cannot_work_is_refused(cache):
    with pytest.raises(InvalidSettings, match="is no number of steps for cache: use a whole number, 3 to compute"):
        check_skipping(cache=cache)


def test_what_works_is_not_refused():
    check_skipping()
    check_skipping(1, 1)
    check_skipping(np.float64(0.3), True)


def test_settings_are_checked_without_torch():
    code = "import sys, ernie_image_nf4.generation.settings; print({'torch', 'diffusers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    assert out == "set()\n"
