"""LoRAs on a pipeline: every trainer's file is the same adapter, each wrong one has its line, the base comes back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hub_server import serve
from safetensors.torch import save_file

from ernie_image_nf4 import load, load_lora
from ernie_image_nf4.errors import InvalidLora, InvalidSettings, RepositoryNotFound
from ernie_image_nf4.loading.lora import layer_shapes, strengths
from ernie_image_nf4.repository.lora_file import describe_lora
from ernie_image_nf4.repository.lora_source import find_lora

peft = pytest.importorskip("peft")

RANK, ALPHA = 4, 2.0
LAYERS = ("layers.0.self_attention.to_q", "layers.0.self_attention.to_out.0", "layers.1.mlp.linear_fc2")
Pair = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def pipe(repository: Path) -> diffusers.ErnieImagePipeline:
    pipe = load(repository, device="cpu", dtype="float32", prompt_enhancer=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pairs(repository: Path) -> dict[str, Pair]:
    """Down and up matrix of each layer."""
    shapes = layer_shapes(load(repository, device="cpu", prompt_enhancer=False).transformer)
    torch.manual_seed(3)
    return {
        layer: (torch.randn(RANK, shapes[layer][1]) / 4, torch.randn(shapes[layer][0], RANK) / 4) for layer in LAYERS
    }


def draw(pipe: diffusers.ErnieImagePipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(5)
    image = pipe("a cat", height=32, width=32, num_inference_steps=2, generator=generator).images[0]
    return np.asarray(image).astype(int)


def named(pairs: Mapping[str, Pair], form: str, *, flat: bool = False, alpha: float | None = None) -> dict:
    """A LoRA's tensors; `form`: what stands before the layer, and the names of the two matrices."""
    prefix, down, up = form.split()
    state = {}
    for layer, (a, b) in pairs.items():
        name = prefix + (layer.replace(".", "_") if flat else layer)
        state |= {f"{name}.{down}": a, f"{name}.{up}": b}
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


def scaled(pairs: Mapping[str, Pair], factor: float) -> dict[str, Pair]:
    return {layer: (down, up * factor) for layer, (down, up) in pairs.items()}


def saved(state: Mapping[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in state.items()}, file, metadata)
    return file


def write(form: str, pairs: Mapping[str, Pair], folder: Path) -> Path:
    """A file as a trainer writes it, with an alpha of ALPHA where it writes one: all stand for the same LoRA."""
    folded, file = scaled(pairs, ALPHA / RANK), folder / f"{form}.safetensors"
    if form == "diffusers":
        return saved(named(folded, "transformer. lora_A.weight lora_B.weight"), file)
    if form == "diffusers with settings":
        settings = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA}
        state = named(pairs, "transformer. lora_A.weight lora_B.weight")
        return saved(state, file, {"lora_adapter_metadata": json.dumps(settings)})
    if form == "ai-toolkit":
        return saved(named(folded, "diffusion_model. lora_A.weight lora_B.weight"), file)
    if form == "OneTrainer":
        return saved(named(pairs, "transformer. lora_down.weight lora_up.weight", alpha=ALPHA), file)
    if form == "kohya":
        return saved(named(pairs, "lora_unet_ lora_down.weight lora_up.weight", flat=True, alpha=ALPHA), file)
    if form == "musubi":
        return saved(named(folded, "lora_transformer_ lora_down.weight lora_up.weight", flat=True, alpha=RANK), file)
    assert form == "peft"
    (folder / "peft").mkdir()
    (folder / "peft" / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
    saved(named(pairs, "base_model.model. lora_A.weight lora_B.weight"), folder / "peft" / "adapter_model.safetensors")
    return folder / "peft"


FORMS = ("diffusers", "diffusers with settings", "ai-toolkit", "OneTrainer", "kohya", "musubi", "peft")


@pytest.fixture(scope="module")
def expected(repository: Path, pairs: dict[str, Pair]) -> np.ndarray:
    """Drawn with the LoRA by diffusers alone."""
    pipe = load(repository, device="cpu", dtype="float32", prompt_enhancer=False)
    state = named(scaled(pairs, ALPHA / RANK), "transformer. lora_A.weight lora_B.weight")
    diffusers.ErnieImagePipeline.load_lora_weights(pipe, state)
    return draw(pipe)


@pytest.mark.parametrize("form", FORMS)
def test_every_trainers_file_is_the_same_adapter(pipe, pairs, expected, tmp_path, form):
    without = draw(pipe)
    name = load_lora(pipe, write(form, pairs, tmp_path))
    assert strengths(pipe) == {name: 1.0}
    assert np.array_equal(draw(pipe), expected)
    assert not np.array_equal(expected, without)
    pipe.delete_adapters(name)
    assert np.array_equal(draw(pipe), without)


@pytest.mark.parametrize("form", ["kohya", "OneTrainer"])
def test_load_lora_weights_takes_them_too(pipe, pairs, expected, tmp_path, form):
    pipe.load_lora_weights(write(form, pairs, tmp_path))
    assert np.array_equal(draw(pipe), expected)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path, weight_name=f"{form}.safetensors", adapter_name="again")
    assert np.array_equal(draw(pipe), expected)


