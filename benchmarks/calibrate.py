"""`quantize --calibrate` as a whole at full size: seconds of each phase, peaks of memory, and what it gains.

    python -m benchmarks.calibrate --work /tmp/calibrate --output benchmarks/calibrate_h100.json

Each step runs in its own process: synthesize an original (31.6 GB, random weights), quantize it as bitsandbytes does,
with the scale search, and calibrated with the prompts that are built in; then compare predictions for prompts, noise
and timesteps that calibration didn't see. Needs 65 GB of disk. `--preset tiny` is for a try on a CPU. The same call
goes on with an interrupted run: repositories that it finished, and their figures in the output, are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # Import from the checkout, installed or not

from benchmarks.children import answer, write
from benchmarks.quantize_full_size import GIB, machine, measured

ORIGINAL = "ERNIE-Image"
# How each repository is made; None for the original.
VARIANTS: dict[str, dict[str, Any]] = {
    "stock": {"scale_search": False, "default_keep": False},
    "scale_search": {},
    "calibrated": {"calibrate": True},
}
# Not among those that are built in. Their pictures begin with other noise, too.
HELD_OUT = (
    "A red tram climbs a steep street between tall houses, fog in the distance.",
    "一只白鹭站在荷塘边,水面上有几片落叶。",
    'A chalkboard outside a café says "SOUP OF THE DAY: PUMPKIN", autumn leaves on the ground.',
    "图书馆里,三个学生围着一张圆桌讨论,桌上堆着书。",
)
FIRST_SEED = 1000
HELD_OUT_STEPS = (0.1, 0.5, 0.85)  # of a picture's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the repositories, deleted at the end")
    parser.add_argument("--output", type=Path, default=Path("calibrate.json"))
    parser.add_argument("--preset", default="full", choices=["full", "tiny"])
    parser.add_argument("--prompts", type=int, help="of those that are built in, the first so many; default: all")
    parser.add_argument("--turbo", action="store_true", help="calibrate for 8 steps without guidance")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="some of them, separated by commas")
    parser.add_argument("--keep-files", action="store_true")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        steps = steps_of(arguments)
        print(json.dumps(measured(lambda work, preset: steps[arguments.step](), arguments.work, arguments.preset)))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "command": " ".join(["python", "-m", "benchmarks.calibrate", *sys.argv[1:]]),
        "preset": arguments.preset,
    }
    result["settings"] = vars(settings(arguments))
    from ernie_image_nf4.quantization.resumable_output import is_finished

    kept = figures_kept(arguments, result)
    for step in steps_of(arguments):
        if step == "synthesize" and is_finished(arguments.work / ORIGINAL):
            result |= {step: kept[step]} if step in kept else {}
            continue
        if step in VARIANTS and step in kept and is_finished(arguments.work / step):
            result[step] = kept[step]
            continue
        if step in VARIANTS:
            # Half of one would be gone on with, and half timed
            shutil.rmtree(arguments.work / step, ignore_errors=True)
        print(f"{step} ...", flush=True)
        os.sync()  # Write out the previous step's data before this step is timed
        command = [sys.executable, __file__, "--step", step, *sys.argv[1:]]
        result[step] = answer(command)
        if (extra := arguments.work / f"{step}.json").exists():
            result[step] |= json.loads(extra.read_text(encoding="utf-8"))
        print(json.dumps(result[step]), flush=True)
        write(arguments.output, json.dumps(result | {"machine": machine()}, indent=2) + "\n")
    if not arguments.keep_files:
        shutil.rmtree(arguments.work)


def figures_kept(arguments: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    """Figures of an earlier run with the same preset, settings and machine."""
    from ernie_image_nf4.benchmarking.interrupted import is_same_run, read_result

    earlier = read_result(arguments.output)
    asked = result | {"machine": machine()}
    return earlier if is_same_run(earlier, asked, ("preset", "settings", "machine")) else {}


def settings(arguments: argparse.Namespace) -> Any:
    """Call settings to calibrate for."""
    from ernie_image_nf4.quantization.family import TURBO
    from ernie_image_nf4.repository.metadata import Recommended

    if arguments.preset == "tiny":
        return Recommended(64, 64, 4, 1.0 if arguments.turbo else 4.0)
    return TURBO if arguments.turbo else Recommended()


def steps_of(arguments: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Name of a step -> what it does."""
    names = arguments.variants.split(",")
    made: dict[str, Callable[[], None]] = {"synthesize": lambda: synthesize(arguments)}
    for name in names:
        made[name] = lambda name=name: quantize(arguments, name)
    return made | {"errors": lambda: compare(arguments, names)}


def synthesize(arguments: argparse.Namespace) -> None:
    from ernie_image_nf4.quantization.synthetic import synthesize

    synthesize(arguments.work / ORIGINAL, preset=arguments.preset, progress=False)


