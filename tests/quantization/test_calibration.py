"""Calibration lowers the error of predictions, in the same format and bytes. And what `quantize` keeps by default."""

from __future__ import annotations

import filecmp
import importlib
import itertools
import json
import shutil
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from conftest import CHECKOUT, diffusers_nf4_on_cpus, skeleton, stored
from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel
from safetensors.torch import load_file
from tqdm import tqdm

from ernie_image_nf4 import load
from ernie_image_nf4.errors import InvalidSettings
from ernie_image_nf4.loading.from_pretrained import DTYPE_ARGUMENT
from ernie_image_nf4.quantization import calibration as calibration_module
from ernie_image_nf4.quantization import calibration_data
from ernie_image_nf4.quantization.block_rounding import stored_weight, token_weights, weights_in
from ernie_image_nf4.quantization.calibration import (
    Calibration,
    calibrate_transformer,
    find_samples,
    find_texts,
    open_original,
    plan_calibration,
)
from ernie_image_nf4.quantization.calibration_data import (
    DRAW_STEPS,
    PREDICTIONS,
    Sample,
    find_sensitivities,
    first_latents,
    plan_drawings,
    schedule,
)
from ernie_image_nf4.quantization.calibration_prompts import BUILT_IN, find_prompts
from ernie_image_nf4.quantization.convert import quantize
from ernie_image_nf4.quantization.family import TURBO
from ernie_image_nf4.quantization.layer_selection import DEFAULT_KEEP, matches, plan_weights
from ernie_image_nf4.quantization.model_card import model_card
from ernie_image_nf4.quantization.resumable_output import resumable_output
from ernie_image_nf4.quantization.streamed_original import conditions
from ernie_image_nf4.repository.components import COMPONENT
from ernie_image_nf4.repository.metadata import Recommended, read_metadata
from ernie_image_nf4.repository.nf4_format import QUANT_STATE, stored_specs
from ernie_image_nf4.repository.record import open_repository
from ernie_image_nf4.repository.safetensors_io import find_tensors, read_tensor

