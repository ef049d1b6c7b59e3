"""Metrics of pictures: known values, and why one isn't available."""

from __future__ import annotations

import math
import socket
import sys

import pytest
import torch

from ernie_image_nf4.evaluation.metrics import METRICS, MetricUnavailable, check_cached, find_metrics, psnr


def test_psnr_and_ssim_of_known_pictures():
    metrics, _ = find_metrics(torch.device("cpu"), 2, download=False)
    pictures = torch.randint(0, 200, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    lighter = pictures + torch.tensor([5, 50], dtype=torch.uint8).view(2, 1, 1, 1)
    assert metrics["psnr"](pictures, lighter, ["", ""]) == pytest.approx([34.1514, 14.1514], abs=1e-4)
    one, other = metrics["ssim"](pictures, lighter, ["", ""])
    assert 1 > one > other > 0


def test_psnr_is_ten_times_the_logarithm_of_squared_range_over_squared_error():
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (3, 3, 16, 48), dtype=torch.uint8, generator=generator)
    others = torch.randint(0, 256, pictures.shape, dtype=torch.uint8, generator=generator)
    others[2] = pictures[2]
    errors = (pictures.double() - others.double()).square().mean((1, 2, 3)).tolist()
    expected = [10 * math.log10(255**2 / error) for error in errors[:2]]
    assert psnr(pictures, others) == pytest.approx([*expected, math.inf], abs=1e-5)


def test_without_torchmetrics_no_metric_of_its_own_is_available(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    metrics, statuses = find_metrics(torch.device("cpu"), 2, download=False)
    assert not {"psnr", "ssim"} & metrics.keys()
    for name in ("psnr", "ssim"):
        assert statuses[name].reason == "torchmetrics is not installed: `pip install ernie-image-nf4[evaluate]`"


def test_metrics_that_cannot_be_had_say_why_and_download_nothing(monkeypatch, tmp_path):
    def refuse(*_):
        pytest.fail("a metric went to the network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    metrics, statuses = find_metrics(torch.device("cpu"), 100, download=False)
    assert statuses.keys() == METRICS.keys()
    assert {name for name, status in statuses.items() if status.reason is None} == metrics.keys()
    for name in ("lpips", "fid", "kid"):
        assert "is not there" in statuses[name].reason or "is not installed" in statuses[name].reason


def test_a_network_is_taken_from_the_local_cache_or_with_leave_downloaded(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MetricUnavailable, match=r"checkpoints/net\.pth is not there: allow the download"):
        check_cached("https://example.com/net.pth", download=False)
    check_cached("https://example.com/net.pth", download=True)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "net.pth").touch()
    check_cached("https://example.com/net.pth", download=False)


def test_shift_tolerant_lpips_grows_with_noise():
    pytest.importorskip("stlpips_pytorch")
    metrics, _ = find_metrics(torch.device("cpu"), 2, download=False)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)
    noisy = (pictures.float() + 20 * torch.randn(pictures.shape, generator=generator)).clamp(0, 255).byte()
    assert metrics["st_lpips"](pictures, pictures, ["a", "b"]) == [0, 0]
    assert all(value > 0.01 for value in metrics["st_lpips"](pictures, noisy, ["a", "b"]))


def test_distances_between_sets_need_a_hundred_pictures():
    _, statuses = find_metrics(torch.device("cpu"), 99, download=False)
    assert statuses["fid"].reason == "compares sets of at least 100 pictures, here are 99"
