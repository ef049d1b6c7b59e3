"""Compare quantized pipelines with an original one.

All pipelines draw the same prompts from the same initial latents (from a CPU generator); each encodes the prompts
itself. The prompt enhancer is left out: it samples, so two pipelines would draw different prompts.

One pipeline is on the device at a time. The reference's pictures and the weights of its linear layers stay in host
memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils.memory import clear_device_cache
from diffusers import ErnieImagePipeline
from tqdm import tqdm

from ..errors import InvalidSettings
from ..generation.prompt_file import Row
from ..generation.settings import check_settings
from ..loading.pipeline import load_opened
from ..memory.placement import find_device
from ..repository.metadata import Recommended
from ..repository.record import Repository, open_repository
from ..repository.resolve import find_repository
from .baselines import BASELINES, baseline_version, load_baseline
from .environment import device_name, library_versions
from .measure import Reference, Work, measure_candidate, measure_reference
from .metrics import MetricStatus, find_metrics
from .records import Evaluation, Result

logger = logging.getLogger(__name__)

DEFAULT_PROMPTS = (
    "A realistic orange kitten sits on a wooden desk with a white sheet of paper that says Hello ERNIE-Image NF4, "
    "soft natural lighting, centered composition.",
    "一只橙色的小猫坐在木桌上,前面放着一张写有 Hello Ernie-Image NF4 的白纸,"
    "纸张和文字在画面中布局居中,柔和自然光,写实风格。",
    "A red apple on a wooden desk.",
    "A fox in the snow on the left, a pine tree on the right.",
    "A sailboat under a starry night sky.",
    "沙滩上的一只螃蟹。",
    "A bicycle on a plain yellow background.",
    "绿色草地上,左边是一只兔子,右边是一朵向日葵。",
)


@dataclass(frozen=True)
class LoadOptions:
    """Arguments of `load` that all pipelines share."""

    device: torch.device
    dtype: str | torch.dtype | None
    memory: str


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
    """Compare candidates with a reference. Yields the same evaluation after the reference and after each candidate.

    Args:
        reference: Folder or Hub id, usually of the original.
        candidates: Folders, Hub ids, or names of `BASELINES`, made from the reference. ``./NAME`` is always a folder.
        prompts: What to draw, as from `read_prompts`; only prompt and seed may be set. None takes `DEFAULT_PROMPTS`.
        height: Pixels. None takes what the first repository with metadata recommends, as for the next three.
        width: Pixels.
        steps: Denoising steps.
        guidance: Guidance scale.
        seed: Of the first prompt's initial latents; the seeds of the others count up, unless a row has its own.
        batch_size: Pictures to draw together.
        device: As for `load`.
        dtype: As for `load`.
        memory: As for `load`. Baselines are always resident.
        download_metrics: Whether metrics may download their networks. Otherwise they use the local caches.
        command: The command line, for the record.
        progress: Whether to show a progress bar over the pictures.

    Raises:
        InvalidSettings: Settings or prompts that can't work.
        RepositoryNotFound: The reference or a candidate doesn't exist.
        InvalidRepository: The reference or a candidate is incomplete or unsound.
        DeviceUnavailable: The reference doesn't fit.
    """
    rows = [Row(prompt) for prompt in DEFAULT_PROMPTS] if prompts is None else list(prompts)
    _check(rows, candidates, batch_size)
    check_settings("-", height=height, width=width, steps=steps, guidance=guidance, seed=seed, count=len(rows))
    options = LoadOptions(find_device(device), dtype, memory)
    original = _open(reference)
    repositories = {name: _open(name) for name in map(str, candidates) if name not in BASELINES}
    settings = _choose_settings([original, *repositories.values()], height, width, steps, guidance)
    metrics, statuses = find_metrics(options.device, len(rows), download_metrics)
    with tqdm(total=len(rows) * (1 + len(candidates)), unit="picture", disable=not progress) as bar:
        work = Work([row.prompt for row in rows], settings, _seeds(rows, seed), batch_size, metrics, bar)
        evaluation, measured = _evaluate_reference(str(reference), original, options, work, statuses, command)
        yield evaluation
        for candidate in map(str, candidates):
            clear_device_cache(garbage_collection=True)  # Free the previous pipeline
            _evaluate_candidate(evaluation, candidate, repositories.get(candidate), original, measured, options, work)
            bar.update(len(rows) * len(evaluation.results) - bar.n)
            yield evaluation


def _check(rows: Sequence[Row], candidates: Sequence[object], batch_size: int) -> None:
    """Refuse what can't work before anything is loaded."""
    if not rows:
        raise InvalidSettings("There are no prompts: name a prompt file that has some.")
    if not candidates:
        names = ", ".join(BASELINES)
        raise InvalidSettings(f"There is nothing to compare: name a folder, a Hub id, or one of {names}.")
    if batch_size < 1:
        raise InvalidSettings(f"{batch_size} is too few for the batch size: use 1 or more.")
    if twice := {str(each) for each in candidates if list(map(str, candidates)).count(str(each)) > 1}:
        raise InvalidSettings(f"{min(twice)} was named twice: name each candidate once.")
    for number, row in enumerate(rows, 1):
        check_settings(row.prompt, seed=row.seed)
        for name in ("negative", "height", "width", "steps", "guidance"):
            if getattr(row, name) is not None:
                raise InvalidSettings(
                    f"Prompt {number} sets {name}: here all prompts have the same settings, only prompt and seed are "
                    "their own."
                )


