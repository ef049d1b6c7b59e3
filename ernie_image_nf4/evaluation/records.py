"""What an evaluation found, as records that become JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import torch

from ..repository.metadata import Recommended
from .metrics import MetricStatus


@dataclass(frozen=True)
class Score:
    """A metric of one candidate's pictures against the reference's.

    Attributes:
        mean: Over the prompts. PSNR: over the prompts whose pictures differ, None if all are equal. FID, KID: the
            distance itself.
        per_prompt: A value for each prompt, None for the infinite PSNR of equal pictures; empty for FID and KID.
    """

    mean: float | None
    per_prompt: list[float | None] = field(default_factory=list)


@dataclass(frozen=True)
class WeightError:
    """Relative error of the linear layers of a component: norm of the error over the norm of the original weights.

    Attributes:
        overall: Over all layers.
        by_kind: Name with ``*`` for the layer number -> over the layers of this name.
        modules: Name -> of this layer.
    """

    overall: float
    by_kind: dict[str, float]
    modules: dict[str, float]


@dataclass(frozen=True)
class PredictionError:
    """Relative error of the transformer's predictions over all probed prompts: norm of the error over the norm of the
    reference's.

    Attributes:
        overall: Over all timesteps.
        timesteps: As the transformer gets them, 1000 is pure noise.
        relative_errors: At each timestep.
    """

    overall: float
    timesteps: list[float]
    relative_errors: list[float]


@dataclass
class Result:
    """What was measured of the reference or of one candidate.

    Attributes:
        name: In tables.
        kind: ``"reference"``, ``"repository"`` or ``"baseline"`` (``"peer"`` in older files).
        source: The argument that named it.
        format: Number format of the weights, from the baseline or the repository's metadata.
        error: Why it couldn't be measured. All fields below are then empty.
        bytes: Component -> bytes of its tensors as stored, unquantized ones as bfloat16.
        bits_per_weight: Component -> bits a value of its linear layers' weights, scales included; layers kept
            unquantized count too.
        weight_error: Component -> error of its linear layers.
        prediction_error: Of the transformer, given the reference's text embeddings.
        scores: Metric -> figures of the pictures.
        identical_pictures: Number of pictures that equal the reference's in every byte.
        seconds_per_image: Wall time of drawing, without loading.
    """

    name: str
    kind: str
    source: str
    format: str = ""
    error: str | None = None
    bytes: dict[str, int] = field(default_factory=dict)
    bits_per_weight: dict[str, float] = field(default_factory=dict)
    weight_error: dict[str, WeightError] = field(default_factory=dict)
    prediction_error: PredictionError | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    identical_pictures: int | None = None
    seconds_per_image: float | None = None


@dataclass
class Evaluation:
    """One run. `results` starts with the reference and grows by one candidate at a time.

    Attributes:
        settings: Size, steps and guidance scale of all pictures.
        prompts: What was drawn.
        seeds: Of the initial latents, one for each prompt.
        metrics: Metric -> whether it was available.
        results: The reference and the candidates measured so far.
        device: Name of the device.
        dtype: Of the activations.
        versions: Library -> version.
        command: The command line, for the record.
        batch_size: Pictures drawn together.
        prompt_enhancer: Always False: it samples, so two pipelines would draw different prompts.
        pictures: Name of a result -> its pictures, uint8 (prompts, 3, height, width). Not part of the JSON.
    """

    settings: Recommended
    prompts: list[str]
    seeds: list[int]
    metrics: dict[str, MetricStatus]
    results: list[Result]
    device: str
    dtype: str
    versions: dict[str, str]
    command: str | None
    batch_size: int
    prompt_enhancer: bool = False
    pictures: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)


def relative_error(error: float, norm: float) -> float:
    """Norm of an error over the norm of the reference, both given squared; six significant digits, 0 over 0."""
    return float(f"{math.sqrt(error / norm):.6g}") if norm else 0.0


def evaluation_json(evaluation: Evaluation) -> str:
    """The text of ``evaluation.json``. Infinite and unknown values are null, so that it is valid JSON."""
    values = {name: value for name, value in vars(evaluation).items() if name != "pictures"}
    return json.dumps(values, default=vars, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
