"""An output folder whose parts appear whole or not at all, and that an interrupted run can go on with.

Each part is made in a work folder inside the output and renamed when it is complete. Finished components are recorded,
with sizes and digests, in a state file that is replaced atomically, and so are checkpoints: tensors that took long to
find, of a component that isn't finished. A lock, which the system drops with the process that holds it, keeps a second
run out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file

from ..errors import DiskFull, ErnieImageNF4Error, InvalidSettings
from ..repository.components import MODEL_INDEX
from ..repository.disk import is_full
from ..repository.metadata import ComponentRecord, FileRecord, file_record

WORK_FOLDER = ".unfinished"
STATE = "state.json"
LOCK = "lock"
CHECKPOINTS = "checkpoints"


@dataclass
class Checkpoints:
    """Tensors that a killed run leaves for the next one.

    Attributes:
        folder: Where their files are.
        save: Called when the records have changed, to keep them.
        records: Size and digest of each file, by the checkpoint's name.
    """

    folder: Path
    save: Callable[[], None]
    records: dict[str, FileRecord] = field(default_factory=dict)

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def keep(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Keep tensors under a name, in place of those that had it."""
        self.folder.mkdir(exist_ok=True)
        new = self.folder / f"{name}.new"
        save_file({key: value.contiguous() for key, value in tensors.items()}, new)
        record = file_record(new)
        os.replace(new, self.file(name))
        self.records[name] = record
        self.save()

    def is_kept(self, name: str) -> bool:
        """Whether a checkpoint is there as it was recorded: its file is read."""
        return name in self.records and self.file(name).is_file() and file_record(self.file(name)) == self.records[name]

    def find(self, name: str) -> dict[str, torch.Tensor] | None:
        """The tensors of a checkpoint, in host memory; None if there is none, or if its file has changed."""
        return load_file(self.file(name)) if self.is_kept(name) else None

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(record.bytes for record in self.records.values())

    def discard(self) -> None:
        """Remove all of them."""
        self.records.clear()
        self.save()
        _remove(self.folder)

    def discard_unfinished(self) -> None:
        """Remove files that aren't recorded."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path not in map(self.file, self.records):
                _remove(path)


@dataclass
class ResumableOutput:
    """An output folder while it is written.

    Attributes:
        output: The folder.
        job: Everything that shapes the output. Only a run of an equal job may go on with it.
        records: The finished components.
        checkpoints: Of a component that isn't finished.
    """

    output: Path
    job: dict[str, Any]
    records: dict[str, ComponentRecord] = field(default_factory=dict)
    checkpoints: Checkpoints = field(init=False)
    _saving: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.work / CHECKPOINTS, self.save)

    @property
    def work(self) -> Path:
        """Folder in which parts are made."""
        return self.output / WORK_FOLDER

    def finish(self, name: str, record: ComponentRecord) -> None:
        """Record that component `name` is complete in the work folder, then move it to the output."""
        self.records[name] = record
        self.save()
        self.place(name)

    def is_finished(self, name: str) -> bool:
        """Whether an earlier run finished the component: its files are read and compared with their records."""
        if name not in self.records:
            return False
        if (self.work / name).is_dir():  # killed between recording and moving
            self.place(name)
        if (self.output / name).is_dir() and folder_records(self.output / name) == self.records[name].files:
            return True
        del self.records[name]
        return False

    def place(self, name: str) -> None:
        """Move a complete file or folder from the work folder to the output."""
        _remove(self.output / name)
        os.replace(self.work / name, self.output / name)

    def save(self) -> None:
        """Replace the state file. Components and checkpoints may be finished in several threads at once."""
        with self._saving:
            records = {name: dataclasses.asdict(record) for name, record in dict(self.records).items()}
            checkpoints = {name: dataclasses.asdict(each) for name, each in dict(self.checkpoints.records).items()}
            state = {"job": self.job, "records": records, "checkpoints": checkpoints}
            new = self.work / f"{STATE}.new"
            new.write_text(json.dumps(state), encoding="utf-8")
            os.replace(new, self.work / STATE)

    def discard_unfinished(self) -> None:
        """Remove what the work folder holds of parts that aren't finished."""
        for path in self.work.iterdir():
            if path.name not in (STATE, LOCK, CHECKPOINTS, *self.records):
                _remove(path)
        self.checkpoints.discard_unfinished()


