"""benchmarks/lora.py, at tiny size on a CPU, and the headline figures of its runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHECKOUT

from benchmarks.lora import step_ms
from benchmarks.summary import lora_figures

pytest.importorskip("peft")


@pytest.mark.slow
def test_it_times_steps_with_loras_and_of_training(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.lora", "--preset", "tiny", "--device", "cpu", "--size", "64"]
    command += ["--rank", "4", "--train-steps", "6", "--work", tmp_path / "work", "--output", tmp_path / "result.json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        list(map(str, command)), cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["step"].keys() == {"auto"}
    row = result["step"]["auto"]
    assert row["one_vs_base"] == pytest.approx(row["one_ms"] / row["none_ms"], abs=1e-3)
    assert min(row[f"{name}_ms"] for name in ("none", "one", "two", "off")) > 0
    assert result["train"]["steps"] == 2  # of six, three of which warm up
    assert result["train"]["step_s"] > 0


def test_each_figure_is_of_a_picture_of_its_own_whose_step_can_be_captured() -> None:
    """A step is captured once a picture, which its text is recognized by: with other adapters it would be no longer."""
    inputs, texts = {"text_bth": torch.zeros(2, 3), "timestep": torch.zeros(2)}, []
    for _ in range(2):
        step_ms(lambda text_bth, timestep: texts.append(text_bth), inputs, "cpu")
    half = len(texts) // 2
    assert all(text is texts[0] for text in texts[:half])
    assert all(text is texts[half] for text in texts[half:])
    assert texts[0] is not texts[half]


def test_headline_figures_are_those_of_rows_that_ended() -> None:
    row = {"one_vs_base": 1.05, "two_vs_base": 1.1}
    run = {"step": {"auto": row, "int8": {"error": "exit status 1"}}, "train": {"error": "exit status 1"}}
    assert lora_figures(run) == {"lora.step_vs_base.one": 1.05, "lora.step_vs_base.two": 1.1}
    run["step"]["int8"] = {"one_vs_base": 1.07}
    run["train"] = {"step_s": 0.5, "peak_reserved_gib": 7.0}
    assert lora_figures(run) == {
        "lora.step_vs_base.one": 1.05,
        "lora.step_vs_base.two": 1.1,
        "lora.step_vs_base.int8": 1.07,
        "lora.train_step_s.h100_11_gib": 0.5,
        "lora.train_peak_gib": 7.0,
    }
