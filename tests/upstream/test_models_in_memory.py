"""What loading takes over from ``from_pretrained``, and what is left of it when a name of upstream is gone."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from ernie_image_nf4.upstream import gone, models_in_memory
from ernie_image_nf4.upstream.models_in_memory import forget_nf4_loading, nf4_quantizer, persistent_tensors

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    gone.note_gone.cache_clear()
    caplog.set_level(logging.INFO, gone.__name__)
    return caplog


class Model(nn.Module):
    """A layer under two names, a parameter of its own, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.second = self.first
        self.norm = nn.BatchNorm1d(2)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("kept", torch.zeros(3))
        self.register_buffer("computed", torch.zeros(4), persistent=False)


def test_persistent_tensors_are_those_of_the_state_dict():
    model = Model()
    tensors = persistent_tensors(model)
    assert set(tensors) == set(model.state_dict()) == {
        *("first.weight", "second.weight", "scale", "kept", "norm.weight", "norm.bias"),
        *("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"),
    }  # fmt: skip
    assert tensors["second.weight"] is model.first.weight


def test_nf4_layers_without_weights_are_not_asked_for_states():
    layer = nn.Sequential(Linear4bit(64, 64, bias=False, device="meta"), nn.BatchNorm1d(64))
    assert "0.weight" in persistent_tensors(layer)


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
@pytest.mark.parametrize("pre_quantized", [True, False])
def test_the_quantizer_is_the_library_s_own(library: str, pre_quantized: bool):
    quantizer = nf4_quantizer(library, dict(NF4), pre_quantized=pre_quantized)
    assert type(quantizer).__module__.startswith(f"{library}.quantizers.")
    assert quantizer.pre_quantized == pre_quantized
    assert quantizer.quantization_config.load_in_4bit


def with_conversions() -> tuple[SimpleNamespace, SimpleNamespace]:
    loading = models_in_memory.nf4_integration.Bnb4bitDeserialize(None)
    of_nf4, renaming = SimpleNamespace(operations=[loading]), SimpleNamespace()
    return SimpleNamespace(_weight_conversions=[of_nf4, renaming]), renaming


def test_the_step_that_cannot_be_undone_is_forgotten():
    model, renaming = with_conversions()
    forget_nf4_loading(model)
    assert model._weight_conversions == [renaming]


def test_without_the_name_of_that_step_nothing_is_taken_out(monkeypatch: pytest.MonkeyPatch, notes):
    model, _ = with_conversions()
    monkeypatch.delattr(models_in_memory.nf4_integration, "Bnb4bitDeserialize")
    forget_nf4_loading(model)
    assert len(model._weight_conversions) == 2
    assert [record.levelname for record in notes.records] == ["INFO"]


def test_a_model_without_noted_conversions_stays_as_it_is():
    model = nn.Linear(2, 2)
    before = dict(vars(model))
    forget_nf4_loading(model)
    assert vars(model) == before