def test_layers_may_be_of_two_ranks(pipe, pairs):
    """Half of a layer's rank, with an alpha of half, is the first half of it."""
    narrow = LAYERS[1]
    halves = {layer: (down[:2], up[:, :2]) if layer == narrow else (down, up) for layer, (down, up) in pairs.items()}
    zeros = {
        layer: (F.pad(down, (0, 0, 0, RANK - len(down))), F.pad(up, (0, RANK - up.shape[1])))
        for layer, (down, up) in halves.items()
    }
    pictures = []
    for each in (halves, zeros):
        pipe.load_lora_weights(named(each, "transformer. lora_A.weight lora_B.weight"))
        pictures.append(draw(pipe))
        pipe.unload_lora_weights()
    assert np.array_equal(*pictures)


def test_the_strength_is_a_factor(pipe, pairs, tmp_path):
    form = "transformer. lora_A.weight lora_B.weight"
    half, whole = saved(named(scaled(pairs, 0.5), form), tmp_path / "half.safetensors"), tmp_path / "whole.safetensors"
    saved(named(pairs, form), whole)
    load_lora(pipe, half)
    expected = draw(pipe)
    pipe.delete_adapters("half-2")  # torch's modules have a method called half
    assert load_lora(pipe, whole, strength=0.5) == "whole"
    assert np.array_equal(draw(pipe), expected)
    pipe.set_adapters("whole", 0.0)
    without = draw(pipe)
    pipe.disable_lora()
    assert np.array_equal(draw(pipe), without)


def test_loras_add_up_and_keep_their_strengths(pipe, pairs, tmp_path):
    file = write("kohya", pairs, tmp_path)
    without = draw(pipe)
    assert [load_lora(pipe, file, strength=each) for each in (0.5, -0.5)] == ["kohya", "kohya-2"]
    assert strengths(pipe) == {"kohya": 0.5, "kohya-2": -0.5}
    assert np.abs(draw(pipe) - without).max() <= 1
    assert load_lora(pipe, file, name="third") == "third"
    assert strengths(pipe) == {"kohya": 0.5, "kohya-2": -0.5, "third": 1.0}
    for strength in (0.1, 0.35, 0.7, 1.1):  # some of which round in a product with a rank's part
        name = load_lora(pipe, file, strength=strength)
        assert strengths(pipe)[name] == strength
        pipe.delete_adapters(name)


