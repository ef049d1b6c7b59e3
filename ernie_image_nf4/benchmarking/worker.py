"""One arm in its own process: load, draw several pictures, predict, draw at a large size."""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import ErnieImagePipeline

from ..errors import InvalidSettings
from ..evaluation.baselines import load_baseline
from ..generation.enhancement import enhance_all
from ..generation.settings import Settings
from ..loading.from_pretrained import DTYPE_ARGUMENT
from ..loading.pipeline import load
from ..repository.components import COMPONENTS, PIPELINE_CLASS, QUANTIZED
from ..repository.record import open_repository
from .arms import PROMPT, Arm, Workload
from .device import best_seconds, peak_memory, reserved_memory, reset_peak_memory, synchronize
from .predictions import is_compared, save_predictions


def measure_arm(
    arm: Arm,
    model: str | Path,
    original: str | Path | None,
    work: Path,
    workload: Workload,
    device: str,
    pictures: int | None = None,
) -> dict[str, Any]:
    """All figures of one arm. To be called in a process of its own.

    Args:
        arm: The arm.
        model: Folder of the NF4 repository.
        original: Folder of the original one, for the arms that need it.
        work: Folder for the caches of compiled kernels, and for the predictions.
        workload: What to do, but where the arm has work of its own.
        device: To run on.
        pictures: 0 for loading alone; None for what arm and workload say.

    Raises:
        InvalidSettings: The arm needs the original repository.
    """
    _use_kernel_caches(work, empty=arm.cold)
    _import_classes()
    folder = _folder(arm, model, original)
    fill_page_cache(folder)
    torch.zeros(1, device=device)  # Initialize CUDA, which is no part of loading
    began = time.perf_counter()
    pipe = load_arm(arm, folder, device)
    synchronize(device)
    figures: dict[str, Any] = {"load_s": time.perf_counter() - began}
    figures |= {f"loading_{key}": value for key, value in peak_memory(device).items()}
    reset_peak_memory(device)
    if pictures == 0:
        return figures
    pipe.set_progress_bar_config(disable=True)
    workload = replace(workload, **arm.work)
    tokens = workload.tokens if pipe.pe is not None else 0
    drawn = []
    for seed in range(min(arm.pictures or workload.pictures, workload.pictures)):
        drawn.append(draw_timed(pipe, workload.size, workload.steps, workload.guidance, tokens, seed, device))
    figures |= {"pictures": drawn} | _medians(drawn, tokens) | peak_memory(device)
    if arm.texts and tokens:
        seconds = enhance_timed(pipe, arm.texts, workload, device)
        figures["prompt_enhancer_together"] = {
            "texts": arm.texts,
            "ms_per_token": 1000 * seconds / (arm.texts * tokens),
        }
    if is_compared({"way": arm.way, "work": arm.work}):
        save_predictions(pipe, workload.size, device, work, arm.name)
    if workload.large:
        reset_peak_memory(device)
        steps, new = (workload.steps, tokens) if arm.work else (max(2, workload.steps // 5), 0)
        large = [draw_timed(pipe, workload.large, steps, workload.guidance, new, seed, device) for seed in range(2)]
        whole = {"seconds": large[-1]["seconds"]} if arm.work else {}
        figures["large"] = {"size": workload.large, "step_ms": large[-1]["step_ms"]} | whole | peak_memory(device)
    return figures


def load_arm(arm: Arm, folder: Path, device: str) -> ErnieImagePipeline:
    """Load the pipeline of an arm in its own way.

    Args:
        arm: The arm.
        folder: Of the repository that it needs.
        device: To run on.
    """
    if arm.way == "ours":
        return load(folder, device=device, **arm.options)
    if arm.way == "baseline":
        return load_baseline(arm.options["baseline"], open_repository(folder, prompt_enhancer=False), device=device)
    dtypes = {library: {name: torch.bfloat16} for library, name in DTYPE_ARGUMENT.items()}
    parts = {}
    if arm.way == "demo":
        parts = {
            part.name: getattr(import_module(part.library), part.class_name).from_pretrained(
                folder / part.name, device_map={"": device}, local_files_only=True, **dtypes[part.library]
            )
            for part in QUANTIZED
        }
    pipe = ErnieImagePipeline.from_pretrained(folder, **parts, **dtypes["diffusers"], local_files_only=True)
    if arm.way == "demo":
        pipe.vae.to(device)
    else:
        pipe.enable_model_cpu_offload(device=device)
    return pipe


def _use_kernel_caches(work: Path, *, empty: bool) -> None:
    """Let inductor and Triton keep compiled kernels in `work`, apart from those of the user's other programs."""
    for name, cache in {"TORCHINDUCTOR_CACHE_DIR": work / "compiled", "TRITON_CACHE_DIR": work / "kernels"}.items():
        if empty:
            shutil.rmtree(cache, ignore_errors=True)
        os.environ[name] = str(cache)


def _import_classes() -> None:
    """Import every class that an arm uses: both libraries import them on first use, which is no part of loading."""
    for library, name in (("diffusers", PIPELINE_CLASS), *((part.library, part.class_name) for part in COMPONENTS)):
        getattr(import_module(library), name)


def _folder(arm: Arm, model: str | Path, original: str | Path | None) -> Path:
    """Folder of the repository that an arm loads."""
    if arm.way not in ("original", "baseline"):
        return Path(model)
    if original is None:
        raise InvalidSettings("It needs the original repository: name it with --original.")
    return Path(original)


def fill_page_cache(folder: Path) -> None:
    """Read all weight files, so that every arm finds them in the page cache."""

    def read(file: Path) -> None:
        block = bytearray(1 << 24)
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(block):
                pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, folder.rglob("*.safetensors")))


