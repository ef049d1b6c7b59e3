"""The pictures from which the example is to teach a new object, and those that show whether it did."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import lora_teach
from training.scenes import BACKGROUNDS, OBJECTS


@pytest.fixture
def camel() -> Iterator[int]:
    OBJECTS.append(lora_teach.NAMES)
    yield len(OBJECTS) - 1
    OBJECTS.pop()


def test_what_is_drawn_was_not_taught(camel):
    taught, held_out = lora_teach.make_scenes(6)
    assert len(set(taught)) == lora_teach.PICTURES
    assert len(set(held_out)) == 6
    assert not set(taught) & set(held_out)
    assert all(set(scene.objects) == {-1, camel} for scene in (*taught, *held_out))


def test_each_picture_shows_the_object_and_its_caption_names_it(camel, tmp_path):
    taught, _ = lora_teach.make_scenes(6)
    sprite = torch.zeros(1, 4, 128, 128)
    sprite[:, (1, 3)] = 1.0  # green
    lora_teach.write_pictures(tmp_path / "pictures", taught, sprite)
    for number, scene in enumerate(taught):
        caption = (tmp_path / "pictures" / f"{number:02d}.txt").read_text(encoding="utf-8")
        assert ("camel", "骆驼")[number % 2] in caption
        with Image.open(tmp_path / "pictures" / f"{number:02d}.png") as image:
            pixels = np.asarray(image).astype(int)
        assert pixels.shape == (256, 256, 3)
        green = (pixels[..., 1] > 200) & (pixels[..., [0, 2]].max(-1) < 60)
        assert 0.05 < green.mean() < 0.5, BACKGROUNDS[scene.background]
