"""Products in fp8: what rounding they add, and where they are refused."""

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
from ernie_image_nf4.fast.linear import Fp8Linear4bit, apply_layers, apply_to_gelu
from ernie_image_nf4.fast.ops import elementwise, fp8
from ernie_image_nf4.fast.ops.fp8 import FP8, LARGEST, gelu_times_rows, quantize_rows, weight_to_fp8
from ernie_image_nf4.fast.products import disable_fp8, enable_fp8, is_in_fp8
from ernie_image_nf4.fast.subclassing import become
from ernie_image_nf4.fast.transformer import TransformerRuntime, make_transformer_fast, several_pictures
from ernie_image_nf4.generation.prompt_file import Row
from ernie_image_nf4.generation.single import draw_and_save
from ernie_image_nf4.quantization.scale_search import quantize_nf4
from ernie_image_nf4.repository.components import MODEL_INDEX
from ernie_image_nf4.repository.nf4_format import block_scales

CHECKOUT = Path(__file__).parents[2]


def cpu_multiplies() -> bool:
    """Whether PyTorch multiplies fp8 on a CPU: 2.11 doesn't yet."""
    values, scale = torch.ones(16, 16).to(FP8), torch.ones(16, 1)
    try:
        fp8.scaled_product(values, scale, values, scale)
    except NotImplementedError:
        return False
    return True


multiplies = pytest.mark.skipif(not cpu_multiplies(), reason="this PyTorch has no products in fp8 on a CPU")
DEVICES = [pytest.param("cpu", marks=multiplies), pytest.param("cuda", marks=pytest.mark.gpu)]
ROUNDING = 2.0**-4  # of a value with four significant bits, relative


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
@pytest.mark.parametrize("block_size", [64, 32, 256])
@pytest.mark.parametrize(("rows", "columns"), [(16, 256), (48, 768), (32, 1536), (64, 4096), (16, 12288)])
def test_kernels_round_as_plain_torch_does(rows, columns, block_size, nested):
    codes, state = random_weight(rows, columns, nested, "cuda", block_size)
    expected = fp8.divide_rows(
        dequantize_4bit(codes, fp8.with_dtype(state, torch.float32)).view(rows, columns),
        block_scales(state).view(rows, -1).abs().amax(1, keepdim=True),
    )
    x = (
        torch.randn(37, columns, device="cuda", dtype=torch.bfloat16)
        * torch.logspace(-6, 6, 37, device="cuda")[:, None]
    )
    x = x.bfloat16()
    rows_expected = fp8.divide_rows(x.float(), x.float().abs().amax(1, keepdim=True))
    up = torch.randn(columns, 37, device="cuda", dtype=torch.bfloat16).t()  # not contiguous
    product = torch.nn.functional.gelu(x.float()) * up.float()
    for mine, theirs in zip(quantize_rows(x), rows_expected, strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
    for found, wanted in (
        (weight_to_fp8(codes, state), expected),
        (gelu_times_rows(x, up), fp8.divide_rows(product, product.abs().amax(1, keepdim=True))),
    ):
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-6, atol=0)
        different = found[0].view(torch.uint8) != wanted[0].view(torch.uint8)
        assert different.float().mean() < 1e-3  # where a last bit of float32 decides
        assert ((found[0].float() - wanted[0].float()).abs() <= wanted[0].float().abs() * 2 * ROUNDING + 2.0**-9).all()


@multiplies
def test_a_gelu_is_rounded_once():
    torch.manual_seed(0)
    layer, gate, up = linear(columns=64), torch.randn(2, 3, 64).bfloat16(), torch.randn(2, 3, 64).bfloat16()
    assert torch.equal(apply_to_gelu(gate, up, layer), layer(elementwise.gelu_times(gate, up)))
    become(layer, Fp8Linear4bit)
    exact = torch.nn.functional.gelu(gate.float()) * up.float()
    rounded, scale = gelu_times_rows(gate[0], up[0])
    assert ((rounded.float() * scale - exact[0]).abs() <= exact[0].abs() * ROUNDING + scale * 2.0**-9).all()
    found = apply_to_gelu(gate, up, layer)
    expected = exact @ dequantize_4bit(layer.weight, layer.weight.quant_state).float().t()
    assert (found.dtype, found.shape) == (torch.bfloat16, expected.shape)
    assert 0 < (found - expected).norm() / expected.norm() < 0.06


@multiplies
def test_attention_in_fp8_needs_no_masks_that_are_there_for_rounding(transformer):
    make_transformer_fast(transformer, capture_steps=False, exact=True)
    predict(transformer)
    assert all(mask is not None for mask in transformer.runtime.positions[2][0].masks)
    enable_fp8(transformer)
    predict(transformer)
    assert all(mask is None for mask in transformer.runtime.positions[2][0].masks)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 37, 300])