def step_clock(device: str) -> tuple[Callable[..., dict[str, Any]], list[float]]:
    """A pipeline's ``callback_on_step_end``, and the list to which it adds the moment in which each step ended."""
    moments: list[float] = []

    def on_step_end(pipe: ErnieImagePipeline, step: int, timestep: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        synchronize(device)  # Costs nothing: upstream waits here as well, for the next timestep
        moments.append(time.perf_counter())
        return kwargs

    return on_step_end, moments


def median_step_ms(moments: Sequence[float]) -> float:
    """Median milliseconds of the steps after the first, by the moments in which steps ended."""
    return 1000 * statistics.median(later - earlier for earlier, later in itertools.pairwise(moments))


def draw_timed(
    pipe: ErnieImagePipeline, size: int, steps: int, guidance: float, tokens: int, seed: int, device: str
) -> dict[str, float]:
    """Draw one picture.

    Args:
        pipe: The pipeline.
        size: Height and width.
        steps: Denoising steps; the first is left out of the median.
        guidance: Guidance scale.
        tokens: New tokens of the prompt enhancer; 0 leaves it out.
        seed: Of the noise and of the enhancer.
        device: The pipeline's.

    Returns:
        Seconds of the call; of these the prompt enhancer's; tokens of the prompt that is drawn; median milliseconds of
        a step; on a GPU the GiB reserved at the end.
    """
    on_step_end, moments = step_clock(device)
    torch.manual_seed(seed)  # The prompt enhancer samples from the global random state
    with _fixed_length(pipe, tokens), _first_encoding(pipe, device) as encoding:
        synchronize(device)
        began = time.perf_counter()
        result = pipe(
            PROMPT,
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=guidance,
            use_pe=tokens > 0,
            generator=torch.Generator("cpu").manual_seed(seed),
            callback_on_step_end=on_step_end,
        )
        synchronize(device)
    return {
        "seconds": time.perf_counter() - began,
        "prompt_enhancer_s": encoding[0] - began if tokens else 0.0,
        "text_tokens": len(pipe.tokenizer((result.revised_prompts or [PROMPT])[0])["input_ids"]),
        "step_ms": median_step_ms(moments),
    } | reserved_memory(device)


def enhance_timed(pipe: ErnieImagePipeline, texts: int, workload: Workload, device: str) -> float:
    """Seconds in which the prompt enhancer writes several texts at once, the shortest of a few."""
    size, steps, guidance = workload.size, workload.steps, workload.guidance
    settings = [Settings(PROMPT, "", size, size, steps, guidance, seed, True) for seed in range(texts)]
    with _fixed_length(pipe, workload.tokens):
        return best_seconds(lambda: enhance_all(pipe, settings), device)


@contextmanager
def _fixed_length(pipe: ErnieImagePipeline, tokens: int) -> Iterator[None]:
    """Make the prompt enhancer write exactly so many tokens: on random weights it finds no end, else each prompt ends
    elsewhere.

    The pipeline passes the tokenizer's ``model_max_length`` to ``generate`` as ``max_new_tokens``, and leaves
    ``min_new_tokens`` to the model's generation config.
    """
    if not tokens:
        yield
        return
    config, tokenizer = pipe.pe.generation_config, pipe.pe_tokenizer
    before = config.min_new_tokens, tokenizer.model_max_length
    config.min_new_tokens = tokenizer.model_max_length = tokens
    try:
        yield
    finally:
        config.min_new_tokens, tokenizer.model_max_length = before


@contextmanager
def _first_encoding(pipe: ErnieImagePipeline, device: str) -> Iterator[list[float]]:
    """Note when the text encoder is first called. Until then the pipeline only enhances the prompt.

    The chat template and the tokenizers are part of that, with 0.7 ms a picture.
    """
    moments: list[float] = []

    def note(*_: object) -> None:
        if not moments:
            synchronize(device)
            moments.append(time.perf_counter())

    hook = pipe.text_encoder.register_forward_pre_hook(note)
    try:
        yield moments
    finally:
        hook.remove()


def _medians(pictures: list[dict[str, float]], tokens: int) -> dict[str, float]:
    """Medians of the pictures after the first, if there are any; what the first takes beyond is its overhead."""
    later = pictures[1:] or pictures
    medians = {
        key: statistics.median(picture[key] for picture in later) for key in ("seconds", "prompt_enhancer_s", "step_ms")
    }
    figures = {
        "first_s": pictures[0]["seconds"],
        "seconds": medians["seconds"],
        "slowest_over_median": max(picture["seconds"] for picture in later) / medians["seconds"],
        "step_ms": medians["step_ms"],
    }
    if tokens:
        figures["prompt_enhancer_ms_per_token"] = 1000 * medians["prompt_enhancer_s"] / tokens
        figures["prompt_enhancer_first_overhead_s"] = pictures[0]["prompt_enhancer_s"] - medians["prompt_enhancer_s"]
    return figures
