"""NF4 of one tensor is bit for bit what bitsandbytes makes of it."""

from __future__ import annotations

import math

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from ernie_image_nf4 import nf4
from ernie_image_nf4.nf4 import quantize_nf4, squared_error, state_tensors, stored_specs
from ernie_image_nf4.tensors import DTYPE_NAMES, TensorSpec

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Whole blocks, a last block of 2 values, fewer values than a block, one dimension, more than one group of 256 scales.
SHAPES = [(64, 64), (33, 66), (2, 6), (4096,), (300, 100)]


def random_weight(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("piece", [128, 1 << 19])
def test_codes_and_state_are_those_of_bitsandbytes(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype, piece: int
) -> None:
    monkeypatch.setattr(nf4, "CPU_PIECE", piece)
    weight = random_weight(*shape, dtype=dtype)
    packed, state = quantize_nf4(weight)
    expected, expected_state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    tensors, expected_tensors = state_tensors(state), expected_state.as_dict(packed=True)
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
    monkeypatch.setattr(nf4, "GPU_PIECE", piece)
    weight = random_weight(300, 100, dtype=dtype).cuda()
    packed, state = quantize_nf4(weight)
    expected, expected_state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    tensors, expected_tensors = state_tensors(state), expected_state.as_dict(packed=True)
    assert torch.equal(packed, expected)
    assert all(torch.equal(tensors[name], expected_tensors[name]) for name in expected_tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-7, 0.0, 1.0, 1e4])
def test_stored_sizes_are_known_beforehand(shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> None:
    weight = random_weight(*shape).mul(scale).to(dtype)
    packed, state = quantize_nf4(weight)
    stored = {"": packed} | {f".{name}": tensor for name, tensor in state_tensors(state).items()}
    specs = stored_specs(shape, dtype)
    assert stored.keys() == specs.keys()
    settings = specs.pop(f".{nf4.QUANT_STATE}")
    for name, spec in specs.items():
        assert TensorSpec(DTYPE_NAMES[stored[name].dtype], tuple(stored[name].shape)) == spec, name
    assert settings.bytes - 24 <= stored[f".{nf4.QUANT_STATE}"].nbytes <= settings.bytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("piece", [128, 1 << 19])
def test_the_error_is_that_of_the_restored_weight(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, piece: int
) -> None:
    monkeypatch.setattr(nf4, "CPU_PIECE", piece)
    weight = random_weight(33, 66, dtype=dtype)
    packed, state = quantize_nf4(weight)
    error, squares = squared_error(weight, packed, state)
    restored = dequantize_4bit(packed, state).double()
    assert error == pytest.approx((restored - weight.double()).square().sum().item(), rel=1e-5)
    assert squares == pytest.approx(weight.double().square().sum().item(), rel=1e-5)
    assert 0.05 < math.sqrt(error / squares) < 0.12


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_shows_in_the_sum_of_squares(value: float) -> None:
    weight = random_weight(64, 64)
    weight[-1, -1] = value
    packed, state = quantize_nf4(weight)
    assert not math.isfinite(squared_error(weight, packed, state)[1])


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        quantize_nf4(random_weight(64, 64, dtype=torch.float64))
