"""benchmarks/calibrate.py, at tiny size on a CPU."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT

from benchmarks import calibrate, children


@pytest.mark.slow
def test_it_records_phases_memory_and_errors(original: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "ERNIE-Image").symlink_to(original)  # which needn't be made
    command = [sys.executable, "-m", "benchmarks.calibrate", "--preset", "tiny", "--prompts", "1"]
    command += ["--variants", "scale_search,calibrated", "--work", str(tmp_path / "work")]
    command += ["--output", str(tmp_path / "result.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = children.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    phases = result["calibrated"]["phases"]
    assert [phase["phase"] for phase in phases] == ["texts", "drawing", "sensitivities", "rounding"]
    assert sum(phase["seconds"] for phase in phases) <= result["calibrated"]["seconds"]
    assert result["calibrated"]["host_gib"] > 0
    assert result["machine"]["versions"]["torch"]
    assert "--preset tiny" in result["command"]
    errors = result["errors"]["prediction_error"]
    assert 0 < errors["calibrated"] < errors["scale_search"]
    assert "synthesize" not in result
    assert not (tmp_path / "work").exists()
    assert (original / "model_index.json").exists()


def test_figures_of_an_interrupted_run_are_kept_for_the_same_settings_and_machine(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    options = argparse.Namespace(output=output, preset="tiny", turbo=False)
    asked = {"preset": "tiny", "settings": vars(calibrate.settings(options))}
    assert calibrate.figures_kept(options, asked) == {}
    earlier = asked | {"stock": {"seconds": 1.0}, "machine": calibrate.machine()}
    output.write_text(json.dumps(earlier))
    assert calibrate.figures_kept(options, asked)["stock"] == {"seconds": 1.0}
    assert calibrate.figures_kept(options, asked | {"preset": "full"}) == {}
    output.write_text(json.dumps(earlier | {"machine": {"gpu": "another"}}))
    assert calibrate.figures_kept(options, asked) == {}
