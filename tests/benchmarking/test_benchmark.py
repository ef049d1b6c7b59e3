"""The benchmark at tiny size on a CPU: every arm in its own process, figures that add up, a report with all of them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import ErnieImagePipeline
from safetensors.torch import save_file
from typer.testing import CliRunner

from benchmarks import rounding
from ernie_image_nf4 import load
from ernie_image_nf4.benchmarking import run
from ernie_image_nf4.benchmarking.arms import ARMS, Arm, Workload, choose_arms, is_baseline
from ernie_image_nf4.benchmarking.growth import compare_int8, step_operations
from ernie_image_nf4.benchmarking.predictions import compare_predictions, save_predictions
from ernie_image_nf4.benchmarking.processes import process_context
from ernie_image_nf4.benchmarking.report import arms_table, bar_chart, markdown, write_benchmark
from ernie_image_nf4.benchmarking.run import benchmark
from ernie_image_nf4.benchmarking.summary import summary
from ernie_image_nf4.benchmarking.worker import _fixed_length, load_arm, measure_arm
from ernie_image_nf4.cli.app import app
from ernie_image_nf4.errors import InvalidSettings
from ernie_image_nf4.fast.products import CAPABILITY

TINY = Workload(size=32, steps=3, tokens=5, pictures=3, large=48, loads=1)
# The names of real arms, with options that a CPU has.
CPU_ARMS = [
    Arm("demo", "ours", {"fast": False, "dtype": "float32"}),
    Arm("resident", "ours", {"memory": "resident", "dtype": "bfloat16"}, texts=2),
    Arm("turbo", "ours", {"dtype": "float32"}, work={"steps": 4, "guidance": 1.0}, pictures=2),
    Arm("turbo, no enhancer", "ours", {"dtype": "float32"}, work={"steps": 4, "tokens": 0}, pictures=2),
    Arm("original, CPU offload", "original"),
]


@pytest.fixture(scope="module")
def steps() -> list[dict]:
    """Copies of the result while it grew."""
    return []


@pytest.fixture(scope="module")
def result(repository: Path, tmp_path_factory: pytest.TempPathFactory, steps: list[dict]) -> dict:
    work = tmp_path_factory.mktemp("benchmark")
    options = {"arms": CPU_ARMS, "workload": TINY, "device": "cpu", "growth": False}
    return benchmark(repository, None, work, **options, on_progress=lambda result: steps.append(copy.deepcopy(result)))


def arm(result: dict, name: str) -> dict:
    return next(arm for arm in result["arms"] if arm["name"] == name)


@pytest.mark.slow
def test_every_arm_has_a_row_with_figures_or_with_the_reason_why_not(result):
    assert [row["name"] for row in result["arms"]] == [each.name for each in CPU_ARMS]
    assert "--original" in arm(result, "original, CPU offload")["error"]
    for name in ("demo", "resident"):
        assert "error" not in arm(result, name), arm(result, name)


@pytest.mark.slow
def test_the_figures_of_an_arm_add_up(result):
    figures = arm(result, "resident")
    pictures = figures["pictures"]
    assert len(pictures) == TINY.pictures
    assert figures["first_s"] == pictures[0]["seconds"]
    later = sorted(picture["seconds"] for picture in pictures[1:])
    assert figures["seconds"] == pytest.approx(sum(later) / 2)
    assert figures["slowest_over_median"] == pytest.approx(later[-1] / figures["seconds"])
    for picture in pictures:
        assert picture["prompt_enhancer_s"] > 0
        denoising = picture["step_ms"] / 1000 * (TINY.steps - 1)
        assert picture["prompt_enhancer_s"] + denoising < picture["seconds"]
    enhancing = sorted(picture["prompt_enhancer_s"] for picture in pictures[1:])
    assert figures["prompt_enhancer_ms_per_token"] == pytest.approx(1000 * sum(enhancing) / 2 / TINY.tokens)
    assert figures["large"]["size"] == 48
    assert figures["prompt_enhancer_together"]["texts"] == 2
    assert 0 < figures["prompt_enhancer_together"]["ms_per_token"] < 1000 * max(enhancing) / TINY.tokens * 5
    assert "prompt_enhancer_together" not in arm(result, "demo")


@pytest.mark.slow
def test_headline_figures_of_the_first_picture_and_of_several_texts(result):
    figures, headline = arm(result, "resident"), summary(result)
    first = figures["first_s"] - figures["seconds"]
    assert headline["h100.first_picture_extra_s"] == pytest.approx(first, rel=1e-3)
    together = figures["prompt_enhancer_together"]["ms_per_token"]
    assert headline["h100.pe_ms_per_token.four_texts"] == pytest.approx(together, rel=1e-3)
    assert headline["h100.pe_first_call_s"] == pytest.approx(figures["prompt_enhancer_first_overhead_s"], rel=1e-3)


@pytest.mark.slow
def test_an_arm_with_work_of_its_own_draws_whole_pictures_at_both_sizes(result):
    enhanced, plain = arm(result, "turbo"), arm(result, "turbo, no enhancer")
    assert enhanced["work"] == {"steps": 4, "guidance": 1.0}
    assert "prompt_enhancer_ms_per_token" in enhanced
    assert "prompt_enhancer_ms_per_token" not in plain
    for row in (enhanced, plain):
        assert len(row["pictures"]) == 2
        assert "prediction_error" not in row
        assert row["large"]["seconds"] > 3 * row["large"]["step_ms"] / 1000
    assert "seconds" not in arm(result, "resident")["large"]


@pytest.mark.slow
def test_the_report_has_a_table_of_its_own_for_it(result):
    turbo = arm(result, "turbo")
    text = markdown(result)
    assert "## As ERNIE-Image-Turbo: 4 steps, guidance 1.0" in text
    assert f"| turbo, 32x32 | {turbo['seconds']:.2f} | {turbo['step_ms']:.1f} |" in text
    assert f"| turbo, no enhancer, 48x48 | {arm(result, 'turbo, no enhancer')['large']['seconds']:.2f} |" in text
    assert "turbo" not in arms_table(result)
    headline = summary(result)
    assert headline["h100.turbo_s.enhanced_512"] == pytest.approx(turbo["seconds"], rel=1e-3)
    assert headline["h100.turbo_s.plain_1024"] > 0


@pytest.mark.slow
def test_predictions_are_compared_with_the_demo(result):
    assert 0 <= arm(result, "demo")["prediction_error"] < 1e-5  # float32, batch reordered
    assert 1e-4 < arm(result, "resident")["prediction_error"] < 0.1  # bfloat16


@pytest.mark.slow
def test_predictions_are_compared_with_float32(result):
    assert result["float32"]["seconds"] > 0
    assert arm(result, "demo")["prediction_error_to_float32"] < 1e-5  # float32 in this test
    assert 1e-4 < arm(result, "resident")["prediction_error_to_float32"] < 0.1


def test_rounding_is_measured_of_both_forward_passes():
    exact = rounding.random_network(128)
    assert len(exact.layers) == 36
    errors = rounding.errors(exact, rounding.random_network(128).to(torch.bfloat16), size=32)
    assert 1e-4 < errors["demo_to_float32"] < 0.1
    assert errors["fast_to_float32"] == pytest.approx(errors["demo_to_float32"], rel=0.3)
    assert 0 < errors["fast_to_demo"] < 2 * errors["demo_to_float32"]


@pytest.mark.slow
def test_without_float32_the_report_says_why(result):
    arms = [{key: value for key, value in row.items() if "float32" not in key} for row in result["arms"]]
    text = markdown(result | {"arms": arms, "float32": {"error": "OutOfMemoryError: 40 GiB"}})
    assert "- predictions in float32: could not run, OutOfMemoryError: 40 GiB" in text
    assert "| to float32 |" not in text
    assert "| to float32 |" in markdown(result)


@pytest.mark.slow
def test_an_interrupted_run_leaves_a_report_of_what_it_had(result, steps, tmp_path: Path):
    assert [len(step["arms"]) for step in steps] == [1, 2, 3, 4, 5, 5, 5, 5]  # Arms, two loaded again, float32
    assert steps[-1] == result
    assert steps[1]["arms"][1]["prediction_error"] == arm(result, "resident")["prediction_error"]
    for number, step in enumerate(steps):
        files = {file.name: file for file in write_benchmark(step, tmp_path / str(number))}
        assert json.loads(files["benchmark.json"].read_text())["machine"] == result["machine"]
        assert "| demo |" in files["benchmark.md"].read_text()


@pytest.mark.slow
def test_a_run_goes_on_with_an_interrupted_one(result, steps, tmp_path: Path, repository: Path, monkeypatch):
    """Only with one of the same machine, versions and workload whose predictions are there."""
    ran: list[str] = []

    def measure(context, function, *arguments):
        if function is run.describe_machine:
            return {key: result[key] for key in ("machine", "versions", "command")}
        ran.append(arguments[0].name if isinstance(arguments[0], Arm) else function.__name__)
        return {"error": "not here"}

    monkeypatch.setattr(run, "in_own_process", measure)
    monkeypatch.setattr(run, "process_context", lambda device: None)
    others = ["original, CPU offload", "save_exact_predictions"]

    def go_on(earlier: dict, workload: Workload = TINY) -> list[str]:
        ran.clear()
        options = {"arms": CPU_ARMS, "workload": workload, "device": "cpu", "growth": False}
        benchmark(repository, None, tmp_path, **options, earlier=json.loads(json.dumps(earlier)))
        return ran

    assert go_on(steps[1])[:2] == ["demo", "resident"]  # Their predictions aren't there
    for name in ("demo", "resident"):
        save_file({key: torch.ones(1, 1) for key in ("prediction", "reordered")}, tmp_path / f"{name}.safetensors")
    assert go_on(steps[1]) == ["turbo", "turbo, no enhancer", *others]
    assert go_on(result) == others[:1]
    assert go_on(result | {"versions": {"torch": "1"}})[0] == "demo"
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.slow
def test_the_report_has_all_arms(result, tmp_path: Path):
    files = {file.name: file for file in write_benchmark(result, tmp_path / "report")}
    assert set(files) == {"benchmark.json", "benchmark.md", "benchmark.png"}
    assert json.loads(files["benchmark.json"].read_text())["workload"]["tokens"] == TINY.tokens
    text = files["benchmark.md"].read_text()
    assert f"| resident | {arm(result, 'resident')['load_s']:.1f} |" in text
    assert "- original, CPU offload: could not run" in text
    assert result["versions"]["torch"] in text


def test_the_summary_takes_its_ratios_from_one_run():
    large = {"step_ms": 100, "peak_reserved_gib": 7}
    figures = {"seconds": 4.0, "step_ms": 50.0, "load_s": 2.0, "peak_reserved_gib": 8.0, "large": large}
    demo = {"name": "demo", "seconds": 10.0, "load_s": 5.0, "large": {"step_ms": 400, "peak_reserved_gib": 14}}
    fp8 = {"name": "resident, fp8", "seconds": 3.0, "prediction_error": 0.00123456, "large": large}
    int8 = {"name": "resident, int8", "step_ms": 45.0, "prediction_error": 0.01, "large": {"step_ms": 90}}
    failed = {"name": "stream", "error": "no"}
    headline = summary({"arms": [demo, {"name": "resident"} | figures, int8, fp8, failed]})
    assert headline["h100.time_vs_demo.resident"] == 0.4
    assert headline["h100.time_vs_demo.resident_fp8"] == 0.3
    assert headline["h100.step_vs_demo.fp8_1024"] == 0.25
    assert (headline["h100.step_ms.int8_512"], headline["h100.step_ms.int8_1024"]) == (45.0, 90.0)
    assert headline["h100.prediction_error.resident_int8"] == 0.01
    assert headline["h100.step_ms.eager_1024"] == 100.0
    assert headline["h100.load_time_vs_demo"] == 0.4
    assert headline["h100.prediction_error.resident_fp8"] == 0.001235
    assert not any("stream" in key or "offload" in key for key in headline)


def test_arms_are_chosen_by_name():
    assert choose_arms([]) == list(ARMS)
    assert [each.name for each in choose_arms(["stream", "sdnq-uint4"])] == ["stream", "sdnq-uint4"]
    assert len(choose_arms([], baselines=True)) > len(ARMS)
    with pytest.raises(InvalidSettings, match="no arm 'swap': choose of demo; resident"):
        choose_arms(["swap"])


@pytest.fixture(scope="module")
def demo(repository: Path) -> ErnieImagePipeline:
    """The demo's pipeline on the GPU."""
    return load_arm(ARMS[0], repository, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", [each.name for each in ARMS])  # a test each, which may run beside each other
def test_an_arm_runs_on_a_gpu(name: str, original: Path, repository: Path, demo, tmp_path: Path, monkeypatch):
    """In this process: to start others, with their imports and CUDA contexts, took nearly all of the time."""
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))  # so that it is taken back
    (chosen,) = choose_arms([name])
    least, _ = CAPABILITY.get(chosen.options.get("products"), ((0, 0), ""))
    if torch.cuda.get_device_capability() < least:
        with pytest.raises(InvalidSettings, match="compute capability"):
            measure_arm(chosen, repository, original, tmp_path, TINY, "cuda")
        return
    row = measure_arm(chosen, repository, original, tmp_path, TINY, "cuda")
    assert len(row["pictures"]) == min(chosen.pictures or TINY.pictures, TINY.pictures)
    assert row["large"]["step_ms"] > 0
    if chosen.way == "ours":
        assert row["peak_reserved_gib"] > 0
    if chosen.way == "ours" and not chosen.work:
        save_predictions(demo, TINY.size, "cuda", tmp_path, "demo")
        rows = [{"name": "demo", "way": "demo"}, {"name": name, "way": "ours"}]
        compare_predictions(rows, tmp_path)
        assert rows[1]["prediction_error"] < 0.5


