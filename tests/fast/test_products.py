"""Products in int8 and fp8: what rounding they add, and where they are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import test_transformer
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from conftest import captured
from diffusers import ErnieImageTransformer2DModel
from PIL import Image

from ernie_image_nf4 import generate_batch, load
from ernie_image_nf4.benchmarking.predictions import largest_error, predictions
from ernie_image_nf4.errors import InvalidSettings
from ernie_image_nf4.fast import products
from ernie_image_nf4.fast.linear import LAYERS, Int8Linear4bit, apply_layers, apply_to_gelu
from ernie_image_nf4.fast.ops import eight_bit, elementwise
from ernie_image_nf4.fast.ops.eight_bit import FP8, INT8, Format, gelu_times_rows, quantize_rows, quantize_weight
from ernie_image_nf4.fast.ops.rotation import GROUP, hadamard
from ernie_image_nf4.fast.products import find_products, products_of, set_products
from ernie_image_nf4.fast.subclassing import become
from ernie_image_nf4.fast.transformer import TransformerRuntime, make_transformer_fast, several_pictures
from ernie_image_nf4.generation.prompt_file import Row
from ernie_image_nf4.generation.single import draw_and_save
from ernie_image_nf4.quantization.scale_search import quantize_nf4
from ernie_image_nf4.repository.components import MODEL_INDEX
from ernie_image_nf4.repository.nf4_format import block_scales
from ernie_image_nf4.upstream.models import int8_matmul

CHECKOUT = Path(__file__).parents[2]


def cpu_multiplies() -> bool:
    """Whether PyTorch multiplies fp8 on a CPU: 2.11 doesn't yet."""
    values, scale = torch.ones(16, 16).to(FP8.dtype), torch.ones(16, 1)
    try:
        eight_bit.scaled_product(values, scale, values, scale, torch.bfloat16)
    except NotImplementedError:
        return False
    return True


multiplies = pytest.mark.skipif(not cpu_multiplies(), reason="this PyTorch has no products in fp8 on a CPU")
# Each format on a CPU, and on both devices.
FORMATS = [pytest.param(INT8, id="int8"), pytest.param(FP8, marks=multiplies, id="fp8")]
ROUNDINGS = pytest.mark.parametrize("to", [INT8, FP8], ids=lambda to: to.name)
in_each_format = pytest.mark.parametrize("to", FORMATS)
everywhere = pytest.mark.parametrize(
    ("to", "device"),
    [
        pytest.param(INT8, "cpu", id="int8-cpu"),
        pytest.param(FP8, "cpu", marks=multiplies, id="fp8-cpu"),
        *(pytest.param(to, "cuda", marks=pytest.mark.gpu, id=f"{to.name}-cuda") for to in (INT8, FP8)),
    ],
)
FP8_ROUNDING = 2.0**-4  # of a value with four significant bits, relative
# Relative error of a product of values of a normal distribution: at least, at most.
ERRORS = {INT8: (1e-3, 0.02), FP8: (0.02, 0.06)}


def assert_rounded(found: tuple[torch.Tensor, torch.Tensor], exact: torch.Tensor, to: Format, slack: float) -> None:
    """Assert that rows in 8 bits stand for `exact`, (N, H), itself off by up to `slack` of each row's largest."""
    rounded, scale = found
    slack = slack * exact.abs().amax(1, keepdim=True)
    if to.rotated:
        exact = (exact.unflatten(1, (-1, GROUP)) @ hadamard(GROUP, exact.device).float()).flatten(1)
        slack = slack * GROUP**0.5
    error = (rounded.float() * scale - exact).abs()
    # Half the distance to the next number. fp8 has numbers of four significant bits, small ones have fewer.
    allowed = scale * 0.5001 if to is INT8 else exact.abs() * FP8_ROUNDING + scale * 2.0**-10
    assert (error <= allowed + slack).all()


def random_weight(rows: int, columns: int, nested: bool, device: str = "cpu", block_size: int = 64):
    """A weight's codes and state. Its rows are of different sizes, and one is zero."""
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 2, rows)[:, None]
    weight[1] = 0
    weight = weight.to(device, torch.bfloat16)
    if nested:
        return quantize_nf4(weight, block_size=block_size)
    return quantize_4bit(weight, quant_type="nf4", compress_statistics=False, blocksize=block_size)


