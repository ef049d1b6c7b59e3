"""safetensors files, read and written one tensor at a time, so that no file ever has to fit in memory.

The ``safetensors`` package maps a file to read it, tells no offsets, and writes whole files only. Here the header is
read by itself, with a limit of its size and a check that the tensors fill the file without gaps; tensors are read with
plain reads, by offset, to wherever they are wanted; and a file is written tensor by tensor. What comes out is what
``safetensors.torch.save_file`` writes for the same tensors, byte for byte.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import torch

from ..errors import InvalidRepository
from .security import DOWNLOAD_AGAIN, GIT_LFS_POINTER, refuse_pointer, unreadable

# In the order in which safetensors lays a file out: widest first, so that every tensor is aligned.
DTYPES: dict[str, torch.dtype] = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bytes of a header; the full-size transformer's has 0.3 MB. Parsed, JSON takes some ten times its size.
MAX_HEADER = 1 << 24


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its values: dtype as safetensors spells it (``"BF16"``), and dimensions."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, ``offset`` bytes from the file's start."""

    file: Path
    offset: int
    spec: TensorSpec


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, after checking that their bytes fill the file, without gap or overlap.

    Raises:
        InvalidRepository: The file is missing, a Git LFS pointer, truncated or not safetensors, or has an unknown
            dtype.
    """
    if not file.is_file():
        raise InvalidRepository(f"Weight file {file} is missing: {DOWNLOAD_AGAIN}.")
    size = file.stat().st_size
    broken = InvalidRepository(
        f"{file} ({size} bytes) is truncated or corrupt, not a whole safetensors file: {DOWNLOAD_AGAIN}."
    )
    try:
        with file.open("rb") as stream:
            start = stream.read(len(GIT_LFS_POINTER))
            refuse_pointer(file, start)
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size
            if length > min(MAX_HEADER, size - 8):
                raise broken
            stream.seek(8)
            text = stream.read(length)
    except OSError as error:
        raise unreadable(file, error) from error
    tensors, spans = {}, []
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        for name, item in header.items():
            if item["dtype"] not in DTYPES:
                raise InvalidRepository(
                    f"{file}: tensor {name} has dtype {item['dtype']}, which this package doesn't know: "
                    "convert it to BF16, F16 or F32."
                )
            spec = TensorSpec(item["dtype"], tuple(item["shape"]))
            begin, end = item["data_offsets"]
            if any(type(number) is not int or number < 0 for number in (*spec.shape, begin, end)):
                raise broken
            if end - begin != spec.bytes:
                raise broken
            spans.append((begin, end))
            tensors[name] = StoredTensor(file, 8 + length + begin, spec)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # RecursionError: nested thousands deep
        raise broken from None
    spans.sort()
    if [0, *(end for _, end in spans)] != [*(begin for begin, _ in spans), size - 8 - length]:
        raise broken
    return tensors


def find_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of a component by name, from its single file or its shards, as `read_header` finds them."""
    return {name: stored for file in files for name, stored in read_header(file).items()}


def read_tensor(stored: StoredTensor, *, pinned: bool = False) -> torch.Tensor:
    """One tensor, read into fresh host memory (page-locked if `pinned`, for fast copies to a GPU)."""
    buffer = torch.empty(stored.spec.bytes, dtype=torch.uint8, pin_memory=pinned)
    with stored.file.open("rb", buffering=0) as stream:
        stream.seek(stored.offset)
        view, done = host_bytes(buffer), 0
        while done < len(view):
            count = stream.readinto(view[done:])
            if not count:
                raise InvalidRepository(f"{stored.file} became shorter while it was read: download it again.")
            done += count
    return buffer.view(DTYPES[stored.spec.dtype]).reshape(stored.spec.shape)


def read_chunks(stored: StoredTensor, chunk_bytes: int = 1 << 26) -> Iterator[torch.Tensor]:
    """The values of one tensor in order, as flat pieces of at most `chunk_bytes` bytes."""
    itemsize = DTYPES[stored.spec.dtype].itemsize
    for start in range(0, stored.spec.bytes, chunk_bytes):
        count = min(chunk_bytes, stored.spec.bytes - start) // itemsize
        yield read_tensor(StoredTensor(stored.file, stored.offset + start, TensorSpec(stored.spec.dtype, (count,))))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a tensor, as they are stored."""
    return host_bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8))


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a flat uint8 tensor on the host."""
    return memoryview(cast(Any, tensor.numpy()))


def file_bytes(specs: dict[str, TensorSpec]) -> int:
    """Size of the safetensors file that holds these tensors."""
    return len(_header(specs)) + sum(spec.bytes for spec in specs.values())


class TensorWriter:
    """Writes one safetensors file, tensor by tensor.

    Tensors of the last dtype in the file (``"U8"`` where there are NF4 weights) must be written in the order of
    `names`, and may turn out shorter than announced: bitsandbytes stores a tensor's NF4 settings as JSON text, whose
    length is known only afterwards. All others have their place from the start and can be written at any time, by
    another thread as well. The header comes last; until then the file starts with zeros, which no reader accepts.
    """

    def __init__(self, file: Path, specs: dict[str, TensorSpec]):
        """Creates `file` for tensors of these dtypes and at most these sizes."""
        self.names = file_order(specs)
        self._specs = specs
        self._reserved = len(_header(specs))
        self._written: dict[str, tuple[int, int]] = {}  # name -> first byte after the header, size
        self._places: dict[str, int] = {}
        self._end = 0
        for name in self.names:
            if specs[name].dtype != specs[self.names[-1]].dtype:
                self._places[name] = self._end
                self._end += specs[name].bytes
        self._stream = file.open("wb", buffering=0)
        self._lock = threading.Lock()  # of the stream's position

    def write(self, name: str, chunks: Iterable[torch.Tensor]) -> None:
        """Writes the values of tensor `name`, given in one or several pieces."""
        start = offset = self._places.get(name, self._end)
        for chunk in chunks:
            self._put(self._reserved + offset, as_bytes(chunk))
            offset += chunk.nbytes
        self._written[name] = (start, offset - start)
        if name not in self._places:
            self._end = offset

    def close(self) -> None:
        """Writes the header: the file is complete."""
        specs = {
            name: spec if self._written[name][1] == spec.bytes else TensorSpec(spec.dtype, (self._written[name][1],))
            for name, spec in self._specs.items()
        }
        self._put(0, memoryview(_header(specs, self._written, self._reserved)))
        self._stream.close()

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        self._stream.close()

    def _put(self, offset: int, data: memoryview) -> None:
        with self._lock:
            self._stream.seek(offset)
            while data:  # a raw stream may write less than it is given
                data = data[self._stream.write(data) :]


def file_order(specs: dict[str, TensorSpec]) -> list[str]:
    """Names in the order in which safetensors stores them: by dtype, then by name."""
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPES)}
    return sorted(specs, key=lambda name: (ranks[specs[name].dtype], name))


def _header(specs: dict[str, TensorSpec], places: dict[str, tuple[int, int]] | None = None, at_least: int = 0) -> bytes:
    """The first bytes of a file: a length, then JSON padded with spaces to 8 bytes (and to `at_least` in all).

    The tensors lie side by side unless `places` has their first byte and size.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in file_order(specs):
        start, size = places[name] if places else (end, specs[name].bytes)
        end = start + size
        header[name] = {"dtype": specs[name].dtype, "shape": specs[name].shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(max(len(text) + -len(text) % 8, at_least - 8))
    return struct.pack("<Q", len(text)) + text
