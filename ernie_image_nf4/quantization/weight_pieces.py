"""A weight in pieces: several at a time on the cores of a CPU, one by one on a GPU, where pieces bound the memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from ..repository.nf4_format import NESTED_BLOCK_SIZE

Result = TypeVar("Result")

# Values a piece. bitsandbytes' CPU code makes several float32 and int32 copies of its input: pieces that stay near a
# core's cache, with one worker thread a core, are faster. PyTorch's own threads would wait for each other at every
# operation.
CPU_PIECE, GPU_PIECE = 1 << 19, 1 << 25


def split(
    weight: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, block_size: int
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Values, packed codes and block scales in flat pieces of whole groups of 256 blocks; the last may be shorter."""
    piece = CPU_PIECE if weight.device.type == "cpu" else GPU_PIECE
    blocks = NESTED_BLOCK_SIZE * max(piece // (NESTED_BLOCK_SIZE * block_size), 1)
    values = blocks * block_size
    return weight.reshape(-1).split(values), packed.split(values // 2), absmax.split(blocks)


def map_pieces(function: Callable[..., Result], *pieces: Sequence[torch.Tensor]) -> list[Result]:
    """`function` of each piece, in order; on a CPU several at a time, each in a thread of its own."""
    threads = torch.get_num_threads()
    if pieces[0][0].device.type != "cpu" or len(pieces[0]) == 1 or threads == 1:
        return [function(*parts) for parts in zip(*pieces, strict=True)]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as workers:
            return list(workers.map(function, *pieces))
    finally:
        torch.set_num_threads(threads)  # the workers' setting is the default of all threads started later
