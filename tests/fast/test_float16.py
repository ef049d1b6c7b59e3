"""float16 without overflow: models whose weights are magnified draw as in float32, up to rounding."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import CHECKOUT
from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel
from test_transformer import build, inputs
from torch import nn

from ernie_image_nf4 import load
from ernie_image_nf4.benchmarking.predictions import largest_error, predictions
from ernie_image_nf4.errors import NotFinite
from ernie_image_nf4.fast.float16 import ScaledLinear, WideEmbedding, make_text_model_mixed
from ernie_image_nf4.fast.ops import elementwise, float16
from ernie_image_nf4.fast.prompt_enhancer import make_prompt_enhancer_fast
from ernie_image_nf4.fast.transformer import TransformerRuntime, make_transformer_fast, several_pictures
from ernie_image_nf4.generation.settings import Settings
from ernie_image_nf4.generation.single import draw
from ernie_image_nf4.memory.apply import apply_placement
from ernie_image_nf4.memory.placement import Placement
from ernie_image_nf4.memory.precision import Precision
from ernie_image_nf4.repository.components import MODEL_INDEX

# The kernels run on a CPU as well: TRITON_INTERPRET=1 pytest tests/fast/test_float16.py
DEVICES = [
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param(
        "cpu", marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
    ),
]
BOTH = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WIDTHS = [(96, 32, 160), (384, 64, 1536), (4096, 128, 12288)]
ROUNDING = 2.0**-10  # of float16, and a little


def tensors(width: int, head: int, wide: int, device: str = "cpu", size: float = 1.0) -> dict[str, torch.Tensor]:
    """What a block's operations take, of 30 tokens in two rows; `size`: of what products give."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    made = {
        "x": 1000 * normal(1, 30, width),
        "branch": normal(1, 30, width).half(),
        "branch_scale": 2.0 ** torch.randint(-3, 9, (1, 30, 1), generator=generator) * size,
        "weight": normal(width).half(),
        "modulation": normal(2, 3 * width),
        "heads": normal(1, 30, width // head, head).half(),
        "angles": normal(1, 30, head),
        "gate": normal(1, 30, wide).half(),
        "up": normal(1, 30, wide).half(),
        "rows": torch.tensor([0] * 12 + [1] * 18),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def calls(t: dict[str, torch.Tensor]) -> dict[str, Callable[[], tuple[torch.Tensor, ...]]]:
    """Each operation on such tensors."""
    scale, shift, gate = t["modulation"].chunk(3, -1)
    head = t["angles"].shape[-1]
    norm = (t["weight"], scale, shift, 1e-6, t["rows"])
    cos, sin = t["angles"].cos(), t["angles"].sin()
    return {
        "modulated_norm": lambda: float16.modulated_norm(t["x"], *norm),
        "gated_add_norm": lambda: float16.gated_add_norm(t["x"], t["branch"], t["branch_scale"], gate, *norm),
        "gated_add": lambda: (float16.gated_add(t["x"], t["branch"], t["branch_scale"], gate, t["rows"]),),
        "norm_rotary": lambda: (
            float16.norm_rotary(t["heads"], t["branch_scale"], t["weight"][:head], cos, sin, 1e-6),
        ),
        "gelu_times": lambda: float16.gelu_times(t["gate"], t["up"], t["branch_scale"]),
        "scaled": lambda: float16.scaled(t["x"]),
        "scaled again": lambda: float16.scaled(t["branch"], t["branch_scale"]),
    }


OPERATIONS = list(calls(tensors(*WIDTHS[0])))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("size", [1.0, 2.0**30])
def test_kernels_give_what_torch_does(operation, device, widths, size, monkeypatch):
    module = elementwise.kernel_module(float16.KERNELS)
    monkeypatch.setattr(float16, "triton_kernels", lambda x, name: module)
    call = calls(tensors(*widths, device, size))[operation]
    fused = call()
    monkeypatch.setattr(float16, "triton_kernels", lambda x, name: None)
    for got, expected in zip(fused, call(), strict=True):
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert (got.float() - expected.float()).norm() <= ROUNDING * expected.float().norm()
        if got.shape[-1] == 1 and operation.startswith("scaled"):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("size", [1.0, 2.0**30, 2.0**-30])
def test_values_times_scales_are_those_of_float32(size):
    t = tensors(*WIDTHS[1], size=size)
    scale, shift, gate = (part[t["rows"]].unsqueeze(0) for part in t["modulation"].chunk(3, -1))
    total = t["x"] + gate * (t["branch"].float() * t["branch_scale"])
    normed = elementwise.modulated_norm(total, t["weight"].float(), *(p[0, [0, 12]] for p in (scale, shift)), 1e-6,
                                        t["rows"])  # fmt: skip
    found = calls(t)["gated_add_norm"]()
    torch.testing.assert_close(found[0], total)
    torch.testing.assert_close(found[1].float() * found[2], normed, rtol=ROUNDING, atol=1e-3)
    gelu = nn.functional.gelu(t["gate"].float() * t["branch_scale"]) * (t["up"].float() * t["branch_scale"])
    values, scales = calls(t)["gelu_times"]()
    largest = gelu.abs().amax(-1, keepdim=True)
    assert ((values.float() * scales - gelu).abs() <= ROUNDING * gelu.abs() + 2.0**-18 * largest).all()
    assert (values.abs().amax(-1) >= 2.0**-7).all()
    assert (values.abs().amax(-1) <= 2.0**-5).all()


def test_all_tokens_of_a_row_have_one_scale_and_a_norm_that_is_bounded():
    t = tensors(*WIDTHS[1])
    t["modulation"] *= 1e6
    t["x"][0, 3] = 0
    t["x"][0, 4] *= 1e9
    values, scales = calls(t)["modulated_norm"]()
    assert values.isfinite().all()
    assert len(scales[0, :12].unique()) == len(scales[0, 12:].unique()) == 1
    assert values.float().norm(dim=-1).max() <= 2.0**float16.NORM
    exponents = scales.log2()
    assert torch.equal(exponents, exponents.round())


def test_a_power_of_two_brings_the_largest_below_the_limit():
    largest = torch.tensor([1e-30, 0.03, 1.0, 1.9999, 2.0, 65504.0, 1e30])
    for exponent in (float16.NORM, float16.LARGEST):
        divided = largest / float16.power_of_two(largest, exponent)
        assert (divided < 2.0**exponent).all()
        assert (divided >= 2.0 ** (exponent - 1)).all()
    ends = torch.tensor([0.0, float("inf"), float("nan")])
    zero, infinite, nan = ends / float16.power_of_two(ends, float16.LARGEST)
    assert (zero, infinite) == (0, float("inf"))
    assert nan.isnan()
    values, _ = float16.scaled(torch.tensor([[1.0, float("inf")], [1.0, 2.0]]))
    assert not values[0].isfinite().all()
    assert values[1].isfinite().all()


# The transformer


def magnified(transformer: nn.Module, names: Iterable[str], factor: float = 1000.0) -> nn.Module:
    """Multiply the weights of the layers with these names, wherever they are."""
    for name, module in transformer.named_modules():
        if any(name.endswith(each) for each in names):
            module.weight.data.mul_(factor)
            if getattr(module, "bias", None) is not None:
                module.bias.data.mul_(factor)
    return transformer


def mixed(transformer: ErnieImageTransformer2DModel, **options: bool) -> ErnieImageTransformer2DModel:
    """As `load` makes one for float16."""
    transformer.float()
    transformer.layers.half()
    make_transformer_fast(transformer, **{"capture_steps": False, "mixed": True, **options})
    return transformer


MAGNIFIED = {
    "residual": ("x_embedder.proj", "text_proj", "to_out.0", "linear_fc2"),
    "feed-forward": ("gate_proj", "up_proj"),
    "values": ("to_v",),
    "text": ("text_proj",),
    "queries and keys": ("to_q", "to_k"),
    "norms": ("adaLN_sa_ln", "adaLN_mlp_ln"),
    "all products": ("x_embedder.proj", "text_proj", "to_out.0", "linear_fc2", "gate_proj", "up_proj", "to_v"),
}


STAYS_FINITE = ("text", "queries and keys")  # in plain float16, at this size


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("what", MAGNIFIED)
@torch.no_grad()
def test_a_magnified_transformer_predicts_as_in_float32(device, what):
    transformer = magnified(build(), MAGNIFIED[what]).to(device)
    call = inputs(device, torch.float32, (1, 9))
    expected = transformer(**call).sample
    plain = copy.deepcopy(transformer).half()(**inputs(device, torch.float16, (1, 9))).sample
    assert plain.isfinite().all() == (what in STAYS_FINITE)
    in_bfloat16 = copy.deepcopy(transformer).bfloat16()
    make_transformer_fast(in_bfloat16, capture_steps=False)
    limit = 3 * largest_error(
        in_bfloat16(**inputs(device, torch.bfloat16, (1, 9))).sample[None].float(), expected[None]
    )
    found = mixed(transformer)(**call).sample
    assert found.dtype == torch.float32
    assert largest_error(found[None], expected[None]) <= min(limit, 0.1)


@torch.no_grad()
def test_a_mixed_transformer_is_nearer_to_float32_than_a_plain_one():
    transformer = build()
    call = inputs("cpu", torch.float32, (1, 9))
    expected = transformer(**call).sample[None]
    plain = copy.deepcopy(transformer).half()(**inputs("cpu", torch.float16, (1, 9))).sample[None].float()
    assert 0 < largest_error(mixed(transformer)(**call).sample[None], expected) < largest_error(plain, expected)


@pytest.mark.parametrize("device", BOTH)
@torch.no_grad()
def test_a_picture_does_not_depend_on_its_neighbours(device):
    transformer = mixed(magnified(build(), MAGNIFIED["residual"])).to(device)
    call = inputs(device, torch.float32, (1, 1, 1, 9, 4, 6))
    with several_pictures(transformer, 3):
        together = transformer(**call).sample
    for number in range(3):
        rows = slice(number, None, 3)
        alone = {name: tensor[rows].contiguous() for name, tensor in call.items()}
        alone["text_bth"] = alone["text_bth"][:, : alone["text_lens"].max()].contiguous()
        assert torch.equal(transformer(**alone).sample, together[rows])


@torch.no_grad()
def test_a_mixed_transformer_takes_float16_as_well():
    transformer = mixed(build())
    call = inputs("cpu", torch.float16, (2, 5))
    found = transformer(**call).sample
    assert found.dtype == torch.float32
    as_float32 = {name: part.float() if part.is_floating_point() else part for name, part in call.items()}
    assert torch.equal(found, transformer(**as_float32).sample)


def test_with_gradients_a_mixed_transformer_is_upstreams_with_a_residual_stream_in_float32():
    transformer = mixed(magnified(build(), MAGNIFIED["residual"][:2]))
    call = inputs("cpu", torch.float32, (2, 5))
    with torch.no_grad():
        expected = transformer(**call).sample
    found = transformer(**call).sample
    assert largest_error(found[None], expected[None]) < 0.01
    found.sum().backward()
    assert transformer.layers[0].mlp.gate_proj.weight.grad is not None


@torch.no_grad()
def test_hooks_within_blocks_of_a_mixed_transformer_are_called():
    transformer, call = mixed(build()), inputs("cpu", torch.float32, (4, 1, 7))
    expected, seen = transformer(**call).sample, []
    with transformer.layers[1].mlp.register_forward_hook(lambda module, args, output: seen.append(output)):
        torch.testing.assert_close(transformer(**call).sample, expected, rtol=0, atol=2e-3 * expected.abs().max())
    assert len(seen) == 1


@torch.no_grad()
def test_an_adapter_works_on_a_mixed_transformer():
    transformer = mixed(build())
    call = inputs("cpu", torch.float32, (2, 5))
    before = transformer(**call).sample
    transformer.add_adapter(pytest.importorskip("peft").LoraConfig(r=2, target_modules=["to_q", "linear_fc2"]))
    assert torch.equal(transformer(**call).sample, before)  # one half of it starts at zero
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(parameter)
    assert not torch.equal(transformer(**call).sample, before)


@torch.no_grad()
def test_copies_and_pickles_stay_mixed():
    transformer = mixed(build())
    call = inputs("cpu", torch.float32, (2, 5))
    expected = transformer(**call).sample
    for twin in (copy.deepcopy(transformer), pickle.loads(pickle.dumps(transformer))):
        assert twin.runtime.mixed
        assert torch.equal(twin(**call).sample, expected)
    make_transformer_fast(transformer, capture_steps=False)
    assert not transformer.runtime.mixed
    assert TransformerRuntime(mixed=True).exact is False


@pytest.mark.gpu
@torch.no_grad()
def test_captured_steps_of_a_mixed_transformer_are_the_same():
    transformer = mixed(magnified(build(), MAGNIFIED["residual"])).to("cuda")
    call = inputs("cuda", torch.float32, (1, 9))
    expected = transformer(**call).sample
    make_transformer_fast(transformer, capture_steps=True, mixed=True)
    found = [transformer(**call).sample for _ in range(4)]
    assert transformer.runtime.captured_step.graph is not None
    assert all(torch.equal(each, expected) for each in found)


# Text models


@pytest.mark.parametrize("device", BOTH)
@torch.no_grad()
def test_a_scaled_layer_gives_float32_where_its_products_would_overflow(device):
    torch.manual_seed(0)
    layer = nn.Linear(64, 32).half().to(device)
    layer.bias.data = layer.bias.data.float()
    x = torch.randn(3, 5, 64, device=device) * 1e7
    expected = nn.functional.linear(x, layer.weight.float(), layer.bias)
    make_text_model_mixed(nn.ModuleList([layer]))
    assert type(layer) is ScaledLinear
    found = layer(x)
    assert (found.dtype, found.shape) == (torch.float32, (3, 5, 32))
    assert (found - expected).norm() < 1e-3 * expected.norm()
    layer.bias.data = layer.bias.data.half()
    half = (x / 1e7).half()
    assert torch.equal(layer(half), nn.functional.linear(half, layer.weight, layer.bias))


def test_a_table_in_16_bits_gives_rows_in_float32():
    table = nn.Embedding(7, 5).half()
    make_text_model_mixed(nn.ModuleList([table]))
    assert type(table) is WideEmbedding
    assert torch.equal(table(torch.tensor([[3, 1]])), table.weight[[3, 1]].float()[None])


# Pipelines


def magnified_pipeline(repository: Path, dtype: str, fast: bool | str = True) -> ErnieImagePipeline:
    """A pipeline whose residual streams, feed-forward products and pictures overflow in float16.

    Norms undo all of it, so that float32 draws about the same as without.
    """
    pipe = load(repository, device="cpu", dtype=dtype, fast=fast)
    pipe.set_progress_bar_config(disable=True)
    for path, module in pipe.transformer.named_modules():
        if path.startswith(("time_embedding.linear", "adaLN_modulation.1")):
            magnify(module, 30)  # with random weights the blocks' gates are nearly shut
        if path.endswith(("x_embedder.proj", "text_proj", "to_out.0")):
            magnify(module, 3e3)
        if path.endswith("up_proj"):
            magnify(module, 1e4)
        if path.endswith("linear_fc2"):
            magnify(module, 0.3)
    for model in (pipe.text_encoder, pipe.pe):
        for path, module in model.named_modules():
            if path.endswith("embed_tokens"):
                magnify(module, 3e4)  # what float16 has room for
            if path.endswith("o_proj"):
                magnify(module, 1e8)
            if path.endswith("up_proj"):
                magnify(module, 1e9)
            if path.endswith("down_proj"):
                magnify(module, 1e-1)
    decoder = pipe.vae.decoder
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d) and module is not decoder.conv_out:
            magnify(module, 1e3)
    return pipe