def _open(model: str | os.PathLike[str]) -> Repository:
    return open_repository(find_repository(model, prompt_enhancer=False), prompt_enhancer=False)


def _choose_settings(
    repositories: Iterable[Repository], height: int | None, width: int | None, steps: int | None, guidance: float | None
) -> Recommended:
    """The settings asked for. Those left out are of the first repository with metadata; an original has none."""
    recommended = next((each.recommended for each in repositories if each.metadata), Recommended())
    return Recommended(
        height=recommended.height if height is None else height,
        width=recommended.width if width is None else width,
        num_inference_steps=recommended.num_inference_steps if steps is None else steps,
        guidance_scale=float(recommended.guidance_scale if guidance is None else guidance),
    )


def _seeds(rows: Sequence[Row], first: int) -> list[int]:
    """Each row's own seed, else one that counts up from the first."""
    return [first + number if row.seed is None else row.seed for number, row in enumerate(rows)]


def _evaluate_reference(
    source: str,
    repository: Repository,
    options: LoadOptions,
    work: Work,
    statuses: dict[str, MetricStatus],
    command: str | None,
) -> tuple[Evaluation, Reference]:
    """An evaluation of the reference alone, and what to compare with. Errors aren't caught: they end the evaluation."""
    pipe = _load(repository, options)
    result = Result(repository.name, "reference", source, _format(repository))
    reference = measure_reference(result, pipe, work)
    evaluation = Evaluation(
        settings=work.settings,
        prompts=work.prompts,
        seeds=work.seeds,
        metrics=statuses,
        results=[result],
        device=device_name(options.device),
        dtype=str(pipe.transformer.dtype).removeprefix("torch."),
        versions=library_versions(),
        command=command,
        batch_size=work.batch_size,
        pictures={result.name: reference.pictures},
    )
    return evaluation, reference


def _evaluate_candidate(
    evaluation: Evaluation,
    source: str,
    repository: Repository | None,
    original: Repository,
    reference: Reference,
    options: LoadOptions,
    work: Work,
) -> None:
    """Add a candidate to an evaluation, with its figures or with the error that kept it from being measured.

    Args:
        evaluation: The evaluation.
        source: The argument that named the candidate.
        repository: The candidate; None for a baseline.
        original: The reference.
        reference: What to compare with.
        options: How to load.
        work: What to draw.
    """
    result = Result(source, "repository" if repository else "baseline", source)
    try:
        if repository:
            result.format = _format(repository)
            pipe = _load(repository, options)
            result.name = repository.name
        else:
            baseline = BASELINES[source]
            result.format = f"{baseline.format} ({baseline.package} {baseline_version(source)})"
            pipe = load_baseline(source, original, device=options.device, dtype=options.dtype)
        if result.name in evaluation.pictures:
            result.name = f"{result.name} ({source})"
        evaluation.pictures[result.name] = measure_candidate(result, pipe, reference, work)
    except Exception as error:  # Whatever a library can't do stands in its row, and the other candidates are measured
        logger.debug("%s failed.", source, exc_info=True)
        result = Result(result.name, result.kind, source, result.format, f"{type(error).__name__}: {error}")
    evaluation.results.append(result)


def _load(repository: Repository, options: LoadOptions) -> ErnieImagePipeline:
    return load_opened(repository, device=options.device, dtype=options.dtype, memory=options.memory)


def _format(repository: Repository) -> str:
    """What the metadata of a repository says of its quantization."""
    metadata = repository.metadata
    if metadata is None:
        return "a repository without quantization metadata"
    scheme = metadata.quantization
    kept = [f"{name}.{module}" for name, record in metadata.components.items() for module in record.kept_modules]
    parts = [f"{scheme.quant_type.upper()} by {scheme.method}", f"blocks of {scheme.block_size}"]
    parts += ["double quantization"] * scheme.double_quantization + ["scales searched"] * scheme.scale_search
    parts += [f"unquantized: {', '.join(kept)}"] if kept else []
    return ", ".join(parts)
