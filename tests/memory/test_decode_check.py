"""A pipeline whose numbers overflow says so once and draws on, whichever code decodes."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, ErnieImagePipeline

from ernie_image_nf4 import load
from ernie_image_nf4.memory.decode_check import DecodeCheck, is_finite, noted
from ernie_image_nf4.memory.vae_tiling import TiledVAE, TilingRuntime, make_vae_tiled

SMALL = {"height": 32, "width": 32, "num_inference_steps": 1, "guidance_scale": 1.0, "use_pe": False}
INF, NAN = float("inf"), float("nan")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Without what may be logged at INFO level."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture(params=["upstream's decode", "tiled"])
def pipe(request: pytest.FixtureRequest, repository: Path) -> ErnieImagePipeline:
    """A pipeline of its own, whose VAE is one of a fast pipeline or isn't."""
    pipe = load(repository, device="cpu", dtype="float32", prompt_enhancer=False)
    pipe.set_progress_bar_config(disable=True)
    if request.param == "tiled":
        make_vae_tiled(pipe.vae)
    assert isinstance(pipe.vae, TiledVAE) == (request.param == "tiled")
    return pipe


def draw(pipe: ErnieImagePipeline, value: float = 1.0, **options: object) -> object:
    """A picture for which the decoder's output is multiplied by `value`."""
    handle = pipe.vae.decoder.register_forward_hook(lambda module, inputs, output: output * value)
    try:
        return pipe("a cat", generator=torch.Generator().manual_seed(0), **SMALL, **options).images
    finally:
        handle.remove()


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_a_picture_that_is_not_finite_is_warned_of_once(pipe, caplog, value):
    assert [len(draw(pipe, value)) for _ in range(2)] == [1, 1]
    (message,) = warnings(caplog)
    assert message.startswith("NaN or infinity in the picture (float32): ")
    assert "dtype" in message


def test_each_pipeline_warns(repository, caplog):
    for _ in range(2):
        pipe = load(repository, device="cpu", dtype="float32", prompt_enhancer=False)
        draw(pipe, NAN)
    assert len(warnings(caplog)) == 2


def test_latents_are_told_from_pictures(pipe, caplog):
    latents = torch.zeros(1, pipe.transformer.config.in_channels, 2, 2)
    latents[0, 0, 0, 0] = INF
    draw(pipe, latents=latents)
    assert [message.partition(" (")[0] for message in warnings(caplog)] == ["NaN or infinity in the latents"]


def test_finite_pictures_are_as_they_were_and_say_nothing(pipe, caplog):
    upstream = ErnieImagePipeline(**pipe.components | {"vae": upstreams(pipe.vae)})
    upstream.set_progress_bar_config(disable=True)
    for kind in ("np", "pil"):
        assert np.array_equal(np.asarray(draw(pipe, output_type=kind)), np.asarray(draw(upstream, output_type=kind)))
    assert warnings(caplog) == []


def upstreams(vae: AutoencoderKLFlux2) -> AutoencoderKLFlux2:
    plain = copy.deepcopy(vae)
    plain.__class__ = AutoencoderKLFlux2
    return plain


def test_who_takes_note_is_told_every_time_and_nothing_is_logged(pipe, caplog):
    for _ in range(2):
        with noted() as notes:
            draw(pipe, NAN)
        assert notes == ["picture"]
    with noted() as notes:
        draw(pipe)
    assert notes == []
    assert warnings(caplog) == []
    draw(pipe, NAN)
    assert len(warnings(caplog)) == 1


def test_notes_are_a_threads_own(pipe, caplog):
    with noted() as notes:
        thread = threading.Thread(target=draw, args=(pipe, NAN))
        thread.start()
        thread.join()
    assert notes == []
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda vae: pickle.loads(pickle.dumps(vae))])
def test_a_copy_warns_itself(pipe, caplog, copied):
    draw(pipe, NAN)
    twin = copied(pipe.vae)
    assert type(twin) is type(pipe.vae)
    assert not twin.runtime.warned
    pipe.vae = twin
    draw(pipe, NAN)
    assert len(warnings(caplog)) == 2


@pytest.mark.parametrize("kind", [DecodeCheck, TilingRuntime])
def test_a_copy_names_the_dtype_that_was_asked_for(kind):
    runtime = kind(dtype=torch.float16, warned=True)
    for twin in (copy.deepcopy(runtime), pickle.loads(pickle.dumps(runtime))):
        assert (twin.dtype, twin.warned) == (torch.float16, False)


def test_it_is_saved_as_upstreams_class(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert '"AutoencoderKLFlux2"' in (tmp_path / "model_index.json").read_text()
    assert type(AutoencoderKLFlux2.from_pretrained(tmp_path / "vae")) is AutoencoderKLFlux2


def test_a_decode_that_is_compiled_whole_is_not_looked_at(repository):
    vae = load(repository, device="cpu", dtype="float32", prompt_enhancer=False).vae
    latents = torch.zeros(1, vae.config.latent_channels, 4, 4)
    with torch.no_grad():
        compiled = torch.compile(vae.decode, fullgraph=True, backend="eager")
        assert torch.equal(compiled(latents)[0], vae.decode(latents)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_one_value_is_enough(dtype, value):
    tensor = torch.full((2, 3, 4, 4), torch.finfo(dtype).max, dtype=dtype)  # a sum of these would overflow
    assert is_finite(tensor)
    tensor[1, 2, 3, 3] = value
    assert not is_finite(tensor)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["resident", "offload", "stream"])
@pytest.mark.parametrize("fast", [True, False])
def test_pipelines_on_a_gpu_warn_once(repository, caplog, memory, fast):
    pipe = load(repository, device="cuda", memory=memory, fast=fast, prompt_enhancer=False)
    for _ in range(2):
        draw(pipe, NAN)
    assert [message.partition(" (")[0] for message in warnings(caplog)] == ["NaN or infinity in the picture"]


@pytest.mark.gpu
def test_a_decode_that_a_cuda_graph_captures_is_not_looked_at(repository):
    vae = load(repository, device="cuda", memory="resident", fast=False, prompt_enhancer=False).vae
    latents = torch.zeros(1, vae.config.latent_channels, 4, 4, dtype=vae.dtype, device="cuda")
    with torch.no_grad():
        expected = vae.decode(latents)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = vae.decode(latents)[0]
        graph.replay()
    assert torch.allclose(captured, expected, atol=0.01)
    assert isinstance(vae.runtime, DecodeCheck)