def linear(rows: int = 32, columns: int = 128, bias: bool = False) -> Linear4bit:
    layer = Linear4bit(columns, rows, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4")
    torch.nn.init.normal_(layer.weight, std=0.1)
    return layer.to(torch.bfloat16).to("cpu")


def build(device: str = "cpu", **options) -> ErnieImageTransformer2DModel:
    """A fast transformer in NF4 and bfloat16, whose blocks make most of what it predicts."""
    transformer = test_transformer.build(
        **{"hidden_size": 128, "num_attention_heads": 2, "ffn_hidden_size": 192, "rope_axes_dim": (16, 24, 24)}
        | options
    ).to(torch.bfloat16)
    for block in transformer.layers:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                parent, _, attribute = name.rpartition(".")
                setattr(block.get_submodule(parent), attribute, in_nf4(layer))
    transformer.to(device)
    make_transformer_fast(transformer, capture_steps=False)
    return transformer


def in_nf4(layer: torch.nn.Linear) -> Linear4bit:
    new = Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    new.load_state_dict(layer.state_dict())
    return new.to(torch.bfloat16).to("cpu")


@pytest.fixture
def transformer() -> ErnieImageTransformer2DModel:
    return build()


@torch.no_grad()
def predict(transformer: ErnieImageTransformer2DModel, lengths: tuple[int, ...] = (3, 7)) -> torch.Tensor:
    call = test_transformer.inputs(str(transformer.device), torch.bfloat16, lengths)
    return transformer(**call).sample.float()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


@ROUNDINGS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_are_rounded_to_eight_bits_of_their_own_scale(dtype, to):
    x = (torch.randn(9, 192, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 9)[:, None]).to(dtype)
    rounded, scale = quantize_rows(x, to)
    assert (rounded.dtype, rounded.shape, scale.dtype, scale.shape) == (to.dtype, x.shape, torch.float32, (9, 1))
    assert torch.equal(rounded.float().abs().amax(1), torch.full((9,), to.largest))
    assert_rounded((rounded, scale), x.float(), to, slack=2.0**-12)


@ROUNDINGS
def test_rows_of_zeros_stay_zeros_and_what_is_no_number_stays_none(to):
    x = torch.zeros(3, GROUP)
    x[1, 0], x[1, 1], x[2, 5] = 1.0, torch.nan, torch.inf
    rounded, scale = quantize_rows(x, to)
    values = rounded.float() * scale
    assert torch.equal(values[0], torch.zeros(GROUP))
    assert values[1].isnan().any()
    assert not values[2].isfinite().all()


@ROUNDINGS
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (48, 192), (32, 1536)])
def test_weights_are_rounded_from_what_they_stand_for(rows, columns, nested, to):
    codes, state = random_weight(rows, columns, nested)
    exact = dequantize_4bit(codes, eight_bit.with_dtype(state, torch.float32)).view(rows, columns)
    weight, scale = quantize_weight(codes, state, to)
    assert (weight.dtype, weight.shape, scale.shape) == (to.dtype, (rows, columns), (rows, 1))
    assert_rounded((weight, scale), exact, to, slack=2.0**-12)
    assert weight.float().abs().max() <= to.largest


# The rotation


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_the_rotation_is_orthogonal_and_its_own_inverse(size):
    matrix = hadamard(size, torch.device("cpu")).float()
    assert torch.equal(matrix, matrix.t())
    assert torch.equal(matrix @ matrix, torch.eye(size))
    assert torch.equal(matrix.abs(), torch.full_like(matrix, size**-0.5))
    assert torch.equal(matrix.sum(1), torch.ones(size))  # a mean stays what it is, and goes to no single value


@multiplies
@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_outliers_cost_little_of_the_others_precision(factor):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(32, 1024, generator=generator), torch.randn(64, 1024, generator=generator)
    x[:, ::300] *= factor
    exact = x @ weight.t()

    def error(to: Format) -> float:
        (x_values, x_scale), (values, scale) = (quantize_rows(each, to) for each in (x, weight))
        dtype = torch.bfloat16 if to is FP8 else torch.float32
        return relative_error(eight_bit.scaled_product(x_values, x_scale, values, scale, dtype), exact)

    plain = Format("plain int8", torch.int8, 127.0, rotated=False)
    assert error(INT8) < 0.025
    assert error(INT8) < error(FP8) / (2.5 if factor == 1 else 1.5)
    assert error(plain) < 0.025 if factor == 1 else error(plain) > 3 * error(INT8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 37])
