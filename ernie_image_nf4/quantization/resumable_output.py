"""A folder made of parts that appear whole or not at all, and a memory of the finished ones that outlives a killed process.

Each part is made in a work folder inside the output and moved to its name when it is complete. What is finished is noted, with
sizes and digests, in a state file that is replaced atomically. A lock, which the system drops with the process that holds it,
keeps a second run out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import InvalidSettings
from ..repository.components import MODEL_INDEX
from ..repository.metadata import ComponentRecord, FileRecord, file_record

WORK_FOLDER = ".unfinished"
STATE = "state.json"
LOCK = "lock"


@dataclass
class Staging:
    """An output folder in the making.

    Attributes:
        output: The folder.
        job: What is being made from what; only a run of the same job may go on with it.
        records: The finished components.
    """

    output: Path
    job: dict[str, Any]
    records: dict[str, ComponentRecord] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        return self.output / WORK_FOLDER

    def finish(self, name: str, record: ComponentRecord) -> None:
        """Notes that component `name` is complete in the work folder, then moves it to its name."""
        self.records[name] = record
        self.save()
        self.place(name)

    def is_finished(self, name: str) -> bool:
        """Whether an earlier run finished the component: its files are read and compared with what was noted then."""
        if name not in self.records:
            return False
        if (self.work / name).is_dir():  # that run was killed between noting and moving
            self.place(name)
        if (self.output / name).is_dir() and folder_records(self.output / name) == self.records[name].files:
            return True
        del self.records[name]
        return False

    def place(self, name: str) -> None:
        """Moves a complete file or folder from the work folder to its name in the output."""
        _remove(self.output / name)
        os.replace(self.work / name, self.output / name)

    def save(self) -> None:
        """Replaces the state file."""
        records = {name: dataclasses.asdict(record) for name, record in self.records.items()}
        new = self.work / f"{STATE}.new"
        new.write_text(json.dumps({"job": self.job, "records": records}), encoding="utf-8")
        os.replace(new, self.work / STATE)


@contextmanager
def staging(output: Path, job: dict[str, Any]) -> Iterator[Staging | None]:
    """Opens an output folder for a job, new or where an earlier run of the same job left off, and clears up afterwards.

    If the job fails, what it finished stays for the next run; if it finished nothing, all it made is removed.

    Yields:
        The folder in the making, or None if an earlier run had made all of it and was killed while clearing up.

    Raises:
        InvalidSettings: The folder holds something else, another process is at work in it, or it can't be written.
    """
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
        raise InvalidSettings(f"{output} can't be written ({error.strerror}): name another folder.") from None
    with lock:
        state = _read_state(output)
        complete = state is None and (output / MODEL_INDEX).exists()
        made = None if complete else _resume(output, job, state)
        try:
            yield made
        except BaseException:
            if made and made.records:
                _discard_unfinished(made)
                raise
            _remove(work / STATE)
            lock.release()
            _remove(work)
            if not any(output.iterdir()):
                output.rmdir()
            raise
        _remove(work / STATE)  # from here on the folder counts as finished
    _remove(work)


def folder_records(folder: Path) -> dict[str, FileRecord]:
    """Size and digest of every file in a component's folder, by name."""
    return {path.name: file_record(path) for path in sorted(folder.iterdir())}


def _read_state(output: Path) -> dict[str, Any] | None:
    file = output / WORK_FOLDER / STATE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _resume(output: Path, job: dict[str, Any], state: dict[str, Any] | None) -> Staging:
    """What an earlier run of the same job noted, without what it left half done."""
    made = Staging(output, job)
    if state:
        if differing := [key for key in job if job[key] != state["job"].get(key)]:
            raise InvalidSettings(
                f"{output} holds an unfinished run with different {' and '.join(differing)}: "
                "finish it with the same ones, or delete the folder."
            )
        for name, record in state["records"].items():
            files = {file: FileRecord(**value) for file, value in record.pop("files").items()}
            made.records[name] = ComponentRecord(files=files, **record)
    _discard_unfinished(made)
    made.save()
    return made


def _discard_unfinished(made: Staging) -> None:
    for path in made.work.iterdir():
        if path.name not in (STATE, LOCK, *made.records):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
