"""benchmarks/summary.json holds what the runs beside it measured; tables and chart show the same figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import formats_report, summary
from ernie_image_nf4.evaluation.baselines import BASELINES

FORMATS = ["original", *summary.VARIANTS, *(name for name in BASELINES if name != "nf4-stock")]
CHECKOUT = Path(__file__).parents[2]
BENCHMARKS = CHECKOUT / "benchmarks"
FIGURES = json.loads((BENCHMARKS / "summary.json").read_text(encoding="utf-8"))
REPORT = json.loads((CHECKOUT / "training" / "report.json").read_text(encoding="utf-8"))
TABLES = summary.tables()


def read(page: str) -> str:
    return (CHECKOUT / page).read_text(encoding="utf-8")


def test_the_summary_is_what_the_runs_measured():
    assert summary.summary() == FIGURES
    assert FIGURES
    assert all(type(value) in (int, float) for value in FIGURES.values())


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_the_runs(name: str):
    table = f"<!-- {name} -->\n{TABLES[name]}\n<!-- /{name} -->"
    assert table in read(summary.PAGES[name]), "run: python -m benchmarks.summary"


def test_every_table_is_made():
    run = summary.read_benchmark()
    measured = {
        "cards": (CHECKOUT / "benchmarks" / "cards.json").exists(),
        "peers": (CHECKOUT / "benchmarks" / summary.PEERS).exists(),
        "turbo": "turbo" in {arm["name"] for arm in run["arms"]},
    }
    assert TABLES.keys() == summary.PAGES.keys() - {name for name, there in measured.items() if not there}


def test_what_is_left_out_has_its_share_and_its_distance():
    figures = {"work": 0.6, "psnr": 35.04, "lowest_psnr": 30.0, "time_vs_full": 0.61234}
    run = {"against": "all", "results": {"all": {"work": 1.0}, "guidance_until=0.5": figures, "cache=3": figures}}
    assert summary.skipping_table(run, {}).splitlines()[2:] == [
        "| `guidance_until=0.5` | 60% | 35.0 | 30.0 |",
        "| `cache=3` | 60% | 35.0 | 30.0 |",
    ]
    run["results"]["11 steps"] = run["results"].pop("cache=3")
    timed = {"results": {"guidance_until=0.5": {"time_vs_full": 0.763}, "22 steps": {"time_vs_full": 0.45}}}
    title, _, *rows = summary.skipping_table(run, {1024: timed}).splitlines()
    assert "| rows computed | time, 1024x1024 | PSNR (dB) |" in title
    assert rows == ["| `guidance_until=0.5` | 60% | 76% | 35.0 | 30.0 |", "| `11 steps` | 60% | 45% | 35.0 | 30.0 |"]
    run["results"]["cache=3"] = figures  # which was not timed yet
    assert summary.skipping_table(run, {1024: timed}).splitlines()[-1] == "| `cache=3` | 60% | – | 35.0 | 30.0 |"
    assert summary.skipping_figures(run, "h100.time_vs_full", "time_vs_full") == {
        "h100.time_vs_full.guidance_until_half": 0.6123,
        "h100.time_vs_full.cache": 0.6123,
    }


@pytest.mark.parametrize(
    ("name", "figures"), [("summary", FIGURES), ("mini-figures", REPORT["figures"])], ids=["summary", "mini"]
)
def test_every_figure_has_a_row(name: str, figures: dict[str, float]):
    rows = dict(re.findall(r"`([\w.-]+)` \| [^|]+ \| ([\d.,]+)", TABLES[name]))
    assert rows == {key: f"{value:g}" if value < 1e5 else f"{value:,}" for key, value in figures.items()}


def test_the_chart_shows_the_figures_of_the_run():
    """The values lie in the file: pixels depend on fonts and the version of matplotlib."""
    with Image.open(summary.CHART) as chart:
        assert json.loads(chart.text["Description"]) == summary.chart_values(summary.read_benchmark())


def test_the_chart_of_formats_shows_the_figures_of_their_run():
    with Image.open(summary.FORMATS_CHART) as chart:
        shown = json.loads(chart.text["Description"])
    assert shown == formats_report.chart_values(summary.read(summary.FORMATS))
    assert set(shown) >= {"quantize", "stock NF4", "SDNQ uint4", "GGUF Q4_0"}


def test_the_short_table_has_the_formats_that_were_compared(tmp_path: Path):
    figures = {"bits_per_weight": {"transformer": 4.157}, "psnr": 28.58}
    original = {"bits_per_weight": {"transformer": 16}}
    results = {"original": original, "stock": figures, "sdnq-uint4": {"error": "no CUDA"}}
    title, _, row = formats_report.short_table({"results": results}).splitlines()
    assert (title, row) == ("|  | bits a weight | PSNR (dB) |", "| stock NF4 | 4.16 | 28.6 |")
    judged = {"results": {"stock": figures | {"object_accuracy": 0.995}}}
    assert formats_report.short_table(judged).splitlines()[-1] == "| stock NF4 | 4.16 | 28.6 | 99.5% |"
    formats_report.draw_chart(judged, tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as chart:
        assert json.loads(chart.text["Description"]) == {"stock NF4": [4.16, 28.6]}


def test_a_chart_can_be_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    run = summary.read_benchmark()
    summary.draw_chart(run, tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as chart:
        assert json.loads(chart.text["Description"]) == summary.chart_values(run)
        assert chart.width > 1000


@pytest.mark.parametrize("name", ["headline", "speed", "large", "summary"])
def test_arms_of_an_option_that_is_gone_are_left_out(name: str):
    of_others = f"benchmarks/{summary.PEERS}"  # whose formats can be compiled
    assert not [line for line in TABLES[name].splitlines() if "compile" in line and of_others not in line]


def test_every_format_has_its_words():
    assert set(FORMATS) <= formats_report.NAMES.keys()


def test_formats_that_ran_have_a_row_and_what_was_not_measured_a_dash():
    figures = {"bits_per_weight": {"transformer": 4.157}, "weight_error": {}, "prediction_error": 0.1375, "psnr": 28.58}
    other = {"weight_error": {"transformer": 0.1}, "ssim": 0.9, "object_accuracy": 1.0}
    results = {"stock": figures | {"st_lpips": 0.02}, "gguf-q4_0": figures | other, "sdnq-uint4": {"error": "no CUDA"}}
    *_, stock, gguf = table = formats_report.table({"results": results}).splitlines()
    assert len(table) == 4
    assert "ST-LPIPS" in table[0]
    assert stock == "| stock NF4 | 4.16 | – | 0.1375 | 28.58 | – | 0.0200 | – |"
    assert gguf == "| GGUF Q4_0 | 4.16 | 0.1000 | 0.1375 | 28.58 | 0.9000 | – | 100.0% |"


def test_what_no_format_was_measured_for_has_no_column():
    figures = {"bits_per_weight": {"transformer": 4.157}, "weight_error": {}, "prediction_error": 0.1375, "psnr": 28.58}
    title, *_, row = formats_report.table({"results": {"stock": figures}}).splitlines()
    assert title == "|  | bits a weight | prediction error | PSNR (dB) |"
    assert row == "| stock NF4 | 4.16 | 0.1375 | 28.58 |"


def test_memory_in_the_headlines_is_the_larger_peak_of_loading_and_drawing():
    arm = {
        "name": "resident",
        "options": {},
        "load_s": 1.0,
        "first_s": 2.0,
        "seconds": 3.04,
        "step_ms": 71.7,
        "loading_peak_reserved_gib": 9.14,
        "peak_reserved_gib": 8.0,
    }
    *_, row = summary.headline_table({"arms": [arm, {"name": "stream", "error": "no room"}]}).splitlines()
    assert row == "| `resident` | 1.0 | 2.0 | 3.0 | 72 | 9.1 |"


def test_a_table_is_replaced_between_its_comments():
    text = "a\n<!-- t -->\nold\n<!-- /t -->\nb"
    assert summary.replaced(text, "t", "new\n") == "a\n<!-- t -->\nnew\n<!-- /t -->\nb"
    with pytest.raises(ValueError, match="substring"):
        summary.replaced(text, "other", "new")


def says_how_it_was_made(file: Path) -> bool:
    """Whether a run's file has the versions, and a command whose script is there."""
    text = file.read_text(encoding="utf-8")
    script = re.match(r"python (?:-m )?([\w/.]+)", json.loads(text)["command"]).group(1)
    there = [CHECKOUT / script, CHECKOUT / f"{script.replace('.', '/')}.py", CHECKOUT / script / "__main__.py"]
    return any(path.is_file() for path in there) and bool(re.search(r'"torch": "\d', text))


@pytest.mark.parametrize("file", sorted(BENCHMARKS.glob("*.json")), ids=lambda file: file.name)
def test_every_run_says_how_it_was_made(file: Path):
    if file.name != "summary.json":
        assert says_how_it_was_made(file)


@pytest.mark.parametrize("key", FIGURES)
def test_every_headline_figure_names_the_run_that_measured_it(key: str):
    """The summary itself has numbers only: its table on the page of figures has the runs."""
    (row,) = [line for line in read("docs/figures.md").splitlines() if line.startswith(f"| `{key}` |")]
    text, file = re.search(r"\| \[(\w+)\]\(\.\./benchmarks/(\w+\.json)\) \|$", row).groups()
    assert f"{text}.json" == file
    assert says_how_it_was_made(BENCHMARKS / file)
    assert summary.figures_of_runs()[file][key] == FIGURES[key]
