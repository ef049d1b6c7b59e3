"""Pictures side by side, with their names and prompts."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from .records import Evaluation

GRID_ROWS = 12  # Prompts shown
GRID_SIDE = 384  # Pixels of a picture's longer side
LABEL_HEIGHT, LABEL_WIDTH = 40, 200
MIN_CELL_WIDTH, MIN_CELL_HEIGHT = 96, 64  # Room for the text beside tiny pictures
FONT_SIZE = 13
# Fonts with Chinese characters first. DejaVuSans has none, as has Pillow's own font, the last resort.
FONTS = ("NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "wqy-microhei.ttc", "DejaVuSans.ttf")

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def picture_grid(evaluation: Evaluation) -> Image.Image:
    """The first prompts as rows: the reference's picture, then that of each candidate that drew."""
    columns = list(evaluation.pictures.items())
    captions = [f"{number}. {prompt}" for number, prompt in enumerate(evaluation.prompts, 1)]
    return labelled_grid([name for name, _ in columns], captions, [pictures for _, pictures in columns])


def labelled_grid(columns: Sequence[str], rows: Sequence[str], pictures: Sequence[torch.Tensor]) -> Image.Image:
    """Pictures in a grid, with a name above each column and a caption left of each row.

    Args:
        columns: Names.
        rows: Captions; the first `GRID_ROWS` are shown.
        pictures: For each column uint8 of shape (rows, 3, height, width).
    """
    font = _font()
    height, width = pictures[0].shape[2:]
    scale = min(1.0, GRID_SIDE / max(height, width))
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    cell_width, cell_height = max(width, MIN_CELL_WIDTH), max(height, MIN_CELL_HEIGHT)
    shown = rows[:GRID_ROWS]
    grid = Image.new("RGB", (LABEL_WIDTH + len(columns) * cell_width, LABEL_HEIGHT + len(shown) * cell_height), "white")
    draw = ImageDraw.Draw(grid)
    for column, (name, drawn) in enumerate(zip(columns, pictures, strict=True)):
        x = LABEL_WIDTH + column * cell_width
        _write(draw, name, (x + 4, 4), cell_width - 8, LABEL_HEIGHT - 8, font)
        for row in range(len(shown)):
            image = Image.fromarray(drawn[row].permute(1, 2, 0).contiguous().numpy())
            grid.paste(image.resize((width, height), Image.Resampling.LANCZOS), (x, LABEL_HEIGHT + row * cell_height))
    for row, caption in enumerate(shown):
        _write(draw, caption, (4, LABEL_HEIGHT + row * cell_height + 4), LABEL_WIDTH - 8, cell_height - 8, font)
    return grid


def _write(draw: ImageDraw.ImageDraw, text: str, place: tuple[int, int], width: int, height: int, font: Font) -> None:
    """Write text into a box: wrapped at its width, cut off at its height."""
    character = FONT_SIZE * (0.55 if text.isascii() else 1.0)
    lines = textwrap.wrap(text, max(4, int(width / character)))[: max(1, int(height / (FONT_SIZE * 1.4)))]
    draw.multiline_text(place, "\n".join(lines), font=font, fill="black", spacing=2)


def _font() -> Font:
    for name in FONTS:
        try:
            return ImageFont.truetype(name, FONT_SIZE)
        except OSError:
            continue
    return ImageFont.load_default(FONT_SIZE)
