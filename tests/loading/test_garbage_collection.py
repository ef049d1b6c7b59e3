"""No full collection in the middle of a load, and no setting of the collector changed by one."""

from __future__ import annotations

import gc

import pytest

from ernie_image_nf4 import load
from ernie_image_nf4.loading import garbage_collection
from ernie_image_nf4.loading.garbage_collection import move_to_oldest_generation


class Cell:
    pass


def test_live_objects_are_in_the_oldest_generation():
    cell = Cell()
    move_to_oldest_generation()
    assert any(each is cell for each in gc.get_objects(generation=2))
    assert gc.get_count()[1:] == (0, 0)


def test_what_a_caller_has_frozen_stays_frozen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(garbage_collection, "FROZEN_BY_PYTHON", 0)
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        move_to_oldest_generation()
        assert gc.get_freeze_count() == frozen
    finally:
        gc.unfreeze()


def test_a_load_triggers_no_full_collection(repository):
    generations: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            generations.append(info["generation"])

    enabled, thresholds = gc.isenabled(), gc.get_threshold()
    gc.callbacks.append(note)
    try:
        for _ in range(3):
            load(repository, device="cpu")
    finally:
        gc.callbacks.remove(note)
    assert 2 not in generations
    assert (gc.isenabled(), gc.get_threshold()) == (enabled, thresholds)
