"""What a benchmark runs in processes of its own: none outlives the script that started it, however that ends.

A command that goes on after the script was killed would take the GPU from what is measured next.
"""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def run(command: Sequence[object], **options: Any) -> subprocess.CompletedProcess:
    """`subprocess.run`, from the main thread, of a command that is killed where this process ends."""
    return subprocess.run([str(word) for word in command], preexec_fn=end_with_parent(), **options)


def answer(command: Sequence[object]) -> Any:
    """What a command that has to end well says in its last line, as JSON."""
    return json.loads(run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def apart(function: Callable[..., Any], *arguments: object) -> Any:
    """What a function gives in a process of its own, whose memory on the GPU is free again then.

    Raises:
        SystemExit: With the function's error.
    """
    from ernie_image_nf4.benchmarking.processes import in_own_process

    found = in_own_process(get_context("spawn"), function, *arguments)
    if isinstance(found, dict) and "error" in found:
        raise SystemExit(found["error"])
    return found


def write(file: Path, text: str) -> None:
    """Replace a file as a whole: the process may be killed while it writes."""
    from ernie_image_nf4.generation.image_file import replacing

    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def end_with_parent(by: signal.Signals = signal.SIGKILL) -> Callable[[], None] | None:
    """A ``preexec_fn``: the process gets this signal where the thread that starts it ends. None where there is none."""
    libc = _LIBC
    return None if libc is None else lambda: libc.prctl(PR_SET_PDEATHSIG, int(by))
