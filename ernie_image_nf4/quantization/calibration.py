"""Calibration: the transformer's layers rounded for the error of the prediction instead of that of their weights.

A few prompts are drawn with the original (`calibration_data`). They give each linear layer's inputs in the original, x,
and how much the prediction depends on each token of its output, the sensitivity g. The layer's inputs y in the
quantized model are found block by block, each block after the blocks before it are quantized (`block_rounding`). An
error of the weight W costs the squares of (W x - Q y) g, for which `gptq` rounds it.

The text encoder isn't calibrated: its share of the error of pictures is small.

The original is never on the device as a whole (`streamed_original`). Whatever took long is kept at once, so that a run
that was killed goes on from there: embeddings of the texts, each step of the pictures, sensitivities, each block. All
of it is the same in every run on a machine, and so is what a run that goes on makes of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils.memory import clear_device_cache
from tqdm import tqdm

from ..loading.text_encoder import count_tokens, encode_texts
from ..memory.placement import find_dtype
from ..repository.components import PIXELS_PER_PATCH
from ..repository.metadata import Recommended
from ..repository.nf4_format import stored_specs
from ..repository.record import Repository, StoredComponent
from ..repository.safetensors_io import DTYPES, StoredTensor, find_tensors
from .block_rounding import AFTER, BEFORE, ROUNDING, block_name, round_layers
from .calibration_data import (
    BACKWARD,
    Drawing,
    Sample,
    draw_step,
    find_sensitivities,
    first_latents,
    layer_names,
    picture_size,
    plan_drawings,
    schedule,
)
from .calibration_needs import Shapes, chunk_samples, disk_needs, find_segment, find_shapes, tokens_on_host
from .layer_selection import WeightPlan
from .resumable_output import Checkpoints
from .streamed_original import HostMemory, StreamedOriginal

logger = logging.getLogger(__name__)

TEXTS = "texts"
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


@dataclass(frozen=True)
class Calibration:
    """A calibration, decided before a weight is read.

    Attributes:
        source: The original repository.
        plan: What becomes of the transformer.
        prompts: What to draw.
        settings: Size (at most 512 pixels a side are drawn), steps and guidance scale that the model is for.
        device: Where to compute.
        dtype: Of the computation.
        drawings: Which steps of each prompt's picture are taken.
        shapes: What the needs depend on.
        segment: Blocks of which gradients are found at once.
    """

    source: Repository
    plan: WeightPlan
    prompts: Sequence[str]
    settings: Recommended
    device: torch.device
    dtype: torch.dtype
    drawings: list[Drawing]
    shapes: Shapes
    segment: int

    @property
    def transformer(self) -> StoredComponent:
        return self.source.components["transformer"]

    @property
    def guided(self) -> bool:
        return self.settings.guidance_scale > 1

    @property
    def disk_bytes(self) -> int:
        """Of the checkpoints."""
        specs = [self.plan.tensors[name].spec for name in self.plan.quantized]
        parts = [stored_specs(spec.shape, DTYPES[spec.dtype]) for spec in specs]
        quantized = sum(each.bytes for part in parts for each in part.values())
        height, width = picture_size(self.settings)
        latents = self.transformer.config["in_channels"] * height * width // PIXELS_PER_PATCH**2 * self.dtype.itemsize
        steps = max(len(drawing.steps) for drawing in self.drawings)
        return disk_needs(self.shapes, quantized, steps * len(self.prompts) * latents)


def plan_calibration(
    source: Repository,
    plan: WeightPlan,
    prompts: Sequence[str],
    settings: Recommended,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Calibration:
    """Decide how to calibrate, and whether the machine has the memory for it.

    Args:
        source: The original repository.
        plan: What becomes of its transformer.
        prompts: What to draw.
        settings: Size, steps and guidance scale that the model is for.
        device: Where to compute.
        dtype: Of the computation; None for what suits the device.

    Raises:
        DeviceUnavailable: It hasn't.
    """
    dtype = find_dtype(dtype, device, scaled=False)
    guided = settings.guidance_scale > 1
    drawings = plan_drawings(len(prompts), settings.num_inference_steps, guided)
    counts, empty = count_tokens(source, prompts), count_tokens(source, [""])
    texts = [
        tokens
        for count, drawing in zip(counts, drawings, strict=True)
        for _ in drawing.recorded
        for tokens in (*(empty if guided else ()), count)
    ]
    height, width = picture_size(settings)
    rows = len(prompts) * (2 if guided else 1)
    shapes = find_shapes(source, dtype, height * width // PIXELS_PER_PATCH**2, texts, rows)
    segment = find_segment(shapes, device)
    return Calibration(source, plan, prompts, settings, device, dtype, drawings, shapes, segment)


def calibrate_transformer(
    calibration: Calibration, kept: Checkpoints, *, progress: bool = True
) -> dict[str, StoredTensor]:
    """NF4 of the transformer's linear layers, rounded for what a few prompts need.

    Args:
        calibration: As of `plan_calibration`.
        kept: Where what is found is kept, and what an earlier run of the same calibration found.
        progress: Whether to show a progress bar.

    Returns:
        Name of a tensor -> where it is, those that the NF4 of each layer is stored as. The scale search alone chooses
        the codes of layers whose rows aren't whole blocks, or on which no picture depends.

    Raises:
        torch.OutOfMemoryError: The device is too small all the same.
        DiskFull: The disk is.
    """
    blocks = calibration.shapes.blocks
    files = [BEFORE, *map(block_name, range(blocks)), AFTER]
    if not all(map(kept.is_kept, files)):
        with _bar(calibration, progress) as bar:
            texts = find_texts(calibration, kept, bar)
            original, memory = open_original(calibration)
            samples = find_samples(calibration, original, texts, kept, memory, bar)
            _enter(bar, "rounding")
            round_layers(original, calibration.plan, samples, kept, memory, bar.update)
        del original, memory, samples
        clear_device_cache(garbage_collection=True)
    return find_tensors(map(kept.file, files))


def open_original(calibration: Calibration) -> tuple[StreamedOriginal, HostMemory]:
    """The original's transformer without its blocks on the device, and host memory for its tokens."""
    part, device = calibration.transformer, calibration.device
    original = StreamedOriginal(part, calibration.plan.tensors, device, calibration.dtype)
    return original, HostMemory(tokens_on_host(calibration.shapes, calibration.segment), device)


