"""How far quantized pipelines are from an original one: pictures, the transformer's predictions, weights, bytes.

Every pipeline draws the same prompts from the same initial latents, which come from a CPU generator, and encodes the prompts
itself. The prompt enhancer takes no part: it samples, so that two pipelines would draw different prompts.

One pipeline is on the device at a time. Of the reference, its pictures and the weights of its linear layers stay in host memory.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from diffusers import ErnieImagePipeline
from torch import nn
from tqdm import tqdm

from ..errors import DeviceUnavailable, InvalidSettings
from ..generation.prompt_file import Row
from ..generation.settings import check_settings, described_model
from ..loading.pipeline import load
from ..memory.placement import find_device
from ..repository.metadata import Recommended, installed_versions, read_metadata_if_ours
from ..repository.resolve import check_repository, find_repository
from .baselines import COMPONENTS, PEERS, linear_layers, load_peer, peer_version
from .metrics import SET_METRICS, Metric, MetricStatus, find_metrics

logger = logging.getLogger(__name__)

DEFAULT_PROMPTS = (
    "A realistic orange kitten sits on a wooden desk with a white sheet of paper that says Hello ERNIE-Image NF4, "
    "soft natural lighting, centered composition.",
    "一只橙色的小猫坐在木桌上,前面放着一张写有 Hello Ernie-Image NF4 的白纸,纸张和文字在画面中布局居中,柔和自然光,写实风格。",
    "A red apple on a wooden desk.",
    "A fox in the snow on the left, a pine tree on the right.",
    "A sailboat under a starry night sky.",
    "沙滩上的一只螃蟹。",
    "A bicycle on a plain yellow background.",
    "绿色草地上,左边是一只兔子,右边是一朵向日葵。",
)
PROBE_PROMPTS, PROBE_TIMESTEPS = 4, 10
IDENTITY_ROWS = 2048  # of the identity that goes through a layer at once
PLAIN_ITEMSIZE = (
    2  # bytes of a value that isn't quantized: bfloat16, as repositories store it, whatever it is computed in
)
EXTRA_PACKAGES = ("torchmetrics", "torchvision", "torch-fidelity", *(peer.package for peer in PEERS.values()))


@dataclass(frozen=True)
class Score:
    """A metric of one candidate's pictures against the reference's.

    Attributes:
        mean: Over the prompts; for PSNR over those whose pictures differ, None if none does. For FID and KID the distance itself.
        per_prompt: A value for each prompt, None for the infinite PSNR of equal pictures; empty for FID and KID.
    """

    mean: float | None
    per_prompt: list[float | None] = field(default_factory=list)


@dataclass(frozen=True)
class WeightError:
    """Norm of the error of a component's linear layers over the norm of their original weights: together, by kind, one by one."""

    overall: float
    by_kind: dict[str, float]
    modules: dict[str, float]


@dataclass(frozen=True)
class PredictionError:
    """Norm of the error of the transformer's prediction over the norm of the reference's, over the probed prompts.

    Attributes:
        overall: Over all timesteps.
        timesteps: As the transformer gets them, 1000 being pure noise.
        relative_errors: At each of them.
    """

    overall: float
    timesteps: list[float]
    relative_errors: list[float]


@dataclass
class Result:
    """What was measured of the reference or of one candidate.

    Attributes:
        name: What it is called in tables.
        kind: ``"reference"``, ``"repository"`` or ``"peer"``.
        source: The argument that named it.
        format: What a peer does, or what a repository's metadata says.
        error: Why it couldn't be measured; what follows is then empty.
        bytes: Component -> bytes of its tensors as they are stored, unquantized ones as bfloat16.
        bits_per_weight: Component -> bits of its linear layers' weights and scales a value; layers kept unquantized count too.
        weight_error: Component -> error of its linear layers.
        prediction_error: Of the transformer, with the reference's embeddings.
        scores: Metric -> figures of the pictures.
        identical_pictures: How many pictures equal the reference's in every byte.
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
    """Everything of one run; `results` holds the reference first and grows by one candidate after the other.

    Attributes:
        settings: Size, steps and guidance scale of all pictures.
        prompts: What was drawn.
        seeds: Of the initial latents of each.
        metrics: Metric -> whether it could be had.
        results: The reference and the candidates so far.
        device: Where it was measured.
        dtype: dtype of activations.
        versions: Of the libraries.
        command: What was run.
        batch_size: Pictures drawn together.
        prompt_enhancer: Never used, see this module's docstring.
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


