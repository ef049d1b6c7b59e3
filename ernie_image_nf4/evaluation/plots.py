"""Plots of an evaluation, with matplotlib where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .records import Evaluation, Result

MAX_PLOTTED = 40  # Prompts plotted one by one; of more, each candidate's values are plotted in ascending order


def has_matplotlib() -> bool:
    """Whether plots can be made."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_psnr(evaluation: Evaluation, path: Path) -> None:
    """PSNR of each prompt's picture, a line for each candidate."""
    many = len(evaluation.prompts) > MAX_PLOTTED

    def draw(axes: Any) -> None:
        for result in _measured(evaluation):
            values = result.scores["psnr"].per_prompt
            if many:
                values = [*sorted(value for value in values if value is not None)]
            axes.plot(range(1, len(values) + 1), values, marker="." if not many else None, label=result.name)
        axes.set_xlabel("prompts, each candidate's from the worst to the best" if many else "prompt")
        axes.set_ylabel("PSNR to the reference (dB)")

    _plot(path, draw)


def plot_timesteps(evaluation: Evaluation, path: Path) -> None:
    """Relative error of the prediction at each timestep, a line for each candidate."""

    def draw(axes: Any) -> None:
        for result in _measured(evaluation):
            if error := result.prediction_error:
                axes.plot(error.timesteps, error.relative_errors, marker="o", label=result.name)
        axes.invert_xaxis()  # Denoising goes from 1000 to 0
        axes.set_ylim(bottom=0)
        axes.set_xlabel("timestep (1000 is pure noise)")
        axes.set_ylabel("relative error of the prediction")

    _plot(path, draw)


def _plot(path: Path, draw: Callable[[Any], None]) -> None:
    from matplotlib.figure import Figure  # Not pyplot, which looks for a display

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=120)


def _measured(evaluation: Evaluation) -> list[Result]:
    return [result for result in evaluation.results[1:] if result.error is None]
