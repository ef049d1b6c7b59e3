"""On a CUDA GPU: load() gives the pixels of the model card's demo, in every memory mode."""

from __future__ import annotations

import gc
import logging
from pathlib import Path

import bitsandbytes
import numpy as np
import pytest
import torch
from conftest import CHECKOUT
from diffusers import AutoModel, ErnieImagePipeline
from transformers import AutoModel as TransformersAutoModel
from transformers import AutoModelForCausalLM

from ernie_image_nf4 import load
from ernie_image_nf4.benchmarking.predictions import largest_error, predictions
from ernie_image_nf4.errors import DeviceUnavailable
from ernie_image_nf4.generation.settings import Settings
from ernie_image_nf4.generation.single import draw
from ernie_image_nf4.memory.placement import DTYPES, GIB
from ernie_image_nf4.repository.components import MODEL_INDEX

pytestmark = pytest.mark.gpu
PROMPT = "an orange cat on a wooden desk"


@pytest.fixture(scope="module", params=["checkout", "tiny"])
def model(request: pytest.FixtureRequest, repository: Path) -> Path:
    """The checkout's own weights, and the tiny random ones."""
    if request.param == "tiny":
        return repository
    if not (CHECKOUT / MODEL_INDEX).exists():
        pytest.skip("this checkout holds no weights")
    return CHECKOUT


@pytest.fixture(scope="module")
def resident(model: Path) -> ErnieImagePipeline:
    return load(model, memory="resident", fast=False)


@pytest.fixture(scope="module")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """What `load` takes by default: bfloat16, or what ``--dtype`` says."""
    return DTYPES[request.config.getoption("--dtype") or "bfloat16"]


def demo(model_dir: Path) -> ErnieImagePipeline:
    """The model card's demo, call for call. In bfloat16: in other dtypes `load` converts more than these calls."""
    transformer = AutoModel.from_pretrained(
        str(model_dir / "transformer"),
        torch_dtype=torch.bfloat16,
        device_map={"": 0},
        local_files_only=True,
    )
    text_encoder = TransformersAutoModel.from_pretrained(
        str(model_dir / "text_encoder"),
        torch_dtype=torch.bfloat16,
        device_map={"": 0},
        local_files_only=True,
    )
    pe = AutoModelForCausalLM.from_pretrained(
        str(model_dir / "pe"),
        torch_dtype=torch.bfloat16,
        device_map={"": 0},
        local_files_only=True,
    )
    pipe = ErnieImagePipeline.from_pretrained(
        str(model_dir),
        transformer=transformer,
        text_encoder=text_encoder,
        pe=pe,
        torch_dtype=torch.bfloat16,
        local_files_only=True,
    )
    pipe.vae.to("cuda", dtype=torch.bfloat16)
    return pipe


def pixels(pipe: ErnieImagePipeline, seed: int = 1234, **options: object) -> np.ndarray:
    result = pipe(
        prompt=PROMPT,
        height=256,
        width=256,
        num_inference_steps=4,
        guidance_scale=4.0,
        generator=torch.Generator(device="cuda").manual_seed(seed),
        **{"use_pe": False, **options},
    )
    return np.asarray(result.images[0])


@pytest.fixture(scope="module")
def in_bfloat16(model: Path) -> ErnieImagePipeline:
    return load(model, memory="resident", fast=False, dtype="bfloat16")


def test_load_gives_the_pixels_of_the_demo(model, in_bfloat16):
    assert np.array_equal(pixels(in_bfloat16), pixels(demo(model)))


def test_load_gives_the_pixels_of_the_demo_with_the_prompt_enhancer(model, in_bfloat16):
    pictures = []
    for pipe in (in_bfloat16, demo(model)):
        torch.manual_seed(0)
        pictures.append(pixels(pipe, use_pe=True))
    assert np.array_equal(*pictures)


def test_another_seed_gives_another_picture(resident):
    assert not np.array_equal(pixels(resident, seed=1), pixels(resident, seed=2))


def test_all_weights_are_on_the_gpu_in_the_dtype_of_the_computation(resident, dtype):
    for model in (resident.transformer, resident.text_encoder, resident.pe, resident.vae):
        assert {parameter.device for parameter in model.parameters()} == {torch.device("cuda", 0)}
        assert {p.dtype for p in model.parameters() if p.dtype != torch.uint8} == {dtype}


def test_offload_and_resident_agree(model, resident):
    offloaded = load(model, memory="offload", fast=False)
    assert np.array_equal(pixels(offloaded), pixels(resident))
    assert np.array_equal(pixels(offloaded), pixels(resident))  # what was moved back and forth is still the same


def test_offload_waits_on_the_cpu(model):
    gc.collect()
    before = torch.cuda.memory_allocated()
    offloaded = load(model, memory="offload")
    assert torch.cuda.memory_allocated() == before
    for part in (offloaded.transformer, offloaded.text_encoder, offloaded.pe, offloaded.vae):
        assert {parameter.device.type for parameter in part.parameters()} == {"cpu"}


def test_offload_draws_with_the_prompt_enhancer(model):
    offloaded = load(model, memory="offload")
    assert offloaded(PROMPT, height=64, width=64, num_inference_steps=1, use_pe=True).revised_prompts


