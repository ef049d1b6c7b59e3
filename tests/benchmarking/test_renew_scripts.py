"""The shell scripts that run many commands, with another program in Python's place: what they run, and how they end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import CHECKOUT
from test_processes import is_running, wait_until

SCRIPTS = ("training/recipe.sh", "benchmarks/renew_mini.sh", "benchmarks/renew_full_size.sh")
# Notes its pid and arguments; then does what the test says of some of its arguments, else ends well.
PYTHON = """\
#!/bin/sh
echo "$$ $*" >> calls
for word in $WAIT; do case "$*" in *"$word"*) exec sleep 60;; esac; done
for word in $FAIL; do case "$*" in *"$word"*) exit 3;; esac; done
while [ $# -gt 0 ]; do
  case "$1" in
    --output) echo "{}" > "$2";;
    --out-dir) mkdir -p "$2"; echo "{}" > "$2/benchmark.json";;
  esac
  shift
done
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("bash"), reason="needs bash")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the scripts, and in WORK what they take from earlier stages."""
    for script in (*SCRIPTS, "benchmarks/side_by_side.sh"):
        (tmp_path / script).parent.mkdir(exist_ok=True)
        shutil.copy(CHECKOUT / script, tmp_path / script)
    (tmp_path / "ernie_image_nf4").mkdir()
    (tmp_path / "ernie_image_nf4" / "code.py").write_text("1\n")
    (tmp_path / "work" / "nf4").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(PYTHON)
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nfor gpu in $GPUS; do echo GPU $gpu; done\n")
    for program in (tmp_path / "bin").iterdir():
        program.chmod(0o755)
    return tmp_path


def begin(checkout: Path, script: str, **variables: str) -> subprocess.Popen:
    path = f"{checkout / 'bin'}:{os.environ['PATH']}"
    environment = (
        os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "WAIT": "", "FAIL": "", "GPUS": "0"} | variables
    )
    return subprocess.Popen(["bash", script, "work"], cwd=checkout, env=environment, stderr=subprocess.DEVNULL)


def calls(checkout: Path) -> dict[str, int]:
    """Arguments of the commands so far -> pid."""
    file = checkout / "calls"
    lines = file.read_text().splitlines() if file.exists() else []
    return {words: int(pid) for pid, _, words in (line.partition(" ") for line in lines)}


@pytest.mark.parametrize("gpus", ["0", "0 1"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_interruption_ends_all_that_a_script_started(script: str, gpus: str, checkout: Path) -> None:
    process = begin(checkout, script, WAIT="dit vae evaluate nf4_mini blemishes --resume", GPUS=gpus)
    expected = {"recipe": 2, "renew_mini": 3, "renew_full_size": len(gpus.split())}[Path(script).stem]

    def waiting() -> list[int]:
        return [pid for pid in calls(checkout).values() if is_running(pid)]

    assert wait_until(lambda: len(waiting()) == expected, 20)
    time.sleep(0.2)
    pids = waiting()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    assert wait_until(lambda: not any(map(is_running, pids)), 5)


@pytest.mark.parametrize("failed", ["dit", "classifier", "vae"])
def test_a_stage_that_fails_ends_the_others_at_once(failed: str, checkout: Path) -> None:
    """Another stage may wait for what it makes."""
    waiting = " ".join({"training.dit", "training.classifier", "training.vae"} - {f"training.{failed}"})
    process = begin(checkout, "training/recipe.sh", WAIT=waiting, FAIL=f"training.{failed}")
    assert process.wait(20) == 3
    assert wait_until(lambda: not any(map(is_running, calls(checkout).values())), 5)
    assert not any("export" in words for words in calls(checkout))


def test_the_recipe_ends_with_the_export(checkout: Path) -> None:
    assert begin(checkout, "training/recipe.sh").wait(20) == 0
    *_, last = calls(checkout)
    assert last == "-m training.export work --enhancer . --install ."
    assert len(calls(checkout)) == 4


def test_the_recipe_goes_on_with_the_stages_that_an_interrupted_one_left(checkout: Path) -> None:
    (checkout / "work" / "original" / "vae").mkdir(parents=True)
    (checkout / "work" / "dit.pt").touch()
    assert begin(checkout, "training/recipe.sh", GO_ON="1").wait(20) == 0
    assert sorted(words.split()[1] for words in calls(checkout)) == [
        "training.classifier",
        "training.dit",
        "training.export",
    ]
    assert (checkout / "work" / "dit.pt").exists()
    (checkout / "calls").unlink()
    assert begin(checkout, "training/recipe.sh").wait(20) == 0
    assert len(calls(checkout)) == 4
    assert not (checkout / "work" / "dit.pt").exists()


def test_the_minis_figures_are_measured_though_one_fails(checkout: Path) -> None:
    assert begin(checkout, "benchmarks/renew_mini.sh", FAIL="blemishes").wait(20) == 0
    assert len(calls(checkout)) == 8


def test_what_is_measured_at_full_size_is_not_measured_again_until_the_code_changes(checkout: Path) -> None:
    def run(**variables: str) -> list[str]:
        (checkout / "calls").unlink(missing_ok=True)
        begin(checkout, "benchmarks/renew_full_size.sh", **variables).wait(20)
        names = ("make_synthetic", "nf4 benchmark", "benchmarks.lora", "benchmarks.peers", "benchmarks.serve")
        return [name for name in names if any(name in words for words in calls(checkout))]

    everything = ["make_synthetic", "nf4 benchmark", "benchmarks.lora", "benchmarks.peers", "benchmarks.serve"]
    assert run(FAIL="benchmarks.peers") == everything
    assert not (checkout / "benchmarks" / "peers_h100.json").exists()
    assert (checkout / "benchmarks" / "benchmark_h100.json").exists()
    assert run() == ["make_synthetic", "benchmarks.peers"]
    assert run() == ["make_synthetic"]
    (checkout / "ernie_image_nf4" / "code.py").write_text("2\n")
    assert run(GPUS="0 1") == everything
    assert run(FAIL="make_synthetic") == ["make_synthetic"]
