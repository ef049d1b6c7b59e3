"""GPTQ for NF4: the codes and scales of weights, rounded for the least error of their products.

Rounding goes column by column, and the columns still to come make up for the error so far (GPTQ,
https://arxiv.org/abs/2210.17323). The inputs are those that the layer gets in the quantized model, beside those in the
original (GPTAQ, https://arxiv.org/abs/2504.02692). Afterwards codes and scales are improved in turns by coordinate
descent. The result is NF4 like any other.

W is the weight, Q its quantized values, x an input in the original and y the same input in the quantized model. Each
may be weighted by its token's sensitivity (GuidedQuant, https://arxiv.org/abs/2505.07004).

Consumer GPUs compute float64 at 1/64 of float32's speed, so float32 has to do. Two things let it: the target is found
as W and a small difference, whose relative error hardly matters; and GPTQ's factor of the inverse Hessian is replaced
by the Cholesky factor of the Hessian itself, for which nothing is inverted (LDLQ, https://arxiv.org/abs/2307.13304,
which shows that both round alike). Of matrices the size of the Hessian there are two at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_4bit, get_4bit_type

from ..fast.ops.nf4_panels import descend_panel, nearest, round_panel
from ..repository.nf4_format import BLOCK_SIZE, NESTED_BLOCK_SIZE, NF4Weight, assemble
from .scale_search import TINY, choose_levels, code_sums, group_maxima, quantize_nf4, search_scales

PERCDAMP = 0.01  # as in GPTQ: this part of the mean of the Hessian's diagonal is added to the diagonal
SCALE_MARGIN = 1.1  # room for scales to grow beyond those of the scale search, as columns make up for each other
SWEEPS = 2
# Largest relative error of float32's Cholesky factor, by the bound on the condition number that damping sets, beyond
# which float64 is taken.
MAX_FACTOR_ERROR = 0.2


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
    """What is rounded. Columns are in the reverse of the order in which they are rounded, as Cholesky factors want it.

    Attributes:
        target: Weights to come near to, float32 (columns, rows).
        hessian: Weights of squared errors, (columns, columns).
        unit: Scale of the group of each block, float32 (blocks of a row, rows).
        tables: Constants.
    """

    target: torch.Tensor
    hessian: torch.Tensor
    unit: torch.Tensor
    tables: Tables


def round_weights(
    weights: Sequence[torch.Tensor],
    hessian: torch.Tensor,
    shift: torch.Tensor | None = None,
    *,
    percdamp: float = PERCDAMP,
    sweeps: int = SWEEPS,
) -> list[NF4Weight | None]:
    """NF4 of weights with the same input, for the least squared error of their products, that of W x - Q y.

    Args:
        weights: Each (out_features, in_features), on the device that does the work.
        hessian: H, the sum of y y', float32 or float64 (in_features, in_features). It is overwritten.
        shift: W times the sum of (x - y) y', (all out_features, in_features); None where x and y are the same.
        percdamp: Part of the mean of the Hessian's diagonal that is added to the diagonal.
        sweeps: Sweeps of coordinate descent after the first rounding.

    Returns:
        Codes and quantization state of each weight; None where the scale search does as well: rows aren't whole blocks,
        the inputs are zero or not finite, or the error of the products isn't smaller.
    """
    columns = len(hessian)
    mean = hessian.diagonal().double().mean()
    finite = hessian.isfinite().all() and (shift is None or shift.isfinite().all())
    if columns % BLOCK_SIZE or not mean > 0 or not finite:
        return [None] * len(weights)
    hessian.diagonal().add_(percdamp * mean)
    order = column_order(hessian.diagonal()).flip(0)
    for dim in (0, 1):  # in place: no third matrix of this size
        hessian.copy_(hessian.index_select(dim, order))
    factor = cholesky(hessian, percdamp)
    target = torch.cat([weight.float() for weight in weights]).T[order]
    if shift is not None:
        target += best_shift(factor, shift.T[order])
        del shift
    block_order = order[::BLOCK_SIZE] // BLOCK_SIZE
    group_scales = [choose_group_scales(weight) for weight in weights]
    units = [_block_units(*each) for each in zip(weights, group_scales, strict=True)]
    problem = Problem(target, hessian, torch.cat(units).T[block_order].contiguous(), _tables(weights[0].device))
    codes, levels, errors = round_columns(problem, factor)
    del factor
    problem = problem._replace(hessian=hessian.float())
    for _ in range(sweeps):
        coordinate_descent(codes, levels, errors, problem)
    smaller = _smaller_errors(weights, errors, problem, order)
    del errors, problem, target
    codes, levels = in_order(codes, order), in_order(levels, block_order)
    made: list[NF4Weight | None] = []
    start = 0
    for weight, scales, better in zip(weights, group_scales, smaller, strict=True):
        rows = slice(start, start + len(weight))
        parts = codes[:, rows].T.contiguous(), levels[:, rows].T.flatten()
        made.append(assemble(*parts, scales, weight.dtype) if better else None)
        start = rows.stop
    return made


def cholesky(hessian: torch.Tensor, percdamp: float) -> torch.Tensor:
    """Lower Cholesky factor of a damped Hessian, float32 where that does, else float64.

    The largest eigenvalue is at most the trace and the smallest at least the damping, so the condition number is at
    most n / percdamp.
    """
    bound = torch.finfo(torch.float32).eps * len(hessian) / percdamp
    if bound < MAX_FACTOR_ERROR or hessian.dtype == torch.float64:
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not failed.item():
            return factor
        del factor
    return torch.linalg.cholesky(hessian.double())


def best_shift(factor: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """T - W for T = W xy' / yy', the weight that makes the most of the other input, float32 (in_features, all rows).

    The error of W x - Q y is that of (T - Q) y up to a constant: the layer makes up for some of the error of those
    before it. T - W = W (x - y) y' / yy', where the damping of x y' and of y y' cancels.
    """
    half = torch.linalg.solve_triangular(factor, shift.to(factor.dtype), upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True).float()


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


def _block_units(weight: torch.Tensor, group_scales: torch.Tensor) -> torch.Tensor:
    """Scale of the group of each block, (rows, blocks of a row)."""
    return group_scales.repeat_interleave(NESTED_BLOCK_SIZE)[: weight.numel() // BLOCK_SIZE].view(len(weight), -1)


def _tables(device: torch.device) -> Tables:
    levels, numbers = create_dynamic_map().to(device), get_4bit_type("nf4", device=device)
    return Tables(code_sums(True).to(device), levels, numbers)


def round_columns(problem: Problem, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes and scales column by column from the last to the first, each making up for the errors before it.

    With H = L L' the error of a row e is the sum over columns k of (L_kk (e_k + sum over j > k of e_j L_jk / L_kk))^2.
    So the best e_k, given those after it, is minus that sum.

    Returns:
        Codes, uint8 (columns, rows); levels of the block scales, int32 (blocks of a row, rows); errors, `target` less
        the quantized values, float32 (columns, rows).
    """
    target, _, unit, tables = problem
    codes, errors = torch.empty_like(target, dtype=torch.uint8), torch.zeros_like(target)
    levels = torch.empty_like(unit, dtype=torch.int32)
    for number in reversed(range(len(unit))):
        part = slice(number * BLOCK_SIZE, (number + 1) * BLOCK_SIZE)
        within, pull = factor[part, part].float(), factor[part.stop :, part].float().T @ errors[part.stop :]
        # What the block's values would best be if none were rounded, for its scale.
        wanted = target[part] + torch.linalg.solve_triangular(within.T, pull, upper=True)
        found = search_scales(wanted.T.contiguous(), tables.sums)
        levels[number] = choose_levels(found, unit[number][:, None], tables.levels)
        scale = tables.levels[levels[number]] * unit[number]
        diagonal = within.diagonal()
        adjusted = target[part] + pull / diagonal[:, None]
        codes[part], errors[part] = round_panel(target[part], adjusted, within / diagonal, scale, tables.numbers)
    return codes, levels, errors


