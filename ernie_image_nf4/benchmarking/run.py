"""Run all arms, each in a process of its own, on one device in one run.

The workload is the model card's two experiments: one picture, and several in a row after one load.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import DeviceUnavailable
from ..memory.placement import find_device
from ..quantization.convert import quantize
from ..quantization.resumable_output import is_finished
from ..quantization.synthetic import synthesize
from .arms import ARMS, DEFAULT_WORKLOAD, LOADED_AGAIN, PROMPT, Arm, Workload
from .device import describe_machine, free_unused_memory
from .growth import measure_growth
from .interrupted import is_same_run
from .predictions import compare_predictions, has_predictions, remove_predictions, save_exact_predictions
from .processes import in_own_process, process_context
from .worker import measure_arm

ORIGINAL, NF4 = "ERNIE-Image", "ERNIE-Image-NF4"  # of `make_synthetic`


def benchmark(
    model: str | Path,
    original: str | Path | None,
    work: Path,
    *,
    arms: Sequence[Arm] = ARMS,
    workload: Workload = DEFAULT_WORKLOAD,
    device: str = "cuda",
    growth: bool = True,
    earlier: Mapping[str, Any] | None = None,
    on_progress: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Run all arms and collect what they measure.

    Args:
        model: Folder of the NF4 repository.
        original: Folder of the original one; without it the arms that need it have an error.
        work: Folder for the caches of compiled kernels, and for the predictions that are compared.
        arms: What to run, in this order.
        workload: What each arm does.
        device: To run on.
        growth: Whether to measure how a step's time grows with size and batch.
        earlier: Result of an interrupted run with the same `work`, to go on with. One of another machine, workload or
            version is left alone.
        on_progress: Called with the result so far after each arm and each later part: a run takes a quarter of an hour.

    Returns:
        Machine, versions, command, workload, a list of ``arms`` with their figures or the error that kept one from
        running, in ``float32`` the seconds that the predictions in float32 took or their error, and in ``growth`` the
        table of steps.

    Raises:
        DeviceUnavailable: There is no such device.
    """
    find_device(device)
    work.mkdir(parents=True, exist_ok=True)
    run = functools.partial(in_own_process, process_context(device))
    result = _machine(run, device) | {"workload": asdict(workload), "prompt": PROMPT, "arms": []}
    kept = _finished(earlier or {}, result, arms, work)
    if not kept["arms"]:
        remove_predictions(work)

    def measure(arm: Arm, pictures: int | None = None) -> dict[str, Any]:
        return run(measure_arm, arm, model, original, work, workload, device, pictures)

    if workload.loads > 1 and not kept["arms"]:
        measure(arms[0], pictures=0)  # The first process on a machine is slower than later ones
    for arm in arms:
        if arm.name in kept["arms"]:
            result["arms"].append(kept["arms"][arm.name])
            continue
        print(f"{arm.name} ...", file=sys.stderr, flush=True)
        figures = measure(arm)
        result["arms"].append(_head(arm) | figures)
        print(f"  {_brief(figures)}", file=sys.stderr, flush=True)
        compare_predictions(result["arms"], work)
        on_progress(result)
    for arm, row in zip(arms, result["arms"], strict=True):
        if arm.name in LOADED_AGAIN and not {"error", "all_load_s"} & row.keys():
            _take_median_load(row, [measure(arm, pictures=0) for _ in range(workload.loads - 1)])
            on_progress(result)
    result["float32"] = kept["float32"] or run(save_exact_predictions, model, work, workload.size, device)
    compare_predictions(result["arms"], work)
    on_progress(result)
    if growth:
        result["growth"] = kept["growth"] or run(measure_growth, model, device)
        on_progress(result)
    return result


def make_synthetic(folder: str | Path, *, preset: str = "full") -> tuple[Path, Path]:
    """Repositories with random weights, made unless they are there. What a killed run left isn't taken for one.

    Args:
        folder: Where they are, or are to be.
        preset: Their size, as for `synthesize`.

    Returns:
        The NF4 repository and the original one, both below `folder`.

    Raises:
        InvalidSettings: There is something else in their place.
        DiskFull: There is no room for them.
    """
    original, nf4 = Path(folder) / ORIGINAL, Path(folder) / NF4
    if not is_finished(original):
        synthesize(original, preset=preset)
    if not is_finished(nf4):
        quantize(original, nf4)
        free_unused_memory()  # Else this process would keep the GPU's from those that measure
    return nf4, original


def _head(arm: Arm) -> dict[str, Any]:
    """What a row says of its arm."""
    return {"name": arm.name, "way": arm.way, "options": arm.options} | ({"work": arm.work} if arm.work else {})


def _finished(earlier: Mapping[str, Any], result: Mapping[str, Any], arms: Sequence[Arm], work: Path) -> dict[str, Any]:
    """What an earlier run finished of what `result` begins: rows by their arms' names, and the parts after the arms."""
    if not is_same_run(earlier, result, ("machine", "versions", "workload", "prompt")):
        earlier = {}
    heads = {arm.name: _head(arm) for arm in arms}
    rows = {
        name: row
        for row in earlier.get("arms", ())
        if "error" not in row
        and (name := row["name"]) in heads
        and is_same_run(row, heads[name], heads[name])
        and has_predictions(row, work)
    }
    parts = {name: earlier.get(name, {}) for name in ("float32", "growth")}
    ended = {name: part if rows and "error" not in part else {} for name, part in parts.items()}
    return {"arms": rows} | ended


def _machine(run: Callable[..., dict[str, Any]], device: str) -> dict[str, Any]:
    """As `describe_machine`, from a process of its own, which shows whether such processes can use the device."""
    machine = run(describe_machine, device)
    if "error" in machine:
        raise DeviceUnavailable(f"Processes of their own can't use {device}: {machine['error']}")
    return machine


def _take_median_load(row: dict[str, Any], again: Sequence[dict[str, Any]]) -> None:
    """Replace an arm's loading time by the median of several: one depends on what the machine has just done."""
    row["all_load_s"] = [row["load_s"], *(figures["load_s"] for figures in again if "load_s" in figures)]
    row["load_s"] = statistics.median(row["all_load_s"])


def _brief(figures: dict[str, Any]) -> str:
    """The main figures of an arm in one line, or its error."""
    if "error" in figures:
        return figures["error"]
    return ", ".join(
        f"{key} {figures[key]:.3g}"
        for key in ("load_s", "first_s", "seconds", "prompt_enhancer_ms_per_token", "step_ms", "peak_reserved_gib")
        if key in figures
    )
