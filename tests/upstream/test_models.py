"""Private names of the models' libraries: found where they are, and nothing breaks where they are gone."""

from __future__ import annotations

import importlib
import logging

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import ErnieImageTransformer2DModel
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from torch import nn
from transformers import Ministral3Config, Ministral3ForCausalLM
from transformers.models.ministral3 import modeling_ministral3
from transformers.models.ministral3.modeling_ministral3 import Ministral3Model

from ernie_image_nf4.upstream import gone, models, triton_cache
from ernie_image_nf4.upstream.offloading import hook_of


@pytest.fixture(autouse=True)
def fresh_names():
    looked_up = (models.ministral_attention_scale, gone.note_gone)
    for each in looked_up:
        each.cache_clear()
    yield
    for each in looked_up:
        each.cache_clear()


@pytest.fixture
def notes(caplog):
    """What has been logged at INFO: one line for each name that is gone."""
    caplog.set_level(logging.INFO, gone.__name__)
    return caplog


class WithoutNames(nn.Linear):
    """A module of a torch in which private attributes have other names."""

    GONE = ("_forward_hooks", "_forward_pre_hooks", "_compiled_call_impl")

    def __getattribute__(self, name: str):
        if name in type(self).GONE:
            raise AttributeError(name)
        return super().__getattribute__(name)


def module() -> nn.Module:
    return nn.Linear(2, 2)


def test_hooks_of_torch_diffusers_and_accelerate_are_seen():
    assert not models.is_hooked(module())
    after, before, wrapped, registered, replaced = (module() for _ in range(5))
    after.register_forward_hook(lambda *args: None)
    before.register_forward_pre_hook(lambda *args: None)
    add_hook_to_module(wrapped, ModelHook())
    HookRegistry.check_if_exists_or_initialize(registered).register_hook(DiffusersHook(), "any")
    replaced.forward = lambda x: x
    for each in (after, before, wrapped, registered, replaced):
        assert models.is_hooked(each)
    assert [models.is_hooked(each, except_offload=True) for each in (after, before, registered)] == [True] * 3
    assert not models.is_hooked(wrapped, except_offload=True)


@pytest.mark.parametrize("as_object", [True, False])
def test_a_pre_hook_that_is_accelerates_is_an_offloading_hook(as_object):
    class Hook(ModelHook):
        def __call__(self, module, args):
            self.pre_forward(module)

    offloaded, hook = module(), Hook()
    offloaded._hf_hook = hook
    offloaded.register_forward_pre_hook(hook if as_object else hook.__call__)
    assert hook_of(offloaded) is hook
    assert models.is_hooked(offloaded)
    assert not models.is_hooked(offloaded, except_offload=True)
    offloaded.register_forward_pre_hook(lambda *args: None)
    assert models.is_hooked(offloaded, except_offload=True)


def test_without_torchs_hooks_every_module_counts_as_hooked(notes):
    for _ in range(2):
        assert models.is_hooked(WithoutNames(2, 2))
    assert [record.levelname for record in notes.records] == ["INFO"]


def test_without_accelerates_name_a_wrapped_forward_still_counts():
    wrapped = module()
    add_hook_to_module(wrapped, ModelHook())
    del wrapped._hf_hook
    assert hook_of(wrapped) is None
    assert models.is_hooked(wrapped)


def test_compiled_modules_are_known(notes):
    layer = module()
    assert not models.is_compiled(layer)
    layer.compile(backend="eager")
    assert models.is_compiled(layer)
    assert not notes.records
    for _ in range(2):
        assert not models.is_compiled(WithoutNames(2, 2))
    assert len(notes.records) == 1


def test_a_tensor_that_is_written_to_has_another_version(notes):
    tensor = torch.zeros(2)
    version = models.version_of(tensor)
    assert models.version_of(tensor) == version
    tensor.add_(1)
    assert models.version_of(tensor) != version
    with torch.inference_mode():
        assert models.version_of(torch.zeros(2)) is None
    assert not notes.records


