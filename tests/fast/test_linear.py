"""Products of a fast block's layers that stay in 16 bits: what is called, and which bits come out."""

from __future__ import annotations

import math
from types import ModuleType, SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit

from ernie_image_nf4.fast import linear
from ernie_image_nf4.fast.subclassing import become


def nf4_layer(device: str, dtype: torch.dtype, bias: bool, rows: int = 64, width: int = 128) -> Linear4bit:
    layer = Linear4bit(width, rows, bias=bias, compute_dtype=dtype, quant_type="nf4", compress_statistics=rows != 96)
    torch.manual_seed(rows)
    layer.load_state_dict({name: torch.randn_like(value) for name, value in layer.state_dict().items()})
    return layer.to(device, dtype).requires_grad_(False)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).float().norm() / expected.float().norm()).item()


ON_EACH_DEVICE = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
    ],
)


@pytest.fixture
def dequantized(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of weights that the kernel dequantized; on a CPU bitsandbytes does it in its place."""
    shapes: list[tuple[int, ...]] = []
    find = linear.elementwise.triton_kernels

    def dequantize(codes: torch.Tensor, state: QuantState, out: torch.Tensor) -> None:
        shapes.append(tuple(state.shape))
        if own := find(codes, linear.DEQUANTIZER):
            own.dequantize(codes, state, out)
        else:
            out.copy_(dequantize_4bit(codes, state))

    def kernels(x: torch.Tensor, module: str) -> ModuleType | SimpleNamespace | None:
        return SimpleNamespace(dequantize=dequantize) if module == linear.DEQUANTIZER else find(x, module)

    monkeypatch.setattr(linear.elementwise, "triton_kernels", kernels)
    return shapes


@pytest.mark.parametrize("bias", [True, False])
@ON_EACH_DEVICE
def test_with_many_rows_the_kernel_dequantizes_and_the_bits_are_bitsandbytes(dequantized, device, dtype, bias):
    layer = nf4_layer(device, dtype, bias)
    with torch.no_grad():
        for rows, expected in ((linear.ROWS, []), (linear.ROWS + 1, [(64, 128)])):
            x = torch.randn(1, rows, 128, device=device, dtype=dtype)
            (found,) = linear.apply_layers(x, layer)
            assert dequantized == expected
            assert torch.equal(found, layer(x))


@ON_EACH_DEVICE
def test_with_a_large_weight_fewer_rows_are_many(dequantized, device, dtype):
    width = math.isqrt(linear.LARGE)
    large, smaller = (nf4_layer(device, dtype, False, rows, width) for rows in (width, width - 64))
    with torch.no_grad():
        for rows, expected in ((linear.ROWS_OF_LARGE, []), (linear.ROWS_OF_LARGE + 1, [(width, width)])):
            x = torch.randn(1, rows, width, device=device, dtype=dtype)
            found, other = (linear.apply_layers(x, layer)[0] for layer in (large, smaller))
            assert dequantized == expected
            assert torch.equal(found, large(x))
            assert torch.equal(other, smaller(x))


def test_a_layer_with_a_hook_is_called_with_many_rows_too(dequantized):
    layer, other = nf4_layer("cpu", torch.float32, bias=False), nf4_layer("cpu", torch.float32, bias=False)
    calls = []
    layer.register_forward_hook(lambda *args: calls.append(1))
    x = torch.randn(linear.ROWS + 1, 128)
    linear.apply_layers(x, layer)
    assert (calls, dequantized) == ([1], [])
    linear.apply_layers(x, other, layer, joined=True)
    assert (calls, dequantized) == ([1, 1], [(64, 128)])


@ON_EACH_DEVICE
def test_joined_layers_are_one_product(dequantized, monkeypatch, device, dtype):
    layers = [nf4_layer(device, dtype, False, rows) for rows in (64, 32, 96)]
    x = torch.randn(1, linear.ROWS + 1, 128, device=device, dtype=dtype)
    expected, products = [layer(x) for layer in layers], []
    multiply = linear.F.linear
    monkeypatch.setattr(linear.F, "linear", lambda *args: (products.append(args[1].shape), multiply(*args))[1])
    with torch.no_grad():
        apart = linear.apply_layers(x, *layers)
        assert len(products) == 3
        joined = linear.apply_layers(x, *layers, joined=True)
    assert products[3:] == [(192, 128)]
    for found, same, wanted in zip(joined, apart, expected, strict=True):
        assert torch.equal(same, wanted)
        assert found.shape == wanted.shape
        assert relative_error(found, wanted) < 1e-2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_joined_layers_in_int8_are_one_product(monkeypatch, device):
    layers = [nf4_layer(device, torch.bfloat16, False, rows) for rows in (64, 32, 96)]
    for layer in layers:
        become(layer, linear.Int8Linear4bit)
    x = torch.randn(1, 37, 128, device=device, dtype=torch.bfloat16)
    apart, products = linear.apply_layers(x, *layers), []
    multiply = linear.eight_bit.scaled_product
    monkeypatch.setattr(
        linear.eight_bit, "scaled_product", lambda *args: (products.append(args[2].shape), multiply(*args))[1]
    )
    joined = linear.apply_layers(x, *layers, joined=True)
    assert products == [(192, 128)]
    assert all(map(torch.equal, joined, apart))  # sums of int8 are exact


def test_layers_with_bias_or_of_several_kinds_stay_apart(dequantized):
    with_bias, without = (nf4_layer("cpu", torch.float32, bias) for bias in (True, False))
    x = torch.randn(linear.ROWS + 1, 128)
    for others in ((with_bias,), (torch.nn.Linear(128, 8, bias=False),)):
        layers = (without, *others)
        dequantized.clear()
        found = linear.apply_layers(x, *layers, joined=True)
        assert dequantized == [(64, 128)] * sum(isinstance(layer, Linear4bit) for layer in layers)
        for out, layer in zip(found, layers, strict=True):
            assert torch.equal(out, layer(x))


@ON_EACH_DEVICE
def test_rows_alone_have_products_of_their_own_of_one_dequantized_weight(dequantized, monkeypatch, device, dtype):
    layer = nf4_layer(device, dtype, bias=False)
    rows = [torch.randn(1, length, 128, device=device, dtype=dtype) for length in (linear.ROWS + 7, linear.ROWS + 1)]
    joined = linear.apply_to_rows(rows, layer)
    dequantized.clear()
    monkeypatch.setattr(linear, "apply_layers", lambda *_: pytest.fail("rows were joined"))
    with torch.no_grad():
        found = linear.apply_to_rows(rows, layer, alone=True)
    assert dequantized == [(64, 128)]
    assert found.shape == (1, 2 * linear.ROWS + 8, 64)
    assert relative_error(found, joined) < 4e-3


@pytest.mark.parametrize(
    ("count", "bias", "alone", "gradients"),
    [(2, True, True, False), (2, False, False, False), (2, False, True, True), (1, False, True, False)],
)
def test_other_rows_share_a_product(monkeypatch, count, bias, alone, gradients):
    layer, rows = nf4_layer("cpu", torch.float32, bias=bias), [torch.randn(1, 5, 128) for _ in range(count)]
    monkeypatch.setattr(linear.torch, "mm", lambda *_, **__: pytest.fail("a row was alone"))
    with torch.set_grad_enabled(gradients):
        found = linear.apply_to_rows(rows, layer, alone=alone)
        assert torch.equal(found, layer(torch.cat(rows, 1)))


def test_under_autocast_a_low_rank_product_is_added_to_the_layers_output():
    layer, x = torch.nn.Linear(128, 64), torch.randn(5, 128)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low_rank = torch.randn(5, 4) @ torch.randn(4, 64)
        expected = low_rank + layer(x)
        assert torch.equal(linear.add_base_product(layer, x, low_rank), expected)
