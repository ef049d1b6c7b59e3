"""What can go wrong while a picture is drawn, as errors that name the cure."""

from __future__ import annotations

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from diffusers import ErnieImagePipeline
from PIL import Image

from ..errors import DeviceUnavailable, ErnieImageNF4Error, NotFinite
from ..fast.products import products_of
from ..fast.transformer import computation_dtype
from ..memory.apply import memory_mode
from ..memory.decode_check import cure, is_finite
from ..upstream.pipelines import execution_device
from .loras import active_uses, noting
from .settings import Settings

USUAL_STRENGTH = 4.0  # of a LoRA: far above it, numbers overflow in any dtype
SAMPLED_FROM_NAN = "probability tensor contains"  # how the error of `torch.multinomial` begins


def explained(pipe: ErnieImagePipeline, settings: Settings, error: Exception) -> ErnieImageNF4Error | None:
    """An error of the libraries as one that says what to do; None for one that isn't known here."""
    if isinstance(error, ErnieImageNF4Error):
        return error
    if should_reduce_batch_size(error):  # torch.OutOfMemoryError is one; the CPU has no error of its own
        return DeviceUnavailable(memory_ran_out(pipe, settings))
    if isinstance(error, RuntimeError) and str(error).startswith(SAMPLED_FROM_NAN):
        return not_finite(pipe, settings, "NaN or infinity in the prompt enhancer")
    return None


def memory_ran_out(pipe: ErnieImagePipeline, settings: Settings) -> str:
    """The message for a picture that doesn't fit the device's memory, with what to do."""
    device, mode = execution_device(pipe), memory_mode(pipe)
    smaller = None if device.type in ("cpu", "mps") else {"resident": "offload", "offload": "stream"}.get(mode)
    cure = f"load with memory={smaller!r} (--memory {smaller}) or draw" if smaller else "draw"
    return f"The memory of {device} ran out at {settings.width}x{settings.height}: {cure} a smaller size."


def check_latents(pipe: ErnieImagePipeline, settings: Settings, latents: torch.Tensor) -> None:
    """Refuse latents that aren't finite.

    Raises:
        NotFinite: They hold NaN or infinity.
    """
    if not is_finite(latents):
        raise not_finite(pipe, settings, "NaN or infinity in the latents")


def check_picture(pipe: ErnieImagePipeline, settings: Settings, image: Image.Image, notes: list[str]) -> None:
    """Refuse a picture that isn't one.

    Args:
        pipe: The pipeline that drew it.
        settings: What it was drawn with.
        image: The picture. Its initial latents were noise.
        notes: What wasn't finite in its decoding, as `noted` has it.

    Raises:
        NotFinite: Latents or picture hold NaN or infinity, or all of the picture has one value.
    """
    if notes:
        raise not_finite(pipe, settings, f"NaN or infinity in the {notes[0]}")
    values = np.asarray(image)
    if values.min() == values.max():
        raise not_finite(pipe, settings, f"Every value of the picture is {values.min()}")


def not_finite(pipe: ErnieImagePipeline, settings: Settings, found: str) -> NotFinite:
    """The error for numbers that overflowed."""
    dtype = computation_dtype(pipe.transformer)
    way_out = cure(dtype)
    if products_of(pipe.transformer) is not None:
        way_out = f"leave out products (--products), and if that isn't enough, {way_out}"
    strongest = max((use.strength for use in noting(settings, active_uses(pipe)).lora), key=abs, default=0.0)
    if abs(strongest) > USUAL_STRENGTH:
        way_out = f"use a LoRA strength nearer to 1 than {strongest:g}, and if that isn't enough, {way_out}"
    return NotFinite(f"{found} ({str(dtype).removeprefix('torch.')}), so there is no picture: {way_out}.")
