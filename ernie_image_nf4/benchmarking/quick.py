"""A short measurement, which the owner of a card that we haven't can send us: one row."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import DeviceUnavailable, InvalidSettings
from ..evaluation.report import markdown_table
from ..fast.products import AUTO, CAPABILITY, find_products, set_products
from ..fast.transformer import computation_dtype
from ..loading.pipeline import load
from ..memory.apply import memory_mode
from ..memory.placement import find_device, free_memory
from ..repository.metadata import PACKAGE
from .arms import DEFAULT_WORKLOAD
from .device import GIB, describe_machine, peak_memory, synchronize
from .processes import in_own_process, process_context
from .worker import draw_timed

STEPS = 4  # the first is left out of the median, the second may be captured
TOKENS = DEFAULT_WORKLOAD.tokens  # as in the long one, where reading the prompt is a small part of it
GUIDANCE = 4.0
LIMIT_S = 90  # after which nothing new is begun


def benchmark_quick(
    model: str | Path, sizes: Sequence[int], *, device: str = "cuda", memory: str = "auto"
) -> dict[str, Any]:
    """Step time at some sizes in each kind of product that the device has, and what loading and enhancing take.

    Args:
        model: Folder of the NF4 repository.
        sizes: Heights and widths of the pictures.
        device: To run on.
        memory: As for `load`.

    Returns:
        Machine, versions and command; the card's ``capability``, ``total_gib`` and ``free_gib`` (None of a CPU); memory
        mode and dtype; ``load_s``; ``enhancer_ms_per_token`` (None without enhancer); peaks in GiB; and
        ``step_ms``: products -> size -> milliseconds, None where `LIMIT_S` had passed.

    Raises:
        DeviceUnavailable: There is no such device, it can't be used, or has too little memory.
    """
    find_device(device)
    result = in_own_process(process_context(device), measure_card, model, sizes, device, memory)
    if "error" in result:
        raise DeviceUnavailable(f"The benchmark failed on {device}: {result['error']}")
    return result


def measure_card(
    model: str | Path, sizes: Sequence[int], device: str, memory: str = "auto", limit_s: float = LIMIT_S
) -> dict[str, Any]:
    """`benchmark_quick` in this process.

    Args:
        model: As there, and so are the next three.
        sizes: See there.
        device: See there.
        memory: See there.
        limit_s: Seconds after which nothing new is begun.
    """
    began = time.perf_counter()
    result = describe_machine(device) | describe_card(device)
    loading = time.perf_counter()
    pipe = load(model, device=device, memory=memory)
    synchronize(device)
    result |= {"load_s": time.perf_counter() - loading, "memory": memory_mode(pipe)}
    dtype = computation_dtype(pipe.transformer)
    result |= {"dtype": str(dtype).removeprefix("torch.")}
    pipe.set_progress_bar_config(disable=True)
    tokens = TOKENS if pipe.pe is not None else 0
    for seed in range(2):  # the first one compiles kernels
        picture = draw_timed(pipe, sizes[0], STEPS, GUIDANCE, tokens, seed, device)
    result["enhancer_ms_per_token"] = 1000 * picture["prompt_enhancer_s"] / tokens if tokens else None
    result["step_ms"] = {result["dtype"]: {sizes[0]: picture["step_ms"]}}
    for products in (AUTO, *CAPABILITY):
        try:
            set_products(pipe.transformer, find_products(products, torch.device(device), dtype, fast=True))
        except InvalidSettings:  # the device has none
            continue
        times = result["step_ms"].setdefault(result["dtype"] if products == AUTO else products, {})
        for size in sizes:
            if size not in times:
                enough = time.perf_counter() - began > limit_s
                times[size] = None if enough else draw_timed(pipe, size, STEPS, GUIDANCE, 0, 0, device)["step_ms"]
    return result | peak_memory(device) | {"seconds": time.perf_counter() - began}


def describe_card(device: str) -> dict[str, Any]:
    """Compute capability, and the memory in GiB that the device has and that is free; None for the machine's own."""
    where = find_device(device)
    free = free_memory(where)
    if where.type != "cuda" or free is None:
        return {"capability": None, "total_gib": None, "free_gib": None}
    total = torch.cuda.get_device_properties(where).total_memory
    capability = ".".join(map(str, torch.cuda.get_device_capability(where)))
    return {"capability": capability, "total_gib": total / GIB, "free_gib": free / GIB}


def row(result: dict[str, Any]) -> str:
    """A Markdown table of one row: the card, how it was used, milliseconds of a step, memory."""
    versions = result["versions"]
    cells = {
        "card": f"{result['machine']}" + (f" ({result['capability']})" if result["capability"] else ""),
        "memory (GiB), free": f"{_number(result['total_gib'], 1)}, {_number(result['free_gib'], 1)}",
        "versions": f"{versions[PACKAGE]}, torch {versions['torch']}",
        "mode, dtype": f"{result['memory']}, {result['dtype']}",
        "load (s)": _number(result["load_s"], 1),
        "enhancer (ms a token)": _number(result["enhancer_ms_per_token"], 1),
    }
    for products, times in result["step_ms"].items():
        sizes = " / ".join(f"{size}" for size in times)
        cells[f"step in {products}, {sizes} (ms)"] = " / ".join(_number(value, 1) for value in times.values())
    cells["peak reserved (GiB)"] = _number(result.get("peak_reserved_gib"), 2)
    return markdown_table(list(cells), [list(cells.values())])


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
