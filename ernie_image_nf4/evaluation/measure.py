"""All measures of one pipeline: of the reference, and of a candidate beside it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from diffusers import ErnieImagePipeline
from tqdm import tqdm

from ..repository.metadata import Recommended
from .metrics import SET_METRICS, Metric
from .pictures import draw_from_latents, draw_latents
from .predictions import Probe, encode, make_probe, predict, prediction_error
from .records import Result, Score
from .weights import (
    COMPARED_COMPONENTS,
    Model,
    bits_per_weight,
    effective_weight,
    linear_layers,
    stored_bytes,
    weight_error,
)

PROBE_PROMPTS = 4


@dataclass(frozen=True)
class Work:
    """What every pipeline does.

    Attributes:
        prompts: What to draw.
        settings: Size, steps and guidance scale.
        seeds: Of the initial latents, one for each prompt.
        batch_size: Pictures to draw together.
        metrics: Metric -> its function.
        bar: Progress bar over the pictures of all pipelines.
    """

    prompts: list[str]
    settings: Recommended
    seeds: list[int]
    batch_size: int
    metrics: dict[str, Metric]
    bar: tqdm


@dataclass(frozen=True)
class Reference:
    """What candidates are compared with, in host memory.

    Attributes:
        pictures: uint8 (prompts, 3, height, width).
        probe: Points at which the transformer predicts.
        predictions: Its predictions there, of the shape of the probe's latents.
        weights: Component -> linear layer -> its weight.
        shapes: Component -> name in its state dict -> shape.
    """

    pictures: torch.Tensor
    probe: Probe
    predictions: torch.Tensor
    weights: dict[str, dict[str, torch.Tensor]]
    shapes: dict[str, dict[str, torch.Size]]


def measure_reference(result: Result, pipe: ErnieImagePipeline, work: Work) -> Reference:
    """Measure the reference, into its result; returns what candidates are compared with."""
    pictures = _timed_pictures(result, pipe, work)
    if "clip_score" in work.metrics:  # The only metric of a picture alone
        result.scores["clip_score"] = _score("clip_score", work, pictures, pictures)
    probed = slice(PROBE_PROMPTS)
    latents = draw_latents(pipe, work.seeds[probed], work.settings)
    probe = make_probe(pipe, work.prompts[probed], work.settings, latents, work.batch_size)
    weights, shapes = {}, {}
    for component, model in _onloaded(pipe, probe):
        weights[component] = {
            name: effective_weight(layer, layer.in_features, model.dtype).cpu()
            for name, layer in linear_layers(model).items()
        }
        shapes[component] = {name: tensor.shape for name, tensor in model.state_dict().items()}
    reference = Reference(pictures, probe, predict(pipe, probe, work.batch_size), weights, shapes)
    for component in weights:
        _note_size(result, component, getattr(pipe, component), reference)
    return reference


def measure_candidate(result: Result, pipe: ErnieImagePipeline, reference: Reference, work: Work) -> torch.Tensor:
    """Measure a candidate, into its result; returns its pictures."""
    pictures = _timed_pictures(result, pipe, work)
    for component, model in _onloaded(pipe, reference.probe):
        result.weight_error[component] = weight_error(reference.weights[component], model)
        _note_size(result, component, model, reference)
    predictions = predict(pipe, reference.probe, work.batch_size)
    result.prediction_error = prediction_error(reference.predictions, predictions, reference.probe.timesteps)
    result.identical_pictures = sum(map(torch.equal, reference.pictures, pictures))
    for name in work.metrics:
        result.scores[name] = _score(name, work, reference.pictures, pictures)
    return pictures


def _timed_pictures(result: Result, pipe: ErnieImagePipeline, work: Work) -> torch.Tensor:
    work.bar.set_description(result.name)
    pipe.set_progress_bar_config(disable=True)  # The bar counts pictures, not steps
    latents = draw_latents(pipe, work.seeds, work.settings)
    started = time.perf_counter()
    pictures = draw_from_latents(
        pipe, work.prompts, work.settings, latents, batch_size=work.batch_size, on_drawn=work.bar.update
    )
    result.seconds_per_image = round((time.perf_counter() - started) / len(pictures), 4)
    return pictures


def _score(name: str, work: Work, reference: torch.Tensor, pictures: torch.Tensor) -> Score:
    found = work.metrics[name](reference, pictures, work.prompts)
    values = [round(value, 5) if math.isfinite(value) else None for value in found]
    known = [value for value in values if value is not None]
    mean = round(sum(known) / len(known), 5) if known else None
    return Score(mean, [] if name in SET_METRICS else values)


def _onloaded(pipe: ErnieImagePipeline, probe: Probe) -> Iterator[tuple[str, Model]]:
    """Each compared component, on the device: one use onloads it, and it stays there until another is used."""
    uses: dict[str, Callable[[], object]] = {
        "text_encoder": lambda: encode(pipe, ["-"]),
        "transformer": lambda: predict(pipe, Probe(probe.latents[:1, :1], probe.timesteps[:1], probe.texts[:1])),
    }
    for component in COMPARED_COMPONENTS:
        uses[component.name]()
        yield component.name, getattr(pipe, component.name)


def _note_size(result: Result, component: str, model: Model, reference: Reference) -> None:
    sizes = stored_bytes(model, reference.shapes[component])
    result.bytes[component] = sum(sizes.values())
    result.bits_per_weight[component] = bits_per_weight(sizes, reference.weights[component])
