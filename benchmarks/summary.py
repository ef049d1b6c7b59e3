"""The headline figures of all measurements here, as one flat object: ``summary.json``.

    python -m benchmarks.summary

Every figure is read from the JSON of the run that measured it; what wasn't measured yet is left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ernie_image_nf4 import benchmark

FOLDER = Path(__file__).parent


def main() -> None:
    (FOLDER / "summary.json").write_text(json.dumps(summary(), indent=2) + "\n", encoding="utf-8")


def summary() -> dict[str, float]:
    """All headline figures by key."""
    figures: dict[str, float] = {}
    if run := read("benchmark_h100.json"):
        figures |= benchmark.summary(run)
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
        figures |= {
            f"nf4.psnr_db.{name}": round(run["results"][name]["psnr"], 3)
            for name in ("stock", "scale_search", "default", "calibrated")
        }
    return figures


def read(name: str) -> dict[str, Any] | None:
    path = FOLDER / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


if __name__ == "__main__":
    main()
