"""Pipelines as a server uses them: several threads at once, and models that are loaded and let go again and again.

    python -m benchmarks.threads_and_reloads --output benchmarks/threads_and_reloads_h100.json

Draws the mini, prompt enhancer included. Every picture is compared with the one that the same seed gives alone.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from diffusers import ErnieImagePipeline

from ernie_image_nf4 import load
from ernie_image_nf4.evaluation.environment import device_name
from ernie_image_nf4.generation.settings import Settings
from ernie_image_nf4.generation.single import draw
from ernie_image_nf4.repository.metadata import installed_versions

MODES = ("resident", "offload", "stream")
THREADS = 4
SIZE, STEPS = 256, 6
SETTLED = 3  # rounds of reloading after which memory is compared


def fresh(device: str, memory: str) -> ErnieImagePipeline:
    pipe = load(device=device, memory=memory if device == "cuda" else "auto")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: ErnieImagePipeline, seed: int, use_pe: bool = True) -> tuple[bytes, str | None]:
    """Pixels and enhanced prompt."""
    drawing = draw(pipe, Settings("a cat on the beach", "", SIZE, SIZE, STEPS, 4.0, seed=seed, use_pe=use_pe))
    return drawing.image.tobytes(), drawing.revised_prompt


def in_threads(work: Callable[[int], list[bool]], count: int) -> list[bool | str]:
    """Whether each picture of ``work(0)``, ``work(1)`` ... in threads is right; an error stands for one that isn't."""
    start = threading.Barrier(count)

    def run(number: int) -> list[bool] | list[str]:
        start.wait()
        try:
            return work(number)
        except Exception as error:
            return [f"{type(error).__name__}: {error}"]

    with ThreadPoolExecutor(count) as pool:
        return [each for results in pool.map(run, range(count)) for each in results]


def measure_threads(device: str, memory: str, rounds: int) -> dict[str, Any]:
    """Pictures in threads that have a pipeline each, and in threads that share one."""
    alone = [picture(fresh(device, memory), seed) for seed in range(THREADS)]
    results = {}
    for case in ("two", "one"):
        pipes = [fresh(device, memory)] * THREADS if case == "one" else [fresh(device, memory) for _ in range(THREADS)]
        seen: list[bool | str] = []
        for _ in range(rounds):
            seen += in_threads(lambda seed: [picture(pipes[seed], seed) == alone[seed]], THREADS)  # noqa: B023
        results["a pipeline a thread" if case == "two" else "one pipeline"] = counted(seen)
    return results


def measure_loading(device: str, loads: int) -> dict[str, Any]:
    """A thread that loads and draws while another one draws."""
    pipe = fresh(device, "resident")
    alone, loaded = picture(pipe, 0), threading.Event()

    def draws() -> list[bool]:
        seen = []
        while not loaded.is_set():
            seen.append(picture(pipe, 0) == alone)
        return seen

    def load_and_draw() -> list[bool]:
        try:
            return [picture(fresh(device, MODES[number % 3]), 0) == alone for number in range(loads)]
        finally:
            loaded.set()

    return {"loads": loads, **counted(in_threads(lambda number: load_and_draw() if number else draws(), 2))}


def counted(seen: list[bool | str]) -> dict[str, Any]:
    return {
        "pictures": len(seen),
        "wrong": sum(each is not True for each in seen),
        "errors": sorted({each for each in seen if isinstance(each, str)}),
    }


def measure_reloads(rounds: int) -> dict[str, Any]:
    """Allocated bytes after each round of loading, drawing and deleting, without a garbage collection in between."""
    rows = []
    for number in range(rounds):
        memory, use_pe = MODES[number % 3], number % 2 == 0
        before = torch.cuda.memory_allocated()
        pipe = fresh("cuda", memory)
        picture(pipe, number, use_pe)
        held = torch.cuda.memory_allocated()
        del pipe
        after = torch.cuda.memory_allocated()
        freed = (held - after) / (held - before)
        rows.append(
            {"memory": memory, "enhancer": use_pe, "held": held, "after": after, "freed_by_del": round(freed, 4)}
        )
    settled = rows[SETTLED:]
    grown = (settled[-1]["after"] - rows[SETTLED - 1]["after"]) / 2**20
    return {
        "growth_mib": round(grown, 3),
        "growth_mib_per_round": round(grown / len(settled), 4),
        "freed_by_del": min(row["freed_by_del"] for row in settled),
        "rounds": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=20, help="of threads")
    parser.add_argument("--loads", type=int, default=10)
    parser.add_argument("--reloads", type=int, default=100)
    arguments = parser.parse_args()
    started = time.perf_counter()
    on_gpu = arguments.device == "cuda"
    # First, as everything that draws later would have left workspaces behind.
    reloads = measure_reloads(arguments.reloads) if on_gpu else None
    result = {
        "command": "python -m benchmarks.threads_and_reloads",
        "repository": "the mini",
        "settings": f"{SIZE}x{SIZE}, {STEPS} steps, prompt enhancer on, {THREADS} threads, {arguments.rounds} rounds",
        "machine": device_name(torch.device(arguments.device)),
        "versions": installed_versions(),
        "reloads": reloads,
        "threads": {
            memory: measure_threads(arguments.device, memory, arguments.rounds)
            for memory in (MODES if on_gpu else MODES[:1])
        },
        "loading": measure_loading(arguments.device, arguments.loads),
    }
    result["seconds"] = round(time.perf_counter() - started, 1)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
