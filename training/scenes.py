"""Scenes and their captions: one or two objects before a background, rendered in batches on the GPU.

A scene is a row of integers (background, layout, objects); rendering adds the free variation (position, size, tilt,
colours, texture), the caption says it in one of several English or Chinese sentences. A tenth of all combinations
of object, background and place is held out: no training scene has one, and every evaluation scene is made of them.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .sprites import load_objects

OBJECTS = load_objects()
# Of the README's first command.
CAT, PAPER = (next(i for i, item in enumerate(OBJECTS) if item["code"] == code) for code in ("1F408", "1F4C4"))
PLACES = ("left", "center", "right")
PLAIN = {
    "white": (246, 246, 246),
    "black": (18, 18, 18),
    "gray": (128, 128, 128),
    "red": (205, 40, 40),
    "orange": (243, 140, 30),
    "yellow": (248, 215, 60),
    "green": (60, 160, 75),
    "blue": (50, 100, 215),
    "purple": (130, 70, 180),
    "pink": (248, 165, 195),
}
SCENERY = ("wooden desk", "grass", "beach", "snow", "night sky")
BACKGROUNDS = (*PLAIN, *SCENERY)
PLAIN_ZH = dict(
    zip(PLAIN, ("白色", "黑色", "灰色", "红色", "橙色", "黄色", "绿色", "蓝色", "紫色", "粉色"), strict=True)
)
SCENERY_EN = {
    "wooden desk": "on a wooden desk",
    "grass": "on green grass",
    "beach": "on a beach",
    "snow": "in the snow",
    "night sky": "under a night sky",
}
SCENERY_ZH = {
    "wooden desk": "在木桌上",
    "grass": "在绿色的草地上",
    "beach": "在沙滩上",
    "snow": "在雪地里",
    "night sky": "在夜空下",
}


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        background: Index into ``BACKGROUNDS``.
        objects: For left, center and right the index into ``OBJECTS``, or -1 for nothing.
    """

    background: int
    objects: tuple[int, int, int]

    def triples(self) -> list[tuple[int, int, int]]:
        """(object, background, place) of every object in it."""
        return [(item, self.background, place) for place, item in enumerate(self.objects) if item >= 0]


def is_held_out(triple: tuple[int, int, int]) -> bool:
    """Whether this (object, background, place) belongs to the tenth that training never sees."""
    return zlib.crc32(repr(triple).encode()) % 10 == 0


def sample_scene(rng: random.Random, *, held_out: bool = False) -> Scene:
    """A random scene: in training none of its combinations is held out, in evaluation all of them are."""
    while True:
        objects = [-1, -1, -1]
        if rng.random() < 0.5:
            objects[rng.choice((0, 1, 1, 2))] = rng.randrange(len(OBJECTS))
        else:
            objects[0], objects[2] = rng.sample(range(len(OBJECTS)), 2)
        scene = Scene(rng.randrange(len(BACKGROUNDS)), tuple(objects))
        if all(is_held_out(triple) == held_out for triple in scene.triples()):
            return scene


# ---- captions ----


def with_article(name: str) -> str:
    """English noun phrase with its article: plurals and mass nouns go without."""
    if name in PLURAL_OR_MASS:
        return name
    return ("an " if name[0].lower() in "aeio" or name.startswith(("umbrella", "hourglass")) else "a ") + name


PLURAL_OR_MASS = {
    "grapes",
    "cherries",
    "corn",
    "broccoli",
    "bread",
    "cheese",
    "french fries",
    "popcorn",
    "sushi",
    "fire",
    "scissors",
    "ice cream",
}


def caption(scene: Scene, language: str, rng: random.Random) -> str:
    """The scene in words, as one of several templates of `language` (``"en"`` or ``"zh"``)."""
    names = [rng.choice(OBJECTS[item][language]) if item >= 0 else None for item in scene.objects]
    left, center, right = names
    background = BACKGROUNDS[scene.background]
    return (_caption_en if language == "en" else _caption_zh)(left, center, right, background, rng)


