"""What is measured in the corners of pictures before plain colours, and how the VAE is kept from hiding things."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from training.blemishes import first_command, from_sheet, to_sheet
from training.corners import BESIDE, SIZE, corner_errors, corner_tiles, plain_scenes
from training.models import Budget, build_vae, learning_rate_factor
from training.scenes import PLAIN
from training.vae import PEAK, Peaks


@pytest.mark.parametrize("corner", range(4))
def test_a_dot_in_a_corner_is_measured_there_and_nowhere_else(corner: int):
    pictures = torch.full((2, 3, 256, 256), 200, dtype=torch.uint8)
    rows = slice(4, 12) if corner < 2 else slice(-12, -4)
    columns = slice(4, 12) if corner % 2 == 0 else slice(-12, -4)
    pictures[1, :, rows, columns] = 160
    errors = corner_errors(corner_tiles(pictures))
    assert errors[0].tolist() == [0, 0, 0, 0]
    assert errors[1].tolist() == [10.0 if number == corner else 0 for number in range(4)]


def test_a_sheet_gives_its_corners_back():
    tiles = torch.randint(0, 256, (40, 4, 3, SIZE, SIZE + BESIDE), dtype=torch.uint8)
    assert torch.equal(from_sheet(torch.from_numpy(np.array(to_sheet(tiles))), SIZE, SIZE + BESIDE), tiles)


def test_plain_scenes_are_before_plain_colours():
    assert all(scene.background < len(PLAIN) for scene in plain_scenes(50, 1))


def test_the_first_command_is_the_readmes():
    assert "cat" in first_command()
    assert "paper" in first_command()


def test_every_norm_of_the_vae_has_groups_of_several_channels():
    norms = [module for module in build_vae().modules() if isinstance(module, nn.GroupNorm)]
    assert min(norm.num_channels // norm.num_groups for norm in norms) >= 4


def test_only_a_place_that_dominates_a_norm_costs():
    decoder = nn.Sequential(nn.GroupNorm(2, 8))
    peaks = Peaks(decoder)
    even = torch.randn(3, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    decoder(even)
    assert peaks.loss() == 0
    spiked = even.clone().requires_grad_()
    with torch.no_grad():
        spiked[:, :, -1, 0] = 100
    decoder(spiked)
    loss = peaks.loss()
    assert loss > np.log(500 / PEAK)
    loss.backward()
    assert (spiked.grad[:, :, -1, 0] > 0).all()
    peaks.remove()
    decoder(spiked)
    assert not peaks.excess


def test_a_budget_counts_steps_or_seconds_of_all_runs():
    assert Budget(10).progress(5) == 0.5
    budget = Budget(10, seconds=1000, spent=500)
    assert budget.progress(9) == pytest.approx(0.5, abs=0.01)
    assert Budget(10, seconds=5, spent=7).progress(0) == 1
    assert learning_rate_factor(0, 0.0, 100) == 0.01
    assert learning_rate_factor(500, 0.5, 100) == 1
    assert learning_rate_factor(500, 1.0, 100) == 0