@pytest.mark.gpu
def test_a_run_on_a_gpu_has_processes_of_its_own_and_all_parts(original: Path, repository: Path, tmp_path: Path):
    options = {"arms": choose_arms(["resident"]), "workload": replace(TINY, loads=2, large=None), "device": "cuda"}
    result = benchmark(repository, original, tmp_path, **options)
    (row,) = result["arms"]
    assert "error" not in row
    assert len(row["all_load_s"]) == 2
    assert result["float32"]["seconds"] > 0
    assert len(result["growth"]["rows"]) == 12  # four sizes and three batches


def test_operations_are_those_that_torch_counts():
    class Config:
        hidden_size, ffn_hidden_size, num_layers = 64, 192, 2

    from torch.utils.flop_counter import FlopCounterMode

    rows, tokens, width, inner = 3, 10, 64, 192
    with FlopCounterMode(display=False) as counter:
        for _ in range(Config.num_layers):
            x = torch.randn(rows, tokens, width)
            for out in (width, width, width, width, inner, inner):
                _ = x @ torch.randn(width, out)
            _ = torch.randn(rows, tokens, inner) @ torch.randn(inner, width)
            _ = torch.bmm(torch.bmm(x, x.transpose(1, 2)), x)
    assert step_operations(Config, rows, tokens) == counter.get_total_flops()