TRANSFORMER = COMPONENT["transformer"]
PROMPTS = ["An orange cat on a desk.", "沙滩上的一只螃蟹。"]
SETTINGS = Recommended(64, 64, 4, 4.0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def calibration(original: Path) -> Calibration:
    return planned(original, SETTINGS)


def planned(original: Path, settings: Recommended, prompts: Sequence[str] = PROMPTS) -> Calibration:
    plan = plan_weights(stored(original, TRANSFORMER), DEFAULT_KEEP)
    return plan_calibration(open_repository(original), plan, prompts, settings, CPU, torch.float32)


def found_samples(calibration: Calibration, folder: Path) -> list[Sample]:
    with resumable_output(folder, {}) as made, tqdm(disable=True) as bar:
        texts = find_texts(calibration, made.checkpoints, bar)
        original, memory = open_original(calibration)
        return find_samples(calibration, original, texts, made.checkpoints, memory, bar)


@pytest.fixture(scope="module")
def samples(calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return found_samples(calibration, tmp_path_factory.mktemp("samples") / "output")


@pytest.fixture(scope="module")
def calibrated(original: Path) -> Path:
    """The NF4 repository of `original`, calibrated."""
    output = original.with_name("ERNIE-Tiny-calibrated")
    return quantize(original, output, device="cpu", calibrate=PROMPTS, recommended=SETTINGS, progress=False)


@pytest.fixture(scope="module")
def plain(original: Path) -> ErnieImagePipeline:
    """The original as upstream's pipeline."""
    return load(original, device="cpu", dtype="float32", prompt_enhancer=False, fast=False)


def predicted(model: ErnieImageTransformer2DModel, sample: Sample) -> torch.Tensor:
    given = conditions(sample.timestep, sample.text, CPU, model.dtype)
    return model(sample.latents.to(model.dtype), *given).sample


# Drawing


def test_samples_are_of_all_timesteps_with_the_prompt_and_the_empty_one(
    samples: Sequence[Sample], plain: ErnieImagePipeline
) -> None:
    assert len(samples) == 2 * 2 * SETTINGS.num_inference_steps
    assert [sample.weight for sample in samples[:2]] == [-3, 4]
    assert len({sample.timestep for sample in samples}) == SETTINGS.num_inference_steps
    for sample, prompt in ((samples[0], ""), (samples[1], PROMPTS[0]), (samples[-1], PROMPTS[1])):
        assert torch.equal(sample.text, plain.encode_prompt(prompt, CPU)[0])


def test_pictures_are_those_of_the_pipeline(samples: Sequence[Sample], plain: ErnieImagePipeline) -> None:
    """Where every step is recorded. Its rows are padded to the same length, which rounds differently."""
    seen: list[tuple[torch.Tensor, float]] = []
    hook = plain.transformer.register_forward_pre_hook(
        lambda _, args, given: seen.append((given["hidden_states"][:1], given["timestep"][0].item())), with_kwargs=True
    )
    latents = first_latents(plain.transformer.config.in_channels, SETTINGS, 1, plain.transformer.dtype)
    plain.set_progress_bar_config(disable=True)
    settings = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 4.0}
    plain(PROMPTS[1], latents=latents, use_pe=False, output_type="latent", **settings)
    hook.remove()
    for sample, (latents, timestep) in zip(samples[8::2], seen, strict=True):
        assert sample.timestep == timestep
        torch.testing.assert_close(sample.latents, latents, rtol=1e-3, atol=1e-4)


def test_few_steps_lead_to_those_that_are_recorded() -> None:
    drawings = plan_drawings(64, 50, guided=True)
    recorded = [step for drawing in drawings for step in drawing.recorded]
    assert len(recorded) == PREDICTIONS // 2
    assert set(recorded) == set(range(50))
    for drawing in drawings:
        assert drawing.steps[0] == 0
        assert drawing.steps[-1] == drawing.recorded[-1]  # nothing is drawn that nobody needs
        assert set(drawing.recorded) <= set(drawing.steps)
        assert max(after - before for before, after in itertools.pairwise([0, *drawing.steps])) <= 50 // DRAW_STEPS
        assert len(drawing.steps) <= DRAW_STEPS + 2


def test_turbo_is_calibrated_for_its_8_steps_without_guidance(original: Path, tmp_path: Path) -> None:
    drawings = plan_drawings(64, TURBO.num_inference_steps, guided=False)
    assert sum(len(drawing.recorded) for drawing in drawings) == PREDICTIONS
    assert all(drawing.steps == tuple(range(drawing.steps[-1] + 1)) for drawing in drawings)
    samples = found_samples(planned(original, replace(TURBO, height=64, width=64)), tmp_path / "output")
    timesteps, _ = schedule(stored(original, COMPONENT["scheduler"]).config, 8)
    assert [sample.weight for sample in samples] == [1.0] * 16
    assert [sample.timestep for sample in samples[:8]] == torch.tensor(timesteps, dtype=torch.float32).tolist()
    assert len({len(sample.text) for sample in samples}) == 2  # the prompts', and no empty one


# Sensitivities


def test_the_sensitivity_is_that_of_the_prediction(samples: Sequence[Sample]) -> None:
    """Text tokens have none in what the last block makes of them after attention, and some as its keys and values."""
    image = samples[1].latents.shape[-2:].numel()
    for name in ("self_attention.to_q", "self_attention.to_out.0", "mlp.gate_proj", "mlp.linear_fc2"):
        assert (samples[1].sensitivity[f"layers.1.{name}"][:image] > 0).all()
        assert (samples[1].sensitivity[f"layers.1.{name}"][image:] == 0).all()
        assert (samples[1].sensitivity[f"layers.0.{name}"] > 0).all()
    for name in ("self_attention.to_k", "self_attention.to_v"):
        assert (samples[1].sensitivity[f"layers.1.{name}"] > 0).all()


def test_it_is_the_gradient_of_the_whole_model(samples: Sequence[Sample], plain: ErnieImagePipeline) -> None:
    sample, model, found = samples[3], plain.transformer, {}

    def watch(name: str, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: found.__setitem__(name, gradient.square().mean(-1).view(-1)))

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, args, output, name=name: watch(name, output))
        for name in sample.sensitivity
    ]
    prediction = predicted(model, sample)
    direction = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(3))
    prediction.backward(sample.weight * direction)
    model.zero_grad()
    for hook in hooks:
        hook.remove()
    for name, value in sample.sensitivity.items():
        torch.testing.assert_close(value, found[name], rtol=1e-3, atol=1e-3 * found[name].max().item())


