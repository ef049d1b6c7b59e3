"""What people do with a pipeline between load() and a picture: the picture is the usual one, or an error says why."""

from __future__ import annotations

import copy as copying
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from diffusers import ErnieImagePipeline
from PIL import Image

from ernie_image_nf4 import Row, generate_batch, load
from ernie_image_nf4.errors import InvalidSettings
from ernie_image_nf4.fast.prompt_enhancer import make_prompt_enhancer_fast
from ernie_image_nf4.fast.transformer import make_transformer_fast
from ernie_image_nf4.memory.offload import enable_offload

MODES = ("resident", "offload", "stream")
CPU = torch.device("cpu")


@pytest.fixture(params=MODES)
def memory(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loaded(repository: Path, memory: str = "resident", device: str = "cuda", **options: object) -> ErnieImagePipeline:
    pipe = load(repository, device=device, memory=memory, prompt_enhancer=False, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: ErnieImagePipeline, **options: object) -> np.ndarray:
    size = {"height": 64, "width": 96, "num_inference_steps": 4, "guidance_scale": 4.0}
    generator = torch.Generator().manual_seed(5)
    return np.asarray(pipe("a cat", generator=generator, **size, **options).images[0]).astype(int)


@pytest.fixture(scope="module")
def expected(repository: Path) -> np.ndarray:
    return draw(loaded(repository))


def to_cpu_and_back(pipe: ErnieImagePipeline) -> None:
    pipe.to("cpu")
    pipe.to("cuda")


def compile_transformer(pipe: ErnieImagePipeline) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def remove_hooks(pipe: ErnieImagePipeline) -> None:
    pipe.remove_all_hooks()
    pipe.to("cuda")


def set_backends(pipe: ErnieImagePipeline) -> None:
    for backend in ("_native_math", "native"):
        pipe.transformer.set_attention_backend(backend)
        draw(pipe)
    pipe.transformer.reset_attention_backend()


def raise_in_callback(pipe: ErnieImagePipeline) -> None:
    def callback(pipe: ErnieImagePipeline, step: int, *_: object) -> dict:
        if step == 2:
            raise KeyError("not found")
        return {}

    with pytest.raises(KeyError):
        draw(pipe, callback_on_step_end=callback)


def autocast(pipe: ErnieImagePipeline) -> None:
    with torch.autocast("cuda", torch.bfloat16):
        draw(pipe)


def inference_mode(pipe: ErnieImagePipeline) -> None:
    with torch.inference_mode():
        draw(pipe)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "habit",
    [
        to_cpu_and_back,
        compile_transformer,
        lambda pipe: pipe.enable_model_cpu_offload(),
        remove_hooks,
        set_backends,
        raise_in_callback,
        autocast,
        inference_mode,
    ],
)
@pytest.mark.parametrize("drawn", [False, True], ids=["undrawn", "drawn"])
def test_the_picture_stays_the_usual_one(repository, expected, memory, habit, drawn, dynamo):
    pipe = loaded(repository, memory)
    if drawn:
        draw(pipe)
    habit(pipe)
    if habit is compile_transformer:  # other kernels for the same values
        assert np.abs(draw(pipe) - expected).mean() < 2
        assert np.array_equal(draw(pipe), draw(pipe))
        return
    assert np.array_equal(draw(pipe), expected)
    assert np.array_equal(draw(pipe), expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing_in_16_bits(repository, tmp_path, device, dtype, to):
    pipe = load(repository, device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)

    def everything(folder: Path) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
        (record,) = generate_batch(pipe, [Row("a cat")], folder, height=32, width=32, steps=2, guidance=3.0)
        with Image.open(folder / record.file) as image:
            batch = np.asarray(image)
        return draw(pipe, use_pe=False), pipe.encode_prompt("a cat", device)[0], batch

    before = everything(tmp_path / "before")
    with torch.autocast(device, to):
        found = everything(tmp_path / "after")
        assert torch.get_autocast_dtype(device) == to
        assert torch.is_autocast_enabled(device)
    assert torch.equal(found[1], before[1])
    assert np.array_equal(found[0], before[0])
    assert np.array_equal(found[2], before[2])


def test_a_pipeline_without_its_transformer_still_encodes(repository):
    pipe = load(repository, device="cpu", prompt_enhancer=False)
    expected = pipe.encode_prompt("a cat", "cpu")[0]
    pipe.transformer = None
    assert torch.equal(pipe.encode_prompt("a cat", "cpu")[0], expected)


@pytest.mark.gpu
def test_a_pipeline_on_the_cpu_keeps_nothing_on_the_gpu(repository):
    pipe = load(repository, device="cuda", memory="resident")
    pipe.set_progress_bar_config(disable=True)
    settings = {"height": 64, "width": 96, "num_inference_steps": 4, "use_pe": True}
    pipe("a cat", **settings)
    pipe.to("cpu")  # what stays after the first time stays with the process: cuBLAS's workspaces
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        pipe.to("cuda")
        pipe("a cat", **settings)
        pipe.to("cpu")
        assert torch.cuda.memory_allocated() <= before + 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("fast", [True, False])
def test_a_default_device_changes_nothing(repository, memory, fast):
    before = torch.get_default_device()
    expected = draw(loaded(repository, memory, fast=fast))
    torch.set_default_device("cuda")
    try:
        got = draw(loaded(repository, memory, fast=fast))
    finally:
        torch.set_default_device(before)
    assert np.array_equal(got, expected)


@pytest.mark.parametrize(
    "made",
    [
        lambda pipe: ErnieImagePipeline(**pipe.components),
        lambda pipe: ErnieImagePipeline.from_pipe(
            pipe, transformer=pipe.transformer, vae=pipe.vae, torch_dtype=pipe.vae.dtype
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pipeline_of_the_same_parts_draws_the_same(repository, made, dtype):
    pipe = load(repository, device="cpu", dtype=dtype, prompt_enhancer=False)
    other = made(pipe)
    other.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(other), draw(pipe))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_dtype_is_chosen_when_loading(repository, dtype):
    pipe = loaded(repository, device="cpu", dtype=dtype)
    before = draw(pipe)
    for same in (("cpu", dtype), (dtype,)):
        assert pipe.to(*same) is pipe
    assert pipe.to(device="cpu", dtype=dtype) is pipe
    other = torch.float32 if dtype is torch.bfloat16 else torch.bfloat16
    for ways in (((other,), {}), (("cpu", other), {}), ((), {"dtype": other})):
        with pytest.raises(InvalidSettings, match=f"dtype={other}"):
            pipe.to(*ways[0], **ways[1])
    assert np.array_equal(draw(pipe), before)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_draws_on_the_second_gpu_while_the_first_one_is_current(repository, expected, memory):
    pipe = loaded(repository, memory, device="cuda:1")
    assert torch.cuda.current_device() == 0
    allocated = torch.cuda.memory_allocated(0)
    assert np.array_equal(draw(pipe), expected)
    assert np.array_equal(draw(pipe), expected)
    assert torch.cuda.memory_allocated(0) == allocated
    moved = copying.deepcopy(pipe.transformer).to("cuda:0")
    pipe = loaded(repository, "resident", device="cuda:0")
    pipe.transformer = moved
    assert np.array_equal(draw(pipe), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("copied", [copying.deepcopy, lambda part: pickle.loads(pickle.dumps(part))])
def test_a_copied_transformer_draws_in_another_pipeline(repository, expected, memory, copied):
    pipe = loaded(repository, memory)
    draw(pipe)
    twin = copied(pipe.transformer).to("cuda")
    pipe.transformer = None
    other = loaded(repository)
    other.transformer = twin
    assert np.array_equal(draw(other), expected)


@pytest.mark.gpu
def test_a_pickle_is_about_as_large_as_the_weights(repository, memory):
    transformer = loaded(repository, memory).transformer
    assert len(pickle.dumps(transformer)) < 1.5 * transformer.get_memory_footprint() + 2**20


def test_an_unpickled_models_weights_know_how_to_move(repository):
    """torch's pickles forget a parameter's class, and with it what moves the quantization states."""
    pipe = load(repository, device="cpu")
    make_transformer_fast(pipe.transformer, capture_steps=False)
    make_prompt_enhancer_fast(pipe.pe)
    for model in (pipe.transformer, pipe.pe):
        layers = [layer for layer in pickle.loads(pickle.dumps(model)).modules() if isinstance(layer, Linear4bit)]
        assert layers
        assert all(type(layer.weight) is Params4bit for layer in layers)


@pytest.mark.parametrize("stream_blocks", [False, True])
def test_a_compiled_transformer_is_onloaded(repository, stream_blocks, dynamo):
    pipe = loaded(repository, device="cpu")
    expected = draw(pipe)
    make_transformer_fast(pipe.transformer, capture_steps=False)
    enable_offload(pipe, CPU, stream_blocks=stream_blocks)
    compile_transformer(pipe)
    assert np.array_equal(draw(pipe), expected)
    assert np.array_equal(draw(pipe), expected)


# What NF4 can't be offloaded with


@pytest.mark.parametrize(
    "habit",
    [
        lambda pipe: pipe.enable_sequential_cpu_offload(),
        lambda pipe: pipe.enable_group_offload(onload_device=CPU, offload_type="leaf_level"),
        lambda pipe: pipe.transformer.enable_group_offload(onload_device=CPU, offload_type="leaf_level"),
    ],
)
def test_upstreams_offloading_that_breaks_nf4_is_refused_before_anything_is_touched(repository, habit: Callable):
    pipe = loaded(repository, device="cpu")
    make_transformer_fast(pipe.transformer, capture_steps=False)
    before = draw(pipe)
    with pytest.raises(InvalidSettings, match="memory='stream'"):
        habit(pipe)
    assert np.array_equal(draw(pipe), before)


def test_an_original_may_be_offloaded_as_upstream_does(original, monkeypatch, caplog):
    asked = []
    monkeypatch.setattr(ErnieImagePipeline, "enable_sequential_cpu_offload", lambda self: asked.append(self))
    caplog.set_level(logging.ERROR, logger="ernie_image_nf4")
    pipe = loaded(original, device="cpu")
    pipe.enable_sequential_cpu_offload()
    assert asked == [pipe]
