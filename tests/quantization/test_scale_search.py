"""NF4 of one weight is bit for bit what bitsandbytes makes or, in the same format and bytes, nearer to the weight."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import bitsandbytes.functional
import pytest
import torch
from bitsandbytes.functional import (
    QuantState,
    create_dynamic_map,
    dequantize_4bit,
    dequantize_blockwise,
    gemv_4bit,
    get_4bit_type,
    has_avx512bf16,
    quantize_4bit,
)
from bitsandbytes.nn import Linear4bit, Params4bit
from conftest import CHECKOUT
from safetensors.torch import load_file

from ernie_image_nf4.quantization import weight_pieces
from ernie_image_nf4.quantization.scale_search import nearest, quantize_nf4, squared_error
from ernie_image_nf4.repository.components import COMPONENT
from ernie_image_nf4.repository.nf4_format import quant_state_tensors

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Whole blocks, a last block of 2 values, fewer values than a block, one dimension, more than one group of 256 scales.
SHAPES = [(64, 64), (33, 66), (2, 6), (4096,), (300, 100)]
NF4 = get_4bit_type("nf4", device="cpu")


def scales(state: QuantState) -> torch.Tensor:
    """The scale of each block, as it is after double quantization."""
    return dequantize_blockwise(state.absmax, state.state2) + state.offset


def restoring_error(weight: torch.Tensor, packed: torch.Tensor, state: QuantState) -> float:
    """Sum of squared differences between a weight and what bitsandbytes restores, in double precision."""
    return (dequantize_4bit(packed, state).reshape(weight.shape).double() - weight.double()).square().sum().item()


def error_vs_stock(*weights: torch.Tensor) -> float:
    """Squared error with scale search over that without, summed over weights."""
    searched, stock = (
        sum(restoring_error(weight, *quantize_nf4(weight, scale_search=search)) for weight in weights)
        for search in (True, False)
    )
    return searched / stock


def random_weight(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("piece", [128, 1 << 19])
def test_codes_and_state_are_those_of_bitsandbytes(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype, piece: int
) -> None:
    monkeypatch.setattr(weight_pieces, "CPU_PIECE", piece)
    weight = random_weight(*shape, dtype=dtype)
    packed, state = quantize_nf4(weight, scale_search=False)
    expected, expected_state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    tensors, expected_tensors = quant_state_tensors(state), expected_state.as_dict(packed=True)
    assert torch.equal(packed, expected)
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected_tensors[name].dtype, name
        assert torch.equal(tensor, expected_tensors[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("piece", [128, 1 << 25])
def test_codes_and_state_are_those_of_bitsandbytes_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, piece: int
) -> None:
    monkeypatch.setattr(weight_pieces, "GPU_PIECE", piece)
    weight = random_weight(300, 100, dtype=dtype).cuda()
    packed, state = quantize_nf4(weight, scale_search=False)
    expected, expected_state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    tensors, expected_tensors = quant_state_tensors(state), expected_state.as_dict(packed=True)
    assert torch.equal(packed, expected)
    assert all(torch.equal(tensors[name], expected_tensors[name]) for name in expected_tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("piece", [128, 1 << 19])
@pytest.mark.parametrize("scale_search", [False, True])
def test_the_error_is_that_of_the_restored_weight(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, piece: int, scale_search: bool
) -> None:
    monkeypatch.setattr(weight_pieces, "CPU_PIECE", piece)
    weight = random_weight(300, 100, dtype=dtype)
    packed, state = quantize_nf4(weight, scale_search=scale_search)
    error, squares = squared_error(weight, packed, state)
    restored = dequantize_4bit(packed, state).double()
    assert error == pytest.approx((restored - weight.double()).square().sum().item(), rel=1e-5)
    assert squares == pytest.approx(weight.double().square().sum().item(), rel=1e-5)
    assert 0.05 < math.sqrt(error / squares) < 0.12


@pytest.mark.parametrize("scale_search", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_shows_in_the_sum_of_squares(value: float, scale_search: bool) -> None:
    weight = random_weight(64, 64)
    weight[-1, -1] = value
    packed, state = quantize_nf4(weight, scale_search=scale_search)
    assert not math.isfinite(squared_error(weight, packed, state)[1])


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        quantize_nf4(random_weight(64, 64, dtype=torch.float64))


# Scale search


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_search_lowers_the_squared_error_on_normal_weights(dtype: torch.dtype) -> None:
    assert error_vs_stock(random_weight(1024, 1024, dtype=dtype)) < 0.815


def test_the_search_lowers_the_squared_error_on_trained_weights() -> None:
    """Those of the VAE, which this checkout has in their original precision; convolutions as matrices."""
    vae = COMPONENT["vae"]
    if not (CHECKOUT / vae.name).exists():
        pytest.skip("this checkout holds no weights")
    tensors = load_file(CHECKOUT / vae.name / vae.weights)
    weights = [tensor.flatten(1) for tensor in tensors.values() if tensor.ndim > 1]
    assert error_vs_stock(*(weight for weight in weights if weight.shape[1] % 64 == 0)) < 0.81


def spread(weight: torch.Tensor) -> torch.Tensor:
    """The weight with rows that differ by nine orders of magnitude."""
    return weight * torch.logspace(-6, 3, len(weight))[:, None]


def with_outlier(weight: torch.Tensor) -> torch.Tensor:
    return weight.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(1e4))


def was_nf4(weight: torch.Tensor) -> torch.Tensor:
    """The weight as it comes back from bitsandbytes' NF4, which then reproduces it."""
    return dequantize_4bit(*quantize_nf4(weight, scale_search=False))