def test_dora_is_pefts(pipe, pairs, repository, tmp_path):
    """As peft saves it, and with the names of other trainers."""
    shapes = layer_shapes(pipe.transformer)
    magnitudes = {layer: torch.rand(shapes[layer][0]) + 0.5 for layer in LAYERS}
    as_peft = named(pairs, "transformer. lora_A.weight lora_B.weight")
    as_kohya = named(pairs, "lora_unet_ lora_down.weight lora_up.weight", flat=True)
    for layer, magnitude in magnitudes.items():
        as_peft[f"transformer.{layer}.lora_magnitude_vector.weight"] = magnitude
        as_kohya[f"lora_unet_{layer.replace('.', '_')}.dora_scale"] = magnitude[:, None]
    pictures = []
    for state in (as_peft, as_kohya):
        name = load_lora(pipe, saved(state, tmp_path / "dora.safetensors"))
        assert pipe.transformer.peft_config[name].use_dora
        pictures.append(draw(pipe))
        pipe.unload_lora_weights()
    assert np.array_equal(*pictures)
    load_lora(pipe, saved(named(pairs, "transformer. lora_A.weight lora_B.weight"), tmp_path / "lora.safetensors"))
    assert not np.array_equal(draw(pipe), pictures[0])


# Wrong files


def without(state: dict, *ends: str) -> dict:
    return {name: tensor for name, tensor in state.items() if not name.endswith(ends)}


def wrong_states(pairs: dict[str, Pair]) -> dict[str, tuple[dict, str]]:
    layer, form = LAYERS[0], "transformer. lora_A.weight lora_B.weight"
    right, (down, up) = named(pairs, form), pairs[layer]
    other = {f"transformer.{name}": torch.zeros(2, 2) for name in ("a.lora_A.weight", "a.lora_B.weight", "b.alpha")}
    a, b = f"transformer.{layer}.lora_A.weight", f"transformer.{layer}.lora_B.weight"
    return {
        "another model": (
            other,
            r"has 3 of 3 tensors for layers that this transformer hasn't: transformer\.a\.lora_A\.weight, "
            r"transformer\.a\.lora_B\.weight, transformer\.b\.alpha\. It was trained on another model",
        ),
        "a layer more": (
            right | {"lora_unet_x_to_q.lora_up.weight": up},
            "has 1 of 7 tensors for layers .*: lora_unet_x_to_q",
        ),
        "half a pair": (without(right, f"{layer}.lora_B.weight"), f"has only half of {layer}"),
        "another width": (right | {a: down[:, 1:]}, f"doesn't fit {layer}, whose weight is .*: down is 4x"),
        "two ranks in a pair": (right | {a: down[:2]}, f"doesn't fit {layer}"),
        "a row": (right | {b: up[0]}, f"doesn't fit {layer}"),
        "twice": (right | {f"diffusion_model.{layer}.lora_up.weight": up}, f"has {layer} twice"),
        "a strange name": (right | {"transformer.step": down}, r"belong to no LoRA: transformer\.step\."),
        "LoKr": ({f"transformer.{layer}.lokr_w1": down}, "is a LoKr adapter .*not a LoRA"),
        "LoHa": ({f"lora_unet_{layer.replace('.', '_')}.hada_w1_a": down}, "is a LoHa adapter"),
        "whole weights": (right | {f"transformer.{layer}.diff": down}, "changes whole weights"),
        "a text encoder": ({"lora_te_x.lora_up.weight": up}, "holds no LoRA but one for a text encoder"),
        "nothing": ({}, "holds no LoRA"),
        "NaN": (right | {b: up * torch.nan}, "not finite"),
        "single numbers": ({a: down[0, 0], b: up[0, 0]}, f"doesn't fit {layer}"),
        "codes": (right | {a: down.to(torch.int8)}, f"has int8 at {layer}"),
        "a whole model": ({f"{layer}.weight": down}, rf"holds no LoRA but {layer}\.weight: name one"),
        "magnitudes of inputs": (
            right | {f"transformer.{layer}.dora_scale": torch.ones(1, down.shape[1] + 1)},
            "magnitudes at .*, where one for each of",
        ),
    }  # fmt: skip


