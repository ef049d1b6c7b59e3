"""Products in fp8: what rounding they add, and where they are refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit

from ernie_image_nf4 import fp8, kernels, load
from ernie_image_nf4.benchmark import largest_error, predictions
from ernie_image_nf4.denoising import enable_fast_denoising, several_pictures
from ernie_image_nf4.errors import InvalidSettings
from ernie_image_nf4.fp8 import (
    FP8,
    LARGEST,
    apply_layers,
    apply_to_gelu,
    disable_fp8,
    enable_fp8,
    gelu_times_rows,
    quantize_rows,
    weight_to_fp8,
)
from ernie_image_nf4.layout import MODEL_INDEX
from ernie_image_nf4.nf4 import quantize_nf4

CHECKOUT = Path(__file__).parents[1]
ROUNDING = 2.0**-4  # of a value with four significant bits, relative


def random_weight(rows: int, columns: int, nested: bool, device: str = "cpu"):
    """A weight's codes and state. Its rows are of different sizes, and one is zero."""
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 2, rows)[:, None]
    weight[1] = 0
    weight = weight.to(device, torch.bfloat16)
    return quantize_nf4(weight) if nested else quantize_4bit(weight, quant_type="nf4", compress_statistics=False)


def linear(rows: int = 32, columns: int = 128, bias: bool = False) -> Linear4bit:
    layer = Linear4bit(columns, rows, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4")
    torch.nn.init.normal_(layer.weight, std=0.1)
    return layer.to(torch.bfloat16).to("cpu")


@pytest.fixture
def transformer(repository):
    """A fast transformer in NF4 and bfloat16, on the CPU."""
    transformer = load(repository, device="cpu", dtype="bfloat16", prompt_enhancer=False).transformer
    enable_fast_denoising(transformer)
    return transformer


def predict(transformer, size: int = 64) -> torch.Tensor:
    return predictions(SimpleNamespace(transformer=transformer), size, "cpu")["prediction"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_rounded_to_four_significant_bits_of_their_own_scale(dtype):
    x = (torch.randn(9, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 8, 9)[:, None]).to(dtype)
    rounded, scale = quantize_rows(x)
    assert (rounded.dtype, rounded.shape, scale.dtype, scale.shape) == (FP8, x.shape, torch.float32, (9, 1))
    assert torch.equal(rounded.float().abs().amax(1), torch.full((9,), LARGEST))
    error = (rounded.float() * scale - x.float()).abs()
    assert (error <= x.float().abs() * ROUNDING + scale * 2.0**-10).all()  # small ones have fewer bits


def test_rows_of_zeros_stay_zeros_and_what_is_no_number_stays_none():
    rounded, scale = quantize_rows(torch.tensor([[0.0, 0.0], [1.0, torch.nan]]))
    assert torch.equal(rounded[0].float() * scale[0], torch.zeros(2))
    assert (rounded[1].float() * scale[1]).isnan().any()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (48, 192), (32, 1536)])
def test_weights_become_fp8_from_what_they_stand_for(rows, columns, nested):
    codes, state = random_weight(rows, columns, nested)
    exact = dequantize_4bit(codes, state).float().view(rows, columns)
    weight, scale = weight_to_fp8(codes, state)
    assert (weight.dtype, weight.shape, scale.shape) == (FP8, (rows, columns), (rows, 1))
    error = (weight.float() * scale - exact).abs()
    assert (error <= exact.abs() * (ROUNDING + 2.0**-8) + scale * 2.0**-10).all()  # bfloat16 rounds `exact`
    assert weight.float().abs().max() <= LARGEST


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (48, 192), (32, 1536), (64, 4096), (16, 12288)])
def test_kernels_round_as_plain_torch_does(rows, columns, nested):
    codes, state = random_weight(rows, columns, nested, "cuda")
    expected = fp8._rounded(
        dequantize_4bit(codes, fp8.with_dtype(state, torch.float32)).view(rows, columns),
        fp8.block_scales(state).view(rows, -1).abs().amax(1, keepdim=True),
    )
    x = (
        torch.randn(37, columns, device="cuda", dtype=torch.bfloat16)
        * torch.logspace(-6, 6, 37, device="cuda")[:, None]
    )
    x = x.bfloat16()
    rows_expected = fp8._rounded(x.float(), x.float().abs().amax(1, keepdim=True))
    up = torch.randn(37, columns, device="cuda", dtype=torch.bfloat16)
    product = torch.nn.functional.gelu(x.float()) * up.float()
    for found, wanted in (
        (weight_to_fp8(codes, state), expected),
        (quantize_rows(x), rows_expected),
        (gelu_times_rows(x, up), fp8._rounded(product, product.abs().amax(1, keepdim=True))),
    ):
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-6, atol=0)  # PyTorch multiplies by 1 / 448
        different = found[0].view(torch.uint8) != wanted[0].view(torch.uint8)
        assert different.float().mean() < 1e-3  # where a last bit of float32 decides
        assert ((found[0].float() - wanted[0].float()).abs() <= wanted[0].float().abs() * 2 * ROUNDING + 2.0**-9).all()


