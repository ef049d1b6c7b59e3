"""GPTQ for NF4: the codes and scales of one layer's weight, rounded for the least error of its products.

Rounding goes column by column, and the columns still to come make up for the error so far (GPTQ,
https://arxiv.org/abs/2210.17323). The inputs are those that the layer gets in the quantized model, beside those in the
original (GPTAQ, https://arxiv.org/abs/2504.02692). Afterwards codes and scales are improved in turns by coordinate
descent. The result is NF4 like any other.

W is the weight, Q its quantized values, x an input in the original and y the same input in the quantized model. Each
may be weighted by its token's sensitivity (GuidedQuant, https://arxiv.org/abs/2505.07004).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_4bit, get_4bit_type

from ..repository.nf4_format import BLOCK_SIZE, NESTED_BLOCK_SIZE, NF4Weight, assemble
from .scale_search import TINY, choose_levels, code_sums, group_maxima, nearest, quantize_nf4, search_scales

PERCDAMP = 0.01  # as in GPTQ: this part of the mean of the Hessian's diagonal is added to the diagonal
SCALE_MARGIN = 1.1  # room for scales to grow beyond those of the scale search, as columns make up for each other
SWEEPS = 2


class Tables(NamedTuple):
    """Constants on the device that does the work.

    Attributes:
        sums: `scale_search.code_sums`.
        levels: The map of 8-bit scales, (256,).
        numbers: The NF4 table, (16,).
    """

    sums: torch.Tensor
    levels: torch.Tensor
    numbers: torch.Tensor


class Problem(NamedTuple):
    """What is rounded, all in the order in which columns are rounded.

    Attributes:
        target: Weight to come near to, float32 (columns, rows).
        hessian: Weights of squared errors, (columns, columns).
        unit: Scale of the group of each block, float32 (blocks of a row, rows).
        tables: Constants.
    """

    target: torch.Tensor
    hessian: torch.Tensor
    unit: torch.Tensor
    tables: Tables


def round_weight(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    cross: torch.Tensor,
    *,
    percdamp: float = PERCDAMP,
    sweeps: int = SWEEPS,
) -> NF4Weight | None:
    """NF4 of a weight for the least squared error of its products, that of W x - Q y.

    Args:
        weight: (out_features, in_features), on the device that does the work.
        hessian: H, the sum of y y', (in_features, in_features).
        cross: Sum of x y'. The same as `hessian` where both inputs are.
        percdamp: Part of the mean of the Hessian's diagonal that is added to the diagonal.
        sweeps: Sweeps of coordinate descent after the first rounding.

    Returns:
        Codes and quantization state; None where the scale search does as well: rows aren't whole blocks, the inputs are
        zero or not finite, or the error of the products isn't smaller.
    """
    columns = weight.shape[1]
    mean = hessian.diagonal().double().mean()
    if columns % BLOCK_SIZE or not mean > 0 or not cross.isfinite().all() or not hessian.isfinite().all():
        return None
    damping = torch.eye(columns, dtype=torch.float64, device=weight.device) * (percdamp * mean)
    hessian = hessian.double() + damping
    target = best_weight(weight, hessian, cross.double() + damping)
    stock = quantize_nf4(weight)

    order = column_order(hessian.diagonal())
    block_order = order[::BLOCK_SIZE] // BLOCK_SIZE
    group_scales = choose_group_scales(weight)
    unit = group_scales.repeat_interleave(NESTED_BLOCK_SIZE)[: weight.numel() // BLOCK_SIZE].view(len(weight), -1)
    tables = Tables(
        code_sums(True).to(weight.device),
        create_dynamic_map().to(weight.device),
        get_4bit_type("nf4", device=weight.device),
    )
    problem = Problem(target[order], hessian[order][:, order], unit.T[block_order].contiguous(), tables)
    del hessian, target, damping
    codes, levels = round_columns(problem)
    problem = Problem(problem.target, problem.hessian.float(), problem.unit, tables)
    for _ in range(sweeps):
        coordinate_descent(codes, levels, problem)

    searched = dequantize_4bit(*stock).float().T[order]
    if not products_error(dequantize(codes, levels, problem), problem) < products_error(searched, problem):
        return None
    codes, levels = in_order(codes, order), in_order(levels, block_order)
    return assemble(codes.T.contiguous(), levels.T.flatten(), group_scales, weight.dtype)


def best_weight(weight: torch.Tensor, hessian: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """T = W xy' / yy', the weight that makes the most of the other input, float32 (in_features, out_features).

    The error of W x - Q y is that of (T - Q) y up to a constant: the layer makes up for some of the error of those
    before it.
    """
    return torch.linalg.solve(hessian, (weight.double() @ cross).T).float()


def column_order(diagonal: torch.Tensor) -> torch.Tensor:
    """Columns by falling diagonal of the Hessian, block by block: the last have none to make up for their error."""
    order = torch.arange(len(diagonal), device=diagonal.device).view(-1, BLOCK_SIZE)
    diagonal = diagonal[order]
    order = order.gather(1, diagonal.argsort(dim=1, descending=True, stable=True))
    return order[diagonal.sum(1).argsort(descending=True, stable=True)].flatten()


def choose_group_scales(weight: torch.Tensor) -> torch.Tensor:
    """Scale of each group of 256 blocks: the largest scale that the search finds in it, and some room."""
    blocks = weight.float().reshape(-1, BLOCK_SIZE)
    best = search_scales(blocks, code_sums(True).to(weight.device)).best()
    return (group_maxima(best) * SCALE_MARGIN).clamp_min_(TINY)


def round_columns(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales column by column, the error of each column carried over to those after it (GPTQ, algorithm 1).

    Returns:
        Codes, int32 (columns, rows), and levels of the block scales, int32 (blocks of a row, rows).
    """
    target, hessian, unit, tables = problem
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    values = target.clone()
    codes = torch.empty_like(values, dtype=torch.int32)
    levels = torch.empty_like(unit, dtype=torch.int32)
    for number, start in enumerate(range(0, len(values), BLOCK_SIZE)):
        part = slice(start, start + BLOCK_SIZE)
        block, within = values[part], factor[part, part]
        found = search_scales(block.T.contiguous(), tables.sums)
        levels[number] = choose_levels(found, unit[number][:, None], tables.levels)
        scale = tables.levels[levels[number]] * unit[number]
        errors = torch.empty_like(block)
        for column in range(BLOCK_SIZE):
            code = nearest_code(block[column], scale, tables)
            codes[start + column] = code
            errors[column] = (block[column] - tables.numbers[code] * scale) / within[column, column]
            block[column + 1 :] -= within[column, column + 1 :, None] * errors[column]
        values[part.stop :] -= factor[part, part.stop :].T @ errors
    return codes, levels