WRONG = tuple(wrong_states({layer: (torch.zeros(4, 8), torch.zeros(8, 4)) for layer in LAYERS}))


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_has_its_line_and_changes_nothing(pipe, pairs, tmp_path, case):
    state, message = wrong_states(pairs)[case]
    before = draw(pipe)
    for load_it in (
        lambda: load_lora(pipe, saved(state, tmp_path / "wrong.safetensors")),
        lambda: pipe.load_lora_weights(state),
    ):
        with pytest.raises(InvalidLora, match=message):
            load_it()
    assert pipe.get_list_adapters() == {}
    assert np.array_equal(draw(pipe), before)


def test_tensors_of_a_text_encoder_are_told_of(pipe, pairs, tmp_path, caplog):
    state = named(pairs, "lora_unet_ lora_down.weight lora_up.weight", flat=True)
    state["lora_te1_layers_0.lora_up.weight"] = torch.zeros(2, 2)
    load_lora(pipe, saved(state, tmp_path / "both.safetensors"))
    assert "LoRA for a text encoder, which is not used: lora_te1_layers_0.lora_up.weight" in caplog.text


def test_only_whole_safetensors_are_opened(pipe, pairs, tmp_path):
    pickled = tmp_path / "lora.pt"
    torch.save(named(pairs, "transformer. lora_A.weight lora_B.weight"), pickled)
    with pytest.raises(InvalidLora, match="other formats can run code"):
        load_lora(pipe, pickled)
    cut = write("kohya", pairs, tmp_path)
    cut.write_bytes(cut.read_bytes()[:-10])
    with pytest.raises(InvalidLora, match="truncated or corrupt"):
        load_lora(pipe, cut)


def test_a_broken_lora_is_not_called_a_repository(tmp_path):
    broken = tmp_path / "lora.safetensors"
    broken.write_text("<html>Log in to download</html>")
    with pytest.raises(InvalidLora, match="not a whole safetensors file: download it again"):
        describe_lora(broken)


SETTINGS = {
    "no number": {"lora_alpha": None},
    "text": {"lora_alpha": "abc"},
    "infinity": {"lora_alpha": float("inf")},
    "a list of patterns": {"lora_alpha": 4, "alpha_pattern": [1]},
    "a pattern's text": {"lora_alpha": 4, "alpha_pattern": {LAYERS[0]: "abc"}},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_are_numbers(pairs, tmp_path, case):
    settings = {f"transformer.{name}": value for name, value in SETTINGS[case].items()}
    state = named(pairs, "transformer. lora_A.weight lora_B.weight")
    file = saved(state, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(InvalidLora, match=r"lora_alpha or alpha_pattern .*: save the LoRA again"):
        describe_lora(file)


def test_settings_beside_a_file_may_be_no_text(pairs, tmp_path):
    file = write("peft", pairs, tmp_path) / "adapter_model.safetensors"
    (file.parent / "adapter_config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(InvalidLora, match=r"adapter_config\.json is not JSON"):
        describe_lora(file)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_matrices_of_8_bits_are_those_that_they_stand_for(pipe, pairs, tmp_path, dtype):
    narrow = {layer: (down.to(dtype), up.to(dtype)) for layer, (down, up) in pairs.items()}
    wide = {layer: (down.float(), up.float()) for layer, (down, up) in narrow.items()}
    pictures = []
    for name, each in (("narrow", narrow), ("wide", wide)):
        form = "transformer. lora_A.weight lora_B.weight"
        load_lora(pipe, saved(named(each, form), tmp_path / f"{name}.safetensors"))
        pictures.append(draw(pipe))
        pipe.unload_lora_weights()
    assert np.array_equal(*pictures)
    assert not np.array_equal(pictures[0], draw(pipe))


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), None, "strong"])
def test_a_strength_is_a_finite_number(pipe, pairs, tmp_path, strength):
    with pytest.raises(InvalidSettings, match="not a finite number"):
        load_lora(pipe, write("kohya", pairs, tmp_path), strength=strength)