def test_sums_of_int8_are_exact(rows, dtype, monkeypatch):
    monkeypatch.setattr(eight_bit, "ROWS_AT_ONCE", 16)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-127, 128, (count, 12288), generator=generator).to(torch.int8) for count in (rows, 16))
    scale, weight_scale = (torch.rand(count, 1, generator=generator) + 0.5 for count in (rows, 16))
    exact = (x.double() @ weight.double().t()).float() * scale * weight_scale.t()
    assert torch.equal(eight_bit.scaled_product(x, scale, weight, weight_scale, dtype), exact.to(dtype))


def test_without_the_library_s_product_sums_are_exact_too(monkeypatch):
    x, weight = torch.full((2, 64), 127, dtype=torch.int8), torch.full((64, 16), -127, dtype=torch.int8)
    expected = int8_matmul(x, weight)
    monkeypatch.delattr(torch, "_int_mm")
    found = int8_matmul(x, weight)
    assert (found.dtype, found.tolist()) == (torch.int32, expected.tolist())
    assert found[0, 0] == -64 * 127**2


# Kernels


@pytest.mark.gpu
@ROUNDINGS
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("block_size", [64, 32, 256])
@pytest.mark.parametrize(("rows", "columns"), [(16, 256), (48, 768), (32, 1536), (64, 4096), (16, 12288)])
def test_kernels_round_as_plain_torch_does(rows, columns, block_size, nested, to):
    codes, state = random_weight(rows, columns, nested, "cuda", block_size)
    expected = eight_bit.round_rows(
        dequantize_4bit(codes, eight_bit.with_dtype(state, torch.float32)).view(rows, columns),
        to,
        block_scales(state).view(rows, -1).abs().amax(1, keepdim=True),
    )
    x = torch.randn(37, columns, device="cuda") * torch.logspace(-6, 6, 37, device="cuda")[:, None]
    x = x.bfloat16()
    up = torch.randn(columns, 37, device="cuda", dtype=torch.bfloat16).t()  # not contiguous
    product = torch.nn.functional.gelu(x.float()) * up.float()
    for found, wanted in (
        (quantize_weight(codes, state, to), expected),
        (quantize_rows(x, to), eight_bit.round_rows(x.float(), to)),
        (gelu_times_rows(x, up, to), eight_bit.round_rows(product, to)),
    ):
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-5 if to.rotated else 1e-6, atol=0)
        mine, theirs = found[0].float(), wanted[0].float()
        assert (mine != theirs).float().mean() < 1e-3  # where a last bit of float32 decides
        next_one = 1.0 if to is INT8 else theirs.abs() * 2 * FP8_ROUNDING + 2.0**-9
        assert ((mine - theirs).abs() <= next_one).all()


@pytest.mark.gpu
@ROUNDINGS
@pytest.mark.parametrize("width", [128, 768, 4096])
def test_norms_are_rounded_as_by_plain_torch(monkeypatch, width, to):
    torch.manual_seed(0)
    x, branch = (torch.randn(1, 37, width, device="cuda").bfloat16() for _ in range(2))
    gate, scale, shift = (torch.randn(2, width, device="cuda").bfloat16() for _ in range(3))
    weight, rows = torch.rand(width, device="cuda").bfloat16(), torch.arange(37, device="cuda") // 20
    arguments = (x, branch, gate, weight, scale, shift, 1e-5, rows, to)
    total, found = eight_bit.gated_add_norm_rows(*arguments)
    alone = eight_bit.modulated_norm_rows(total, *arguments[3:])
    for module in (eight_bit, elementwise):
        monkeypatch.setattr(module, "triton_kernels", lambda *_: None)
    expected_total, expected = eight_bit.gated_add_norm_rows(*arguments)
    assert torch.equal(total, expected_total)
    assert all(map(torch.equal, alone.rounded, found.rounded))
    torch.testing.assert_close(found.rounded[1], expected.rounded[1], rtol=1e-5, atol=0)
    mine, theirs = found.rounded[0].float(), expected.rounded[0].float()
    assert (mine != theirs).float().mean() < 2e-3  # where a last bit of float32 decides
    assert ((mine - theirs).abs() <= (1.0 if to is INT8 else theirs.abs() * 2 * FP8_ROUNDING + 2.0**-9)).all()


