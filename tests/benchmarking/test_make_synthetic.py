"""Repositories with random weights for the benchmark: made once, and not taken for whole when they aren't."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from ernie_image_nf4 import verify
from ernie_image_nf4.benchmarking.run import make_synthetic
from ernie_image_nf4.errors import InvalidSettings
from ernie_image_nf4.quantization.resumable_output import WORK_FOLDER, ResumableOutput
from ernie_image_nf4.repository.components import MODEL_INDEX
from ernie_image_nf4.repository.safetensors_io import TensorWriter

KILLED = 9


def stamps(folders: Iterable[Path]) -> list[int]:
    return [file.stat().st_mtime_ns for folder in folders for file in sorted(folder.rglob("*"))]


def test_synthetic_repositories_that_are_there_are_used_again(tmp_path):
    made = make_synthetic(tmp_path, preset="tiny")
    before = stamps(made)
    assert make_synthetic(tmp_path, preset="tiny") == made
    assert stamps(made) == before


def in_killed_process(work: Callable[[], object]) -> None:
    """Do something that ends its process, without clearing up."""
    if (child := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == KILLED << 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process to be killed")
@pytest.mark.parametrize("place", ["first weights", "last weights", "original is placed", "nf4"])
def test_half_made_synthetic_repositories_are_made_again(tmp_path, monkeypatch, place):
    placed, files = [], []

    def kill_in_writer(writer: TensorWriter) -> None:
        files.append(writer)
        if len(files) == {"first weights": 1, "last weights": 5, "nf4": 7}.get(place):
            os._exit(KILLED)
        close(writer)

    def kill_in_place(made: ResumableOutput, name: str) -> None:
        placed.append(name)
        if place == "original is placed" and name == MODEL_INDEX:
            os._exit(KILLED)
        move(made, name)

    close, move = TensorWriter.close, ResumableOutput.place
    with monkeypatch.context() as patch:
        patch.setattr(TensorWriter, "close", kill_in_writer)
        patch.setattr(ResumableOutput, "place", kill_in_place)
        in_killed_process(lambda: make_synthetic(tmp_path, preset="tiny"))
    assert [*tmp_path.rglob("*.safetensors")]
    nf4, original = make_synthetic(tmp_path, preset="tiny")
    for folder in (nf4, original):
        assert all(report.ok for report in verify(folder))
        assert not (folder / WORK_FOLDER).exists()


def test_what_is_in_the_place_of_a_synthetic_repository_stays(tmp_path):
    (tmp_path / "ERNIE-Image").mkdir()
    (tmp_path / "ERNIE-Image" / "precious").touch()
    with pytest.raises(InvalidSettings, match="exists already"):
        make_synthetic(tmp_path, preset="tiny")
    assert (tmp_path / "ERNIE-Image" / "precious").exists()
