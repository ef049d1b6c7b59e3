"""Stage 3: the judge. A small convolutional network that names background and objects of a rendered scene.

    python -m training.classifier training/work --steps 4000

It sees pictures at 128x128 and answers the background and, for left, center and right, the object or nothing. It is
trained on training scenes only and must be right on 97% of new ones before it may judge what the mini draws.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .models import Budget, learning_rate_factor, set_learning_rate
from .scenes import BACKGROUNDS, OBJECTS, PLACES, Scene, load_sprites, render, sample_scene

SIZE, BATCH = 128, 256
NOTHING = len(OBJECTS)


class SceneClassifier(nn.Module):
    """(batch, 3, 128, 128) pictures in [-1, 1] to logits: background (batch, 15), objects (batch, 3, objects + 1)."""

    def __init__(self, widths: tuple[int, ...] = (48, 96, 192, 256, 384)) -> None:
        super().__init__()
        layers, before = [], 3
        for width in widths:
            layers += [_convolution(before, width, stride=2), _convolution(width, width, stride=1)]
            before = width
        self.features = nn.Sequential(*layers)
        self.background = nn.Linear(before, len(BACKGROUNDS))
        self.objects = nn.Linear(before * 4 * 4, len(PLACES) * (NOTHING + 1))

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(pictures)
        objects = self.objects(F.dropout(features.flatten(1), 0.2, self.training))
        return self.background(features.mean((2, 3))), objects.view(-1, len(PLACES), NOTHING + 1)


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


@dataclass(frozen=True)
class Seen:
    """What the classifier saw, one entry a picture: background index, and object index or -1 for the three places."""

    backgrounds: list[int]
    objects: list[tuple[int, int, int]]


@torch.no_grad()
def classify(classifier: SceneClassifier, pictures: torch.Tensor) -> Seen:
    """Pictures (batch, 3, size, size) in [-1, 1], any size that is a multiple of 128."""
    backgrounds, objects = [], []
    for batch in pictures.split(128):
        background, slots = classifier(F.avg_pool2d(batch.float(), batch.shape[-1] // SIZE))
        backgrounds += background.argmax(-1).tolist()
        objects += [tuple(-1 if item == NOTHING else item for item in row) for row in slots.argmax(-1).tolist()]
    return Seen(backgrounds, objects)


def accuracies(seen: Seen, scenes: list[Scene]) -> dict[str, float]:
    """Fractions right: ``background`` and ``place`` (occupied places are those asked for) of scenes, ``object`` of all
    objects asked for (the right object at its place)."""
    triples = [(row, place, item) for row, scene in enumerate(scenes) for item, _, place in scene.triples()]
    places = [
        [item >= 0 for item in row] == [item >= 0 for item in scene.objects]
        for row, scene in zip(seen.objects, scenes, strict=True)
    ]
    return {
        "background": sum(a == scene.background for a, scene in zip(seen.backgrounds, scenes, strict=True))
        / len(scenes),
        "place": sum(places) / len(scenes),
        "object": sum(seen.objects[row][place] == item for row, place, item in triples) / len(triples),
    }


def degrade(pictures: torch.Tensor) -> torch.Tensor:
    """Blur, noise and brightness as drawn pictures may have them, so that the judge looks at shapes, not at pixels."""
    count, device = len(pictures), pictures.device
    blurred = F.interpolate(F.avg_pool2d(pictures, 2), scale_factor=2.0, mode="bilinear")
    amount = torch.rand(count, 1, 1, 1, device=device) * (torch.rand(count, 1, 1, 1, device=device) < 0.5)
    pictures = pictures + (blurred - pictures) * amount
    noise = torch.randn_like(pictures) * torch.rand(count, 1, 1, 1, device=device) * 0.08
    gain = 1 + (torch.rand(count, 3, 1, 1, device=device) - 0.5) * 0.1
    return (pictures * gain + noise).clamp(-1, 1)


def scene_pool(sprites: torch.Tensor, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`count` training scenes at 128x128, rendered once: rendering each anew takes most of a step.

    Returns:
        Pictures (count, 3, 128, 128) uint8, backgrounds (count,) and objects (count, 3) with ``NOTHING`` for none, all
        on the device of `sprites`.
    """
    rng, generator = random.Random(seed), torch.Generator(sprites.device).manual_seed(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    pictures = torch.empty(count, 3, SIZE, SIZE, dtype=torch.uint8, device=sprites.device)
    for start in range(0, count, BATCH):
        part = render(scenes[start : start + BATCH], sprites, SIZE, generator)
        pictures[start : start + len(part)] = part.add(1).mul(127.5).round()
    backgrounds = torch.tensor([scene.background for scene in scenes], device=sprites.device)
    objects = torch.tensor([scene.objects for scene in scenes], device=sprites.device)
    return pictures, backgrounds, torch.where(objects < 0, NOTHING, objects)


def train(classifier: SceneClassifier, sprites: torch.Tensor, budget: Budget, scenes: int) -> None:
    """Train in place on `scenes` rendered scenes, degraded anew at each step."""
    pictures, backgrounds, objects = scene_pool(sprites, scenes, seed=11)
    print(f"classifier: scenes ready in {budget.elapsed():.0f} s", flush=True)
    optimizer = torch.optim.AdamW(classifier.parameters(), 2e-3, weight_decay=0.02, fused=sprites.is_cuda)
    classifier.train()
    step = 0
    while (progress := budget.progress(step)) < 1:
        set_learning_rate(optimizer, 2e-3 * learning_rate_factor(step, progress, 100))
        rows = torch.randint(scenes, (BATCH,), device=sprites.device)
        batch = degrade(pictures[rows].float().div(127.5).sub(1))
        with torch.autocast(sprites.device.type, torch.bfloat16):
            background, slots = classifier(batch.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(background.float(), backgrounds[rows]) + F.cross_entropy(
            slots.float().flatten(0, 1), objects[rows].flatten(), label_smoothing=0.02
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 500 == 0:
            print(f"classifier step {step} loss {loss.item():.4f} {budget.elapsed():.0f} s", flush=True)
        step += 1
    print(f"classifier: {step} steps in {budget.elapsed():.0f} s", flush=True)
    classifier.eval()


def evaluate(classifier: SceneClassifier, sprites: torch.Tensor, size: int, count: int = 2048) -> dict[str, float]:
    """Accuracies on `count` rendered scenes that are all held-out combinations."""
    rng, generator = random.Random(12), torch.Generator(sprites.device).manual_seed(12)
    scenes = [sample_scene(rng, held_out=True) for _ in range(count)]
    seen = Seen([], [])
    for start in range(0, count, 128):
        part = classify(classifier, render(scenes[start : start + 128], sprites, size, generator))
        seen = Seen(seen.backgrounds + part.backgrounds, seen.objects + part.objects)
    return accuracies(seen, scenes)


def main() -> None:
    started = time.time()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seconds", type=float, help="train until this long after the start, instead of --steps")
    parser.add_argument("--scenes", type=int, default=200_000)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    sprites = load_sprites(arguments.work / "sprites.npz", arguments.device)
    classifier = SceneClassifier().to(arguments.device, memory_format=torch.channels_last)
    train(classifier, sprites, Budget(arguments.steps, arguments.seconds, started=started), arguments.scenes)
    from safetensors.torch import save_file

    save_file(
        {name: value.contiguous() for name, value in classifier.state_dict().items()},
        arguments.work / "classifier.safetensors",
    )
    for size in (256, 512):
        print(f"classifier at {size}: {evaluate(classifier, sprites, size)}", flush=True)


def load_classifier(path: Path, device: str) -> SceneClassifier:
    """The trained classifier, in eval mode."""
    from safetensors.torch import load_file

    classifier = SceneClassifier()
    classifier.load_state_dict(load_file(path))
    return classifier.eval().to(device)


if __name__ == "__main__":
    main()