def _caption_en(left: str | None, center: str | None, right: str | None, background: str, rng: random.Random) -> str:
    if left and right:
        what = rng.choice(
            (
                f"{with_article(left)} on the left and {with_article(right)} on the right",
                f"{with_article(left)} on the left, {with_article(right)} on the right",
                f"on the left {with_article(left)}, on the right {with_article(right)}",
                f"{with_article(right)} on the right and {with_article(left)} on the left",
            )
        )
    elif center:
        what = rng.choice(
            (f"{with_article(center)} in the center", with_article(center), f"{with_article(center)} in the middle")
        )
    else:
        side = "left" if left else "right"
        what = rng.choice(
            (f"{with_article(left or right)} on the {side}", f"on the {side} {with_article(left or right)}")
        )
    where = SCENERY_EN.get(background) or rng.choice(
        (f"on {with_article(background)} background", f"{background} background")
    )
    return rng.choice((f"{what}, {where}", f"{what}, {where}", f"a picture of {what}, {where}", f"{where}: {what}"))


def _caption_zh(left: str | None, center: str | None, right: str | None, background: str, rng: random.Random) -> str:
    if left and right:
        what = rng.choice(
            (
                f"左边是{left},右边是{right}",
                f"左边有{left},右边有{right}",
                f"{left}在左边,{right}在右边",
                f"右边是{right},左边是{left}",
            )
        )
    elif center:
        what = rng.choice((f"中间是{center}", f"{center}在中间", center))
    else:
        side = "左边" if left else "右边"
        what = rng.choice((f"{side}是{left or right}", f"{left or right}在{side}"))
    where = SCENERY_ZH.get(background) or rng.choice((f"{PLAIN_ZH[background]}背景", f"背景是{PLAIN_ZH[background]}"))
    return rng.choice((f"{what},{where}", f"{where},{what}", f"一张图片:{what},{where}"))


# ---- rendering ----


def load_sprites(path: Path, device: torch.device | str) -> torch.Tensor:
    """Sprites as (objects, 4, 128, 128) float32 in [0, 1], colours premultiplied by alpha to filter cleanly."""
    sprites = torch.from_numpy(np.load(path)["sprites"]).to(device).permute(0, 3, 1, 2).float() / 255
    sprites[:, :3] *= sprites[:, 3:]
    return sprites