def magnify(module: nn.Module, factor: float) -> None:
    """Multiply a layer's weight and bias, in NF4 the scales of its scales."""
    if isinstance(module, Linear4bit):
        state = module.weight.quant_state
        state.state2.absmax *= factor
        state.offset *= factor
    else:
        module.weight.data = (module.weight.data.double() * factor).to(module.weight.dtype)
    if getattr(module, "bias", None) is not None:
        module.bias.data.mul_(factor)


SETTINGS = Settings("a cat", "", 32, 48, 2, 4.0, seed=0, use_pe=False)


def drawn(pipe: ErnieImagePipeline, output_type: str, **options: object) -> torch.Tensor:
    """Latents or values of a small picture, float32."""
    options = {"height": 32, "width": 48, "num_inference_steps": 2, "use_pe": False, **options}
    generator = torch.Generator().manual_seed(0)
    result = pipe("a cat", generator=generator, output_type=output_type, **options)
    return torch.as_tensor(getattr(result, "images", result)).float()  # diffusers 0.38: latents alone, and numpy


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def pipelines(repository: Path) -> dict[str, ErnieImagePipeline]:
    return {dtype: magnified_pipeline(repository, dtype) for dtype in ("float32", "bfloat16", "float16")}


@pytest.mark.parametrize("output_type", ["latent", "pt"])
def test_a_magnified_pipeline_draws_as_in_float32(pipelines, output_type):
    expected, in_bfloat16, found = (drawn(pipe, output_type) for pipe in pipelines.values())
    assert 0 < relative(found, expected) <= 3 * relative(in_bfloat16, expected)