@pytest.mark.parametrize("segment", [1, 2])
def test_it_is_the_same_however_many_blocks_and_samples_are_there_at_once(
    calibration: Calibration, samples: Sequence[Sample], segment: int
) -> None:
    original, memory = open_original(calibration)
    rows = find_sensitivities(original, samples[2:4], [2, 3], segment, memory)
    for row, sample in zip(rows, samples[2:4], strict=True):
        assert torch.equal(row, torch.stack(list(sample.sensitivity.values())))


# Rounding


def test_predictions_come_nearer_to_the_originals(
    plain: ErnieImagePipeline, calibrated: Path, repository: Path, samples: Sequence[Sample]
) -> None:
    def predictions(model: ErnieImageTransformer2DModel) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([predicted(model, sample) for sample in samples])

    expected = predictions(plain.transformer)
    pipes = [load(folder, device="cpu", dtype="float32", prompt_enhancer=False) for folder in (calibrated, repository)]
    errors = [(predictions(pipe.transformer) - expected).square().sum().item() for pipe in pipes]
    assert errors[0] < 0.8 * errors[1]


def test_what_is_stored_is_what_was_rounded_and_loads_the_conventional_way(
    original: Path, calibrated: Path, tmp_path: Path
) -> None:
    plan = plan_weights(stored(original, TRANSFORMER), DEFAULT_KEEP)
    calibration = plan_calibration(open_repository(original), plan, PROMPTS, SETTINGS, CPU)
    with diffusers_nf4_on_cpus():
        model = ErnieImageTransformer2DModel.from_pretrained(calibrated / "transformer", device_map={"": "cpu"})
    with resumable_output(tmp_path / "output", {}) as made:
        rounded = calibrate_transformer(calibration, made.checkpoints, progress=False)
        assert set(weights_in(rounded)) == calibration.plan.quantized
        for name in weights_in(rounded):
            layer = model.get_submodule(name.removesuffix(".weight"))
            assert isinstance(layer, Linear4bit)
            expected = dequantize_4bit(*stored_weight(name, rounded, CPU))
            assert torch.equal(dequantize_4bit(layer.weight.data, layer.weight.quant_state), expected)


def test_the_bytes_are_those_of_the_scale_search(calibrated: Path, repository: Path) -> None:
    tensors, expected = (load_file(folder / "transformer" / TRANSFORMER.weights) for folder in (calibrated, repository))
    assert tensors.keys() == expected.keys()
    for name in tensors:
        if not name.endswith(QUANT_STATE):
            assert (tensors[name].shape, tensors[name].dtype) == (expected[name].shape, expected[name].dtype)
    for name in ("text_encoder", "pe"):
        file = Path(name, COMPONENT[name].weights)
        assert filecmp.cmp(calibrated / file, repository / file, shallow=False)


