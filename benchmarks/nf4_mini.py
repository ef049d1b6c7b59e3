"""Fidelity of the mini's NF4 formats (stock, scale search, layers kept, calibration) and of other libraries' formats.

    python benchmarks/nf4_mini.py ORIGINAL --work /tmp/nf4-mini --device cuda --batch 50

ORIGINAL is the folder of the mini in original precision, as training/ makes it. The captions are held-out scenes, half
in each language, each with a fixed seed; calibration uses captions of other scenes. `--baselines` adds other libraries'
formats, `--classifier FILE` the accuracy of what is drawn. The printed table is that of docs/fidelity.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # Import from the checkout, installed or not

from benchmarks import formats_report
from ernie_image_nf4.evaluation.baselines import BASELINES
from ernie_image_nf4.evaluation.records import Evaluation, Result, evaluation_json
from ernie_image_nf4.evaluation.run import evaluate
from ernie_image_nf4.generation.prompt_file import Row
from ernie_image_nf4.memory.placement import find_device
from ernie_image_nf4.quantization.convert import quantize
from training.classifier import SceneClassifier, accuracies, classify
from training.export import CALIBRATION_PROMPTS, RECOMMENDED, calibration_prompts
from training.scenes import Scene, caption, sample_scene

SETTINGS = RECOMMENDED
VARIANTS = {
    "stock": {"scale_search": False, "default_keep": False},
    "scale_search": {"default_keep": False},
    "default": {},
    "calibrated": {"calibrate": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("original", type=Path)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the repositories; those in it are used again"
    )
    parser.add_argument("--output", type=Path, default=Path("nf4_mini.json"))
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="some of them, separated by commas")
    parser.add_argument(
        *("--baselines", "--peers"), nargs="*", default=[], choices=BASELINES, help="other libraries' formats"
    )
    parser.add_argument("--size", type=int, default=SETTINGS.height)
    parser.add_argument("--steps", type=int, default=SETTINGS.num_inference_steps)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument("--dtype", help="default: bfloat16, float32 on CPUs")
    parser.add_argument("--classifier", type=Path, help="weights of the judge of training/classifier.py")
    arguments = parser.parse_args()

    names = arguments.variants.split(",")
    made = {name: make(name, arguments.original, arguments.work, arguments.device) for name in names}
    scenes, rows = held_out(arguments.captions)
    candidates = [str(made[name][0]) for name in names] + arguments.baselines
    judge = load_judge(arguments.classifier, arguments.device) if arguments.classifier else None
    seen: dict[str, dict[str, float]] = {}
    for evaluation in evaluate(
        arguments.original,
        candidates,
        prompts=rows,
        height=arguments.size,
        width=arguments.size,
        steps=arguments.steps,
        guidance=SETTINGS.guidance_scale,
        batch_size=arguments.batch,
        device=arguments.device,
        dtype=arguments.dtype,
        command=" ".join(["python", *sys.argv]),
        progress=True,
    ):
        for name, pictures in evaluation.pictures.items():
            if judge is not None and name not in seen:
                seen[name] = judged(judge, pictures, scenes, arguments.device)
        # After each, which may be the last one that is measured
        so_far = zip(["original", *names, *arguments.baselines], evaluation.results, strict=False)
        results = {name: figures(result) | seen.get(result.name, {}) for name, result in so_far}
        for name in made.keys() & results.keys():
            results[name]["quantize_s"] = made[name][1]
        content = write(arguments, evaluation, results)
    print(formats_report.table(content))


def write(arguments: argparse.Namespace, evaluation: Evaluation, results: dict[str, dict[str, object]]) -> dict:
    """Write both files; returns the content of the one of flat figures."""
    content = {
        "command": evaluation.command,
        "machine": {"device": evaluation.device, "platform": platform.platform()},
        "versions": evaluation.versions,
        "dtype": evaluation.dtype,
        "captions": len(evaluation.prompts),
        "calibration_prompts": CALIBRATION_PROMPTS,
        "settings": vars(evaluation.settings),
        "batch_size": evaluation.batch_size,
        "results": results,
    }
    arguments.output.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    details = json.loads(evaluation_json(evaluation))
    arguments.output.with_suffix(".details.json").write_text(json.dumps(details) + "\n", encoding="utf-8")
    return content


def make(name: str, original: Path, work: Path, device: str | None) -> tuple[Path, float | None]:
    """The NF4 repository of one variant, and the seconds that making it took; None if it existed."""
    folder = work / name
    if (folder / "model_index.json").exists() and not (folder / ".unfinished").exists():
        return folder, None
    options = dict(VARIANTS[name])
    if options.get("calibrate"):
        options["calibrate"] = calibration_prompts()
    began = time.perf_counter()
    quantize(original, folder, device=device, recommended=SETTINGS, **options)
    return folder, round(time.perf_counter() - began, 1)


def held_out(count: int) -> tuple[list[Scene], list[Row]]:
    """Scenes that are in no training picture, and their captions, alternately English and Chinese."""
    rng = random.Random(123)
    scenes = [sample_scene(rng, held_out=True) for _ in range(count)]
    texts = [caption(scene, language(number), rng) for number, scene in enumerate(scenes)]
    return scenes, [Row(text, seed=number) for number, text in enumerate(texts)]


def language(number: int) -> str:
    return ("en", "zh")[number % 2]


def load_judge(classifier: Path, device: str | None) -> SceneClassifier:
    model = SceneClassifier()
    model.load_state_dict({name: value.float() for name, value in load_file(classifier).items()})
    return model.eval().to(find_device(device))


def judged(model: SceneClassifier, pictures: torch.Tensor, scenes: list[Scene], device: str | None) -> dict[str, float]:
    """Accuracies that the classifier finds in pictures, uint8."""
    seen = classify(model, pictures.to(find_device(device), torch.float32) / 127.5 - 1)
    return {f"{what}_accuracy": round(value, 4) for what, value in accuracies(seen, scenes).items()}


def figures(result: Result) -> dict[str, object]:
    """The flat figures of one result."""
    if result.error:
        return {"error": result.error}
    return {
        "format": result.format,
        "bytes": result.bytes,
        "bits_per_weight": result.bits_per_weight,
        "weight_error": {name: error.overall for name, error in result.weight_error.items()},
        "prediction_error": result.prediction_error and result.prediction_error.overall,
        **{name: score.mean for name, score in result.scores.items()},
        "seconds_per_image": result.seconds_per_image,
    }


if __name__ == "__main__":
    main()
