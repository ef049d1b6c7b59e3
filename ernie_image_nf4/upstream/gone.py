"""What to say when an upstream name is gone."""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger(__name__)


@functools.cache
def note_gone(name: str, consequence: str) -> None:
    """Say once a process, at INFO, that an upstream name is gone."""
    logger.info("%s is gone from this version: %s.", name, consequence)