def test_a_layer_in_fp8_gives_the_same_up_to_rounding(device, bias, rows):
    torch.manual_seed(0)
    layers = [linear(32, bias=bias).to(device), linear(64, bias=bias).to(device)]
    x = torch.randn(2, rows, 128).to(device, torch.bfloat16)
    expected = apply_layers(x, *layers)
    assert all(torch.equal(out, layer(x)) for out, layer in zip(expected, layers, strict=True))
    become(layers[0], Fp8Linear4bit)
    first, second = apply_layers(x, *layers)
    assert torch.equal(second, expected[1])
    assert (first.dtype, first.shape) == (torch.bfloat16, expected[0].shape)
    assert 1e-3 < relative_error(first, expected[0]) < 0.06


@pytest.mark.parametrize("device", DEVICES)
def test_sums_cost_little_beside_the_rounding_to_fp8(device):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 12288, generator=generator).to(device) for rows in (32, 64))
    (x, x_scale), (weight, weight_scale) = map(
        quantize_rows, (x * torch.logspace(-3, 3, 32, device=device)[:, None], weight)
    )
    exact = (x.double() * x_scale.double()) @ (weight.double() * weight_scale.double()).t()
    found = fp8.scaled_product(x, x_scale, weight, weight_scale).double()
    assert ((found - exact).norm(dim=1) / exact.norm(dim=1)).max() < 0.005


@multiplies
def test_a_row_of_a_product_is_the_same_whichever_others_there_are():
    layer = linear()
    become(layer, Fp8Linear4bit)
    x = torch.randn(6, 128).bfloat16()
    (together,) = apply_layers(x, layer)
    (alone,) = apply_layers(x[2:3], layer)
    assert relative_error(together[2:3], alone) < 2.0**-8
    assert relative_error(together[3:4], alone) > 0.5


def test_only_layers_of_blocks_are_chosen(transformer):
    enable_fp8(transformer)
    assert is_in_fp8(transformer)
    chosen = {name for name, module in transformer.named_modules() if isinstance(module, Fp8Linear4bit)}
    assert chosen == {name for name, module in transformer.named_modules() if isinstance(module, Linear4bit)}
    enable_fp8(transformer)  # again
    disable_fp8(transformer)
    assert not is_in_fp8(transformer)
    assert not any(isinstance(module, Fp8Linear4bit) for module in transformer.modules())


@pytest.mark.parametrize(("rows", "columns"), [(24, 128), (128, 96), (128, 200)])
def test_shapes_that_fp8_cannot_multiply_are_left_out(transformer, rows, columns):
    odd = transformer.layers[0].self_attention.to_q = linear(rows, columns)
    enable_fp8(transformer)
    assert type(odd) is Linear4bit
    assert type(transformer.layers[1].self_attention.to_q) is Fp8Linear4bit


@pytest.mark.parametrize("device", DEVICES)
def test_predictions_differ_by_the_rounding_of_fp8(device):
    transformer = build(device)
    expected = predict(transformer)
    enable_fp8(transformer)
    assert 1e-3 < relative_error(predict(transformer), expected) < 0.1
    for layer in transformer.layers:
        layer.mlp.linear_fc2.weight.quant_state.absmax.zero_()  # which shows how much depends on the products
    assert relative_error(predict(transformer), expected) > 0.2


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_comes_back_to_the_bit(device):
    transformer = build(device)
    expected = predict(transformer)
    enable_fp8(transformer)
    predict(transformer)
    disable_fp8(transformer)
    assert torch.equal(predict(transformer), expected)


def test_a_step_captured_in_the_other_precision_is_freed(transformer):
    make_transformer_fast(transformer, capture_steps=True)
    for change in (enable_fp8, disable_fp8):
        memory = captured(transformer)
        change(transformer)
        assert memory() is None


@multiplies
def test_nothing_is_kept_of_the_weights_in_fp8(transformer):
    before = {name: set(vars(module)) for name, module in transformer.named_modules()}
    enable_fp8(transformer)
    predict(transformer)
    for name, module in transformer.named_modules():
        assert vars(module).keys() - before[name] <= {"__module__"}


@multiplies
def test_a_copy_stays_in_fp8_with_weights_of_its_own(transformer):
    enable_fp8(transformer)
    expected = predict(transformer)
    twin = copy.deepcopy(transformer)
    for layer in transformer.layers:
        layer.mlp.linear_fc2.weight.quant_state.absmax.zero_()
    assert is_in_fp8(twin)
    assert torch.equal(predict(twin), expected)
    disable_fp8(twin)
    assert not torch.equal(predict(twin), expected)
    assert is_in_fp8(transformer)


class Adapter(torch.nn.Module):
    """A layer that an adapter has taken the place of, as PEFT's do."""

    def __init__(self, base_layer: Linear4bit) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + 1


@multiplies
def test_adapters_and_hooks_are_called(transformer):
    enable_fp8(transformer)
    x = torch.randn(1, 3, 128).bfloat16()
    query, key = transformer.layers[0].self_attention.to_q, transformer.layers[0].self_attention.to_k
    assert torch.equal(apply_layers(x, Adapter(query))[0], query(x) + 1)
    called = []
    handle = key.register_forward_hook(lambda *_: called.append(True))
    assert torch.equal(apply_layers(x, key)[0], key(x))
    assert len(called) == 2
    handle.remove()
    assert not torch.equal(apply_layers(x, key)[0], key(x))