@pytest.mark.parametrize("name", ["v1.5", "", "keys", 5])
def test_load_lora_weights_takes_names_that_torch_takes(pipe, pairs, tmp_path, name):
    with pytest.raises(InvalidSettings, match="use another name, without a dot"):
        pipe.load_lora_weights(write("kohya", pairs, tmp_path), adapter_name=name)
    assert pipe.get_list_adapters() == {}


def test_a_name_is_taken_once(pipe, pairs, tmp_path):
    file = write("kohya", pairs, tmp_path)
    load_lora(pipe, file, name="one")
    with pytest.raises(InvalidSettings, match="'one' already"):
        load_lora(pipe, file, name="one")
    for name in ("v1.5", "half", ""):
        with pytest.raises(InvalidSettings, match=f"can't be called {name!r}"):
            load_lora(pipe, file, name=name)


def test_loras_of_the_file_are_in_the_dtype_of_their_layers_products(repository, pairs, tmp_path):
    """float32 in the file, float16 in the blocks of a float16 pipeline, whose other layers are in float32."""
    pipe = load(repository, device="cpu", dtype="float16", prompt_enhancer=False)
    beside = {"text_proj": (torch.ones(RANK, 64), torch.ones(128, RANK))}
    file = saved(named(pairs | beside, "transformer. lora_A.weight lora_B.weight"), tmp_path / "lora.safetensors")
    expected = {True: torch.float16, False: torch.float32}
    for load_it in (lambda: load_lora(pipe, file), lambda: pipe.load_lora_weights(file)):
        load_it()
        weights = {name: each for name, each in pipe.transformer.named_parameters() if ".lora_" in name}
        assert {name.startswith("layers."): each.dtype for name, each in weights.items()} == expected
        pipe.unload_lora_weights()


def test_patterns_of_a_stranger_are_no_regular_expressions(pipe, pairs, tmp_path):
    state = named(pairs, "transformer. lora_A.weight lora_B.weight")
    settings = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA, "transformer.alpha_pattern": {"(a+)+$": 1.0}}
    file = saved(state, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(InvalidLora, match="where names of layers are wanted"):
        load_lora(pipe, file)


# Where it is


def test_a_folder_has_one_or_its_name_is_said(pipe, pairs, tmp_path):
    with pytest.raises(InvalidLora, match=r"has no \.safetensors files"):
        load_lora(pipe, tmp_path)
    write("kohya", pairs, tmp_path)
    assert load_lora(pipe, tmp_path) == "kohya"
    write("OneTrainer", pairs, tmp_path)
    with pytest.raises(
        InvalidLora, match=r"has 2 .* name one of OneTrainer\.safetensors, kohya\.safetensors by its path"
    ):
        load_lora(pipe, tmp_path)
    assert load_lora(pipe, str(tmp_path), weight_name="OneTrainer.safetensors") == "OneTrainer"
    with pytest.raises(InvalidLora, match=r"has no file 'x\.safetensors'"):
        load_lora(pipe, tmp_path, weight_name="x.safetensors")


@pytest.mark.parametrize("source", ["nowhere.safetensors", "./nowhere", "user/lora.safetensors", Path("user/lora")])
def test_what_is_not_there_is_not_looked_for_on_the_hub(pipe, source):
    with pytest.raises(InvalidLora, match="There is no file or folder"):
        load_lora(pipe, source)


def test_a_lora_of_the_hub_with_and_without_network(pipe, pairs, expected, tmp_path, monkeypatch):
    write("kohya", pairs, tmp_path / "published")
    (tmp_path / "published" / "steps").mkdir()
    (tmp_path / "published" / "steps" / "100.safetensors").write_bytes(b"not wanted")
    cache = tmp_path / "cache"
    with serve() as hub:
        hub.add("user/lora", tmp_path / "published")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        with pytest.raises(RepositoryNotFound, match="the network is off"):
            load_lora(pipe, "user/lora", cache_dir=cache, local_files_only=True)
        assert hub.requests == []
        try:
            name = load_lora(pipe, "user/lora", cache_dir=cache)
        finally:
            asked = [str(request) for request in hub.requests]
    assert not any("100.safetensors" in each for each in asked)
    assert np.array_equal(draw(pipe), expected)
    pipe.delete_adapters(name)
    load_lora(pipe, "user/lora", cache_dir=cache, local_files_only=True)
    assert np.array_equal(draw(pipe), expected)


# Fusing and saving


def test_a_lora_is_not_fused_into_nf4(pipe, pairs, tmp_path, expected):
    load_lora(pipe, write("kohya", pairs, tmp_path))
    with pytest.raises(InvalidSettings, match="round LoRA and weights to NF4 anew"):
        pipe.fuse_lora()
    assert np.array_equal(draw(pipe), expected)


def test_saved_with_loras_it_is_its_base(pipe, pairs, repository, tmp_path, caplog, expected):
    file = write("kohya", pairs, tmp_path)
    load_lora(pipe, file, name="first")
    load_lora(pipe, file, name="second", strength=0.25)
    pipe.set_adapters("first")
    pipe.save_pretrained(tmp_path / "saved")
    assert "saved was saved without its LoRAs (first, second): keep their files" in caplog.text
    weights, base = (load(each, device="cpu").transformer.state_dict() for each in (tmp_path / "saved", repository))
    assert weights.keys() == base.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in base.items())
    assert strengths(pipe) == {"first": 1.0}
    assert np.array_equal(draw(pipe), expected)
    pipe.set_adapters(["first", "second"], [0.0, 1.0])
    assert np.array_equal(draw(pipe), expected)


