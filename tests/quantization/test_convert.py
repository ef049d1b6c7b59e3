"""`quantize` writes what diffusers and transformers would, and refuses sources that it can't do right by."""

from __future__ import annotations

import filecmp
import importlib
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, has_avx512bf16
from bitsandbytes.nn import Linear4bit
from conftest import diffusers_nf4_on_cpus, weight_files
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ernie_image_nf4
from ernie_image_nf4 import load
from ernie_image_nf4.errors import (
    DeviceUnavailable,
    DiskFull,
    ErnieImageNF4Error,
    InvalidRepository,
    InvalidSettings,
    UploadFailed,
)
from ernie_image_nf4.loading.from_pretrained import DTYPE_ARGUMENT, _convert
from ernie_image_nf4.memory.precision import Precision
from ernie_image_nf4.quantization import weight_writer
from ernie_image_nf4.quantization.convert import quantize
from ernie_image_nf4.quantization.synthetic import synthesize
from ernie_image_nf4.repository.components import (
    COMPONENT,
    COMPONENTS,
    METADATA,
    MODEL_INDEX,
    PROMPT_ENHANCER,
    QUANTIZED,
    Component,
)
from ernie_image_nf4.repository.integrity import verify
from ernie_image_nf4.repository.metadata import Recommended, file_record, read_metadata
from ernie_image_nf4.repository.nf4_format import QUANT_STATE
from ernie_image_nf4.repository.safetensors_io import StoredTensor, find_tensors, read_chunks

quantized_components = pytest.mark.parametrize("component", QUANTIZED, ids=lambda component: component.name)


def conventional(source: Path, component: Component, output: Path, dtype: torch.dtype, skip: list[str] | None) -> Path:
    """The component as ``from_pretrained`` with a quantization config and ``save_pretrained`` make it, in memory."""
    library = importlib.import_module(component.library)
    config = library.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skip,
    )
    with diffusers_nf4_on_cpus():
        model = getattr(library, component.class_name).from_pretrained(
            source / component.name, quantization_config=config, torch_dtype=dtype, device_map={"": "cpu"}
        )
    model.save_pretrained(output / component.name)
    return output / component.name


def assert_same_component(ours: Path, theirs: Path) -> None:
    """Every file equal, weights byte for byte; only diffusers' note of the machine's path to the source is left out."""
    assert sorted(file.name for file in ours.iterdir()) == sorted(file.name for file in theirs.iterdir())
    for file in theirs.iterdir():
        if file.name == "config.json":
            config = json.loads(file.read_text())
            config.pop("_name_or_path", None)
            assert json.loads((ours / file.name).read_text()) == config
        else:
            assert filecmp.cmp(ours / file.name, file, shallow=False), file.name