@pytest.mark.parametrize("size", [1, 2])
def test_only_a_few_blocks_of_the_original_are_held(calibration: Calibration, size: int) -> None:
    """When a group of blocks is there, those before it are gone."""
    original, _ = open_original(calibration)
    assert all(value.is_meta for block in original.blocks for value in block.parameters() if value.ndim > 1)
    groups = original.stream([[0, 1][:size], [1], [0]])
    gone = None
    for _ in range(3):
        blocks = next(groups)
        assert gone is None or gone() is None
        gone = weakref.ref(blocks[0].mlp.linear_fc2.weight)
        del blocks


def test_a_stage_is_weighted_by_all_of_its_layers() -> None:
    sensitivity = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([30.0, 10.0]), "c": torch.zeros(2)}
    sample = Sample(torch.empty(0), 0.0, torch.empty(0), 1.0, sensitivity)
    assert token_weights([sample], ["a"])[0].tolist() == [0.5, 1.5]
    assert token_weights([sample], ["a", "b"])[0].tolist() == [1.0, 1.0]
    assert token_weights([sample], ["c"])[0].tolist() == [0.0, 0.0]


# The command


def test_the_metadata_and_the_card_say_so(calibrated: Path, repository: Path) -> None:
    assert read_metadata(calibrated).quantization.calibration_prompts == len(PROMPTS)
    assert "while 2 prompts are drawn" in (calibrated / "README.md").read_text()
    assert read_metadata(repository).quantization.calibration_prompts == 0
    assert "calibrated" not in (repository / "README.md").read_text()


def test_a_run_of_the_command_line_gives_the_same_bytes(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., object]
) -> None:
    monkeypatch.setattr(calibration_data, "PREDICTIONS", 4)
    monkeypatch.setattr(calibration_data, "MAX_SIZE", 64)
    monkeypatch.setattr(
        importlib.import_module("ernie_image_nf4.quantization.convert"), "recommended_for", lambda *_: SETTINGS
    )
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    output = tmp_path / "output"
    options = ("--device", "cpu", "--calibrate", tmp_path / "prompts.txt", "--quiet")
    assert command("quantize", original, output, *options).code == 0
    assert read_metadata(output).quantization.calibration_source == "prompts.txt"
    expected = quantize(original, tmp_path / "expected", device="cpu", calibrate=PROMPTS, progress=False)
    file = Path("transformer", TRANSFORMER.weights)
    assert filecmp.cmp(output / file, expected / file, shallow=False)


def test_prompts_are_built_in() -> None:
    prompts = find_prompts(True, scale_search=True)
    assert prompts.source == BUILT_IN
    assert len(prompts.texts) == len(set(prompts.texts)) == 64
    assert sum(any("\u4e00" <= character <= "\u9fff" for character in text) for text in prompts.texts) == 32
    assert max(map(len, prompts.texts)) < 200  # far from what a tokenizer cuts off


def test_the_command_takes_them_without_a_file(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., object]
) -> None:
    """Wherever the option stands, but before an argument, which it would take for its file."""
    taken = []
    convert = importlib.import_module("ernie_image_nf4.quantization.convert")
    monkeypatch.setattr(convert, "quantize", lambda *_, calibrate, **__: taken.append(calibrate))
    for arguments in (("--calibrate",), ("--calibrate", "--quiet"), ("--calibrate", "-")):
        assert command("quantize", original, tmp_path / "output", *arguments).code == 0
    assert taken == [True, True, "-"]
    assert command("quantize", "--calibrate", original, tmp_path / "output").code != 0


def test_metadata_and_card_say_which_prompts(original: Path, repository: Path, tmp_path: Path) -> None:
    metadata = read_metadata(repository)
    for source, text in (
        (BUILT_IN, "while 64 prompts (`ernie_image_nf4/quantization/calibration_prompts.txt`) are drawn"),
        ("mine.txt", "while 64 prompts of `mine.txt` are drawn"),
        (None, "while 64 prompts are drawn"),
    ):
        quantization = replace(metadata.quantization, calibration_prompts=64, calibration_source=source)
        assert text in model_card(replace(metadata, quantization=quantization))
    assert (CHECKOUT / "ernie_image_nf4" / "quantization" / "calibration_prompts.txt").is_file()


