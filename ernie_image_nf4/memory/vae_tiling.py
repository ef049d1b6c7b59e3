"""VAE decoding within limits: in tiles, or picture by picture, whenever that would else need the most memory of all.

A decode at 1024x1024 takes more memory than the NF4 transformer. Upstream can tile and slice, but not decide when to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from diffusers import AutoencoderKLFlux2

# Side of a tile. Pictures up to this size are decoded as upstream decodes them, so most sizes don't change by a bit.
TILE = 512


def enable_tiling(
    vae: AutoencoderKLFlux2, fits: Callable[[int], bool], make_room: Callable[[], None] | None = None
) -> None:
    """Let ``vae.decode`` work in tiles, and in slices of one picture, when a call is too large.

    Args:
        vae: The VAE, whose settings are changed.
        fits: Whether so many pixels can be decoded at once.
        make_room: Called before, to free memory that isn't needed any more.
    """
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    vae.tile_sample_min_size, vae.tile_latent_min_size = TILE, TILE // scale
    upstream = type(vae).decode

    @functools.wraps(upstream)
    def decode(z: torch.Tensor, *args, **kwargs):
        pixels = z.shape[-2] * z.shape[-1] * scale**2
        chosen = vae.use_slicing, vae.use_tiling
        if make_room is not None:
            make_room()
        if z.is_cuda:
            torch.cuda.empty_cache()  # what denoising leaves free lies in pieces too small for this
        try:
            vae.use_slicing, vae.use_tiling = chosen[0] or not fits(pixels * len(z)), chosen[1] or not fits(pixels)
            return upstream(vae, z, *args, **kwargs)
        finally:
            vae.use_slicing, vae.use_tiling = chosen

    vae.decode = decode