def find_samples(
    calibration: Calibration,
    original: StreamedOriginal,
    texts: Sequence[Sequence[torch.Tensor]],
    kept: Checkpoints,
    memory: HostMemory,
    bar: tqdm,
) -> list[Sample]:
    """Draw all prompts, and find the sensitivities of the predictions that were asked for."""
    samples = draw(calibration, original, texts, kept, memory, bar)
    _add_sensitivities(calibration, original, samples, kept, memory, bar)
    return samples


def _enter(bar: tqdm, phase: str) -> None:
    """Say which phase begins, and give the device's memory back: what one phase took in pieces, the next can't use."""
    clear_device_cache(garbage_collection=True)
    logger.debug("phase %s", phase)  # benchmarks/calibrate.py listens
    bar.set_postfix_str(phase)


@contextmanager
def _bar(calibration: Calibration, progress: bool) -> Iterator[tqdm]:
    """A progress bar over the time of all phases, in passes of a sample through a block."""
    shapes, guided = calibration.shapes, 2 if calibration.guided else 1
    drawn = sum(guided * (len(drawing.steps) - 1) for drawing in calibration.drawings)
    total = shapes.blocks * (drawn + (1 + BACKWARD + ROUNDING) * len(shapes.tokens))
    with tqdm(total=total, desc="calibrate", bar_format=BAR, disable=not progress) as bar:
        yield bar


def _keep_or_find(
    kept: Checkpoints, name: str, make: Callable[[], dict[str, torch.Tensor]]
) -> tuple[dict[str, torch.Tensor], bool]:
    """The tensors of a checkpoint, made if there is none, and whether there was one."""
    found = kept.find(name)
    if found is not None:
        return found, True
    made = make()
    kept.keep(name, made)
    return made, False


def find_texts(calibration: Calibration, kept: Checkpoints, bar: tqdm) -> list[list[torch.Tensor]]:
    """For each prompt the texts of a step: the prompt's embedding, after that of the empty one with guidance."""
    _enter(bar, "texts")
    wanted = ["", *calibration.prompts] if calibration.guided else list(calibration.prompts)

    def encode() -> dict[str, torch.Tensor]:
        found = encode_texts(calibration.source, wanted, calibration.device, calibration.dtype)
        return {str(number): text for number, text in enumerate(found)}

    found, _ = _keep_or_find(kept, TEXTS, encode)
    texts = [found[str(number)] for number in range(len(wanted))]
    return [[texts[0], text] for text in texts[1:]] if calibration.guided else [[text] for text in texts]