def test_a_gelu_is_rounded_once():
    torch.manual_seed(0)
    layer, gate, up = linear(columns=64), torch.randn(2, 3, 64).bfloat16(), torch.randn(2, 3, 64).bfloat16()
    assert torch.equal(apply_to_gelu(gate, up, layer), layer(kernels.gelu_times(gate, up)))
    layer._fp8 = True
    exact = torch.nn.functional.gelu(gate.float()) * up.float()
    rounded, scale = gelu_times_rows(gate[0], up[0])
    assert ((rounded.float() * scale - exact[0]).abs() <= exact[0].abs() * ROUNDING + scale * 2.0**-9).all()
    found = apply_to_gelu(gate, up, layer)
    expected = exact @ dequantize_4bit(layer.weight, layer.weight.quant_state).float().t()
    assert (found.dtype, found.shape) == (torch.bfloat16, expected.shape)
    assert 0 < (found - expected).norm() / expected.norm() < 0.06


def test_attention_in_fp8_needs_no_masks_that_are_there_for_rounding(transformer):
    predict(transformer)
    assert all(mask is not None for mask in transformer._positions[2][0].masks)
    enable_fp8(transformer)
    predict(transformer)
    assert all(mask is None for mask in transformer._positions[2][0].masks)


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_in_fp8_gives_the_same_up_to_rounding(bias):
    torch.manual_seed(0)
    layers = [linear(32, bias=bias), linear(64, bias=bias)]
    x = torch.randn(2, 5, 128).bfloat16()
    expected = apply_layers(x, *layers)
    assert all(torch.equal(out, layer(x)) for out, layer in zip(expected, layers, strict=True))
    layers[0]._fp8 = True
    first, second = apply_layers(x, *layers)
    assert torch.equal(second, expected[1])
    assert (first.dtype, first.shape) == (torch.bfloat16, expected[0].shape)
    assert 0 < (first - expected[0]).float().norm() / expected[0].float().norm() < 0.06


def test_a_row_of_a_product_is_the_same_whichever_others_there_are():
    layer = linear()
    layer._fp8 = True
    x = torch.randn(6, 128).bfloat16()
    (together,) = apply_layers(x, layer)
    (alone,) = apply_layers(x[2:3], layer)
    assert torch.allclose(together[2:3].float(), alone.float(), rtol=2**-7)


def test_only_layers_of_blocks_that_fp8_can_multiply_are_enabled(transformer):
    enable_fp8(transformer)
    enabled = {name for name, module in transformer.named_modules() if name and getattr(module, "_fp8", False)}
    assert enabled
    assert all(name.startswith("layers.") for name in enabled)
    layers = {name for name, module in transformer.named_modules() if isinstance(module, Linear4bit)}
    for name in layers - enabled:
        shape = transformer.get_submodule(name).weight.quant_state.shape
        assert not name.startswith("layers.") or shape[0] % 16 or shape[1] % 64
    disable_fp8(transformer)
    assert not any(getattr(module, "_fp8", False) for module in transformer.modules())


def test_shapes_that_fp8_cannot_multiply_are_left_out(transformer):
    odd = transformer.layers[0].self_attention.to_q = linear(rows=24)
    enable_fp8(transformer)
    assert not getattr(odd, "_fp8", False)


def test_predictions_differ_by_the_rounding_of_fp8(transformer):
    expected = predict(transformer)
    enable_fp8(transformer)
    error = largest_error(predict(transformer), expected)
    assert 0 < error < 0.1  # random weights are small, and blocks add little
    disable_fp8(transformer)
    assert torch.equal(predict(transformer), expected)


