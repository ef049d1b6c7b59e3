"""Evaluation: equal measures as equal, further off as further off, and what can't be measured says why."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from conftest import weight_files
from PIL import Image
from safetensors.torch import load_file, save_file

from ernie_image_nf4 import load
from ernie_image_nf4.errors import InvalidRepository, InvalidSettings, RepositoryNotFound
from ernie_image_nf4.evaluation.baselines import BASELINES, load_baseline
from ernie_image_nf4.evaluation.grid import labelled_grid
from ernie_image_nf4.evaluation.metrics import MetricStatus
from ernie_image_nf4.evaluation.pictures import draw_from_latents, draw_latents
from ernie_image_nf4.evaluation.predictions import Probe, predict
from ernie_image_nf4.evaluation.records import Evaluation, evaluation_json
from ernie_image_nf4.evaluation.report import markdown, write_report
from ernie_image_nf4.evaluation.run import evaluate
from ernie_image_nf4.evaluation.weights import COMPARED_COMPONENTS, effective_weight, linear_layers
from ernie_image_nf4.generation.prompt_file import Row
from ernie_image_nf4.repository.components import COMPONENT
from ernie_image_nf4.repository.metadata import Recommended
from ernie_image_nf4.repository.record import open_repository
from ernie_image_nf4.repository.safetensors_io import find_tensors

SMALL = {"height": 32, "width": 48, "steps": 2, "guidance": 2.0, "device": "cpu"}
SETTINGS = Recommended(32, 48, 2, 2.0)
PROMPTS = [Row("a cat"), Row("一只橙色的小猫", seed=7)]
NAMES = [component.name for component in COMPARED_COMPONENTS]


def last(*arguments, **options) -> Evaluation:
    *_, evaluation = evaluate(*arguments, **{"prompts": PROMPTS, **SMALL, **options})
    return evaluation


@pytest.fixture(scope="module")
def evaluation(original: Path, repository: Path) -> Evaluation:
    """The NF4 repository and two baselines against their original."""
    return last(original, [repository, "nf4-stock", "gguf-q4_0"])


@pytest.fixture(scope="module")
def perturbed(original: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Copies of `original` whose transformer's linear layers have errors of 1%, 4% and 16% of their norm."""
    folders = []
    for percent in (1, 4, 16):
        folder = Path(shutil.copytree(original, tmp_path_factory.mktemp("off") / f"off-by-{percent}"))
        generator = torch.Generator().manual_seed(percent)
        for file in weight_files(folder, COMPONENT["transformer"]):
            weights = load_file(file)
            for weight in weights.values():
                if weight.ndim == 2:
                    noise = torch.randn(weight.shape, generator=generator)
                    weight += (percent / 100 * noise * weight.float().norm() / noise.norm()).to(weight.dtype)
            save_file(weights, file, metadata={"format": "pt"})
        folders.append(folder)
    return folders


# Measures


def test_an_equal_candidate_has_no_error(repository, copy):
    result = last(repository, [copy]).results[1]
    assert result.error is None
    assert result.identical_pictures == len(PROMPTS)
    assert (result.scores["psnr"].mean, result.scores["psnr"].per_prompt) == (None, [None, None])
    assert result.scores["ssim"].mean == 1
    assert result.prediction_error.overall == 0
    assert {name: error.overall for name, error in result.weight_error.items()} == dict.fromkeys(NAMES, 0)


def test_errors_of_known_size_are_found_and_ordered(original, perturbed):
    results = last(original, perturbed, dtype="float32").results[1:]
    errors = [result.weight_error["transformer"].overall for result in results]
    assert errors == pytest.approx([0.01, 0.04, 0.16], rel=0.05)
    for result, error in zip(results, errors, strict=True):
        assert all(
            kind == pytest.approx(error, rel=0.1) for kind in result.weight_error["transformer"].by_kind.values()
        )
        assert result.weight_error["text_encoder"].overall == 0
    overall = [result.prediction_error.overall for result in results]
    assert 0 < overall[0] < overall[1] < overall[2]
    psnr = [result.scores["psnr"].mean for result in results]
    assert psnr[0] > psnr[1] > psnr[2]