@dataclass(frozen=True)
class Probe:
    """Where the transformer's prediction is compared: latents between noise and the reference's own results.

    Attributes:
        latents: (prompts, timesteps, channels, height / 16, width / 16), float32 on the CPU.
        timesteps: (timesteps,).
        texts: The reference's embedding of each prompt, (tokens, text_in_dim).
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    texts: list[torch.Tensor]


@dataclass(frozen=True)
class Work:
    """What every pipeline is put to."""

    prompts: list[str]
    settings: Recommended
    seeds: list[int]
    batch_size: int
    metrics: dict[str, Metric]


@dataclass(frozen=True)
class Reference:
    """What candidates are compared with, in host memory."""

    pictures: torch.Tensor
    probe: Probe
    predictions: torch.Tensor
    weights: dict[str, dict[str, torch.Tensor]]  # component -> linear layer -> its weight
    shapes: dict[str, dict[str, torch.Size]]  # component -> name in the state dict -> shape


def evaluate(
    reference: str | os.PathLike[str],
    candidates: Sequence[str | os.PathLike[str]],
    *,
    prompts: Sequence[Row] | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch_size: int = 1,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    memory: str = "auto",
    download_metrics: bool = False,
    command: str | None = None,
    progress: bool = False,
) -> Iterator[Evaluation]:
    """Compare candidates with a reference; yields the same evaluation again after the reference and after each candidate.

    Args:
        reference: Folder or Hub id, usually of the original.
        candidates: Folders, Hub ids, or names of `PEERS`, which are then made from the reference. A folder that is called like a
            peer is named as ``./NAME``.
        prompts: What to draw, as from `read_prompts`; only prompt and seed may be set. None takes `DEFAULT_PROMPTS`.
        height: Pixels; None for what the reference recommends, or the first candidate that does, as for the next three.
        width: Pixels.
        steps: Denoising steps.
        guidance: Guidance scale.
        seed: Of the first prompt's initial latents; the others count up from there, where a row has no seed of its own.
        batch_size: Pictures to draw together.
        device: As for `load`.
        dtype: As for `load`.
        memory: As for `load`. Peers are always resident.
        download_metrics: Whether metrics may download their networks. Otherwise they use what is in the local caches.
        command: What was run, for the record.
        progress: Whether to show a progress bar over the pictures.

    Raises:
        InvalidSettings: Settings or prompts that can't work.
        RepositoryNotFound: The reference or a candidate isn't there.
        InvalidRepository: The reference or a candidate isn't sound.
        DeviceUnavailable: The reference doesn't fit.
    """
    rows = [Row(prompt) for prompt in DEFAULT_PROMPTS] if prompts is None else list(prompts)
    _check(rows, candidates, batch_size)
    check_settings("-", height=height, width=width, steps=steps, guidance=guidance, seed=seed, count=len(rows))
    where = {"device": find_device(device), "dtype": dtype}
    folders = {str(model): _find(model) for model in (reference, *candidates) if str(model) not in PEERS}
    folder = folders[str(reference)]
    metrics, statuses = find_metrics(where["device"], len(rows), download_metrics)

    wanted = _recommended(list(folders.values()))
    settings = Recommended(
        wanted.height if height is None else height,
        wanted.width if width is None else width,
        wanted.num_inference_steps if steps is None else steps,
        float(wanted.guidance_scale if guidance is None else guidance),
    )
    seeds = [seed + number if row.seed is None else row.seed for number, row in enumerate(rows)]
    work = Work([row.prompt for row in rows], settings, seeds, batch_size, metrics)

    with tqdm(total=len(rows) * (1 + len(candidates)), unit="picture", disable=not progress) as bar:
        with _quietly():
            pipe = load(folder, memory=memory, fast=False, prompt_enhancer=False, **where)
        result = Result(described_model(pipe)[1], "reference", str(reference), _format(folder))
        original = _measure_reference(result, pipe, work, bar)
        evaluation = Evaluation(
            settings=settings,
            prompts=work.prompts,
            seeds=seeds,
            metrics=statuses,
            results=[result],
            device=_device_name(where["device"]),
            dtype=str(pipe.transformer.dtype).removeprefix("torch."),
            versions=installed_versions() | _extra_versions() | {"python": platform.python_version()},
            command=command,
            batch_size=batch_size,
            pictures={result.name: original.pictures},
        )
        del pipe
        yield evaluation
        for candidate in map(str, candidates):
            clear_device_cache(garbage_collection=True)  # of the pipeline before
            kind = "peer" if candidate in PEERS else "repository"
            result = Result(candidate, kind, candidate)
            try:
                pipe = _load_candidate(result, folders.get(candidate), folder, memory, where)
                if result.name in evaluation.pictures:
                    result.name = f"{result.name} ({candidate})"
                evaluation.pictures[result.name] = _measure_candidate(result, pipe, original, work, bar)
            except Exception as error:  # whatever a library can't do is said in its row, and the others go on
                logger.debug("%s failed.", candidate, exc_info=True)
                result = Result(result.name, kind, candidate, result.format, f"{type(error).__name__}: {error}")
            pipe = None
            evaluation.results.append(result)
            bar.update(len(rows) * len(evaluation.results) - bar.n)
            yield evaluation


def _load_candidate(
    result: Result, folder: Path | None, original: Path, memory: str, where: dict[str, Any]
) -> ErnieImagePipeline:
    """The pipeline of a candidate; its name and format go into the result."""
    with _quietly():
        if folder is None:
            peer = PEERS[result.source]
            result.format = f"{peer.format} ({peer.package} {peer_version(result.source)})"
            return load_peer(result.source, original, **where)
        result.format = _format(folder)
        pipe = load(folder, memory=memory, fast=False, prompt_enhancer=False, **where)
        result.name = described_model(pipe)[1]
        return pipe


# Pictures


def draw_latents(pipe: ErnieImagePipeline, seeds: Sequence[int], settings: Recommended) -> torch.Tensor:
    """Initial latents, (seeds, channels, height / 16, width / 16): float32 on the CPU, each from a generator of its own."""
    factor = pipe.vae_scale_factor
    shape = (1, pipe.transformer.config.in_channels, settings.height // factor, settings.width // factor)
    return torch.cat([torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])


def draw_pictures(
    pipe: ErnieImagePipeline,
    prompts: Sequence[str],
    settings: Recommended,
    latents: torch.Tensor,
    *,
    batch_size: int = 1,
    on_drawn: Callable[[int], Any] | None = None,
) -> torch.Tensor:
    """Draw prompts as they are, without the prompt enhancer.

    Args:
        pipe: The pipeline, as from `load`.
        prompts: What to draw.
        settings: Size, steps and guidance scale.
        latents: Initial latents, one for each prompt, as from `draw_latents`.
        batch_size: Pictures to draw together. Another one changes how products are rounded.
        on_drawn: Called with the number of pictures of each batch when it is done.

    Returns:
        uint8 of shape (prompts, 3, height, width), on the CPU.

    Raises:
        DeviceUnavailable: The device's memory ran out.
    """
    batches = []
    for start in range(0, len(prompts), batch_size):
        # diffusers 0.38 returns arrays where tensors are asked for
        drawn = _call(pipe, prompts[start : start + batch_size], settings, latents[start : start + batch_size], "np")
        batches.append((torch.from_numpy(drawn).permute(0, 3, 1, 2) * 255).round().to(torch.uint8))
        if on_drawn is not None:
            on_drawn(len(drawn))
    return torch.cat(batches)


def _call(
    pipe: ErnieImagePipeline, prompts: Sequence[str], settings: Recommended, latents: torch.Tensor, output_type: str
) -> Any:
    pipe.set_progress_bar_config(disable=True)
    try:
        result = pipe(
            prompt=list(prompts),
            height=settings.height,
            width=settings.width,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            latents=latents.to(pipe._execution_device, pipe.transformer.dtype),
            use_pe=False,
            output_type=output_type,
        )
    except torch.OutOfMemoryError as error:
        raise DeviceUnavailable(
            f"The memory of {pipe._execution_device} ran out with {len(prompts)} pictures of {settings.width}x{settings.height} "
            "at once: use a smaller batch size (--batch), a smaller size, or memory='offload' (--memory offload)."
        ) from error
    return getattr(result, "images", result)  # diffusers 0.38 returns latents themselves


def _timed_pictures(result: Result, pipe: ErnieImagePipeline, work: Work, bar: tqdm) -> torch.Tensor:
    bar.set_description(result.name)
    latents = draw_latents(pipe, work.seeds, work.settings)
    started = time.perf_counter()
    pictures = draw_pictures(
        pipe, work.prompts, work.settings, latents, batch_size=work.batch_size, on_drawn=bar.update
    )
    result.seconds_per_image = round((time.perf_counter() - started) / len(pictures), 4)
    return pictures


def _score(name: str, work: Work, reference: torch.Tensor, pictures: torch.Tensor) -> Score:
    values = [
        round(value, 5) if math.isfinite(value) else None
        for value in work.metrics[name](reference, pictures, work.prompts)
    ]
    known = [value for value in values if value is not None]
    mean = round(sum(known) / len(known), 5) if known else None
    return Score(mean, [] if name in SET_METRICS else values)


# Predictions


def make_probe(
    pipe: ErnieImagePipeline, prompts: Sequence[str], settings: Recommended, latents: torch.Tensor, batch_size: int = 1
) -> Probe:
    """Latents on the straight lines from noise to what the pipeline makes of it, at the sigmas of a run with few steps.

    Flow matching trains the transformer on such lines, so it sees what it knows; and they don't depend on the candidate.

    Args:
        pipe: The reference.
        prompts: A few prompts.
        settings: As for drawing.
        latents: Initial latents of each.
        batch_size: Pictures to draw together.
    """
    starts = range(0, len(prompts), batch_size)
    batches = [slice(start, start + batch_size) for start in starts]
    results = torch.cat(
        [_call(pipe, prompts[part], settings, latents[part], "latent").float().cpu() for part in batches]
    )
    pipe.scheduler.set_timesteps(sigmas=torch.linspace(1, 0, PROBE_TIMESTEPS + 1)[:-1].tolist())
    sigmas = pipe.scheduler.sigmas[:PROBE_TIMESTEPS].cpu().view(1, -1, 1, 1, 1)
    points = sigmas * latents[:, None] + (1 - sigmas) * results[:, None]
    return Probe(points, pipe.scheduler.timesteps.cpu().float(), _encode(pipe, prompts))


@torch.no_grad()
def predict(pipe: ErnieImagePipeline, probe: Probe, batch_size: int = 1) -> torch.Tensor:
    """The transformer's prediction at every point of a probe, of the shape of its latents, float32 on the CPU."""
    device, dtype = pipe._execution_device, pipe.transformer.dtype
    predictions = []
    for points, text in zip(probe.latents, probe.texts, strict=True):
        for start in range(0, len(points), batch_size):
            part = points[start : start + batch_size].to(device, dtype)
            text_bth, text_lens = pipe._pad_text(
                [text] * len(part), device, dtype, text_in_dim=pipe.transformer.config.text_in_dim
            )
            predictions.append(
                pipe.transformer(
                    hidden_states=part,
                    timestep=probe.timesteps[start : start + len(part)].to(device, dtype),
                    text_bth=text_bth,
                    text_lens=text_lens,
                    return_dict=False,
                )[0]
                .float()
                .cpu()
            )
    return torch.cat(predictions).reshape(probe.latents.shape)