def test_auto_stays_resident_where_there_is_room_and_says_so(model, caplog):
    with caplog.at_level(logging.INFO, logger="ernie_image_nf4"):
        pipe = load(model, memory="auto", prompt_enhancer=False)
    assert "Memory mode resident on cuda:0: " in caplog.text
    assert pipe.device.type == "cuda"


def test_too_little_free_memory_is_found_before_loading(model, monkeypatch):
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    kept = torch.cuda.memory_reserved() - before
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (GIB // 2 - kept, 80 * GIB))
    with pytest.raises(DeviceUnavailable, match=r"needs .* where 0\.5 GiB are free"):
        load(model, memory="resident")
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("use_pe", [False, True])
def test_a_seed_makes_the_whole_picture_repeatable(resident, use_pe):
    settings = Settings(PROMPT, "", 256, 256, 4, 4.0, seed=7, use_pe=use_pe)
    first, again = draw(resident, settings), draw(resident, settings)
    assert np.array_equal(np.asarray(first.image), np.asarray(again.image))
    assert first.revised_prompt == again.revised_prompt


def test_drawing_leaves_the_random_state_of_the_gpu_alone(resident):
    state = torch.cuda.get_rng_state()
    draw(resident, Settings(PROMPT, "", 64, 64, 1, 1.0, seed=0))
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.parametrize(
    ("wanted", "fast"), [("float16", "exact"), ("float16", False), ("float32", True), ("float32", "exact")]
)
def test_other_dtypes_reach_every_layer_and_draw(model, wanted, fast):
    pipe, dtype = load(model, dtype=wanted, fast=fast), DTYPES[wanted]
    for part in (pipe.transformer, pipe.text_encoder, pipe.pe, pipe.vae):
        assert {p.dtype for p in part.parameters() if p.dtype != torch.uint8} == {dtype}
        layers = [module for module in part.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
        assert {layer.compute_dtype for layer in layers} <= {dtype}
    assert pixels(pipe).std() > 0


@pytest.mark.parametrize("memory", ["resident", "offload", "stream"])
def test_float16_that_cannot_overflow_draws_as_float32(model, memory):
    pipes = [load(model, dtype=dtype, memory=memory, prompt_enhancer=False) for dtype in ("float32", "float16")]
    expected, found = map(pixels, pipes)
    assert found.std() > 0
    assert psnr(found, expected) >= (40 if pipes[0].transformer.config.num_layers >= 12 else 20)
    predicted = [predictions(pipe, 256, "cuda")["prediction"] for pipe in pipes]
    assert largest_error(predicted[1], predicted[0]) < 3e-3


def test_the_cpu_can_be_asked_for(model):
    pipe = load(model, device="cpu", prompt_enhancer=False)
    assert pipe.device.type == "cpu"
    assert pipe(PROMPT, height=64, width=64, num_inference_steps=1).images


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.square(one.astype(float) - other).mean())


def test_fast_pictures_are_those_of_the_demo_up_to_rounding(resident):
    if resident.transformer.config.num_layers < 12:
        pytest.skip("random weights make noise of rounding")
    fast = load(CHECKOUT, memory="resident", prompt_enhancer=False)
    ratios = [psnr(pixels(fast, seed), pixels(resident, seed)) for seed in range(4)]
    assert min(ratios) >= 35, ratios


@pytest.mark.parametrize("fast", [True, "exact"])
@pytest.mark.parametrize("memory", ["resident", "offload", "stream"])
def test_fast_predictions_are_those_of_the_demo_up_to_rounding(resident, memory, fast):
    if resident.transformer.config.num_layers < 12:
        pytest.skip("random weights make noise of rounding")
    expected = predictions(resident, 256, "cuda")["prediction"]
    pipe = load(CHECKOUT, prompt_enhancer=False, memory=memory, fast=fast)
    assert largest_error(predictions(pipe, 256, "cuda")["prediction"], expected) < 1e-2


def test_fast_modes_agree(model):
    expected = pixels(load(model, memory="resident"))
    for memory in ("offload", "stream"):
        assert np.array_equal(pixels(load(model, memory=memory)), expected), memory


def test_fast_is_undone_by_nothing_but_loading_again(model, resident):
    load(model, memory="resident")
    assert np.array_equal(pixels(load(model, memory="resident", fast=False)), pixels(resident))


@pytest.mark.parametrize("fast", [False, True])
def test_what_save_pretrained_writes_loads_again(model, tmp_path, fast):
    pipe = load(model, memory="resident", fast=fast)
    pipe.save_pretrained(tmp_path / "saved")
    assert np.array_equal(pixels(load(tmp_path / "saved", memory="resident", fast=fast)), pixels(pipe))


def test_a_lora_works_on_fast_pipelines(model, tmp_path):
    pipe = load(model, memory="resident", prompt_enhancer=False)
    before = pixels(pipe)
    width = pipe.transformer.config.hidden_size
    name = "transformer.layers.0.self_attention.to_q"
    lora = {f"{name}.lora_A.weight": torch.ones(2, width) / width, f"{name}.lora_B.weight": torch.ones(width, 2)}
    pipe.load_lora_weights(lora)
    assert not np.array_equal(pixels(pipe), before)
    pipe.unload_lora_weights()
    assert np.array_equal(pixels(pipe), before)