def coordinate_descent(codes: torch.Tensor, levels: torch.Tensor, errors: torch.Tensor, problem: Problem) -> None:
    """Set each block's scale and then each of its codes to the best, all others given, from the last to the first.

    The error never grows.

    Args:
        codes: As of `round_columns`, changed in place, as are the next two.
        levels: See there.
        errors: See there.
        problem: What is rounded, its Hessian in float32.
    """
    _, hessian, unit, tables = problem
    slope = hessian @ errors
    for number in reversed(range(len(unit))):
        part = slice(number * BLOCK_SIZE, (number + 1) * BLOCK_SIZE)
        within, near = hessian[part, part], slope[part]
        numbers = tables.numbers[codes[part].int()]
        scale = tables.levels[levels[number]] * unit[number]
        curvature = (numbers * (within @ numbers)).sum(0)
        best = scale + (numbers * near).sum(0) / curvature.clamp_min(TINY)
        level = nearest(best / unit[number], tables.levels)
        levels[number] = torch.where(curvature > 0, level, levels[number])
        chosen = tables.levels[levels[number]] * unit[number]
        rescaled = numbers * (chosen - scale)
        codes[part], changes = descend_panel(near - within @ rescaled, within, chosen, codes[part], tables.numbers)
        changes += rescaled
        errors[part] -= changes
        slope.addmm_(hessian[:, part], changes, alpha=-1)


def products_error(errors: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Squared error of each row's products up to a constant, (rows,), given (columns, rows) of errors."""
    return (errors * (hessian @ errors)).sum(0)


def _smaller_errors(
    weights: Sequence[torch.Tensor], errors: torch.Tensor, problem: Problem, order: torch.Tensor
) -> list[bool]:
    """Whether each weight's products have a smaller error than with the scale search."""
    smaller, start = [], 0
    for weight in weights:
        rows = slice(start, start + len(weight))
        searched = problem.target[:, rows] - dequantize_4bit(*quantize_nf4(weight)).float().T[order]
        found, other = (products_error(each, problem.hessian).sum() for each in (errors[:, rows], searched))
        smaller.append(bool(found < other))
        start = rows.stop
    return smaller


def in_order(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows put back to where `order` took them from."""
    placed = torch.empty_like(rows)
    placed[order] = rows
    return placed
