"""What a seed decides: the initial latents, and the random state that the prompt enhancer samples from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
    noise = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(settings.seed))
    return noise.to(execution_device(pipe), pipe.transformer.dtype)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global random state on the CPU and one device while the context lasts, and restore it."""
    # MPS has one generator and no device index to restore it by: it stays seeded.
    forked = [device.index or 0] if device.type in ("cuda", "xpu") else []
    with torch.random.fork_rng(forked, device_type=device.type if forked else "cuda"):
        torch.manual_seed(seed)
        yield