@in_each_format
def test_norms_of_a_block_are_in_eight_bits_only(monkeypatch, transformer, to):
    make_transformer_fast(transformer, capture_steps=False)
    set_products(transformer, to.name)
    expected, calls, quantize_parts = predict(transformer), [], eight_bit.quantize_parts

    def counted(parts: list[torch.Tensor], to: Format) -> eight_bit.RoundedTokens:
        calls.append(len(parts))
        return quantize_parts(parts, to)

    for name in ("modulated_norm", "gated_add_norm"):
        monkeypatch.setattr(elementwise, name, lambda *args: pytest.fail("a norm in 16 bits"))
    monkeypatch.setattr(eight_bit, "quantize_rows", lambda *args: pytest.fail("rounded from 16 bits"))
    monkeypatch.setattr(eight_bit, "quantize_parts", counted)
    assert torch.equal(predict(transformer), expected)
    assert len(calls) == len(transformer.layers)  # what attention gives
    assert min(calls) > 1


@in_each_format
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_parts_are_rounded_as_the_whole(to, device):
    generator = torch.Generator(device).manual_seed(0)
    parts = [torch.randn(1, length, 256, generator=generator, device=device).bfloat16() for length in (5, 1, 18)]
    found, whole = eight_bit.quantize_parts(parts, to), torch.cat(parts, 1)
    assert (found.shape, found.to, found.dtype) == (whole.shape, to, whole.dtype)
    for part, expected in zip(found.rounded, quantize_rows(whole[0], to), strict=True):
        assert torch.equal(part, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 37, 2200])
@pytest.mark.parametrize(("columns", "width"), [(48, 192), (4096, 4096), (12288, 4096), (4096, 12288)])
def test_the_kernel_multiplies_int8_to_the_bit(rows, columns, width, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    x, weight = (
        torch.randint(-127, 128, (count, width), generator=generator, device="cuda", dtype=torch.int8)
        for count in (rows, columns)
    )
    scale, weight_scale = (torch.rand(count, 1, generator=generator, device="cuda") for count in (rows, columns))
    expected = (int8_matmul(x, weight.t()).float() * scale * weight_scale.t()).to(dtype)
    assert torch.equal(eight_bit.scaled_product(x, scale, weight, weight_scale, dtype), expected)


@in_each_format
def test_a_gelu_is_rounded_once(to):
    torch.manual_seed(0)
    layer, gate, up = linear(columns=64), torch.randn(2, 3, 64).bfloat16(), torch.randn(2, 3, 64).bfloat16()
    assert torch.equal(apply_to_gelu(gate, up, layer), layer(elementwise.gelu_times(gate, up)))
    become(layer, LAYERS[to.name])
    exact = torch.nn.functional.gelu(gate.float()) * up.float()
    assert_rounded(gelu_times_rows(gate[0], up[0], to), exact[0], to, slack=2.0**-12)
    found = apply_to_gelu(gate, up, layer)
    expected = exact @ dequantize_4bit(layer.weight, layer.weight.quant_state).float().t()
    assert (found.dtype, found.shape) == (torch.bfloat16, expected.shape)
    assert 0 < relative_error(found, expected) < ERRORS[to][1]


@in_each_format
def test_attention_in_eight_bits_needs_no_masks_that_are_there_for_rounding(transformer, to):
    make_transformer_fast(transformer, capture_steps=False, exact=True)
    predict(transformer)
    assert all(mask is not None for mask in transformer.runtime.positions[2][0].masks)
    set_products(transformer, to.name)
    predict(transformer)
    assert all(mask is None for mask in transformer.runtime.positions[2][0].masks)


@everywhere
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 37, 300])
def test_a_layer_in_eight_bits_gives_the_same_up_to_rounding(to, device, bias, rows):
    torch.manual_seed(0)
    layers = [linear(32, bias=bias).to(device), linear(64, bias=bias).to(device)]
    x = torch.randn(2, rows, 128).to(device, torch.bfloat16)
    expected = apply_layers(x, *layers)
    assert all(torch.equal(out, layer(x)) for out, layer in zip(expected, layers, strict=True))
    become(layers[0], LAYERS[to.name])
    first, second = apply_layers(x, *layers)
    assert torch.equal(second, expected[1])
    assert (first.dtype, first.shape) == (torch.bfloat16, expected[0].shape)
    least, most = ERRORS[to]
    assert least < relative_error(first, expected[0]) < most


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_int8_gives_the_dtype_of_its_input(device, dtype):
    torch.manual_seed(0)
    layer = linear(32, bias=True).to(device)
    x, up = torch.randn(2, 37, 128).to(device, dtype), torch.randn(2, 37, 128).to(device, dtype)
    weight = dequantize_4bit(layer.weight, layer.weight.quant_state).float()
    become(layer, Int8Linear4bit)
    for found, exact in (
        (apply_layers(x, layer)[0], x.float()),
        (apply_to_gelu(x, up, layer), torch.nn.functional.gelu(x.float()) * up.float()),
    ):
        assert found.dtype == dtype
        assert relative_error(found, exact @ weight.t() + layer.bias.float()) < ERRORS[INT8][1]


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=multiplies), pytest.param("cuda", marks=pytest.mark.gpu)])
def test_sums_cost_little_beside_the_rounding_to_fp8(device):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 12288, generator=generator).to(device) for rows in (32, 64))
    x, x_scale = quantize_rows(x * torch.logspace(-3, 3, 32, device=device)[:, None], FP8)
    weight, weight_scale = quantize_rows(weight, FP8)
    exact = (x.double() * x_scale.double()) @ (weight.double() * weight_scale.double()).t()
    found = eight_bit.scaled_product(x, x_scale, weight, weight_scale, torch.bfloat16).double()
    assert ((found - exact).norm(dim=1) / exact.norm(dim=1)).max() < 0.005


