"""What the mini's pictures lose, and which time they take, where steps leave something out (`set_skipping`).

    python benchmarks/skipping_mini.py --output benchmarks/skipping_cpu.json --grid benchmarks/skipping_cpu.jpg \\
        --captions 20 --batch 4
    python benchmarks/skipping_mini.py --output benchmarks/skipping_mini.json --device cuda --captions 200 --batch 50
    python benchmarks/skipping_mini.py --output benchmarks/skipping_h100_512.json --device cuda --dtype bfloat16 \\
        --model FOLDER/ERNIE-Image-NF4 --size 512 --steps 50 --captions 4

Pictures are compared with those by the same weights that leave nothing out; the row of fewer steps has as many as the
default cache computes. Times are taken on a GPU, unless by `--no-times` where something else uses it. The third command
is for those at full size, where random weights make the PSNR say nothing; with 1024 in place of 512, at that size. The
captions are those of benchmarks/nf4_mini.py; `--classifier FILE` adds the accuracy of what is drawn, as there.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))  # Import from the checkout, installed or not

from benchmarks.nf4_mini import SETTINGS, held_out, judged, load_judge
from ernie_image_nf4 import load
from ernie_image_nf4.evaluation.grid import labelled_grid
from ernie_image_nf4.evaluation.metrics import psnr
from ernie_image_nf4.fast.step_plan import DEFAULT_CACHE, Skipping, plan_steps
from ernie_image_nf4.fast.transformer import make_transformer_fast
from ernie_image_nf4.generation.settings import Settings
from ernie_image_nf4.generation.stages import decode, denoise, encode
from ernie_image_nf4.repository.metadata import installed_versions
from ernie_image_nf4.upstream.pipelines import execution_device

CHECKOUT = Path(__file__).parents[1]
FULL = "all"
SKIPPING = {
    FULL: Skipping(),
    "guidance_until=0.5": Skipping(guidance_until=0.5),
    "cache=2": Skipping(cache=2),
    "cache=3": Skipping(cache=3),
    "cache=4": Skipping(cache=4),
    "guidance_until=0.5, cache=3": Skipping(guidance_until=0.5, cache=3),
}
GRID_ROWS, GRID_SIDE = 4, 144


def main() -> None:
    arguments = parse()
    scenes, rows = held_out(arguments.captions)
    judge = load_judge(arguments.classifier, arguments.device) if arguments.classifier else None
    pipe: Any = load(arguments.model, device=arguments.device, dtype=arguments.dtype, prompt_enhancer=False)
    pipe.set_progress_bar_config(disable=True)
    if execution_device(pipe).type == "cpu":
        make_transformer_fast(pipe.transformer, capture_steps=False)
    size, steps = arguments.size, arguments.steps
    plain = [Settings(row.prompt, "", size, size, steps, SETTINGS.guidance_scale, row.seed or 0, False) for row in rows]
    fewer = sum(step.computed for step in plan_steps(steps, Skipping(cache=DEFAULT_CACHE)))
    arms = {name: [replace(each, **asdict(skipping)) for each in plain] for name, skipping in SKIPPING.items()} | {
        f"{fewer} steps": [replace(each, num_inference_steps=fewer) for each in plain]
    }
    # What else runs on a CPU's cores would be in the time.
    timed = arguments.device.startswith("cuda") and not arguments.no_times
    drawn: dict[str, torch.Tensor] = {}
    results: dict[str, dict[str, float]] = {}
    for name, settings in arms.items():
        drawn[name], seconds = draw(pipe, settings, arguments.batch, warm_up=timed)
        figures = results[name] = {"work": work(settings[0]) / work(plain[0])}
        if timed:
            figures["denoising_s"] = seconds
            figures["time_vs_full"] = seconds / results[FULL]["denoising_s"]
        if name != FULL:
            ratios = psnr(drawn[FULL], drawn[name])
            figures |= {"psnr": statistics.fmean(ratios), "lowest_psnr": min(ratios)}
        if judge is not None:
            figures |= judged(judge, drawn[name], scenes, arguments.device)
        print(name, json.dumps(figures), file=sys.stderr, flush=True)
        write(arguments, results)
    if arguments.grid:
        save_grid(arguments.grid, [row.prompt for row in rows], drawn)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("skipping_mini.json"))
    parser.add_argument("--grid", type=Path, help="JPEG of the first captions' pictures")
    parser.add_argument("--model", type=Path, default=CHECKOUT, help="NF4 repository, the mini by default")
    parser.add_argument("--captions", type=int, default=24)
    parser.add_argument("--size", type=int, default=SETTINGS.height)
    parser.add_argument("--steps", type=int, default=SETTINGS.num_inference_steps)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no-times", action="store_true", help="leave times out, and what is drawn before for them")
    parser.add_argument("--classifier", type=Path, help="weights of the judge of training/classifier.py")
    return parser.parse_args()


def draw(pipe: Any, settings: Sequence[Settings], batch_size: int, *, warm_up: bool) -> tuple[torch.Tensor, float]:
    """Pictures, uint8 (N, 3, height, width), and the median seconds of denoising one.

    With `warm_up` the first batch is drawn once before: kernels are compiled.
    """
    texts = encode(pipe, [*(each.prompt for each in settings), ""])
    pictures, seconds = [], []
    batches = [settings[start : start + batch_size] for start in range(0, len(settings), batch_size)]
    before = batches[: int(warm_up)]
    for number, batch in enumerate([*before, *batches]):
        prompts = [texts[each.prompt] for each in batch]
        denoised = denoise(pipe, batch, prompts, [texts[""]] * len(batch), {})
        if number < len(before):
            continue
        seconds += [each.seconds for each in denoised]
        for each, prompt, result in zip(batch, prompts, denoised, strict=True):
            image = decode(pipe, each, prompt, result.latents)
            pictures.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return torch.stack(pictures), statistics.median(seconds)


def work(settings: Settings) -> int:
    """Rows that the transformer computes for one picture."""
    return sum(
        (2 if step.guided else 1) * step.computed
        for step in plan_steps(settings.num_inference_steps, settings.skipping)
    )


def write(arguments: argparse.Namespace, results: dict[str, dict[str, float]]) -> None:
    cuda = arguments.device.startswith("cuda")
    content = {
        "command": " ".join(["python", *sys.argv]),
        "machine": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "threads": None if cuda else torch.get_num_threads(),
        "versions": installed_versions() | {"python": platform.python_version()},
        "model": "mini" if arguments.model == CHECKOUT else arguments.model.name,
        "captions": arguments.captions,
        "settings": {
            "size": arguments.size,
            "steps": arguments.steps,
            "guidance": SETTINGS.guidance_scale,
            "batch": arguments.batch,
            "dtype": arguments.dtype,
        },
        "against": FULL,
        "results": {
            name: {key: round(value, 4) for key, value in figures.items()} for name, figures in results.items()
        },
    }
    arguments.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_grid(path: Path, captions: Sequence[str], drawn: dict[str, torch.Tensor]) -> None:
    """The first captions as rows, an arm a column."""
    side = (GRID_SIDE, GRID_SIDE)
    small = [
        F.interpolate(pictures[:GRID_ROWS].float(), side, mode="bilinear", antialias=True).round().to(torch.uint8)
        for pictures in drawn.values()
    ]
    labelled_grid(list(drawn), captions[:GRID_ROWS], small).save(path, quality=88)


if __name__ == "__main__":
    main()
