"""The manifest of a folder of pictures: a line of JSON for each, from which a later run goes on.

Each process appends to a manifest of its own, ``manifest.0.jsonl`` and so on. At the end they become one,
``manifest.jsonl``. A lock, which the system drops with the process that holds it, keeps a second run out.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import InvalidSettings
from .image_file import replacing, writing
from .settings import Settings

MANIFEST = "manifest.jsonl"
PARTS = "manifest.*.jsonl"
LOCK = ".manifest.lock"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """A line of the manifest: a picture that is there, or one that failed.

    Attributes:
        file: Name of the picture's file in the manifest's folder.
        model: Name of the model.
        settings: What it was drawn with. In JSON its fields stand beside the others.
        revised_prompt: The prompt as the prompt enhancer rewrote it, None without it.
        seconds: Its share of the wall time of its group.
        batch_size: Pictures that were denoised together.
        sha256: Digest of the file.
        products: ``"int8"`` or ``"fp8"`` if the transformer's blocks multiplied in it. Older manifests have ``fp8``
            instead, true or false.
        dtype: Of the computation, ``"bfloat16"`` for example. None in manifests that didn't note it yet.
        fast: ``"exact"`` if the pipeline was loaded so, and it made a difference.
        revision: Commit of the Hub repository, None for a local folder.
        version: This package's. None in the manifests of its first one, which didn't note it.
        error: Why there is no picture, None if there is one.
    """

    file: str
    model: str
    settings: Settings
    revised_prompt: str | None = None
    seconds: float | None = None
    batch_size: int | None = None
    sha256: str | None = None
    products: str | None = None
    dtype: str | None = None
    fast: str | None = None
    revision: str | None = None
    version: str | None = None
    error: str | None = None

    @property
    def key(self) -> tuple:
        """What decides the picture. A finished one isn't drawn again for an equal key.

        Without dtype and `fast`: what overflowed can be drawn in another dtype, and the rest stays.
        """
        return self.file, self.settings, self.model, self.revision, self.products, self.version


def part_of(folder: Path, process: int) -> Path:
    """The manifest of one process."""
    return folder / f"manifest.{process}.jsonl"


def append(manifest: Path, record: Record) -> None:
    """Add a line to a manifest. It is on the disk when this returns.

    Raises:
        DiskFull: The disk is full.
        WriteFailed: The manifest can't be written.
    """
    with writing(manifest), manifest.open("a", encoding="utf-8") as file:
        file.write(to_line(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def to_line(record: Record) -> str:
    """A record as one line of JSON, without the newline."""
    values = asdict(record)
    settings = values.pop("settings")
    return json.dumps({"file": record.file, **settings, **values}, ensure_ascii=False)


def read_manifest(path: Path, *, unfinished: bool = False) -> list[Record]:
    """The records of a manifest; none if it isn't there.

    Args:
        path: The file.
        unfinished: Whether its process may have been killed: a line that was cut short then counts as none.

    Raises:
        InvalidSettings: A line is no record.
    """
    records = []
    names = [field.name for field in fields(Settings)]  # the newest of which older manifests don't have
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            values = json.loads(line)
            if values.pop("fp8", False):
                values["products"] = "fp8"
            records.append(
                Record(settings=Settings(**{name: values.pop(name) for name in names if name in values}), **values)
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            if not unfinished:
                raise InvalidSettings(
                    f"{path}, line {number} is no record of a picture: move the file away, or name another folder."
                ) from None
    return records


def merge_manifests(folder: Path, *, failed: bool = True) -> None:
    """Merge the manifests of all processes into ``manifest.jsonl``, one record a file, and delete them.

    If it is killed it can be repeated.

    Args:
        folder: Folder with the pictures.
        failed: Whether to keep records of pictures that failed.

    Raises:
        InvalidSettings: There is a ``manifest.jsonl`` of another kind.
        DiskFull: The disk is full.
        WriteFailed: The manifest can't be written.
    """
    records = {record.file: record for record in read_manifest(folder / MANIFEST)}
    parts = sorted(folder.glob(PARTS))
    for part in parts:
        records |= {record.file: record for record in read_manifest(part, unfinished=True)}
    with writing(folder / MANIFEST), replacing(folder / MANIFEST) as temporary:
        lines = [to_line(records[file]) + "\n" for file in sorted(records) if failed or records[file].error is None]
        temporary.write_text("".join(lines), encoding="utf-8")
    for part in parts:
        part.unlink()


class LineCount:
    """Counts the lines that all processes append to their manifests, of which it reads only what is new."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}
        self._lines = 0

    def update(self) -> int:
        """Pictures that all processes have done in this run."""
        for part in self._folder.glob(PARTS):
            with part.open("rb") as file:
                file.seek(self._read.get(part, 0))
                new = file.read()
            self._read[part] = self._read.get(part, 0) + len(new)
            self._lines += new.count(b"\n")
        return self._lines


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder while the context lasts.

    Raises:
        InvalidSettings: Another run is in it.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InvalidSettings(f"Another run is drawing into {folder}: wait for it, or name another folder.") from None
    except (NotImplementedError, OSError) as error:  # network file systems may have no locks
        logger.warning("%s can't be locked (%s): start no second run in it.", folder, error)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            (folder / LOCK).unlink()
        lock.release(force=True)
