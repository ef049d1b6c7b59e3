"""CUDA streams on which one owner at a time captures.

torch has 32 streams of each priority a device, and hands them out in turn. What another owner starts on a stream that
is being captured would become part of the graph. And cuBLAS keeps a workspace for each stream on which it was used, in
which no two graphs may work at once. So captures get streams of the high priority, which nothing else here uses, and a
stream that is given back serves the next owner, with the workspace that it has.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from queue import Empty, SimpleQueue

import torch

PRIORITY = -1
STREAMS_OF_A_PRIORITY = 32  # that torch has for a device


class CaptureStreams:
    """The capture streams of this process's devices."""

    def __init__(self) -> None:
        self._free: defaultdict[torch.device, SimpleQueue[torch.cuda.Stream]] = defaultdict(SimpleQueue)
        self._made: set[torch.cuda.Stream] = set()
        self._making = threading.Lock()

    def take(self, device: torch.device) -> torch.cuda.Stream:
        """A stream of the device that has no owner.

        Raises:
            RuntimeError: All have one.
        """
        try:
            return self._free[device].get_nowait()
        except Empty:
            pass
        with self._making:
            for _ in range(STREAMS_OF_A_PRIORITY):  # torch may have handed some to others since
                stream = torch.cuda.Stream(device, priority=PRIORITY)
                if stream not in self._made:
                    self._made.add(stream)
                    return stream
        raise RuntimeError(f"All streams of {device} are captured on by other models.")

    def give_back(self, stream: torch.cuda.Stream) -> None:
        """Let another owner have the stream. May be called in the middle of `take`, by a garbage collection."""
        self._free[stream.device].put(stream)


STREAMS = CaptureStreams()


class CaptureStream:
    """A stream of `STREAMS`, which is given back when its owner goes.

    Attributes:
        stream: The stream.
        device: Its device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = STREAMS.take(device)
        self._give_back: Callable[[torch.cuda.Stream], None] | None = STREAMS.give_back

    def abandon(self) -> None:
        """Never give it back: a capture has failed on it."""
        self._give_back = None

    def __del__(self) -> None:
        if give_back := vars(self).get("_give_back"):
            give_back(self.stream)
