"""A disk that fills up while something is made: one line, and nothing half-made under a final name."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
from small_disk import run_on_small_disks

from ernie_image_nf4.repository.components import COMPONENTS
from ernie_image_nf4.repository.disk import is_full

# One process for all, as it takes most of its time to start.
FILL = """
import json, os, shutil
from ernie_image_nf4.errors import DiskFull
from ernie_image_nf4.quantization.convert import quantize
from ernie_image_nf4.quantization.synthetic import synthesize
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)  # deceives the check before the work
found = {{}}
for disk in {disks}:
    try:
        if disk.startswith("quantize"):
            quantize({source!r}, disk + "/out", device="cpu", progress=False)
        else:
            synthesize(disk + "/out", preset="tiny", progress=False)
    except DiskFull as error:
        left = [sorted(os.listdir(path)) for path in (disk, disk + "/out", disk + "/out/.unfinished")
                if os.path.exists(path)]
        found[disk] = [str(error), left]
print(json.dumps(found))
"""
PAGE = 4096
pytestmark = pytest.mark.slow


def size_of(folder: Path, *, but: tuple[str, ...] = ()) -> int:
    """Bytes of a folder's files on a disk of pages."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name not in but]
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in files)


@pytest.fixture(scope="module")
def filled(original: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """Disk -> the error that came when it was full, and what its folders hold then."""
    tokenizers = tuple(component.name for component in COMPONENTS if component.other_classes)
    sizes = {
        "quantize-some": 600_000,
        "quantize-none": 100_000,
        "synthesize-folder": PAGE,
        "synthesize-weights": 300_000,
        "synthesize-tokenizer": size_of(original, but=tokenizers) + 2 * PAGE,
    }
    code = FILL.format(disks=[*sizes], source=str(original))
    return json.loads(run_on_small_disks(tmp_path_factory.mktemp("disks"), sizes, code)[-1])


def test_quantize_keeps_what_is_finished(filled):
    assert filled["quantize-some"] == [
        "The disk of quantize-some/out is full: free some space and repeat the command, what is finished is kept.",
        [["out"], [".unfinished", "transformer"], ["lock", "state.json"]],
    ]


@pytest.mark.parametrize("disk", ["quantize-none", "synthesize-folder", "synthesize-weights", "synthesize-tokenizer"])
def test_nothing_is_left_if_nothing_is_finished(filled, disk):
    assert filled[disk] == [f"The disk of {disk}/out is full: free some space and repeat the command.", [[]]]


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
