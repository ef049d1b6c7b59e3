"""A benchmark's result as files: JSON, Markdown tables and a bar chart."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..evaluation.plots import has_matplotlib
from ..evaluation.report import markdown_table, write_files
from .arms import ARMS, REFERENCE, has_own_work, is_baseline

# Title -> (key of an arm's row, digits after the point)
COLUMNS = {
    "load (s)": ("load_s", 1),
    "first picture (s)": ("first_s", 1),
    "s per picture": ("seconds", 2),
    "prompt enhancer (ms a token)": ("prompt_enhancer_ms_per_token", 1),
    "step (ms)": ("step_ms", 1),
    "peak reserved, loading (GiB)": ("loading_peak_reserved_gib", 2),
    "drawing (GiB)": ("peak_reserved_gib", 2),
    "peak allocated (GiB)": ("peak_allocated_gib", 2),
    "prediction error": ("prediction_error", 4),
    "to float32": ("prediction_error_to_float32", 4),
}
TURBO_COLUMNS = {
    "s per picture": ("seconds", 2),
    "step (ms)": ("step_ms", 1),
    "peak reserved (GiB)": ("peak_reserved_gib", 2),
}
LARGE_COLUMNS = {"step (ms)": ("step_ms", 1), "peak reserved (GiB)": ("peak_reserved_gib", 2)}


def write_benchmark(result: dict[str, Any], folder: str | os.PathLike[str], name: str = "benchmark") -> list[Path]:
    """Write ``NAME.json``, ``NAME.md`` and ``NAME.png`` into a folder, over those of an earlier run.

    Args:
        result: As from `run.benchmark`.
        folder: Made if it doesn't exist.
        name: Of the files.

    Returns:
        The files. Without matplotlib there is no chart.

    Raises:
        InvalidSettings: The folder can't be written to.
    """
    text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    writers: dict[str, Callable[[Path], object]] = {
        f"{name}.json": lambda path: path.write_text(text, encoding="utf-8"),
        f"{name}.md": lambda path: path.write_text(markdown(result), encoding="utf-8"),
    }
    if has_matplotlib():
        writers[f"{name}.png"] = lambda path: bar_chart(result, path)
    return write_files(Path(folder), writers)


def markdown(result: dict[str, Any]) -> str:
    """The text of ``benchmark.md``: all arms, baselines, the large size, and how a step grows."""
    workload = result["workload"]
    size = workload["size"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    sections = [
        f"# {size}x{size}, {workload['steps']} steps, guidance {workload['guidance']}, "
        f"{workload['tokens']} tokens of prompt enhancing",
        f"{result['machine']}. Medians of the pictures after the first; prediction error: largest relative error of "
        "the transformer's output over ten timesteps against the demo, in the demo's own row that of its batch "
        "reordered; to float32: against the same weights computed in float32.",
        arms_table(result),
        *_turbo_section(result),
        *_baseline_section(result),
        *_failures(result),
        *_large_section(result),
        *_growth_section(result),
        "## Made with",
        versions,
        f"`{result['command']}`",
    ]
    return "\n\n".join(sections) + "\n"


def arms_table(result: dict[str, Any]) -> str:
    """All arms but the baselines and those with work of their own."""
    return _table(_same_work(result), COLUMNS)


def turbo_table(result: dict[str, Any]) -> str:
    """Pictures as ERNIE-Image-Turbo draws them, at both sizes."""
    arms = [arm for arm in _present(result) if has_own_work(arm) and "error" not in arm]
    sizes = [
        figures | {"name": f"{arm['name']}, {size}x{size}"}
        for arm in arms
        for size, figures in ((result["workload"]["size"], arm), (arm.get("large", {}).get("size"), arm.get("large")))
        if figures
    ]
    return _table(sizes, TURBO_COLUMNS)


def bar_chart(result: dict[str, Any], path: Path) -> None:
    """Seconds per picture and peak reserved memory of each arm with a prompt enhancer, the demo's as a dotted line."""
    from matplotlib.figure import Figure  # Not pyplot, which looks for a display

    arms = [arm for arm in _same_work(result) if "error" not in arm]
    names = [arm["name"] for arm in arms]
    figure = Figure(figsize=(10, 0.9 + 0.42 * len(arms)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, label in (
        (left, "seconds", "seconds per picture"),
        (right, "peak_reserved_gib", "peak reserved memory (GiB)"),
    ):
        values = [arm.get(key, 0.0) for arm in arms]
        bars = axes.barh(names, values, color=["#999999" if arm["way"] != "ours" else "#3b76af" for arm in arms])
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize="small")
        for arm in arms:
            if arm["name"] == REFERENCE and key in arm:
                axes.axvline(arm[key], color="#999999", linestyle=":", linewidth=1)
        axes.set_xlabel(label)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    left.invert_yaxis()
    figure.savefig(path, format="png", dpi=120)


def _present(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the arms in today's table and of baselines: older files have rows of arms that are gone."""
    names = {arm.name for arm in ARMS}
    return [arm for arm in result["arms"] if arm["name"] in names or is_baseline(arm)]


def _same_work(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the workload's pictures by this package, the demo and the original."""
    return [arm for arm in _present(result) if not is_baseline(arm) and not has_own_work(arm)]


def _turbo_section(result: dict[str, Any]) -> list[str]:
    arms = [arm for arm in _present(result) if has_own_work(arm) and "error" not in arm]
    if not arms:
        return []
    work = arms[0]["work"]
    return [
        f"## As ERNIE-Image-Turbo: {work['steps']} steps, guidance {work['guidance']}",
        "Medians of the pictures after the first; at the large size the second of two.",
        turbo_table(result),
    ]


def _baseline_section(result: dict[str, Any]) -> list[str]:
    baselines = [arm for arm in _present(result) if is_baseline(arm) and "error" not in arm]
    if not baselines:
        return []
    return [
        "Other libraries' formats, **without the prompt enhancer**; quantized on the GPU while loading:",
        _table(baselines, COLUMNS),
    ]


def _failures(result: dict[str, Any]) -> list[str]:
    """A list of what could not run, as one section, if anything."""
    ran = [*_present(result), {"name": "predictions in float32"} | result.get("float32", {})]
    notes = [f"- {arm['name']}: could not run, {arm['error']}" for arm in ran if "error" in arm]
    return ["\n".join(notes)] if notes else []


def _large_section(result: dict[str, Any]) -> list[str]:
    workload = result["workload"]
    compared = [arm for arm in _present(result) if not has_own_work(arm)]
    measured = [{"name": arm["name"]} | arm["large"] for arm in compared if "large" in arm]
    if not measured:
        return []
    return [
        f"## {workload['large']}x{workload['large']}, without the prompt enhancer",
        f"The second of two pictures of {max(2, workload['steps'] // 5)} steps.",
        _table(measured, LARGE_COLUMNS),
    ]


def _growth_section(result: dict[str, Any]) -> list[str]:
    growth = result.get("growth", {})
    if "rows" not in growth:
        return []
    rows = [
        [
            f"{row['size']}x{row['size']}, {row['batch']}",
            f"{row['step_ms']:.1f}",
            f"{row['tflop']:.1f}",
            f"{row['over_floor']:.2f}",
        ]
        for row in growth["rows"]
    ]
    return [
        "## How a step grows",
        f"Resident. Floor: the products' operations at {growth['tflop_per_s']:.0f} TFLOP/s, the rate of one large "
        "product in the same run.",
        markdown_table(["size, batch", "step (ms)", "TFLOP", "over the floor"], rows),
    ]


def _table(arms: list[dict[str, Any]], columns: dict[str, tuple[str, int]]) -> str:
    """A row for each arm that ran, a column for each figure that any of them has."""
    measured = [arm for arm in arms if "error" not in arm]
    shown = {title: column for title, column in columns.items() if any(column[0] in arm for arm in measured)}
    rows = [
        [arm["name"], *(f"{arm[key]:.{digits}f}" if key in arm else "–" for key, digits in shown.values())]
        for arm in measured
    ]
    return markdown_table(["", *shown], rows)
