"""Commands of the benchmarks end with the script that started them, and interrupted scripts go on."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT
from test_processes import is_running, wait_until, written_pid

from benchmarks import batch_h100, peers
from benchmarks.children import answer

SCRIPTS = {
    "run": "run([sys.executable, '-c', {code!r}])",
    "an arm of peers": "run_arm('ours', 99, ['--synthetic', '.'], Path({folder!r}))",
    "a server": "server().__enter__()",
}
SCRIPT = """
import sys
from pathlib import Path
from unittest.mock import patch
from benchmarks.children import run
from benchmarks.peers import run_arm
from benchmarks.serve import server
with patch("sys.executable", {python!r}):
    {call}
"""
WAIT = "import os, time; open({file!r}, 'w').write(str(os.getpid())); time.sleep(99)"


def test_a_command_answers_by_its_last_line() -> None:
    assert answer([sys.executable, "-c", "print('words'); print('[1]')"]) == [1]
    with pytest.raises(subprocess.CalledProcessError):
        answer([sys.executable, "-c", "raise SystemExit(1)"])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells processes of their parent's end")
@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_command_ends_with_its_script(name: str, number: str, tmp_path: Path) -> None:
    file, python = tmp_path / "pid", tmp_path / "python"
    code = WAIT.format(file=str(file))
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}"\n')  # in place of what would be measured
    python.chmod(0o755)
    call = SCRIPTS[name].format(code=code, folder=str(tmp_path))
    script = SCRIPT.format(python=str(python), call=call)
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.DEVNULL) as parent:
        pid = written_pid(file)
        parent.send_signal(getattr(signal, number))
        parent.wait(20)
    assert wait_until(lambda: not is_running(pid), 5)


def test_an_interrupted_run_of_peers_keeps_its_arms_on_the_same_machine_alone(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    asked = {"machine": "H100", "versions": {"torch": "2"}, "settings": {"sizes": (32, 64)}}
    assert peers.arms_kept(file, asked) == []
    rows = [{"name": "ours", "gib": 4.0}, {"name": "nunchaku-lite", "error": "no"}]
    file.write_text(json.dumps(asked | {"arms": rows}))
    assert peers.arms_kept(file, asked) == rows
    for key, other in (("machine", "H200"), ("versions", {"torch": "3"}), ("settings", {"sizes": (32,)})):
        assert peers.arms_kept(file, asked | {key: other}) == []


def test_a_half_made_repository_is_finished_and_an_original_that_was_there_stays(
    original: Path, tmp_path: Path
) -> None:
    (tmp_path / batch_h100.ORIGINAL).symlink_to(original)
    (tmp_path / batch_h100.NF4).mkdir()
    batch_h100.make(tmp_path, "tiny")
    assert (tmp_path / batch_h100.NF4 / "model_index.json").exists()
    assert (tmp_path / batch_h100.ORIGINAL).exists()


def test_what_was_drawn_without_the_server_is_not_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import serve

    drawn = []
    monkeypatch.setattr(serve, "answer", lambda command: drawn.append(command) or {"seconds": len(drawn)})
    options = argparse.Namespace(work=tmp_path, preset="tiny", size=64, steps=2, pictures=4)
    assert [serve.drawn_alone(options) for _ in range(2)] == [{"seconds": 1}] * 2
    assert "--pictures" in drawn[0]
    options.steps = 3
    assert serve.drawn_alone(options) == {"seconds": 2}
