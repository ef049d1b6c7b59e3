"""A load leaves the objects of a large process alone, and changes nothing about the collector."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ernie_image_nf4 import load
from ernie_image_nf4.loading import garbage_collection
from ernie_image_nf4.loading.garbage_collection import move_to_oldest_generation

OBJECTS = 2_000_000  # collected in 60 ms, while a load's own objects take 4


class Cell:
    pass


@contextmanager
def time_collecting() -> Iterator[list[float]]:
    """Seconds of this thread in each collection."""
    seconds: list[float] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seconds.append(-time.thread_time())
        else:
            seconds[-1] += time.thread_time()

    gc.callbacks.append(note)
    try:
        yield seconds
    finally:
        gc.callbacks.remove(note)


def young_objects() -> list[list]:
    """Many objects that no collection has seen, as after a program's imports."""
    gc.collect()
    gc.disable()
    objects = [[] for _ in range(OBJECTS)]
    gc.enable()
    return objects


def test_a_load_takes_no_time_for_the_objects_that_were_there_before(repository):
    load(repository, device="cpu")  # with which imports end
    enabled, thresholds = gc.isenabled(), gc.get_threshold()
    objects = young_objects()
    with time_collecting() as during_a_load:
        load(repository, device="cpu")
    objects = young_objects()
    with time_collecting() as collecting_them:
        gc.collect(0)
    assert len(objects) == OBJECTS
    assert sum(during_a_load) < 0.5 * sum(collecting_them)
    assert (gc.isenabled(), gc.get_threshold()) == (enabled, thresholds)


def test_what_a_caller_has_frozen_is_never_collected(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(garbage_collection, "FROZEN_BY_PYTHON", 0)
    cell = Cell()
    cell.itself = cell
    reference = weakref.ref(cell)
    del cell
    gc.freeze()
    try:
        move_to_oldest_generation()
        gc.collect()
        assert reference() is not None
    finally:
        gc.unfreeze()
    gc.collect()
    assert reference() is None
