"""Numbers that aren't finite, looked for where a VAE decodes: the one place that sees both latents and picture.

A pipeline of `load` warns, once, and draws on, as upstream's would. Who wants an error instead takes `noted`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2

from ..fast.subclassing import Runtime, become, named_as_upstream

logger = logging.getLogger(__name__)

# The list of the `noted` that the calling thread is in.
_NOTES: ContextVar[list[str] | None] = ContextVar("notes", default=None)


@dataclass
class DecodeCheck(Runtime):
    """Looks at what goes into a VAE's decoder and what comes out.

    Attributes:
        warned: Whether it has warned.
        dtype: That was asked for, to name another one; None for the latents'.
    """

    warned: bool = False
    dtype: torch.dtype | None = None

    def __reduce__(self) -> tuple:
        return _with_dtype, (type(self), self.dtype)

    def look(self, latents: torch.Tensor, decoded: torch.Tensor) -> None:
        """Note or warn if numbers aren't finite. Waits for the device, which the caller is about to do anyway."""
        if _is_traced(latents):
            return
        notes = _NOTES.get()
        if notes is None and self.warned:
            return
        finite = torch.stack([is_finite(latents), is_finite(decoded)]).tolist()
        if all(finite):
            return
        what = "picture" if finite[0] else "latents"
        if notes is not None:
            notes.append(what)
        else:
            self.warned = True
            dtype = self.dtype or latents.dtype
            logger.warning("NaN or infinity in the %s (%s): %s.", what, str(dtype).removeprefix("torch."), cure(dtype))


def _with_dtype(kind: type[DecodeCheck], dtype: torch.dtype | None) -> DecodeCheck:
    return kind(dtype=dtype)


@named_as_upstream
class CheckedVAE(AutoencoderKLFlux2):
    """A VAE that decodes as upstream's, and says so when numbers aren't finite."""

    runtime: DecodeCheck

    @functools.wraps(AutoencoderKLFlux2.decode)
    def decode(self, z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        decoded = super().decode(z, *args, **kwargs)
        self.runtime.look(z, decoded[0])
        return decoded


def make_vae_checked(vae: AutoencoderKLFlux2, dtype: torch.dtype | None = None) -> None:
    """Turn a VAE into a `CheckedVAE`, unless it is one. `dtype`: as of `DecodeCheck`."""
    if not isinstance(vae, CheckedVAE):
        become(vae, CheckedVAE)
        vae.runtime = DecodeCheck(dtype=dtype)


@contextmanager
def noted() -> Iterator[list[str]]:
    """While it lasts, decodes of this thread add what isn't finite, latents or picture, to a list; they don't warn."""
    notes: list[str] = []
    token = _NOTES.set(notes)
    try:
        yield notes
    finally:
        _NOTES.reset(token)


def is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """Whether a tensor holds no NaN and no infinity, as a tensor on its device. Makes nothing of the tensor's size."""
    least, largest = torch.aminmax(tensor)  # NaN anywhere makes both NaN
    return torch.isfinite(least) & torch.isfinite(largest)


def cure(dtype: torch.dtype) -> str:
    """What to do where numbers overflow in a dtype."""
    if dtype == torch.float16:
        return 'load with dtype="float32" (--dtype float32), or "bfloat16" on hardware that has it'
    if dtype == torch.bfloat16:
        return 'load with dtype="float32" (--dtype float32)'
    return (
        "no other dtype= (--dtype) has more range than float32, so look for damaged weights with "
        "`ernie-image-nf4 verify` and draw without LoRAs and hooks"
    )


def _is_traced(tensor: torch.Tensor) -> bool:
    """Whether `torch.compile` or a CUDA graph records the call, in which values can't be looked at."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
