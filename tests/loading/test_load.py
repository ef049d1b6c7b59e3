"""load(): a repository becomes upstream's pipeline, and everything that upstream's does works."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bitsandbytes
import diffusers
import numpy as np
import pytest
import torch
import transformers
from conftest import CHECKOUT
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from ernie_image_nf4 import load
from ernie_image_nf4.errors import DeviceUnavailable, InvalidRepository, InvalidSettings
from ernie_image_nf4.fast.ops import elementwise
from ernie_image_nf4.loading import build
from ernie_image_nf4.memory.apply import memory_mode
from ernie_image_nf4.memory.placement import find_dtype
from ernie_image_nf4.repository.components import (
    COMPONENT,
    COMPONENTS,
    METADATA,
    MODEL_INDEX,
    PROMPT_ENHANCER,
    QUANTIZED,
)

SMALL = {"height": 32, "width": 48, "num_inference_steps": 2}


def draw(pipe: diffusers.ErnieImagePipeline, prompt: str | None = "a cat", **options) -> np.ndarray:
    """Pixels of a small picture with a fixed seed, uint8 of shape (height, width, 3)."""
    generator = torch.Generator("cpu").manual_seed(0)
    options = {"use_pe": False, "generator": generator, **SMALL, **options}
    return np.asarray(pipe(prompt, **options).images[0])


def latents(pipe: diffusers.ErnieImagePipeline, **options) -> np.ndarray:
    """What `draw` has before the VAE rounds it to pixels: a tiny random model answers to little things only there."""
    steps = []

    def keep(pipe, step, timestep, tensors):
        steps.append(tensors["latents"])
        return tensors

    draw(pipe, callback_on_step_end=keep, **options)
    return steps[-1].float().numpy()


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# What comes back


def test_gives_a_plain_upstream_pipeline_that_draws(pipe):
    assert isinstance(pipe, diffusers.ErnieImagePipeline)
    assert type(pipe).__name__ == "ErnieImagePipeline"
    assert draw(pipe).shape == (32, 48, 3)


def test_gives_the_classes_that_upstream_gives(original, pipe):
    plain = diffusers.ErnieImagePipeline.from_pretrained(original)
    classes = {name: type(part) for name, part in pipe.components.items()}
    vae = classes.pop("vae")
    assert vae.__bases__ == (type(plain.vae),)  # it warns of what isn't finite
    assert (vae.__name__, pipe.vae.__module__) == (type(plain.vae).__name__, plain.vae.__module__)
    assert classes == {name: type(part) for name, part in plain.components.items() if name != "vae"}


def test_linear_layers_stay_in_four_bits(pipe):
    for component in QUANTIZED:
        layers = [m for m in getattr(pipe, component.name).modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
        assert layers
        assert all(layer.weight.dtype == torch.uint8 and layer.weight.quant_state.nested for layer in layers)


def test_all_else_has_the_dtype_that_suits_the_cpu(pipe):
    expected = find_dtype(None, torch.device("cpu"))
    for name in (*(component.name for component in QUANTIZED), "vae"):
        model = getattr(pipe, name)
        assert {p.dtype for p in model.parameters() if p.dtype != torch.uint8} == {expected}
        assert {m.compute_dtype for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)} <= {expected}


def test_no_cpu_repacks_the_weights_with_other_scales(repository, monkeypatch):
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    pipe = load(repository, device="cpu")
    layers = [
        m for part in QUANTIZED for m in getattr(pipe, part.name).modules() if isinstance(m, bitsandbytes.nn.Linear4bit)
    ]
    assert layers
    draw(pipe)
    assert all(layer.weight.quant_state.nested for layer in layers)


def test_takes_the_dtype_asked_for(repository):
    pipe = load(repository, device="cpu", dtype="bfloat16", prompt_enhancer=False)
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16
    assert pipe.transformer.layers[0].self_attention.to_q.compute_dtype == torch.bfloat16
    draw(pipe)


def test_the_weights_are_those_of_the_file(repository, pipe):
    with safe_open(repository / "transformer" / COMPONENT["transformer"].weights, framework="pt") as file:
        name = "layers.0.self_attention.to_q.weight"
        assert torch.equal(pipe.transformer.layers[0].self_attention.to_q.weight.data, file.get_tensor(name))


def test_on_a_cpu_fast_makes_no_difference(repository, pipe):
    assert np.array_equal(draw(load(repository, device="cpu", fast=False)), draw(pipe))


@pytest.mark.parametrize("fast", ["Exact", "yes", ""])
def test_a_way_to_be_fast_that_is_none(fast):
    with pytest.raises(InvalidSettings, match="none of True, 'exact' \\(--exact\\) and False"):
        load("nowhere", fast=fast)


def test_nothing_is_printed_on_the_normal_path(repository, capfd, caplog):
    load(repository, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_says_at_info_level_which_memory_mode_it_picked(repository, caplog):
    with caplog.at_level(logging.INFO, logger="ernie_image_nf4"):
        load(repository, device="cpu", prompt_enhancer=False)
    assert "resident" in caplog.text


def test_upstream_is_as_it_was_after_loading(repository, copy):
    """Nothing of it is replaced for good, also if loading fails."""
    watched = (torch.nn.Module, torch.nn.Linear, Bnb4BitHfQuantizer, BnB4BitDiffusersQuantizer, WeightConverter)
    before = [dict(vars(kind)) for kind in watched]
    mapping, environment = dict(AUTO_QUANTIZER_MAPPING), dict(os.environ)
    load(repository, device="cpu", prompt_enhancer=False)
    edit_json(copy / "transformer" / "config.json", num_layers=3)
    with pytest.raises(Exception, match=r".+"):
        load(copy, device="cpu")
    assert [dict(vars(kind)) for kind in watched] == before
    assert (mapping, environment) == (AUTO_QUANTIZER_MAPPING, os.environ)
    assert torch.nn.init.kaiming_uniform_.__module__ == "torch.nn.init"
    assert torch.nn.Linear(64, 2).weight.std() > 0.01
    assert gc.isenabled()
    assert diffusers.utils.logging.is_progress_bar_enabled()
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_each_file_is_opened_once(copy):
    """But for tensors' data. The tokenizers library opens a vocabulary, not Python, where a hook would see it."""
    opened: list[str] = []
    watching = True

    def note(event: str, arguments: tuple) -> None:
        if watching and event == "open" and isinstance(arguments[0], str | os.PathLike):
            opened.append(os.fspath(arguments[0]))

    sys.addaudithook(note)  # which can't be removed
    load(copy, device="cpu")
    watching = False
    counts = Counter(Path(name).relative_to(copy) for name in opened if Path(name).is_relative_to(copy))
    files = {path.relative_to(copy) for part in COMPONENTS for path in (copy / part.name).iterdir()}
    files |= {Path(MODEL_INDEX), Path(METADATA)}
    read = {path for path in files if path.suffix != ".safetensors"}
    assert {path.suffix for path in read} == {".json", ".jinja"}
    assert {path for path in read if path.suffix == ".jinja"}
    assert {path: counts[path] for path in read} == {path: path.name != "tokenizer.json" for path in read}


