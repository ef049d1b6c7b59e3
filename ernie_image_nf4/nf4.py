"""NF4 of one tensor, in bitsandbytes' own format: 4-bit codes in blocks that share a scale, the scales quantized once more.

A weight of n values becomes n/2 bytes of codes, one 8-bit scale (absmax) for each block of 64 values, one float32 for each 256
scales, and the offset that was subtracted from the scales: 4.127 bits a value. Format and names are those of
``bitsandbytes.functional.QuantState`` (QLoRA, https://arxiv.org/abs/2305.14314, sections 3 and "Double Quantization").
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    dequantize_blockwise,
    get_4bit_type,
    quantize_4bit,
    quantize_blockwise,
)

from .tensors import TensorSpec

BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUANT_STATE = "quant_state.bitsandbytes__nf4"

# Values handled at a time. bitsandbytes' CPU code makes several float32 and int32 copies of what it is given; pieces that stay
# near a core's cache, one worker thread a core, are 1.3 to 2 times as fast on two idle cores. On busy ones PyTorch's own threads
# would wait for each other at every operation, which made pieces of this size 10 times slower. On a GPU they bound the memory.
CPU_PIECE, GPU_PIECE = 1 << 19, 1 << 25


def quantize_nf4(weight: torch.Tensor, *, block_size: int = BLOCK_SIZE) -> tuple[torch.Tensor, QuantState]:
    """NF4 of a weight with double quantization, bit for bit as ``bitsandbytes.functional.quantize_4bit`` gives it.

    Args:
        weight: float32, float16 or bfloat16 tensor of any shape, on the device that does the work.
        block_size: Values that share one scale.

    Returns:
        The packed codes, uint8 of shape (ceil(n / 2), 1), and the quantization state with nested scales.

    Raises:
        ValueError: The dtype isn't one of the three.
    """
    if weight.dtype not in DTYPES:
        raise ValueError(f"NF4 is made from {DTYPES}, not from {weight.dtype}")

    packed = torch.empty((-(-weight.numel() // 2), 1), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-weight.numel() // block_size), dtype=torch.float32, device=weight.device)

    def quantize_piece(values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
        piece, state = quantize_4bit(values, blocksize=block_size, compress_statistics=False, quant_type="nf4")
        codes.copy_(piece)
        scales.copy_(state.absmax)

    _map(quantize_piece, *_pieces(weight, packed, absmax, block_size))
    offset = absmax.mean()
    nested_absmax, nested = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)
    state = QuantState(
        absmax=nested_absmax,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=block_size,
        code=get_4bit_type("nf4", device=weight.device),
        quant_type="nf4",
        offset=offset,
        state2=nested,
    )
    return packed, state


def squared_error(weight: torch.Tensor, packed: torch.Tensor, state: QuantState) -> tuple[float, float]:
    """How far NF4 is from the weight it was made from, after both quantizations.

    Returns:
        The sum of squared differences, and the sum of the weight's squares. Both are NaN or infinite if a value of the weight
        is, or if the squares overflow float32, as they do around 1e16.
    """

    def compare_piece(values: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        piece = QuantState(absmax, values.shape, state.code, state.blocksize, state.quant_type, values.dtype)
        # reshape, because bitsandbytes takes codes of a single byte for those of a transposed weight
        restored = dequantize_4bit(codes, piece).reshape(values.shape).float()
        values = values.float()
        return torch.stack([restored.sub_(values).square_().sum(), values.square().sum()])

    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
    sums = _map(compare_piece, *_pieces(weight, packed, absmax, state.blocksize))
    error, squares = torch.stack(sums).double().sum(0).tolist()
    return error, squares


def state_tensors(state: QuantState) -> dict[str, torch.Tensor]:
    """The quantization state as the tensors that are stored beside the codes, by the suffix of their names."""
    return state.as_dict(packed=True)


def stored_specs(shape: tuple[int, ...], dtype: torch.dtype, block_size: int = BLOCK_SIZE) -> dict[str, TensorSpec]:
    """What a weight's NF4 takes up, before it is made: the stored tensors by name suffix, ``""`` for the codes.

    All sizes are exact but that of the settings, which is the largest possible: they hold the offset as decimal text.
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


def _pieces(
    weight: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, block_size: int
) -> tuple[tuple[torch.Tensor, ...], ...]:
    """Values, codes and scales in order, in flat pieces of whole blocks (the last may be shorter)."""
    blocks = max((CPU_PIECE if weight.device.type == "cpu" else GPU_PIECE) // block_size, 1)
    values = blocks * block_size
    return weight.reshape(-1).split(values), packed.split(values // 2), absmax.split(blocks)


def _map(function: Callable[..., Any], *pieces: Sequence[torch.Tensor]) -> list[Any]:
    """`function` of each piece. On a CPU several at a time, each in a thread of its own."""
    threads = torch.get_num_threads()
    if pieces[0][0].device.type != "cpu" or len(pieces[0]) == 1 or threads == 1:
        return [function(*parts) for parts in zip(*pieces, strict=True)]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as workers:
            return list(workers.map(function, *pieces))
    finally:
        torch.set_num_threads(threads)  # the workers' setting is the default of all threads started later
