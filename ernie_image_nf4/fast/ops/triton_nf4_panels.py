"""Triton kernels of ``nf4_panels``. A program holds the 64 columns of a few rows and goes through the columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton_launch import NO_FMA, on_its_device

ROWS = 32  # of a program: with four warps sixteen values a thread


@triton.jit
def _nearest_code(values, scale, table_pointer):
    """As ``nf4_panels.nearest_code``: how many of the 15 midpoints lie below. NaN gets the last code, as there."""
    x = tl.where(scale == 0, 0.0, tl.math.div_rn(values, tl.where(scale == 0, 1.0, scale)))
    code = tl.zeros_like(values).to(tl.int32)
    for number in tl.static_range(15):
        middle = (tl.load(table_pointer + number + 1) + tl.load(table_pointer + number)) * 0.5
        code += tl.where(x <= middle, 0, 1)
    return code


@triton.jit
def _row_of(values, column, index):
    return tl.sum(tl.where(index[:, None] == column, values, 0.0), 0)


@triton.jit
def _round_panel(
    target_pointer, adjusted_pointer, feedback_pointer, scale_pointer, table_pointer, codes_pointer, errors_pointer,
    rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index, inside = tl.arange(0, COLUMNS), row < rows
    values = tl.load(adjusted_pointer + index[:, None].to(tl.int64) * rows + row[None, :], inside[None, :], 0.0)
    scale = tl.load(scale_pointer + row, inside, 1.0)
    for step in range(COLUMNS):
        column = COLUMNS - 1 - step
        place = tl.cast(column, tl.int64) * rows + row
        code = _nearest_code(_row_of(values, column, index), scale, table_pointer)
        error = tl.load(target_pointer + place, inside, 0.0) - tl.load(table_pointer + code) * scale
        tl.store(codes_pointer + place, code.to(tl.uint8), inside)
        tl.store(errors_pointer + place, error, inside)
        feedback = tl.load(feedback_pointer + column * COLUMNS + index)
        values += tl.where(index < column, feedback, 0.0)[:, None] * error[None, :]


@triton.jit
def _descend_panel(
    slope_pointer, within_pointer, scale_pointer, codes_pointer, table_pointer, new_pointer, changes_pointer, rows,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index, inside = tl.arange(0, COLUMNS), row < rows
    slope = tl.load(slope_pointer + index[:, None].to(tl.int64) * rows + row[None, :], inside[None, :], 0.0)
    scale = tl.load(scale_pointer + row, inside, 1.0)
    for step in range(COLUMNS):
        column = COLUMNS - 1 - step
        place = tl.cast(column, tl.int64) * rows + row
        old = tl.load(table_pointer + tl.load(codes_pointer + place, inside, 0).to(tl.int32)) * scale
        curvature = tl.load(within_pointer + column * COLUMNS + column)
        best = old + tl.math.div_rn(_row_of(slope, column, index), tl.zeros_like(old) + curvature)
        code = _nearest_code(best, scale, table_pointer)
        change = tl.load(table_pointer + code) * scale - old
        tl.store(new_pointer + place, code.to(tl.uint8), inside)
        tl.store(changes_pointer + place, change, inside)
        slope -= tl.load(within_pointer + index * COLUMNS + column)[:, None] * change[None, :]


@on_its_device
def round_panel(
    target: torch.Tensor, adjusted: torch.Tensor, feedback: torch.Tensor, scale: torch.Tensor, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``nf4_panels.round_panel``."""
    target, adjusted, feedback, scale = (each.contiguous() for each in (target, adjusted, feedback, scale))
    columns, rows = target.shape
    codes, errors = torch.empty_like(target, dtype=torch.uint8), torch.empty_like(target)
    _round_panel[(triton.cdiv(rows, ROWS),)](
        target, adjusted, feedback, scale, table, codes, errors, rows, columns, ROWS, **NO_FMA
    )
    return codes, errors


@on_its_device
def descend_panel(
    slope: torch.Tensor, within: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``nf4_panels.descend_panel``."""
    slope, within, scale, codes = (each.contiguous() for each in (slope, within, scale, codes))
    columns, rows = slope.shape
    new, changes = torch.empty_like(codes), torch.empty_like(slope)
    _descend_panel[(triton.cdiv(rows, ROWS),)](
        slope, within, scale, codes, table, new, changes, rows, columns, ROWS, **NO_FMA
    )
    return new, changes
