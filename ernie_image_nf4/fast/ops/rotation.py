"""A rotation of groups of neighbouring values that spreads outliers evenly, before values are rounded to 8 bits.

One scale a row has to reach the row's largest value. Where that is an outlier, the others are left with few of the 255
numbers of int8. A row's inner product with a weight's row doesn't change if both are multiplied by the same orthogonal
matrix, and with a Hadamard matrix, whose entries are all of one magnitude, each outlier becomes a small part of every
value of its group.

The matrix is a regular one: all of its rows have the same sum, so that a mean that a group has in common is spread too
(https://arxiv.org/abs/2512.03673); Sylvester's collects it in one value. Its size is a power of 4, its root a power of
2: the scaling is exact.
"""

from __future__ import annotations

import functools

import torch

GROUP = 64  # values that are rotated together; a power of 4


@functools.cache
def hadamard(size: int, device: torch.device) -> torch.Tensor:
    """(size, size) float16, the symmetric orthogonal regular Hadamard matrix of a size that is a power of 4."""
    four = torch.ones(4, 4, device="cpu") - 2 * torch.eye(4, device="cpu").flip(0)
    matrix = torch.ones(1, 1, device="cpu")
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    # Made on the CPU, from where it is copied before this returns: threads with streams of their own may take it.
    return (matrix / size**0.5).half().to(device)


def rotate_rows(x: torch.Tensor, bound: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in groups of `GROUP` rotated, (N, H) float32 in a unit of each row, and these units, (N, 1) float32.

    The unit is the power of two at or below a row's `bound`. In it, values are rounded to float16, which tensor cores
    multiply: 16 times as fine as int8, whatever the range of the input.

    Args:
        x: (N, H) float32, H a multiple of `GROUP`.
        bound: (N, 1) float32, no smaller than the magnitudes of the row, and less than 32,768 times the largest.
    """
    exponent = (bound.view(torch.int32) >> 23).clamp(1, 253)  # of float32; both powers of two are then normal numbers
    inverse, unit = (each.view(torch.float32) for each in ((254 - exponent) << 23, exponent << 23))
    groups = (x * inverse).half().float().unflatten(1, (-1, GROUP))
    return (groups @ hadamard(GROUP, x.device).float()).flatten(1), unit
