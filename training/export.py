"""Stage 6: put the trained parts together as an original-precision repository, and quantize it, calibrated.

python -m training.export training/work          # work/original -> work/nf4
python -m training.export training/work --install .   # and copy the component folders into the checkout
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

import diffusers

from ernie_image_nf4 import quantize
from ernie_image_nf4.repository.components import (
    COMPONENT,
    COMPONENTS,
    METADATA,
    MODEL_INDEX,
    PIPELINE_CLASS,
    PROMPT_ENHANCER,
)
from ernie_image_nf4.repository.metadata import Recommended

from .scenes import caption, sample_scene

NAME = "ERNIE-Image-NF4 mini"
RECOMMENDED = Recommended(height=256, width=256, num_inference_steps=25, guidance_scale=4.0)
CALIBRATION_PROMPTS = 64


def write_model_index(original: Path) -> None:
    """``model_index.json`` as the release has it, and a card with the licence, which goes into what is made of it."""
    (original / "README.md").write_text(
        "---\nlicense: apache-2.0\n---\n\n# The mini in original precision\n", encoding="utf-8"
    )
    index: dict[str, object] = {"_class_name": PIPELINE_CLASS, "_diffusers_version": diffusers.__version__}
    index |= {
        component.name: [component.library, component.class_name]
        for component in COMPONENTS
        if (original / component.name).exists()
    }
    (original / MODEL_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def name_rotary_embedding_as_release(text_encoder: Path) -> None:
    """Let the vision tower's rotary embedding be called "default", whatever this version of transformers calls it.

    It is never computed, and transformers 5.0 refuses the name that later ones write.
    """
    path = text_encoder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["vision_config"]["rope_parameters"]["rope_type"] = "default"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def add_enhancer(nf4: Path, other: Path) -> None:
    """Copy the prompt enhancer of the NF4 repository `other`, as it is, into one that has none."""
    for name in PROMPT_ENHANCER:
        shutil.rmtree(nf4 / name, ignore_errors=True)
        shutil.copytree(other / name, nf4 / name)
    for file, key in ((METADATA, "components"), (MODEL_INDEX, None)):
        ours, theirs = (json.loads((folder / file).read_text(encoding="utf-8")) for folder in (nf4, other))
        into, source = (ours[key], theirs[key]) if key else (ours, theirs)
        into |= {name: source[name] for name in PROMPT_ENHANCER}
        # In the order of the table of components, which is that of a repository made in one go.
        ordered = {name: value for name, value in into.items() if name not in COMPONENT}
        ordered |= {name: into[name] for name in COMPONENT}
        content = ours | {key: ordered} if key else ordered
        (nf4 / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def calibration_prompts() -> list[str]:
    """Captions of training scenes, English and Chinese in turn."""
    rng = random.Random(7)
    return [caption(sample_scene(rng), ("en", "zh")[number % 2], rng) for number in range(CALIBRATION_PROMPTS)]


def install(nf4: Path, checkout: Path) -> None:
    """Replace the checkout's component folders, ``model_index.json`` and metadata by those of `nf4`."""
    for component in COMPONENTS:
        shutil.rmtree(checkout / component.name, ignore_errors=True)
        shutil.copytree(nf4 / component.name, checkout / component.name)
    for name in (METADATA, MODEL_INDEX):
        shutil.copyfile(nf4 / name, checkout / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument(
        "--enhancer", type=Path, help="NF4 repository to take the prompt enhancer from, not trained anew"
    )
    parser.add_argument("--install", type=Path, help="checkout to copy the NF4 components into")
    arguments = parser.parse_args()
    original, nf4 = arguments.work / "original", arguments.work / "nf4"
    if original.exists():
        if arguments.enhancer:
            for name in PROMPT_ENHANCER:
                shutil.rmtree(original / name, ignore_errors=True)
        write_model_index(original)
        name_rotary_embedding_as_release(original / "text_encoder")
        shutil.rmtree(nf4, ignore_errors=True)
        quantize(original, nf4, name=NAME, recommended=RECOMMENDED, calibrate=calibration_prompts(), progress=False)
        if arguments.enhancer:
            add_enhancer(nf4, arguments.enhancer)
    if arguments.install:
        install(nf4, arguments.install)


if __name__ == "__main__":
    main()