def quantize(arguments: argparse.Namespace, name: str) -> None:
    from ernie_image_nf4.quantization.calibration_prompts import find_prompts
    from ernie_image_nf4.quantization.convert import quantize

    options = dict(VARIANTS[name])
    if "calibrate" in options and arguments.prompts:
        options["calibrate"] = find_prompts(True, True).texts[: arguments.prompts]
    with phases() as found:
        quantize(
            arguments.work / ORIGINAL, arguments.work / name, recommended=settings(arguments), progress=True, **options
        )
    if "calibrate" in options:
        # Each phase began to count anew.
        most = {key: max(phase[key] for phase in found) for key in ("gpu_reserved_gib",) if key in found[0]}
        (arguments.work / f"{name}.json").write_text(json.dumps({"phases": found} | most), encoding="utf-8")


@contextmanager
def phases() -> Iterator[list[dict[str, Any]]]:
    """Seconds and peaks of PyTorch's memory on the GPU of each phase. The last one has all that follows it, too."""
    import torch

    found: list[dict[str, Any]] = []
    gpu = torch.cuda.is_available()

    def finish() -> None:
        if gpu:
            torch.cuda.synchronize()
            found[-1]["gpu_allocated_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
            found[-1]["gpu_reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
            torch.cuda.reset_peak_memory_stats()
        found[-1]["seconds"] = round(time.perf_counter() - found[-1].pop("began"), 2)

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.msg.startswith("phase "):
                if found:
                    finish()
                found.append({"phase": str(record.args[0] if record.args else ""), "began": time.perf_counter()})

    logger, listener = logging.getLogger("ernie_image_nf4.quantization.calibration"), Listener()
    logger.addHandler(listener)
    logger.setLevel(logging.DEBUG)
    try:
        yield found
        if found:
            finish()
    finally:
        logger.removeHandler(listener)


def compare(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    """Relative error of each repository's guided predictions to the original's."""
    import torch

    from ernie_image_nf4 import load
    from ernie_image_nf4.quantization.streamed_original import conditions

    held_out, expected = original_predictions(arguments)
    weight = (1 - settings(arguments).guidance_scale, settings(arguments).guidance_scale)
    errors = {}
    for name in names:
        pipe = load(arguments.work / name, prompt_enhancer=False, fast=False, memory="resident")
        model, device = pipe.transformer, pipe.transformer.device
        found = []
        with torch.no_grad():
            for latents, timestep, text in held_out:
                given = conditions(timestep, text, device, model.dtype)
                found.append(model(latents.to(device, model.dtype), *given, return_dict=False)[0].float().cpu())
        difference = guided(found, weight) - guided(expected, weight)
        errors[name] = round(float(difference.norm() / guided(expected, weight).norm()), 5)
        del pipe, model
    result: dict[str, Any] = {"prediction_error": errors, "held_out_predictions": len(expected)}
    if {"calibrated", "scale_search"} <= errors.keys():
        result["prediction_error_vs_search"] = round(errors["calibrated"] / errors["scale_search"], 4)
    (arguments.work / "errors.json").write_text(json.dumps(result), encoding="utf-8")


def guided(predictions: Sequence[torch.Tensor], weight: tuple[float, float]) -> torch.Tensor:
    """Predictions with guidance, of pairs with the empty prompt and with the prompt; as they are without guidance."""
    import torch

    stacked = torch.cat(list(predictions))
    return stacked if weight[1] <= 1 else weight[0] * stacked[0::2] + weight[1] * stacked[1::2]


def original_predictions(
    arguments: argparse.Namespace,
) -> tuple[list[tuple[torch.Tensor, float, torch.Tensor]], list[torch.Tensor]]:
    """Latents, timesteps and texts on the way to held-out pictures, and the original's predictions for them."""
    import torch
    from tqdm import tqdm

    from ernie_image_nf4.memory.placement import find_device
    from ernie_image_nf4.quantization import calibration
    from ernie_image_nf4.quantization.calibration_data import Drawing, predict_all
    from ernie_image_nf4.quantization.layer_selection import plan_weights
    from ernie_image_nf4.quantization.resumable_output import resumable_output
    from ernie_image_nf4.repository.record import open_repository

    source = open_repository(arguments.work / ORIGINAL)
    plan = plan_weights(source.components["transformer"])
    prompts = HELD_OUT[: arguments.prompts]
    planned = calibration.plan_calibration(source, plan, prompts, settings(arguments), find_device(None))
    steps = planned.settings.num_inference_steps
    wanted = sorted({int(part * steps) for part in HELD_OUT_STEPS})
    drawings = [Drawing(tuple(range(wanted[-1] + 1)), tuple(wanted)) for _ in prompts]
    planned = dataclasses.replace(planned, drawings=drawings)
    with resumable_output(arguments.work / "held-out", {}) as made, tqdm(disable=True) as bar:
        texts = calibration.find_texts(planned, made.checkpoints, bar)
        original, memory = calibration.open_original(planned)
        samples = calibration.draw(planned, original, texts, made.checkpoints, memory, bar, first_seed=FIRST_SEED)
        inputs = [(sample.latents, sample.timestep, sample.text) for sample in samples]
        with torch.no_grad():
            rows = planned.shapes.rows
            parts = [
                predict_all(original, inputs[start : start + rows], memory) for start in range(0, len(inputs), rows)
            ]
    return inputs, [prediction.float().cpu() for part in parts for prediction in part]


if __name__ == "__main__":
    main()