def test_nf4_has_its_known_error_and_bytes(evaluation, repository):
    result = evaluation.results[1]
    assert result.name == "ERNIE-Tiny-NF4"
    assert result.format.startswith("NF4 by bitsandbytes, blocks of 64, double quantization")
    for component in COMPARED_COMPONENTS:
        assert 0.07 < result.weight_error[component.name].overall < 0.11
        stored = find_tensors(weight_files(repository, component)).values()
        assert result.bytes[component.name] == pytest.approx(sum(tensor.spec.bytes for tensor in stored), rel=0.002)
        # In tiny layers scales weigh more, and some are kept unquantized
        assert 4.1 < result.bits_per_weight[component.name] < 7
        assert evaluation.results[0].bits_per_weight[component.name] == 16
    assert 0 < result.prediction_error.overall < 0.5
    assert len(result.prediction_error.timesteps) == len(result.prediction_error.relative_errors) == 10
    assert result.prediction_error.timesteps[0] == 1000


def test_the_modules_of_a_component_make_up_its_error(evaluation, original):
    error = evaluation.results[1].weight_error["transformer"]
    layers = linear_layers(load(original, device="cpu", prompt_enhancer=False).transformer)
    assert error.modules.keys() == layers.keys()
    assert "layers.*.mlp.up_proj" in error.by_kind
    norms = {name: layer.weight.float().norm().item() for name, layer in layers.items()}
    total = sum((error.modules[name] * norm) ** 2 for name, norm in norms.items()) / sum(n**2 for n in norms.values())
    assert error.overall == pytest.approx(total**0.5, rel=1e-3)


def test_the_effective_weight_has_no_bias_in_it_and_leaves_the_layer_as_it_was():
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    layer = Linear4bit(64, 48, compute_dtype=torch.float32, device="meta")
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).to("cpu")
    layer.bias = torch.nn.Parameter(torch.full((48,), 1000.0))
    expected = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
    assert torch.equal(effective_weight(layer, 64, torch.float32), expected)
    assert layer.bias[0] == 1000


def test_predictions_are_the_transformers_for_each_prompts_own_text(pipe):
    generator = torch.Generator().manual_seed(0)
    config, dtype = pipe.transformer.config, pipe.transformer.dtype
    latents = torch.randn(2, 3, config.in_channels, 2, 3, generator=generator)
    texts = [torch.randn(length, config.text_in_dim, generator=generator) for length in (4, 7)]
    probe = Probe(latents, torch.tensor([900.0, 500.0, 100.0]), texts)
    predictions = predict(pipe, probe)
    with torch.no_grad():
        alone = pipe.transformer(
            hidden_states=latents[1, 2:].to(dtype),
            timestep=torch.tensor([100.0], dtype=dtype),
            text_bth=texts[1][None].to(dtype),
            text_lens=torch.tensor([7]),
            return_dict=False,
        )[0]
    assert (predictions.shape, predictions.dtype) == (latents.shape, torch.float32)
    assert torch.equal(predictions[1, 2:], alone.float())
    assert predict(pipe, probe, batch_size=2) == pytest.approx(predictions, abs=0.05 * predictions.abs().max().item())


# Pictures


def test_pictures_are_those_of_the_pipeline_in_any_batch(pipe):
    prompts = [row.prompt for row in PROMPTS]
    latents = draw_latents(pipe, [3, 4], SETTINGS)
    counts: list[int] = []
    drawn = draw_from_latents(pipe, prompts, SETTINGS, latents, on_drawn=counts.append)
    assert (drawn.shape, drawn.dtype, counts) == ((2, 3, 32, 48), torch.uint8, [1, 1])
    image = pipe(
        prompts[1],
        height=32,
        width=48,
        num_inference_steps=2,
        guidance_scale=2.0,
        use_pe=False,
        latents=latents[1:].to(pipe.transformer.dtype),
    ).images[0]
    apart = np.abs(drawn[1].permute(1, 2, 0).numpy().astype(int) - np.asarray(image))
    assert apart.max() <= 1  # diffusers 0.38 truncates values to bytes, later versions round
    together = draw_from_latents(pipe, prompts, SETTINGS, latents, batch_size=2)
    assert (together.int() - drawn.int()).abs().max() <= 2
    assert not torch.equal(drawn[0], drawn[1])


