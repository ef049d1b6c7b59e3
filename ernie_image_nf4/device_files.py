"""Weight files read straight to a GPU, while Python builds the models that they are for.

Building the full-size models takes Python more than a second, and so does reading 8 GB by one thread. Here several threads
read large pieces into page-locked buffers and send them; each piece is a single system call, as threads would wait for
Python's lock between small ones. Upstream meanwhile maps the same files into host memory, without reading them: where a
tensor lies in the mapping says where it lies on the device.
"""

from __future__ import annotations

import io
import mmap
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from .errors import InvalidRepository
from .guard import DOWNLOAD_AGAIN
from .tensors import StoredTensor
from .weight_blocks import tensors_of

READERS = 8
BUFFER_BYTES = 32 * 1024**2  # PyTorch rounds pinned allocations up to a power of two
ALIGNMENT = 256  # of tensors on the device
PIECE_TENSORS = 1000  # parts of one read; systems take 1,024
PIECE_BYTES = BUFFER_BYTES - PIECE_TENSORS * ALIGNMENT  # of a file that are read at once


@dataclass(frozen=True)
class Piece:
    """A range of a file without gaps.

    Attributes:
        start: Of its first byte in the file.
        parts: Where the bytes go, in the file's order: first byte on the device, and count.
    """

    start: int
    parts: list[tuple[int, int]]


@dataclass
class FileOnDevice:
    """A file's tensors on the device, or on their way there.

    Attributes:
        places: Offset of a tensor in the file -> its bytes and its first byte in `memory`.
        memory: (bytes,) uint8.
        reads: One for each piece.
    """

    places: dict[int, tuple[int, int]]
    memory: torch.Tensor
    reads: list[Future[None]] = field(default_factory=list)

    def view(self, tensor: torch.Tensor, offset: int) -> torch.Tensor | None:
        """The tensor that has `offset` in the file, None if there is none of its size."""
        size, start = self.places.get(offset, (None, 0))
        if size != tensor.nbytes or not size:
            return None
        return self.memory[start : start + size].view(tensor.dtype).view(tensor.shape)


class DeviceReader:
    """Reads files to one device in threads of its own. A context: what is under way when it ends is given up."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.files: dict[Path, FileOnDevice] = {}
        self._pool = ThreadPoolExecutor(READERS)
        self._threads = threading.local()

    def __enter__(self) -> DeviceReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self.device.type == "cuda" and hasattr(torch.accelerator, "empty_host_cache"):  # since PyTorch 2.12
            torch.accelerator.empty_host_cache()

    def start(self, tensors: Iterable[StoredTensor]) -> None:
        """Start reading these tensors, of one file or several."""
        by_file: dict[Path, list[StoredTensor]] = defaultdict(list)
        for stored in tensors:
            by_file[stored.file].append(stored)
        for file, stored in by_file.items():
            places, pieces, size = plan_reads(stored)
            memory = torch.empty(size, dtype=torch.uint8, device=self.device)
            # It may still be in use by work that was queued before it was freed.
            free = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None
            self.files[file] = FileOnDevice(places, memory)
            self.files[file].reads = [self._pool.submit(self._read, file, memory, piece, free) for piece in pieces]

    def place(self, module: nn.Module, files: Iterable[Path], excluded: Iterable[nn.Module] = ()) -> None:
        """Let the tensors of `module`, mapped from `files` by upstream, be those on the device; those that aren't there are copied.

        Args:
            module: The module, on the CPU.
            files: Its weight files, all started.
            excluded: Modules whose tensors stay where they are.
        """
        left = list(tensors_of(module, excluded))
        for read in [self.files[file] for file in files]:
            mapped = [getattr(owner, name) for owner, name in left]
            base = mapping_start(mapped, read.places)
            views = [None if base is None else read.view(tensor, tensor.data_ptr() - base) for tensor in mapped]
            for each in read.reads:
                each.result()
            for (owner, name), view in zip(left, views, strict=True):
                if view is not None:
                    setattr(owner, name, view)
            left = [part for part, view in zip(left, views, strict=True) if view is None]
        for owner, name in left:
            setattr(owner, name, getattr(owner, name).to(self.device))

    def _read(self, file: Path, memory: torch.Tensor, piece: Piece, free: torch.cuda.Event | None) -> None:
        first, last = piece.parts[0][0], sum(piece.parts[-1])
        if not hasattr(self._threads, "buffer"):
            cuda = self.device.type == "cuda"
            self._threads.buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=cuda)
            self._threads.stream = torch.cuda.Stream(self.device) if cuda else None
        buffer = self._threads.buffer
        read_into(file, piece.start, [buffer[at - first : at - first + size] for at, size in piece.parts])
        if free is None:
            memory[first:last].copy_(buffer[: last - first])
            return
        with torch.cuda.stream(self._threads.stream):
            self._threads.stream.wait_event(free)
            memory[first:last].copy_(buffer[: last - first], non_blocking=True)
        self._threads.stream.synchronize()


def plan_reads(tensors: Iterable[StoredTensor]) -> tuple[dict[int, tuple[int, int]], list[Piece], int]:
    """Where tensors of one file go on the device, in which pieces they are read, and how much memory they take."""
    places: dict[int, tuple[int, int]] = {}
    pieces: list[Piece] = []
    end = length = 0  # of the memory taken, and of the last piece
    for stored in sorted(tensors, key=lambda stored: stored.offset):
        size = stored.spec.bytes
        if not size:
            continue
        end = -(-end // ALIGNMENT) * ALIGNMENT
        places[stored.offset] = size, end
        for start in range(0, size, PIECE_BYTES):
            part = end + start, min(PIECE_BYTES, size - start)
            follows = pieces and pieces[-1].start + length == stored.offset + start
            if not follows or length + part[1] > PIECE_BYTES or len(pieces[-1].parts) == PIECE_TENSORS:
                pieces.append(Piece(stored.offset + start, []))
                length = 0
            pieces[-1].parts.append(part)
            length += part[1]
        end += size
    return places, pieces, end


def mapping_start(tensors: Iterable[torch.Tensor], places: dict[int, tuple[int, int]]) -> int | None:
    """The address to which a file was mapped: where most tensors lie as the file has one of their size. None if none does."""
    offsets: dict[int, list[int]] = defaultdict(list)
    for offset, (size, _) in places.items():
        offsets[size].append(offset)
    votes: Counter[int] = Counter()
    for tensor in tensors:
        address = tensor.data_ptr()
        votes.update(
            address - offset
            for offset in offsets.get(tensor.nbytes, ())
            if (address - offset) % mmap.ALLOCATIONGRANULARITY == 0
        )
    return votes.most_common(1)[0][0] if votes else None


def read_into(file: Path, start: int, buffers: list[torch.Tensor]) -> None:
    """Fill buffers, one after the other, with what `file` has from `start` on.

    Raises:
        InvalidRepository: The file is shorter.
    """
    views = [memoryview(buffer.numpy()) for buffer in buffers]
    with file.open("rb", buffering=0) as stream:
        for count in read_counts(stream, start, views):
            if not count:
                raise InvalidRepository(f"{file} became shorter while it was read: {DOWNLOAD_AGAIN}.")


def read_counts(stream: io.FileIO, start: int, views: list[memoryview]) -> Iterator[int]:
    """Reads until all views are filled, and yields the bytes of each read. Windows has no reads into several places."""
    while views:
        if hasattr(os, "preadv"):
            count = os.preadv(stream.fileno(), views, start)
        else:
            stream.seek(start)
            count = stream.readinto(views[0])
        yield count
        start += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]
