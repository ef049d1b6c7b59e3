"""Whether the CPU has bfloat16, asked by the names that each version of PyTorch has."""

from __future__ import annotations

import logging
import platform

import pytest
import torch

from ernie_image_nf4.upstream.devices import cpu_has_bfloat16

ON_X86 = platform.machine().lower() in ("x86_64", "amd64")


@pytest.fixture(autouse=True)
def _with_onednn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)


@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize(("machine", "name"), [("x86_64", "avx512_bf16"), ("aarch64", "bf16")])
def test_the_capabilities_of_the_machine_say_it(monkeypatch: pytest.MonkeyPatch, machine: str, name: str, has: bool):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: has}, raising=False)
    assert cpu_has_bfloat16() is has


@pytest.mark.skipif(not ON_X86, reason="the private name is x86's")
@pytest.mark.parametrize("has", [True, False])
def test_a_pytorch_without_that_function_says_it_by_another(monkeypatch: pytest.MonkeyPatch, has: bool):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    assert cpu_has_bfloat16() is has


@pytest.mark.skipif(not ON_X86, reason="the private name is x86's")
def test_a_pytorch_without_either_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    with caplog.at_level(logging.INFO, logger="ernie_image_nf4"):
        assert cpu_has_bfloat16() is False
    assert "float32 is used" in caplog.text


def test_without_onednn_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert cpu_has_bfloat16() is False
