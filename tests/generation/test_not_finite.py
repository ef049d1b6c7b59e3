"""Numbers that overflow, as float16 makes them on older GPUs: an error that names the cure, and no file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ErnieImagePipeline
from PIL import Image

from ernie_image_nf4 import Row, generate_batch, load
from ernie_image_nf4.errors import NotFinite
from ernie_image_nf4.fast.products import set_products
from ernie_image_nf4.fast.transformer import make_transformer_fast
from ernie_image_nf4.generation.manifest import MANIFEST, read_manifest
from ernie_image_nf4.generation.settings import Settings
from ernie_image_nf4.generation.single import draw, draw_and_save

SMALL = Settings("a cat", "", 32, 48, 2, 4.0, seed=0, use_pe=False)
SIZE = {"height": 32, "width": 32, "steps": 2, "guidance": 1.0, "use_pe": False}

Change = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def changed(module: torch.nn.Module, change: Change) -> Iterator[None]:
    """What a module gives goes through `change` meanwhile."""

    def hook(module: torch.nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def overflow(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * float("inf")


def one_value_too_large(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[7] = float("inf")
    return tensor


FAULTS = [
    pytest.param(lambda pipe: pipe.transformer.layers[1], overflow, "NaN or infinity in the latents", id="a layer"),
    pytest.param(lambda pipe: pipe.transformer, one_value_too_large, "NaN or infinity in the latents", id="one latent"),
    pytest.param(lambda pipe: pipe.vae.decoder, overflow, "NaN or infinity in the picture", id="the decoder"),
    pytest.param(lambda pipe: pipe.vae.decoder, one_value_too_large, "NaN or infinity in the picture", id="one pixel"),
    pytest.param(lambda pipe: pipe.vae.decoder, torch.zeros_like, "Every value of the picture is 12", id="grey"),
]


@pytest.mark.parametrize(("part", "change", "message"), FAULTS)
def test_a_picture_alone_is_an_error_and_the_pipeline_works_on(pipe, tmp_path, caplog, part, change, message):
    expected = np.asarray(draw(pipe, SMALL).image)
    path = tmp_path / "out.png"
    with changed(part(pipe), change), pytest.raises(NotFinite, match=message) as caught:
        list(draw_and_save(pipe, [path], "a cat", seed=0, **SIZE))
    assert str(pipe.transformer.dtype).removeprefix("torch.") in str(caught.value)
    assert "dtype" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert "NaN" not in caplog.text  # the error says it
    assert np.array_equal(np.asarray(draw(pipe, SMALL).image), expected)


@pytest.mark.parametrize(("part", "change", "message"), FAULTS)
def test_a_row_is_recorded_without_a_picture_and_drawn_by_the_next_run(pipe, tmp_path, part, change, message):
    rows = [Row("a cat")]
    with changed(part(pipe), change):
        (record,) = generate_batch(pipe, rows, tmp_path, **SIZE)
    assert record.error.startswith(message)
    assert record.sha256 is None
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]
    assert read_manifest(tmp_path / MANIFEST) == [record]
    (record,) = generate_batch(pipe, rows, tmp_path, **SIZE)
    assert record.error is None
    assert list(generate_batch(pipe, rows, tmp_path, **SIZE)) == []


def test_the_minis_black_picture(tmp_path):
    pipe = load(device="cpu", prompt_enhancer=False)
    with changed(pipe.transformer.layers[3], overflow):
        (record,) = generate_batch(pipe, [Row("a fox", width=128, height=128, steps=2)], tmp_path)
    assert record.error.startswith("NaN or infinity in the latents (")
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("dtype", "way_out"),
    [
        ("float16", 'load with dtype="float32" (--dtype float32), or "bfloat16"'),
        ("bfloat16", 'load with dtype="float32" (--dtype float32)'),
        ("float32", "`ernie-image-nf4 verify`"),
    ],
)
def test_the_way_out_suits_the_dtype(repository, dtype, way_out):
    pipe = load(repository, device="cpu", dtype=dtype, prompt_enhancer=False)
    with changed(pipe.transformer.layers[1], overflow), pytest.raises(NotFinite) as caught:
        draw(pipe, SMALL)
    assert way_out in str(caught.value)
    assert f"({dtype})" in str(caught.value)


def test_without_products_in_eight_bits_there_is_less_to_go_wrong(repository):
    pipe = load(repository, device="cpu", dtype="bfloat16", prompt_enhancer=False)
    make_transformer_fast(pipe.transformer, capture_steps=False)
    set_products(pipe.transformer, "int8")
    with changed(pipe.transformer, overflow), pytest.raises(NotFinite, match="leave out products"):
        draw(pipe, SMALL)


def noise(pipe: ErnieImagePipeline, seed: int) -> torch.Tensor:
    channels = pipe.transformer.config.in_channels
    return torch.randn((channels, 2, 2), generator=torch.Generator().manual_seed(seed)).to(pipe.transformer.dtype)


@pytest.mark.parametrize("spoils_all", [False, True])
def test_one_picture_of_a_batch_costs_its_neighbours_nothing(pipe, tmp_path, spoils_all):
    """Also where kernels mix the rows of a batch, so that all of them are spoilt."""
    rows = [Row("a", seed=6), Row("b", seed=7), Row("c", seed=8)]
    list(generate_batch(pipe, rows, tmp_path / "expected", batch_size=1, **SIZE))
    unlucky, sizes = noise(pipe, 7), []

    def spoil(module: torch.nn.Module, inputs: tuple, options: dict, output: tuple) -> tuple:
        given = options["hidden_states"]
        sizes.append(len(given))
        spoilt = torch.tensor([torch.equal(latents, unlucky) for latents in given])
        if spoils_all and spoilt.any():
            spoilt[:] = True
        return (output[0].masked_fill(spoilt[:, None, None, None], float("nan")),)

    handle = pipe.transformer.register_forward_hook(spoil, with_kwargs=True)
    try:
        records = list(generate_batch(pipe, rows, tmp_path / "out", batch_size=3, **SIZE))
    finally:
        handle.remove()
    assert [record.error and record.error.partition(" (")[0] for record in records] == [
        None, "NaN or infinity in the latents", None,
    ]  # fmt: skip
    assert sizes == [3, 3] + [1, 1] * (3 if spoils_all else 1)
    for name in ("0001-a.png", "0003-c.png"):
        drawn, expected = (
            np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in ("out", "expected")
        )
        assert np.abs(drawn - expected).max() <= 1  # batches round differently
    assert not (tmp_path / "out" / "0002-b.png").exists()


def test_an_enhancer_that_overflows_is_named(repository, tmp_path):
    pipe = load(repository, device="cpu")
    with changed(pipe.pe.lm_head, lambda logits: logits * float("nan")):
        with pytest.raises(NotFinite, match=r"NaN or infinity in the prompt enhancer \("):
            draw(pipe, Settings("a cat", "", 32, 32, 1, 1.0, seed=0))
        (record,) = generate_batch(pipe, [Row("a cat")], tmp_path, **{**SIZE, "use_pe": True})
    assert record.error.startswith("NaN or infinity in the prompt enhancer (")


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["resident", "offload", "stream"])
@pytest.mark.parametrize("fast", [True, False])
def test_on_a_gpu_the_pipeline_works_on(repository, tmp_path: Path, memory, fast):
    pipe = load(repository, device="cuda", memory=memory, fast=fast)
    expected = np.asarray(draw(pipe, SMALL).image)
    for part in (pipe.transformer, pipe.vae.decoder):  # a captured step runs no hooks of its layers
        with changed(part, overflow):
            with pytest.raises(NotFinite):
                draw(pipe, SMALL)
            (record,) = generate_batch(pipe, [Row("a cat")], tmp_path, **SIZE)
            assert record.error.startswith("NaN or infinity")
        assert np.array_equal(np.asarray(draw(pipe, SMALL).image), expected)