@pytest.mark.parametrize(
    ("component", "change"), [("transformer", {"num_layers": 300}), ("vae", {"layers_per_block": 300})]
)
def test_torchs_default_dtype_stays_after_a_model_that_could_not_be_built(copy, component, change):
    edit_json(copy / component / "config.json", **change)
    with pytest.raises(InvalidRepository, match="more tensors than the weight files have"):
        load(copy, device="cpu", dtype="bfloat16")
    assert torch.get_default_dtype() == torch.float32


def test_each_model_is_built_once(repository, monkeypatch):
    built = []
    init = torch.nn.Module.__init__

    def counted(self, *args, **kwargs):
        built.append(type(self).__name__)
        init(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__init__", counted)
    load(repository, device="cpu")
    assert [built.count(part.class_name) for part in (*QUANTIZED, COMPONENT["vae"])] == [1, 1, 1, 1]


def test_two_threads_can_load_at_once(repository, pipe):
    with ThreadPoolExecutor(2) as pool:
        loaded = list(pool.map(lambda _: load(repository, device="cpu", prompt_enhancer=False), range(2)))
    assert all(np.array_equal(draw(each), draw(pipe)) for each in loaded)


# The prompt enhancer


def test_the_prompt_enhancer_rewrites_the_prompt(pipe):
    result = pipe("a cat", use_pe=True, **SMALL)
    assert len(result.revised_prompts) == 1


def test_without_prompt_enhancer_its_files_are_unread(copy):
    for name in PROMPT_ENHANCER:
        shutil.rmtree(copy / name)
    pipe = load(copy, device="cpu", prompt_enhancer=False)
    assert pipe.pe is None
    assert pipe.pe_tokenizer is None
    assert pipe("a cat", use_pe=True, **SMALL).revised_prompts is None


@pytest.mark.parametrize("entry", [None, [None, None]], ids=["no entry", "null entry"])
def test_a_repository_without_prompt_enhancer_loads(copy, entry):
    index = json.loads((copy / "model_index.json").read_text())
    for name in PROMPT_ENHANCER:
        shutil.rmtree(copy / name)
        del index[name]
        if entry:
            index[name] = entry
    (copy / "model_index.json").write_text(json.dumps(index))
    assert load(copy, device="cpu").pe is None


# Other people's folders


def test_loads_without_metadata(copy, pipe):
    (copy / "quantization_metadata.json").unlink()
    assert np.array_equal(draw(load(copy, device="cpu", prompt_enhancer=False)), draw(pipe))


def test_loads_with_metadata_of_another_form(copy, pipe):
    (copy / "quantization_metadata.json").write_text('{"quantization": "4-bit NF4"}')
    assert np.array_equal(draw(load(copy, device="cpu", prompt_enhancer=False)), draw(pipe))


def test_loads_sharded_weights(copy, pipe):
    for component in QUANTIZED:
        shard(copy / component.name / component.weights)
    assert np.array_equal(draw(load(copy, device="cpu")), draw(pipe))


def shard(path: Path) -> None:
    """Split a safetensors file in two with an index, as save_pretrained does. NF4 tensors stay together."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    layer_one = {name for name in tensors if "layers.1." in name}
    weight_map = {}
    for number, names in enumerate((tensors.keys() - layer_one, layer_one), start=1):
        shard_name = f"{path.stem}-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, path.with_name(shard_name), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, shard_name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    path.with_name(f"{path.name}.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    path.unlink()


def test_an_unquantized_component_loads_with_a_warning(original, copy, caplog):
    shutil.rmtree(copy / "text_encoder")
    shutil.copytree(original / "text_encoder", copy / "text_encoder")
    pipe = load(copy, device="cpu")
    (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert "text_encoder" in record.getMessage()
    assert "not quantized" in record.getMessage()
    assert pipe.text_encoder.dtype == pipe.transformer.dtype
    draw(pipe)


# What upstream's pipeline does, this one does


def test_callbacks_see_every_step(pipe):
    seen = []

    def on_step_end(pipe, step, timestep, tensors):
        seen.append((step, tensors["latents"].shape))
        return tensors

    draw(pipe, callback_on_step_end=on_step_end)
    assert seen == [(0, (1, 128, 2, 3)), (1, (1, 128, 2, 3))]


def test_prompt_embeds_stand_in_for_a_prompt(pipe):
    embeds = pipe.encode_prompt("a cat", pipe.device)
    assert np.array_equal(draw(pipe, None, prompt_embeds=embeds), draw(pipe))


def test_several_images_a_prompt_and_several_prompts(pipe):
    images = pipe(["a cat", "a dog"], num_images_per_prompt=2, use_pe=False, **SMALL).images
    assert len(images) == 4
    assert all(isinstance(image, Image.Image) for image in images)


def test_the_negative_prompt_and_guidance_matter(pipe):
    assert not np.array_equal(latents(pipe, negative_prompt="a dog"), latents(pipe))
    assert not np.array_equal(latents(pipe, guidance_scale=1.0), latents(pipe))


def test_a_lora_can_be_loaded_and_removed(repository, tmp_path):
    peft = pytest.importorskip("peft")
    pipe = load(repository, device="cpu", dtype="float32", prompt_enhancer=False)
    plain = latents(pipe)
    torch.manual_seed(0)
    pipe.transformer.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    weights = peft.get_peft_model_state_dict(pipe.transformer)
    diffusers.ErnieImagePipeline.save_lora_weights(tmp_path, transformer_lora_layers=weights)
    changed = latents(pipe)
    assert not np.array_equal(changed, plain)

    again = load(repository, device="cpu", dtype="float32", prompt_enhancer=False)
    again.load_lora_weights(tmp_path)
    assert np.array_equal(latents(again), changed)
    again.unload_lora_weights()
    assert np.array_equal(latents(again), plain)


def test_what_save_pretrained_writes_loads_again(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    assert np.array_equal(draw(load(tmp_path / "saved", device="cpu")), draw(pipe))


# Memory modes on a CPU


@pytest.mark.parametrize("memory", ["auto", "resident"])
def test_a_cpu_keeps_everything_resident(repository, pipe, memory):
    loaded = load(repository, device="cpu", memory=memory, prompt_enhancer=False)
    assert memory_mode(loaded) == "resident"
    assert np.array_equal(draw(loaded), draw(pipe))


def test_offload_makes_no_sense_on_a_cpu(repository):
    with pytest.raises(InvalidSettings, match="use memory='auto' or 'resident'"):
        load(repository, device="cpu", memory="offload")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_cuda_where_there_is_none(repository):
    with pytest.raises(DeviceUnavailable, match=r"'cuda' was asked for.*device='cpu'"):
        load(repository, device="cuda")


def test_settings_and_structure_are_checked_before_weights_are_read(copy):
    for component in QUANTIZED:  # whoever reads these finds that out first
        weights = copy / component.name / component.weights
        weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InvalidSettings):
        load(copy, dtype="int8")
    with pytest.raises(InvalidRepository, match="truncated or corrupt"):
        load(copy, memory="auto")


@pytest.mark.gpu
def test_kernels_are_tried_out_by_the_first_picture(repository, monkeypatch):
    """Triton's start takes Python's lock from loading, which needs nothing else; hashing its files hardly does."""
    hashed = []
    monkeypatch.setattr(build, "prepare_triton", lambda: hashed.append(True))
    elementwise.has_triton.cache_clear()
    pipe = load(repository, device="cuda")
    assert hashed
    assert not elementwise.has_triton.cache_info().currsize
    pipe("a cat", height=32, width=32, num_inference_steps=2)
    assert elementwise.has_triton.cache_info().currsize


def test_the_minis_configuration_is_one_that_the_oldest_transformers_loads():
    """Later ones write "axial" for the vision tower, which 5.0 refuses and none needs: the release's says "default"."""
    config = CHECKOUT / "text_encoder" / "config.json"
    if not config.exists():
        pytest.skip("this checkout holds no weights")
    assert json.loads(config.read_text())["vision_config"]["rope_parameters"]["rope_type"] == "default"
