"""The NF4 format: stored sizes are known beforehand, and bitsandbytes reads codes and scales as they were put in."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_4bit, get_4bit_type

from ernie_image_nf4.quantization.scale_search import quantize_nf4
from ernie_image_nf4.repository.nf4_format import (
    QUANT_STATE,
    assemble,
    block_scales,
    pack,
    quant_state_tensors,
    stored_specs,
)
from ernie_image_nf4.repository.safetensors_io import DTYPE_NAMES, TensorSpec

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Whole blocks, a last block of 2 values, fewer values than a block, one dimension, more than one group of 256 scales.
SHAPES = [(64, 64), (33, 66), (2, 6), (4096,), (300, 100)]


def random_weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-7, 0.0, 1.0, 1e4])
@pytest.mark.parametrize("scale_search", [False, True])
def test_stored_sizes_are_known_beforehand_and_the_same_with_scale_search(
    shape: tuple[int, ...], dtype: torch.dtype, scale: float, scale_search: bool
) -> None:
    weight = random_weight(*shape).mul(scale).to(dtype)
    packed, state = quantize_nf4(weight, scale_search=scale_search)
    stored = {"": packed} | {f".{name}": tensor for name, tensor in quant_state_tensors(state).items()}
    specs = stored_specs(shape, dtype)
    assert stored.keys() == specs.keys()
    settings = specs.pop(f".{QUANT_STATE}")
    for name, spec in specs.items():
        assert TensorSpec(DTYPE_NAMES[stored[name].dtype], tuple(stored[name].shape)) == spec, name
    assert settings.bytes - 24 <= stored[f".{QUANT_STATE}"].nbytes <= settings.bytes


def test_the_first_code_of_a_byte_is_in_its_high_half() -> None:
    assert pack(torch.tensor([[1, 2], [15, 0]])).tolist() == [[0x12], [0xF0]]


def test_assembled_codes_and_scales_are_what_bitsandbytes_reads() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (4, 128), generator=generator)
    levels = torch.randint(0, 256, (8,), generator=generator)
    packed, state = assemble(codes, levels, torch.tensor([0.5]), torch.float32)
    scales = create_dynamic_map()[levels] * 0.5
    assert torch.equal(block_scales(state), scales)
    expected = get_4bit_type("nf4", device="cpu")[codes] * scales.repeat_interleave(64).view(4, 128)
    assert torch.equal(dequantize_4bit(packed, state), expected)
