"""The mini's pictures have clean corners: 200 plain scenes drawn and 200 reconstructed, in training/corners.png."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from conftest import CHECKOUT
from PIL import Image

from training.blemishes import COUNT, from_sheet
from training.corners import BESIDE, CORNERS, SIZE, corner_errors

LARGEST = 2.0  # of 255
APART = 0.5  # how far the means of two corners may be from each other


@pytest.fixture(scope="module")
def errors() -> dict[str, torch.Tensor]:
    """For drawn and reconstructed pictures the mean absolute difference of each corner to its background."""
    with Image.open(CHECKOUT / "training" / "corners.png") as sheet:
        tiles = from_sheet(torch.from_numpy(np.array(sheet)), SIZE, SIZE + BESIDE)
    drawn, reconstructed = corner_errors(tiles).split(COUNT)
    assert drawn.shape == reconstructed.shape == (COUNT, len(CORNERS))
    return {"drawn": drawn, "reconstructed": reconstructed}


@pytest.mark.parametrize("made", ["drawn", "reconstructed"])
def test_no_corner_is_far_from_its_background(errors, made):
    assert errors[made].max() <= LARGEST


@pytest.mark.parametrize("made", ["drawn", "reconstructed"])
def test_no_corner_is_further_from_it_than_the_others(errors, made):
    means = errors[made].mean(0)
    assert means.max() - means.min() <= APART


def test_the_page_says_how_far_the_furthest_is(errors):
    page = " ".join((CHECKOUT / "training" / "README.md").read_text(encoding="utf-8").split())
    said = re.search(r"none is more than ([\d.]+) of 255 levels from its background", page)
    assert said
    assert 0 <= float(said[1]) - max(each.max().item() for each in errors.values()) < 0.1
