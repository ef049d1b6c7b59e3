"""What `benchmarks.nf4_mini` measured: the tables of README and docs/fidelity.md, and the chart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ernie_image_nf4.evaluation.report import markdown_table

# Format -> its name in tables and chart.
NAMES = {
    "original": "bfloat16 original",
    "stock": "stock NF4",
    "scale_search": "NF4, scale search",
    "default": "NF4, scale search and kept layers (`quantize`)",
    "calibrated": "NF4, calibrated as well (`quantize --calibrate`)",
    "sdnq-uint4": "SDNQ uint4",
    "sdnq-uint4-products": "SDNQ uint4, quantized products",
    "sdnq-int8": "SDNQ int8, quantized products",
    "torchao-int4": "torchao int4",
    "torchao-float8": "torchao float8",
    "quanto-int4": "optimum-quanto int4",
    "quanto-int8": "optimum-quanto int8",
    "gguf-q4_0": "GGUF Q4_0",
}
# In the chart, where ours have a colour of their own.
SHORT_NAMES = {"scale_search": "scale search", "default": "quantize", "calibrated": "quantize --calibrate"}
LEFT_OUT = ("scale_search",)  # of the short table: a step on the way


def table(run: dict[str, Any]) -> str:
    """What the formats of other libraries and ours cost and give on the mini."""
    measured = [result for result in run["results"].values() if "error" not in result]
    lpips = "lpips" if any(result.get("lpips") is not None for result in measured) else "st_lpips"
    columns = {
        "bits a weight": (lambda result: result["bits_per_weight"].get("transformer"), ".2f"),
        "weight error": (lambda result: result["weight_error"].get("transformer"), ".4f"),
        "prediction error": (lambda result: result["prediction_error"], ".4f"),
        "PSNR (dB)": (lambda result: result.get("psnr"), ".2f"),
        "SSIM": (lambda result: result.get("ssim"), ".4f"),
        lpips.upper().replace("_", "-"): (lambda result: result.get(lpips), ".4f"),
        "objects right": (lambda result: result.get("object_accuracy"), ".1%"),
    }
    shown = {title: each for title, each in columns.items() if any(each[0](result) is not None for result in measured)}
    rows = [
        [
            NAMES[name],
            *("–" if (value := get(result)) is None else f"{value:{form}}" for get, form in shown.values()),
        ]
        for name, result in run["results"].items()
        if "error" not in result
    ]
    return markdown_table(["", *shown], rows)


def short_table(run: dict[str, Any]) -> str:
    """Of the same run, what decides: bytes, nearness and what is seen."""
    shown = [(name, result) for name, result in compared(run) if name not in LEFT_OUT]
    judged = any("object_accuracy" in result for _, result in shown)
    rows = [
        [
            NAMES[name],
            f"{result['bits_per_weight']['transformer']:.2f}",
            f"{result['psnr']:.1f}",
            *([f"{result['object_accuracy']:.1%}" if "object_accuracy" in result else "–"] if judged else []),
        ]
        for name, result in shown
    ]
    return markdown_table(["", "bits a weight", "PSNR (dB)", *(["objects right"] if judged else [])], rows)


def compared(run: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Formats whose pictures were compared with the original's, with their results."""
    for name, result in run["results"].items():
        if "error" not in result and "psnr" in result:
            yield name, result


def chart_values(run: dict[str, Any]) -> dict[str, list[float]]:
    """What the chart shows: format -> bits a weight of the transformer and PSNR in dB, as the short table has them."""
    return {
        SHORT_NAMES.get(name, NAMES[name]): [
            round(result["bits_per_weight"]["transformer"], 2),
            round(result["psnr"], 1),
        ]
        for name, result in compared(run)
    }


def draw_chart(run: dict[str, Any], path: Path) -> None:
    """Draw PSNR over bits a weight. The PNG's text ``Description`` keeps the values."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a display

    values = chart_values(run)
    ours = [name in SHORT_NAMES for name, _ in compared(run)]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots()
    for own, (name, (bits, psnr)) in zip(ours, values.items(), strict=True):
        colour = "#3b76af" if own else "#777777"
        axes.plot(bits, psnr, marker="o" if own else "s", color=colour, linestyle="", markersize=7)
        axes.annotate(
            f"{name}: {psnr:.1f}",
            (bits, psnr),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            size=9,
        )
    axes.set_xlabel("bits a weight of the transformer, scales and kept layers included")
    axes.set_ylabel("PSNR to the original's pictures (dB)")
    axes.set_xlim(4, max(bits for bits, _ in values.values()) + 0.25)
    axes.margins(y=0.15)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=120, metadata={"Description": json.dumps(values)})
