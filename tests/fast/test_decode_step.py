"""Decode steps by kernels of their own: what the kernels compute, and that the step gives the modules' texts."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ernie_image_nf4 import load
from ernie_image_nf4.fast import decode_step, decode_trial, decoder, decoder_runtime
from ernie_image_nf4.fast.decode_batch import may_share_steps
from ernie_image_nf4.fast.decode_request import DecodeRequest, Sampling
from ernie_image_nf4.fast.module_tensors import tensors_of
from ernie_image_nf4.fast.ops import elementwise
from ernie_image_nf4.fast.prompt_enhancer import make_prompt_enhancer_fast
from ernie_image_nf4.generation.enhancement import enhance
from ernie_image_nf4.generation.settings import Settings

pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA")

from ernie_image_nf4.fast.ops import triton_decode, triton_nf4_rows

KERNELS = (triton_nf4_rows, triton_decode)


@pytest.mark.slow
def test_interpreted_kernels_compute_what_the_modules_do():
    script = Path(__file__).with_name("interpreted_decode_step.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("warpers", "expected"),
    [
        ([], Sampling(1.0, 0, 1.0)),
        ([TemperatureLogitsWarper(0.6)], Sampling(0.6, 0, 1.0)),
        ([TemperatureLogitsWarper(0.6), TopPLogitsWarper(0.95)], Sampling(0.6, 0, 0.95)),
        ([TemperatureLogitsWarper(0.6), TopKLogitsWarper(50), TopPLogitsWarper(0.95)], Sampling(0.6, 50, 0.95)),
        ([TopPLogitsWarper(0.95), TemperatureLogitsWarper(0.6)], None),
        ([TopPLogitsWarper(0.95), TopPLogitsWarper(0.9)], None),
        ([TopPLogitsWarper(0.95, min_tokens_to_keep=2)], None),
    ],
)
def test_only_temperature_top_k_and_a_nucleus_are_sampled_by_the_kernel(warpers, expected):
    request = DecodeRequest(torch.zeros(1, 1, dtype=torch.long), 4, 0, True, LogitsProcessorList(warpers), (), 0)
    assert request.sampling == expected
    greedy = dataclasses.replace(request, do_sample=False, warpers=LogitsProcessorList())
    assert greedy.sampling == Sampling(0.0, 0, 1.0)


def test_the_pipelines_own_request_is_sampled_by_the_kernel(repository):
    pipe, requests = load(repository, device="cpu"), []
    make_prompt_enhancer_fast(pipe.pe)

    def generate(**call):
        requests.append(pipe.pe.decode_request(**call))
        return call["input_ids"]

    enhance(pipe, Settings("a cat", "", 64, 64, 1, 1.0, seed=0, use_pe=True), generate)
    (request,) = requests
    assert may_share_steps(request)
    assert (request.sampling.temperature, request.sampling.top_p) == (0.6, 0.95)


def aligned(pe):
    """A prompt enhancer whose NF4 weights are where they may be on a GPU."""
    for module in pe.modules():
        if hasattr(getattr(module, "weight", None), "quant_state"):
            module.weight.data = module.weight.data.clone()
    return pe


def test_what_the_kernels_do_not_know_goes_through_the_modules(repository):
    assert decode_step.step_by(load(repository, device="cpu", dtype="float32").pe, *KERNELS) is None
    pe = aligned(load(repository, device="cpu", dtype="bfloat16").pe)
    assert decode_step.find_step(pe) is None  # no GPU
    assert decode_step.step_by(pe, *KERNELS) is not None
    layer = pe.model.layers[-1].mlp
    hook = layer.up_proj.register_forward_hook(lambda *_: None)
    assert decode_step.step_by(pe, *KERNELS) is None
    hook.remove()
    hook = pe.model.layers[0].register_forward_pre_hook(lambda *_: None)
    assert decode_step.step_by(pe, *KERNELS) is None
    hook.remove()
    hook = pe.lm_head.register_forward_hook(lambda *_: None)
    assert decode_step.step_by(pe, *KERNELS) is None
    hook.remove()
    assert decode_step.step_by(pe, *KERNELS) is not None
    layer.up_proj.bias = torch.nn.Parameter(torch.zeros(layer.up_proj.out_features))
    assert decode_step.step_by(pe, *KERNELS) is None


@pytest.mark.parametrize("part", ["input_layernorm", "self_attn", "mlp"])
def test_parts_of_other_classes_are_not_computed_by_kernels(repository, part):
    pe = aligned(load(repository, device="cpu", dtype="bfloat16").pe)
    make_prompt_enhancer_fast(pe)
    assert decode_step.step_by(pe, *KERNELS) is not None
    module = getattr(pe.model.layers[1], part)
    module.__class__ = type("Other", (type(module),), {})
    assert decode_step.step_by(pe, *KERNELS) is None


def test_layers_with_dropout_or_norms_in_float32_are_not_computed_by_kernels(repository):
    pe = aligned(load(repository, device="cpu", dtype="bfloat16").pe)
    layer = pe.model.layers[1]
    layer.self_attn.attention_dropout = 0.1
    assert decode_step.step_by(pe, *KERNELS) is not None
    pe.train()
    assert decode_step.step_by(pe, *KERNELS) is None
    pe.eval()
    layer.input_layernorm.float()
    assert decode_step.step_by(pe, *KERNELS) is None


def test_a_step_keeps_no_nf4_weight_that_has_moved(repository):
    pe = aligned(load(repository, device="cpu", dtype="bfloat16").pe)
    step = decode_step.step_by(pe, *KERNELS)
    owned = {each.untyped_storage().data_ptr() for norms in step.norms for each in norms}
    assert len(owned) == 2 * len(pe.model.layers)
    assert owned.isdisjoint(getattr(owner, name).untyped_storage().data_ptr() for owner, name in tensors_of(pe))


def tried(monkeypatch, outcome):
    """Calls of a `TriedStep` whose trial comes to this, and how often it was tried."""
    trials = []

    def try_out(model, step):
        trials.append(step)
        if isinstance(outcome, Exception):
            raise outcome

    monkeypatch.setattr(decode_trial, "_try_out", try_out)
    return decode_trial.TriedStep(lambda model: "step"), trials


def test_kernels_that_work_are_tried_once(monkeypatch):
    step, trials = tried(monkeypatch, None)
    assert [step("model"), step("model")] == ["step", "step"]
    assert len(trials) == 1


def test_kernels_that_fail_leave_decoding_to_the_modules(monkeypatch, caplog):
    step, trials = tried(monkeypatch, ValueError("no such instruction\nat line 3"))
    with caplog.at_level(logging.INFO, decode_trial.__name__):
        assert [step("model"), step("model")] == [None, None]
    assert len(trials) == 1
    (message,) = caplog.messages
    assert "no such instruction" in message
    assert "line 3" not in message


def test_too_little_memory_says_nothing_of_the_kernels(monkeypatch):
    step, trials = tried(monkeypatch, torch.OutOfMemoryError("CUDA out of memory."))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            step("model")
    assert len(trials) == 2


def test_no_kernels_are_used_on_rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(elementwise, "kernel_module", lambda name: pytest.fail("was asked for kernels"))
    assert not elementwise.has_triton.__wrapped__(torch.device("cuda"))


def test_an_exact_prompt_enhancer_keeps_the_modules_and_so_do_its_copies(repository):
    pe = load(repository, device="cpu").pe
    for exact in (False, True, False):
        make_prompt_enhancer_fast(pe, exact=exact)
        for model in (pe, copy.deepcopy(pe)):
            assert (model.runtime.find_step is None) == exact


@pytest.mark.gpu
def test_products_at_full_size():
    torch.manual_seed(0)
    for out, width in ((4096, 3072), (1024, 3072), (3072, 4096), (9216, 3072), (3072, 9216)):
        weight = torch.randn(out, width, device="cuda").bfloat16()
        codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
        packed, expected = triton_nf4_rows.pack(codes, state), dequantize_4bit(codes, state).float()
        x, norm = torch.randn(4, width, device="cuda").bfloat16(), torch.rand(width, device="cuda").bfloat16()
        normed = F.rms_norm(x.float(), (width,), norm.float(), 1e-5)
        in_order, planes, norm = triton_nf4_rows.in_order, triton_nf4_rows.in_planes(x), triton_nf4_rows.in_planes(norm)
        found = triton_nf4_rows.products(planes, norm, 1e-5, [packed])
        assert relative(found, normed @ expected.t()) < 4e-3
        residual = torch.randn(4, out, device="cuda").bfloat16()
        added = triton_nf4_rows.added_product(planes, residual, packed)
        assert relative(in_order(added), in_order(residual).float() + x.float() @ expected.t()) < 4e-3
        gated = triton_nf4_rows.gated_products(planes, norm, 1e-5, packed, packed)
        assert relative(in_order(gated), F.silu(normed @ expected.t()) * (normed @ expected.t())) < 1e-2
        for text in range(4):
            alone = planes[text : text + 1].contiguous()
            assert torch.equal(triton_nf4_rows.products(alone, norm, 1e-5, [packed])[0], found[text])
            assert torch.equal(triton_nf4_rows.gated_products(alone, norm, 1e-5, packed, packed)[0], gated[text])
            assert torch.equal(triton_nf4_rows.added_product(alone, residual[text : text + 1], packed)[0], added[text])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


@pytest.mark.gpu
def test_a_captured_step_gives_the_texts_of_the_modules(repository):
    pe = load(repository, device="cuda", dtype="bfloat16", memory="resident").pe
    ids = torch.tensor([[5, 17, 40]], device="cuda")
    texts = []
    for find_step in (None, decode_step.find_step):
        pe.runtime.find_step, pe.runtime.slot = find_step, None
        texts.append(pe.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0))
        assert (pe.runtime.slot.buffers[512].step is None) == (find_step is None)
    assert torch.equal(*texts)


@pytest.mark.gpu
def test_logits_at_full_size():
    torch.manual_seed(0)
    x, weight = (torch.randn(rows, 3072, device="cuda").bfloat16() for rows in (4, 131072))
    found = triton_decode.head_product(x, weight)
    assert relative(found, x.float() @ weight.float().t()) < 4e-3
    for text in range(4):
        assert torch.equal(triton_decode.head_product(x[text : text + 1], weight)[0], found[text])


@pytest.mark.gpu
@pytest.mark.parametrize("count", [2, 3, 4, 6])
@pytest.mark.parametrize("step", [512, 16], ids=["one cache", "a cache that grows"])
def test_texts_in_one_step_are_those_decoded_alone(repository, monkeypatch, count, step):
    monkeypatch.setattr(decoder, "CACHE_STEP", step)
    pe = load(repository, device="cuda", dtype="bfloat16", memory="resident").pe
    pe.runtime.find_step = decode_step.find_step
    batches, make = [], decoder_runtime.DecodeBatch
    monkeypatch.setattr(decoder_runtime, "DecodeBatch", lambda *args: batches.append(make(*args)) or batches[-1])
    samplings = [
        {"do_sample": True, "temperature": 0.6, "top_p": 0.95},
        {"do_sample": False},
        {"do_sample": True, "temperature": 2.0, "top_p": 0.8, "top_k": 0},
        {"do_sample": True, "temperature": 1.5, "min_new_tokens": 20},
    ]
    vocabulary = pe.config.vocab_size
    torch.manual_seed(0)
    requests = [
        pe.decode_request(
            input_ids=torch.randint(3, vocabulary, (1, 3 + 5 * number)),
            max_new_tokens=60 - 8 * number,
            eos_token_id=[*range(number, vocabulary, 40)],  # early ends
            pad_token_id=0,
            **samplings[number % len(samplings)],
        )
        for number in range(6)
    ]
    alone = []
    for seed, request in enumerate(requests):
        torch.manual_seed(seed)
        alone.append(pe.runtime.generate(pe, request).tolist())
    for _ in range(2):  # the second time in the same rows
        together = pe.generate_together(requests, range(6), count)
        assert [text.tolist() for text in together] == alone
    (batch,) = batches
    assert len(batch.generators) == min(count, decode_step.MOST_TEXTS)
    assert batch.buffers.graph is not None
    new = [len(text[0]) - request.input_ids.shape[1] for text, request in zip(alone, requests, strict=True)]
    assert len(set(new)) > 2


@pytest.mark.gpu
def test_sampling_draws_what_the_warpers_draw():
    torch.manual_seed(0)
    logits = torch.randn(4, 131072, device="cuda").mul_(3).bfloat16()
    settings = [(0.6, 50, 0.95), (0.6, 0, 0.95), (1.0, 0, 0.5), (1.0, 0, 1.0)]
    temperature, top_k, top_p = (torch.tensor(each, device="cuda")[:, None] for each in zip(*settings, strict=True))
    for _ in range(3):
        noise = torch.empty(4, 131072, device="cuda").exponential_()
        found = triton_decode.sample(logits, noise, logits.topk(50).values, temperature, top_k, top_p)
        for row, (divisor, most, mass) in enumerate(settings):
            warped = TemperatureLogitsWarper(divisor)(None, logits[row : row + 1].float())
            warped = TopKLogitsWarper(most)(None, warped) if most else warped
            warped = TopPLogitsWarper(mass)(None, warped)
            assert found[row].tolist() == (warped.softmax(-1) / noise[row]).argmax(-1).tolist()
    greedy = triton_decode.sample(logits, noise, None, 0 * temperature, 0 * top_k, top_p)
    assert torch.equal(greedy, logits.argmax(-1, keepdim=True))