def test_embeddings_beyond_float16_reach_the_transformer(pipelines):
    expected, in_bfloat16, found = (pipe.encode_prompt("a cat", torch.device("cpu"))[0] for pipe in pipelines.values())
    assert expected.abs().max() > torch.finfo(torch.float16).max
    assert relative(found, expected) <= 3 * relative(in_bfloat16.float(), expected)


@pytest.mark.parametrize("fast", [False, True])
def test_the_enhancer_writes_what_it_writes_in_float32(pipelines, fast, repository):
    texts = []
    for dtype in ("float32", "float16"):
        pe = copy.deepcopy(pipelines[dtype].pe)
        if fast:
            make_prompt_enhancer_fast(pe)
        ids = pipelines[dtype].pe_tokenizer("a cat on a beach", return_tensors="pt").input_ids
        texts.append(pe.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0))
    assert torch.equal(*texts)


@torch.no_grad()
def test_a_vae_that_overflows_decodes_in_float32(pipelines):
    vaes = [pipelines[dtype].vae for dtype in ("float32", "float16")]
    latents = torch.randn(1, vaes[0].config.latent_channels, 4, 6, generator=torch.Generator().manual_seed(1))
    half = copy.deepcopy(vaes[0]).half().decode(latents.half()).sample
    assert not half.isfinite().all()
    expected, found = (vae.decode(latents).sample for vae in vaes)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("fast", ["exact", False])
