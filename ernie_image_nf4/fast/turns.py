"""Turns: one thread at a time uses what keeps state between calls, and finds the GPU's work on it in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .subclassing import Runtime


class Turn(Runtime):
    """A lock of a pipeline or model. Copies and pickles get one of their own.

    The GPU may still be at work for the thread before when a call returns. So a thread that computes on another stream
    waits for that work, on the GPU.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None

    @contextmanager
    def take(self, device: torch.device) -> Iterator[None]:
        """Wait for the turn and hold it. A thread that holds it already may take it again.

        Args:
            device: Where the work is.
        """
        with self._lock:
            if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
                yield
                return
            stream = torch.cuda.current_stream(device)
            if self._last is not None and self._last[0] != stream:
                stream.wait_event(self._last[1])
            try:
                yield
            finally:
                self._last = stream, stream.record_event()
