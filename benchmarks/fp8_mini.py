"""Error of the mini's pictures and predictions with matrix products in fp8 and in bfloat16, both against float32.

    python benchmarks/fp8_mini.py --output benchmarks/fp8_mini.json --device cuda --batch 50

All three use the NF4 weights of this checkout, so that only rounding differs. The captions are those of
benchmarks/nf4_mini.py.
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

from benchmarks.nf4_mini import SETTINGS, held_out
from ernie_image_nf4 import load
from ernie_image_nf4.benchmarking.predictions import largest_error, predictions
from ernie_image_nf4.evaluation.metrics import psnr
from ernie_image_nf4.evaluation.pictures import draw_from_latents, draw_latents
from ernie_image_nf4.fast.products import set_products
from ernie_image_nf4.fast.transformer import make_transformer_fast
from ernie_image_nf4.repository.metadata import installed_versions
from ernie_image_nf4.upstream.pipelines import execution_device

CHECKOUT = Path(__file__).parents[1]
EXACT = "float32"
ARMS = {EXACT: (EXACT, False), "bfloat16": ("bfloat16", False), "fp8": ("bfloat16", True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("fp8_mini.json"))
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--size", type=int, default=SETTINGS.height)
    parser.add_argument("--steps", type=int, default=SETTINGS.num_inference_steps)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()

    drawn = {name: draw(*options, arguments) for name, options in ARMS.items()}
    pictures, prediction = drawn.pop(EXACT)
    results = {}
    for name, (its_pictures, its_prediction) in drawn.items():
        ratios = psnr(pictures, its_pictures)
        results[name] = {
            "psnr": round(statistics.fmean(ratios), 3),
            "lowest_psnr": round(min(ratios), 3),
            "prediction_error": float(f"{largest_error(its_prediction, prediction):.4g}"),
        }
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
    print(json.dumps(results, indent=2))


def draw(dtype: str, fp8: bool, arguments: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of all captions, uint8, and the predictions of `benchmark`."""
    pipe: Any = load(CHECKOUT, device=arguments.device, dtype=dtype, memory="resident", prompt_enhancer=False)
    pipe.set_progress_bar_config(disable=True)
    if execution_device(pipe).type == "cpu":
        make_transformer_fast(pipe.transformer, capture_steps=False)
    if fp8:
        set_products(pipe.transformer, "fp8")
    _, rows = held_out(arguments.captions)
    settings = replace(SETTINGS, height=arguments.size, width=arguments.size, num_inference_steps=arguments.steps)
    latents = draw_latents(pipe, [row.seed for row in rows], settings)
    pictures = draw_from_latents(pipe, [row.prompt for row in rows], settings, latents, batch_size=arguments.batch)
    return pictures, predictions(pipe, arguments.size, arguments.device)["prediction"]


if __name__ == "__main__":
    main()