def test_upstreams_float16_overflows_and_says_so(repository, fast):
    with pytest.raises(NotFinite, match=r"\(float16\).*load with"):
        draw(magnified_pipeline(repository, "float16", fast), SETTINGS)


def test_each_part_has_the_dtype_that_is_safe_for_it(repository):
    pipe = load(repository, device="cpu", dtype="float16")
    half, single = torch.float16, torch.float32

    def dtypes(model: nn.Module) -> set[torch.dtype]:
        return {parameter.dtype for parameter in model.parameters() if parameter.dtype != torch.uint8}

    def products(model: nn.Module) -> set[torch.dtype]:
        return {module.compute_dtype for module in model.modules() if isinstance(module, Linear4bit)}

    blocks = pipe.transformer.layers
    assert dtypes(blocks) == products(blocks) == {half}
    assert {m.weight.quant_state.dtype for m in blocks.modules() if isinstance(m, Linear4bit)} == {half}
    around = [part for name, part in pipe.transformer.named_children() if name != "layers"]
    assert set().union(*map(dtypes, around)) == set().union(*map(products, around)) == {single}
    for model in (pipe.text_encoder, pipe.pe):
        assert products(model) == {single}
        assert {p.dtype for p in model.parameters() if p.dtype != torch.uint8 and p.ndim > 1} == {half}
        assert {p.dtype for p in model.parameters() if p.ndim == 1} == {single}
    assert dtypes(pipe.vae) == {single}
    assert pipe.transformer.dtype == single  # of the latents and embeddings that the pipeline makes


