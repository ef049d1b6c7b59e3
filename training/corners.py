"""How far the corners of pictures before plain colours are from their background.

A picture's corners are where a network can tell places apart by the padding, and so where it hides what it wants to
remember: see `training.models.build_vae`. The measure needs nothing but a picture's first and last rows.
"""

from __future__ import annotations

import random

import torch

from .scenes import PLAIN, Scene, sample_scene

CORNERS = ("top left", "top right", "bottom left", "bottom right")
SIZE, BESIDE = 16, 48  # pixels: of a corner, and of the background beside it


def plain_scenes(count: int, seed: int) -> list[Scene]:
    """`count` held-out scenes before plain colours."""
    rng, scenes = random.Random(seed), []
    while len(scenes) < count:
        scene = sample_scene(rng, held_out=True)
        if scene.background < len(PLAIN):
            scenes.append(scene)
    return scenes


def corner_tiles(pictures: torch.Tensor) -> torch.Tensor:
    """Corners with the background beside them, the right ones mirrored.

    Args:
        pictures: (count, 3, height, width) uint8.

    Returns:
        (count, 4, 3, SIZE, SIZE + BESIDE) uint8, in the order of ``CORNERS``.
    """
    width = SIZE + BESIDE
    bands = [pictures[:, :, :SIZE], pictures[:, :, -SIZE:]]
    return torch.stack([side for band in bands for side in (band[..., :width], band[..., -width:].flip(-1))], 1)


def corner_errors(tiles: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of each corner to the median of its own rows' background: (count, 4), levels of 255."""
    tiles = tiles.float()
    background = tiles[..., SIZE:].median(-1, keepdim=True).values
    return (tiles[..., :SIZE] - background).abs().mean((2, 3, 4))
