"""The headline figures of all measurements here, as one flat object in ``summary.json``, and as tables in the README.

    python -m benchmarks.summary

Every figure is read from the JSON of the run that measured it; what wasn't measured yet is left out. In the README each table stands
between comments, ``<!-- NAME -->`` and ``<!-- /NAME -->``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ernie_image_nf4.benchmarking import report as benchmark_report
from ernie_image_nf4.benchmarking import summary as benchmark
from ernie_image_nf4.evaluation.report import markdown_table

FOLDER = Path(__file__).parent
README = FOLDER.parent / "README.md"
VARIANTS = ("stock", "scale_search", "default", "calibrated")
FORMATS = {
    "original": "bfloat16 original",
    "stock": "stock NF4",
    "scale_search": "NF4, scale search",
    "default": "NF4, scale search and kept layers (`quantize`)",
    "calibrated": "NF4, calibrated as well (`quantize --calibrate`)",
    "sdnq-uint4": "SDNQ uint4",
    "torchao-int4": "torchao int4",
    "torchao-float8": "torchao float8",
    "quanto-int4": "optimum-quanto int4",
    "quanto-int8": "optimum-quanto int8",
    "gguf-q4_0": "GGUF Q4_0",
}
TEXTS = {
    "h100.time_vs_demo.resident": "one 512x512 picture, 50 steps, 256 enhancer tokens: time over that of the plain calls",
    "h100.time_vs_demo.resident_compiled": "... with `compile=True`",
    "h100.pe_ms_per_token": "prompt enhancer, milliseconds a token",
    "h100.step_ms.eager_512": "denoising step with guidance at 512x512, ms",
    "h100.step_ms.compiled_512": "... with `compile=True`",
    "h100.step_vs_demo.compiled_1024": "step at 1024x1024 with `compile=True`: time over that of the plain calls",
    "h100.peak_gib.resident_512": "peak reserved memory at 512x512, loading included, GiB: `resident`",
    "h100.peak_gib.offload_512": "... `offload`",
    "h100.peak_gib.stream_512": "... `stream`",
    "h100.peak_gib.offload_1024": "... at 1024x1024: `offload`",
    "h100.peak_gib.stream_1024": "... `stream`",
    "h100.time_vs_resident.offload": "time of a picture over that in `resident`: `offload`",
    "h100.time_vs_resident.stream": "... `stream`",
    "h100.load_time_vs_demo": "loading, `resident`: time over that of the plain calls",
    "h100.prediction_error.resident_compiled": "largest relative difference of a prediction to that of the plain calls",
    "h100.time_vs_demo.resident_fp8": "with `fp8=True`: time of a picture over that of the plain calls",
    "h100.step_ms.fp8_512": "... denoising step at 512x512, ms",
    "h100.step_vs_demo.fp8_1024": "... step at 1024x1024: time over that of the plain calls",
    "h100.prediction_error.resident_fp8": "... largest relative difference of a prediction to that of the plain calls",
    "fp8.psnr_db.fp8": "the mini's pictures with `fp8=True` against the same weights in float32, PSNR in dB",
    "fp8.psnr_db.bfloat16": "... in bfloat16, as by default",
    "fp8.prediction_error.fp8": "... largest relative difference of a prediction with `fp8=True`",
    "fp8.prediction_error.bfloat16": "... in bfloat16",
    "batch.h100_s.resident": "full-size model with random weights on an H100, 512x512, 50 steps, 16 prompts with the enhancer, in "
    "batches of 8: seconds a picture, `resident`",
    "batch.h100_s.resident_single": "... one by one",
    "batch.h100_s.offload": "... in batches of 8, `offload`",
    "batch.h100_s.offload_single": "... one by one",
    "quantize.h100_s": "full-size `quantize --no-scale-search --no-default-keep` on an H100, source in the page cache, s",
    "quantize.h100_conventional_s": "... the same by `from_pretrained` and `save_pretrained`, s",
    "quantize.peak_host_gib": "... peak host memory of `quantize` without page cache, GiB",
    "quantize.peak_gpu_gib": "... peak GPU memory of `quantize`, GiB",
    "nf4.quantize_s.h100_full_size": "... with scale search, s",
    "quantize.bytes.transformer": "... bytes of the stock NF4 file: transformer",
    "quantize.bytes.text_encoder": "... text encoder",
    "quantize.bytes.pe": "... prompt enhancer",
    "quantize.cpu_vs_bitsandbytes": "two CPU cores, `quantize --no-scale-search --no-default-keep` as a whole: speed over that of "
    "bitsandbytes' `quantize_4bit` on the same weights in memory",
    "quantize.cpu_projected_s": "... seconds that the full-size model would take at that speed, from the page cache",
    "nf4.cpu_time_vs_stock": "... time of the scale search over stock NF4",
    "nf4.error_vs_stock.mini": "squared weight error with scale search over stock NF4's, at the same bytes: the mini's transformer",
    "nf4.error_vs_stock.normal": "... random normal weights",
    "nf4.psnr_db.stock": "the mini's pictures against its bfloat16 original's, PSNR in dB: stock NF4",
    "nf4.psnr_db.scale_search": "... scale search",
    "nf4.psnr_db.default": "... scale search and kept layers, the default",
    "nf4.psnr_db.calibrated": "... calibrated as well",
}


def main() -> None:
    (FOLDER / "summary.json").write_text(json.dumps(summary(), indent=2) + "\n", encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    for name, table in tables().items():
        text = replaced(text, name, table)
    README.write_text(text, encoding="utf-8")


def summary() -> dict[str, float]:
    """All headline figures by key."""
    figures: dict[str, float] = {}
    if run := read("benchmark_h100.json"):
        figures |= benchmark.summary(run)
    for memory in ("resident", "offload"):
        if run := read(f"batch_h100_{memory}.json"):
            figures[f"batch.h100_s.{memory}"] = run[memory]["batch"]["seconds_a_picture"]
            figures[f"batch.h100_s.{memory}_single"] = run[memory]["single"]["seconds_a_picture"]
    if run := read("fp8_mini.json"):
        for name, found in run["results"].items():
            figures |= {f"fp8.psnr_db.{name}": found["psnr"], f"fp8.prediction_error.{name}": found["prediction_error"]}
    if run := read("quantize_h100.json"):
        figures |= {
            "quantize.h100_s": run["quantize"]["seconds"],
            "quantize.h100_conventional_s": run["conventional"]["seconds"],
            "quantize.peak_host_gib": run["quantize"]["host_gib"],
            "quantize.peak_gpu_gib": run["quantize"]["gpu_device_gib"],
            "nf4.quantize_s.h100_full_size": run["scale_search"]["seconds"],
        }
        figures |= {f"quantize.bytes.{name}": size["bytes"] for name, size in run["bytes"]["nf4"].items()}
    if run := read("quantize_cpu.json"):
        errors = run["scale_search_vs_stock"]["squared_error"]
        figures |= {
            "quantize.cpu_vs_bitsandbytes": run["cpu_vs_bitsandbytes"],
            "quantize.cpu_projected_s": run["projected_full_size_s"],
            "nf4.cpu_time_vs_stock": run["scale_search_vs_stock"]["time"],
            "nf4.error_vs_stock.mini": errors["transformer"],
            "nf4.error_vs_stock.normal": errors["normal"],
        }
    if run := read("nf4_mini.json"):
        figures |= {f"nf4.psnr_db.{name}": round(run["results"][name]["psnr"], 3) for name in VARIANTS}
    return figures


def tables() -> dict[str, str]:
    """The README's tables by name, those of runs that are there."""
    makers: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
        "speed": ("benchmark_h100.json", benchmark_report.arms_table),
        "formats": ("nf4_mini.json", formats_table),
    }
    made = {"summary": summary_table(summary())}
    return made | {name: make(run) for name, (file, make) in makers.items() if (run := read(file))}


def summary_table(figures: dict[str, float]) -> str:
    rows = [f"| `{key}` | {text} | {number(figures[key])} |" for key, text in TEXTS.items() if key in figures]
    return "\n".join(["| figure | what | value |", "|---|---|---:|", *rows])


def formats_table(run: dict[str, Any]) -> str:
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
    rows = [
        [
            FORMATS[name],
            *("–" if (value := get(result)) is None else f"{value:{form}}" for get, form in columns.values()),
        ]
        for name, result in run["results"].items()
        if "error" not in result
    ]
    return markdown_table(["", *columns], rows)


def number(value: float) -> str:
    """A figure as the README has it."""
    return f"{value:g}" if value < 1e5 else f"{value:,}"


def replaced(text: str, name: str, table: str) -> str:
    """`text` with another table between the comments of that name.

    Raises:
        ValueError: There are no such comments.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, after = text.index(begin) + len(begin), text.index(end)
    return f"{text[:before]}\n{table.strip()}\n{text[after:]}"


def read(name: str) -> dict[str, Any] | None:
    path = FOLDER / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


if __name__ == "__main__":
    main()
