"""LoRAs in a fast transformer: peft's results up to rounding, one copy of the weights, the base to the bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit
from conftest import captured
from diffusers import ErnieImagePipeline
from lora_files import LAYERS, factors, keyed, write
from safetensors.torch import load_file

from ernie_image_nf4 import load, load_lora
from ernie_image_nf4.fast import linear
from ernie_image_nf4.fast.adapters import LowRank, low_rank_of, stacks_in
from ernie_image_nf4.fast.cuda_graphs import is_undisturbed
from ernie_image_nf4.fast.products import set_products
from ernie_image_nf4.fast.transformer import FastErnieImageTransformer, make_transformer_fast
from ernie_image_nf4.memory.offload import enable_offload
from ernie_image_nf4.upstream.offloading import hook_of

peft = pytest.importorskip("peft")

CPU = torch.device("cpu")
MODES = ("resident", "offload", "stream")
ON_CPU = 5e-3  # bitsandbytes multiplies NF4 less precisely on CPUs than by a weight in float32
SIZE = 40.0  # of factors, with which a LoRA shows in the pixels of the tiny model


@pytest.fixture(scope="module")
def files(pipe: ErnieImagePipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LoRAs of all layers of the blocks; of some, and another rank; one with layers beside the blocks; one of DoRA."""
    folder = tmp_path_factory.mktemp("loras")
    whole, some = (
        factors(pipe, 4, seed=1, size=SIZE),
        factors(pipe, 3, layers=LAYERS[:2] + LAYERS[4:5], seed=2, size=SIZE),
    )
    beside = {**some, "time_embedding.linear_1": (torch.randn(3, 128) / 11, torch.randn(128, 3))}
    dora = keyed("diffusers", factors(pipe, 2, layers=["mlp.up_proj"], seed=3))
    norms = {
        key.replace("lora_B.weight", "lora_magnitude_vector"): torch.rand(len(up)) + 1
        for key, up in dora.items()
        if "lora_B" in key
    }
    states = {
        "whole": keyed("diffusers", whole),
        "some": keyed("diffusers", some),
        "beside": keyed("diffusers", beside),
    }
    return {
        name: write(folder / f"{name}.safetensors", state) for name, state in {**states, "dora": dora | norms}.items()
    }


def build(repository: Path, memory: str = "resident", *, fast: bool = True, dtype: str = "float32", **options):
    """A pipeline on the CPU that computes and offloads as one on a GPU."""
    pipe = load(repository, device="cpu", dtype=dtype, prompt_enhancer=False)
    pipe.set_progress_bar_config(disable=True)
    if fast:
        mixed = dtype == "float16"
        make_transformer_fast(pipe.transformer, capture_steps=memory != "stream", mixed=mixed, **options)
    if memory != "resident":
        enable_offload(pipe, CPU, stream_blocks=memory == "stream")
        hook = hook_of(pipe.transformer)
        hook.on_offload = pipe.transformer.runtime.release_graph if fast else None
    return pipe


def draw(pipe: ErnieImagePipeline, **options) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    size = {"height": 32, "width": 48, "num_inference_steps": 2, "use_pe": False}
    return np.asarray(pipe("a cat", generator=generator, **size, **options).images[0]).astype(int)


@contextmanager
def peft_counted() -> Iterator[list[str]]:
    """Notes calls of peft's layers."""
    calls: list[str] = []
    classes = {peft.tuners.lora.Linear, peft.tuners.lora.Linear4bit}
    before = {each: each.forward for each in classes}
    for each, forward in before.items():
        each.forward = lambda self, x, *args, _forward=forward, **kwargs: (
            calls.append(""),
            _forward(self, x, *args, **kwargs),
        )[1]
    try:
        yield calls
    finally:
        for each, forward in before.items():
            each.forward = forward


# Results