def test_without_versions_every_one_is_another(notes):
    class Tensor:
        def is_inference(self) -> bool:
            return False

    tensor = Tensor()
    assert models.version_of(tensor) != models.version_of(tensor)
    assert len(notes.records) == 1


def test_diffusers_attention_dispatch_is_found_or_gone(monkeypatch, notes):
    query = torch.randn(1, 5, 2, 8)
    expected = nn.functional.scaled_dot_product_attention(*[query.transpose(1, 2)] * 3).transpose(1, 2)
    torch.testing.assert_close(models.attention_dispatch()(query, query, query), expected)
    assert not notes.records
    monkeypatch.delattr(importlib.import_module(models.ATTENTION_DISPATCH), "dispatch_attention_fn")
    assert models.attention_dispatch() is None
    monkeypatch.setattr(models, "ATTENTION_DISPATCH", "diffusers.elsewhere")
    assert models.attention_dispatch() is None
    assert len(notes.records) == 2


def test_the_attention_backend_of_a_model_is_found_or_the_default():
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=1, ffn_hidden_size=32, in_channels=4, out_channels=4,
        text_in_dim=8, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    attention = transformer.layers[0].self_attention
    assert models.attention_backend(attention) == {"backend": None, "parallel_config": None}
    transformer.set_attention_backend("native")
    assert models.attention_backend(attention)["backend"] == "native"
    attention.processor = object()
    assert models.attention_backend(attention) == {"backend": None, "parallel_config": None}


def test_the_attention_implementation_is_found_or_none(notes):
    config = Ministral3Config(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    assert models.attention_implementation(Ministral3ForCausalLM(config).config) == "sdpa"
    assert not notes.records
    assert models.attention_implementation(object()) is None
    assert len(notes.records) == 1


def test_the_caches_argument_is_found_by_either_name_or_none(notes):
    assert models.cache_argument(Ministral3Model.forward) in ("cache", "past_key_values")
    assert models.cache_argument(lambda ids, cache=None: None) == "cache"
    assert models.cache_argument(lambda ids, past_key_values=None: None) == "past_key_values"
    assert not notes.records
    assert models.cache_argument(lambda ids: None) is None
    assert len(notes.records) == 1


def test_custom_generate_is_found_or_not(notes):
    assert models.supports_custom_generate(Ministral3ForCausalLM.generate)
    assert not notes.records
    assert not models.supports_custom_generate(lambda **kwargs: None)
    assert len(notes.records) == 1


def test_the_attention_scale_is_found_or_none(monkeypatch, notes):
    scale = models.ministral_attention_scale()
    positions = torch.tensor([[0, 20]])
    if scale.positions == "cache_position":
        positions = positions[0]
    assert scale.compute(positions, 0.1, 16).flatten().tolist() == pytest.approx([1, 1 + 0.1 * 0.6931472])
    assert not notes.records
    models.ministral_attention_scale.cache_clear()
    monkeypatch.delattr(modeling_ministral3, scale.compute.__name__)
    assert models.ministral_attention_scale() is None
    assert len(notes.records) == 1


def test_an_attention_with_arguments_that_are_not_known_has_no_scale(monkeypatch, notes):
    def forward(self, hidden_states, position_embeddings, attention_mask, another): ...

    monkeypatch.setattr(modeling_ministral3.Ministral3Attention, "forward", forward)
    assert models.ministral_attention_scale() is None
    assert len(notes.records) == 1


def test_triton_hashes_its_files_ahead_or_with_the_first_kernel(monkeypatch, caplog):
    cache, called = type("cache", (), {}), []
    cache.triton_key = lambda: called.append(True)
    monkeypatch.setattr(triton_cache, "importlib", type("importlib", (), {"import_module": lambda name: cache}))
    triton_cache.prepare_triton()
    assert called
    del cache.triton_key
    with caplog.at_level(logging.INFO, triton_cache.__name__):
        triton_cache.prepare_triton()
    assert [record.levelname for record in caplog.records] == ["INFO"]