WEIGHTS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    *(spread, with_outlier, was_nf4, torch.zeros_like, torch.ones_like, torch.sign, torch.abs),
    lambda weight: (weight * 50) ** 5,
    lambda weight: weight.where(weight > 0.04, 0),
    lambda weight: weight * 1e-17,
    lambda weight: weight * 1e4,
    lambda weight: weight.erf(),
    lambda weight: weight[:1, :1],
    lambda weight: weight[:3, :7],
    lambda weight: weight[:, :65],
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", WEIGHTS, ids=lambda make: make.__name__)
def test_no_weight_is_restored_worse_than_without_the_search(
    make: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> None:
    weight = make(random_weight(256, 256, dtype=torch.float32)).to(dtype)
    stock = restoring_error(weight, *quantize_nf4(weight, scale_search=False))
    assert restoring_error(weight, *quantize_nf4(weight)) <= stock * (1 + 1e-5)


def test_scales_are_the_best_that_8_bits_allow_to_a_thousandth() -> None:
    """Against all 256 levels for every block, with the codes nearest to the values. Rows differ up to 20 times."""
    order = torch.randperm(256, generator=torch.Generator().manual_seed(2))
    weight = random_weight(256, 256, dtype=torch.float32) * torch.linspace(0.05, 1, 256)[order, None]
    packed, state = quantize_nf4(weight)
    blocks = weight.view(-1, 64)
    levels = create_dynamic_map() * state.state2.absmax.repeat_interleave(256)[:, None]
    least = torch.full((len(blocks),), math.inf)
    for scale in levels.T[..., None]:
        restored = NF4[nearest(blocks / scale, NF4)] * scale
        least = torch.fmin(least, (restored - blocks).square().sum(1))
    assert restoring_error(weight, packed, state) <= 1.001 * least.sum().item()


def test_codes_are_the_nearest_for_the_stored_scales() -> None:
    weight = random_weight(33, 66, dtype=torch.float32)
    packed, state = quantize_nf4(weight)
    distance = (dequantize_4bit(packed, state) - weight).abs().view(-1)
    scale = scales(state).repeat_interleave(64)[: weight.numel(), None]
    least = (NF4 * scale - weight.view(-1, 1)).abs().amin(1)
    assert torch.allclose(distance, least, rtol=0, atol=1e-7)


def test_scales_have_both_signs() -> None:
    assert 0.4 < (scales(quantize_nf4(random_weight(256, 256))[1]) < 0).float().mean() < 0.6


@pytest.mark.parametrize("shape", [(256, 96), (256, 80), (33, 66)], ids=str)
def test_rows_that_are_no_whole_blocks_have_positive_scales(shape: tuple[int, ...]) -> None:
    """bitsandbytes 0.50 mixes up their scales on some processors, which negative ones would make much worse."""
    weight = random_weight(*shape)
    packed, state = quantize_nf4(weight)
    assert (scales(state) > 0).all()
    stock = quantize_nf4(weight, scale_search=False)
    assert squared_error(weight, packed, state)[0] < 0.87 * squared_error(weight, *stock)[0]


def test_a_zero_block_is_restored_as_zeros() -> None:
    weight = random_weight(64, 64)
    weight[7] = 0
    restored = dequantize_4bit(*quantize_nf4(weight))
    assert not restored[7].any()
    assert restored[6].any()


@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1e4, 1e15])
def test_the_size_of_the_values_makes_no_difference(scale: float) -> None:
    weight = random_weight(256, 256, dtype=torch.float32)
    error, expected = (restoring_error(weight * by, *quantize_nf4(weight * by)) / by**2 for by in (scale, 1))
    assert error == pytest.approx(expected, rel=1e-3)


