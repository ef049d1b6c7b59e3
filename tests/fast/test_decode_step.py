"""Decode steps by kernels of their own: what the kernels compute, and that the step gives the modules' texts."""

from __future__ import annotations

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
from ernie_image_nf4.fast import decode_step

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
        ([], (1.0, 1.0)),
        ([TemperatureLogitsWarper(0.6)], (0.6, 1.0)),
        ([TemperatureLogitsWarper(0.6), TopPLogitsWarper(0.95)], (0.6, 0.95)),
        ([TopPLogitsWarper(0.95), TemperatureLogitsWarper(0.6)], None),
        ([TopKLogitsWarper(50), TopPLogitsWarper(0.95)], None),
        ([TopPLogitsWarper(0.95, min_tokens_to_keep=2)], None),
    ],
)
def test_only_temperature_and_a_nucleus_are_sampled_by_the_kernel(warpers, expected):
    assert decode_step.nucleus(LogitsProcessorList(warpers)) == expected


def test_what_the_kernels_do_not_know_goes_through_the_modules(repository):
    assert decode_step.step_by(load(repository, device="cpu", dtype="float32").pe, *KERNELS) is None
    pe = load(repository, device="cpu", dtype="bfloat16").pe
    for module in pe.modules():
        if hasattr(getattr(module, "weight", None), "quant_state"):
            module.weight.data = module.weight.data.clone()  # aligned as on a GPU
    assert decode_step.find_step(pe) is None  # no GPU
    assert decode_step.step_by(pe, *KERNELS) is not None
    layer = pe.model.layers[-1].mlp
    hook = layer.up_proj.register_forward_hook(lambda *_: None)
    assert decode_step.step_by(pe, *KERNELS) is None
    hook.remove()
    layer.up_proj.bias = torch.nn.Parameter(torch.zeros(layer.up_proj.out_features))
    assert decode_step.step_by(pe, *KERNELS) is None


@pytest.mark.gpu
def test_products_at_full_size():
    torch.manual_seed(0)
    for out, width in ((4096, 3072), (1024, 3072), (3072, 4096), (9216, 3072), (3072, 9216)):
        weight = torch.randn(out, width, device="cuda").bfloat16()
        codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
        packed, expected = triton_nf4_rows.pack(codes, state), dequantize_4bit(codes, state).float()
        x, norm = torch.randn(4, width, device="cuda").bfloat16(), torch.rand(width, device="cuda").bfloat16()
        normed = F.rms_norm(x.float(), (width,), norm.float(), 1e-5)
        found = triton_nf4_rows.products(x, norm, 1e-5, [packed])
        assert relative(found, normed @ expected.t()) < 4e-3
        residual = torch.randn(4, out, device="cuda").bfloat16()
        added = triton_nf4_rows.added_product(x, residual, packed)
        assert relative(added, residual.float() + x.float() @ expected.t()) < 4e-3
        gated = triton_nf4_rows.gated_products(x, norm, 1e-5, packed, packed)
        assert relative(gated, F.silu(normed @ expected.t()) * (normed @ expected.t())) < 1e-2
        for text in range(4):
            alone = x[text : text + 1].contiguous()
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
def test_sampling_draws_what_the_warpers_draw():
    torch.manual_seed(0)
    logits = torch.randn(4, 131072, device="cuda").mul_(3).bfloat16()
    end, count = torch.zeros(131072, dtype=torch.bool, device="cuda"), torch.tensor(1, device="cuda")
    for top_p, temperature in ((0.95, 0.6), (0.5, 1.0), (1.0, 1.0)):
        noise = torch.empty(4, 131072, device="cuda").exponential_()
        warped = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits.float()))
        found = triton_decode.sample(logits, noise, end, count, count, temperature, top_p)
        assert found.tolist() == (warped.softmax(-1) / noise).argmax(-1, keepdim=True).tolist()
