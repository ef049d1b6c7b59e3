"""benchmarks/summary.json holds what the runs beside it measured, and the README's table is of the same figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import summary
from ernie_image_nf4.evaluation.baselines import BASELINES

FORMATS = ["original", *summary.VARIANTS, *(name for name in BASELINES if name != "nf4-stock")]
CHECKOUT = Path(__file__).parents[2]
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


def test_formats_that_ran_have_a_row_and_what_was_not_measured_a_dash():
    figures = {"bits_per_weight": {"transformer": 4.157}, "weight_error": {}, "prediction_error": 0.1375, "psnr": 28.58}
    run = {"results": {"stock": figures | {"st_lpips": 0.02}, "sdnq-uint4": {"error": "no CUDA"}}}
    *_, row = table = summary.formats_table(run).splitlines()
    assert len(table) == 3
    assert "ST-LPIPS" in table[0]
    assert row == "| stock NF4 | 4.16 | – | 0.1375 | 28.58 | – | 0.0200 | – |"


def test_a_table_is_replaced_between_its_comments():
    text = "a\n<!-- t -->\nold\n<!-- /t -->\nb"
    assert summary.replaced(text, "t", "new\n") == "a\n<!-- t -->\nnew\n<!-- /t -->\nb"
    with pytest.raises(ValueError, match="substring"):
        summary.replaced(text, "other", "new")


@pytest.mark.parametrize("file", sorted((CHECKOUT / "benchmarks").glob("*.json")), ids=lambda file: file.name)
def test_every_run_says_how_it_was_made(file: Path):
    if file.name == "summary.json":
        return
    text = file.read_text(encoding="utf-8")
    run = json.loads(text)
    assert "python" in run["command"]
    assert re.search(r'"torch": "\d', text)  # versions
