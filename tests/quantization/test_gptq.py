"""GPTQ for NF4 lowers the error of a layer's products, in the same format and bytes."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from ernie_image_nf4.fast.ops import nf4_panels
from ernie_image_nf4.quantization.gptq import cholesky, round_weights
from ernie_image_nf4.quantization.scale_search import quantize_nf4
from ernie_image_nf4.repository.nf4_format import QUANT_STATE


def products_error(weight: torch.Tensor, made: tuple, inputs: torch.Tensor, given: torch.Tensor) -> float:
    """Squared error of the products of NF4 with what it is given, beside those of the weight with the right inputs."""
    restored = dequantize_4bit(*made).float()
    return (inputs @ weight.float().T - given @ restored.T).square().sum().item()


def round_weight(weight: torch.Tensor, hessian: torch.Tensor, cross: torch.Tensor, **options: int) -> tuple | None:
    """NF4 of one weight, given the sums of y y' and of x y'."""
    (made,) = round_weights([weight], hessian.clone(), weight.float() @ (cross - hessian), **options)
    return made


@pytest.fixture(scope="module")
def layer() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight (96, 256), correlated inputs (4096, 256), and the same with errors that depend on them."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(256, 256, generator=generator) * torch.linspace(0, 1, 256) ** 2
    inputs = torch.randn(4096, 256, generator=generator) @ mix
    given = inputs + 0.05 * inputs @ torch.randn(256, 256, generator=generator) / 16
    return torch.randn(96, 256, generator=generator).bfloat16(), inputs, given


def test_products_have_less_than_half_the_error_of_searched_scales(layer: tuple) -> None:
    weight, inputs, _ = layer
    hessian = inputs.T @ inputs
    error = products_error(weight, round_weight(weight, hessian, hessian), inputs, inputs)
    assert error < 0.5 * products_error(weight, quantize_nf4(weight), inputs, inputs)


def test_it_makes_up_for_errors_of_the_inputs(layer: tuple) -> None:
    weight, inputs, given = layer
    hessian, cross = given.T @ given, inputs.T @ given
    aware = products_error(weight, round_weight(weight, hessian, cross), inputs, given)
    assert aware < 0.5 * products_error(weight, round_weight(weight, hessian, hessian), inputs, given)


def test_sweeps_lower_the_error_further(layer: tuple) -> None:
    weight, inputs, _ = layer
    hessian = inputs.T @ inputs
    errors = [
        products_error(weight, round_weight(weight, hessian, hessian, sweeps=count), inputs, inputs)
        for count in range(3)
    ]
    assert errors[2] < errors[1] < errors[0]


def test_it_is_nf4_of_the_same_size(layer: tuple) -> None:
    weight, inputs, _ = layer
    hessian = inputs.T @ inputs
    packed, state = round_weight(weight, hessian, hessian)
    expected = quantize_nf4(weight)
    assert packed.shape == expected[0].shape
    assert packed.dtype == expected[0].dtype
    tensors, others = state.as_dict(packed=True), expected[1].as_dict(packed=True)
    assert tensors.keys() == others.keys()
    for name in tensors.keys() - {QUANT_STATE}:
        assert tensors[name].shape == others[name].shape
        assert tensors[name].dtype == others[name].dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_weights_of_other_dtypes(dtype: torch.dtype, layer: tuple) -> None:
    weight, inputs, _ = layer
    hessian = inputs.T @ inputs
    packed, state = round_weight(weight.to(dtype), hessian, hessian)
    assert dequantize_4bit(packed, state).dtype == dtype
    assert torch.equal(packed, round_weight(weight, hessian, hessian)[0])


@pytest.mark.parametrize(
    ("columns", "scale"), [(96, 1.0), (128, 0.0), (128, torch.nan)], ids=["part of a block", "no inputs", "NaN"]
)
def test_what_cannot_be_calibrated_is_left_to_the_scale_search(columns: int, scale: float) -> None:
    hessian = torch.eye(columns) * scale
    assert round_weight(torch.randn(64, columns), hessian, hessian) is None


def test_layers_with_one_input_are_rounded_together_as_each_alone(layer: tuple) -> None:
    weight, inputs, given = layer
    hessian, difference = given.T @ given, (inputs - given).T @ given
    weights = [weight, weight.flip(0) * 2]
    shift = torch.cat([each.float() @ difference for each in weights])
    together = round_weights(weights, hessian.clone(), shift)
    for each, made in zip(weights, together, strict=True):
        (alone,) = round_weights([each], hessian.clone(), each.float() @ difference)
        assert torch.equal(dequantize_4bit(*made), dequantize_4bit(*alone))


@pytest.mark.parametrize("directions", [1, 16, 256], ids=lambda count: f"{count} directions")
def test_float32_does_as_well_as_float64(layer: tuple, directions: int) -> None:
    """Where most of the inputs lie in a few directions, the Hessian is as badly conditioned as damping lets it be."""
    weight = layer[0]
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(4096, directions, generator=generator) @ torch.randn(directions, 256, generator=generator)
    given = inputs + 0.05 * torch.randn(4096, 256, generator=generator)
    hessian, difference = (given.T @ given).double(), ((inputs - given).T @ given).double()
    errors = []
    for dtype in (torch.float32, torch.float64):
        shift = weight.to(dtype) @ difference.to(dtype)
        (made,) = round_weights([weight], hessian.to(dtype), shift)
        errors.append(products_error(weight, made, inputs, given))
    assert cholesky(hessian.float(), 0.01).dtype == torch.float32
    assert errors[0] < 1.01 * errors[1]


def test_a_hessian_that_float32_cannot_factor_is_factored_in_float64() -> None:
    vector = torch.ones(256, dtype=torch.float64)
    hessian = torch.outer(vector, vector)
    hessian.diagonal().add_(1e-9)
    assert cholesky(hessian, 1e-9).dtype == torch.float64
    assert cholesky(torch.eye(256), 1e-9).dtype == torch.float64
    assert cholesky(torch.eye(256), 0.01).dtype == torch.float32


@pytest.mark.gpu
def test_kernels_round_as_plain_torch_does(layer: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs, given = (each.cuda() for each in layer)
    hessian, difference = given.T @ given, (inputs - given).T @ given
    (made,) = round_weights([weight], hessian.clone(), weight.float() @ difference)
    monkeypatch.setattr(nf4_panels, "triton_kernels", lambda *_: None)
    (plain,) = round_weights([weight], hessian.clone(), weight.float() @ difference)
    errors = [products_error(weight, each, inputs, given) for each in (made, plain)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)
    assert (dequantize_4bit(*made) == dequantize_4bit(*plain)).float().mean() > 0.9
