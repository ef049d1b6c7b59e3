"""Decoding within limits: unchanged where a picture fits, and in slices, then in tiles, where it doesn't."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from conftest import CHECKOUT
from diffusers import AutoencoderKLFlux2

from ernie_image_nf4.memory import vae_tiling
from ernie_image_nf4.memory.requirements import DECODE_BYTES_PER_PIXEL
from ernie_image_nf4.memory.vae_tiling import TilingRuntime, make_vae_tiled


@pytest.fixture
def vae() -> AutoencoderKLFlux2:
    return load_vae()


def load_vae() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2.from_pretrained(Path(CHECKOUT) / "vae").float().eval()


def latents(count: int, size: int) -> torch.Tensor:
    """Of pictures of `size` x `size`, smooth as those of a picture."""
    noise = torch.randn(count, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(noise, size // 8, mode="bicubic")


def budget(pixels: int) -> int:
    """Bytes in which so many pixels just fit in float32."""
    return int(2 * pixels * DECODE_BYTES_PER_PIXEL)


@torch.no_grad()
def decode(vae: AutoencoderKLFlux2, z: torch.Tensor) -> torch.Tensor:
    return vae.decode(z, return_dict=False)[0]


def test_what_fits_is_decoded_as_upstream_does(vae):
    z = latents(2, 64)
    expected = decode(vae, z)
    make_vae_tiled(vae, budget=budget(2 * 64 * 64))
    assert isinstance(vae, AutoencoderKLFlux2)
    assert torch.equal(decode(vae, z), expected)


def test_pictures_that_fit_one_by_one_are_decoded_one_by_one(vae):
    z = latents(2, 64)
    expected = [decode(vae, row[None]) for row in z]
    seen = []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    make_vae_tiled(vae, budget=budget(64 * 64))
    assert torch.equal(decode(vae, z), torch.cat(expected))
    assert seen == [(1, 32, 8, 8)] * 2


def test_a_picture_that_does_not_fit_is_decoded_in_tiles_and_nearly_the_same(vae, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vae_tiling, "TILE", 128)
    z = latents(1, 192)
    expected = decode(vae, z)
    largest = []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: largest.append(max(inputs[0].shape[-2:])))
    make_vae_tiled(vae, budget=budget(128 * 128))
    tiled = decode(vae, z)
    assert max(largest) == 128 // 8
    assert tiled.shape == expected.shape
    error = (tiled - expected).square().mean()
    assert 10 * torch.log10(4 / error) > 30  # dB; values are in [-1, 1]


def test_without_a_budget_the_memory_that_is_free_decides_for_each_call(vae, monkeypatch: pytest.MonkeyPatch):
    free, seen = [0], []
    monkeypatch.setattr(vae_tiling, "free_memory", lambda device: free[0])
    vae.decoder.register_forward_pre_hook(lambda *_: seen.append(vae.use_tiling))
    make_vae_tiled(vae)
    for free[0] in (0, budget(64 * 64), None):
        decode(vae, latents(1, 64))
    assert seen == [True, False, False]
    assert not vae.use_tiling


def test_tiling_that_the_user_chose_stays(vae):
    make_vae_tiled(vae)
    vae.enable_tiling()
    decode(vae, latents(1, 64))
    assert vae.use_tiling


def test_memory_is_freed_before_it_is_asked_for(vae, monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(vae_tiling, "free_memory", lambda device: calls.append("free_memory"))
    make_vae_tiled(vae, before_decode=lambda: calls.append("before_decode"))
    decode(vae, latents(1, 64))
    assert calls[0] == "before_decode"
    assert "free_memory" in calls


def test_settings_are_restored_after_an_error(vae):
    make_vae_tiled(vae, budget=0)
    with pytest.raises(RuntimeError):
        decode(vae, torch.zeros(1, 3, 8, 8))
    assert not vae.use_tiling
    assert not vae.use_slicing


def test_it_is_saved_as_upstreams_class(vae, tmp_path: Path):
    make_vae_tiled(vae)
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderKLFlux2.from_pretrained(tmp_path)
    assert type(loaded) is AutoencoderKLFlux2
    assert loaded.config._class_name == "AutoencoderKLFlux2"
    assert torch.equal(decode(loaded, latents(1, 64)), decode(vae, latents(1, 64)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda vae: pickle.loads(pickle.dumps(vae))])
def test_a_copy_decodes_with_its_own_weights_and_without_a_budget(vae, copied):
    make_vae_tiled(vae, budget=0, before_decode=lambda: None)
    twin = copied(vae)
    assert twin.runtime == TilingRuntime()
    assert torch.equal(decode(twin, latents(1, 64)), decode(vae, latents(1, 64)))
    before = decode(vae, latents(1, 64))
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    assert not decode(twin, latents(1, 64)).any()
    assert torch.equal(decode(vae, latents(1, 64)), before)


def test_a_deleted_vae_frees_its_weights_without_the_garbage_collector():
    vae = load_vae()
    make_vae_tiled(vae, before_decode=lambda: None)
    decode(vae, latents(1, 64))
    weights = [weakref.ref(weight) for weight in vae.parameters()]
    gc.disable()
    try:
        del vae
        assert not any(weight() is not None for weight in weights)
    finally:
        gc.enable()
