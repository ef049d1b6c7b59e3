"""Rounding of a panel of 64 columns to NF4, one column after the other: one Triton kernel, and the same in plain torch.

Rows don't depend on each other, columns do: each column's error is made up for by those to come. Plain torch starts a
dozen kernels for each column, which on a GPU takes far longer than their work.

Shapes: (64, rows) for a panel, whose first index is the column.
"""

from __future__ import annotations

import torch

from .elementwise import triton_kernels

KERNELS = "triton_nf4_panels"


def nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Index of the nearest number in a sorted table, int32."""
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2, out_int32=True)


def nearest_code(values: torch.Tensor, scale: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The code of each value, given its block's scale; that of 0 where the scale is 0."""
    return nearest(values / scale.where(scale != 0, torch.inf), table)


def round_panel(
    target: torch.Tensor,
    adjusted: torch.Tensor,
    feedback: torch.Tensor,
    scale: torch.Tensor,
    table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round from the last column to the first.

    Args:
        target: Values to come near to, float32 (64, rows).
        adjusted: The same with what makes up for the errors of columns outside of the panel.
        feedback: float32 (64, 64): what a unit of error of the first index's column adds to that of the second, which
            comes after it.
        scale: Each row's block scale, float32 (rows,).
        table: The NF4 table, float32 (16,).

    Returns:
        Codes, uint8 (64, rows), and errors, `target` less the rounded values, float32 (64, rows).
    """
    if kernels := triton_kernels(target, KERNELS):
        return kernels.round_panel(target, adjusted, feedback, scale, table)
    values, errors = adjusted.clone(), torch.empty_like(target)
    codes = torch.empty_like(target, dtype=torch.uint8)
    for column in reversed(range(len(target))):
        code = nearest_code(values[column], scale, table)
        codes[column] = code
        errors[column] = target[column] - table[code] * scale
        values[:column] += feedback[column, :column, None] * errors[column]
    return codes, errors


def descend_panel(
    slope: torch.Tensor, within: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Set each code to the best, all others given, from the last column to the first.

    Args:
        slope: Products of the Hessian and the errors, float32 (64, rows).
        within: The panel's part of the Hessian, float32 (64, 64).
        scale: Each row's block scale, float32 (rows,).
        codes: uint8 (64, rows).
        table: The NF4 table, float32 (16,).

    Returns:
        The new codes, uint8 (64, rows), and the change of the values, float32 (64, rows).
    """
    if kernels := triton_kernels(slope, KERNELS):
        return kernels.descend_panel(slope, within, scale, codes, table)
    slope, changes, new = slope.clone(), torch.empty_like(slope), torch.empty_like(codes)
    for column in reversed(range(len(slope))):
        old = table[codes[column].int()] * scale
        code = nearest_code(old + slope[column] / within[column, column], scale, table)
        new[column] = code
        changes[column] = table[code] * scale - old
        slope -= within[:, column, None] * changes[column]
    return new, changes
