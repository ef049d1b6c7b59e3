"""benchmarks/peers.py at tiny size on a CPU, and what the summary makes of its result."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKOUT
from PIL import Image

from benchmarks import children, peers, peers_report
from ernie_image_nf4.benchmarking.run import NF4, ORIGINAL
from ernie_image_nf4.evaluation.baselines import BASELINES

TINY = ["--preset", "tiny", "--device", "cpu"]


@pytest.fixture(scope="module")
def synthetic(original: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `make_synthetic`, of the session's repositories."""
    folder = tmp_path_factory.mktemp("synthetic")
    (folder / ORIGINAL).symlink_to(original)
    (folder / NF4).symlink_to(repository)
    return folder


@pytest.fixture(scope="module")
def result(synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("peers") / "result.json"
    arms = ["ours", "ours-int8", "nf4-stock"]  # each is a process, which takes seconds to start
    command = [sys.executable, "-m", "benchmarks.peers", "--synthetic", str(synthetic), "--output", str(output), *TINY]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = children.run(
        [*command, "--no-compile", "--arms", *arms],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(output.read_text(encoding="utf-8"))
    assert [row["name"] for row in found["arms"]] == arms
    return found


def arm(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in result["arms"] if row["name"] == name)


def options_of(synthetic: Path, file: Path) -> argparse.Namespace:
    return argparse.Namespace(synthetic=synthetic, preset="tiny", device="cpu", row=file, no_compile=False)


@pytest.mark.slow
def test_each_arm_has_its_steps_and_its_bits(result: dict[str, Any]) -> None:
    for name, least, most in (("ours", 4.1, 7), ("nf4-stock", 4.1, 5)):
        row = arm(result, name)
        assert "error" not in row, row
        assert all(row["plain"][size]["step_ms"] > 0 for size in ("32", "64"))
        assert least <= row["bits_per_weight"] <= most
        assert 0 < row["seconds"] < row["limit_s"]
        assert "doing" not in row
    assert arm(result, "nf4-stock")["make_s"] > 0
    assert "make_s" not in arm(result, "ours")


@pytest.mark.slow
def test_an_arm_that_fails_says_why_and_the_others_go_on(result: dict[str, Any]) -> None:
    assert arm(result, "ours-int8")["error"].startswith("InvalidSettings: Products in int8 need a CUDA GPU")
    assert "plain" not in arm(result, "ours-int8")
    assert "plain" in result["arms"][-1]


def test_nunchaku_which_needs_a_gpu_says_why_it_fails(synthetic: Path, tmp_path: Path) -> None:
    peers.measure_arm(peers.NUNCHAKU, options_of(synthetic, tmp_path / "row.json"))
    row = json.loads((tmp_path / "row.json").read_text(encoding="utf-8"))
    assert "unchaku" in row["error"]
    assert "plain" not in row


@pytest.mark.slow
def test_the_run_says_how_it_was_made_and_not_where(result: dict[str, Any], synthetic: Path) -> None:
    assert result["versions"]["torch"]
    assert result["machine"]
    assert result["command"].startswith("python -m benchmarks.peers --synthetic FOLDER")
    assert str(synthetic) not in json.dumps(result)


@pytest.mark.slow
def test_an_arm_over_its_limit_is_killed_and_says_so(synthetic: Path, tmp_path: Path) -> None:
    row = peers.run_arm("bfloat16", 0.2, ["--synthetic", str(synthetic), *TINY], tmp_path)
    assert row["error"] == "Not done after 0.2 s: starting"
    assert row["seconds"] < 5


def test_what_was_measured_before_the_end_is_kept() -> None:
    plain = {"512": {"step_ms": 100.0}}
    row = peers.with_end({"plain": plain, "doing": "steps of 1024x1024"}, "Not done after 90 s")
    assert row == {"plain": plain, "error": "Not done after 90 s: steps of 1024x1024"}
    compiled = {"fullgraph": True, "512": {"step_ms": 50.0}}
    doing = "compiled steps of 1024x1024"
    row = peers.with_end(
        {"plain": plain, "compiled": compiled, "doing": doing}, "The process ended with code -9, killed"
    )
    assert row["compiled"]["512"] == {"step_ms": 50.0}
    assert row["compiled"]["error"] == "The process ended with code -9, killed: compiled steps of 1024x1024"
    assert "error" not in row


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Blocks are traced, and run as they are; or an error is raised in place of what is asked for."""
    from diffusers import ErnieImageTransformer2DModel

    whole = ErnieImageTransformer2DModel.compile_repeated_blocks

    def patch(fails: str) -> None:
        def compiled(model: Any, *, fullgraph: bool) -> None:
            if fails == "both" or (fails == "fullgraph" and fullgraph):
                raise RuntimeError(f"no {fullgraph}\nand more lines")
            whole(model, fullgraph=fullgraph, backend="eager")

        monkeypatch.setattr(ErnieImageTransformer2DModel, "compile_repeated_blocks", compiled)

    return patch


@pytest.mark.parametrize("fails", ["neither", "fullgraph", "both"])
def test_compiled_steps_are_timed_after_the_plain_ones(
    fails: str, without_compiler: Callable[[str], None], synthetic: Path, tmp_path: Path
) -> None:
    without_compiler(fails)
    peers.measure_arm("bfloat16", options_of(synthetic, tmp_path / "row.json"))
    row = json.loads((tmp_path / "row.json").read_text(encoding="utf-8"))
    compiled = row["compiled"]
    assert "error" not in row
    assert row["bits_per_weight"] == 16
    assert row["plain"].keys() == {"32", "64"}
    if fails == "both":
        assert compiled == {
            "fullgraph": False,
            "fullgraph_error": "RuntimeError: no True",
            "error": "RuntimeError: no False",
        }
        return
    assert compiled["fullgraph"] is (fails == "neither")
    assert ("fullgraph_error" in compiled) is (fails == "fullgraph")
    assert all(compiled[size]["step_ms"] > 0 and compiled[size]["warm_up_s"] > 0 for size in ("32", "64"))


def test_a_format_whose_library_is_missing_says_how_to_install_it(
    synthetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = BASELINES["gguf-q4_0"].__class__("none", "no-such-library", lambda model: None)
    monkeypatch.setitem(BASELINES, "gguf-q4_0", missing)
    peers.measure_arm("gguf-q4_0", options_of(synthetic, tmp_path / "row.json"))
    row = json.loads((tmp_path / "row.json").read_text(encoding="utf-8"))
    assert row["error"].startswith("InvalidSettings: no-such-library is not installed: `pip install no-such-library`")


def test_every_arm_is_known_and_has_its_words() -> None:
    others = set(peers.ARMS) - {*peers.OURS, peers.ORIGINAL, peers.NUNCHAKU}
    assert others == BASELINES.keys() - {"quanto-int8"}
    assert set(peers.ARMS) == peers_report.NAMES.keys()
    assert set(peers.TUNING) < set(peers.ARMS)


# The summary


def sized(small: float, large: float) -> dict[str, Any]:
    return {"512": {"step_ms": small}, "1024": {"step_ms": large, "peak_reserved_gib": 5.5}}


def row(name: str, bits: float, gib: float, **other: Any) -> dict[str, Any]:
    return {"name": name, "bits_per_weight": bits, "gib": gib} | other


RUN = {
    "arms": [
        row("ours", 4.3, 4.012, plain=sized(70.0, 280.0)),
        row("ours-int8", 4.3, 4.012, plain=sized(50.0, 190.0)),
        row("bfloat16", 16, 15.0, plain=sized(105.0, 420.0), compiled=sized(40.0, 270.0)),
        row("nf4-stock", 4.127, 3.9, plain=sized(116.0, 448.0), compiled=sized(86.123456, 302.0), make_s=0.44),
        row(
            "sdnq-uint4", 4.5, 4.2, plain=sized(120.0, 450.0), compiled={"512": {"step_ms": 65.0}, "error": "No: time"}
        ),
        {"name": "nunchaku-lite", "error": "ValueError: not on Hopper"},
    ]
}


def test_headline_figures_are_of_the_faster_of_plain_and_compiled() -> None:
    found = peers_report.figures(RUN)
    assert found["peers.step_ms_512.nf4-stock"] == 86.12
    assert found["peers.step_ms_1024.nf4-stock"] == 302.0
    assert found["peers.step_ms_512.ours"] == 70.0
    assert found["peers.step_ms_1024.sdnq-uint4"] == 450.0
    assert found["peers.gib.bfloat16"] == 15.0
    assert not any("nunchaku" in key for key in found)
    assert found.keys() <= peers_report.TEXTS.keys()


def test_every_arm_has_its_row_with_figures_or_the_reason() -> None:
    _, _, *rows = peers_report.table(RUN).splitlines()
    assert len(rows) == len(RUN["arms"])
    assert rows[3] == "| stock NF4 | 4.13 | 3.90 | 116.0 | 86.1 | 448.0 | 302.0 | 5.50 | 0.4 |  |"
    assert rows[4] == "| SDNQ uint4 | 4.50 | 4.20 | 120.0 | 65.0 | 450.0 | – | 5.50 | – | Compiled: No: time |"
    assert rows[5].endswith("| – | ValueError: not on Hopper |")


def test_it_is_said_where_a_4_bit_format_is_faster() -> None:
    """The original has 16 bits, however fast it is."""
    assert peers_report.comparison(RUN).splitlines() == [
        "- ours, `resident`: slower than SDNQ uint4 at 512x512 (65.0 ms, ours 70.0).",
        '- ours, `products="int8"`: ahead of stock NF4, SDNQ uint4 at 512x512 and 1024x1024, plain and compiled, '
        "as far as these ran.",
    ]
    alone = {**RUN, "arms": [row for row in RUN["arms"] if row["name"].startswith("ours")]}
    assert peers_report.comparison(alone) == ""


def test_the_chart_has_every_arm_that_ran(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    peers_report.draw_chart(RUN, tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as chart:
        shown = json.loads(chart.text["Description"])
        assert chart.width > 1000
    assert len(shown) == 5
    assert shown["stock NF4"] == {
        "gib": 3.9,
        "512": {"plain": 116.0, "compiled": 86.123456},
        "1024": {"plain": 448.0, "compiled": 302.0},
    }


def test_the_section_has_chart_table_and_comparison() -> None:
    introduction, chart, table, comparison = peers_report.section(RUN, "../benchmarks/peers_h100.png").split("\n\n")
    assert introduction == peers_report.INTRODUCTION
    assert chart.endswith("](../benchmarks/peers_h100.png)")
    assert table == peers_report.table(RUN)
    assert comparison == peers_report.comparison(RUN)
