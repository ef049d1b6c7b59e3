"""Whether examples/train_lora.py teaches the mini an object that it doesn't know, from 20 rendered pictures.

    python -m benchmarks.lora_teach --work /tmp/teach --output benchmarks/lora_teach.json --grid docs/lora-teach.jpg

The object is a camel, which is none of the mini's 173. Its picture is rendered from the Noto Color Emoji font (SIL Open
Font License) to ``WORK/camel.npz`` unless it is there. The LoRA is then drawn with at combinations of background and
place that none of the 20 pictures has, and with the known objects that a prompt asks for, whose pictures should stay.
The grid: above without the LoRA, below with it, from the same noise.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1]))  # Import from the checkout, installed or not

from benchmarks.children import run
from benchmarks.quantize_full_size import machine
from ernie_image_nf4 import load, load_lora
from training.scenes import BACKGROUNDS, OBJECTS, Scene, caption, load_sprites, render
from training.sprites import FONT, FONT_SIZE, render_sprite

CHECKOUT = Path(__file__).parents[1]
CODE, NAMES = "1F42A", {"en": ["camel"], "zh": ["骆驼"]}
PICTURES, SIZE = 20, 256
KNOWN = ("a rocket in the center, on a blue background", "a red apple on the left and a fox on the right, in the snow")
LANGUAGES = ("en", "zh")


def main() -> None:
    arguments = parse()
    arguments.work.mkdir(parents=True, exist_ok=True)
    OBJECTS.append(NAMES)  # so that captions know its name
    taught, held_out = make_scenes(arguments.new)
    captions = write_pictures(arguments.work / "pictures", taught, find_sprite(arguments.work))
    began = time.perf_counter()
    file = train(arguments)
    seconds = time.perf_counter() - began
    rng = random.Random(1)
    prompts = [*(caption(scene, LANGUAGES[n % 2], rng) for n, scene in enumerate(held_out)), *KNOWN]
    rows = draw(file, prompts, arguments.device)
    make_image_grid([picture for row in rows for picture in row], 2, len(prompts)).save(arguments.grid)
    result = {
        "command": " ".join(["python", "-m", "benchmarks.lora_teach", *sys.argv[1:]]),
        "captions": captions,
        "settings": {"rank": arguments.rank, "steps": arguments.steps, "batch_size": arguments.batch_size,
                     "learning_rate": arguments.learning_rate, "size": SIZE},
        "train_s": round(seconds, 1),
        "prompts": prompts,
        "machine": machine(),
    }  # fmt: skip
    arguments.output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures and the LoRA")
    parser.add_argument("--output", type=Path, default=Path("lora_teach.json"))
    parser.add_argument("--grid", type=Path, default=Path("lora_teach.jpg"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--new", type=int, default=6, help="prompts of the object that were not taught")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def make_scenes(new: int) -> tuple[list[Scene], list[Scene]]:
    """Scenes of the last object alone to teach, and others, none of them the same."""
    every = [
        Scene(background, tuple(len(OBJECTS) - 1 if place == own else -1 for place in range(3)))
        for background in range(len(BACKGROUNDS))
        for own in range(3)
    ]
    random.Random(0).shuffle(every)
    return every[:PICTURES], every[PICTURES : PICTURES + new]


def find_sprite(work: Path) -> torch.Tensor:
    """The object's picture, (1, 4, 128, 128), as of `load_sprites`."""
    file = work / "camel.npz"
    if not file.exists():
        np.savez(file, sprites=render_sprite(CODE, ImageFont.truetype(FONT, FONT_SIZE))[None])
    return load_sprites(file, "cpu")


def write_pictures(folder: Path, scenes: Sequence[Scene], sprite: torch.Tensor) -> list[str]:
    """Pictures of scenes with their captions beside them, half in each language; returns the captions."""
    folder.mkdir(exist_ok=True)
    sprites = torch.cat([torch.zeros(len(OBJECTS) - 1, *sprite.shape[1:]), sprite])
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    captions = []
    for number, scene in enumerate(scenes):
        pixels = render([scene], sprites, SIZE, generator)[0].add(1).mul(127.5).round().byte()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{number:02d}.png")
        captions.append(caption(scene, LANGUAGES[number % 2], rng))
        (folder / f"{number:02d}.txt").write_text(captions[-1] + "\n", encoding="utf-8")
    return captions


def train(arguments: argparse.Namespace) -> Path:
    """Run the example as its users do; returns the LoRA."""
    output = arguments.work / "camel"
    options = {"model": CHECKOUT, "output": output, "device": arguments.device, "resolution": SIZE,
               "steps": arguments.steps, "save-every": arguments.steps, "batch-size": arguments.batch_size,
               "rank": arguments.rank, "learning-rate": arguments.learning_rate}  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    script = CHECKOUT / "examples" / "train_lora.py"
    run([sys.executable, str(script), str(arguments.work / "pictures"), *words], check=True)
    return output / f"{output.name}.safetensors"


def draw(file: Path, prompts: Sequence[str], device: str) -> list[list[Image.Image]]:
    """Pictures of the prompts without the LoRA, and with it, from the same noise."""
    pipe = load(CHECKOUT, device=device, memory="resident", prompt_enhancer=False)
    pipe.set_progress_bar_config(disable=True)
    settings = {"height": SIZE, "width": SIZE, "num_inference_steps": 25, "guidance_scale": 4.0, "use_pe": False}
    rows = []
    for with_lora in (False, True):
        if with_lora:
            load_lora(pipe, file)
        rows.append(
            [
                pipe(prompt, generator=torch.Generator().manual_seed(number), **settings).images[0]
                for number, prompt in enumerate(prompts)
            ]
        )
    return rows


if __name__ == "__main__":
    main()
