"""What buffers of the decoder and their captured steps hang on, and what becomes of them when it changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_prompt_enhancer import EOS, PAD, build, prompt
from torch import nn
from transformers import Ministral3ForCausalLM

from ernie_image_nf4.fast import decoder
from ernie_image_nf4.fast.prompt_enhancer import make_prompt_enhancer_fast


@pytest.fixture
def model() -> Ministral3ForCausalLM:
    model = build("cpu")
    make_prompt_enhancer_fast(model)
    return model


def buffers_of(model: Ministral3ForCausalLM) -> decoder.DecodeBuffers:
    """Those of a call, from whose steps others are captured on a GPU."""
    model.generate(**prompt(model, 1, 4), max_new_tokens=2, do_sample=False, pad_token_id=PAD, eos_token_id=EOS)
    return model.runtime.slot.buffers[512]


def exchange_weight(model: Ministral3ForCausalLM) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def write_into_norm(model: Ministral3ForCausalLM) -> None:
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.mul_(2)


def hook(model: Ministral3ForCausalLM) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("change", [exchange_weight, write_into_norm, hook])
def test_buffers_serve_until_the_model_is_another_one(model, change: Callable):
    before = buffers_of(model)
    assert buffers_of(model) is before
    change(model)
    after = buffers_of(model)
    assert after is not before
    assert buffers_of(model) is after


def test_buffers_go_when_the_model_leaves_their_device(model):
    before = buffers_of(model)
    model.to("cpu")
    assert buffers_of(model) is before
    model.to("meta")
    assert not model.runtime.slot.buffers
    assert model.runtime.batch is None


def test_adapters_and_their_strengths_are_part_of_a_step(model):
    peft = pytest.importorskip("peft")
    found = [buffers_of(model)]
    for name in ("one", "other"):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, model, name)
        found.append(buffers_of(model))
    layer = model.model.layers[0].self_attn.q_proj
    changes = [
        lambda: layer.set_adapter("one"),
        lambda: layer.set_scale("one", 3.0),
        lambda: layer.enable_adapters(False),
        lambda: layer.enable_adapters(True),
    ]
    for change in changes:
        change()
        found.append(buffers_of(model))
        assert buffers_of(model) is found[-1]
    assert len(set(map(id, found))) == len(found)


def test_steps_of_a_model_with_hooks_are_not_captured(model, monkeypatch):
    captured = []
    monkeypatch.setattr(decoder, "capture_decode_step", lambda *args: captured.append(args))
    buffers_of(model)
    model.runtime.slot.stream = object()  # as on a GPU
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    buffers_of(model)
    assert not captured
    handle.remove()
    buffers_of(model)
    assert len(captured) == 1


@pytest.mark.parametrize("tokens", [{"eos_token_id": -1}, {"eos_token_id": [EOS, 64]}, {"pad_token_id": -1}], ids=str)
def test_tokens_beyond_the_vocabulary_are_upstreams_affair(model, tokens):
    plain = build("cpu")
    last = plain.config.vocab_size - 1
    with torch.no_grad():  # the last token often comes, which -1 must not stand for
        plain.lm_head.weight[last] *= 3
        model.lm_head.weight[last] *= 3
    call = prompt(model, 1, 4) | {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS}
    assert model.decode_request(**call) is not None
    call |= tokens
    assert model.decode_request(**call) is None
    assert torch.equal(model.generate(**call), plain.generate(**call))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_to_another_dtype_texts_are_upstreams(device, dtype):
    model, plain = build(device), build(device)
    make_prompt_enhancer_fast(model)
    call = prompt(model, 1, 5) | {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    with torch.autocast(device, dtype):
        assert model.decode_request(**call) is None
        assert torch.equal(model.generate(**call), plain.generate(**call))
    assert model.decode_request(**call) is not None
    with torch.autocast(device, dtype):
        assert model.to(dtype).decode_request(**call) is not None  # the dtype that it has


def test_a_model_with_a_sliding_window_is_upstreams(model):
    plain, call = build("cpu"), prompt(model, 1, 30) | {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    for each in (model, plain):
        each.config.sliding_window = 8
    assert torch.equal(model.generate(**call), plain.generate(**call))


@pytest.mark.gpu
def test_a_default_device_changes_no_text():
    model = build("cuda")
    make_prompt_enhancer_fast(model)
    call = prompt(model, 1, 5) | {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    expected = model.generate(**call)
    with torch.device("cuda"):
        assert torch.equal(model.generate(**call), expected)