def draw(
    calibration: Calibration,
    original: StreamedOriginal,
    texts: Sequence[Sequence[torch.Tensor]],
    kept: Checkpoints,
    memory: HostMemory,
    bar: tqdm,
    *,
    first_seed: int = 0,
) -> list[Sample]:
    """Draw all prompts, step by step. The samples are those of the first prompt, of the second, and so on.

    `first_seed` is that of the first prompt's noise; those of the others follow.
    """
    _enter(bar, "drawing")
    settings, drawings = calibration.settings, calibration.drawings
    config = calibration.source.components["scheduler"].config
    timesteps, sigmas = schedule(config, settings.num_inference_steps)
    rounded = torch.tensor(timesteps, dtype=calibration.dtype).tolist()  # as the transformer gets them
    channels, count = original.model.config.in_channels, len(drawings)
    seeds = range(first_seed, first_seed + count)
    latents = [first_latents(channels, settings, seed, calibration.dtype) for seed in seeds]
    weights = (1 - settings.guidance_scale, settings.guidance_scale) if calibration.guided else (1.0,)
    samples: list[list[Sample]] = [[] for _ in drawings]
    for place in range(max(len(drawing.steps) for drawing in drawings)):
        steps = [drawing.steps[min(place, len(drawing.steps) - 1)] for drawing in drawings]
        for number, drawing in enumerate(drawings):
            if place < len(drawing.steps) and steps[number] in drawing.recorded:
                for text, weight in zip(texts[number], weights, strict=True):
                    samples[number].append(Sample(latents[number], rounded[steps[number]], text, weight, {}))
        # The prediction of the last recorded step isn't needed.
        moves = [
            (sigmas[drawing.steps[place]], sigmas[drawing.steps[place + 1]]) if place + 1 < len(drawing.steps) else None
            for drawing in drawings
        ]
        if any(moves):
            given = [rounded[step] for step in steps]
            latents = _draw_step(calibration, original, place, latents, texts, moves, given, kept, memory, bar)
    return [sample for of_prompt in samples for sample in of_prompt]


def _draw_step(
    calibration: Calibration,
    original: StreamedOriginal,
    place: int,
    latents: list[torch.Tensor],
    texts: Sequence[Sequence[torch.Tensor]],
    moves: Sequence[tuple[float, float] | None],
    timesteps: Sequence[float],
    kept: Checkpoints,
    memory: HostMemory,
    bar: tqdm,
) -> list[torch.Tensor]:
    """The latents after the step of this place, kept or found."""

    def draw() -> dict[str, torch.Tensor]:
        guidance = calibration.settings.guidance_scale
        return {
            "latents": torch.cat(draw_step(original, latents, texts, moves, timesteps, guidance, memory, bar.update))
        }

    found, before = _keep_or_find(kept, f"drawing-{place:02d}", draw)
    if before:
        rows = sum(len(of_picture) for of_picture, move in zip(texts, moves, strict=True) if move)
        bar.update(rows * calibration.shapes.blocks)
    return list(found["latents"].split(1))


def _add_sensitivities(
    calibration: Calibration,
    original: StreamedOriginal,
    samples: Sequence[Sample],
    kept: Checkpoints,
    memory: HostMemory,
    bar: tqdm,
) -> None:
    """Find the sensitivities of all samples, as many at once as their tokens have room for."""
    _enter(bar, "sensitivities")
    segment, blocks = calibration.segment, calibration.shapes.blocks
    chunk = chunk_samples(calibration.shapes, segment)
    for start in range(0, len(samples), chunk):
        seeds = range(start, min(start + chunk, len(samples)))
        some = [samples[seed] for seed in seeds]

        def find(some: Sequence[Sample] = some, seeds: range = seeds) -> dict[str, torch.Tensor]:
            rows = find_sensitivities(original, some, seeds, segment, memory, bar.update)
            return {str(seed): each for seed, each in zip(seeds, rows, strict=True)}

        found, before = _keep_or_find(kept, f"sensitivity-{start:03d}-{len(some):03d}", find)
        if before:
            bar.update((1 + BACKWARD) * len(some) * blocks)
        for seed, sample in zip(seeds, some, strict=True):
            sample.sensitivity = dict(zip(layer_names(blocks), found[str(seed)], strict=True))