def test_the_command_needs_something_to_measure_and_known_arms(tmp_path: Path):
    outcome = CliRunner().invoke(app, ["benchmark", "--out-dir", str(tmp_path / "out")])
    assert outcome.exit_code == 2
    assert "--synthetic" in outcome.output
    outcome = CliRunner().invoke(app, ["benchmark", str(tmp_path), "--arm", "swap"])
    assert outcome.exit_code == 2
    assert "choose of demo; resident" in outcome.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "number"),
    [
        ("--steps", 1),
        ("--pictures", 1),
        ("--tokens", -1),
        ("--size", 17),
        ("--size", 0),
        ("--large", -16),
        ("--large", 1000),
    ],
)
@pytest.mark.parametrize("quick", [(), ("--quick",)])
def test_numbers_that_cannot_work_are_refused_before_anything_is_loaded(tmp_path, option, number, quick):
    outcome = CliRunner().invoke(app, ["benchmark", str(tmp_path), option, str(number), *quick])
    assert outcome.exit_code == 2
    assert option in outcome.output


@pytest.mark.parametrize("option", ["--baselines", "--peers"])
def test_the_command_runs_baselines_where_asked_for(option, repository: Path, tmp_path: Path, monkeypatch):
    ran: list[Arm] = []
    monkeypatch.setattr(run, "benchmark", lambda *_, arms, **__: ran.extend(arms))
    arguments = ["benchmark", str(repository), "--out-dir", str(tmp_path), "--device", "cpu", option]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert "gguf-q4_0" in {each.name for each in ran}


