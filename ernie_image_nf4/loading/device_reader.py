"""Weight files read straight to a GPU, while Python builds the models that they are for.

Python takes longer to build the full-size models than the weights take to be read, so both happen at once:
`DeviceReader.start` reserves a place on the device for each tensor, `view` gives the tensor there, and `wait` returns
when all have arrived. Several threads read large ranges into page-locked staging buffers and send them, with few calls
for each range: a thread takes the GIL after every call, and the thread that builds the models waits for it.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from queue import SimpleQueue

import torch

from ..errors import InvalidRepository
from ..memory.pinned_memory import PinnedBlock, pinned_buffer
from ..repository.safetensors_io import DTYPES, StoredTensor, host_bytes
from ..repository.security import DOWNLOAD_AGAIN, unreadable

READERS = 4
BUFFER_BYTES = 32 * 1024**2  # of one reader; all are one page-locked block
ALIGNMENT = 256  # of tensors on the device
RANGE_TENSORS = 1000  # buffers of one preadv; IOV_MAX is 1,024
RANGE_BYTES = BUFFER_BYTES - RANGE_TENSORS * ALIGNMENT  # of a file that are read at once


@dataclass(frozen=True)
class ReadRange:
    """A range of a file without gaps, which is read at once.

    Attributes:
        start: Its first byte in the file.
        parts: Where its bytes go, in the file's order: first byte on the device, and number of bytes.
    """

    start: int
    parts: list[tuple[int, int]]


@dataclass(frozen=True)
class StagingBuffer:
    """What one read at a time passes through on its way to the device.

    Attributes:
        memory: (BUFFER_BYTES,) uint8 on the host, page-locked where there is CUDA.
        bytes: The same memory.
        stream: For the copies to the device; None where there is no CUDA.
    """

    memory: torch.Tensor
    bytes: memoryview
    stream: torch.cuda.Stream | None


class DeviceReader:
    """Reads tensors of files to one device, in threads of its own. A context: at its end unfinished reads stop."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory: dict[Path, torch.Tensor] = {}  # (bytes,) uint8 on the device
        # File and offset of a tensor -> its first byte in the file's memory.
        self._places: dict[tuple[Path, int], int] = {}
        self._staging: PinnedBlock | None = None
        self._reads: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(READERS)
        self._buffers: SimpleQueue[StagingBuffer] = SimpleQueue()
        self._open = ExitStack()  # the files
        self._seeking = threading.Lock()

    def __enter__(self) -> DeviceReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._open.close()
        self._reads.clear()
        self._memory.clear()
        self._buffers, self._staging = SimpleQueue(), None

    def start(self, tensors: Iterable[StoredTensor]) -> None:
        """Start reading these tensors, of one file or several. To be called once.

        Raises:
            InvalidRepository: A file can't be opened.
        """
        by_file: dict[Path, list[StoredTensor]] = defaultdict(list)
        for stored in tensors:
            by_file[stored.file].append(stored)
        ranges: dict[Path, list[ReadRange]] = {}
        for file, its_tensors in by_file.items():
            places, ranges[file], size = plan_reads(its_tensors)
            self._places |= {(file, offset): place for offset, place in places.items()}
            with torch.inference_mode(False):  # inference tensors can't become parameters that are moved later
                self._memory[file] = torch.empty(size, dtype=torch.uint8, device=self.device)
        # Before the threads start: while page-locked memory is allocated, other CUDA calls wait, holding Python's lock.
        if ranges:
            self._make_buffers()
        for file, its_ranges in ranges.items():
            memory, stream = self._memory[file], self._open.enter_context(opened(file))
            for each in its_ranges:
                target = memory[each.parts[0][0] : sum(each.parts[-1])]
                self._reads.append(self._pool.submit(self._read, stream, each, target))

    def view(self, stored: StoredTensor) -> torch.Tensor | None:
        """The tensor on the device, None if it isn't among those that are read. Its values are there after `wait`."""
        place = self._places.get((stored.file, stored.offset))
        if place is None:
            return None
        data = self._memory[stored.file][place : place + stored.spec.bytes]
        # A storage of its own on the same memory: pickles of a tensor hold its whole storage.
        with torch.cuda.device_of(data):  # DLPack exports from the current GPU only
            return torch.from_dlpack(data).view(DTYPES[stored.spec.dtype]).view(stored.spec.shape)

    def wait(self) -> None:
        """Wait until all tensors are on the device.

        Raises:
            InvalidRepository: A file couldn't be read.
        """
        for read in self._reads:
            read.result()

    def _make_buffers(self) -> None:
        self._staging = pinned_buffer(READERS * BUFFER_BYTES, self.device)
        for part in self._staging.memory.chunk(READERS):
            stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
            if stream:  # work that was queued before may still use the memory that the tensors go to
                stream.wait_stream(torch.cuda.current_stream(self.device))
            self._buffers.put(StagingBuffer(part, host_bytes(part), stream))

    def _read(self, file: FileIO, part: ReadRange, target: torch.Tensor) -> None:
        buffer = self._buffers.get()
        try:
            first = part.parts[0][0]
            views = [buffer.bytes[place - first : place - first + size] for place, size in part.parts]
            read_into(file, part.start, views, self._seeking)
            with torch.cuda.stream(buffer.stream):  # None changes nothing
                target.copy_(buffer.memory[: len(target)], non_blocking=True)
            if buffer.stream:
                buffer.stream.synchronize()
        finally:
            self._buffers.put(buffer)


