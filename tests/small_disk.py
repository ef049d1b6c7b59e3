"""Code on a disk that fills up: a file system of a few kB, in a mount namespace of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent


def run_on_small_disk(folder: Path, size: int, code: str, **variables: str) -> list[str]:
    """`run_on_small_disks` on one, ``small``, of so many bytes."""
    return run_on_small_disks(folder, {"small": size}, code, **variables)


def run_on_small_disks(folder: Path, sizes: dict[str, int], code: str, **variables: str) -> list[str]:
    """Run code in a new process, in `folder`, where there are disks of so many bytes. Skips where nobody may mount.

    Returns:
        The lines that it prints.
    """
    for name in sizes:
        (folder / name).mkdir()
    mount = "".join(f"mount -t tmpfs -o size={size} tmpfs {name} && " for name, size in sizes.items())
    mount += 'exec "$0" "$@"'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)} | variables,
        capture_output=True,
        text=True,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("this machine lets nobody mount a file system")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
