"""Calibration lowers the error of predictions, in the same format and bytes. And what `quantize` keeps by default."""

from __future__ import annotations

import filecmp
import gc
import importlib
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
from diffusers import ErnieImageTransformer2DModel
from safetensors.torch import load_file

from ernie_image_nf4 import load
from ernie_image_nf4.errors import InvalidSettings
from ernie_image_nf4.loading.from_pretrained import DTYPE_ARGUMENT
from ernie_image_nf4.quantization import calibration_data
from ernie_image_nf4.quantization.calibration import LayerRounding, calibrate_transformer, round_layers
from ernie_image_nf4.quantization.calibration_data import Sample, conditions, record_samples
from ernie_image_nf4.quantization.calibration_prompts import BUILT_IN, find_prompts
from ernie_image_nf4.quantization.convert import quantize
from ernie_image_nf4.quantization.layer_selection import DEFAULT_KEEP, matches, plan_weights
from ernie_image_nf4.quantization.model_card import model_card
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
def samples(original: Path) -> list[Sample]:
    return record_samples(open_repository(original), PROMPTS, SETTINGS, CPU, progress=False)


@pytest.fixture(scope="module")
def calibrated(original: Path) -> Path:
    """The NF4 repository of `original`, calibrated."""
    output = original.with_name("ERNIE-Tiny-calibrated")
    return quantize(original, output, device="cpu", calibrate=PROMPTS, recommended=SETTINGS, progress=False)


# The transformer


def test_samples_are_of_all_timesteps_with_the_prompt_and_the_empty_one(
    samples: Sequence[Sample], original: Path
) -> None:
    assert len(samples) == 2 * 2 * SETTINGS.num_inference_steps
    assert [sample.weight for sample in samples[:2]] == [-3, 4]
    assert len({sample.timestep for sample in samples}) == SETTINGS.num_inference_steps
    pipe = load(original, device="cpu", prompt_enhancer=False)
    for sample, prompt in ((samples[0], ""), (samples[1], PROMPTS[0]), (samples[-1], PROMPTS[1])):
        assert torch.equal(sample.text, pipe.encode_prompt(prompt, CPU)[0])


def test_nobody_is_warned_that_the_original_is_not_quantized(original: Path, caplog: pytest.LogCaptureFixture) -> None:
    record_samples(
        open_repository(original), PROMPTS[:1], replace(SETTINGS, num_inference_steps=1), CPU, progress=False
    )
    assert "not quantized" not in caplog.text


def test_the_sensitivity_is_that_of_the_prediction(samples: Sequence[Sample]) -> None:
    """Text tokens have none in what the last block makes of them after attention, and some as its keys and values."""
    image = samples[1].latents.shape[-2:].numel()
    for name in ("self_attention.to_q", "self_attention.to_out.0", "mlp.gate_proj", "mlp.linear_fc2"):
        assert (samples[1].sensitivity[f"layers.1.{name}"][:image] > 0).all()
        assert (samples[1].sensitivity[f"layers.1.{name}"][image:] == 0).all()
        assert (samples[1].sensitivity[f"layers.0.{name}"] > 0).all()
    for name in ("self_attention.to_k", "self_attention.to_v"):
        assert (samples[1].sensitivity[f"layers.1.{name}"] > 0).all()


def test_predictions_come_nearer_to_the_originals(
    original: Path, calibrated: Path, repository: Path, samples: Sequence[Sample]
) -> None:
    def predictions(folder: Path) -> torch.Tensor:
        model = load(folder, device="cpu", prompt_enhancer=False).transformer
        with torch.no_grad():
            return torch.cat(
                [model(sample.latents, *conditions(sample, CPU, model.dtype)).sample for sample in samples]
            )

    expected = predictions(original)
    errors = [(predictions(folder) - expected).square().sum().item() for folder in (calibrated, repository)]
    assert errors[0] < 0.8 * errors[1]


def test_what_is_stored_is_what_was_rounded_and_loads_the_conventional_way(original: Path, calibrated: Path) -> None:
    plan = plan_weights(stored(original, TRANSFORMER), DEFAULT_KEEP)
    rounded = calibrate_transformer(open_repository(original), plan, PROMPTS, SETTINGS, device=CPU, progress=False)
    assert rounded.keys() == plan.quantized
    with diffusers_nf4_on_cpus():
        model = ErnieImageTransformer2DModel.from_pretrained(calibrated / "transformer", device_map={"": "cpu"})
    for name, made in rounded.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, Linear4bit)
        assert torch.equal(dequantize_4bit(layer.weight.data, layer.weight.quant_state), dequantize_4bit(*made))


def test_the_bytes_are_those_of_the_scale_search(calibrated: Path, repository: Path) -> None:
    tensors, expected = (load_file(folder / "transformer" / TRANSFORMER.weights) for folder in (calibrated, repository))
    assert tensors.keys() == expected.keys()
    for name in tensors:
        if not name.endswith(QUANT_STATE):
            assert (tensors[name].shape, tensors[name].dtype) == (expected[name].shape, expected[name].dtype)
    for name in ("text_encoder", "pe"):
        file = Path(name, COMPONENT[name].weights)
        assert filecmp.cmp(calibrated / file, repository / file, shallow=False)


def test_only_one_block_of_the_original_is_held(
    original: Path, samples: Sequence[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a block is read, those before it are gone."""
    alive: list[weakref.ref] = []
    most = 0

    def watch(rounding: LayerRounding, module: torch.nn.Module, prefix: str) -> torch.nn.Module:
        nonlocal most
        if prefix:
            gc.collect()
            most = max(most, sum(each() is not None for each in alive))
            made = read(rounding, module, prefix)
            alive.append(weakref.ref(made.mlp.linear_fc2.weight))
            return made
        return read(rounding, module, prefix)

    read = LayerRounding.read_weights
    monkeypatch.setattr(LayerRounding, "read_weights", watch)
    plan = plan_weights(stored(original, TRANSFORMER))
    round_layers(stored(original, TRANSFORMER), plan, samples[:2], CPU, progress=False)
    assert len(alive) == 2
    assert most == 0


# The command


def test_the_metadata_and_the_card_say_so(calibrated: Path, repository: Path) -> None:
    assert read_metadata(calibrated).quantization.calibration_prompts == len(PROMPTS)
    assert "while 2 prompts are drawn" in (calibrated / "README.md").read_text()
    assert read_metadata(repository).quantization.calibration_prompts == 0
    assert "calibrated" not in (repository / "README.md").read_text()


def test_a_run_of_the_command_line_gives_the_same_bytes(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., object]
) -> None:
    monkeypatch.setattr(calibration_data, "SAMPLES", 2)
    monkeypatch.setattr(calibration_data, "MAX_SIZE", 64)
    monkeypatch.setattr(
        importlib.import_module("ernie_image_nf4.quantization.convert"), "_recommended", lambda *_: SETTINGS
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
        patch.setattr(calibration_data, "SAMPLES", 2)
        with pytest.raises(KeyboardInterrupt):
            quantize(original, tmp_path / "output", calibrate=PROMPTS, **options)
    for prompts in (PROMPTS[:1], None):
        with pytest.raises(InvalidSettings, match="unfinished run with different calibration"):
            quantize(original, tmp_path / "output", calibrate=prompts, **options)
    with monkeypatch.context() as patch:  # the transformer is finished
        patch.setattr(calibration_data, "load_opened", interrupt)
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