@in_each_format
def test_a_row_of_a_product_is_the_same_whichever_others_there_are(to):
    layer = linear()
    become(layer, LAYERS[to.name])
    x = torch.randn(6, 128).bfloat16()
    (together,) = apply_layers(x, layer)
    (alone,) = apply_layers(x[2:3], layer)
    assert relative_error(together[2:3], alone) < 2.0**-8
    assert relative_error(together[3:4], alone) > 0.5


@ROUNDINGS
def test_only_layers_of_blocks_are_chosen(transformer, to):
    set_products(transformer, to.name)
    assert products_of(transformer) == to.name
    chosen = {name for name, module in transformer.named_modules() if type(module) is LAYERS[to.name]}
    assert chosen == {name for name, module in transformer.named_modules() if isinstance(module, Linear4bit)}
    set_products(transformer, to.name)  # again
    assert products_of(transformer) == to.name
    set_products(transformer, None)
    assert products_of(transformer) is None
    assert not any(type(module) in LAYERS.values() for module in transformer.modules())


def test_one_format_takes_the_place_of_the_other(transformer):
    for name in ("int8", "fp8", "int8"):
        set_products(transformer, name)
        assert type(transformer.layers[0].mlp.linear_fc2) is LAYERS[name]
        assert products_of(transformer) == name


@ROUNDINGS
@pytest.mark.parametrize(("rows", "columns"), [(24, 128), (128, 96), (128, 200), (16, eight_bit.MAX_WIDTH + 64)])
def test_shapes_that_eight_bits_cannot_multiply_are_left_out(transformer, rows, columns, to):
    odd = transformer.layers[0].self_attention.to_q = linear(rows, columns)
    set_products(transformer, to.name)
    assert type(odd) is Linear4bit
    assert type(transformer.layers[1].self_attention.to_q) is LAYERS[to.name]


