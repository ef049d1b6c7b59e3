"""Compares a decode step by kernels with one by the model's modules, on a CPU: a script for Triton's interpreter.

To be run with TRITON_INTERPRET=1, which Triton reads when it is imported: in a process of its own. The interpreter cuts
bfloat16 off where GPUs round it, so results are compared within a few times its precision.
"""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import Ministral3Config, Ministral3ForCausalLM
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.models.ministral3.modeling_ministral3 import apply_rotary_pos_emb

from ernie_image_nf4.fast import decode_batch, decode_step, decode_trial, decoder, decoder_runtime
from ernie_image_nf4.fast.ops import triton_decode, triton_nf4, triton_nf4_rows
from ernie_image_nf4.fast.prompt_enhancer import FastPromptEnhancer, make_prompt_enhancer_fast

WIDTH, TEXTS = 128, 3
PRECISION = 2**-6
FEW_PROGRAMS = {"COLUMNS": 32, "ADDED_COLUMNS": 32, "GATED_COLUMNS": 32}  # so that the interpreter takes less time


def main() -> None:
    torch.set_num_threads(1)
    for compare in (
        compare_weights,
        compare_products,
        compare_attention,
        compare_head,
        compare_sampling,
        compare_steps,
        compare_texts,
        compare_texts_together,
    ):
        torch.manual_seed(0)
        compare()


def compare_weights() -> None:
    """In float32, which the interpreter rounds as GPUs do, to the bit."""
    for shape, nested in (((64, 192), True), ((7, 64), False)):
        codes, state = quantize_4bit(torch.randn(shape), quant_type="nf4", compress_statistics=nested, blocksize=64)
        found = torch.empty(state.shape)
        triton_nf4.dequantize(codes, state, found)
        assert torch.equal(found, dequantize_4bit(codes, state))


def compare_products() -> None:
    """Of several texts, each of which gets what it gets alone."""
    x, norm = torch.randn(TEXTS, WIDTH).bfloat16(), (1 + torch.randn(WIDTH) / 10).bfloat16()
    query, key, value, up = (packed(rows) for rows in (64, 32, 32, 64))
    normed = x.float() * torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-5) * norm.float()
    weights = [query[0], key[0], value[0]]
    planes, norm = triton_nf4_rows.in_planes(x), triton_nf4_rows.in_planes(norm)
    found = triton_nf4_rows.products(planes, norm, 1e-5, weights)
    assert_close(found, torch.cat([normed @ weight.t() for _, weight in (query, key, value)], 1))
    assert_close(triton_nf4_rows.products(planes, norm, 1e-5, weights[:1]), normed @ query[1].t())
    gated = triton_nf4_rows.gated_products(planes, norm, 1e-5, query[0], up[0])
    assert_close(triton_nf4_rows.in_order(gated), F.silu(normed @ query[1].t()) * (normed @ up[1].t()), 2 * PRECISION)
    residual = torch.randn(TEXTS, 64).bfloat16()
    residual_planes = triton_nf4_rows.in_planes(residual)
    added = triton_nf4_rows.added_product(planes, residual_planes, up[0])
    assert_close(triton_nf4_rows.in_order(added), residual.float() + x.float() @ up[1].t())
    for text in range(TEXTS):
        alone, own = planes[text : text + 1], residual_planes[text : text + 1]
        assert torch.equal(triton_nf4_rows.products(alone, norm, 1e-5, weights)[0], found[text])
        assert torch.equal(triton_nf4_rows.gated_products(alone, norm, 1e-5, query[0], up[0])[0], gated[text])
        assert torch.equal(triton_nf4_rows.added_product(alone, own, up[0])[0], added[text])


