"""Stage 8: a grid of 24 held-out captions as the NF4 mini draws them, for the eye.

    python -m training.samples --model . --output training/samples.png

The labels need a font with Chinese characters: Debian's ``fonts-noto-cjk``.
"""

from __future__ import annotations

import argparse
import random
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from ernie_image_nf4 import load

from .evaluate import GUIDANCE, STEPS
from .scenes import OBJECTS, Scene, caption, sample_scene

COLUMNS, ROWS, SIZE, LABEL = 6, 4, 256, 60
FONT = "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc"


def pick_scenes(seed: int = 7) -> list[Scene]:
    """Held-out scenes, no object twice, so that the grid shows as much as it can."""
    rng, scenes, used = random.Random(seed), [], set()
    while len(scenes) < COLUMNS * ROWS:
        scene = sample_scene(rng, held_out=True)
        objects = {item for item in scene.objects if item >= 0}
        if not objects & used and scene.background not in [other.background for other in scenes[-6:]]:
            used |= objects
            scenes.append(scene)
    return scenes


def label(draw: ImageDraw.ImageDraw, x: int, y: int, text: str, font: ImageFont.FreeTypeFont) -> None:
    width = 36 if text.isascii() else 19
    draw.multiline_text((x + 6, y + 3), "\n".join(textwrap.wrap(text, width)), font=font, fill="black", spacing=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default=None)
    arguments = parser.parse_args()
    rng = random.Random(8)
    texts = [caption(scene, ("en", "zh")[number % 2], rng) for number, scene in enumerate(pick_scenes())]
    pipe = load(arguments.model, device=arguments.device, prompt_enhancer=False)
    font = ImageFont.truetype(FONT, 13)
    grid = Image.new("RGB", (COLUMNS * SIZE, ROWS * (SIZE + LABEL)), "white")
    draw = ImageDraw.Draw(grid)
    for start in range(0, len(texts), COLUMNS):
        pictures = pipe(
            texts[start : start + COLUMNS], height=SIZE, width=SIZE, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
            generator=torch.Generator("cpu").manual_seed(start),
        ).images  # fmt: skip
        for column, picture in enumerate(pictures):
            x, y = column * SIZE, start // COLUMNS * (SIZE + LABEL)
            grid.paste(picture, (x, y))
            label(draw, x, y + SIZE, texts[start + column], font)
    grid.save(arguments.output)
    print(f"{arguments.output}: {len(texts)} captions of {len(OBJECTS)} objects, first tries, none picked")


if __name__ == "__main__":
    main()
