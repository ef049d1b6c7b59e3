"""Stage 0: what the training machine needs and can't fetch: the objects' pictures, and words for noise in prompts.

    python -m training.sprites training/work --emojibase node_modules/emojibase-data

Pictures: every object of ``objects.json`` as 128x128 RGBA, from the Noto Color Emoji font (SIL Open Font License,
Debian's ``fonts-noto-color-emoji``), which holds one bitmap of 136x128 pixels a glyph. Words: the keywords that Unicode
CLDR gives to emoji in English and Chinese (npm's ``emojibase-data``, MIT), less those that name one of our objects.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

OBJECTS = Path(__file__).with_name("objects.json")
FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
FONT_SIZE = 109  # the only size that the font's bitmaps have
SPRITE_SIZE = 128


def load_objects() -> list[dict]:
    """The curated objects: code points, CLDR names, names used in captions (``en``, ``zh``), other words."""
    return json.loads(OBJECTS.read_text(encoding="utf-8"))


def render_sprite(code: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """One emoji, cut to its outline and fitted into the sprite: (128, 128, 4) uint8, straight alpha."""
    canvas = Image.new("RGBA", (200, 200))
    text = "".join(chr(int(point, 16)) for point in code.split("-"))
    ImageDraw.Draw(canvas).text((20, 20), text, font=font, embedded_color=True)
    glyph = canvas.crop(canvas.getchannel("A").getbbox())
    scale = (SPRITE_SIZE - 4) / max(glyph.size)
    glyph = glyph.resize((round(glyph.width * scale), round(glyph.height * scale)), Image.Resampling.LANCZOS)
    sprite = Image.new("RGBA", (SPRITE_SIZE, SPRITE_SIZE))
    # Standing on the lower edge, so that objects share a ground line whatever their height.
    sprite.paste(glyph, ((SPRITE_SIZE - glyph.width) // 2, SPRITE_SIZE - 2 - glyph.height))
    return np.asarray(sprite)


def noise_words(emojibase: Path, language: str) -> list[str]:
    """CLDR keywords of `language` that are no part of any object's name, sorted."""
    names = " ".join(
        name for item in load_objects() for key in (language, f"also_{language}") for name in item[key]
    ).lower()
    data = json.loads((emojibase / language / "data.json").read_text(encoding="utf-8"))
    words = {tag.lower() for entry in data for tag in entry.get("tags", ())}
    return sorted(word for word in words if word not in names and not any(character.isdigit() for character in word))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder for sprites.npz and words.json")
    parser.add_argument("--emojibase", type=Path, required=True, help="folder of the unpacked emojibase-data package")
    parser.add_argument("--font", default=FONT)
    arguments = parser.parse_args()
    font = ImageFont.truetype(arguments.font, FONT_SIZE)
    sprites = np.stack([render_sprite(item["code"], font) for item in load_objects()])
    arguments.output.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(arguments.output / "sprites.npz", sprites=sprites)
    words = {language: noise_words(arguments.emojibase, language) for language in ("en", "zh")}
    (arguments.output / "words.json").write_text(json.dumps(words, ensure_ascii=False), encoding="utf-8")
    print(f"{len(sprites)} sprites, {', '.join(f'{len(words[key])} words {key}' for key in words)}")


if __name__ == "__main__":
    main()
