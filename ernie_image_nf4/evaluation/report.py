"""What `evaluate` measured as files: ``evaluation.json`` and ``.md``, a grid of pictures side by side, and plots.

Each file is written under a temporary name and then renamed, so whoever reads one sees a whole one.
"""

from __future__ import annotations

import logging
import os
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from ..errors import InvalidSettings
from ..generation.image_file import replacing
from .metrics import SET_METRICS
from .run import Evaluation, Result, to_json

logger = logging.getLogger(__name__)

GRID_ROWS, GRID_SIDE = 12, 384  # prompts in the grid, and pixels of a picture's longer side in it
LABEL_HEIGHT, LABEL_WIDTH = 40, 200
# With Chinese characters first; the last one comes with Pillow's own fallback to a font without them.
FONTS = ("NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "wqy-microhei.ttc", "DejaVuSans.ttf")
MAX_PLOTTED = 40  # prompts that are plotted one by one; more of them are plotted in order of their figures
MB = 1000**2


def write_report(evaluation: Evaluation, folder: str | os.PathLike[str]) -> list[Path]:
    """Write all files of an evaluation into a folder, over those of an earlier one.

    Args:
        evaluation: Finished or not.
        folder: Made if need be.

    Returns:
        The files. Without matplotlib there are no plots, which the Markdown then says.

    Raises:
        InvalidSettings: The folder can't be written to.
    """
    folder = Path(folder)
    writers: dict[str, Callable[[Path], object]] = {
        "evaluation.json": lambda path: path.write_text(to_json(evaluation), encoding="utf-8"),
        "grid.png": lambda path: picture_grid(evaluation).save(path, format="PNG"),
    }
    missing = None
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        missing = "Plots: matplotlib is not installed: `pip install ernie-image-nf4[evaluate]`"
    else:
        writers |= {
            "psnr.png": lambda path: _plot_psnr(evaluation, path),
            "timesteps.png": lambda path: _plot_timesteps(evaluation, path),
        }
    writers["evaluation.md"] = lambda path: path.write_text(markdown(evaluation, missing), encoding="utf-8")
    return write_files(folder, writers)


def write_files(folder: Path, writers: dict[str, Callable[[Path], object]]) -> list[Path]:
    """Write files by name into a folder, which is made if need be.

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


# Markdown


def markdown(evaluation: Evaluation, missing: str | None = None) -> str:
    """The text of ``evaluation.md``: the main table, what is missing and why, errors by kind of layer and by timestep."""
    settings, reference = evaluation.settings, evaluation.results[0]
    sections = [
        f"# {reference.name}: {len(evaluation.results) - 1} candidates compared",
        f"{len(evaluation.prompts)} prompts, {settings.width}x{settings.height}, {settings.num_inference_steps} steps, guidance "
        f"{settings.guidance_scale}, the same initial latents for all, without the prompt enhancer (it samples: every pipeline "
        f"would draw other prompts). {evaluation.device}, {evaluation.dtype}.",
        markdown_table(*_main_table(evaluation)),
    ]
    notes = [
        "Bits per weight: linear layers of transformer and text encoder with their scales, layers kept unquantized included. "
        "Weight error: of the transformer's linear layers, norm of the error over norm of the weights. Prediction error: of "
        "the transformer's output likewise. PSNR: mean over the prompts whose pictures differ."
    ]
    notes += [
        f"{status.title}: not available, {status.reason}." for status in evaluation.metrics.values() if status.reason
    ]
    notes += [
        f"{result.name}: could not run, {_one_line(result.error)}" for result in evaluation.results if result.error
    ]
    notes += [
        f"{result.name}: {result.format}." for result in evaluation.results[1:] if not result.error and result.format
    ]
    notes += [missing] if missing else []
    sections.append("\n".join(f"- {note}" for note in notes))
    measured = [result for result in evaluation.results if result.prediction_error]
    if measured:
        sections += [
            "## Relative error of the transformer's prediction by timestep",
            markdown_table(
                ["timestep", *(result.name for result in measured)],
                [
                    [
                        f"{timestep:.0f}",
                        *(_number(result.prediction_error.relative_errors[row], 4) for result in measured),
                    ]
                    for row, timestep in enumerate(measured[0].prediction_error.timesteps)
                ],
            ),
        ]
        for component in measured[0].weight_error:
            kinds = measured[0].weight_error[component].by_kind
            sections += [
                f"## Relative weight error by kind of layer: {component}",
                markdown_table(
                    ["layers", *(result.name for result in measured)],
                    [
                        [
                            f"`{kind}`",
                            *(_number(result.weight_error[component].by_kind[kind], 4) for result in measured),
                        ]
                        for kind in kinds
                    ],
                ),
            ]
    made = [", ".join(f"{name} {version}" for name, version in evaluation.versions.items())]
    made += [f"`{evaluation.command}`"] if evaluation.command else []
    sections += ["## Made with", *made]
    return "\n\n".join(sections) + "\n"


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _main_table(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    shown = {
        "psnr": "PSNR (dB)",
        "ssim": "SSIM",
        "lpips": "LPIPS",
        "st_lpips": "ST-LPIPS",
        "clip_score": "CLIP score",
        "fid": "FID",
        "kid": "KID",
    }
    headers = ["method", "bits per weight", "MB", "weight error", "prediction error", *shown.values(), "s per picture"]
    rows = []
    for result in evaluation.results:
        if result.error:
            rows.append([result.name, *["could not run"] * (len(headers) - 1)])
            continue
        weights = result.weight_error.get("transformer")
        rows.append(
            [
                result.name,
                " / ".join(_number(bits, 2) for bits in result.bits_per_weight.values()),
                _number(sum(result.bytes.values()) / MB, 1),
                _number(weights and weights.overall, 4),
                _number(result.prediction_error and result.prediction_error.overall, 4),
                *(_score(evaluation, result, metric) for metric in shown),
                _number(result.seconds_per_image, 2),
            ]
        )
    return headers, rows


def _score(evaluation: Evaluation, result: Result, metric: str) -> str:
    if evaluation.metrics[metric].reason:
        return "not available"
    score = result.scores.get(metric)
    if score is None:
        return "–"  # the reference against itself
    if metric == "psnr" and result.identical_pictures:
        alike = f"{result.identical_pictures} of {len(evaluation.prompts)} identical"
        return alike if score.mean is None else f"{_number(score.mean, 2)} ({alike})"
    return _number(score.mean, 2 if metric in ("psnr", "clip_score", *SET_METRICS) else 4)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


# Pictures


def picture_grid(evaluation: Evaluation) -> Image.Image:
    """The first prompts as rows: the reference, then every candidate that drew."""
    columns = list(evaluation.pictures.items())
    captions = [f"{number}. {prompt}" for number, prompt in enumerate(evaluation.prompts, 1)]
    return labelled_grid([name for name, _ in columns], captions, [pictures for _, pictures in columns])


def labelled_grid(columns: Sequence[str], rows: Sequence[str], pictures: Sequence[torch.Tensor]) -> Image.Image:
    """Pictures side by side, with a name above each column and a caption left of each row.

    Args:
        columns: Names.
        rows: Captions; the first `GRID_ROWS` are shown.
        pictures: For each column uint8 of shape (rows, 3, height, width).
    """
    font = _font(13)
    height, width = pictures[0].shape[2:]
    scale = min(1.0, GRID_SIDE / max(height, width))
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    cell_width, cell_height = max(width, 96), max(height, 64)  # room for the text beside tiny pictures
    shown = rows[:GRID_ROWS]
    grid = Image.new("RGB", (LABEL_WIDTH + len(columns) * cell_width, LABEL_HEIGHT + len(shown) * cell_height), "white")
    draw = ImageDraw.Draw(grid)
    for column, (name, drawn) in enumerate(zip(columns, pictures, strict=True)):
        x = LABEL_WIDTH + column * cell_width
        _write(draw, name, (x + 4, 4), cell_width - 8, LABEL_HEIGHT - 8, font)
        for row in range(len(shown)):
            image = Image.fromarray(drawn[row].permute(1, 2, 0).contiguous().numpy())
            grid.paste(image.resize((width, height), Image.Resampling.LANCZOS), (x, LABEL_HEIGHT + row * cell_height))
    for row, caption in enumerate(shown):
        _write(draw, caption, (4, LABEL_HEIGHT + row * cell_height + 4), LABEL_WIDTH - 8, cell_height - 8, font)
    return grid


def _write(
    draw: ImageDraw.ImageDraw, text: str, place: tuple[int, int], width: int, height: int, font: ImageFont.FreeTypeFont
) -> None:
    """Text in a box, broken into lines and cut off where the box ends."""
    wide = not text.isascii()
    per_line = max(4, int(width / (font.size * (1.0 if wide else 0.55))))
    lines = textwrap.wrap(text, per_line)[: max(1, int(height / (font.size * 1.4)))]
    draw.multiline_text(place, "\n".join(lines), font=font, fill="black", spacing=2)


def _font(size: int) -> ImageFont.FreeTypeFont:
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


# Plots


def _plot_psnr(evaluation: Evaluation, path: Path) -> None:
    many = len(evaluation.prompts) > MAX_PLOTTED

    def draw(axes: Any) -> None:
        for result in _drawn(evaluation):
            values = result.scores["psnr"].per_prompt
            if many:
                values = sorted(value for value in values if value is not None)
            axes.plot(range(1, len(values) + 1), values, marker="." if not many else None, label=result.name)
        axes.set_xlabel("prompts, each candidate's from the worst to the best" if many else "prompt")
        axes.set_ylabel("PSNR to the reference (dB)")

    _plot(path, draw)


def _plot_timesteps(evaluation: Evaluation, path: Path) -> None:
    def draw(axes: Any) -> None:
        for result in _drawn(evaluation):
            error = result.prediction_error
            axes.plot(error.timesteps, error.relative_errors, marker="o", label=result.name)
        axes.invert_xaxis()  # as denoising goes
        axes.set_ylim(bottom=0)
        axes.set_xlabel("timestep (1000 is pure noise)")
        axes.set_ylabel("relative error of the prediction")

    _plot(path, draw)


def _plot(path: Path, draw: Callable[[Any], None]) -> None:
    from matplotlib.figure import Figure  # not pyplot, which looks for a display

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=120)


def _drawn(evaluation: Evaluation) -> list[Result]:
    return [result for result in evaluation.results[1:] if result.error is None]