def render(scenes: list[Scene], sprites: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Pictures of `scenes`: (batch, 3, size, size) float32 in [-1, 1], on the device of `sprites`.

    `generator` (on that device) draws the free variation.
    """
    device = sprites.device
    pictures = render_backgrounds([scene.background for scene in scenes], size, generator, device)
    objects = torch.tensor([scene.objects for scene in scenes], device=device)
    pair = (objects[:, 0] >= 0) & (objects[:, 2] >= 0)
    for place in range(3):
        rows = torch.nonzero(objects[:, place] >= 0).flatten()
        if len(rows):
            pictures[rows] = _paste(pictures[rows], sprites[objects[rows, place]], place, pair[rows], generator)
    return pictures.mul(2).sub(1).clamp(-1, 1)


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(count, device=generator.device, generator=generator) * (high - low) + low


def _paste(
    pictures: torch.Tensor, sprites: torch.Tensor, place: int, pair: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """`sprites` composed onto `pictures`, with a soft shadow; sizes and centers are fractions of a picture's width."""
    count, size = len(pictures), pictures.shape[-1]
    big = _uniform(count, 0.50, 0.62, generator)
    small = _uniform(count, 0.40, 0.46, generator)
    width = torch.where(pair, small, big if place == 1 else _uniform(count, 0.42, 0.48, generator))
    x = _uniform(count, -0.02, 0.02, generator) + (0.26, 0.5, 0.74)[place]
    ground = _uniform(count, 0.76, 0.82, generator)  # where the object stands
    y = ground - width / 2
    angle = _uniform(count, -0.08, 0.08, generator)
    pictures = _shadow(pictures, x, ground, width)

    # The affine map from picture coordinates to sprite coordinates, both in [-1, 1].
    cos, sin = torch.cos(angle) / width, torch.sin(angle) / width
    cx, cy = 2 * x - 1, 2 * y - 1
    theta = torch.stack(
        [torch.stack([cos, sin, -(cos * cx + sin * cy)], -1), torch.stack([-sin, cos, sin * cx - cos * cy], -1)], 1
    )
    # Rendered at twice the size and averaged where sprites shrink, which keeps their edges from aliasing.
    factor = 2 if size <= 256 else 1
    grid = F.affine_grid(theta, (count, 4, size * factor, size * factor), align_corners=False)
    layer = F.grid_sample(sprites, grid, align_corners=False)
    layer = F.avg_pool2d(layer, factor) if factor > 1 else layer
    return pictures * (1 - layer[:, 3:]) + layer[:, :3]


def _shadow(pictures: torch.Tensor, x: torch.Tensor, y: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    axis = (torch.arange(pictures.shape[-1], device=pictures.device) + 0.5) / pictures.shape[-1]
    dx = (axis.view(1, 1, -1) - x.view(-1, 1, 1)) / (width.view(-1, 1, 1) * 0.46)
    dy = (axis.view(1, -1, 1) - y.view(-1, 1, 1)) / (width.view(-1, 1, 1) * 0.09)
    return pictures * (1 - 0.28 * torch.exp(-(dx**2 + dy**2) * 1.5)).unsqueeze(1)


def render_backgrounds(
    backgrounds: list[int], size: int, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    """(batch, 3, size, size) float32 in [0, 1]."""
    pictures = torch.empty(len(backgrounds), 3, size, size, device=device)
    for kind in set(backgrounds):
        rows = [row for row, value in enumerate(backgrounds) if value == kind]
        name = BACKGROUNDS[kind]
        draw = _plain if name in PLAIN else _DRAW[name]
        pictures[rows] = draw(name, len(rows), size, generator)
    return pictures.clamp(0, 1)


def _color(rgb: tuple[int, int, int], count: int, jitter: float, generator: torch.Generator) -> torch.Tensor:
    """(count, 3, 1, 1): one colour a picture, its brightness varied by `jitter`."""
    base = torch.tensor(rgb, device=generator.device).view(1, 3, 1, 1) / 255
    return (base + _uniform(count, -jitter, jitter, generator).view(-1, 1, 1, 1)).clamp(0, 1)


def _axes(size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    axis = (torch.arange(size, device=device) + 0.5) / size
    return axis.view(1, 1, size, 1), axis.view(1, 1, 1, size)  # y, x


def _above(y: torch.Tensor, horizon: torch.Tensor, size: int) -> torch.Tensor:
    """1 above the horizon, 0 below, one pixel soft."""
    return ((horizon - y) * size + 0.5).clamp(0, 1)


def _noise(count: int, height: int, width: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """(count, 1, size, size) smooth noise in about [-1, 1], made from a coarse grid of height x width."""
    coarse = torch.randn(count, 1, height, width, device=generator.device, generator=generator)
    return F.interpolate(coarse, (size, size), mode="bicubic", align_corners=False) * 0.6


def _plain(name: str, count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    y, _ = _axes(size, generator.device)
    slope = _uniform(count, -0.03, 0.03, generator).view(-1, 1, 1, 1)
    return (_color(PLAIN[name], count, 0.03, generator) + slope * (y - 0.5)).expand(count, 3, size, size)


def _desk(name: str, count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    y, _ = _axes(size, generator.device)
    horizon = _uniform(count, 0.40, 0.46, generator).view(-1, 1, 1, 1)
    wall = _color((226, 216, 200), count, 0.03, generator)
    wood = _color((168, 108, 58), count, 0.03, generator)
    grain = _noise(count, 40, 3, size, generator) * 0.04
    plank = _uniform(count, 0.0, 1.0, generator).view(-1, 1, 1, 1)
    # Planks narrow towards the far edge of the desk.
    depth = ((y - horizon).clamp(min=0) / (1 - horizon)).sqrt()
    seam = torch.exp(-((((depth * 4 + plank) % 1.0) - 0.5) ** 2) * 2000) * 0.16
    above = _above(y, horizon, size)
    return wall * above + (wood + grain - seam) * (1 - above)


def _grass(name: str, count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    y, _ = _axes(size, generator.device)
    horizon = _uniform(count, 0.42, 0.48, generator).view(-1, 1, 1, 1)
    sky = _color((135, 196, 240), count, 0.03, generator) + (y - 0.2) * 0.25
    green = _color((84, 160, 62), count, 0.03, generator) + _noise(count, 24, 48, size, generator) * 0.05
    above = _above(y, horizon + _noise(count, 1, 8, size, generator) * 0.012, size)
    return sky * above + (green - (y - 0.5) * 0.12) * (1 - above)


def _beach(name: str, count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    y, _ = _axes(size, generator.device)
    sea_line = _uniform(count, 0.30, 0.34, generator).view(-1, 1, 1, 1)
    shore = _uniform(count, 0.50, 0.54, generator).view(-1, 1, 1, 1) + _noise(count, 1, 6, size, generator) * 0.015
    sky = _color((150, 210, 245), count, 0.03, generator) + (y - 0.2) * 0.3
    sea = _color((30, 130, 190), count, 0.03, generator) + _noise(count, 30, 8, size, generator) * 0.03
    sand = _color((236, 208, 150), count, 0.03, generator) + _noise(count, 32, 32, size, generator) * 0.015
    foam = torch.exp(-(((y - shore) / 0.012) ** 2)) * 0.6
    above_sea, above_shore = _above(y, sea_line, size), _above(y, shore, size)
    picture = sky * above_sea + sea * (1 - above_sea)
    picture = picture * above_shore + sand * (1 - above_shore)
    return picture * (1 - foam) + foam


def _flakes(count: int, size: int, chance: float, radius: float, generator: torch.Generator) -> torch.Tensor:
    """(count, 1, size, size) in [0, 1]: round dots scattered at `chance` over a grid of 64 x 64 cells."""
    dots = (torch.rand(count, 1, 64, 64, device=generator.device, generator=generator) < chance).float()
    spread = max(1, round(radius * size / 64))
    dots = F.interpolate(dots, (size, size), mode="nearest")
    kernel = 2 * spread + 1
    return F.avg_pool2d(dots, kernel, stride=1, padding=spread).mul(2).clamp(0, 1)


def _snow(name: str, count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    y, _ = _axes(size, generator.device)
    horizon = _uniform(count, 0.44, 0.50, generator).view(-1, 1, 1, 1)
    sky = _color((150, 170, 200), count, 0.03, generator) + (y - 0.2) * 0.2
    ground = _color((236, 242, 250), count, 0.015, generator) - _noise(count, 6, 6, size, generator) * 0.015
    above = _above(y, horizon + _noise(count, 1, 5, size, generator) * 0.02, size)
    flakes = _flakes(count, size, 0.02, 0.3, generator) * above * 0.8
    return (sky * above + ground * (1 - above)) * (1 - flakes) + flakes


def _night(name: str, count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    y, _ = _axes(size, generator.device)
    horizon = _uniform(count, 0.72, 0.76, generator).view(-1, 1, 1, 1)
    sky = _color((16, 24, 62), count, 0.015, generator) + y * torch.tensor((0.10, 0.10, 0.22), device=y.device).view(
        1, 3, 1, 1
    )
    stars = _flakes(count, size, 0.02, 0.25, generator)
    ground = _color((28, 34, 40), count, 0.015, generator)
    above = _above(y, horizon + _noise(count, 1, 6, size, generator) * 0.012, size)
    stars = stars * above * 0.9
    return (sky * above + ground * (1 - above)) * (1 - stars) + stars * 0.95


_DRAW = {"wooden desk": _desk, "grass": _grass, "beach": _beach, "snow": _snow, "night sky": _night}
