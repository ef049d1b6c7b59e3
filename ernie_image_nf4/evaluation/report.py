"""An evaluation as files: ``evaluation.json`` and ``evaluation.md``, a grid of pictures side by side, and plots.

Each file is written under a temporary name and renamed, so that a reader never sees half a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..errors import InvalidSettings
from ..generation.image_file import replacing
from .grid import picture_grid
from .metrics import SET_METRICS
from .plots import has_matplotlib, plot_psnr, plot_timesteps
from .records import Evaluation, PredictionError, Result, evaluation_json

METRIC_COLUMNS = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "st_lpips": "ST-LPIPS",
    "clip_score": "CLIP score",
    "fid": "FID",
    "kid": "KID",
}
MB = 1000**2


def write_report(evaluation: Evaluation, folder: str | os.PathLike[str]) -> list[Path]:
    """Write all files of an evaluation into a folder, over those of an earlier one.

    Args:
        evaluation: Finished or not.
        folder: Made if it doesn't exist.

    Returns:
        The files. There are no plots without matplotlib, which the Markdown then says, and none of a metric that isn't
        available.

    Raises:
        InvalidSettings: The folder can't be written to.
    """
    writers: dict[str, Callable[[Path], object]] = {
        "evaluation.json": lambda path: path.write_text(evaluation_json(evaluation), encoding="utf-8"),
        "grid.png": lambda path: picture_grid(evaluation).save(path, format="PNG"),
    }
    missing = None
    if has_matplotlib():
        if evaluation.metrics["psnr"].reason is None:
            writers["psnr.png"] = lambda path: plot_psnr(evaluation, path)
        writers["timesteps.png"] = lambda path: plot_timesteps(evaluation, path)
    else:
        missing = "Plots: matplotlib is not installed: `pip install ernie-image-nf4[evaluate]`"
    writers["evaluation.md"] = lambda path: path.write_text(markdown(evaluation, missing), encoding="utf-8")
    return write_files(Path(folder), writers)


def write_files(folder: Path, writers: dict[str, Callable[[Path], object]]) -> list[Path]:
    """Write files into a folder, which is made if it doesn't exist.

    Args:
        folder: The folder.
        writers: Name -> function that writes the file to a path.

    Raises:
        InvalidSettings: The folder can't be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            with replacing(folder / name) as temporary:
                write(temporary)
    except OSError as error:
        raise InvalidSettings(f"{folder} could not be written ({error.strerror}): name another folder.") from error
    return [folder / name for name in writers]


def markdown(evaluation: Evaluation, missing: str | None = None) -> str:
    """The text of ``evaluation.md``: the main table, what is missing and why, errors by timestep and by kind of layer.

    Args:
        evaluation: Finished or not.
        missing: A note on files that could not be made.
    """
    settings, reference = evaluation.settings, evaluation.results[0]
    notes = _notes(evaluation) + ([missing] if missing else [])
    sections = [
        f"# {reference.name}: {len(evaluation.results) - 1} candidates compared",
        f"{len(evaluation.prompts)} prompts, {settings.width}x{settings.height}, {settings.num_inference_steps} steps, "
        f"guidance {settings.guidance_scale}, the same initial latents for all, without the prompt enhancer (it "
        f"samples: every pipeline would draw other prompts). {evaluation.device}, {evaluation.dtype}.",
        markdown_table(*_main_table(evaluation)),
        "\n".join(f"- {note}" for note in notes),
        *_error_sections(evaluation),
        "## Made with",
        ", ".join(f"{name} {version}" for name, version in evaluation.versions.items()),
    ]
    sections += [f"`{evaluation.command}`"] if evaluation.command else []
    return "\n\n".join(sections) + "\n"


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _main_table(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    headers = [
        *("method", "bits per weight", "MB", "weight error", "prediction error"),
        *METRIC_COLUMNS.values(),
        "s per picture",
    ]
    rows = []
    for result in evaluation.results:
        if result.error:
            rows.append([result.name, *["could not run"] * (len(headers) - 1)])
            continue
        weights = result.weight_error.get("transformer")
        prediction = result.prediction_error
        rows.append(
            [
                result.name,
                " / ".join(_number(bits, 2) for bits in result.bits_per_weight.values()),
                _number(sum(result.bytes.values()) / MB, 1),
                _number(weights.overall if weights else None, 4),
                _number(prediction.overall if prediction else None, 4),
                *(_score(evaluation, result, metric) for metric in METRIC_COLUMNS),
                _number(result.seconds_per_image, 2),
            ]
        )
    return headers, rows


def _score(evaluation: Evaluation, result: Result, metric: str) -> str:
    if evaluation.metrics[metric].reason:
        return "not available"
    score = result.scores.get(metric)
    if score is None:
        return "–"  # The reference against itself
    if metric == "psnr" and result.identical_pictures:
        alike = f"{result.identical_pictures} of {len(evaluation.prompts)} identical"
        return alike if score.mean is None else f"{_number(score.mean, 2)} ({alike})"
    return _number(score.mean, 2 if metric in ("psnr", "clip_score", *SET_METRICS) else 4)


def _notes(evaluation: Evaluation) -> list[str]:
    """What the columns are, what isn't available, what could not run, and the candidates' formats."""
    statuses, results = evaluation.metrics.values(), evaluation.results
    return [
        "Bits per weight: linear layers of transformer and text encoder with their scales, layers kept unquantized "
        "included. Weight error: of the transformer's linear layers, norm of the error over norm of the weights. "
        "Prediction error: of the transformer's output likewise. PSNR: mean over the prompts whose pictures differ.",
        *(f"{status.title}: not available, {status.reason}." for status in statuses if status.reason),
        *(f"{result.name}: could not run, {_one_line(result.error)}" for result in results if result.error),
        *(f"{result.name}: {result.format}." for result in results[1:] if not result.error and result.format),
    ]


def _error_sections(evaluation: Evaluation) -> list[str]:
    """Errors by timestep and by kind of layer, of the candidates that were measured."""
    measured = [(result, error) for result in evaluation.results if (error := result.prediction_error)]
    if not measured:
        return []
    names = [result.name for result, _ in measured]
    sections = [
        "## Relative error of the transformer's prediction by timestep",
        markdown_table(["timestep", *names], _timestep_rows([error for _, error in measured])),
    ]
    first, _ = measured[0]
    for component, errors in first.weight_error.items():
        rows = [
            [f"`{kind}`", *(_number(result.weight_error[component].by_kind[kind], 4) for result, _ in measured)]
            for kind in errors.by_kind
        ]
        sections += [
            f"## Relative weight error by kind of layer: {component}",
            markdown_table(["layers", *names], rows),
        ]
    return sections


def _timestep_rows(errors: Sequence[PredictionError]) -> list[list[str]]:
    return [
        [f"{timestep:.0f}", *(_number(error.relative_errors[row], 4) for error in errors)]
        for row, timestep in enumerate(errors[0].timesteps)
    ]


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
