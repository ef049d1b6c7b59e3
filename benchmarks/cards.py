"""Pictures by the command line on cards of several sizes: one large GPU, of which another process holds the rest.

    python -m benchmarks.cards --synthetic FOLDER --output benchmarks/cards.json

Every picture is drawn by ``ernie_image_nf4 generate`` in a process of its own, which pays for its CUDA context out of
what is free, as on a small card. It is the full-size model with random weights, made in FOLDER (41 GB) unless it is
there. What a small card also has, less computing power and a slower bus, is not imitated.

- ``cards``: memory left free as on cards of 12, 8, 6 and 4 GB beside a desktop, on the last one with ``--no-pe`` too;
- ``limits``: as much free as docs/memory-modes.md says that a mode takes at least, for two steps.

With ``--device cpu`` nothing is held, to try the script itself. ``--resume`` goes on with an interrupted run that was
on the same machine with the same versions and settings.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.children import apart, run
from benchmarks.held_memory import GIB, small_card
from ernie_image_nf4.benchmarking.arms import PROMPT

CHECKOUT = Path(__file__).parents[1]
CARDS = {11.0: "12 GB", 7.2: "8 GB", 5.2: "6 GB", 3.4: "4 GB"}  # GiB that are free -> card
TIME_LIMIT = 240  # seconds of one command
MODE = re.compile(r"^Memory mode (\w+) on [\w:]+: (.*)$", re.MULTILINE)
PICTURE_SECONDS = re.compile(r"([\d.]+) s, seed \d")


def main() -> None:
    if sys.argv[1:2] == ["run"]:
        run_command(Path(sys.argv[2]), sys.argv[3:])
    else:
        measure_all(parse())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cards", description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--synthetic", type=Path, help="folder for the full-size model with random weights")
    source.add_argument("--model", type=Path, help="folder of another NF4 repository")
    parser.add_argument("--output", type=Path, default=CHECKOUT / "benchmarks" / "cards.json")
    parser.add_argument("--free", type=float, nargs="+", default=list(CARDS), help="GiB to leave free")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, help="default: as the repository recommends")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --output has, of an interrupted run")
    parser.add_argument("--no-limits", action="store_true", help="leave the limits of the modes out")
    return parser.parse_args()


def measure_all(arguments: argparse.Namespace) -> None:
    """Measure everything, and write what there is after each picture."""
    from ernie_image_nf4.benchmarking.device import describe_machine
    from ernie_image_nf4.benchmarking.run import make_synthetic
    from ernie_image_nf4.evaluation.report import write_files
    from ernie_image_nf4.repository.record import open_repository

    model = apart(make_synthetic, arguments.synthetic)[0] if arguments.synthetic else arguments.model
    gpu = arguments.device.startswith("cuda")
    steps = arguments.steps or open_repository(model).recommended.num_inference_steps
    result: dict[str, Any] = apart(describe_machine, arguments.device) | {
        "command": "python -m benchmarks.cards " + ("--synthetic FOLDER" if arguments.synthetic else "--model FOLDER"),
        "settings": {"size": arguments.size, "steps": steps, "prompt": PROMPT},
        "cards": [],
        "limits": [],
    }
    if gpu:
        result["context_gib"] = context_gib(min(arguments.free))
        print(f"CUDA's context takes {result['context_gib']} GiB", flush=True)
        measure(model, None, [*drawing(arguments.size, 2), "--device", arguments.device], gpu=True)  # compiles kernels

    kept = rows_kept(arguments.output, result) if arguments.resume else []

    def note(part: str, what: dict[str, Any], free: float, asked: list[str]) -> None:
        what = what | {"free_gib": free, "enhancer": "--no-pe" not in asked}
        done = [row for row in kept if row.items() >= what.items()]
        row = done[0] if done else what | measure(model, free, asked, gpu=gpu)
        result[part].append(row)
        print(json.dumps(row), flush=True)
        text = json.dumps(result, indent=2) + "\n"
        write_files(arguments.output.parent, {arguments.output.name: lambda path: path.write_text(text)})

    asked = [*drawing(arguments.size, steps), "--device", arguments.device]
    for free in arguments.free:
        note("cards", {"card": CARDS.get(free)}, free, asked)
    note("cards", {"card": CARDS.get(free)}, free, [*asked, "--no-pe"])
    if gpu and not arguments.no_limits:
        asked = [*drawing(arguments.size, 2), "--device", arguments.device]
        for expected, enhancer, free in limits(model, result["context_gib"]):
            options = [] if enhancer else ["--no-pe"]
            note("limits", {"expected": expected}, free, [*asked, *options])


def rows_kept(output: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of both parts that an interrupted run left; none of another machine, other versions or settings."""
    from ernie_image_nf4.benchmarking.interrupted import is_same_run, read_result

    earlier = read_result(output)
    if not is_same_run(earlier, result, ("machine", "versions", "settings")):
        return []
    return [row for row in (*earlier["cards"], *earlier["limits"]) if "error" not in row]