def coordinate_descent(codes: torch.Tensor, levels: torch.Tensor, problem: Problem) -> None:
    """Set each block's scale and then each of its codes to the best, all others given. The error never grows.

    Args:
        codes: As of `round_columns`, changed in place.
        levels: As of `round_columns`, changed in place.
        problem: What is rounded, its Hessian in float32.
    """
    target, hessian, unit, tables = problem
    slope = hessian @ (target - dequantize(codes, levels, problem))
    for number, start in enumerate(range(0, len(codes), BLOCK_SIZE)):
        part = slice(start, start + BLOCK_SIZE)
        near, within = slope[part].clone(), hessian[part, part]
        numbers = tables.numbers[codes[part]]
        scale = tables.levels[levels[number]] * unit[number]
        before = numbers * scale
        curvature = (numbers * (within @ numbers)).sum(0)
        best = scale + (numbers * near).sum(0) / curvature.clamp_min(TINY)
        level = nearest(best / unit[number], tables.levels)
        levels[number] = torch.where(curvature > 0, level, levels[number])
        scale = tables.levels[levels[number]] * unit[number]
        near -= within @ (numbers * scale - before)
        for column in range(BLOCK_SIZE):
            old = tables.numbers[codes[start + column]] * scale
            code = nearest_code(old + near[column] / within[column, column], scale, tables)
            codes[start + column] = code
            near -= within[:, column, None] * (tables.numbers[code] * scale - old)
        slope -= hessian[:, part] @ (tables.numbers[codes[part]] * scale - before)


def dequantize(codes: torch.Tensor, levels: torch.Tensor, problem: Problem) -> torch.Tensor:
    """The quantized values Q, float32 (columns, rows)."""
    scales = problem.tables.levels[levels] * problem.unit
    return problem.tables.numbers[codes] * scales.repeat_interleave(BLOCK_SIZE, 0)


def nearest_code(values: torch.Tensor, scale: torch.Tensor, tables: Tables) -> torch.Tensor:
    """The code of each value, given its block's scale."""
    return nearest(values / scale.where(scale != 0, torch.inf), tables.numbers)


def products_error(values: torch.Tensor, problem: Problem) -> float:
    """Squared error of the products for quantized values, up to a constant."""
    difference = problem.target - values
    return (difference * (problem.hessian @ difference)).sum().item()


def in_order(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows put back to where `order` took them from."""
    placed = torch.empty_like(rows)
    placed[order] = rows
    return placed
