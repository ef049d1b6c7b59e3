"""benchmarks/summary.json holds what the runs beside it measured, and the README's table is of the same figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import summary
from ernie_image_nf4.peers import PEERS

FORMATS = ["original", *summary.VARIANTS, *(name for name in PEERS if name != "nf4-stock")]
CHECKOUT = Path(__file__).parents[1]
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
FIGURES = json.loads((CHECKOUT / "benchmarks" / "summary.json").read_text(encoding="utf-8"))


def test_the_summary_is_what_the_runs_measured():
    assert summary.summary() == FIGURES
    assert FIGURES
    assert all(type(value) in (int, float) for value in FIGURES.values())


def test_the_readmes_tables_agree_with_the_runs():
    table = README.split("<!-- summary -->")[1].split("<!-- /summary -->")[0]
    rows = dict(re.findall(r"`([\w.]+)` \| [^|]+ \| ([\d.,]+)", table))
    assert rows == {key: f"{value:g}" if value < 1e5 else f"{value:,}" for key, value in FIGURES.items()}
    for name, table in summary.tables().items():
        assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in README


def test_every_figure_has_its_words():
    assert FIGURES.keys() <= summary.TEXTS.keys()
    assert set(FORMATS) <= summary.FORMATS.keys()


@pytest.mark.parametrize("file", sorted((CHECKOUT / "benchmarks").glob("*.json")), ids=lambda file: file.name)
def test_every_run_says_how_it_was_made(file: Path):
    if file.name == "summary.json":
        return
    text = file.read_text(encoding="utf-8")
    run = json.loads(text)
    assert "python" in run["command"]
    assert re.search(r'"torch": "\d', text)  # versions
