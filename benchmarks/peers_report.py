"""What `benchmarks.peers` measured: headline figures, the table of docs/speed.md, and the chart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ernie_image_nf4.evaluation.report import markdown_table

SIZES = ("512", "1024")
WAYS = ("plain", "compiled")
FOUR_BITS = 6  # bits a weight, scales included, below which a format is one of 4 bits
# Arm -> its name in tables and chart.
NAMES = {
    "ours": "ours, `resident`",
    "ours-int8": 'ours, `products="int8"`',
    "ours-fp8": 'ours, `products="fp8"`',
    "bfloat16": "original in bfloat16",
    "nf4-stock": "stock NF4",
    "torchao-float8": "torchao float8",
    "torchao-int4": "torchao int4",
    "quanto-int4": "optimum-quanto int4",
    "gguf-q4_0": "GGUF Q4_0",
    "sdnq-uint4": "SDNQ uint4",
    "sdnq-uint4-products": "SDNQ uint4, quantized products",
    "sdnq-int8": "SDNQ int8, quantized products",
    "nunchaku-lite": "Nunchaku-Lite",
}
OURS = tuple(name for name in NAMES if name.startswith("ours"))
TEXTS = {
    key: text
    for name, words in NAMES.items()
    for key, text in {
        f"peers.gib.{name}": f"full-size transformer with random weights on an H100, {words}: GiB that it holds",
        f"peers.step_ms_512.{name}": "... step with guidance at 512x512, plain or compiled, the faster, ms",
        f"peers.step_ms_1024.{name}": "... at 1024x1024",
    }.items()
}
MARKERS = "os^vD<>pPXh*d"
OUR_COLOURS = ("#3b76af", "#1b4a7a", "#7fb2e5")
INTRODUCTION = """\
At full size with random weights on one H100: plain, and with diffusers' `compile_repeated_blocks`. Only the transformer
is on the GPU. *Held* is what its weights take there; *to make* is the quantization of weights that are on the GPU
already, which the others do after each load; ours are made once, by `quantize`."""
CHART_ALT = "Milliseconds of a step over GiB of the transformer, of each format, at 512x512 and 1024x1024"


def figures(run: dict[str, Any]) -> dict[str, float]:
    """Headline figures of the arms that have them."""
    found: dict[str, float] = {}
    for row in run["arms"]:
        values = {"gib": row.get("gib")} | {f"step_ms_{size}": fastest(row, size) for size in SIZES}
        found |= {f"peers.{key}.{row['name']}": float(f"{value:.4g}") for key, value in values.items() if value}
    return found


def fastest(row: dict[str, Any], size: str) -> float | None:
    """Milliseconds of a step, plain or compiled, whichever is faster; None if neither was measured."""
    return min((step for way in WAYS if (step := step_ms(row, way, size))), default=None)


def step_ms(row: dict[str, Any], way: str, size: str) -> float | None:
    return row.get(way, {}).get(size, {}).get("step_ms")


def section(run: dict[str, Any], chart: str) -> str:
    """The text of docs/speed.md: chart, table, and where ours is ahead.

    Args:
        run: The result.
        chart: The chart's path from that page.
    """
    return "\n\n".join([INTRODUCTION, f"![{CHART_ALT}]({chart})", table(run), comparison(run)])


def table(run: dict[str, Any]) -> str:
    """A row for each arm, with figures or with the reason why there are none."""
    columns = ["bits a weight", "GiB held", *(f"{size}, {way} (ms)" for size in SIZES for way in WAYS)]
    columns += ["peak at 1024 (GiB)", "seconds to make", "what kept it"]
    rows = []
    for row in run["arms"]:
        steps = [number(step_ms(row, way, size), 1) for size in SIZES for way in WAYS]
        peak = row.get("plain", {}).get("1024", {}).get("peak_reserved_gib")
        rows.append(
            [
                NAMES[row["name"]],
                number(row.get("bits_per_weight"), 2),
                number(row.get("gib"), 2),
                *steps,
                number(peak, 2),
                number(row.get("make_s"), 1),
                " ".join(reasons(row)),
            ]
        )
    return markdown_table(["", *columns], rows)


def reasons(row: dict[str, Any]) -> Iterator[str]:
    """Why figures of an arm are missing."""
    if "error" in row:
        yield row["error"]
    if "error" in (compiled := row.get("compiled", {})):
        yield f"Compiled: {compiled['error']}"


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def comparison(run: dict[str, Any]) -> str:
    """For each of our arms that ran, the 4-bit formats that are faster, by name and figures, or that none is."""
    rows = {row["name"]: row for row in run["arms"]}
    peers = [row for name, row in rows.items() if name not in OURS and row.get("bits_per_weight", 16) < FOUR_BITS]
    lines = []
    for name in OURS:
        own = {size: step for size in SIZES if (step := fastest(rows.get(name, {}), size))}
        if not own:
            continue
        met = [NAMES[peer["name"]] for peer in peers if any(fastest(peer, size) for size in own)]
        if not met:
            continue
        behind = [
            f"{NAMES[peer['name']]} at {size}x{size} ({other:.1f} ms, ours {step:.1f})"
            for size, step in own.items()
            for peer in peers
            if (other := fastest(peer, size)) and other < step
        ]
        if behind:
            lines.append(f"- {NAMES[name]}: slower than {', '.join(behind)}.")
        else:
            sizes = " and ".join(f"{size}x{size}" for size in own)
            lines.append(
                f"- {NAMES[name]}: ahead of {', '.join(met)} at {sizes}, plain and compiled, as far as these ran."
            )
    return "\n".join(lines)


def chart_values(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the chart shows: name -> GiB, and size -> milliseconds plain and compiled, as far as measured."""
    return {
        NAMES[row["name"]].replace("`", ""): {"gib": row["gib"]}
        | {size: {way: step for way in WAYS if (step := step_ms(row, way, size))} for size in SIZES}
        for row in run["arms"]
        if "gib" in row and fastest(row, SIZES[0])
    }


def draw_chart(run: dict[str, Any], path: Path) -> None:
    """Draw time over memory, a panel for each size. The PNG's text ``Description`` keeps the values."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a display

    values = chart_values(run)
    others = (f"C{number}" for number in range(1, 10))
    ours = iter(OUR_COLOURS)
    styles = {
        name: {"color": next(ours if name.startswith("ours") else others), "marker": marker}
        for name, marker in zip(values, MARKERS, strict=False)
    }
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, len(SIZES))
    for axes, size in zip(panels, SIZES, strict=True):
        for name, row in values.items():
            steps = row[size]
            axes.plot([row["gib"]] * len(steps), list(steps.values()), color=styles[name]["color"], linewidth=1)
            for way, step in steps.items():
                hollow = way == "plain" and not name.startswith("ours")
                face = "none" if hollow else styles[name]["color"]
                axes.plot(row["gib"], step, **styles[name], markerfacecolor=face, linestyle="", markersize=8)
        axes.set_title(f"a step at {size}x{size} (ms)", fontsize="medium")
        axes.set_xlabel("GiB that the transformer holds")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_minor_formatter("{x:.0f}")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    for name, style in styles.items():
        panels[-1].plot([], [], **style, linestyle="", label=name)
    title = "hollow: plain\nfilled: compiled, or ours\n"
    figure.legend(loc="outside right center", frameon=False, fontsize="small", title=title, alignment="left")
    figure.savefig(path, format="png", dpi=120, metadata={"Description": json.dumps(values)})
