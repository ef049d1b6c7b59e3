"""Weight files hold just the tensors that the configuration asks for, or `load` and `verify` say which is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import skeleton, stored
from safetensors.torch import load_file, save_file

from ernie_image_nf4 import load, verify
from ernie_image_nf4.errors import IncompatibleLibraries, InvalidRepository
from ernie_image_nf4.repository import meta_model
from ernie_image_nf4.repository.components import COMPONENT, COMPONENTS, METADATA, Component
from ernie_image_nf4.repository.meta_model import saved_names
from ernie_image_nf4.repository.validation import structure_problems
from ernie_image_nf4.upstream.models_in_memory import persistent_tensors

TRANSFORMER = COMPONENT["transformer"]
WEIGHT = "layers.0.self_attention.to_q.weight"  # stored as NF4
NORM = "layers.0.self_attention.norm_q.weight"  # stored as it is
SETTINGS = f"{WEIGHT}.quant_state.bitsandbytes__nf4"
WITH_WEIGHTS = [component for component in COMPONENTS if component.weights]


@pytest.fixture
def unrecorded(copy: Path) -> Path:
    """A copy to damage that has no digests."""
    (copy / METADATA).unlink()
    return copy


def edit_tensors(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], component: Component = TRANSFORMER
) -> None:
    file = folder / component.name / component.weights
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder: Path, component: str, **changes: object) -> None:
    path = folder / component / COMPONENT[component].config
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_settings(folder: Path, **changes: object) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        settings = {**json.loads(tensors[SETTINGS].numpy().tobytes()), **changes}
        tensors[SETTINGS] = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)

    edit_tensors(folder, change)


def check(folder: Path, message: str) -> None:
    """`load` refuses the folder before it reads a weight, and `verify` finds the same."""
    with pytest.raises(InvalidRepository, match=message):
        load(folder, device="cpu")
    problems = [problem for report in verify(folder) for problem in report.problems]
    assert any(re.search(message, problem) for problem in problems)


@pytest.mark.parametrize("component", WITH_WEIGHTS, ids=lambda component: component.name)
def test_quantized_and_original_components_have_what_they_should(
    component: Component, original: Path, repository: Path
) -> None:
    assert structure_problems(stored(original, component), values=True) == []
    assert structure_problems(stored(repository, component), values=True) == []


def test_a_tensor_is_missing(unrecorded: Path) -> None:
    edit_tensors(unrecorded, lambda tensors: tensors.pop(NORM))
    check(unrecorded, f"transformer has no tensor {NORM}")


def test_a_tied_weight_that_is_stored_in_another_shape(unrecorded: Path) -> None:
    change = {"lm_head.weight": torch.zeros(3)}
    edit_tensors(unrecorded, lambda tensors: tensors.update(change), COMPONENT["pe"])
    check(unrecorded, r"tensor lm_head.weight has shape \[3\], expected")


def test_a_tensor_too_many(unrecorded: Path) -> None:
    edit_tensors(unrecorded, lambda tensors: tensors.update(stranger=torch.zeros(3)))
    check(unrecorded, "tensor stranger belongs to no layer")


def test_another_shape(unrecorded: Path) -> None:
    edit_tensors(unrecorded, lambda tensors: tensors.update({NORM: tensors[NORM][:-1].clone()}))
    check(unrecorded, rf"tensor {NORM} has shape \[\d+\], expected \[\d+\]")


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_another_kind_of_numbers(unrecorded: Path, dtype: torch.dtype) -> None:
    edit_tensors(unrecorded, lambda tensors: tensors.update({NORM: tensors[NORM].to(dtype)}))
    check(unrecorded, f"tensor {NORM} is .*, expected BF16, F16 or F32")


@pytest.mark.parametrize("suffix", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
@pytest.mark.parametrize("how", ["missing", "short"])
def test_part_of_a_quantization_state_is_missing_or_short(unrecorded: Path, suffix: str, how: str) -> None:
    name = f"{WEIGHT}.{suffix}"
    if how == "missing":
        edit_tensors(unrecorded, lambda tensors: tensors.pop(name))
    else:
        edit_tensors(unrecorded, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    check(unrecorded, f"tensor {re.escape(name)} is .*, expected TensorSpec")


def test_no_quantization_state_at_all(unrecorded: Path) -> None:
    edit_tensors(unrecorded, lambda tensors: tensors.pop(SETTINGS))
    check(unrecorded, f"tensor {WEIGHT} has no quantization state")


@pytest.mark.parametrize(
    "changes",
    [
        {"blocksize": 48},
        {"blocksize": "64"},
        {"shape": [1, 1]},
        {"dtype": "int8"},
        {"quant_type": "fp4"},
        {"nested_blocksize": 1},
        {"nested_dtype": "float8_e4m3fn"},
        {"nested_offset": None},
    ],
    ids=str,
)
def test_settings_of_a_quantization_state_that_make_no_sense(unrecorded: Path, changes: dict[str, object]) -> None:
    edit_settings(unrecorded, **changes)
    check(unrecorded, f"tensor {WEIGHT} (was quantized with {next(iter(changes))}|has the offset None)")


def test_settings_of_a_quantization_state_of_absurd_length(unrecorded: Path) -> None:
    edit_settings(unrecorded, comment=" " * 5000)
    check(unrecorded, f"the quantization state of tensor {WEIGHT} is unreadable")


def test_settings_of_another_block_size_than_the_scales_have(unrecorded: Path) -> None:
    edit_settings(unrecorded, blocksize=128)
    check(unrecorded, f"tensor {WEIGHT}.absmax is .*, expected TensorSpec")


def test_a_quantized_weight_where_the_configuration_says_original(unrecorded: Path) -> None:
    path = unrecorded / "transformer" / TRANSFORMER.config
    config = json.loads(path.read_text())
    config["quantization_config"]["llm_int8_skip_modules"].append(WEIGHT.removesuffix(".weight"))
    path.write_text(json.dumps(config))
    check(unrecorded, f"tensor {WEIGHT} has shape")


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_method": "gptq"},
        {"load_in_4bit": False},
        {"bnb_4bit_quant_type": "fp4"},
        {"bnb_4bit_compute_dtype": "int8"},
        {"bnb_4bit_quant_storage": "bfloat16"},
    ],
    ids=str,
)
def test_a_quantization_of_another_kind(unrecorded: Path, changes: dict[str, object]) -> None:
    settings = json.loads((unrecorded / "pe" / "config.json").read_text())["quantization_config"]
    edit_config(unrecorded, "pe", quantization_config={**settings, **changes})
    check(unrecorded, "is quantized in another way")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_verify_finds_values_that_are_no_numbers(unrecorded: Path, value: float) -> None:
    edit_tensors(unrecorded, lambda tensors: tensors[NORM].fill_(value))
    with pytest.raises(InvalidRepository, match=f"tensor {NORM} has NaN or infinite values"):
        load(unrecorded, device="cpu", verify=True)


def test_verify_finds_a_table_that_is_not_nf4s(unrecorded: Path) -> None:
    edit_tensors(unrecorded, lambda tensors: tensors[f"{WEIGHT}.quant_map"].neg_())
    with pytest.raises(InvalidRepository, match="isn't the table of NF4"):
        load(unrecorded, device="cpu", verify=True)


def test_an_index_that_lists_other_tensors_than_its_shards_have(unrecorded: Path) -> None:
    file = unrecorded / "transformer" / TRANSFORMER.weights
    shard = file.rename(file.with_name("shard.safetensors"))
    index = file.with_name(f"{file.name}.index.json")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(shard), shard.name)}))
    assert all(report.ok for report in verify(unrecorded))
    index.write_text(json.dumps({"weight_map": {WEIGHT: shard.name}}))
    check(unrecorded, "doesn't list the tensors of its files")


def test_a_tensor_in_two_shards(unrecorded: Path) -> None:
    file = unrecorded / "transformer" / TRANSFORMER.weights
    tensors = load_file(file)
    alone = "x_embedder.proj.weight"
    shards = {"a": {alone, WEIGHT}, "b": tensors.keys() - {alone}}  # in the second the index finds it
    for name, names in shards.items():
        save_file({each: tensors[each] for each in names}, file.with_name(f"{name}.safetensors"))
    weight_map = dict.fromkeys(tensors, "b.safetensors") | {alone: "a.safetensors"}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    file.unlink()
    check(unrecorded, f"tensor {WEIGHT} is in another file as well")


@pytest.mark.parametrize(
    ("component", "changes"),
    [
        ("transformer", {"num_layers": 1_000_000}),
        ("transformer", {"hidden_size": 1_000_000}),
        ("text_encoder", {"text_config": {"num_hidden_layers": 1_000_000}}),
        ("pe", {"vocab_size": 1_000_000}),
        ("vae", {"layers_per_block": 1_000_000}),
    ],
    ids=str,
)
def test_a_model_of_absurd_size_is_refused_before_it_takes_memory(
    unrecorded: Path, component: str, changes: dict[str, object]
) -> None:
    config = json.loads((unrecorded / component / COMPONENT[component].config).read_text())
    for name, value in changes.items():
        changes[name] = {**config[name], **value} if isinstance(value, dict) else value
    edit_config(unrecorded, component, **changes)
    with pytest.raises(InvalidRepository, match=r"than the weight files have|has shape|can't be loaded"):
        load(unrecorded, device="cpu")


def test_a_configuration_that_describes_no_model(unrecorded: Path) -> None:
    """No digest tells that it was changed."""
    edit_config(unrecorded, "vae", norm_num_groups=0)
    with pytest.raises(IncompatibleLibraries, match=r"vae/config\.json can't be loaded .*\(ZeroDivisionError"):
        load(unrecorded, device="cpu")
    problems = [problem for report in verify(unrecorded) for problem in report.problems]
    assert len(problems) == 1
    assert "vae/config.json can't be loaded" in problems[0]


@pytest.mark.parametrize("component", [part for part in COMPONENTS if part.weights], ids=lambda part: part.name)
def test_tensors_of_a_model_are_those_of_its_state_dict(original: Path, component: Component) -> None:
    model = skeleton(component, original / component.name)
    state = model.state_dict()
    assert {key: tensor.shape for key, tensor in persistent_tensors(model).items()} == {
        key: tensor.shape for key, tensor in state.items()
    }


# Components against each other


def test_names_are_asked_of_transformers_only_where_a_file_has_others(original: Path, monkeypatch) -> None:
    component = COMPONENT["text_encoder"]
    model = skeleton(component, original / component.name)
    every = saved_names(model)
    renamed = {key for key, name in every.items() if key != name}
    assert renamed
    assert renamed < every.keys()
    own = dict.fromkeys(every.keys() - renamed)
    asked = []
    revert = meta_model.revert_weight_conversion
    monkeypatch.setattr(
        meta_model, "revert_weight_conversion", lambda model, state: asked.append(set(state)) or revert(model, state)
    )
    assert saved_names(model, own) == every
    assert saved_names(model, every.keys()) == {key: key for key in every}
    assert asked == [renamed]
    stolen = dict.fromkeys([*own, every[min(renamed)]])  # also the name of one that would be given to another
    assert len(set(saved_names(model, stolen).values())) == len(every)


def test_components_of_different_models(unrecorded: Path) -> None:
    edit_config(unrecorded, "vae", patch_size=[1, 1])
    statistics = ("bn.running_mean", "bn.running_var")
    channels = json.loads((unrecorded / "vae" / "config.json").read_text())["latent_channels"]
    edit_tensors(
        unrecorded,
        lambda tensors: tensors.update({name: tensors[name][:channels].clone() for name in statistics}),
        COMPONENT["vae"],
    )
    with pytest.raises(InvalidRepository, match="of channels of the latents, the transformer takes"):
        load(unrecorded, device="cpu")


def test_a_tokenizer_with_more_tokens_than_the_model(unrecorded: Path) -> None:
    path = unrecorded / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary.update({f"<{number}>": number for number in range(len(vocabulary), 9000)})
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(InvalidRepository, match="has 9000 tokens, its model knows"):
        load(unrecorded, device="cpu")


# With metadata


def test_load_checks_digests_on_request(copy: Path) -> None:
    file = copy / TRANSFORMER.name / TRANSFORMER.weights
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    file.write_bytes(content)
    load(copy, device="cpu", prompt_enhancer=False)
    with pytest.raises(InvalidRepository, match="was changed: its SHA-256 isn't the recorded one"):
        load(copy, device="cpu", prompt_enhancer=False, verify=True)


def test_load_checks_only_what_it_loads(copy: Path) -> None:
    (copy / "pe" / "config.json").write_text("{}")
    load(copy, device="cpu", prompt_enhancer=False, verify=True)