def plan_reads(tensors: Iterable[StoredTensor]) -> tuple[dict[int, int], list[ReadRange], int]:
    """Plan how tensors of one file are read to the device.

    Returns:
        Offset of each tensor in the file -> its first byte on the device; the ranges to read; the bytes needed on the
        device.
    """
    places: dict[int, int] = {}
    ranges: list[ReadRange] = []
    end = length = 0  # of the memory taken, and of the last range
    for stored in sorted(tensors, key=lambda stored: stored.offset):
        size = stored.spec.bytes
        if not size:
            continue
        end = -(-end // ALIGNMENT) * ALIGNMENT
        places[stored.offset] = end
        for start in range(0, size, RANGE_BYTES):
            part = end + start, min(RANGE_BYTES, size - start)
            follows = ranges and ranges[-1].start + length == stored.offset + start
            if not follows or length + part[1] > RANGE_BYTES or len(ranges[-1].parts) == RANGE_TENSORS:
                ranges.append(ReadRange(stored.offset + start, []))
                length = 0
            ranges[-1].parts.append(part)
            length += part[1]
        end += size
    return places, ranges, end


def opened(file: Path) -> FileIO:
    """The file, opened to be read without a buffer.

    Raises:
        InvalidRepository: It can't be.
    """
    try:
        return file.open("rb", buffering=0)
    except OSError as error:
        raise unreadable(file, error) from error


def read_into(file: FileIO, start: int, views: list[memoryview], seeking: threading.Lock) -> None:
    """Fill `views`, one after the other, with what a file has from `start` on.

    Args:
        file: The file, which other threads may read at the same time.
        start: First byte to read.
        views: Where to. The list is used up.
        seeking: Held while the file's position is used, on systems without ``preadv`` (Windows).

    Raises:
        InvalidRepository: The file is shorter, or can't be read.
    """
    try:
        while views:
            if hasattr(os, "preadv"):
                count = os.preadv(file.fileno(), views, start)
            else:
                with seeking:
                    file.seek(start)
                    count = file.readinto(views[0])
            if not count:
                raise InvalidRepository(f"{file.name} became shorter while it was read: {DOWNLOAD_AGAIN}.")
            start += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]
    except OSError as error:
        raise unreadable(str(file.name), error) from error