def test_prompts_that_cannot_be_used(original: Path, tmp_path: Path, command: Callable[..., object]) -> None:
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    for file, message in (("empty.txt", "has no prompts"), ("missing.txt", "can't be read")):
        result = command("quantize", original, tmp_path / "output", "--calibrate", tmp_path / file)
        assert result.code == 1
        assert message in result.err
    with pytest.raises(InvalidSettings, match="no prompts to calibrate with"):
        quantize(original, tmp_path / "output", calibrate=[], progress=False)
    with pytest.raises(InvalidSettings, match="leave the scale search on"):
        quantize(original, tmp_path / "output", calibrate=PROMPTS, scale_search=False, progress=False)
    assert not (tmp_path / "output").exists()


def test_an_interrupted_run_is_not_continued_with_other_prompts(
    original: Path, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    options = {"device": "cpu", "recommended": SETTINGS, "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", interrupt)  # of the VAE, after the quantized components
        patch.setattr(calibration_data, "PREDICTIONS", 4)
        with pytest.raises(KeyboardInterrupt):
            quantize(original, tmp_path / "output", calibrate=PROMPTS, **options)
    for prompts in (PROMPTS[:1], None):
        with pytest.raises(InvalidSettings, match="unfinished run with different calibration"):
            quantize(original, tmp_path / "output", calibrate=prompts, **options)
    with monkeypatch.context() as patch:  # the transformer is finished
        patch.setattr(calibration_module, "encode_texts", interrupt)
        quantize(original, tmp_path / "output", calibrate=PROMPTS, **options)


# What is kept by default


def test_the_default_list_costs_less_than_2_percent_at_full_size() -> None:
    with as_file(files("ernie_image_nf4") / "quantization" / "configs" / "full") as configs:
        model = skeleton(TRANSFORMER, configs / "transformer")
    total = extra = 0
    kept = []
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), torch.nn.Linear) or parameter.ndim != 2:
            total += parameter.numel() * 2
            continue
        quantized = sum(spec.bytes for spec in stored_specs(tuple(parameter.shape), torch.bfloat16).values())
        total += quantized
        if any(matches(f"transformer.{layer}", pattern) for pattern in DEFAULT_KEEP):
            kept.append(layer)
            extra += parameter.numel() * 2 - quantized
    assert kept
    assert extra < 0.02 * total


def test_the_default_list_is_kept_recorded_and_honoured_by_stock_loading(original: Path, repository: Path) -> None:
    kept = read_metadata(repository).components["transformer"].kept_modules
    assert {"final_linear", "text_proj"} <= set(kept)
    assert all(f"`transformer.{name}`" in (repository / "README.md").read_text() for name in kept)
    config = json.loads((repository / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == sorted(kept)
    with diffusers_nf4_on_cpus():
        model = ErnieImageTransformer2DModel.from_pretrained(
            repository / "transformer", device_map={"": "cpu"}, **{DTYPE_ARGUMENT["diffusers"]: torch.bfloat16}
        )
    tensors = find_tensors((original / "transformer").glob("*.safetensors"))
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            assert isinstance(layer, Linear4bit) == (name not in kept)
        if name in kept:
            assert torch.equal(layer.weight.data.float(), read_tensor(tensors[f"{name}.weight"]).float())


def test_it_can_be_left_out_and_added_to(original: Path, tmp_path: Path) -> None:
    options = {"device": "cpu", "scale_search": False, "progress": False}
    stock = quantize(original, tmp_path / "stock", default_keep=False, **options)
    more = quantize(original, tmp_path / "more", keep=["transformer.adaLN_modulation"], **options)
    assert read_metadata(stock).components["transformer"].kept_modules == []
    kept = read_metadata(more).components["transformer"].kept_modules
    assert {"adaLN_modulation.1", "final_linear"} <= set(kept)