def prediction_error(reference: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor) -> PredictionError:
    """Relative error of predictions of shape (prompts, timesteps, ...)."""
    squares = [(tensor.double() ** 2).flatten(2).sum((0, 2)) for tensor in (prediction - reference, reference)]
    return PredictionError(
        overall=_root(squares[0].sum().item(), squares[1].sum().item()),
        timesteps=[round(value, 3) for value in timesteps.tolist()],
        relative_errors=[_root(error, norm) for error, norm in zip(*(part.tolist() for part in squares), strict=True)],
    )


def _encode(pipe: ErnieImagePipeline, prompts: Sequence[str]) -> list[torch.Tensor]:
    return [text.cpu() for text in pipe.encode_prompt(list(prompts), pipe._execution_device)]


# Weights


@torch.no_grad()
def effective_weight(layer: nn.Module, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """The matrix that a linear layer multiplies with, (out_features, columns), whatever library quantized it and how.

    The identity is sent through the layer without its bias, so that this is what its own kernels make of the stored values.

    Args:
        layer: A linear layer, on the device where it can run.
        columns: Its in_features.
        dtype: Of its activations.
    """
    weight = layer.weight
    if type(layer) is nn.Linear and type(weight) is nn.Parameter:
        return weight.detach()
    identity = torch.eye(columns, dtype=dtype, device=weight.device)
    bias, layer.bias = layer.bias, None
    try:
        return torch.cat([layer(part).clone() for part in identity.split(IDENTITY_ROWS)]).T
    finally:
        layer.bias = bias


def weight_error(reference: dict[str, torch.Tensor], model: nn.Module) -> WeightError:
    """How far a model's linear layers are from the reference's weights, by name."""
    squares: dict[str, tuple[float, float]] = {}
    for name, weight in reference.items():
        candidate = effective_weight(model.get_submodule(name), weight.shape[1], model.dtype).float()
        original = weight.to(candidate.device).float()
        squares[name] = ((candidate - original).square().sum().item(), original.square().sum().item())
    kinds: dict[str, list[tuple[float, float]]] = {}
    for name, pair in squares.items():
        kinds.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), []).append(pair)
    return WeightError(
        overall=_root(*map(sum, zip(*squares.values(), strict=True))),
        by_kind={kind: _root(*map(sum, zip(*pairs, strict=True))) for kind, pairs in kinds.items()},
        modules={name: _root(*pair) for name, pair in squares.items()},
    )