def drawing(size: int, steps: int) -> list[str]:
    """Arguments of ``generate``, but for model and file."""
    return ["generate", PROMPT, "--height", str(size), "--width", str(size), "--steps", str(steps), "--seed", "0"]


def limits(model: Path, context_gib: float) -> list[tuple[str, bool, float]]:
    """Mode, whether with the prompt enhancer, and the GiB that `auto` wants for it, the context included."""
    from ernie_image_nf4.memory.precision import BFLOAT16
    from ernie_image_nf4.memory.requirements import MODES, mode_needs, weight_bytes, without_optional
    from ernie_image_nf4.repository.record import open_repository

    repository = open_repository(model)
    weights = {
        name: weight_bytes(part, fast=True, precision=BFLOAT16)
        for name, part in repository.components.items()
        if part.component.weights
    }
    pixels = repository.recommended.height * repository.recommended.width
    rows = []
    for enhancer, parts in ((True, weights), (False, without_optional(weights))):
        needs = mode_needs(parts, pixels)
        rows += [(mode, enhancer, math.ceil(10 * (needs[mode] / GIB + context_gib)) / 10) for mode in MODES]
    return rows


def measure(model: Path, free_gib: float | None, arguments: Sequence[str], *, gpu: bool) -> dict[str, Any]:
    """Run one command on a card with so much free memory.

    Args:
        model: Folder of the repository.
        free_gib: GiB to leave free; None for all.
        arguments: Of the command, but for model and output.
        gpu: Whether there is a GPU to hold memory of.

    Returns:
        ``seconds`` of the command as a whole, imports and loading included, and ``picture_s`` that it says the picture
        took; memory ``mode`` and ``reason``; peaks of PyTorch's memory, and in ``device_peak_gib`` of the memory that
        the driver has given away for the process, all in GiB. ``beside_pytorch_gib`` is what CUDA and its libraries
        took at the end. ``error`` if there is no picture.
    """
    row: dict[str, Any] = {"free_gib": free_gib, "enhancer": "--no-pe" not in arguments}
    with tempfile.TemporaryDirectory(prefix="cards-") as folder, small_card(free_gib if gpu else None) as card:
        picture, figures = Path(folder) / "out.png", Path(folder) / "figures.json"
        command = [*arguments, "--model", str(Path(model).resolve()), "-o", str(picture)]
        began = time.perf_counter()
        out, error = start([sys.executable, "-m", "benchmarks.cards", "run", str(figures), *command])
        row["seconds"] = round(time.perf_counter() - began, 2)
        row |= json.loads(figures.read_text()) if figures.exists() else {}
        if not picture.exists():
            row["error"] = (error.strip().splitlines() or ["no picture and no message"])[-1]
    if found := MODE.search(error):
        row |= {"mode": found[1], "reason": found[2]}
    if found := PICTURE_SECONDS.search(out):
        row["picture_s"] = float(found[1])
    if card:
        row["device_peak_gib"] = round(card["free_gib"] - card["least_free_gib"], 3)
        if "free_at_end_gib" in row:
            used = card["free_gib"] - row.pop("free_at_end_gib")
            row["beside_pytorch_gib"] = round(used - row.pop("reserved_at_end_gib"), 3)
    return row


def start(command: Sequence[str]) -> tuple[str, str]:
    """Run a process to its end, or to `TIME_LIMIT`; returns what it wrote to both streams."""
    options: dict[str, Any] = {"cwd": CHECKOUT, "capture_output": True, "text": True, "errors": "replace"}
    try:
        ended = run(command, timeout=TIME_LIMIT, check=False, **options)
    except subprocess.TimeoutExpired:
        return "", f"not done after {TIME_LIMIT} s"
    return ended.stdout, ended.stderr


def context_gib(free_gib: float) -> float:
    """GiB that a process's CUDA context takes, with what PyTorch loads at once."""
    ask = "import torch; torch.cuda.init(); print(torch.cuda.mem_get_info()[0])"
    with small_card(free_gib) as card:
        out, error = start([sys.executable, "-c", ask])
    if not out:
        raise SystemExit(error)
    return round(card["free_gib"] - int(out) / GIB, 3)


def run_command(figures: Path, arguments: list[str]) -> None:
    """Run the command line in this process, and write its peaks of GPU memory to a file."""
    from ernie_image_nf4 import cli

    sys.argv = ["ernie-image-nf4", *arguments]
    try:
        cli.main()
    finally:
        figures.write_text(json.dumps(memory_figures()))


def memory_figures() -> dict[str, float]:
    """Of PyTorch's memory in this process, and of what the driver has left."""
    import torch

    from ernie_image_nf4.benchmarking.device import peak_memory

    if not torch.cuda.is_initialized():
        return {}
    now = {"reserved_at_end_gib": torch.cuda.memory_reserved() / GIB}
    now["free_at_end_gib"] = torch.cuda.mem_get_info()[0] / GIB
    return {key: round(value, 3) for key, value in (peak_memory("cuda") | now).items()}


if __name__ == "__main__":
    main()
