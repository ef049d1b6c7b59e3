"""The transformer's predictions for fixed inputs: whether an arm computes what the demo computes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ErnieImagePipeline
from safetensors.torch import load_file, save_file

from ..loading.pipeline import load
from ..repository.components import PIXELS_PER_PATCH
from .arms import REFERENCE, has_own_work

TIMESTEPS = tuple(range(1000, 0, -100))
TEXT_LENGTHS = (3, 24)  # Tokens of an empty prompt and of a prompt
EXACT = "float32"  # Predictions of the demo's weights, computed in float32


def predictions(
    pipe: ErnieImagePipeline, size: int, device: str, *, reordered: bool = False
) -> dict[str, torch.Tensor]:
    """The transformer's prediction for fixed random latents and embeddings of a pair of prompts, at each of
    `TIMESTEPS`.

    Args:
        pipe: Only its transformer is used.
        size: Height and width of the picture in pixels.
        device: Of the transformer.
        reordered: Whether to exchange the two rows of the batch, and exchange them back in the result.

    Returns:
        As ``prediction``: (timesteps, 2, channels, size / 16, size / 16), float32 on the CPU.
    """
    config, dtype = pipe.transformer.config, pipe.transformer.dtype
    generator = torch.Generator("cpu").manual_seed(0)
    side = size // PIXELS_PER_PATCH
    latents = torch.randn(1, config.in_channels, side, side, generator=generator).expand(2, -1, -1, -1)
    text = torch.randn(2, max(TEXT_LENGTHS), config.text_in_dim, generator=generator)
    text[0, TEXT_LENGTHS[0] :] = 0
    lengths = torch.tensor(TEXT_LENGTHS)
    if reordered:
        text, lengths = text.flip(0), lengths.flip(0)
    rows = []
    for timestep in TIMESTEPS:
        with torch.no_grad():
            row = pipe.transformer(
                hidden_states=latents.to(device, dtype),
                timestep=torch.full((2,), timestep, device=device, dtype=dtype),
                text_bth=text.to(device, dtype),
                text_lens=lengths.to(device),
                return_dict=False,
            )[0]
        rows.append((row.flip(0) if reordered else row).float().cpu())
    return {"prediction": torch.stack(rows)}


def save_predictions(pipe: ErnieImagePipeline, size: int, device: str, work: Path, arm: str) -> None:
    """Save an arm's predictions, in order and with the batch reordered, to be compared when others are there."""
    predicted = predictions(pipe, size, device)
    predicted["reordered"] = predictions(pipe, size, device, reordered=True)["prediction"]
    _save(predicted, _file(work, arm))


def save_exact_predictions(model: str | Path, work: Path, size: int, device: str) -> dict[str, float]:
    """Save what plain pipelines predict in float32: against it each arm shows what its rounding takes."""
    pipe = load(model, device=device, dtype="float32", fast=False, prompt_enhancer=False)
    began = time.perf_counter()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # convolutions are in TF32 by default
        _save(predictions(pipe, size, device), _file(work, EXACT))
    return {"seconds": time.perf_counter() - began}


def remove_predictions(work: Path) -> None:
    """Remove the predictions of an earlier run."""
    for file in work.glob("*.safetensors"):
        file.unlink()


def has_predictions(row: Mapping[str, Any], work: Path) -> bool:
    """Whether an arm's predictions are there, as far as `compare_predictions` compares them."""
    return not is_compared(row) or _file(work, row["name"]).exists()


def compare_predictions(arms: list[dict[str, Any]], work: Path) -> None:
    """Add each arm's largest relative error.

    ``prediction_error`` is against the demo, and for the demo itself that of its own reordered batch;
    ``prediction_error_to_float32`` is against the same weights in float32, once those are there.

    Args:
        arms: Rows of the result so far.
        work: Folder with their predictions.
    """
    files = {name: _file(work, name) for name in (REFERENCE, EXACT)}
    if not files[REFERENCE].exists() or all(arm["name"] != REFERENCE or "error" in arm for arm in arms):
        return
    reference = load_file(files[REFERENCE])
    exact = load_file(files[EXACT])["prediction"] if files[EXACT].exists() else None
    for arm in arms:
        if "error" in arm or not is_compared(arm):
            continue
        own = load_file(_file(work, arm["name"]))
        other = own["reordered" if arm["name"] == REFERENCE else "prediction"]
        arm["prediction_error"] = largest_error(other, reference["prediction"])
        if exact is not None:
            arm["prediction_error_to_float32"] = largest_error(own["prediction"], exact)


def is_compared(row: Mapping[str, Any]) -> bool:
    """Whether an arm's predictions are compared: those of other weights, and of other work, are not."""
    return row["way"] in ("demo", "ours") and not has_own_work(row)


def largest_error(one: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest relative error (norm of the error over norm of the reference) over timesteps, the first dimension."""
    difference = (one - reference).flatten(1).norm(dim=1)
    return (difference / reference.flatten(1).norm(dim=1)).max().item()


def _file(work: Path, arm: str) -> Path:
    return work / f"{arm.replace(', ', '-').replace(' ', '-')}.safetensors"


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