def test_the_largest_float16_stays_finite() -> None:
    """In blocks for which a scale above it would be better."""
    weight = random_weight(1024, 64, dtype=torch.float32)
    weight = (weight / weight.abs().amax(1, keepdim=True) * torch.finfo(torch.float16).max).half()
    stock = restoring_error(weight, *quantize_nf4(weight, scale_search=False))
    assert restoring_error(weight, *quantize_nf4(weight)) < 0.9 * stock < math.inf


def test_a_block_far_below_its_neighbours_keeps_its_shape() -> None:
    """Where bitsandbytes' offset, the mean of all scales, leaves it none."""
    weight = random_weight(256, 64, dtype=torch.float32)
    weight[9] *= 1e-4
    searched, stock = (
        dequantize_4bit(*quantize_nf4(weight, scale_search=search))[9] - weight[9] for search in (True, False)
    )
    assert searched.norm() < 0.12 * weight[9].norm() < stock.norm()


@pytest.mark.parametrize("block_size", [32, 128, pytest.param(4096, marks=pytest.mark.slow)])
def test_other_block_sizes(block_size: int) -> None:
    weight = random_weight(300, 100)
    packed, state = quantize_nf4(weight, block_size=block_size)
    assert state.absmax.numel() == -(-30_000 // block_size)
    stock = quantize_4bit(weight, blocksize=block_size, compress_statistics=True, quant_type="nf4")
    assert restoring_error(weight, packed, state) < 0.95 * restoring_error(weight, *stock)


@pytest.mark.parametrize("threads", [1, 2])
def test_pieces_and_threads_make_no_difference(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    weight = random_weight(300, 100)
    packed, state = quantize_nf4(weight)
    monkeypatch.setattr(weight_pieces, "CPU_PIECE", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        again, again_state = quantize_nf4(weight)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(packed, again)
    assert all(
        torch.equal(tensor, again_state.as_dict(packed=True)[n]) for n, tensor in quant_state_tensors(state).items()
    )


# Negative scales in bitsandbytes


def negative_scales(weight: torch.Tensor) -> tuple[torch.Tensor, QuantState]:
    """NF4 with searched scales, about half of them negative, after storing and reading."""
    packed, state = quantize_nf4(weight)
    assert (scales(state) < 0).any()
    assert (scales(state) > 0).any()
    return packed, QuantState.from_dict(dict(quant_state_tensors(state)), device=weight.device)


def by_hand(packed: torch.Tensor, state: QuantState) -> torch.Tensor:
    """The weight as the format defines it, in float32."""
    packed = packed.view(-1).cpu().int()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: state.shape.numel()]
    scale = (
        state.state2.code[state.absmax.int()].view(-1)
        * state.state2.absmax.repeat_interleave(256)[: state.absmax.numel()]
    )
    return (NF4[codes] * scale.cpu().repeat_interleave(state.blocksize)[: len(codes)]).view(state.shape)


def layer(packed: torch.Tensor, state: QuantState, dtype: torch.dtype) -> Linear4bit:
    rows, columns = state.shape
    linear = Linear4bit(columns, rows, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    linear.weight = Params4bit.from_prequantized(packed, quant_state_tensors(state), device=packed.device)
    return linear.eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (1, 64), (128, 192)], ids=str)
def test_bitsandbytes_restores_negative_scales(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    packed, state = quantize_nf4(random_weight(*shape, dtype=dtype))
    state.absmax[0] = 255 - state.absmax[0]  # so that there is one even of one block
    restored = dequantize_4bit(packed, QuantState.from_dict(dict(quant_state_tensors(state)), device="cpu"))
    assert torch.equal(restored, by_hand(packed, state).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 32])
def test_layers_multiply_by_what_is_restored(dtype: torch.dtype, batch: int) -> None:
    """By whichever kernel bitsandbytes has for this processor; the fused one works in bfloat16."""
    packed, state = negative_scales(random_weight(256, 384, dtype=dtype))
    x = torch.randn(batch, 384, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = x.float() @ by_hand(packed, state).T
    result = layer(packed, state, dtype)(x).float()
    tolerance = 1e-2 if dtype == torch.bfloat16 or has_avx512bf16() else 1e-5
    assert (result - expected).norm() < tolerance * expected.norm()


def test_the_packing_for_processors_with_avx512_keeps_negative_scales() -> None:
    """The layout for bitsandbytes' fused CPU kernel, which takes the scales as bfloat16, there and back."""
    if not hasattr(bitsandbytes.functional, "_convert_weight_packed_for_cpu_inverse"):
        pytest.skip("this bitsandbytes has no such layout")
    packed, state = negative_scales(random_weight(64, 384))
    expected = scales(state).view(64, 6)
    there = bitsandbytes.functional._convert_weight_packed_for_cpu(packed, copy.deepcopy(state))
    assert torch.equal(there[1].absmax, expected.T.bfloat16())
    back = bitsandbytes.functional._convert_weight_packed_for_cpu_inverse(*there)
    assert torch.equal(back[0], packed)
    assert torch.equal(scales(back[1]).sign(), expected.view(-1).sign())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)], ids=str
)
@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16, 64, 512, 2048])
@pytest.mark.parametrize("shape", [(512, 256), (4096, 1024), (4096, 4096)], ids=str)
def test_layers_multiply_by_what_is_restored_on_a_gpu(
    shape: tuple[int, int], batch: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Small batches take fused kernels, for one row and for more; large ones dequantization and a product."""
    packed, state = negative_scales(random_weight(*shape, dtype=dtype).cuda())
    restored = by_hand(packed, state).cuda()
    assert torch.equal(dequantize_4bit(packed, state), restored.to(dtype))
    x = torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(1)).cuda().to(dtype)
    expected = x.double() @ restored.double().T
    assert (layer(packed, state, dtype)(x) - expected).norm() < tolerance * expected.norm()
    if batch == 1:
        assert (gemv_4bit(x, packed.T, state=state) - expected).norm() < tolerance * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1024, 4096)], ids=str)
def test_a_gpu_finds_the_same_scales_and_codes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = random_weight(*shape, dtype=dtype)
    packed, state = quantize_nf4(weight)
    on_gpu, gpu_state = quantize_nf4(weight.cuda())
    assert (scales(state) - scales(gpu_state).cpu()).abs().gt(1e-6).float().mean() < 1e-3
    assert (packed != on_gpu.cpu()).float().mean() < 1e-3
    assert restoring_error(weight.cuda(), on_gpu, gpu_state) == pytest.approx(
        restoring_error(weight, packed, state), rel=1e-4
    )


@pytest.mark.gpu
def test_a_gpu_finds_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(1024, 1024).cuda()
    packed, state = quantize_nf4(weight)
    monkeypatch.setattr(weight_pieces, "GPU_PIECE", 1)
    again, again_state = quantize_nf4(weight)
    assert torch.equal(packed, again)
    assert all(
        torch.equal(tensor, again_state.as_dict(packed=True)[n]) for n, tensor in quant_state_tensors(state).items()
    )