def test_weights_take_no_more_memory(transformer):
    def count() -> int:
        return sum(tensor.nbytes for tensor in transformer.state_dict().values())

    before = count()
    enable_fp8(transformer)
    predict(transformer)
    assert count() == before


def test_what_cannot_multiply_in_fp8_is_refused(repository, monkeypatch):
    with pytest.raises(InvalidSettings, match=r"need a CUDA GPU.*leave fp8"):
        load(repository, device="cpu", fp8=True)
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(InvalidSettings, match=r"capability 8\.9 .* an A100 has 8\.0"):
        fp8.check_fp8(device, torch.bfloat16, True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(kernels, "has_triton", lambda device: False)
    with pytest.raises(InvalidSettings, match=r"dtype is torch\.float16"):
        fp8.check_fp8(device, torch.float16, True)
    with pytest.raises(InvalidSettings, match="fast=False"):
        fp8.check_fp8(device, torch.bfloat16, False)
    with pytest.raises(InvalidSettings, match="need Triton"):
        fp8.check_fp8(device, torch.bfloat16, True)
    monkeypatch.setattr(kernels, "has_triton", lambda device: True)
    fp8.check_fp8(device, torch.bfloat16, True)


def test_the_command_line_asks_for_it(command, repository, tmp_path):
    run = command("generate", "a cat", "--model", repository, "-o", tmp_path / "cat.png", "--device", "cpu", "--fp8")
    assert run.code == 1
    assert "fp8" in run.err
    assert not list(tmp_path.iterdir())


# On a GPU


@pytest.fixture(scope="module", params=["checkout", "tiny"])
def model(request) -> Path:
    if request.param == "tiny":
        return request.getfixturevalue("repository")
    if not (CHECKOUT / MODEL_INDEX).exists():
        pytest.skip("this checkout holds no weights")
    return CHECKOUT


def pixels(pipe) -> np.ndarray:
    return pipe(
        "an orange cat on a desk", height=128, width=128, num_inference_steps=4, guidance_scale=4.0, use_pe=False,
        generator=torch.Generator().manual_seed(0), output_type="np",
    ).images[0]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"memory": "offload"}, {"memory": "stream"}, {"compile": True}], ids=str)
def test_fp8_is_the_same_in_every_mode_on_a_gpu(model, options):
    expected = pixels(load(model, memory="resident", prompt_enhancer=False, fp8=True))
    found = pixels(load(model, prompt_enhancer=False, fp8=True, **{"memory": "resident"} | options))
    assert np.array_equal(found, expected)
    assert not np.array_equal(pixels(load(model, memory="resident", prompt_enhancer=False)), expected)


@pytest.mark.gpu
def test_fp8_pictures_are_near_those_of_bfloat16_on_a_gpu():
    if not (CHECKOUT / MODEL_INDEX).exists():
        pytest.skip("this checkout holds no weights")
    one, other = (load(CHECKOUT, memory="resident", prompt_enhancer=False, fp8=fp8) for fp8 in (False, True))
    error = largest_error(predictions(other, 256, "cuda")["prediction"], predictions(one, 256, "cuda")["prediction"])
    assert 1e-3 < error < 0.1
    assert 10 * np.log10(1 / np.square(pixels(one) - pixels(other)).mean()) > 20


@pytest.mark.gpu
def test_fp8_in_a_batch_is_that_of_a_picture_alone_up_to_rounding(model):
    pipe = load(model, memory="resident", prompt_enhancer=False, fp8=True)
    config, device = pipe.transformer.config, "cuda"
    generator = torch.Generator().manual_seed(0)

    def inputs(rows: slice) -> dict[str, torch.Tensor]:
        latents = torch.randn(4, config.in_channels, 8, 8, generator=generator.manual_seed(0))
        text = torch.randn(4, 7, config.text_in_dim, generator=generator)
        return {
            "hidden_states": latents[rows].to(device, torch.bfloat16),
            "timestep": torch.full((len(latents[rows]),), 500.0, device=device, dtype=torch.bfloat16),
            "text_bth": text[rows].to(device, torch.bfloat16),
            "text_lens": torch.full((len(latents[rows]),), 7, device=device),
        }

    with torch.no_grad():
        with several_pictures(pipe.transformer, 2):
            together = pipe.transformer(**inputs(slice(0, 4)), return_dict=False)[0]
        alone = pipe.transformer(**inputs(slice(0, 4, 2)), return_dict=False)[0]
    assert largest_error(together[::2].float()[None], alone.float()[None]) < 1e-2