@pytest.mark.parametrize("option", [(), ("--resume",)])
def test_the_command_goes_on_where_asked_to(option, repository: Path, tmp_path: Path, monkeypatch):
    given: list[dict | None] = []
    monkeypatch.setattr(run, "benchmark", lambda *_, earlier, **__: given.append(earlier))
    (tmp_path / "benchmark.json").write_text('{"arms": []}')
    arguments = ["benchmark", str(repository), "--out-dir", str(tmp_path), "--device", "cpu", *option]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert given == [{"arms": []} if option else None]


@pytest.mark.slow
def test_older_files_are_reported_without_arms_that_are_gone(result, tmp_path: Path):
    figures = {"seconds": 3.0, "large": {"step_ms": 1.0}}
    gone = [{"name": "resident, swapped", "way": "ours"} | figures, {"name": "another", "way": "ours", "error": "no"}]
    peer = {"name": "gguf-q4_0", "way": "peer", "options": {"peer": "gguf-q4_0"}} | figures
    older = result | {"arms": [*result["arms"], *gone, peer]}
    text = markdown(older)
    assert "swapped" not in text
    assert "another" not in text
    assert is_baseline(peer)
    assert "**without the prompt enhancer**" in text
    assert "| gguf-q4_0 |" in text
    assert arms_table(older) == arms_table(result)
    for name, each in (("older", older), ("result", result)):
        bar_chart(each, tmp_path / name)
    assert (tmp_path / "older").read_bytes() == (tmp_path / "result").read_bytes()


