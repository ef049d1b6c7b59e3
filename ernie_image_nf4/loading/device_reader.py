"""Weight files read straight to a GPU, while Python builds the models that they are for.

Python takes longer to build the full-size models than the weights take to be read, so both happen at once. Several threads
read large pieces into page-locked buffers and send them, with few calls for each: after every call a thread takes Python's
lock, and who builds the models waits. On Linux upstream meanwhile maps the same files into host memory, without reading them:
where a tensor lies in the mapping says where it lies on the device. Tensors that aren't mapped are copied.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import nn

from ..errors import InvalidRepository
from ..fast.module_tensors import tensors_of
from ..memory.pinned_memory import PinnedBlock, pinned_buffer
from ..repository.safetensors_io import StoredTensor
from ..repository.security import DOWNLOAD_AGAIN, unreadable

READERS = 4
BUFFER_BYTES = 32 * 1024**2  # of one reader; all are one pinned allocation, which PyTorch rounds up to a power of two
ALIGNMENT = 256  # of tensors on the device
PIECE_TENSORS = 1000  # parts of one read; systems take 1,024
PIECE_BYTES = BUFFER_BYTES - PIECE_TENSORS * ALIGNMENT  # of a file that are read at once
MAPS = Path("/proc/self/maps")  # what is mapped to where in this process; Linux alone has it


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

    def view(self, tensor: torch.Tensor, mappings: list[tuple[range, int]]) -> torch.Tensor | None:
        """The tensor on the device, None if it doesn't lie in a mapping of the file, as it is there.

        Args:
            tensor: In host memory.
            mappings: Addresses to which the file is mapped, and the offset in the file of the first.
        """
        address = tensor.data_ptr()
        offset = next((address - each.start + first for each, first in mappings if address in each), None)
        size, start = self.places.get(offset, (None, 0))
        if size != tensor.nbytes or not tensor.is_contiguous():
            return None
        return self.memory[start : start + size].view(tensor.dtype).view(tensor.shape)


@dataclass(frozen=True)
class Lane:
    """What one read at a time takes to the device.

    Attributes:
        memory: (BUFFER_BYTES,) uint8 on the host, page-locked where there is CUDA.
        bytes: The same.
        stream: The copies run on it; None where there is no CUDA.
    """

    memory: torch.Tensor
    bytes: memoryview
    stream: torch.cuda.Stream | None


class DeviceReader:
    """Reads files to one device in threads of its own.

    A context: what is under way when it ends is given up, and memory that no tensor lies in is given back.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.files: dict[Path, FileOnDevice] = {}
        self._pool = ThreadPoolExecutor(READERS)
        self._lanes: SimpleQueue[Lane] = SimpleQueue()
        self._staging: PinnedBlock | None = None
        self._open = ExitStack()  # the files

    def __enter__(self) -> DeviceReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._open.close()
        self._lanes, self._staging = SimpleQueue(), None
        for read in self.files.values():  # an error's traceback may hold on to them
            read.memory = torch.empty(0, dtype=torch.uint8)
        self.files.clear()
        if self.device.type == "cuda" and hasattr(torch.accelerator, "empty_host_cache"):  # since PyTorch 2.12
            torch.accelerator.empty_host_cache()

    def start(self, tensors: Iterable[StoredTensor]) -> None:
        """Start reading these tensors, of one file or several. Called once. Does nothing where mappings can't be looked up.

        Raises:
            InvalidRepository: A file can't be opened.
        """
        if not MAPS.exists():
            return
        by_file: dict[Path, list[StoredTensor]] = defaultdict(list)
        for stored in tensors:
            by_file[stored.file].append(stored)
        pieces: dict[Path, list[Piece]] = {}
        for file, stored in by_file.items():
            places, pieces[file], size = plan_reads(stored)
            with torch.inference_mode(False):  # which threads don't inherit
                self.files[file] = FileOnDevice(places, torch.empty(size, dtype=torch.uint8, device=self.device))
        # Threads begin when all of it is there: while page-locked memory is allocated, other calls of CUDA wait, with Python's lock.
        if pieces:
            self._make_lanes()
        for file, its_pieces in pieces.items():
            read, stream = self.files[file], self._open.enter_context(opened(file))
            for piece in its_pieces:
                target = read.memory[piece.parts[0][0] : sum(piece.parts[-1])]
                read.reads.append(self._pool.submit(self._read, stream, piece, target))

    def _make_lanes(self) -> None:
        on_gpu = self.device.type == "cuda"
        self._staging = pinned_buffer(READERS * BUFFER_BYTES, self.device)
        for part in self._staging.memory.chunk(READERS):
            stream = torch.cuda.Stream(self.device) if on_gpu else None
            if stream:  # the device's memory may still be in use by work that was queued before it was freed
                stream.wait_stream(torch.cuda.current_stream(self.device))
            self._lanes.put(Lane(part, memoryview(part.numpy()), stream))

    def place(self, module: nn.Module, files: Iterable[Path], excluded: Iterable[nn.Module] = ()) -> None:
        """Let the tensors of `module`, mapped from `files` by upstream, be those on the device; others are copied there.

        Args:
            module: The module, on the CPU.
            files: Its weight files.
            excluded: Modules whose tensors stay where they are.

        Raises:
            InvalidRepository: A file couldn't be read.
        """
        left = list(tensors_of(module, excluded))
        for file in files:
            if file not in self.files:  # nothing of it is wanted
                continue
            read = self.files[file]
            for each in read.reads:
                each.result()
            mappings, rest = mappings_of(file), []
            for owner, name in left:
                view = read.view(getattr(owner, name), mappings)
                if view is None:
                    rest.append((owner, name))
                else:
                    setattr(owner, name, view)
            left = rest
            del read, self.files[file]  # before others are copied: if none is mapped, this gives memory back
        for owner, name in left:
            setattr(owner, name, getattr(owner, name).to(self.device))

    def _read(self, file: FileIO, piece: Piece, target: torch.Tensor) -> None:
        lane = self._lanes.get()
        try:
            first = piece.parts[0][0]
            read_into(file, piece.start, [lane.bytes[at - first : at - first + size] for at, size in piece.parts])
            with torch.cuda.stream(lane.stream):  # None changes nothing
                target.copy_(lane.memory[: len(target)], non_blocking=True)
            if lane.stream:
                lane.stream.synchronize()
        finally:
            self._lanes.put(lane)


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


def mappings_of(file: Path) -> list[tuple[range, int]]:
    """Addresses to which a file is mapped in this process, and the offset in the file of the first of each range."""
    path, found = os.path.realpath(file), []
    for line in MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        addresses, _, offset, _, _, *name = line.split(maxsplit=5)
        if name == [path]:
            start, end = (int(number, 16) for number in addresses.split("-"))
            found.append((range(start, end), int(offset, 16)))
    return found


def opened(file: Path) -> FileIO:
    """The file, opened to be read without a buffer.

    Raises:
        InvalidRepository: It can't be.
    """
    try:
        return file.open("rb", buffering=0)
    except OSError as error:
        raise unreadable(file, error) from error


def read_into(file: FileIO, start: int, views: list[memoryview]) -> None:
    """Fill `views`, one after the other, with what a file has from `start` on.

    Raises:
        InvalidRepository: The file is shorter, or can't be read.
    """
    try:
        while views:
            count = os.preadv(file.fileno(), views, start)
            if not count:
                raise InvalidRepository(f"{file.name} became shorter while it was read: {DOWNLOAD_AGAIN}.")
            start += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]
    except OSError as error:
        raise unreadable(file.name, error) from error
