"""The NF4 format as bitsandbytes stores it: names, shapes and dtypes of the tensors that make up a quantized weight.

A weight of n values becomes n/2 bytes of 4-bit codes, one 8-bit scale (absmax) for each block of 64 values, one float32
scale for each group of 256 block scales, and an offset that was subtracted from the block scales: 4.127 bits a value.
Names are those of ``bitsandbytes.functional.QuantState``. The format is that of QLoRA
(https://arxiv.org/abs/2305.14314, section 3, with "Double Quantization").

A value is read as its code's number in the NF4 table times the scale of its block. So any scale is valid, negative ones
too.
"""

from __future__ import annotations

import json

import torch
from bitsandbytes.functional import QuantState, create_dynamic_map, dequantize_blockwise, get_4bit_type

from .safetensors_io import TensorSpec

BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of weights that NF4 is made from
QUANT_STATE = "quant_state.bitsandbytes__nf4"

NF4Weight = tuple[torch.Tensor, QuantState]
"""Packed codes, uint8 of shape (ceil(n / 2), 1), and their quantization state."""


def pack(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes in order, an even number n of them, as uint8 (n / 2, 1): the first of each pair in the high half."""
    pairs = codes.byte().reshape(-1, 2)
    return (pairs[:, :1] << 4) | pairs[:, 1:]


def nested_state(nested_absmax: torch.Tensor) -> QuantState:
    """State of 8-bit block scales, given the float32 scale of each group of 256."""
    code = create_dynamic_map().to(nested_absmax.device)
    return QuantState(absmax=nested_absmax, code=code, blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32)


def quant_state(
    shape: torch.Size,
    dtype: torch.dtype,
    block_size: int,
    absmax: torch.Tensor,
    nested: QuantState,
    offset: torch.Tensor | None = None,
) -> QuantState:
    """The state of a weight with double quantization.

    Args:
        shape: Of the weight.
        dtype: Of the weight.
        block_size: Values that share one scale.
        absmax: (blocks,) uint8, the block scales as levels of `nested`.
        nested: How these levels are read.
        offset: () float32, to be added to the block scales; None for 0.
    """
    return QuantState(
        absmax=absmax,
        shape=shape,
        dtype=dtype,
        blocksize=block_size,
        code=get_4bit_type("nf4", device=absmax.device),
        quant_type="nf4",
        offset=torch.zeros((), device=absmax.device) if offset is None else offset,
        state2=nested,
    )


def assemble(codes: torch.Tensor, levels: torch.Tensor, nested_absmax: torch.Tensor, dtype: torch.dtype) -> NF4Weight:
    """NF4 of given codes and scales, without an offset of the scales.

    Args:
        codes: Index of each value's number in the NF4 table, of the shape of the weight.
        levels: Index of each block's scale in the map of 8-bit scales, in the order of the values.
        nested_absmax: float32, the scale of each group of 256 blocks.
        dtype: Of the weight.
    """
    block_size = codes.numel() // levels.numel()
    return pack(codes), quant_state(codes.shape, dtype, block_size, levels.byte(), nested_state(nested_absmax))


def block_scales(state: QuantState) -> torch.Tensor:
    """The scales of the blocks after double quantization, (blocks,) float32."""
    return dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax


def quant_state_tensors(state: QuantState) -> dict[str, torch.Tensor]:
    """The tensors that are stored beside the codes, by the suffix of their names."""
    return state.as_dict(packed=True)


def stored_specs(shape: tuple[int, ...], dtype: torch.dtype, block_size: int = BLOCK_SIZE) -> dict[str, TensorSpec]:
    """The tensors that a weight's NF4 is stored as, before it is made: by name suffix, ``""`` for the codes.

    Sizes are exact, but for the settings: they hold the offset as decimal text, and get the largest size that this can
    take.
    """
    values = torch.Size(shape).numel()
    blocks = -(-values // block_size)
    settings = {
        "quant_type": "nf4",
        "blocksize": block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": shape,
        "nested_blocksize": NESTED_BLOCK_SIZE,
        "nested_dtype": "float32",
        "nested_offset": 1.2345678901234567e-10,  # as long as a float32 gets in JSON
    }
    return {
        "": TensorSpec("U8", (-(-values // 2), 1)),
        ".absmax": TensorSpec("U8", (blocks,)),
        ".quant_map": TensorSpec("F32", (16,)),
        ".nested_absmax": TensorSpec("F32", (-(-blocks // NESTED_BLOCK_SIZE),)),
        ".nested_quant_map": TensorSpec("F32", (256,)),
        f".{QUANT_STATE}": TensorSpec("U8", (len(json.dumps(settings)),)),
    }


# Suffixes of the names under which a weight's NF4 is stored.
SUFFIXES = tuple(stored_specs((1,), torch.bfloat16))
