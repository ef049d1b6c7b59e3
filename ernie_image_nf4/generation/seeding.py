"""What a seed decides beside the prompt enhancer's text: the initial latents."""

from __future__ import annotations

import torch
from diffusers import ErnieImagePipeline

from ..upstream.pipelines import execution_device
from .settings import Settings


def initial_latents(pipe: ErnieImagePipeline, settings: Settings) -> torch.Tensor:
    """Gaussian noise of shape (1, channels, height / 16, width / 16), in the transformer's dtype on its device.

    It is drawn on the CPU in float32, so that a seed means the same noise on every device and in every dtype.
    """
    shape = (
        1,
        pipe.transformer.config.in_channels,
        settings.height // pipe.vae_scale_factor,
        settings.width // pipe.vae_scale_factor,
    )
    noise = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(settings.seed), device="cpu")
    return noise.to(execution_device(pipe), pipe.transformer.dtype)
