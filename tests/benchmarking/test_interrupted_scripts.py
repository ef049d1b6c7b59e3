"""What a measurement of the mini has found is in its file when it is interrupted in the middle."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import nf4_mini, nf4_sensitivity, products_mini
from training import evaluate

TINY = ["--captions", "2", "--size", "32", "--steps", "2", "--batch", "2", "--device", "cpu"]


def interrupted(function: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """The function, which after so many calls is interrupted."""
    made = []

    def call(*arguments: Any, **options: Any) -> Any:
        if len(made) == calls:
            raise KeyboardInterrupt
        made.append(arguments)
        return function(*arguments, **options)

    return call


@pytest.fixture
def left_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Runs a script until it is interrupted, and gives what is in its file. What it sets is taken back."""
    monkeypatch.setattr(logging, "disable", lambda level: None)
    allowed = torch.backends.cudnn.allow_tf32

    def run(script: Any, *words: object) -> Any:
        output = tmp_path / "result.json"
        monkeypatch.setattr(sys, "argv", ["script", *map(str, words), "--output", str(output)])
        with pytest.raises(KeyboardInterrupt):
            script.main()
        return json.loads(output.read_text(encoding="utf-8"))

    yield run
    torch.backends.cudnn.allow_tf32 = allowed


def test_formats(left_by, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4_mini, "figures", interrupted(nf4_mini.figures, 3))
    found = left_by(nf4_mini, original, "--work", tmp_path, "--variants", "stock,default", *TINY)
    assert found["results"].keys() == {"original", "stock"}
    assert found["results"]["stock"]["quantize_s"] > 0


def test_sensitivity(left_by, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4_sensitivity, "measure", interrupted(nf4_sensitivity.measure, 2))
    groups = ["--groups", "final_linear;text_proj", "--scales", "stock", "--probes", "2"]
    found = left_by(nf4_sensitivity, original, *groups, *TINY)
    assert [row["kept"] for row in found["results"]] == ["nothing", "text_proj"]


def test_products(left_by, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.ones(1, 1)
    monkeypatch.setattr(products_mini, "draw", interrupted(lambda *_: drawn, 2))
    assert left_by(products_mini, *TINY)["results"].keys() == {"float32", "bfloat16"}


def test_pictures_and_enhancer(left_by, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "load_classifier", lambda *_: None)
    monkeypatch.setattr(evaluate, "load_sprites", lambda *_: None)
    monkeypatch.setattr(evaluate, "measure_pictures", lambda *_: ({"object_accuracy": 1.0}, {}))
    monkeypatch.setattr(evaluate, "measure_enhancer", interrupted(lambda *_: None, 0))
    found = left_by(evaluate, ".", "--model", repository, "--device", "cpu")
    assert found["figures"]["object_accuracy"] == 1.0
    assert "enhancer" not in found
