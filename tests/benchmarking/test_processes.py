"""Measurements in processes of their own: what they answer, and that none outlives what started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import psutil
import pytest
from conftest import CHECKOUT

from ernie_image_nf4.benchmarking import device
from ernie_image_nf4.benchmarking.processes import PRELOADED, in_own_process

METHODS = [method for method in ("spawn", "forkserver") if method in get_all_start_methods()]
# Calls a builtin function in a process of its own, so that unpickling it imports nothing.
MEASURING = """
import signal
from multiprocessing import get_context
from ernie_image_nf4.benchmarking.processes import in_own_process
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where a shell runs the tests behind it
    write = "__import__('pathlib').Path({file!r}).write_text(str(__import__('os').getpid()))"
    code = write + " and __import__('time').sleep(99)"
    in_own_process(get_context({method!r}), eval, code)
"""
# The builtin function again.
FORKING = """
from ernie_image_nf4.benchmarking.processes import in_own_process, process_context
if __name__ == "__main__":
    context = process_context("cpu")
    print(context.get_start_method(), *in_own_process(context, eval, "sorted(__import__('sys').modules)"))
"""


def wait_until(condition, seconds: float = 60) -> bool:
    """Whether it came true in that time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def written_pid(file: Path) -> int:
    assert wait_until(lambda: file.exists() and file.read_text())
    return int(file.read_text())


def test_errors_and_ends_of_a_process_are_told_by_its_answer() -> None:
    context = get_context("spawn")
    assert in_own_process(context, eval, "{'a': 1}") == {"a": 1}
    assert in_own_process(context, eval, "1 / 0") == {"error": "ZeroDivisionError: division by zero"}
    killed = in_own_process(context, eval, "__import__('os').kill(__import__('os').getpid(), 9)")
    assert killed == {"error": "the process was killed, probably for lack of memory"}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_measurement_ends_with_the_process_that_started_it(method: str, number: str, tmp_path: Path) -> None:
    script, file = tmp_path / "script.py", tmp_path / "pid"
    script.write_text(MEASURING.format(file=str(file), method=method))
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    with subprocess.Popen([sys.executable, str(script)], env=environment, stderr=subprocess.DEVNULL) as parent:
        pid = written_pid(file)
        parent.send_signal(getattr(signal, number))
        parent.wait(20)
    assert wait_until(lambda: not is_running(pid), 5)


@pytest.mark.skipif("forkserver" not in get_all_start_methods(), reason="the system can't fork")
def test_processes_are_forked_after_the_slow_imports() -> None:
    # In a process that has started no server of such processes, as other tests do with imports of their own.
    found = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    method, *imported = found.stdout.split()
    assert method == "forkserver"
    assert set(PRELOADED) <= set(imported)
    assert "bitsandbytes" not in imported


def test_long_calls_are_timed_three_times_and_short_ones_as_often_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, calls in ((0.01, 1 + 5), (0.4, 1 + 3), (3.0, 1 + 3)):
        now, called = [0.0], []

        def work(seconds=seconds, now=now, called=called) -> None:
            called.append(now[0])
            now[0] += seconds

        monkeypatch.setattr(device.time, "perf_counter", lambda now=now: now[0])
        assert device.best_seconds(work, "cpu") == pytest.approx(seconds)
        assert len(called) == calls
