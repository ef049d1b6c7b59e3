"""Error of the mini's pictures and predictions with products in bfloat16, int8 and fp8, all against float32.

    python benchmarks/products_mini.py --output benchmarks/products_mini.json --device cuda --batch 50

All use the NF4 weights of this checkout, so that only rounding differs. The captions are those of
benchmarks/nf4_mini.py; `--classifier FILE` adds the accuracy of what is drawn, as there.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # Import from the checkout, installed or not

from benchmarks.nf4_mini import SETTINGS, held_out, judged, load_judge
from ernie_image_nf4 import load
from ernie_image_nf4.benchmarking.predictions import largest_error, predictions
from ernie_image_nf4.evaluation.metrics import psnr
from ernie_image_nf4.evaluation.pictures import draw_from_latents, draw_latents
from ernie_image_nf4.fast.products import set_products
from ernie_image_nf4.fast.transformer import make_transformer_fast
from ernie_image_nf4.generation.prompt_file import Row
from ernie_image_nf4.repository.metadata import installed_versions
from ernie_image_nf4.upstream.pipelines import execution_device

CHECKOUT = Path(__file__).parents[1]
EXACT = "float32"
# dtype, and products in 8 bits.
ARMS: dict[str, tuple[str, str | None]] = {
    EXACT: (EXACT, None),
    "bfloat16": ("bfloat16", None),
    "int8": ("bfloat16", "int8"),
    "fp8": ("bfloat16", "fp8"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("products_mini.json"))
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--size", type=int, default=SETTINGS.height)
    parser.add_argument("--steps", type=int, default=SETTINGS.num_inference_steps)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--classifier", type=Path, help="weights of the judge of training/classifier.py")
    arguments = parser.parse_args()

    scenes, rows = held_out(arguments.captions)
    judge = load_judge(arguments.classifier, arguments.device) if arguments.classifier else None
    torch.backends.cudnn.allow_tf32 = False  # as is torch's default in convolutions: float32 is to be exact
    pictures, prediction = exact = draw(*ARMS[EXACT], rows, arguments)
    results: dict[str, dict[str, float]] = {}
    for name, options in ARMS.items():
        its_pictures, its_prediction = exact if name == EXACT else draw(*options, rows, arguments)
        figures = results[name] = {}
        if name != EXACT:
            ratios = psnr(pictures, its_pictures)
            figures["psnr"] = round(statistics.fmean(ratios), 3)
            figures["lowest_psnr"] = round(min(ratios), 3)
            figures["prediction_error"] = float(f"{largest_error(its_prediction, prediction):.4g}")
        if judge is not None:
            figures |= judged(judge, its_pictures, scenes, arguments.device)
        write(arguments, results)  # Now: a later one may fail
    print(json.dumps(results, indent=2))


def write(arguments: argparse.Namespace, results: dict[str, dict[str, float]]) -> None:
    cuda = arguments.device.startswith("cuda")
    content = {
        "command": " ".join(["python", *sys.argv]),
        "machine": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "versions": installed_versions() | {"python": platform.python_version()},
        "captions": arguments.captions,
        "settings": {"size": arguments.size, "steps": arguments.steps, "guidance": SETTINGS.guidance_scale},
        "against": EXACT,
        "results": results,
    }
    arguments.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def draw(
    dtype: str, products: str | None, rows: list[Row], arguments: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of all captions, uint8, and the predictions of `benchmark`."""
    pipe: Any = load(CHECKOUT, device=arguments.device, dtype=dtype, memory="resident", prompt_enhancer=False)
    pipe.set_progress_bar_config(disable=True)
    if execution_device(pipe).type == "cpu":
        make_transformer_fast(pipe.transformer, capture_steps=False)
    set_products(pipe.transformer, products)
    settings = replace(SETTINGS, height=arguments.size, width=arguments.size, num_inference_steps=arguments.steps)
    latents = draw_latents(pipe, [row.seed for row in rows], settings)
    pictures = draw_from_latents(pipe, [row.prompt for row in rows], settings, latents, batch_size=arguments.batch)
    return pictures, predictions(pipe, arguments.size, arguments.device)["prediction"]


if __name__ == "__main__":
    main()