@contextmanager
def resumable_output(output: Path, job: dict[str, Any]) -> Iterator[ResumableOutput | None]:
    """Open an output folder for a job, new or where an earlier run of the same job left off, and clean up at the end.

    After an error finished components and checkpoints stay for the next run. If there are none, everything that was
    made is removed.

    Yields:
        The folder, or None if an earlier run finished it and was killed while cleaning up.

    Raises:
        InvalidSettings: The folder holds something else, another process works in it, or it can't be written.
        DiskFull: Its disk is full. What was finished before is kept.
    """
    with _clear_errors(output):
        yield from _opened(output, job)


def _opened(output: Path, job: dict[str, Any]) -> Iterator[ResumableOutput | None]:
    """`resumable_output` with errors of the system as they are."""
    work = output / WORK_FOLDER
    lock = _lock(output)
    try:
        state = _read_state(output)
        complete = state is None and (output / MODEL_INDEX).exists()
        made = None if complete else _resume(output, job, state)
        try:
            yield made
        except BaseException:
            if made and (made.records or made.checkpoints.records):
                made.discard_unfinished()
                raise
            _remove(work / STATE)
            lock.release(force=True)  # Windows removes no open file
            _remove(work)
            if not any(output.iterdir()):
                output.rmdir()
            raise
        _remove(work / STATE)  # from here on the folder counts as finished
    finally:
        lock.release(force=True)
    _remove(work)


def is_finished(output: Path) -> bool:
    """Whether a run wrote this folder to its end."""
    return (output / MODEL_INDEX).is_file() and not (output / WORK_FOLDER).exists()


@contextmanager
def _clear_errors(output: Path) -> Iterator[None]:
    """Say what to do when the system, or a library that writes a file, can't go on."""
    try:
        yield
    except ErnieImageNF4Error:
        raise
    except Exception as error:
        kept = ", what is finished is kept" if (output / WORK_FOLDER).exists() else ""
        if is_full(error):
            raise DiskFull(f"The disk of {output} is full: free some space and repeat the command{kept}.") from error
        if not isinstance(error, OSError):
            raise
        raise InvalidSettings(f"{error}: mend that and repeat the command{kept}.") from error


def folder_records(folder: Path) -> dict[str, FileRecord]:
    """Size and digest of every file in a component's folder, by name."""
    return {path.name: file_record(path) for path in sorted(folder.iterdir())}


def _lock(output: Path) -> FileLock:
    """The lock of an output folder, acquired. The folder is made if it isn't there."""
    work = output / WORK_FOLDER
    if output.exists() and not work.is_dir() and (not output.is_dir() or any(output.iterdir())):
        raise InvalidSettings(
            f"{output} exists already: name a new folder. "
            "(If it is a finished repository, `ernie-image-nf4 verify` checks it and `hf upload` publishes it.)"
        )
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(work / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise InvalidSettings(f"Another run is writing to {output}: wait for it, or name another folder.") from None
    except OSError as error:
        if is_full(error):
            raise
        raise InvalidSettings(f"{output} can't be written ({error.strerror}): name another folder.") from None
    return lock


def _read_state(output: Path) -> dict[str, Any] | None:
    file = output / WORK_FOLDER / STATE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _resume(output: Path, job: dict[str, Any], state: dict[str, Any] | None) -> ResumableOutput:
    """What an earlier run of the same job finished, without its unfinished parts."""
    made = ResumableOutput(output, job)
    if state:
        if differing := [key for key in job if job[key] != state["job"].get(key)]:
            raise InvalidSettings(
                f"{output} holds an unfinished run with different {' and '.join(differing)}: "
                "finish it with the same ones, or delete the folder."
            )
        for name, record in state["records"].items():
            files = {file: FileRecord(**value) for file, value in record.pop("files").items()}
            made.records[name] = ComponentRecord(files=files, **record)
        kept = state.get("checkpoints", {})
        made.checkpoints.records |= {name: FileRecord(**record) for name, record in kept.items()}
    made.discard_unfinished()
    made.save()
    return made


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