@everywhere
def test_predictions_differ_by_the_rounding_of_the_format(to, device):
    transformer = build(device)
    expected = predict(transformer)
    set_products(transformer, to.name)
    assert 1e-3 < relative_error(predict(transformer), expected) < (0.03 if to is INT8 else 0.1)
    for layer in transformer.layers:
        layer.mlp.linear_fc2.weight.quant_state.absmax.zero_()  # which shows how much depends on the products
    assert relative_error(predict(transformer), expected) > 0.2


@everywhere
def test_bfloat16_comes_back_to_the_bit(to, device):
    transformer = build(device)
    expected = predict(transformer)
    set_products(transformer, to.name)
    predict(transformer)
    set_products(transformer, None)
    assert torch.equal(predict(transformer), expected)


def test_a_step_captured_with_other_products_is_freed(transformer):
    make_transformer_fast(transformer, capture_steps=True)
    for change in ("fp8", "int8", None):
        memory = captured(transformer)
        set_products(transformer, change)
        assert memory() is None


@in_each_format
def test_nothing_is_kept_of_the_weights_in_eight_bits(transformer, to):
    before = {name: set(vars(module)) for name, module in transformer.named_modules()}
    set_products(transformer, to.name)
    predict(transformer)
    for name, module in transformer.named_modules():
        assert vars(module).keys() - before[name] <= {"__module__"}


@in_each_format
def test_a_copy_keeps_its_products_with_weights_of_its_own(transformer, to):
    set_products(transformer, to.name)
    expected = predict(transformer)
    twin = copy.deepcopy(transformer)
    for layer in transformer.layers:
        layer.mlp.linear_fc2.weight.quant_state.absmax.zero_()
    assert products_of(twin) == to.name
    assert torch.equal(predict(twin), expected)
    set_products(twin, None)
    assert not torch.equal(predict(twin), expected)
    assert products_of(transformer) == to.name


class Adapter(torch.nn.Module):
    """A layer that an adapter has taken the place of, as PEFT's do."""

    def __init__(self, base_layer: Linear4bit) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + 1


@in_each_format
def test_adapters_and_hooks_are_called(transformer, to):
    set_products(transformer, to.name)
    x = torch.randn(1, 3, 128).bfloat16()
    query, key = transformer.layers[0].self_attention.to_q, transformer.layers[0].self_attention.to_k
    assert torch.equal(apply_layers(x, Adapter(query))[0], query(x) + 1)
    called = []
    handle = key.register_forward_hook(lambda *_: called.append(True))
    assert torch.equal(apply_layers(x, key)[0], key(x))
    assert len(called) == 2
    handle.remove()
    assert not torch.equal(apply_layers(x, key)[0], key(x))


GPU = torch.device("cuda", 0)


def give_gpu(monkeypatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "a specification")


def test_the_dtype_of_the_weights_is_what_is_multiplied_in_unless_asked(monkeypatch):
    give_gpu(monkeypatch, (9, 0))
    for dtype in (torch.bfloat16, torch.float32):
        assert find_products("auto", GPU, dtype, fast=True) is None
    assert find_products("bfloat16", torch.device("cpu"), torch.bfloat16, fast=False) is None
    with pytest.raises(
        InvalidSettings,
        match=r"need dtype='bfloat16' \(--dtype bfloat16\), here it is torch\.float16: ask for it, or leave products",
    ):
        find_products("bfloat16", GPU, torch.float16, fast=True)


def test_what_is_no_format_is_refused_and_named():
    with pytest.raises(InvalidSettings, match="'int4' are none of auto, bfloat16, int8, fp8"):
        find_products("int4", GPU, torch.bfloat16, fast=True)


@ROUNDINGS
def test_eight_bits_where_there_are_none_are_refused(repository, to):
    with pytest.raises(InvalidSettings, match=rf"{to.name} need a CUDA GPU.*leave products"):
        load(repository, device="cpu", products=to.name)
    with pytest.raises(InvalidSettings, match="fast=False"):
        find_products(to.name, GPU, torch.bfloat16, fast=False)


@pytest.mark.parametrize(
    ("to", "capability", "least"), [(INT8, (7, 0), r"7\.5 \(RTX 20"), (FP8, (8, 6), r"8\.9 \(RTX 40")]
)
def test_cards_too_old_for_a_format_are_refused(monkeypatch, to, capability, least):
    give_gpu(monkeypatch, capability)
    with pytest.raises(InvalidSettings, match=rf"capability {least}.* a card has {capability[0]}\.{capability[1]}"):
        find_products(to.name, GPU, torch.bfloat16, fast=True)


