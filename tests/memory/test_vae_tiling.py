"""Decoding within limits: unchanged where a picture fits, and in slices, then in tiles, where it doesn't."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import CHECKOUT
from diffusers import AutoencoderKLFlux2

from ernie_image_nf4.memory import vae_tiling as decoding
from ernie_image_nf4.memory.vae_tiling import enable_tiling


@pytest.fixture
def vae() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2.from_pretrained(Path(CHECKOUT) / "vae").float().eval()


def latents(count: int, size: int) -> torch.Tensor:
    """Of pictures of `size` x `size`, smooth as those of a picture."""
    noise = torch.randn(count, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(noise, size // 8, mode="bicubic")


@torch.no_grad()
def decode(vae: AutoencoderKLFlux2, z: torch.Tensor) -> torch.Tensor:
    return vae.decode(z, return_dict=False)[0]


def test_what_fits_is_decoded_as_upstream_does(vae):
    z = latents(2, 64)
    expected = decode(vae, z)
    enable_tiling(vae, lambda pixels: True)
    assert torch.equal(decode(vae, z), expected)


def test_pictures_that_fit_one_by_one_are_decoded_one_by_one(vae):
    z = latents(2, 64)
    expected = [decode(vae, row[None]) for row in z]
    seen = []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    enable_tiling(vae, lambda pixels: pixels <= 64 * 64)
    assert torch.equal(decode(vae, z), torch.cat(expected))
    assert seen == [(1, 32, 8, 8)] * 2


def test_a_picture_that_does_not_fit_is_decoded_in_tiles_and_nearly_the_same(vae, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoding, "TILE", 128)
    z = latents(1, 192)
    enable_tiling(vae, lambda pixels: True)
    expected = decode(vae, z)
    largest = []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: largest.append(max(inputs[0].shape[-2:])))
    enable_tiling(vae, lambda pixels: pixels <= 128 * 128)
    tiled = decode(vae, z)
    assert max(largest) == 128 // 8
    assert tiled.shape == expected.shape
    error = (tiled - expected).square().mean()
    assert 10 * torch.log10(4 / error) > 30  # dB; values are in [-1, 1]


def test_the_choice_is_made_for_each_call(vae):
    room, seen = [0], []
    vae.decoder.register_forward_pre_hook(lambda *_: seen.append(vae.use_tiling))
    enable_tiling(vae, lambda pixels: pixels <= room[0])
    decode(vae, latents(1, 64))
    room[0] = 64 * 64
    decode(vae, latents(1, 64))
    assert seen == [True, False]


def test_tiling_that_the_user_chose_stays(vae):
    enable_tiling(vae, lambda pixels: True)
    vae.enable_tiling()
    decode(vae, latents(1, 64))
    assert vae.use_tiling