def test_a_prompts_latents_depend_on_its_own_seed_alone(pipe):
    assert torch.equal(draw_latents(pipe, [3, 4], SETTINGS)[1:], draw_latents(pipe, [4], SETTINGS))


def test_seeds_count_up_where_a_prompt_has_none_of_its_own(evaluation):
    assert evaluation.seeds == [0, 7]


def test_settings_default_to_those_of_the_first_repository_that_recommends_some(
    original, repository, perturbed, tmp_path
):
    copy = Path(shutil.copytree(repository, tmp_path / "copy"))
    path = copy / "quantization_metadata.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["recommended"] = {"height": 16, "width": 32, "num_inference_steps": 1, "guidance_scale": 1.5}
    path.write_text(json.dumps(values), encoding="utf-8")
    first = next(evaluate(original, [perturbed[0], copy], prompts=PROMPTS[:1], width=16, device="cpu"))
    assert first.settings == Recommended(16, 16, 1, 1.5)


def test_loading_says_nothing_about_each_candidate(original, repository, caplog):
    with caplog.at_level(logging.INFO, logger="ernie_image_nf4"):
        last(original, [repository, "nf4-stock"], prompts=PROMPTS[:1])
        assert caplog.messages == []
        load(original, device="cpu", prompt_enhancer=False)
    messages = " ".join(caplog.messages)
    assert "Memory mode" in messages
    assert "is not quantized" in messages


# Baselines


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_makes_the_transformer_smaller_and_draws(original, name):
    try:
        importlib.metadata.version(BASELINES[name].package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{BASELINES[name].package} is not installed")
    evaluation = last(original, [name], prompts=PROMPTS[:1])
    result = evaluation.results[1]
    assert result.error is None, result.error
    # Libraries leave layers smaller than their groups unquantized, and many of these tiny ones are
    assert 0.001 < result.weight_error["transformer"].overall < 0.2
    assert 4 <= result.bits_per_weight["transformer"] < 12
    assert result.bytes["transformer"] < 0.8 * evaluation.results[0].bytes["transformer"]
    assert result.scores["psnr"].mean > 10


@pytest.mark.parametrize("component", NAMES)
def test_stock_nf4_is_what_bitsandbytes_gives(original, component):
    layers = linear_layers(getattr(load(original, device="cpu", prompt_enhancer=False), component))
    stock = getattr(load_baseline("nf4-stock", open_repository(original), device="cpu"), component)
    for name, layer in layers.items():
        packed, state = quantize_4bit(layer.weight.detach(), quant_type="nf4", compress_statistics=True)
        assert torch.equal(stock.get_submodule(name).weight, packed)
        assert torch.equal(stock.get_submodule(name).weight.quant_state.absmax, state.absmax)


def test_a_baseline_without_its_library_says_so_in_its_row_and_the_others_go_on(original, monkeypatch):
    version = importlib.metadata.version

    def without_sdnq(package: str) -> str:
        if package == "sdnq":
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", without_sdnq)
    evaluation = last(original, ["sdnq-uint4", "nf4-stock"], prompts=PROMPTS[:1])
    missing, stock = evaluation.results[1:]
    assert missing.error.startswith("InvalidSettings: sdnq is not installed: `pip install sdnq`")
    assert not missing.scores
    assert stock.error is None
    assert "| sdnq-uint4 | could not run |" in markdown(evaluation)
    assert "sdnq-uint4: could not run, InvalidSettings: sdnq is not installed" in markdown(evaluation)


def test_baselines_are_made_from_originals_only(repository):
    with pytest.raises(InvalidRepository, match="is quantized, baselines are made from originals"):
        load_baseline("nf4-stock", open_repository(repository), device="cpu")


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [Row("a cat", steps=3)]}, "Prompt 1 sets steps"),
        ({"prompts": []}, "There are no prompts"),
        ({"batch_size": 0}, "too few for the batch size"),
        ({"height": 33}, "not a positive multiple of 16"),
        ({"candidates": []}, "nothing to compare"),
        ({"candidates": ["nf4-stock", "nf4-stock"]}, "named twice"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_loaded(original, change, message):
    with pytest.raises(InvalidSettings, match=message):
        last(original, change.pop("candidates", ["nf4-stock"]), **change)


def test_a_missing_candidate_is_refused_before_anything_is_loaded(original):
    with pytest.raises(RepositoryNotFound):
        last(original, ["./nowhere"])


# Reports


def refuse_constant(text: str) -> None:
    pytest.fail(f"{text} is not JSON")


def test_json_is_valid_also_with_infinite_psnr(repository, copy):
    values = json.loads(evaluation_json(last(repository, [copy])), parse_constant=refuse_constant)
    assert values["results"][1]["scores"]["psnr"] == {"mean": None, "per_prompt": [None, None]}
    assert values["settings"]["num_inference_steps"] == 2
    assert values["metrics"]["fid"]["reason"]
    assert "pictures" not in values


def test_the_table_has_a_row_for_each_and_says_what_is_not_available(evaluation):
    text = markdown(evaluation)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:6]] == [
        "| ERNIE-Tiny",
        "| ERNIE-Tiny-NF4",
        "| nf4-stock",
        "| gguf-q4_0",
    ]
    assert "FID between the two sets, lower is closer: not available, compares sets of at least 100 pictures" in text
    assert "not available" in rows[3]


