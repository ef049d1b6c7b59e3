"""A prefill without the modules is theirs, but for rounding."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import Ministral3Config, Ministral3ForCausalLM

from ernie_image_nf4 import load
from ernie_image_nf4.fast import decode_step, decoder, prefill
from ernie_image_nf4.fast.decode_step import DecodeStep
from ernie_image_nf4.fast.prompt_enhancer import FastPromptEnhancer, make_prompt_enhancer_fast

# Of the head alone kernels are needed.
STEP = DecodeStep(SimpleNamespace(), SimpleNamespace(head_product=F.linear), ())


def build(convert: Callable[[nn.Linear], nn.Linear]) -> FastPromptEnhancer:
    """A small prompt enhancer in float32, the same one each time but for its linear layers."""
    config = Ministral3Config(
        vocab_size=300, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, attn_implementation="sdpa",
    )  # fmt: skip
    config.rope_parameters |= {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 8}
    torch.manual_seed(0)
    model = Ministral3ForCausalLM(config).eval().requires_grad_(False)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, convert(linear))
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.copy_(1 + torch.randn(64) / 4)
    make_prompt_enhancer_fast(model)
    return model


def as_nf4(linear: nn.Linear) -> Linear4bit:
    made = Linear4bit(linear.in_features, linear.out_features, False, torch.float32, quant_type="nf4")
    made.weight = Params4bit(8 * linear.weight, requires_grad=False, quant_type="nf4").to("cpu")
    return made


def as_rounded(linear: nn.Linear) -> nn.Linear:
    """With the numbers that NF4 stands for, as bitsandbytes' own products on a CPU are less precise."""
    weight = as_nf4(linear).weight
    linear.weight.copy_(dequantize_4bit(weight.data, weight.quant_state))
    return linear


@pytest.fixture(scope="module")
def model() -> FastPromptEnhancer:
    return build(as_nf4)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 8, 13, 40])
def test_logits_keys_and_values_are_those_of_the_modules(model, length):
    ids = torch.randint(300, (1, length), generator=torch.Generator().manual_seed(length))
    found, expected = (decoder.empty_buffers(model, 1, 64, 0, ()) for _ in range(2))
    logits = decoder.forward(build(as_rounded), expected, ids, torch.arange(length)[None])
    torch.testing.assert_close(prefill.forward_prompt(model, STEP, found, ids), logits)
    for own, its in zip(found.cache.layers, expected.cache.layers, strict=True):
        torch.testing.assert_close(own.keys, its.keys)
        torch.testing.assert_close(own.values, its.values)


def test_one_text_of_a_step_by_kernels_is_prefilled_without_the_modules(model, monkeypatch):
    seen = []
    logits = torch.zeros(1, 300).index_fill_(1, torch.tensor([7]), 1.0)
    monkeypatch.setattr(decoder, "forward_prompt", lambda *args: seen.append(args[-1]) or logits)
    monkeypatch.setattr(decoder.decode_step, "sample", lambda step, buffers, logits: logits.argmax(-1, keepdim=True))
    buffers = decoder.empty_buffers(model, 1, 64, 0, ())
    buffers.step, ids = STEP, torch.tensor([[1, 2, 3]])
    buffers.ended.fill_(False)
    decoder.prefill(model, buffers, ids, None)
    assert (len(seen), buffers.token.item(), buffers.position.item()) == (1, 7, 3)
    assert seen[0] is ids


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 7, 64, 300])
def test_on_a_gpu_it_is_the_modules_prefill_but_for_rounding(repository, length):
    pe = load(repository, device="cuda", dtype="bfloat16", memory="resident").pe
    step = decode_step.find_step(pe)
    assert step is not None
    ids = torch.randint(3, pe.config.vocab_size, (1, length), device="cuda")
    with torch.no_grad():
        buffers = [decoder.empty_buffers(pe, 1, 512, 0, ()) for _ in range(3)]
        logits = decoder.forward(pe, buffers[0], ids, torch.arange(length, device="cuda")[None])
        found, again = (prefill.forward_prompt(pe, step, each, ids) for each in buffers[1:])
    assert torch.equal(found, again)
    pairs = [(found, logits)]
    for own, its in zip(buffers[1].cache.layers, buffers[0].cache.layers, strict=True):
        pairs += [(own.keys, its.keys), (own.values, its.values)]
    for one, other in pairs:
        assert ((one.float() - other.float()).norm() / other.float().norm()).item() < 3e-2
