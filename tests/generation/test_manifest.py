"""The manifest: one line a picture, from several processes and from ones that were killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys

import pytest

from ernie_image_nf4.errors import InvalidSettings
from ernie_image_nf4.generation.manifest import (
    LOCK,
    MANIFEST,
    LineCount,
    Record,
    append,
    locked,
    merge_manifests,
    part_of,
    read_manifest,
    to_line,
)
from ernie_image_nf4.generation.settings import Settings

DEFAULTS = Settings("", "", 32, 32, 2, 3.0, seed=0)


def test_manifests_of_several_processes_become_one(tmp_path):
    records = [Record(f"000{number}.png", "mini", DEFAULTS, sha256=str(number)) for number in range(4)]
    for record in records[::-1]:
        append(part_of(tmp_path, int(record.sha256) % 2), record)
    append(part_of(tmp_path, 1), Record("0003.png", "mini", DEFAULTS, error="bad luck"))
    merge_manifests(tmp_path)
    failed = Record("0003.png", "mini", DEFAULTS, error="bad luck")
    assert read_manifest(tmp_path / MANIFEST) == [*records[:3], failed]
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]
    merge_manifests(tmp_path, failed=False)
    assert (tmp_path / MANIFEST).read_text() == "".join(f"{to_line(record)}\n" for record in records[:3])


def test_a_manifest_of_the_first_version_can_be_read(tmp_path):
    values = json.loads(to_line(Record("0001.png", "mini", DEFAULTS, version="0.2.0", revision="0123")))
    del values["version"], values["revision"]
    (tmp_path / MANIFEST).write_text(json.dumps(values))
    assert read_manifest(tmp_path / MANIFEST) == [Record("0001.png", "mini", DEFAULTS)]


@pytest.mark.parametrize(("fp8", "products"), [(True, "fp8"), (False, None)])
def test_a_manifest_from_before_there_was_int8_can_be_read(tmp_path, fp8, products):
    values = json.loads(to_line(Record("0001.png", "mini", DEFAULTS)))
    del values["products"]
    (tmp_path / MANIFEST).write_text(json.dumps(values | {"fp8": fp8}))
    assert read_manifest(tmp_path / MANIFEST) == [Record("0001.png", "mini", DEFAULTS, products=products)]


def test_lines_of_all_processes_are_counted_and_read_once(tmp_path):
    count = LineCount(tmp_path)
    assert count.update() == 0
    for number in range(3):
        append(part_of(tmp_path, number % 2), Record(f"000{number}.png", "mini", DEFAULTS))
        assert count.update() == number + 1
    part = part_of(tmp_path, 0)
    part.write_bytes(b" " * part.stat().st_size)  # what was read before is not looked at again
    append(part, Record("0003.png", "mini", DEFAULTS))
    assert count.update() == 4
    assert count.update() == 4


# The lock


def test_a_second_run_is_kept_out_until_the_first_is_over(tmp_path):
    for _ in range(2):
        with locked(tmp_path):
            with pytest.raises(InvalidSettings, match="Another run is drawing into"):
                locked(tmp_path).__enter__()
            assert len(list(tmp_path.iterdir())) == 1
        assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_lock_of_a_killed_process_is_none(tmp_path):
    context = multiprocessing.get_context("fork")
    locking, waiting = context.Event(), context.Event()

    def work() -> None:
        with locked(tmp_path):
            locking.set()
            waiting.wait()

    process = context.Process(target=work)
    process.start()
    locking.wait()
    with pytest.raises(InvalidSettings):
        locked(tmp_path).__enter__()
    process.kill()
    process.join()
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="opening a folder is another error there")
def test_a_folder_that_cannot_be_locked_is_drawn_into_with_a_warning(tmp_path, caplog):
    (tmp_path / LOCK).mkdir()
    with locked(tmp_path):
        pass
    assert f"{tmp_path} can't be locked" in caplog.text