def test_int8_is_for_every_dtype_and_fp8_for_bfloat16_and_triton(monkeypatch):
    give_gpu(monkeypatch, (8, 9))
    monkeypatch.setattr(products, "_try_product", lambda *arguments: None)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert find_products("int8", GPU, dtype, fast=True) == "int8"
    with pytest.raises(InvalidSettings, match=r"dtype is torch\.float16"):
        find_products("fp8", GPU, torch.float16, fast=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert find_products("int8", GPU, torch.bfloat16, fast=True) == "int8"
    with pytest.raises(InvalidSettings, match="need Triton"):
        find_products("fp8", GPU, torch.bfloat16, fast=True)


@pytest.mark.parametrize("kind", [RuntimeError, Exception])  # Triton's errors are no RuntimeErrors
@ROUNDINGS
def test_a_product_that_pytorch_was_built_without_is_refused(monkeypatch, to, kind):
    def fail(*arguments):
        raise kind("Not currently supported on your device\nC++ stack")

    give_gpu(monkeypatch, (8, 9))
    monkeypatch.setattr(products, "_try_product", fail)
    with pytest.raises(InvalidSettings, match=rf"no products in {to.name} for a card \(Not.*your device\): leave"):
        find_products(to.name, GPU, torch.bfloat16, fast=True)


@in_each_format
def test_the_product_that_is_tried_is_one_that_works(to):
    products._try_product(to.name, torch.device("cpu"), torch.bfloat16)


@ROUNDINGS
def test_a_transformer_that_would_not_multiply_in_eight_bits_is_refused(to):
    upstream = test_transformer.build().to(torch.bfloat16)
    with pytest.raises(InvalidSettings, match="fast forward pass"):
        set_products(upstream, to.name)
    make_transformer_fast(upstream, capture_steps=False)
    with pytest.raises(InvalidSettings, match="No layer"):
        set_products(upstream, to.name)  # its weights aren't in NF4
    assert products_of(upstream) is None
    heads_of_48 = test_transformer.build(hidden_size=192, num_attention_heads=4, rope_axes_dim=(16, 16, 16))
    heads_of_48.to(torch.bfloat16)
    make_transformer_fast(heads_of_48, capture_steps=False)  # which leaves it as it is
    with pytest.raises(InvalidSettings, match="fast forward pass"):
        set_products(heads_of_48, to.name)


def test_fp8_needs_a_transformer_in_bfloat16():
    with pytest.raises(InvalidSettings, match=r"transformer's dtype is torch\.float32"):
        set_products(test_transformer.build(), "fp8")


def test_the_former_argument_stands_for_fp8_and_says_so(repository):
    for given in ({}, {"products": "fp8"}):
        with (
            pytest.warns(DeprecationWarning, match="now products='fp8'") as caught,
            pytest.raises(InvalidSettings, match="fp8 need a CUDA GPU"),
        ):
            load(repository, device="cpu", fp8=True, **given)
        assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="now"), pytest.raises(InvalidSettings, match="contradict"):
        load(repository, device="cpu", fp8=True, products="int8")
    with pytest.warns(DeprecationWarning, match="now"):
        pipe = load(repository, device="cpu", fp8=False, prompt_enhancer=False)
    assert products_of(pipe.transformer) is None


@in_each_format
def test_pictures_say_what_they_were_made_in_and_others_are_not_taken_for_them(repository, tmp_path, to):
    pipe = load(repository, device="cpu", dtype="bfloat16", prompt_enhancer=False)
    settings = {"height": 32, "width": 32, "steps": 1}
    (plain,) = generate_batch(pipe, [Row("a cat")], tmp_path, **settings)
    make_transformer_fast(pipe.transformer, capture_steps=False)
    set_products(pipe.transformer, to.name)
    (record,) = generate_batch(pipe, [Row("a cat")], tmp_path, **settings)  # the other one doesn't count as finished
    assert (plain.products, record.products) == (None, to.name)
    assert json.loads((tmp_path / "manifest.jsonl").read_text())["products"] == to.name
    with Image.open(tmp_path / record.file) as image:
        assert image.text["products"] == to.name
    assert list(generate_batch(pipe, [Row("a cat")], tmp_path, **settings)) == []
    (drawing, _), *_ = draw_and_save(pipe, [tmp_path / "cat.png"], "a cat", seed=0, **settings)
    assert drawing.products == to.name