def test_what_cannot_multiply_in_fp8_is_refused(repository, monkeypatch):
    with pytest.raises(InvalidSettings, match=r"need a CUDA GPU.*leave fp8"):
        load(repository, device="cpu", fp8=True)
    device = torch.device("cuda", 0)
    for dtype, fast, reason in (
        (torch.float16, True, r"dtype is torch\.float16"),
        (torch.bfloat16, False, "fast=False"),
    ):
        with pytest.raises(InvalidSettings, match=reason):
            products.check_fp8(device, dtype, fast)
    found = [None, "a specification", "a specification"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found.pop(0))
    with pytest.raises(InvalidSettings, match="need Triton"):
        products.check_fp8(device, torch.bfloat16, True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(InvalidSettings, match=r"capability 8\.9 .* an A100 has 8\.0"):
        products.check_fp8(device, torch.bfloat16, True)

    def fail(*args):
        raise RuntimeError("Rowwise scaling is not currently supported on your device\nC++ stack")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(products, "_try_product", fail)
    with pytest.raises(InvalidSettings, match=r"no products in fp8 for an A100 \(Rowwise.*your device\): leave"):
        products.check_fp8(device, torch.bfloat16, True)


def test_a_transformer_that_would_not_multiply_in_fp8_is_refused():
    upstream = test_transformer.build().to(torch.bfloat16)
    with pytest.raises(InvalidSettings, match="fast forward pass"):
        enable_fp8(upstream)
    with pytest.raises(InvalidSettings, match=r"transformer is in torch\.float32"):
        enable_fp8(test_transformer.build())
    make_transformer_fast(upstream, capture_steps=False)
    with pytest.raises(InvalidSettings, match="No layer"):
        enable_fp8(upstream)  # its weights aren't in NF4
    assert not is_in_fp8(upstream)
    heads_of_48 = test_transformer.build(hidden_size=192, num_attention_heads=4, rope_axes_dim=(16, 16, 16))
    heads_of_48.to(torch.bfloat16)
    make_transformer_fast(heads_of_48, capture_steps=False)  # which leaves it as it is
    with pytest.raises(InvalidSettings, match="fast forward pass"):
        enable_fp8(heads_of_48)


@multiplies
def test_pictures_say_that_they_were_made_in_fp8_and_others_are_not_taken_for_them(repository, tmp_path):
    pipe = load(repository, device="cpu", dtype="bfloat16", prompt_enhancer=False)
    settings = {"height": 32, "width": 32, "steps": 1}
    (plain,) = generate_batch(pipe, [Row("a cat")], tmp_path, **settings)
    make_transformer_fast(pipe.transformer, capture_steps=False)
    enable_fp8(pipe.transformer)
    (record,) = generate_batch(pipe, [Row("a cat")], tmp_path, **settings)  # the other one doesn't count as finished
    assert (plain.fp8, record.fp8) == (False, True)
    assert json.loads((tmp_path / "manifest.jsonl").read_text())["fp8"] is True
    with Image.open(tmp_path / record.file) as image:
        assert image.text["fp8"] == "True"
    assert list(generate_batch(pipe, [Row("a cat")], tmp_path, **settings)) == []
    (drawing, _), *_ = draw_and_save(pipe, [tmp_path / "cat.png"], "a cat", seed=0, **settings)
    assert drawing.fp8


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
@pytest.mark.parametrize("memory", ["offload", "stream"])
def test_fp8_is_the_same_in_every_mode_on_a_gpu(model, memory):
    expected = pixels(load(model, memory="resident", prompt_enhancer=False, fp8=True))
    found = pixels(load(model, memory=memory, prompt_enhancer=False, fp8=True))
    assert np.array_equal(found, expected)
    assert not np.array_equal(pixels(load(model, memory="resident", prompt_enhancer=False)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 37, 2200])
def test_products_by_the_public_function_are_those_of_the_private_one_to_the_bit(rows):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(count, 4096, generator=generator).cuda() for count in (rows, 12288))
    (x, x_scale), (weight, weight_scale) = map(quantize_rows, (x, weight))
    expected = torch._scaled_mm(
        x, weight.t(), scale_a=x_scale, scale_b=weight_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )
    assert torch.equal(fp8.scaled_product(x, x_scale, weight, weight_scale), expected)


@pytest.mark.gpu
def test_a_captured_step_gives_way_when_fp8_comes_and_goes():
    transformer = build("cuda")
    transformer.runtime = TransformerRuntime(capture_steps=True)
    call = test_transformer.inputs("cuda", torch.bfloat16, (3, 7))
    with torch.no_grad():
        expected = [transformer(**call).sample for _ in range(3)][-1]
        enable_fp8(transformer)
        different = [transformer(**call).sample for _ in range(3)]
        disable_fp8(transformer)
        assert torch.equal(transformer(**call).sample, expected)
    assert all(torch.equal(each, different[0]) for each in different)
    assert not torch.equal(different[0], expected)


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