def test_a_report_is_whole_files_only(evaluation, tmp_path):
    files = write_report(evaluation, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in files)
    assert {path.name for path in files} == {
        "evaluation.json",
        "evaluation.md",
        "grid.png",
        "psnr.png",
        "timesteps.png",
    }
    for path in files:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.format == "PNG"
                image.load()


def test_without_matplotlib_the_report_says_that_there_are_no_plots(evaluation, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    files = write_report(evaluation, tmp_path)
    assert {path.name for path in files} == {"evaluation.json", "evaluation.md", "grid.png"}
    assert "Plots: matplotlib is not installed" in (tmp_path / "evaluation.md").read_text(encoding="utf-8")


def test_without_psnr_the_report_has_no_plot_of_it_and_says_why(evaluation, tmp_path):
    metrics = evaluation.metrics | {"psnr": MetricStatus("PSNR in dB", "torchmetrics is not installed")}
    scores = [{name: score for name, score in each.scores.items() if name != "psnr"} for each in evaluation.results]
    results = [replace(each, scores=kept) for each, kept in zip(evaluation.results, scores, strict=True)]
    files = write_report(replace(evaluation, metrics=metrics, results=results), tmp_path)
    assert {path.name for path in files} == {"evaluation.json", "evaluation.md", "grid.png", "timesteps.png"}
    text = (tmp_path / "evaluation.md").read_text(encoding="utf-8")
    assert "- PSNR in dB: not available, torchmetrics is not installed." in text


def test_the_grid_shows_each_picture_in_its_place():
    pictures = torch.zeros(2, 2, 3, 128, 128, dtype=torch.uint8)
    pictures[1, 0] = 255
    grid = labelled_grid(["reference", "candidate"], ["a cat", "a dog"], list(pictures))
    shades = [[grid.getpixel((200 + 64 + column * 128, 40 + 64 + row * 128))[0] for column in (0, 1)] for row in (0, 1)]
    assert shades == [[0, 255], [0, 0]]


# Command line


def test_the_command_writes_a_report(command, original, repository, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n", encoding="utf-8")
    options = ["--height", 32, "--width", 48, "--steps", 2, "--device", "cpu", "--quiet", "--batch", 2]
    run = command("evaluate", original, repository, "--out-dir", tmp_path / "out", "--prompts-file", prompts, *options)
    assert run.code == 0, run.err
    assert f"Wrote {tmp_path / 'out' / 'evaluation.json'}" in run.out
    values = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert [result["name"] for result in values["results"]] == ["ERNIE-Tiny", "ERNIE-Tiny-NF4"]
    assert values["prompts"] == ["a cat", "a dog"]
    assert values["command"].startswith("ernie-image-nf4 evaluate ")


def test_the_command_names_a_missing_candidate_and_needs_one(command, original, tmp_path):
    run = command("evaluate", original, "./nowhere", "--out-dir", tmp_path)
    assert (run.code, run.out) == (1, "")
    assert run.err.startswith("Error: There is no folder './nowhere'")
    assert command("evaluate", original).code == 2