@pytest.mark.parametrize("options", [["--products", "int8"], ["--products", "fp8"], ["--fp8"]])
def test_the_command_line_asks_for_them(command, repository, tmp_path, options):
    run = command("generate", "a cat", "--model", repository, "-o", tmp_path / "cat.png", "--device", "cpu", *options)
    assert run.code == 1
    assert f"Products in {options[1] if len(options) > 1 else 'fp8'} need a CUDA GPU" in run.err
    assert ("--fp8 is now --products fp8" in run.err) == (options == ["--fp8"])
    assert not list(tmp_path.iterdir())


def test_the_former_option_contradicts_other_products(command, tmp_path):
    run = command("generate", "a cat", "-o", tmp_path / "cat.png", "--fp8", "--products", "int8")
    assert run.code == 2
    assert "contradicts --products int8" in run.err


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
@ROUNDINGS
@pytest.mark.parametrize("memory", ["offload", "stream"])
def test_eight_bits_are_the_same_in_every_mode_on_a_gpu(model, memory, to):
    expected = pixels(load(model, memory="resident", prompt_enhancer=False, products=to.name))
    found = pixels(load(model, memory=memory, prompt_enhancer=False, products=to.name))
    assert np.array_equal(found, expected)
    assert not np.array_equal(pixels(load(model, memory="resident", prompt_enhancer=False)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 37, 2200])
def test_products_by_the_public_function_are_those_of_the_private_one_to_the_bit(rows):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(count, 4096, generator=generator).cuda() for count in (rows, 12288))
    (x, x_scale), (weight, weight_scale) = (quantize_rows(each, FP8) for each in (x, weight))
    expected = torch._scaled_mm(
        x, weight.t(), scale_a=x_scale, scale_b=weight_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )
    assert torch.equal(eight_bit.scaled_product(x, x_scale, weight, weight_scale, torch.bfloat16), expected)


@pytest.mark.gpu
@ROUNDINGS
def test_a_captured_step_gives_way_when_products_change(to):
    transformer = build("cuda")
    transformer.runtime = TransformerRuntime(capture_steps=True)
    call = test_transformer.inputs("cuda", torch.bfloat16, (3, 7))
    with torch.no_grad():
        expected = [transformer(**call).sample for _ in range(3)][-1]
        set_products(transformer, to.name)
        different = [transformer(**call).sample for _ in range(3)]
        set_products(transformer, None)
        assert torch.equal(transformer(**call).sample, expected)
    assert all(torch.equal(each, different[0]) for each in different)
    assert not torch.equal(different[0], expected)


@pytest.mark.gpu
@ROUNDINGS
def test_pictures_in_eight_bits_are_near_those_of_bfloat16_on_a_gpu(to):
    if not (CHECKOUT / MODEL_INDEX).exists():
        pytest.skip("this checkout holds no weights")
    one, other = (load(CHECKOUT, memory="resident", prompt_enhancer=False, products=name) for name in ("auto", to.name))
    error = largest_error(predictions(other, 256, "cuda")["prediction"], predictions(one, 256, "cuda")["prediction"])
    assert 1e-3 < error < (0.03 if to is INT8 else 0.1)
    assert 10 * np.log10(1 / np.square(pixels(one) - pixels(other)).mean()) > 20


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_int8_draws_in_other_dtypes_on_a_gpu(model, dtype):
    plain, found = (
        pixels(load(model, memory="resident", prompt_enhancer=False, dtype=dtype, products=name))
        for name in ("auto", "int8")
    )
    assert not np.array_equal(plain, found)
    assert 10 * np.log10(1 / np.square(plain - found).mean()) > 20


@pytest.mark.gpu
@ROUNDINGS
def test_eight_bits_in_a_batch_are_those_of_a_picture_alone_up_to_rounding(model, to):
    pipe = load(model, memory="resident", prompt_enhancer=False, products=to.name)
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