@pytest.fixture
def wide_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets base and low-rank products be one however few rows there are; on a CPU bitsandbytes undoes NF4 for it.

    Notes how many layers each call was for.
    """
    calls: list[int] = []
    find, multiply = linear.elementwise.triton_kernels, linear._wide_products

    def dequantize(codes: torch.Tensor, state: QuantState, out: torch.Tensor) -> None:
        out.copy_(dequantize_4bit(codes, state))

    def kernels(x: torch.Tensor, module: str = linear.elementwise.KERNELS) -> object:
        return SimpleNamespace(dequantize=dequantize) if module == linear.DEQUANTIZER else find(x, module)

    def noted(*args: Any) -> list[torch.Tensor]:
        calls.append(len(args[1]))
        return multiply(*args)

    monkeypatch.setattr(linear, "ROWS", 0)
    monkeypatch.setattr(linear, "_wide_products", noted)
    if not torch.cuda.is_available():
        monkeypatch.setattr(linear.elementwise, "triton_kernels", kernels)
    return calls


@pytest.mark.parametrize("memory", MODES)
def test_base_and_low_rank_products_are_one(repository, files, wide_products, memory):
    assert_is_pefts(repository, files, memory, ON_CPU)
    assert {1, 2, 3} == set(wide_products)


def test_layers_with_bias_and_layers_without_adapters_have_theirs(repository, files, wide_products):
    plain, pipe = build(repository, fast=False), build(repository)
    for each in (plain, pipe):
        torch.manual_seed(0)
        for block in each.transformer.layers:
            for layer in (block.self_attention.to_k, block.mlp.up_proj, block.mlp.linear_fc2):
                layer.bias = torch.nn.Parameter(torch.randn(layer.out_features))
    base = latents_of(plain)
    for name in ("some", "whole"):
        for each in (plain, pipe):
            load_lora(each, files[name], name=name)
            each.set_adapters(name)
        assert_near(latents_of(pipe), latents_of(plain), base, ON_CPU)
    assert wide_products


@pytest.mark.parametrize("memory", MODES)
def test_the_picture_is_pefts_up_to_rounding_and_the_base_comes_back(repository, files, memory):
    assert_is_pefts(repository, files, memory)


def assert_is_pefts(repository: Path, files: dict[str, Path], memory: str, error: float = 1e-3) -> None:
    plain, pipe = build(repository, fast=False), build(repository, memory)
    assert type(pipe.transformer) is FastErnieImageTransformer
    base, plain_base, base_picture = latents_of(pipe), latents_of(plain), draw(pipe)
    found = []
    for wanted in ({"whole": 1.0}, {"whole": -0.5, "some": 0.75}, {"some": 1.0}, {"some": 0.25, "beside": 1.0}):
        for name in wanted:
            for each in (plain, pipe):
                if name not in each.get_list_adapters().get("transformer", ()):
                    load_lora(each, files[name], name=name)
        for each in (plain, pipe):
            each.set_adapters(list(wanted), list(wanted.values()))
        with peft_counted() as calls:
            found.append(latents_of(pipe))
        assert bool(calls) == ("beside" in wanted)
        assert_near(found[-1], latents_of(plain), plain_base, error)
        assert np.abs(draw(pipe) - draw(plain)).max() <= 1
    assert torch.equal(latents_of(pipe), found[-1])
    pipe.disable_lora()
    assert torch.equal(latents_of(pipe), base)
    pipe.enable_lora()
    assert torch.equal(latents_of(pipe), found[-1])
    pipe.delete_adapters("beside")
    pipe.set_adapters("some", 1.0)
    assert torch.equal(latents_of(pipe), found[2])
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe), base)
    assert np.array_equal(draw(pipe), base_picture)
    assert not list(stacks_in(pipe.transformer))


def assert_near(found: torch.Tensor, expected: torch.Tensor, base: torch.Tensor, error: float = 1e-3) -> None:
    """They differ by rounding, which is little beside what adapters do."""
    assert (found - expected).norm() < error * (expected - base).norm()


@pytest.mark.parametrize("memory", MODES)
def test_dora_goes_through_pefts_layers(repository, files, memory):
    plain, pipe = build(repository, fast=False), build(repository, memory)
    base = latents_of(plain)
    for each in (plain, pipe):
        load_lora(each, files["dora"], strength=0.5)
    with peft_counted() as calls:
        found = latents_of(pipe)
    assert calls
    assert_near(found, latents_of(plain), base)


@pytest.mark.parametrize("memory", ["offload", "stream"])
@pytest.mark.parametrize("fast", [False, True])
def test_a_transformer_that_is_on_the_device_takes_adapters_too(repository, files, memory, fast):
    """Without a decoded picture, the transformer is the last component that was called."""
    expected, pipe = build(repository, fast=fast), build(repository, memory, fast=fast)
    embeds = pipe.encode_prompt("a cat", CPU)
    pictures = []
    for each in (expected, pipe):
        latents = []
        for name in (None, "whole", "some"):
            if name is not None:
                load_lora(each, files[name], name=name)
            options = {"height": 32, "width": 48, "num_inference_steps": 1, "output_type": "latent"}
            result = each(prompt_embeds=embeds, generator=torch.Generator().manual_seed(0), **options)
            latents.append(getattr(result, "images", result))
        pictures.append(latents)
    assert all(torch.equal(one, other) for one, other in zip(*pictures, strict=True))
    assert not torch.equal(pictures[0][0], pictures[0][1])


def test_exact_pipelines_call_pefts_layers(repository, files):
    plain, pipe = build(repository, fast=False), build(repository, exact=True)
    base = latents_of(plain)
    for each in (plain, pipe):
        load_lora(each, files["whole"])
    with peft_counted() as calls:
        found = latents_of(pipe)
    assert calls
    assert_near(found, latents_of(plain), base)


def test_in_float16_the_low_rank_product_has_the_scale_of_the_base_product(repository, files):
    """float16 overflows where weights or inputs are large: the sum is then still that of float32."""
    plain, pipe = build(repository, fast=False), build(repository, dtype="float16")
    for each in (plain, pipe):
        with torch.no_grad():
            for block in each.transformer.layers:
                block.adaLN_sa_ln.weight.mul_(300)
                block.adaLN_mlp_ln.weight.mul_(300)
    base = latents_of(plain)
    for each in (plain, pipe):
        load_lora(each, files["whole"], strength=3.0)
    with peft_counted() as calls:
        found = latents_of(pipe)
    assert not calls
    assert found.isfinite().all()
    assert_near(found, latents_of(plain), base, 0.02)


def latents_of(pipe: ErnieImagePipeline) -> torch.Tensor:
    options = {"height": 32, "width": 48, "num_inference_steps": 2, "output_type": "latent", "use_pe": False}
    result = pipe("a cat", generator=torch.Generator().manual_seed(0), **options)
    return getattr(result, "images", result).float()


def test_in_int8_the_base_product_stays_so(repository, files):
    plain, pipe = build(repository, fast=False), build(repository)
    set_products(pipe.transformer, "int8")
    base, expected_base = latents_of(pipe), latents_of(plain)
    for each in (plain, pipe):
        load_lora(each, files["whole"])
    with peft_counted() as calls:
        found, expected = latents_of(pipe), latents_of(plain)
    assert calls  # of `plain`
    assert not torch.equal(base, expected_base)
    assert_near(found, expected, expected_base, 0.1)
    with peft_counted() as calls:
        assert torch.equal(latents_of(pipe), found)
    assert not calls
    pipe.disable_lora()
    assert torch.equal(latents_of(pipe), base)


def test_layers_with_hooks_are_called(repository, files):
    pipe = build(repository)
    load_lora(pipe, files["whole"])
    before = draw(pipe)
    called = []
    layer = pipe.transformer.layers[0].self_attention.to_q
    handle = layer.register_forward_hook(lambda *args: called.append(1))
    assert np.abs(draw(pipe) - before).max() <= 1
    assert called
    handle.remove()
    assert np.array_equal(draw(pipe), before)


# Weights


def test_there_is_one_copy_of_an_adapters_weights(repository, files):
    pipe = build(repository)
    load_lora(pipe, files["whole"])
    draw(pipe)
    attention = pipe.transformer.layers[0].self_attention
    name = pipe.get_active_adapters()[0]
    rows = [getattr(attention, part).lora_A[name].weight for part in ("to_q", "to_k", "to_v")]
    shared = low_rank_of(attention.to_q).shared
    assert [row.data_ptr() for row in rows] == [shared.data[n : n + 4].data_ptr() for n in (0, 4, 8)]
    assert low_rank_of(attention.to_k).shared is shared
    stored = load_file(files["whole"])
    for key, tensor in peft.get_peft_model_state_dict(pipe.transformer, adapter_name=name).items():
        assert torch.equal(tensor, stored[f"transformer.{key}"]), key
    weights = [weight for key, weight in pipe.transformer.named_parameters() if ".lora_" in key]
    memory = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in weights}
    assert sum(memory.values()) == sum(tensor.nbytes for tensor in stored.values())
    load_lora(pipe, files["some"], name="some")
    draw(pipe)
    pipe.set_adapters("some")
    draw(pipe)
    memory = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in weights}
    assert sum(memory.values()) == sum(tensor.nbytes for tensor in stored.values())


def test_adapters_saved_by_diffusers_are_what_was_loaded(repository, files, tmp_path):
    pipe = build(repository)
    load_lora(pipe, files["whole"])
    draw(pipe)
    ErnieImagePipeline.save_lora_weights(
        tmp_path, peft.get_peft_model_state_dict(pipe.transformer, adapter_name="whole")
    )
    saved, stored = load_file(tmp_path / "pytorch_lora_weights.safetensors"), load_file(files["whole"])
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in stored.items())


def test_what_replaces_pefts_tensors_is_noticed(repository, files):
    pipe = build(repository)
    load_lora(pipe, files["whole"])
    before = draw(pipe)
    for parameter in pipe.transformer.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()  # as `.to` does
    assert np.array_equal(draw(pipe), before)
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if ".lora_A." in name:
                parameter.data = torch.zeros_like(parameter)
    pipe.disable_lora()
    base = draw(pipe)
    pipe.enable_lora()
    assert np.abs(draw(pipe) - base).max() <= 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("memory", MODES)
def test_copies_have_their_own(repository, files, copied, memory):
    pipe = build(repository, memory)
    load_lora(pipe, files["whole"])
    before = draw(pipe)
    twin = copied(pipe.transformer)
    assert type(vars(twin.layers[0].self_attention.to_q)["low_rank"]) is LowRank
    assert low_rank_of(twin.layers[0].self_attention.to_q) is None
    pipe.transformer.set_adapters("whole", 0.0)
    pipe.remove_all_hooks()
    zero = draw(pipe)
    pipe.transformer = twin
    assert np.array_equal(draw(pipe), before)
    assert not np.array_equal(zero, before)


@pytest.mark.parametrize("memory", ["offload", "stream"])
def test_adapters_come_and_go_with_their_block(repository, files, memory):
    pipe = build(repository, memory)
    load_lora(pipe, files["whole"])
    draw(pipe)
    weights = hook_of(pipe.transformer).weights
    arenas = [weights.adapters] if memory == "offload" else weights.streamed.adapters
    assert len(arenas) == (1 if memory == "offload" else len(pipe.transformer.layers))
    assert not any(arena.device_blocks for arena in arenas)
    owners = {id(slot.owner) for arena in arenas for slot in arena.slots}
    ups = {id(weight) for name, weight in pipe.transformer.named_parameters() if ".lora_B." in name}
    assert owners == ups | {id(stack) for stack in stacks_in(pipe.transformer)}
    there = []
    if memory == "stream":
        for block in pipe.transformer.layers:
            there.append([bool(arena.device_blocks) for arena in arenas])
            assert block.mlp.up_proj.lora_B["whole"].weight.data_ptr() != 0
        assert there == [[True, True], [True, True]]  # this one, and the next or the first
    hook_of(pipe.transformer).scheduler.offload_resident()
    pipe.unload_lora_weights()
    draw(pipe)
    assert weights.adapters is None
    assert memory == "offload" or weights.streamed.adapters == []


# Captured steps


def test_other_strengths_leave_a_captured_step_and_other_adapters_dont(repository, files):
    pipe = build(repository)
    draw(pipe)
    transformer = pipe.transformer

    def keeps(change) -> bool:
        draw(pipe)
        kept = captured(transformer)
        transformer.runtime.captured_step.picture = None  # of a picture that goes on
        change()
        transformer.runtime.prepare_adapters(transformer)
        if transformer.runtime.adapters.bring_strengths(CPU):
            transformer.runtime.release_graph()
        return kept() is not None

    assert keeps(lambda: None)
    assert not keeps(lambda: load_lora(pipe, files["whole"], name="whole"))
    assert keeps(lambda: pipe.set_adapters("whole", 0.5))
    assert not keeps(lambda: pipe.disable_lora())
    assert not keeps(lambda: pipe.enable_lora())
    assert not keeps(lambda: load_lora(pipe, files["some"], name="some"))
    assert keeps(lambda: pipe.set_adapters(["whole", "some"], [0.25, -1.0]))
    assert not keeps(lambda: pipe.set_adapters(["some"], [1.0]))
    assert not keeps(lambda: load_lora(pipe, files["beside"], name="beside"))
    assert not keeps(lambda: pipe.set_adapters(["some", "beside"], [1.0, 0.5]))  # peft's layers have it as a number
    assert not keeps(lambda: pipe.unload_lora_weights())
    assert keeps(lambda: None)
    assert is_undisturbed(transformer)


def test_strengths_are_read_from_a_tensor(repository, files):
    pipe = build(repository)
    load_lora(pipe, files["whole"], strength=0.5)
    draw(pipe)
    stack = next(stacks_in(pipe.transformer))
    address = stack.strengths.data_ptr()
    assert stack.strengths.tolist() == [0.5] * 12
    pipe.set_adapters("whole", -2.0)
    draw(pipe)
    assert stack.strengths.tolist() == [-2.0] * 12
    assert stack.strengths.data_ptr() == address


def test_a_base_product_is_added_to_what_is_there():
    torch.manual_seed(0)
    x = torch.randn(5, 64)
    plain, with_bias = torch.nn.Linear(64, 32, bias=False), torch.nn.Linear(64, 32)
    nf4 = Linear4bit(64, 32, bias=True, compute_dtype=torch.float32)
    nf4.load_state_dict({"weight": torch.randn(32, 64), "bias": torch.randn(32)})
    hooked = torch.nn.Linear(64, 32)
    hooked.register_forward_hook(lambda *args: None)
    with torch.no_grad():
        for layer in (plain, with_bias, nf4.to("cpu"), hooked):
            out = torch.ones(5, 32)
            found = linear.add_base_product(layer, x, out)
            assert found.data_ptr() == out.data_ptr()
            assert torch.allclose(found, layer(x) + 1, atol=1e-4)


# On a GPU


def on_gpu(repository: Path, memory: str = "resident", **options) -> ErnieImagePipeline:
    pipe = load(repository, device="cuda", memory=memory, prompt_enhancer=False, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.gpu
@pytest.mark.parametrize("memory", MODES)
def test_on_a_gpu_base_and_low_rank_products_are_one(repository, files, wide_products, memory):
    assert_is_pefts_on_a_gpu(repository, files, memory)
    assert {1, 2, 3} == set(wide_products)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", MODES)
def test_on_a_gpu_the_picture_is_pefts_up_to_rounding_and_the_base_comes_back(repository, files, memory):
    assert_is_pefts_on_a_gpu(repository, files, memory)


def assert_is_pefts_on_a_gpu(repository: Path, files: dict[str, Path], memory: str) -> None:
    plain = on_gpu(repository, dtype="float32", fast=False)
    pipe = on_gpu(repository, memory, dtype="float32")
    plain_base, base = latents_of(plain), latents_of(pipe)
    for name in ("whole", "some"):
        for each in (plain, pipe):
            load_lora(each, files[name], name=name, strength=0.75)
        found, expected = latents_of(pipe), latents_of(plain)
        assert_near(found.cpu(), expected.cpu(), plain_base.cpu())
        assert np.abs(draw(pipe) - draw(plain)).max() <= 1
    pipe.disable_lora()
    assert torch.equal(latents_of(pipe), base)
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe), base)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["resident", "offload"])
@pytest.mark.parametrize("products", ["auto", "int8", "fp8"])
def test_on_a_gpu_steps_are_captured_once_whatever_the_strengths(repository, files, memory, products):
    if products == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs products in fp8")
    pipe = on_gpu(repository, memory, products=products, dtype="bfloat16")
    load_lora(pipe, files["whole"], name="whole")
    strengths, graphs = [1.0, 0.5, -0.5, 0.25, 1.0, 0.0], []

    def change(pipe, step, timestep, tensors):
        captured_step = pipe.transformer.runtime.captured_step
        graphs.append(None if captured_step is None else captured_step.graph)
        pipe.set_adapters("whole", strengths[step])
        return tensors

    def run() -> torch.Tensor:
        pipe.set_adapters("whole", 1.0)
        size = {"height": 32, "width": 48, "num_inference_steps": len(strengths), "output_type": "latent"}
        generator = torch.Generator().manual_seed(0)
        result = pipe("a cat", generator=generator, use_pe=False, callback_on_step_end=change, **size)
        return getattr(result, "images", result).float()

    with peft_counted() as calls:
        found = run()
    assert not calls
    assert graphs[0] is None  # the first step compiles and allocates
    assert graphs[1] is not None
    assert all(graph is graphs[1] for graph in graphs[2:])
    pipe.transformer.runtime.captured_step = None
    assert torch.equal(run(), found)


@pytest.mark.gpu
def test_on_a_gpu_an_adapter_takes_its_bytes_and_no_more(repository, files):
    pipe = on_gpu(repository, dtype="bfloat16")
    latents_of(pipe)
    pipe.transformer.runtime.release_graph()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    load_lora(pipe, files["whole"])
    latents_of(pipe)
    pipe.transformer.runtime.release_graph()
    torch.cuda.synchronize()
    values = sum(tensor.numel() for tensor in load_file(files["whole"]).values()) * torch.bfloat16.itemsize
    # CUDA's allocator rounds each tensor up to 512 bytes.
    tensors = sum(".lora_" in name for name, _ in pipe.transformer.named_parameters())
    assert torch.cuda.memory_allocated() - before <= values + 512 * (tensors + 4)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["offload", "stream"])
def test_on_a_gpu_adapters_wait_in_host_memory(repository, files, memory):
    pipe = on_gpu(repository, memory)
    load_lora(pipe, files["whole"])
    draw(pipe)
    hook_of(pipe.transformer).scheduler.offload_resident()
    assert {weight.device.type for name, weight in pipe.transformer.named_parameters() if ".lora_" in name} == {"cpu"}
    weights = hook_of(pipe.transformer).weights
    arenas = [weights.adapters] if memory == "offload" else weights.streamed.adapters
    assert arenas
    assert not any(arena.device_blocks for arena in arenas)


# The part of an adapter's effect that may be rounding. One that is applied wrongly differs by all of it.
@pytest.mark.gpu
@pytest.mark.parametrize(("products", "most"), [("int8", 0.15), ("fp8", 0.4)])
def test_on_a_gpu_products_in_8_bits_stay_with_adapters(repository, files, products, most):
    if products == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs products in fp8")
    plain = on_gpu(repository, dtype="bfloat16", fast=False)
    pipe = on_gpu(repository, dtype="bfloat16", products=products)
    plain_base, base = latents_of(plain), latents_of(pipe)
    for each in (plain, pipe):
        load_lora(each, files["whole"], strength=0.3)
    expected = latents_of(plain)
    with peft_counted() as calls:
        found = latents_of(pipe)
    assert not calls
    assert_near(found, expected, plain_base, most)
    pipe.disable_lora()
    assert torch.equal(latents_of(pipe), base)
