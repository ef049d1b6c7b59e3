"""A disk that fills up while something is made: one line, and nothing half-made under a final name."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
from small_disk import run_on_small_disk

from ernie_image_nf4.repository.components import COMPONENTS
from ernie_image_nf4.repository.disk import is_full

QUANTIZE = """
import os, shutil
from ernie_image_nf4.errors import DiskFull
from ernie_image_nf4.quantization.convert import quantize
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)  # deceives the check before the work
try:
    quantize({source!r}, "small/out", device="cpu", progress=False)
except DiskFull as error:
    print(error)
    print([sorted(os.listdir(path)) for path in ("small/out", "small/out/.unfinished") if os.path.exists(path)])
"""
SYNTHESIZE = """
import os
from ernie_image_nf4.errors import DiskFull
from ernie_image_nf4.quantization.synthetic import synthesize
try:
    synthesize("small/out", preset="tiny", progress=False)
except DiskFull as error:
    print(error)
    print(os.listdir("small"))
"""
PAGE = 4096


def size_of(folder: Path, *, but: tuple[str, ...] = ()) -> int:
    """Bytes of a folder's files on a disk of pages."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name not in but]
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in files)


def test_quantize_keeps_what_is_finished(original, tmp_path):
    message, left = run_on_small_disk(tmp_path, 600_000, QUANTIZE.format(source=str(original)))
    assert message == (
        "The disk of small/out is full: free some space and repeat the command, what is finished is kept."
    )
    assert left == "[['.unfinished', 'transformer'], ['lock', 'state.json']]"


def test_quantize_leaves_nothing_if_nothing_is_finished(original, tmp_path):
    message, left = run_on_small_disk(tmp_path, 100_000, QUANTIZE.format(source=str(original)))
    assert message == "The disk of small/out is full: free some space and repeat the command."
    assert left == "[]"


@pytest.mark.parametrize("place", ["the folder", "weights", "a tokenizer"])
def test_synthesize_leaves_nothing(original, tmp_path, place):
    tokenizers = tuple(component.name for component in COMPONENTS if component.other_classes)
    size = {"the folder": PAGE, "weights": 300_000, "a tokenizer": size_of(original, but=tokenizers) + 2 * PAGE}[place]
    assert run_on_small_disk(tmp_path, size, SYNTHESIZE) == [
        "The disk of small/out is full: free some space and repeat the command.",
        "[]",
    ]


# What an error says


def test_an_error_of_the_system():
    assert is_full(OSError(errno.ENOSPC, "No space left on device"))
    assert is_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert not is_full(OSError(errno.EACCES, "Permission denied"))


def test_an_error_of_a_library_in_rust():
    assert is_full(Exception("No space left on device (os error 28)"))
    assert not is_full(Exception("Permission denied (os error 13)"))
    assert not is_full(ValueError("28"))


def test_several_errors_in_one():
    assert is_full(shutil.Error([("a", "b", "[Errno 13] Permission denied"), ("a", "b", "[Errno 28] No space left")]))


def test_an_error_that_came_of_one():
    error = RuntimeError("can't save")
    error.__cause__ = ValueError("can't write")
    assert not is_full(error)
    error.__cause__.__context__ = OSError(errno.ENOSPC, "No space left on device")
    assert is_full(error)