def packed(rows: int, columns: int = WIDTH) -> tuple[triton_nf4_rows.PackedWeight, torch.Tensor]:
    """A weight as the kernels read it, and in float32."""
    weight = torch.randn(rows, columns) * torch.logspace(-2, 0, rows)[:, None]
    codes, state = quantize_4bit(weight.bfloat16(), quant_type="nf4", compress_statistics=True, blocksize=64)
    assert triton_nf4_rows.fits(codes, state)
    return triton_nf4_rows.pack(codes, state), dequantize_4bit(codes, state).float()


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = PRECISION) -> None:
    error = (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    assert error.max() < tolerance, error


def compare_attention() -> None:
    """At the first position, in the first part of the cache and beyond."""
    heads, key_heads, dim, capacity, scaling = 4, 2, 16, 256, 0.3
    positions = torch.tensor([0, 50, 200])
    qkv = torch.randn(TEXTS, (heads + 2 * key_heads) * dim).bfloat16()
    angles = torch.randn(TEXTS, dim // 2).repeat(1, 2)
    cosine, sine = angles.cos().bfloat16(), angles.sin().bfloat16()
    query_scale = torch.tensor([1.0, 1.5, 1.0]).bfloat16()
    keys, values = (torch.randn(TEXTS, key_heads, capacity, dim).bfloat16() for _ in range(2))
    query, key, value = qkv.view(TEXTS, -1, 1, dim).split([heads, key_heads, key_heads], 1)
    query, key = apply_rotary_pos_emb(query, key, cosine[:, None], sine[:, None])
    query = query * query_scale[:, None, None, None]
    before = keys.clone(), values.clone()
    found = triton_decode.attention(qkv, cosine, sine, query_scale, positions, keys, values, scaling)
    for text, position in enumerate(positions.tolist()):
        assert_close(keys[text, :, position], key[text, :, 0])
        assert torch.equal(values[text, :, position], value[text, :, 0])
        for cache, old in zip((keys, values), before, strict=True):
            others = torch.arange(capacity) != position
            assert torch.equal(cache[text][:, others], old[text][:, others])
        seen = [cache[text : text + 1, :, : position + 1].float() for cache in (keys, values)]
        expected = F.scaled_dot_product_attention(query[text : text + 1].float(), *seen, scale=scaling, enable_gqa=True)
        assert_close(triton_nf4_rows.in_order(found[text]), expected.flatten())


def compare_head() -> None:
    """Logits of several texts, each of which gets what it gets alone, with a vocabulary that no program divides."""
    x, weight = torch.randn(TEXTS, WIDTH).bfloat16(), torch.randn(triton_decode.HEAD_COLUMNS + 3, WIDTH).bfloat16()
    found = triton_decode.head_product(x, weight)
    assert_close(found, x.float() @ weight.float().t())
    for text in range(TEXTS):
        assert torch.equal(triton_decode.head_product(x[text : text + 1], weight)[0], found[text])


def compare_sampling() -> None:
    """The draws are those of upstream's warpers and the same noise, whatever the other texts' settings are."""
    vocabulary = triton_decode.VOCABULARY_PART + 100
    settings = [(0.6, 50, 0.95), (1.0, 0, 0.3), (1.3, 0, 1.0), (0.0, 0, 1.0), (2.0, 3, 0.5), (1.0, 0, 0.0)]
    logits = (torch.randn(len(settings), vocabulary) * 3).bfloat16()
    for _ in range(3):
        noise = torch.empty(logits.shape).exponential_()
        found = sampled(logits, noise, settings)
        for row, (temperature, top_k, top_p) in enumerate(settings):
            own = slice(row, row + 1)
            warped = logits[own].float()
            warpers = [TemperatureLogitsWarper(temperature)] if temperature else []
            warpers += [TopKLogitsWarper(top_k)] if top_k else []
            for warper in [*warpers, TopPLogitsWarper(top_p)]:
                warped = warper(None, warped)
            expected = (warped.softmax(-1) / noise[own] if temperature else warped).argmax(-1)
            assert found[row].tolist() == expected.tolist(), settings[row]
            assert torch.equal(sampled(logits[own], noise[own], settings[own]), found[own])
    without_numbers = torch.full((1, vocabulary), torch.nan)
    sampled(without_numbers, noise[:1], [(1.0, 0, 0.9)])  # comes to an end


def sampled(logits: torch.Tensor, noise: torch.Tensor, settings: list[tuple[float, int, float]]) -> torch.Tensor:
    temperature, top_k, top_p = (torch.tensor(each)[:, None] for each in zip(*settings, strict=True))
    ranks = int(top_k.max())
    ranked = logits.topk(ranks).values if ranks else None
    return triton_decode.sample(logits, noise, ranked, temperature, top_k, top_p)


def compare_steps() -> None:
    """A step behind a text, by the modules and by kernels."""
    pe, ids = small_prompt_enhancer(), torch.tensor([[5, 17, 40], [7, 8, 9]])
    step = decode_step.step_by(pe, triton_nf4_rows, triton_decode)
    assert step is not None
    assert len(step.norms) == 2
    request = pe.decode_request(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=3)
    found = []
    for by_kernels in (False, True):
        buffers = decoder.new_buffers(pe, request, 64, torch.Generator())
        decoder.prefill(pe, buffers, ids, request)
        with torch.no_grad():
            logits = (
                decode_step.forward(pe, step, buffers)
                if by_kernels
                else decoder.forward(pe, buffers, buffers.token, buffers.position[:1])
            )
        found.append(
            [logits, *(each[:, :, 3] for layer in buffers.cache.layers for each in (layer.keys, layer.values))]
        )
    for by_modules, by_kernels in zip(*found, strict=True):
        assert_close(by_kernels.flatten(1), by_modules.flatten(1), 4 * PRECISION)


@patch.multiple(triton_nf4_rows, **FEW_PROGRAMS)
def compare_texts() -> None:
    """The tokens of a small prompt enhancer, greedy ones and sampled ones."""
    pe, ids = small_prompt_enhancer(layers=1, inner=64), torch.tensor([[5, 17, 40]])
    sampled = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    for options in ({"do_sample": False}, sampled):
        texts = []
        for step_of in (None, find_step):
            assert pe.runtime is not None
            pe.runtime.find_step, pe.runtime.slot = step_of, None
            torch.manual_seed(2)  # with which rounding decides nothing
            texts.append(pe.generate(input_ids=ids, max_new_tokens=4, eos_token_id=3, pad_token_id=0, **options))
            assert (pe.runtime.slot.buffers[512].step is None) == (step_of is None)
        assert torch.equal(*texts), texts
    assert len(set(texts[0][0].tolist())) > 3


def by_kernels(model: FastPromptEnhancer) -> decode_step.DecodeStep | None:
    return decode_step.step_by(model, triton_nf4_rows, triton_decode)


find_step = decode_trial.TriedStep(by_kernels)


@patch.multiple(triton_nf4_rows, **FEW_PROGRAMS)
def compare_texts_together() -> None:
    """Texts of different lengths and settings, in one step, in caches that grow: each is the text decoded alone."""
    pe = small_prompt_enhancer(layers=1, inner=64)
    assert pe.runtime is not None
    pe.runtime.find_step = find_step
    free = pe.generate(input_ids=torch.tensor([[7, 8]]), max_new_tokens=2, do_sample=False, pad_token_id=0)
    sampled = {"do_sample": True, "temperature": 2.0}
    calls = [
        sampled | {"input_ids": [5, 17, 40, 6], "max_new_tokens": 6, "top_p": 0.95},  # more than its first cache
        {"input_ids": [7, 8], "max_new_tokens": 9, "do_sample": False, "eos_token_id": int(free[0, 3])},  # ends early
        sampled | {"input_ids": [9], "max_new_tokens": 3, "top_p": 0.8, "top_k": 0},
        {"input_ids": [20, 21], "max_new_tokens": 1, "do_sample": False},
        sampled | {"input_ids": [5, 17, 40], "max_new_tokens": 3, "top_k": 5},
    ]
    requests = [
        pe.decode_request(
            **{"pad_token_id": 0, "eos_token_id": 3} | call | {"input_ids": torch.tensor([call["input_ids"]])}
        )
        for call in calls
    ]
    batches: list[decode_batch.DecodeBatch] = []

    def noted(*args: Any) -> decode_batch.DecodeBatch:
        batches.append(decode_batch.DecodeBatch(*args))
        return batches[-1]

    with (
        patch.multiple(decoder, CACHE_STEP=8, LOOK_BACK=1),  # few steps: the interpreter takes seconds for each
        patch.object(decode_batch, "LOOK_BACK", 1),
        patch.multiple(decoder_runtime, CACHE_STEP=8, DecodeBatch=noted),
    ):
        alone = []
        for seed, request in enumerate(requests):
            torch.manual_seed(seed)
            alone.append(pe.runtime.generate(pe, request).tolist())
        assert [len(text[0]) for text in alone[1:4]] == [4, 4, 3]
        state = torch.get_rng_state()
        together = pe.generate_together(requests, range(len(requests)), len(requests))
        assert [text.tolist() for text in together] == alone, (together, alone)
        assert torch.equal(torch.get_rng_state(), state)
        batch = batches.pop()
        assert (len(batch.generators), batch.buffers.capacity) == (decode_step.MOST_TEXTS, 16)
        pair = dataclasses.replace(requests[3], input_ids=torch.tensor([[5], [6]]))
        pe.generate_together([pair, requests[3]], range(2), 2)  # by turns
        assert not batches
        check_kept_rows(pe, requests, alone)
        assert len(batches) == 2


def check_kept_rows(pe: FastPromptEnhancer, requests: list[Any], alone: list[list[list[int]]]) -> None:
    """Rows of short texts serve the next call, until more of them, a larger top-k or another model are asked for."""
    runtime = pe.runtime
    assert runtime is not None
    assert runtime.batch is None  # the texts before were long
    short = [requests[2], requests[3]]
    kept = None
    for _ in range(2):
        together = pe.generate_together(short, (2, 3), 2)
        assert [text.tolist() for text in together] == alone[2:4]
        assert kept in (None, runtime.batch)
        kept = runtime.batch
    assert kept is not None
    assert all(part is not pe for part in vars(kept).values())  # else the model would wait for garbage collection
    assert not kept.serves(pe, short, 3)
    assert not kept.serves(pe, [requests[4]], 2)
    pe.train()
    assert not kept.serves(pe, short, 2)
    pe.eval()
    assert kept.serves(pe, short, 2)
    runtime.release()
    pe.generate_together(short, (2, 3), 2)


def small_prompt_enhancer(layers: int = 2, inner: int = 128) -> FastPromptEnhancer:
    config = Ministral3Config(
        vocab_size=300, hidden_size=64, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, attn_implementation="sdpa",
    )  # fmt: skip
    pe = Ministral3ForCausalLM(config).eval()
    with torch.no_grad():  # logits far apart, so that rounding decides nothing
        for weight in pe.parameters():
            weight.mul_(20 if weight.ndim > 1 else 1)
    pe = pe.bfloat16()
    for layer in pe.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, as_nf4(linear))
    make_prompt_enhancer_fast(pe)
    return pe


def as_nf4(linear: nn.Linear) -> Linear4bit:
    quantized = Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    quantized.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
    return quantized


if __name__ == "__main__":
    main()
