"""VAE decoding within a memory budget: in tiles, or picture by picture, where a whole call needs too much memory.

A decode at 1024x1024 takes more memory than the NF4 transformer. Upstream can tile and slice, but doesn't decide when.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2

from ..fast.subclassing import named_as_upstream
from ..fast.turns import Turn
from ..upstream.offloading import kept_on_device
from .decode_check import CheckedVAE, DecodeCheck, make_vae_checked
from .placement import free_memory
from .requirements import DECODE_BYTES_PER_PIXEL, TILE


@dataclass(kw_only=True)
class TilingRuntime(DecodeCheck):
    """What `TiledVAE` keeps beside its weights.

    Attributes:
        budget: Bytes to decode in; None for the device's free memory at each call.
        before_decode: Called first, to free memory that is no longer needed. Must not refer to the VAE.
        turn: Held during a decode. Pipelines may share a VAE.
    """

    budget: int | None = None
    before_decode: Callable[[], None] | None = None
    turn: Turn = field(default_factory=Turn, compare=False)

    def fits(self, pixels: int, latents: torch.Tensor) -> bool:
        """Whether `pixels` can be decoded at once from such latents. Always True in the machine's own memory."""
        budget = free_memory(latents.device) if self.budget is None else self.budget
        factor = latents.dtype.itemsize / torch.bfloat16.itemsize
        return budget is None or pixels * DECODE_BYTES_PER_PIXEL * factor <= budget


@named_as_upstream
class TiledVAE(CheckedVAE):
    """A VAE that decodes picture by picture ("slicing"), then in tiles, where a call doesn't fit the memory budget."""

    runtime: TilingRuntime
    use_slicing: bool
    use_tiling: bool

    @functools.wraps(AutoencoderKLFlux2.decode)
    def decode(self, z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        pixels = z.shape[-2] * z.shape[-1] * upscaling(self) ** 2
        with kept_on_device(self), self.runtime.turn.take(z.device):
            slicing, tiling = self.use_slicing, self.use_tiling
            if self.runtime.before_decode is not None:
                self.runtime.before_decode()
            if z.is_cuda:
                torch.cuda.empty_cache()  # What denoising leaves free lies in pieces too small for a decode.
            try:
                self.use_slicing = slicing or not self.runtime.fits(pixels * len(z), z)
                self.use_tiling = tiling or not self.runtime.fits(pixels, z)
                return CheckedVAE.decode(self, z, *args, **kwargs)
            finally:
                self.use_slicing, self.use_tiling = slicing, tiling


def make_vae_tiled(
    vae: AutoencoderKLFlux2,
    *,
    budget: int | None = None,
    before_decode: Callable[[], None] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Turn a VAE into a `TiledVAE`.

    Args:
        vae: The VAE.
        budget: Bytes to decode in; None for the device's free memory at each call.
        before_decode: Called first, to free memory that is no longer needed. Must not refer to the VAE.
        dtype: As of `DecodeCheck`.
    """
    make_vae_checked(vae)
    vae.__class__ = TiledVAE
    vae.tile_sample_min_size, vae.tile_latent_min_size = TILE, TILE // upscaling(vae)
    vae.runtime = TilingRuntime(budget=budget, before_decode=before_decode, dtype=dtype)


def upscaling(vae: AutoencoderKLFlux2) -> int:
    """Pixels per latent, along each side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)
