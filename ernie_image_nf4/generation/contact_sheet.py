"""All pictures of a folder in one overview."""

from __future__ import annotations

import math
from pathlib import Path

from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageOps

from .image_file import replacing, writing
from .manifest import MANIFEST, read_manifest

CONTACT_SHEET = "contact-sheet.png"
SHEET_PIXELS, THUMBNAIL_PIXELS = 8192, 256  # longest side of the sheet, and of a picture in it


def save_contact_sheet(folder: Path) -> Path | None:
    """Write the pictures of a manifest as numbered thumbnails. Returns the file, None if there are no pictures."""
    records = [record for record in read_manifest(folder / MANIFEST) if record.error is None]
    files = [folder / record.file for record in records if (folder / record.file).exists()]
    if not files:
        return None
    columns = math.ceil(math.sqrt(len(files)))
    rows = math.ceil(len(files) / columns)
    side = min(THUMBNAIL_PIXELS, SHEET_PIXELS // columns)
    thumbnails = [Image.new("RGB", (side, side), "white") for _ in range(rows * columns)]
    for thumbnail, file in zip(thumbnails, files, strict=False):
        with Image.open(file) as image:
            thumbnail.paste(ImageOps.pad(image.convert("RGB"), (side, side), color="white"))
        number = file.stem.partition("-")[0]
        ImageDraw.Draw(thumbnail).text((4, 2), number, fill="white", stroke_fill="black", stroke_width=1)
    with writing(folder / CONTACT_SHEET), replacing(folder / CONTACT_SHEET) as temporary:
        make_image_grid(thumbnails, rows, columns).save(temporary, format="PNG")
    return folder / CONTACT_SHEET
