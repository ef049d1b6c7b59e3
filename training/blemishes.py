"""Stage 9: corners of plain scenes, drawn and reconstructed, and ten answers to the README's first command, judged.

    python -m training.blemishes training/work --model . --output training/corners.png --card training/first_command.png

``corners.png`` holds every corner that was measured, a row of pictures after the other: 20 pictures a row, each as its
four corners beside their background (see `training.corners`); the upper half of it was drawn, the lower reconstructed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

import torch
from diffusers import ErnieImagePipeline
from PIL import Image

from ernie_image_nf4 import load

from .classifier import classify, load_classifier
from .corners import CORNERS, corner_errors, corner_tiles, plain_scenes
from .evaluate import draw
from .scenes import CAT, PAPER, caption, load_sprites
from .vae import reconstruct, render_plain, to_bytes

COUNT, SEED, SEEDS, COLUMNS = 200, 5, 10, 20
README = Path(__file__).parents[1] / "README.md"


def first_command() -> str:
    """The prompt of the README's first command."""
    return re.search(r'ernie-image-nf4 generate "([^"]+)"', README.read_text(encoding="utf-8"))[1]


def drawn_corners(pipe: ErnieImagePipeline, count: int) -> torch.Tensor:
    """`corner_tiles` of `count` drawn plain scenes, English and Chinese in turn."""
    rng = random.Random(SEED)
    texts = [caption(scene, ("en", "zh")[number % 2], rng) for number, scene in enumerate(plain_scenes(count, SEED))]
    return corner_tiles(to_bytes(draw(pipe, texts, 256, 3000)))


def to_sheet(tiles: torch.Tensor) -> Image.Image:
    """`corner_tiles` as one picture, ``COLUMNS`` pictures a row, each two corners high and wide."""
    count, _, _, height, width = tiles.shape
    sheet = tiles.view(count // COLUMNS, COLUMNS, 2, 2, 3, height, width).permute(0, 2, 5, 1, 3, 6, 4)
    return Image.fromarray(sheet.reshape(count // COLUMNS * 2 * height, COLUMNS * 2 * width, 3).cpu().numpy())


def from_sheet(sheet: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The `corner_tiles` of a sheet (rows, columns, 3)."""
    rows = sheet.view(-1, 2, height, COLUMNS, 2, width, 3).permute(0, 3, 1, 4, 6, 2, 5)
    return rows.reshape(-1, 4, 3, height, width)


def draw_first_command(pipe: ErnieImagePipeline, classifier: Path, device: str) -> tuple[torch.Tensor, int]:
    """Pictures of ``SEEDS`` seeds, (SEEDS, 3, 256, 256) uint8, and in how many the judge sees cat and paper."""
    wanted = {CAT, PAPER}
    torch.manual_seed(SEED)
    pictures = torch.cat([draw(pipe, [first_command()], 256, seed, use_pe=True) for seed in range(SEEDS)])
    seen = classify(load_classifier(classifier, device), pictures.to(device))
    return to_bytes(pictures), sum(wanted <= set(objects) for objects in seen.objects)


def summary(errors: torch.Tensor) -> dict[str, dict[str, float]]:
    """Mean and largest error of each corner, levels of 255."""
    return {
        name: {"mean": round(column.mean().item(), 3), "largest": round(column.max().item(), 3)}
        for name, column in zip(CORNERS, errors.unbind(1), strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="picture of all corners")
    parser.add_argument("--card", type=Path, required=True, help="picture of the first command's ten answers")
    parser.add_argument("--count", type=int, default=COUNT, help="plain scenes, a multiple of 20")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    pipe = load(arguments.model, device=arguments.device, memory="resident", fast=False)
    pipe.set_progress_bar_config(disable=True)
    drawn = drawn_corners(pipe, arguments.count)
    plain = render_plain(load_sprites(arguments.work / "sprites.npz", arguments.device), arguments.count, SEED)
    made = {"drawn": drawn, "reconstructed": corner_tiles(reconstruct(pipe.vae, plain).cpu())}
    to_sheet(torch.cat(list(made.values()))).save(arguments.output, optimize=True)
    pictures, right = draw_first_command(pipe, arguments.work / "classifier.safetensors", arguments.device)
    rows = [torch.cat(list(half), -1) for half in pictures.split(SEEDS // 2)]
    Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).numpy()).save(arguments.card)
    report = {name: summary(corner_errors(tiles)) for name, tiles in made.items()}
    print(json.dumps({"corners": report, "first_command_right_of_10": right}), flush=True)


if __name__ == "__main__":
    main()
