"""Many pictures in a row from one pipeline: whether memory grows and files stay open.

    python -m benchmarks.soak --output benchmarks/soak.json

Draws the mini on the CPU through the function behind ``generate``, prompt enhancer included. The pictures are small and
have few steps: leaks grow with calls, not with pixels.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from ernie_image_nf4 import load
from ernie_image_nf4.generation.single import draw_and_save
from ernie_image_nf4.repository.metadata import installed_versions

PROMPTS = (
    "an orange cat on a wooden desk",
    "a red apple and a fish on the beach",
    "一只狗在草地上",
    "a rocket in the night sky",
)


def measure(process: psutil.Process, picture: int, started: float) -> dict[str, Any]:
    """Memory, open files, threads and Python objects after a number of pictures."""
    gc.collect()
    memory = process.memory_full_info()
    return {
        "picture": picture,
        "seconds": round(time.perf_counter() - started, 1),
        "resident_bytes": memory.rss,
        "unique_bytes": memory.uss,
        "open_files": process.num_fds(),
        "threads": process.num_threads(),
        "python_objects": len(gc.get_objects()),
    }


def soak(pictures: int, height: int, width: int, steps: int) -> list[dict[str, Any]]:
    """Draw pictures, and measure before them, after the first, and after every tenth."""
    process = psutil.Process(os.getpid())
    started = time.perf_counter()
    pipe = load(device="cpu")
    pipe.set_progress_bar_config(disable=True)
    rows = [measure(process, 0, started)]
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        for number in range(1, pictures + 1):
            path = Path(folder) / f"{number}.png"
            prompt = PROMPTS[number % len(PROMPTS)]
            for _ in draw_and_save(pipe, [path], prompt, height=height, width=width, steps=steps, seed=number):
                pass
            if number == 1 or number % 10 == 0:
                rows.append(measure(process, number, started))
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = soak(arguments.pictures, arguments.height, arguments.width, arguments.steps)
    by_picture = {row["picture"]: row for row in rows}
    tenth, last = by_picture.get(10, rows[0]), rows[-1]
    report = {
        "command": "python -m benchmarks.soak",
        "repository": "the mini",
        "settings": f"{arguments.width}x{arguments.height}, {arguments.steps} steps, prompt enhancer on, CPU, "
        "one thread",
        "versions": {"python": platform.python_version(), **installed_versions()},
        "growth_from_10_to_last": {
            key: last[key] - tenth[key]
            for key in ("resident_bytes", "unique_bytes", "open_files", "threads", "python_objects")
        },
        "rows": rows,
    }
    text = json.dumps(report, indent=2) + "\n"
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
