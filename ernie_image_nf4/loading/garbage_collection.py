"""Python's garbage collection around loading."""

from __future__ import annotations

import gc

FROZEN_BY_PYTHON = 2000  # objects at most. Python 3.12 starts with 375; a caller who freezes has thousands.


def move_to_oldest_generation() -> None:
    """Move live objects to the oldest GC generation, and count new ones from here.

    Otherwise the first load, and then the first picture, trigger a full collection, which walks all that the imports
    have made and finds nothing. The collector stays on, for all threads. Objects that a caller has frozen stay so.
    """
    if gc.get_freeze_count() <= FROZEN_BY_PYTHON:
        gc.freeze()
        gc.unfreeze()