def edit_tensors(file: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the tensors of a weight file."""
    tensors = load_file(file)
    edit(tensors)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def tensor_names(file: Path) -> set[str]:
    with safe_open(file, framework="pt") as opened:
        return set(opened.keys())


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    """A copy of `original` to change."""
    return Path(shutil.copytree(original, tmp_path / "source"))


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`original` with one file for each component and the tied head stored once."""
    folder = tmp_path_factory.mktemp("plain") / "ERNIE-Tiny"
    return synthesize(folder, preset="tiny", shards=False, duplicate_lm_head=False, progress=False)


@pytest.fixture(scope="session")
def stock(original: Path) -> Path:
    """The NF4 repository of `original` with the layers and scales of diffusers, transformers and bitsandbytes."""
    return conventionally(original, original.with_name("ERNIE-Tiny-stock"))


def conventionally(source: Path, output: Path, **options: object) -> Path:
    """The NF4 repository that ours has to equal where nothing is made better."""
    return quantize(
        source, output, **{"device": "cpu", "scale_search": False, "default_keep": False, "progress": False} | options
    )


@pytest.fixture(scope="session")
def searched(original: Path) -> Path:
    """`stock` with searched scales."""
    return conventionally(original, original.with_name("ERNIE-Tiny-searched"), scale_search=True)


@contextmanager
def refused(kind: type[ErnieImageNF4Error], match: str, output: Path) -> Iterator[None]:
    """One line of an error, and nothing left of the output."""
    with pytest.raises(kind, match=match) as raised:
        yield
    assert "\n" not in str(raised.value)
    assert not output.exists()


# What is written


@quantized_components
def test_without_scale_search_components_are_byte_for_byte_those_of_the_conventional_way(
    component: Component, plain: Path, original: Path, stock: Path, tmp_path: Path
) -> None:
    """Our source has shards and the tied head twice, as the release does; the conventional one has neither: the oldest
    transformers takes a head that is stored twice for an untied one."""
    assert len(weight_files(original, COMPONENT["transformer"])) == 2
    theirs = conventional(plain, component, tmp_path, torch.bfloat16, None)
    assert_same_component(stock / component.name, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_so_they_are_from_other_precisions(dtype: torch.dtype, plain: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(plain, tmp_path / "source"))
    for file in [file for component in QUANTIZED for file in weight_files(source, component)]:
        edit_tensors(file, lambda tensors: tensors.update({name: value.to(dtype) for name, value in tensors.items()}))
    output = conventionally(source, tmp_path / "output")
    for component in QUANTIZED:
        theirs = conventional(source, component, tmp_path / "theirs", dtype, None)
        assert_same_component(output / component.name, theirs)


@quantized_components
def test_scale_search_takes_no_more_bytes_and_lowers_the_error(
    component: Component, stock: Path, searched: Path
) -> None:
    """Every tensor has the same shape and dtype; only the settings, which hold the offset as text, may be shorter."""
    tensors, expected = (load_file(folder / component.name / component.weights) for folder in (searched, stock))
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype
        if name.endswith(QUANT_STATE):
            assert tensor.numel() <= expected[name].numel()
        else:
            assert tensor.shape == expected[name].shape
    errors = [read_metadata(folder).components[component.name].relative_weight_error for folder in (searched, stock)]
    assert errors[0] ** 2 < 0.83 * errors[1] ** 2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@quantized_components
def test_searched_scales_load_the_conventional_way_and_are_multiplied_with(
    component: Component, device: str, repository: Path
) -> None:
    """A model from ``from_pretrained`` computes the same with its layers replaced by products with restored weights."""
    library = importlib.import_module(component.library)
    with diffusers_nf4_on_cpus():
        model = getattr(library, component.class_name).from_pretrained(
            repository / component.name, device_map={"": device}, **{DTYPE_ARGUMENT[component.library]: torch.bfloat16}
        )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    _convert(model, component.name, Precision(torch.float32))  # so that rounding doesn't hide a difference
    restored = {}
    for name, layer in layers.items():
        state = layer.weight.quant_state
        assert (dequantize_blockwise(state.absmax, state.state2) < 0).any()
        state.dtype = torch.float32
        restored[name] = dequantize_4bit(layer.weight.data, state)
    with torch.device(device), torch.no_grad():
        torch.manual_seed(0)
        inputs = {"input_ids": torch.randint(0, 100, (1, 12))}
        if component.library == "diffusers":
            text = torch.randn(1, 5, model.config.text_in_dim)
            latents = torch.randn(1, model.config.in_channels, 8, 8)
            inputs = {"hidden_states": latents, "timestep": torch.tensor([500.0])}
            inputs |= {"text_bth": text, "text_lens": torch.tensor([5])}
        output = model(**inputs)[0]
        for name, layer in layers.items():
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight.data, plain.bias = restored[name], layer.bias
            model.set_submodule(name, plain)
        expected = model(**inputs)[0]
    assert (output - expected).norm() < (1e-2 if has_avx512bf16() else 1e-4) * expected.norm()


def test_the_metadata_and_the_card_say_whether_scales_were_searched(repository: Path, stock: Path) -> None:
    assert read_metadata(repository).quantization.scale_search
    assert "Each block's scale, of either sign, was searched" in (repository / "README.md").read_text()
    assert not read_metadata(stock).quantization.scale_search
    assert "Each block's scale is its largest magnitude" in (stock / "README.md").read_text()


def test_metadata_from_before_the_search_say_that_there_was_none(repository: Path, tmp_path: Path) -> None:
    content = json.loads((repository / METADATA).read_text())
    del content["quantization"]["scale_search"]
    (tmp_path / METADATA).write_text(json.dumps(content))
    assert not read_metadata(tmp_path).quantization.scale_search


def test_the_command_line_can_leave_the_search_out(
    original: Path, stock: Path, searched: Path, tmp_path: Path, command: Callable[..., object]
) -> None:
    for option, expected in (("--no-scale-search", stock), ("--scale-search", searched)):
        output = tmp_path / option
        assert (
            command("quantize", original, output, "--no-default-keep", "--device", "cpu", "--quiet", option).code == 0
        )
        for component in QUANTIZED:
            assert_same_component(output / component.name, expected / component.name)


def test_an_interrupted_run_is_not_continued_with_other_scales(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", interrupt)  # of the VAE, after the quantized components
        with pytest.raises(KeyboardInterrupt):
            quantize(original, tmp_path / "output", device="cpu", progress=False)
    with pytest.raises(InvalidSettings, match="unfinished run with different scale search"):
        quantize(original, tmp_path / "output", device="cpu", scale_search=False, progress=False)
    quantize(original, tmp_path / "output", device="cpu", progress=False)


def test_a_tied_head_is_stored_once(original: Path, repository: Path) -> None:
    assert "lm_head.weight" in tensor_names(original / "pe" / "model.safetensors")
    assert "lm_head.weight" not in tensor_names(repository / "pe" / "model.safetensors")


def test_a_head_that_differs_from_the_embeddings_is_kept(source: Path, tmp_path: Path) -> None:
    edit_tensors(source / "pe" / "model.safetensors", lambda tensors: tensors["lm_head.weight"].mul_(2))
    output = conventionally(source, tmp_path / "output")
    assert_same_component(
        output / "pe", conventional(source, COMPONENT["pe"], tmp_path / "theirs", torch.bfloat16, None)
    )
    assert "lm_head.weight" in tensor_names(output / "pe" / "model.safetensors")


def test_embeddings_stored_as_the_tied_head_alone_are_found(source: Path, repository: Path, tmp_path: Path) -> None:
    edit_tensors(source / "pe" / "model.safetensors", lambda tensors: tensors.pop("model.embed_tokens.weight"))
    output = quantize(source, tmp_path / "output", device="cpu", progress=False)
    assert filecmp.cmp(output / "pe" / "model.safetensors", repository / "pe" / "model.safetensors", shallow=False)


def test_names_of_a_newer_checkpoint_format_are_found(source: Path, repository: Path, tmp_path: Path) -> None:
    weights = Path("text_encoder", "model.safetensors")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("language_model.model.", "language_model.")] = tensors.pop(name)

    edit_tensors(source / weights, rename)
    output = quantize(source, tmp_path / "output", device="cpu", progress=False)
    assert filecmp.cmp(output / weights, repository / weights, shallow=False)


def test_other_components_are_copied_byte_for_byte(original: Path, repository: Path) -> None:
    for component in COMPONENTS:
        if not component.quantized:
            names = sorted(file.name for file in (original / component.name).iterdir())
            assert sorted(file.name for file in (repository / component.name).iterdir()) == names
            _, different, errors = filecmp.cmpfiles(
                original / component.name, repository / component.name, names, shallow=False
            )
            assert not different
            assert not errors
    assert (repository / "pe_tokenizer" / "chat_template.jinja").is_file()
    assert filecmp.cmp(original / MODEL_INDEX, repository / MODEL_INDEX, shallow=False)


def test_the_source_is_only_read(source: Path, tmp_path: Path) -> None:
    def state() -> dict[Path, tuple]:
        return {path: (path.stat().st_mtime_ns, path.is_file() and file_record(path)) for path in source.rglob("*")}

    before = state()
    quantize(source, tmp_path / "output", device="cpu", progress=False)
    assert state() == before


# Layers that are kept


def test_layers_are_kept_by_pattern_and_the_config_says_so(plain: Path, tmp_path: Path) -> None:
    patterns = ["transformer.final_linear", "*.layers.1.mlp", "pe.*.o_proj"]
    output = conventionally(plain, tmp_path / "output", keep=patterns)
    metadata = read_metadata(output)
    kept = {component.name: metadata.components[component.name].kept_modules for component in QUANTIZED}
    assert kept["transformer"] == [
        *(f"layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "linear_fc2")),
        "final_linear",
    ]
    assert kept["text_encoder"] == [f"language_model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    pipe = load(output, device="cpu")
    for component in QUANTIZED:
        linear = {
            name: isinstance(module, Linear4bit)
            for name, module in getattr(pipe, component.name).named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        head = ["lm_head"] if component.name == "pe" else []
        assert sorted(name for name, quantized in linear.items() if not quantized) == sorted(
            kept[component.name] + head
        )
        skip = json.loads((output / component.name / "config.json").read_text())["quantization_config"][
            "llm_int8_skip_modules"
        ]
        theirs = conventional(plain, component, tmp_path / "theirs", torch.bfloat16, skip)
        assert_same_component(output / component.name, theirs)


def test_a_pattern_that_matches_nothing_is_an_error(original: Path, tmp_path: Path) -> None:
    with refused(InvalidSettings, r"--keep transformer\.blocks\.\* matches no linear layer", tmp_path / "output"):
        quantize(original, tmp_path / "output", keep=["transformer.blocks.*"], progress=False)


# Members of the family


def test_turbo_keeps_its_config_keys_and_gets_its_call_settings(source: Path, tmp_path: Path) -> None:
    edit_json(source / "transformer" / "config.json", use_lora=False, lora_rank=64)
    output = conventionally(source, tmp_path / "output")
    assert read_metadata(output).recommended == Recommended(1024, 1024, num_inference_steps=8, guidance_scale=1.0)
    assert_same_component(
        output / "transformer",
        conventional(source, COMPONENT["transformer"], tmp_path / "theirs", torch.bfloat16, None),
    )


def test_recommended_settings_and_name_are_recorded(original: Path, repository: Path, tmp_path: Path) -> None:
    assert read_metadata(repository).recommended == Recommended(1024, 1024, num_inference_steps=50, guidance_scale=4.0)
    assert read_metadata(repository).name == repository.name
    output = quantize(
        original,
        tmp_path / "output",
        device="cpu",
        name="Mini",
        recommended=Recommended(256, 256, 25, 4.0),
        progress=False,
    )
    assert read_metadata(output).recommended == Recommended(256, 256, 25, 4.0)
    assert read_metadata(output).name == "Mini"


@pytest.mark.parametrize("entry", [{}, {"pe": [None, None], "pe_tokenizer": [None, None]}], ids=["absent", "null"])
def test_a_source_without_prompt_enhancer(source: Path, tmp_path: Path, entry: dict) -> None:
    index = json.loads((source / MODEL_INDEX).read_text())
    for name in PROMPT_ENHANCER:
        shutil.rmtree(source / name)
        del index[name]
    (source / MODEL_INDEX).write_text(json.dumps(index | entry))
    output = quantize(source, tmp_path / "output", device="cpu", progress=False)
    assert all(report.ok for report in verify(output))
    assert load(output, device="cpu").pe is None


def test_a_source_in_the_hub_cache_is_named_with_its_revision(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "cache"
    snapshots = cache / "models--baidu--ERNIE-Image"
    shutil.copytree(original, snapshots / "snapshots" / revision)
    (snapshots / "refs").mkdir()
    (snapshots / "refs" / "main").write_text(revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    output = quantize("baidu/ERNIE-Image", tmp_path / "output", device="cpu", progress=False)
    source = read_metadata(output).source
    assert (source.repository, source.revision, source.license) == ("baidu/ERNIE-Image", revision, "apache-2.0")


# The folder around the components


def test_the_folder_is_complete(repository: Path) -> None:
    names = {path.name for path in repository.iterdir()}
    assert names == {
        *(component.name for component in COMPONENTS),
        *(MODEL_INDEX, METADATA, "README.md", "LICENSE", ".gitattributes", "ernie_image_nf4"),
    }
    assert "Apache License" in (repository / "LICENSE").read_text()
    assert "*.safetensors filter=lfs diff=lfs merge=lfs -text" in (repository / ".gitattributes").read_text()
    assert not list(repository.rglob("__pycache__"))


def test_copied_elsewhere_it_loads_itself(repository: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(repository, tmp_path / "elsewhere")
    code = (
        "import ernie_image_nf4; from ernie_image_nf4 import load; "
        "print(ernie_image_nf4.__file__, load().transformer.config._name_or_path)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(folder / "ernie_image_nf4" / "__init__.py"), str(folder / "transformer")]


def test_the_same_source_gives_the_same_bytes(original: Path, repository: Path, tmp_path: Path) -> None:
    again = quantize(original, tmp_path / repository.name, device="cpu", progress=False)
    files = sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(repository) for path in repository.rglob("*") if path.is_file())
    assert all(filecmp.cmp(again / file, repository / file, shallow=False) for file in files)


# Publishing


def test_it_is_published_after_asking_for_the_repository(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def create_repo(self: object, repo_id: str, exist_ok: bool) -> None:
        calls.append(("create", repo_id, exist_ok, (tmp_path / "output").exists()))

    def upload_folder(self: object, *, repo_id: str, folder_path: Path, **_: object) -> None:
        calls.append(("upload", repo_id, folder_path, all(report.ok for report in verify(folder_path))))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    output = quantize(original, tmp_path / "output", device="cpu", push_to_hub="user/it", progress=False)
    assert calls == [("create", "user/it", True, False), ("upload", "user/it", output, True)]


def test_a_hub_that_can_not_be_reached_is_found_before_the_work(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with refused(UploadFailed, r"Publishing to user/it failed .*: unset HF_HUB_OFFLINE, then", tmp_path / "output"):
        quantize(original, tmp_path / "output", push_to_hub="user/it", progress=False)


def test_the_metadata_says_which_versions_made_the_weights(repository: Path) -> None:
    versions = read_metadata(repository).versions
    assert versions["ernie-image-nf4"] == ernie_image_nf4.__version__
    assert versions["torch"] == importlib.metadata.version("torch")
    assert f"Versions: ernie-image-nf4 {ernie_image_nf4.__version__}, torch " in (repository / "README.md").read_text()


def test_metadata_without_the_packages_version_is_read_and_verified(repository: Path, tmp_path: Path) -> None:
    """As 0.1.0 wrote it."""
    copy = Path(shutil.copytree(repository, tmp_path / "copy"))
    metadata = json.loads((copy / METADATA).read_text())
    del metadata["versions"]["ernie-image-nf4"]
    (copy / METADATA).write_text(json.dumps(metadata))
    assert "ernie-image-nf4" not in read_metadata(copy).versions
    assert all(report.ok for report in verify(copy))


# Sources that can't be quantized


@pytest.mark.parametrize(
    ("weights", "name", "value"),
    [
        ("text_encoder/model.safetensors", "multi_modal_projector.linear_1.weight", math.nan),
        ("text_encoder/model.safetensors", "multi_modal_projector.linear_1.weight", -math.inf),
        ("text_encoder/model.safetensors", "multi_modal_projector.linear_1.weight", 3e38),
        ("text_encoder/model.safetensors", "language_model.model.norm.weight", math.nan),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.bias", math.inf),
    ],
)
def test_values_that_can_not_be_weights(source: Path, tmp_path: Path, weights: str, name: str, value: float) -> None:
    edit_tensors(source / weights, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    with pytest.raises(InvalidRepository, match=rf"tensor {name} has NaN, infinite or absurdly large values"):
        quantize(source, tmp_path / "output", device="cpu", progress=False)
    assert not (tmp_path / "output" / Path(weights).parent).exists()
    assert not (tmp_path / "output" / MODEL_INDEX).exists()


def test_a_bad_tensor_that_is_kept_ends_it_at_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = find_tensors((source / "transformer").glob("*.safetensors"))["x_embedder.proj.weight"]
    edit_tensors(stored.file, lambda tensors: tensors["x_embedder.proj.weight"].view(-1)[0].fill_(math.nan))
    done = []
    quantize_nf4 = weight_writer.quantize_nf4

    def slowly(weight: torch.Tensor, **options: object) -> tuple:
        done.append(time.sleep(0.2))
        return quantize_nf4(weight, **options)

    monkeypatch.setattr(weight_writer, "quantize_nf4", slowly)
    with pytest.raises(InvalidRepository, match=r"x_embedder\.proj\.weight has NaN"):
        quantize(source, tmp_path / "out", device="cpu", progress=False)
    assert len(done) < 8  # of 18


def test_an_error_does_not_wait_for_what_is_written_beside(
    source: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def slowly(stored: StoredTensor) -> Iterator[torch.Tensor]:
        for chunk in read_chunks(stored, 64):
            read.append(time.sleep(0.005))
            yield chunk

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(weight_writer, "read_chunks", slowly)
    monkeypatch.setattr(weight_writer, "quantize_nf4", fail)
    with refused(DeviceUnavailable, "memory", tmp_path / "out"):
        quantize(source, tmp_path / "out", device="cpu", progress=False)
    tensors = find_tensors((repository / "transformer").glob("*.safetensors")).values()
    kept = sum(stored.spec.bytes for stored in tensors if stored.spec.dtype == "BF16")
    assert len(read) < kept // 64 // 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int8], ids=str)
def test_a_dtype_that_nf4_is_not_made_from(source: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    name = "multi_modal_projector.linear_1.weight"
    edit_tensors(
        source / "text_encoder" / "model.safetensors",
        lambda tensors: tensors.update({name: tensors[name].to(dtype)}),
    )
    with refused(InvalidRepository, rf"tensor {name} is \w+: convert the source to BF16, F16 or F32", tmp_path / "out"):
        quantize(source, tmp_path / "out", progress=False)


def test_a_source_that_is_quantized_already(repository: Path, tmp_path: Path) -> None:
    with refused(InvalidRepository, "transformer is quantized already", tmp_path / "out"):
        quantize(repository, tmp_path / "out", progress=False)


def test_a_truncated_shard(source: Path, tmp_path: Path) -> None:
    shard = weight_files(source, COMPONENT["transformer"])[1]
    os.truncate(shard, shard.stat().st_size - 1)
    with refused(InvalidRepository, rf"{shard} .*truncated", tmp_path / "out"):
        quantize(source, tmp_path / "out", progress=False)


def test_a_missing_tensor(source: Path, tmp_path: Path) -> None:
    edit_tensors(source / "pe" / "model.safetensors", lambda tensors: tensors.pop("model.norm.weight"))
    with refused(InvalidRepository, "pe has no tensor model.norm.weight", tmp_path / "out"):
        quantize(source, tmp_path / "out", progress=False)


def test_a_tensor_of_another_shape(source: Path, tmp_path: Path) -> None:
    edit_json(source / "transformer" / "config.json", ffn_hidden_size=512)
    with refused(InvalidRepository, r"has shape \[256, 128\], but config.json asks for \[512, 128\]", tmp_path / "out"):
        quantize(source, tmp_path / "out", progress=False)


def test_components_of_other_classes(source: Path, tmp_path: Path) -> None:
    edit_json(source / MODEL_INDEX, text_encoder=["transformers", "Qwen3Model"])
    with refused(InvalidRepository, "text_encoder is .*Qwen3Model.*, expected .*Mistral3Model", tmp_path / "out"):
        quantize(source, tmp_path / "out", progress=False)


def test_a_tokenizer_by_the_name_of_an_earlier_release(source: Path, tmp_path: Path) -> None:
    edit_json(source / MODEL_INDEX, tokenizer=["transformers", "PreTrainedTokenizerFast"])
    output = quantize(source, tmp_path / "out", device="cpu", progress=False)
    assert all(report.ok for report in verify(output))
    load(output, device="cpu")


# Outputs that can't be written


def test_a_folder_with_something_else_in_it(original: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(InvalidSettings, match="exists already: name a new folder"):
        quantize(original, tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_finished_repository(original: Path, copy: Path) -> None:
    with pytest.raises(InvalidSettings, match="exists already"):
        quantize(original, copy, progress=False)
    assert all(report.ok for report in verify(copy))


def test_a_path_that_can_not_be_a_folder(original: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused(InvalidSettings, r"file/out can't be written \(Not a directory\)", tmp_path / "file" / "out"):
        quantize(original, tmp_path / "file" / "out", progress=False)


def test_a_device_that_is_not_there(original: Path, tmp_path: Path) -> None:
    with refused(DeviceUnavailable, "Device 'cuda:99' was asked for", tmp_path / "out"):
        quantize(original, tmp_path / "out", device="cuda:99", progress=False)


def test_a_folder_inside_the_source(source: Path) -> None:
    with refused(InvalidSettings, "lies in the source", source / "nf4"):
        quantize(source, source / "nf4", progress=False)


def test_a_disk_without_room_is_found_before_the_work(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=900_000))
    with refused(DiskFull, r"needs 0\.0 GB more, its disk has 0\.0 GB free", tmp_path / "out"):
        quantize(original, tmp_path / "out", progress=False)
