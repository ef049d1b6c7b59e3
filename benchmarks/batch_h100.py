"""Seconds per picture with `generate_batch` and one by one, at full size with random weights, resident and offloaded.

    python benchmarks/batch_h100.py --work /tmp/batch --output benchmarks/batch_h100.json

Each memory mode has its own process, in which both ways draw after a warm-up: `draw_and_save` draws the first
`--singles` of sixteen prompts one by one, `generate_batch` draws all. Prompts, seeds and settings are the same, so the
pictures differ only by the rounding of batches. The repository is first synthesized and quantized in `--work`, which
needs 41 GB of disk, unless an earlier call with `--keep-files` left it there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # Import from the checkout, installed or not

from benchmarks.children import answer, apart

ORIGINAL, NF4 = "ERNIE-Image", "ERNIE-Image-NF4"
GIB = 1024**3
PROMPTS = [
    "An orange cat on a wooden desk, a white sheet of paper in front of it",
    "一只橙色的小猫坐在木桌上,前面放着一张白纸",
    "A lighthouse at dawn, watercolor",
    "黎明时分的灯塔,水彩画",
    "Two foxes in the snow under a starry sky",
    "星空下雪地里的两只狐狸",
    "A red bicycle leaning against a brick wall in the rain",
    "雨中靠在砖墙上的一辆红色自行车",
    "A bowl of ramen on a market stall, steam rising, photograph",
    "集市摊位上的一碗拉面,热气腾腾,摄影",
    "Portrait of an old sailor with a white beard, oil painting",
    "白胡子老水手的肖像,油画",
    "A paper boat on a quiet pond, seen from above",
    "从上方看,平静池塘上的一只纸船",
    "A city of glass towers in the clouds, concept art",
    "云中的玻璃塔城市,概念艺术",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the repository and the pictures")
    parser.add_argument("--output", type=Path, default=Path("batch_h100.json"))
    parser.add_argument("--preset", default="full", choices=["full", "tiny"])
    parser.add_argument("--memory", nargs="+", default=["resident", "offload"], choices=["resident", "offload"])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--singles", type=int, default=4, help="pictures to draw one by one")
    parser.add_argument("--batch-size", type=int, help="instead of the one chosen by free memory")
    parser.add_argument("--keep-files", action="store_true")
    parser.add_argument("--measure", choices=["resident", "offload"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments)))
        return

    began = time.perf_counter()
    build(arguments.work, arguments.preset)
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "settings": {"preset": arguments.preset, "size": arguments.size, "steps": arguments.steps, "guidance": 4.0},
        "build_seconds": round(time.perf_counter() - began, 1),
    }
    for memory in arguments.memory:
        print(f"{memory} ...", flush=True)
        command = [sys.executable, *sys.argv, "--measure", memory]
        result[memory] = answer(command)
        print(json.dumps(result[memory]), flush=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")  # Now: a later mode may fail
    if not arguments.keep_files:
        shutil.rmtree(arguments.work)


def build(work: Path, preset: str) -> None:
    """Make the NF4 repository with random weights, unless a run has finished it.

    In a process of its own, whose memory on the GPU is free again when the measurement begins.
    """
    apart(make, work, preset)


def make(work: Path, preset: str) -> None:
    """`build` in this process. An original that was there stays."""
    from ernie_image_nf4.quantization.convert import quantize
    from ernie_image_nf4.quantization.resumable_output import is_finished
    from ernie_image_nf4.quantization.synthetic import synthesize

    if is_finished(work / NF4):
        return
    work.mkdir(parents=True, exist_ok=True)
    kept = is_finished(work / ORIGINAL)
    if not kept:
        synthesize(work / ORIGINAL, preset=preset, progress=False)
    quantize(work / ORIGINAL, work / NF4, progress=False)
    if not kept:
        shutil.rmtree(work / ORIGINAL)


def measure(memory: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure both ways in this process, after a warm-up of each."""
    from ernie_image_nf4 import generate_batch, load
    from ernie_image_nf4.generation.prompt_file import Row
    from ernie_image_nf4.generation.single import draw_and_save

    folder = arguments.work / memory
    shutil.rmtree(folder, ignore_errors=True)
    singles = folder / "singles"
    singles.mkdir(parents=True)
    settings: dict[str, Any] = {"height": arguments.size, "width": arguments.size, "guidance": 4.0}
    rows = [Row(prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    began = time.perf_counter()
    pipe = load(arguments.work / NF4, memory=memory)
    pipe.set_progress_bar_config(disable=True)
    result: dict[str, Any] = {"load_seconds": round(time.perf_counter() - began, 2)}

    def one_by_one(rows: list[Row], steps: int) -> None:
        for row in rows:
            paths = [singles / f"{row.seed}.png"]
            list(draw_and_save(pipe, paths, row.prompt, seed=row.seed, steps=steps, **settings))

    def in_batches(rows: list[Row], out_dir: Path, steps: int) -> list[Any]:
        return list(generate_batch(pipe, rows, out_dir, batch_size=arguments.batch_size, steps=steps, **settings))

    one_by_one(rows[:1], steps=2)
    in_batches(rows[:1], folder / "warm-up", steps=2)

    with measured(result, "single", arguments.singles):
        one_by_one(rows[: arguments.singles], arguments.steps)
    with measured(result, "batch", len(rows)):
        records = in_batches(rows, folder / "batch", arguments.steps)
    result["batch_over_single"] = round(result["batch"]["seconds_a_picture"] / result["single"]["seconds_a_picture"], 3)
    result["batch_sizes"] = dict(Counter(record.batch_size for record in records))
    result["errors"] = [record.error for record in records if record.error]
    files = {record.settings.seed: folder / "batch" / record.file for record in records}
    result["rounding"] = [difference(singles / f"{row.seed}.png", files[row.seed]) for row in rows[: arguments.singles]]
    return result


@contextmanager
def measured(result: dict[str, Any], name: str, pictures: int) -> Iterator[None]:
    """Note seconds per picture and peak reserved memory of what runs inside the context."""
    import torch

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    yield
    result[name] = {
        "pictures": pictures,
        "seconds_a_picture": round((time.perf_counter() - began) / pictures, 3),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2) if gpu else None,
    }


def difference(one: Path, other: Path) -> dict[str, Any]:
    """Mean and largest difference of two pictures, in values up to 255, and whether their revised prompts are equal."""
    import numpy as np
    from PIL import Image

    with Image.open(one) as first, Image.open(other) as second:
        apart = np.abs(np.asarray(first).astype(int) - np.asarray(second))
        same_prompt = first.text.get("revised_prompt") == second.text.get("revised_prompt")
    return {"same_prompt": same_prompt, "mean": round(float(apart.mean()), 3), "largest": int(apart.max())}


def machine() -> dict[str, Any]:
    import torch

    from ernie_image_nf4.repository.metadata import installed_versions

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": installed_versions(),
    }


if __name__ == "__main__":
    main()
