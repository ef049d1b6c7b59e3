"""What `benchmark` measured as files: JSON, a Markdown table and a bar chart."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..evaluation.report import markdown_table, write_files
from .run import REFERENCE

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
LARGE_COLUMNS = {"step (ms)": ("step_ms", 1), "peak reserved (GiB)": ("peak_reserved_gib", 2)}


def write_benchmark(result: dict[str, Any], folder: str | os.PathLike[str], name: str = "benchmark") -> list[Path]:
    """Write ``NAME.json``, ``NAME.md`` and ``NAME.png`` into a folder, over those of an earlier run.

    Args:
        result: Of `benchmark.benchmark`.
        folder: Made if need be.
        name: Of the files.

    Returns:
        The files. The chart is left out where matplotlib isn't installed.

    Raises:
        InvalidSettings: The folder can't be written to.
    """
    folder = Path(folder)
    text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    writers = {
        f"{name}.json": lambda path: path.write_text(text, encoding="utf-8"),
        f"{name}.md": lambda path: path.write_text(markdown(result), encoding="utf-8"),
    }
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        pass
    else:
        writers[f"{name}.png"] = lambda path: bar_chart(result, path)
    return write_files(folder, writers)


def markdown(result: dict[str, Any]) -> str:
    """The tables of ``benchmark.md``: all arms, the large size, and how a step grows."""
    workload = result["workload"]
    size, large = workload["size"], workload["large"]
    sections = [
        f"# {size}x{size}, {workload['steps']} steps, guidance {workload['guidance']}, {workload['tokens']} tokens of prompt enhancing",
        f"{result['machine']}. Medians of the pictures after the first; prediction error: largest relative error of the "
        "transformer's output over ten timesteps against the demo, in the demo's own row that of its batch reordered; to float32: "
        "against the same weights computed in float32.",
        arms_table(result),
    ]
    peers = [arm for arm in result["arms"] if arm["way"] == "peer" and "error" not in arm]
    if peers:
        sections += [
            "Other libraries' formats, **without the prompt enhancer**; quantized on the GPU while loading:",
            _table(peers, COLUMNS),
        ]
    ran = [*result["arms"], {"name": "predictions in float32"} | result.get("float32", {})]
    notes = [f"- {arm['name']}: could not run, {arm['error']}" for arm in ran if "error" in arm]
    if notes:
        sections.append("\n".join(notes))
    measured = [{"name": arm["name"]} | arm["large"] for arm in result["arms"] if "large" in arm]
    if measured:
        sections += [
            f"## {large}x{large}, without the prompt enhancer",
            f"The second of two pictures of {max(2, workload['steps'] // 5)} steps.",
            _table(measured, LARGE_COLUMNS),
        ]
    if "rows" in result.get("growth", {}):
        sections += [
            "## How a step grows",
            f"Resident, not compiled. Floor: the products' operations at {result['growth']['tflop_per_s']:.0f} TFLOP/s, the rate of "
            "one large product in the same run.",
            markdown_table(
                ["size, batch", "step (ms)", "TFLOP", "over the floor"],
                [
                    [
                        f"{row['size']}x{row['size']}, {row['batch']}",
                        f"{row['step_ms']:.1f}",
                        f"{row['tflop']:.1f}",
                        f"{row['over_floor']:.2f}",
                    ]
                    for row in result["growth"]["rows"]
                ],
            ),
        ]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n\n".join([*sections, "## Made with", versions, f"`{result['command']}`"]) + "\n"


def arms_table(result: dict[str, Any]) -> str:
    """All arms but other libraries' formats."""
    return _table([arm for arm in result["arms"] if arm["way"] != "peer"], COLUMNS)


def _table(arms: list[dict[str, Any]], columns: dict[str, tuple[str, int]]) -> str:
    measured = [arm for arm in arms if "error" not in arm]
    columns = {title: column for title, column in columns.items() if any(column[0] in arm for arm in measured)}
    rows = [
        [arm["name"], *(f"{arm[key]:.{digits}f}" if key in arm else "–" for key, digits in columns.values())]
        for arm in measured
    ]
    return markdown_table(["", *columns], rows)


def bar_chart(result: dict[str, Any], path: Path) -> None:
    """Seconds per picture and peak reserved memory of every arm with a prompt enhancer, the demo's as a line."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a display

    arms = [arm for arm in result["arms"] if "error" not in arm and arm["way"] != "peer"]
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