# What a file says


@pytest.mark.parametrize("form", FORMS)
def test_a_file_says_what_it_is(pairs, tmp_path, form):
    file = write(form, pairs, tmp_path)
    found = describe_lora(file / "adapter_model.safetensors" if file.is_dir() else file)
    writer = {"diffusers with settings": "diffusers", "musubi": "OneTrainer"}.get(form, form)
    assert (found.format, found.ranks, found.is_dora, found.base) == (writer, (RANK,), False, None)
    assert found.has_alpha == (form not in ("diffusers", "ai-toolkit"))


def test_a_file_says_what_it_was_trained_on(pairs, tmp_path):
    state = named(pairs, "lora_unet_ lora_down.weight lora_up.weight", flat=True)
    file = saved(state, tmp_path / "lora.safetensors", {"ss_base_model_version": "ernie_image"})
    assert describe_lora(file).base == "ernie_image"


def test_info_says_what_a_file_is(pairs, tmp_path, command):
    state = named(pairs, "lora_unet_ lora_down.weight lora_up.weight", flat=True, alpha=ALPHA)
    file = saved(state | {"lora_te_x.lora_up.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    said = command("info", file)
    assert said.code == 0
    for line in ("kind         LoRA", "format       kohya", "rank         4, with alpha", "layers       3"):
        assert line in said.out
    assert "not used     1 tensors for a text encoder" in said.out
    (tmp_path / "text.safetensors").write_bytes(b"no")
    assert command("info", tmp_path / "text.safetensors").code == 1
    (tmp_path / "text.safetensors").unlink()
    assert command("info", tmp_path).out == said.out  # a folder that holds one
    missing = command("info", tmp_path / "none.safetensors")
    assert missing.code == 1
    assert "There is no file or folder" in missing.err


def test_a_choice_of_many_files_is_not_listed_whole(pairs, tmp_path):
    for number in range(12):
        write("kohya", pairs, tmp_path).rename(tmp_path / f"step-{number:02}.safetensors")
    with pytest.raises(InvalidLora, match=r"has 12 .*name one of .* step-09\.safetensors and 2 more by its path"):
        find_lora(tmp_path)