def stored_bytes(model: nn.Module, shapes: dict[str, torch.Size]) -> dict[str, int]:
    """Bytes of each tensor of a model's state dict as it is stored, scales and settings of quantized ones included.

    Args:
        model: The model.
        shapes: The original's state dict. Tensors that still are what they were there count as bfloat16.
    """
    sizes = {}
    for name, tensor in model.state_dict().items():
        plain = (
            shapes.get(name) == tensor.shape
            and tensor.is_floating_point()
            and not hasattr(tensor, "__tensor_flatten__")
        )
        sizes[name] = tensor.numel() * PLAIN_ITEMSIZE if plain else _bytes(tensor)
    return sizes


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; of one made of others (torchao, quanto), of those."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(_bytes(getattr(tensor, name)) for name in names)


def _count_bytes(result: Result, component: str, model: nn.Module, original: Reference) -> None:
    sizes = stored_bytes(model, original.shapes[component])
    layers = original.weights[component]
    linear = sum(
        size
        for name, size in sizes.items()
        if not name.endswith(".bias") and any(part in layers for part in _parents(name))
    )
    result.bytes[component] = sum(sizes.values())
    result.bits_per_weight[component] = round(8 * linear / sum(weight.numel() for weight in layers.values()), 4)


def _parents(name: str) -> list[str]:
    """``a.b.c`` -> ``a.b``, ``a``: the layer that a tensor belongs to is among them."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1)]


def _measure_reference(result: Result, pipe: ErnieImagePipeline, work: Work, bar: tqdm) -> Reference:
    pictures = _timed_pictures(result, pipe, work, bar)
    if "clip_score" in work.metrics:  # the one that says something of a picture by itself
        result.scores["clip_score"] = _score("clip_score", work, pictures, pictures)
    probed = slice(PROBE_PROMPTS)
    latents = draw_latents(pipe, work.seeds[probed], work.settings)
    probe = make_probe(pipe, work.prompts[probed], work.settings, latents, work.batch_size)
    weights, shapes = {}, {}
    for component, model in _warm(pipe, probe):
        layers = linear_layers(model)
        weights[component] = {
            name: effective_weight(layer, layer.in_features, model.dtype).cpu() for name, layer in layers.items()
        }
        shapes[component] = {name: tensor.shape for name, tensor in model.state_dict().items()}
    reference = Reference(pictures, probe, predict(pipe, probe, work.batch_size), weights, shapes)
    for component in weights:
        _count_bytes(result, component, getattr(pipe, component), reference)
    return reference


def _measure_candidate(
    result: Result, pipe: ErnieImagePipeline, reference: Reference, work: Work, bar: tqdm
) -> torch.Tensor:
    """Fills in the result and returns the pictures."""
    pictures = _timed_pictures(result, pipe, work, bar)
    for component, model in _warm(pipe, reference.probe):
        result.weight_error[component] = weight_error(reference.weights[component], model)
        _count_bytes(result, component, model, reference)
    predictions = predict(pipe, reference.probe, work.batch_size)
    result.prediction_error = prediction_error(reference.predictions, predictions, reference.probe.timesteps)
    result.identical_pictures = sum(map(torch.equal, reference.pictures, pictures))
    for name in work.metrics:
        result.scores[name] = _score(name, work, reference.pictures, pictures)
    return pictures


def _warm(pipe: ErnieImagePipeline, probe: Probe) -> Iterator[tuple[str, nn.Module]]:
    """Each component that peers quantize, brought to the device first: with offloading it is used once, and then stays a while."""
    uses = {
        "text_encoder": lambda: _encode(pipe, ["-"]),
        "transformer": lambda: predict(pipe, Probe(probe.latents[:1, :1], probe.timesteps[:1], probe.texts[:1])),
    }
    for component in COMPONENTS:
        uses[component.name]()
        yield component.name, getattr(pipe, component.name)


def _root(error: float, norm: float) -> float:
    """Norm of an error over another norm, from their squares."""
    return float(f"{math.sqrt(error / norm):.6g}") if norm else 0.0


# Before and after


def _check(rows: Sequence[Row], candidates: Sequence[object], batch_size: int) -> None:
    if not rows:
        raise InvalidSettings("There are no prompts: name a prompt file that has some.")
    if not candidates:
        raise InvalidSettings(f"There is nothing to compare: name a folder, a Hub id, or one of {', '.join(PEERS)}.")
    if batch_size < 1:
        raise InvalidSettings(f"{batch_size} is too few for the batch size: use 1 or more.")
    if twice := {str(each) for each in candidates if list(map(str, candidates)).count(str(each)) > 1}:
        raise InvalidSettings(f"{min(twice)} was named twice: name each candidate once.")
    for number, row in enumerate(rows, 1):
        check_settings(row.prompt, seed=row.seed)
        for name in ("negative", "height", "width", "steps", "guidance"):
            if getattr(row, name) is not None:
                raise InvalidSettings(
                    f"Prompt {number} sets {name}: here all prompts have the same settings, only prompt and seed are their own."
                )


def _find(model: str | os.PathLike[str]) -> Path:
    folder = find_repository(model, prompt_enhancer=False)
    check_repository(folder, prompt_enhancer=False)
    return folder


def _format(folder: Path) -> str:
    """What the metadata of a repository says of its quantization."""
    metadata = read_metadata_if_ours(folder)
    if metadata is None:
        return "a repository without quantization metadata"
    scheme = metadata.quantization
    kept = [f"{name}.{module}" for name, record in metadata.components.items() for module in record.kept_modules]
    parts = [f"{scheme.quant_type.upper()} by {scheme.method}", f"blocks of {scheme.block_size}"]
    parts += ["double quantization"] * scheme.double_quantization + ["scales searched"] * scheme.scale_search
    parts += [f"unquantized: {', '.join(kept)}"] if kept else []
    return ", ".join(parts)


def _recommended(folders: Sequence[Path]) -> Recommended:
    """The settings that the first of some repositories with metadata recommends: an original has none, its NF4 one does."""
    for folder in folders:
        if metadata := read_metadata_if_ours(folder):
            return metadata.recommended
    return Recommended()


@contextmanager
def _quietly() -> Iterator[None]:
    """Loading an original on purpose needs no warning that it isn't quantized, nor a line on memory for each candidate."""
    loggers = [logging.getLogger(f"ernie_image_nf4.{name}") for name in ("loading.pipeline", "memory.placement")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def _device_name(device: torch.device) -> str:
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).get_device_name(device)
    return f"{device.type}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _extra_versions() -> dict[str, str]:
    versions = {}
    for package in EXTRA_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def to_json(evaluation: Evaluation) -> str:
    """The text of ``evaluation.json``, valid JSON: what is infinite or unknown is null."""
    values = {name: value for name, value in vars(evaluation).items() if name != "pictures"}
    return json.dumps(values, default=vars, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
