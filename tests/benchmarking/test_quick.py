"""`benchmark --quick`: one row that the owner of a card can send."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from ernie_image_nf4 import load
from ernie_image_nf4.benchmarking import quick
from ernie_image_nf4.cli.app import app
from ernie_image_nf4.errors import DeviceUnavailable


@pytest.fixture(scope="module")
def result(repository):
    return quick.measure_card(repository, (32, 48), "cpu")


def test_a_step_is_measured_at_each_size(result):
    assert list(result["step_ms"]) == [result["dtype"]]  # a CPU has no 8-bit products
    small, large = result["step_ms"][result["dtype"]].values()
    assert 0 < small < result["seconds"] * 1000
    assert 0 < large < result["seconds"] * 1000
    assert result["enhancer_ms_per_token"] > 0
    assert result["memory"] == "resident"


def test_float16_is_called_so_though_only_products_are_in_it(repository, monkeypatch):
    monkeypatch.setattr(quick, "load", lambda *arguments, **options: load(*arguments, **options, dtype="float16"))
    result = quick.measure_card(repository, (32,), "cpu")
    assert result["dtype"] == "float16"
    assert list(result["step_ms"]) == ["float16"]


def test_nothing_new_is_begun_when_time_is_over(repository):
    result = quick.measure_card(repository, (32, 48), "cpu", limit_s=0)
    assert result["step_ms"][result["dtype"]][48] is None
    assert " / - |" in quick.row(result)


def test_the_row_has_the_card_and_its_figures(result):
    header, _, row = quick.row(result).splitlines()
    assert header.count("|") == row.count("|")
    assert result["machine"] in row
    assert f"{result['step_ms'][result['dtype']][32]:.1f} / " in row


def test_the_command_prints_one_row(repository, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    sizes = ["--size", "32", "--large", "48"]
    got = CliRunner().invoke(app, ["benchmark", str(repository), "--quick", *sizes, "--device", "cpu"])
    assert got.exit_code == 0, got.output
    assert len([line for line in got.stdout.splitlines() if line.startswith("|")]) == 3
    assert not list(tmp_path.iterdir())


def test_a_model_and_one_to_be_made_contradict_each_other(repository, tmp_path):
    got = CliRunner().invoke(app, ["benchmark", str(repository), "--quick", "--synthetic", str(tmp_path / "made")])
    assert got.exit_code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nothing_is_made_for_a_device_that_is_not_there(tmp_path):
    got = CliRunner().invoke(app, ["benchmark", "--quick", "--synthetic", str(tmp_path / "made")])
    assert isinstance(got.exception, DeviceUnavailable)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_an_error(repository):
    with pytest.raises(DeviceUnavailable):
        quick.benchmark_quick(repository, (32,), device="cuda")


@pytest.mark.gpu
def test_a_gpu_multiplies_in_each_format(repository):
    result = quick.measure_card(repository, (64, 128), "cuda")
    assert list(result["step_ms"])[:2] == [result["dtype"], "int8"]
    assert all(value > 0 for times in result["step_ms"].values() for value in times.values())
    assert result["peak_reserved_gib"] > 0
    assert result["free_gib"] <= result["total_gib"]
