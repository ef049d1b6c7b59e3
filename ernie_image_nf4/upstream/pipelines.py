"""Private parts of diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, ErnieImagePipeline

from .gone import note_gone

ENHANCE_PROMPT = "_enhance_prompt_with_pe"


def execution_device(pipe: DiffusionPipeline) -> torch.device:
    """Device that the pipeline computes on, also while its weights are offloaded.

    Reaches for ``_execution_device`` (diffusers 0.38 to 0.42), which is the only place that knows of offloading hooks.
    Gone: the device of the weights, right without offloading.
    """
    return getattr(pipe, "_execution_device", pipe.device)


def enhance_prompt(
    pipe: ErnieImagePipeline,
    prompt: str,
    device: torch.device,
    *,
    width: int,
    height: int,
    generate: Callable[..., torch.Tensor] | None = None,
) -> str:
    """The prompt as the pipeline's prompt enhancer rewrites it, sampled from torch's global random state.

    Reaches for ``_enhance_prompt_with_pe`` (diffusers 0.38 to 0.42): a call of the pipeline enhances too, but encodes
    the prompt as well. Gone: a call without denoising steps, and `generate` isn't used.

    Args:
        pipe: The pipeline, with a prompt enhancer.
        prompt: What to draw.
        device: Where the enhancer computes.
        width: Pixels of the picture, which the enhancer is told.
        height: Pixels of the picture, likewise.
        generate: Called instead of the enhancer's ``generate``, with the same arguments; the enhancer itself isn't
            changed.
    """
    method = getattr(type(pipe), ENHANCE_PROMPT, None)
    if method is not None:
        own = pipe if generate is None else _with_generate(pipe, generate)
        return method(own, prompt, device, width=width, height=height)
    note_gone(f"ErnieImagePipeline.{ENHANCE_PROMPT}", "prompts are enhanced one by one")
    options = {"width": width, "height": height, "num_inference_steps": 0, "guidance_scale": 1.0}
    return pipe(prompt, **options, output_type="latent", use_pe=True).revised_prompts[0]


class _Enhancer:
    """A prompt enhancer with another ``generate``."""

    def __init__(self, pe: torch.nn.Module, generate: Callable[..., torch.Tensor]) -> None:
        self.pe, self.generate = pe, generate

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pe, name)


def _with_generate(pipe: ErnieImagePipeline, generate: Callable[..., torch.Tensor]) -> ErnieImagePipeline:
    """A shallow copy of the pipeline with another ``generate`` of its prompt enhancer. Neither original is changed."""
    copy = object.__new__(type(pipe))
    vars(copy).update(vars(pipe), pe=_Enhancer(pipe.pe, generate))
    return copy
