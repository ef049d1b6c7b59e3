"""Pictures from given initial latents, without the prompt enhancer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import ErnieImagePipeline

from ..errors import DeviceUnavailable
from ..repository.metadata import Recommended
from ..upstream.pipelines import execution_device


def draw_latents(pipe: ErnieImagePipeline, seeds: Sequence[int], settings: Recommended) -> torch.Tensor:
    """Initial latents (seeds, channels, height / 16, width / 16), float32 on the CPU, each from its own generator."""
    factor = pipe.vae_scale_factor
    shape = (1, pipe.transformer.config.in_channels, settings.height // factor, settings.width // factor)
    return torch.cat([torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])


def draw_from_latents(
    pipe: ErnieImagePipeline,
    prompts: Sequence[str],
    settings: Recommended,
    latents: torch.Tensor,
    *,
    batch_size: int = 1,
    on_drawn: Callable[[int], Any] | None = None,
) -> torch.Tensor:
    """Draw prompts as they are.

    Args:
        pipe: The pipeline, as from `load`.
        prompts: What to draw.
        settings: Size, steps and guidance scale.
        latents: Initial latents, one for each prompt, as from `draw_latents`.
        batch_size: Pictures to draw together. Another batch size rounds matrix products differently.
        on_drawn: Called after each batch with its number of pictures.

    Returns:
        uint8 of shape (prompts, 3, height, width), on the CPU.

    Raises:
        DeviceUnavailable: The device ran out of memory.
    """
    batches = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        drawn = run_pipeline(pipe, prompts[part], settings, latents[part], "np")  # diffusers 0.38 has no "pt" here
        batches.append((torch.from_numpy(drawn).permute(0, 3, 1, 2) * 255).round().to(torch.uint8))
        if on_drawn is not None:
            on_drawn(len(drawn))
    return torch.cat(batches)


def run_pipeline(
    pipe: ErnieImagePipeline, prompts: Sequence[str], settings: Recommended, latents: torch.Tensor, output_type: str
) -> Any:
    """Call the pipeline once for all prompts; returns its images, or its latents for the output type ``"latent"``.

    Raises:
        DeviceUnavailable: The device ran out of memory.
    """
    device = execution_device(pipe)
    try:
        result = pipe(
            prompt=list(prompts),
            height=settings.height,
            width=settings.width,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            latents=latents.to(device, pipe.transformer.dtype),
            use_pe=False,
            output_type=output_type,
        )
    except torch.OutOfMemoryError as error:
        raise DeviceUnavailable(
            f"The memory of {device} ran out with {len(prompts)} pictures of {settings.width}x{settings.height} "
            "at once: use a smaller batch size (--batch), a smaller size, or memory='offload' (--memory offload)."
        ) from error
    return getattr(result, "images", result)  # diffusers 0.38 returns latents without a wrapper