@pytest.mark.parametrize("fast", [False, True])
def test_the_prompt_enhancer_writes_exactly_as_many_tokens_as_asked_for(repository: Path, fast: bool):
    pipe = load(repository, device="cpu", fast=fast)
    inputs = {"input_ids": torch.tensor([[1, 2, 3]])}

    def written(eos_token_id: int | None) -> list[int]:
        options = {"max_new_tokens": pipe.pe_tokenizer.model_max_length, "eos_token_id": eos_token_id}
        return pipe.pe.generate(**inputs, **options, do_sample=False, pad_token_id=0)[0, 3:].tolist()

    limit = pipe.pe_tokenizer.model_max_length
    with _fixed_length(pipe, 9):
        first, *_ = tokens = written(None)
        assert len(tokens) == 9
        assert len(written(first)) == 9
    assert pipe.pe_tokenizer.model_max_length == limit
    assert written(first) == [first]


@pytest.mark.slow
def test_growth_is_a_table(result):
    grown = result | {
        "growth": {
            "tflop_per_s": 700.0,
            "rows": [{"size": 512, "batch": 2, "step_ms": 1, "tflop": 3, "over_floor": 1.5}],
        }
    }
    assert "| 512x512, 2 | 1.0 | 3.0 | 1.50 |" in markdown(grown)


@pytest.mark.slow
def test_the_rate_of_int8_products_is_compared_with_bfloat16s(result):
    found = compare_int8((16, 32), (64, 256), "cpu")
    assert [row["rows"] for row in found] == [16, 32]
    assert all(row["speedup"] == row["int8"] / row["bfloat16"] > 0 for row in found)
    assert compare_int8((16,), (64, 96), "cpu") == []
    assert summary(result | {"growth": {"int8_products": found}})["h100.int8_product_vs_bf16"] == pytest.approx(
        found[0]["speedup"], rel=1e-3
    )
    assert "h100.int8_product_vs_bf16" not in summary(result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_processes_start_anew_where_forked_ones_cannot_use_the_device():
    assert process_context("cuda").get_start_method() == "spawn"