def test_the_minis_predictions_in_float16_are_nearer_to_float32_than_in_bfloat16():
    if not (CHECKOUT / MODEL_INDEX).exists():
        pytest.skip("this checkout holds no weights")
    pipes = [load(CHECKOUT, device="cpu", dtype=dtype, prompt_enhancer=False) for dtype in ("float32", "float16")]
    expected, found = (predictions(pipe, 64, "cpu")["prediction"] for pipe in pipes)
    assert 0 < largest_error(found, expected) < 1.5e-3


@pytest.mark.gpu
@torch.no_grad()
def test_a_mixed_step_takes_the_memory_that_estimates_count_with():
    taken = []
    for dtype in (torch.bfloat16, torch.float16):
        transformer = build(hidden_size=768, num_attention_heads=24, ffn_hidden_size=2304, num_layers=2).to("cuda")
        if dtype == torch.float16:
            mixed(transformer)
        else:
            make_transformer_fast(transformer.to(dtype), capture_steps=False)
        call = inputs("cuda", transformer.dtype, (8, 8))
        call["hidden_states"] = call["hidden_states"].repeat(1, 1, 12, 16)
        for _ in range(2):  # the first one allocates what libraries keep
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            transformer(**call)
        taken.append(torch.cuda.max_memory_allocated() - before)
    assert 1 < taken[1] / taken[0] <= Precision(torch.float16, mixed=True).work_factor("transformer")


@pytest.mark.parametrize("memory", ["resident", "offload", "stream"])
def test_memory_modes_agree(repository, pipelines, memory):
    expected = drawn(load(repository, device="cpu", dtype="float16"), "latent")
    pipe = load(repository, device="cpu", dtype="float16")
    apply_placement(pipe, Placement(torch.device("cpu"), torch.float16, memory, fast=True, mixed=True))
    assert torch.equal(drawn(pipe, "latent"), expected)


def test_what_is_saved_loads_again(repository, tmp_path):
    pipe = load(repository, device="cpu", dtype="float16")
    expected = drawn(pipe, "pt")
    pipe.save_pretrained(tmp_path)
    for dtype, error in (("float16", 0.0), ("float32", 1e-3)):
        assert relative(drawn(load(tmp_path, device="cpu", dtype=dtype), "pt"), expected) <= error
