"""What a seed decides: the initial latents, and the random state that the prompt enhancer samples from."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import ErnieImagePipeline

from ..upstream.pipelines import execution_device
from .settings import Settings

# Each device has one random state for all threads: two that set and restore it by turns would restore each other's.
_SEEDING = threading.RLock()


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
    """Seed torch's global random states of the CPU and of one device while the context lasts, then restore both.

    ``torch.manual_seed`` would reseed all other GPUs too, even those that are first used later. Contexts in other
    threads wait meanwhile.
    """
    device_random = None if device.type == "cpu" else torch.get_device_module(device)
    with _SEEDING:
        before = torch.get_rng_state()
        device_before = device_random.get_rng_state(device) if device_random else None
        try:
            torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
            if device_random:
                device_random.set_rng_state(torch.Generator(device).manual_seed(seed).get_state(), device)
            yield
        finally:
            torch.set_rng_state(before)
            if device_random:
                device_random.set_rng_state(device_before, device)
