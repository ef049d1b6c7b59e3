"""The faster forward pass: upstream's result up to rounding, on a plain upstream transformer."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import ErnieImageTransformer2DModel
from diffusers.hooks import apply_layerwise_casting
from diffusers.models.transformers.transformer_ernie_image import ErnieImageSingleStreamAttnProcessor

from ernie_image_nf4 import load
from ernie_image_nf4.benchmarking.predictions import largest_error, predictions
from ernie_image_nf4.fast import attention, packing
from ernie_image_nf4.fast import transformer as fast_transformer
from ernie_image_nf4.fast.cuda_graphs import is_undisturbed, may_be_captured
from ernie_image_nf4.fast.ops import elementwise
from ernie_image_nf4.fast.transformer import (
    FastErnieImageBlock,
    FastErnieImageTransformer,
    TransformerRuntime,
    make_transformer_fast,
    several_pictures,
)
from ernie_image_nf4.repository.components import MODEL_INDEX

CHECKOUT = Path(__file__).parents[2]

CASES = [
    pytest.param("cpu", torch.float32, 2e-6, id="cpu"),
    pytest.param("cuda", torch.float32, 1e-5, id="cuda-float32", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, 1e-2, id="cuda-bfloat16", marks=pytest.mark.gpu),
]


def build(**options) -> ErnieImageTransformer2DModel:
    torch.manual_seed(0)
    small = {
        "hidden_size": 96, "num_attention_heads": 3, "num_layers": 3, "ffn_hidden_size": 160, "in_channels": 8,
        "out_channels": 8, "text_in_dim": 24, "rope_axes_dim": (8, 12, 12),
    }  # fmt: skip
    transformer = ErnieImageTransformer2DModel(**small | options)
    for parameter in transformer.parameters():  # upstream starts its modulation and its end at zero
        torch.nn.init.normal_(parameter, std=0.2)
    return transformer.eval()


def inputs(device: str, dtype: torch.dtype, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(len(lengths), max(lengths), 24, generator=generator)
    for row, length in enumerate(lengths):
        text[row, length:] = 0
    return {
        "hidden_states": torch.randn(len(lengths), 8, 8, 6, generator=generator).to(device, dtype),
        "timestep": torch.full((len(lengths),), 700.0, device=device, dtype=dtype),
        "text_bth": text.to(device, dtype),
        "text_lens": torch.tensor(lengths, device=device),
    }


@pytest.mark.parametrize(("device", "dtype", "tolerance"), CASES)
@pytest.mark.parametrize("lengths", [(5, 5), (1, 9), (3,), (4, 1, 7)])
@pytest.mark.parametrize("options", [{}, {"patch_size": 2}])
@pytest.mark.parametrize("exact", [False, True])
@torch.no_grad()
def test_the_prediction_is_upstreams_up_to_rounding(device, dtype, tolerance, lengths, options, exact):
    transformer = build(**options).to(device, dtype)
    arguments = inputs(device, dtype, lengths)
    expected = transformer(**arguments).sample.float()
    make_transformer_fast(transformer, capture_steps=False, exact=exact)
    got = transformer(**arguments)
    assert torch.equal(transformer(**arguments, return_dict=False)[0], got.sample)
    error = (got.sample.float() - expected).norm() / expected.norm()
    assert error < tolerance


@pytest.mark.parametrize(("device", "dtype", "tolerance"), CASES)
@pytest.mark.parametrize(("lengths", "count"), [((1, 1, 1, 9, 4, 6), 3), ((3, 3, 5, 8), 2), ((3, 7), 2)])
@torch.no_grad()
def test_several_pictures_are_upstreams_up_to_rounding(device, dtype, tolerance, lengths, count):
    transformer = build().to(device, dtype)
    arguments = inputs(device, dtype, lengths)
    expected = transformer(**arguments).sample.float()
    make_transformer_fast(transformer, capture_steps=False)
    with several_pictures(transformer, count):
        got = transformer(**arguments).sample
    assert (got.float() - expected).norm() / expected.norm() < tolerance
    assert transformer.runtime.pictures == 1
    again = transformer(**arguments).sample  # as rows that have nothing in common
    assert (again.float() - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize(("device", "dtype", "tolerance"), CASES)
@pytest.mark.parametrize(("long_row", "exact", "alone"), [(48, False, True), (49, False, False), (48, True, False)])
@torch.no_grad()
def test_long_rows_are_not_joined_after_attention(monkeypatch, device, dtype, tolerance, long_row, exact, alone):
    monkeypatch.setattr(packing, "LONG_ROW", long_row)
    products, mm = [], torch.mm
    transformer = build().to(device, dtype)
    arguments = inputs(device, dtype, (1, 9))
    expected = transformer(**arguments).sample.float()
    make_transformer_fast(transformer, capture_steps=False, exact=exact)
    monkeypatch.setattr(torch, "mm", lambda *args, out: products.append(len(args[0])) or mm(*args, out=out))
    got = transformer(**arguments).sample.float()
    assert products == ([48 + 1, 48 + 9] * 3 if alone else [])
    assert (got - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize(("device", "dtype", "tolerance"), CASES)
@torch.no_grad()
def test_a_hooked_block_takes_and_gives_tokens_and_changes_nothing(device, dtype, tolerance):
    transformer, seen = build().to(device, dtype), []
    make_transformer_fast(transformer, capture_steps=False)
    arguments = inputs(device, dtype, (1, 9))
    expected = transformer(**arguments).sample
    transformer.layers[1].register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
    assert torch.equal(transformer(**arguments).sample, expected)
    assert [each.shape for each in seen] == [(1, 2 * 48 + 1 + 9, 96)] * 2


class Noted(ErnieImageSingleStreamAttnProcessor):
    """A processor of somebody's own, which counts its calls."""

    calls = 0

    def __call__(self, *args, **kwargs):
        Noted.calls += 1
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize(
    "name",
    ["self_attention", "mlp", "adaLN_sa_ln", "adaLN_mlp_ln", "self_attention.norm_q", "self_attention.norm_k",
     "self_attention.to_q", "self_attention.to_out.0", "mlp.up_proj", "mlp.linear_fc2"],
)  # fmt: skip
@torch.no_grad()
def test_hooks_within_blocks_are_called_and_what_they_return_counts(name):
    transformer, arguments = build(), inputs("cpu", torch.float32, (4, 1, 7))
    make_transformer_fast(transformer, capture_steps=False)
    expected, seen = transformer(**arguments).sample, []
    module = transformer.layers[1].get_submodule(name)
    handle = module.register_forward_hook(lambda module, args, output: seen.append(module))
    torch.testing.assert_close(transformer(**arguments).sample, expected, rtol=0, atol=2e-6 * expected.abs().max())
    assert seen
    assert set(map(id, seen)) == {id(module)}
    handle.remove()
    assert torch.equal(transformer(**arguments).sample, expected)
    if name in ("self_attention.norm_q", "self_attention.norm_k", "self_attention.to_q"):
        return  # of random weights: queries and keys hardly matter
    with module.register_forward_hook(lambda module, args, output: output * 2):
        assert (transformer(**arguments).sample - expected).abs().max() > 1e-4 * expected.abs().max()


@torch.no_grad()
def test_an_attention_processor_of_ones_own_is_called_and_no_step_with_it_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    latents = SimpleNamespace(is_cuda=True)
    transformer, arguments = build(), inputs("cpu", torch.float32, (4, 1, 7))
    make_transformer_fast(transformer, capture_steps=False)
    expected = transformer(**arguments).sample
    assert not transformer.has_upstream_blocks()
    assert may_be_captured(transformer, latents)
    transformer.layers[2].self_attention.set_processor(Noted())
    Noted.calls = 0
    torch.testing.assert_close(transformer(**arguments).sample, expected, rtol=0, atol=2e-6 * expected.abs().max())
    assert Noted.calls == 1
    assert transformer.has_upstream_blocks()
    assert not may_be_captured(transformer, latents)


@torch.no_grad()
def test_attention_gets_a_mask_only_where_it_is_to_round_as_upstreams(monkeypatch):
    given = []
    dispatch = attention.attention_dispatch()

    def noted(*args, attn_mask, **kwargs):
        given.append(attn_mask)
        return dispatch(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(attention, "attention_dispatch", lambda: noted)
    transformer, call = build(), inputs("cpu", torch.float32, (4, 1, 7))
    for exact in (False, True):
        given.clear()
        make_transformer_fast(transformer, capture_steps=False, exact=exact)
        transformer(**call)
        assert len(given) == 3 * 3  # each row of each layer by itself
        assert all((mask is not None) == exact for mask in given)


@pytest.mark.gpu
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("guidance", [True, False])
@torch.no_grad()
def test_at_full_width_a_picture_is_the_same_alone_and_among_others_and_upstreams_if_exact(guidance, exact):
    transformer = build(
        hidden_size=4096, num_attention_heads=32, num_layers=2, ffn_hidden_size=12288, in_channels=128,
        out_channels=128, text_in_dim=3072, rope_axes_dim=(32, 48, 48),
    ).to("cuda", torch.bfloat16)  # fmt: skip
    for parameter in transformer.parameters():
        parameter.data.mul_(0.1)
    count, rows = 4, 2 if guidance else 1
    lengths = [3] * count * (rows - 1) + [20, 90, 33, 150]
    latents = torch.randn(count, 128, 32, 32, device="cuda", dtype=torch.bfloat16).repeat(rows, 1, 1, 1)
    text = torch.randn(rows * count, max(lengths), 3072, device="cuda", dtype=torch.bfloat16)
    for row, length in zip(text, lengths, strict=True):
        row[length:] = 0
    lengths = torch.tensor(lengths, device="cuda")

    def predict_rows(part: slice) -> torch.Tensor:
        longest = int(lengths[part].max())
        timestep = torch.full((len(lengths[part]),), 700.0, device="cuda", dtype=torch.bfloat16)
        texts = text[part, :longest].contiguous()
        return transformer(latents[part].contiguous(), timestep, texts, lengths[part].clone(), return_dict=False)[0]

    upstream = [predict_rows(slice(number, None, count)) for number in range(count)]
    make_transformer_fast(transformer, capture_steps=False, exact=exact)
    with several_pictures(transformer, count):
        together = predict_rows(slice(None))
    for number in range(count):
        alone = predict_rows(slice(number, None, count))
        if exact:
            assert torch.equal(alone, upstream[number])
        assert largest_error(alone[None].float(), upstream[number][None].float()) < 1e-2
        assert torch.equal(together[number::count], alone)


def test_the_minis_predictions_in_bfloat16_are_upstreams_up_to_rounding():
    if not (CHECKOUT / MODEL_INDEX).exists():
        pytest.skip("this checkout holds no weights")
    pipe = load(CHECKOUT, device="cpu", dtype="bfloat16", prompt_enhancer=False)
    expected = predictions(pipe, 64, "cpu")["prediction"]
    make_transformer_fast(pipe.transformer, capture_steps=False)
    assert largest_error(predictions(pipe, 64, "cpu")["prediction"], expected) < 1e-2


@torch.no_grad()
def test_it_runs_fast_blocks(monkeypatch: pytest.MonkeyPatch):
    transformer, calls = build(), []
    original = elementwise.gelu_times
    monkeypatch.setattr(elementwise, "gelu_times", lambda *args: calls.append(1) or original(*args))
    transformer(**inputs("cpu", torch.float32, (2, 3)))
    assert not calls
    make_transformer_fast(transformer, capture_steps=False)
    transformer(**inputs("cpu", torch.float32, (2, 3)))
    assert len(calls) == 3


@torch.no_grad()
def test_a_block_called_as_upstream_calls_it_is_upstreams():
    transformer = build()
    block, x = transformer.layers[0], torch.randn(7, 2, 96)
    angles, modulation = torch.randn(2, 7, 1, 32), [torch.randn(2, 96) for _ in range(6)]
    expected = block(x, angles, modulation, None)
    make_transformer_fast(transformer, capture_steps=False)
    assert isinstance(block, FastErnieImageBlock)
    assert torch.equal(block(x, angles, modulation, None), expected)


@torch.no_grad()
def test_what_is_kept_for_a_picture_is_not_taken_for_another():
    transformer = build()
    call = inputs("cpu", torch.float32, (2, 5))
    larger = call | {"hidden_states": torch.randn(2, 8, 10, 6, generator=torch.Generator().manual_seed(3))}
    other = call | {"text_lens": torch.tensor([5, 3])}
    expected = [transformer(**each).sample for each in (call, larger, other)]
    make_transformer_fast(transformer, capture_steps=False)
    for each, reference in zip((call, larger, call, other), (*expected[:2], expected[0], expected[2]), strict=True):
        assert (transformer(**each).sample - reference).norm() / reference.norm() < 2e-6
    call["text_lens"].copy_(other["text_lens"])  # in place
    assert (transformer(**call).sample - expected[2]).norm() / expected[2].norm() < 2e-6


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_size": 72, "rope_axes_dim": (8, 8, 8)},  # heads of 24
        {"hidden_size": 12, "rope_axes_dim": (0, 2, 2)},  # of 4
        {"rope_axes_dim": (8, 8, 8)},  # heads that are rotated in part
    ],
    ids=str,
)
@torch.no_grad()
def test_a_transformer_that_the_kernels_do_not_fit_is_left_alone(options):
    transformer = build(**options)
    make_transformer_fast(transformer, capture_steps=True)
    assert not any(type(module).__module__.startswith("ernie_image_nf4") for module in transformer.modules())
    assert "runtime" not in vars(transformer)


def test_a_transformer_of_other_classes_is_left_alone():
    class Block(type(build().layers[0])):
        pass

    class Transformer(ErnieImageTransformer2DModel):
        pass

    transformer = build()
    transformer.layers[1].__class__ = Block
    make_transformer_fast(transformer, capture_steps=False)
    assert type(transformer) is ErnieImageTransformer2DModel
    transformer = build()
    transformer.__class__ = Transformer
    make_transformer_fast(transformer, capture_steps=False)
    assert type(transformer) is Transformer


def test_a_fast_transformer_gets_another_setting():
    transformer = build()
    make_transformer_fast(transformer, capture_steps=False)
    transformer.runtime.products = "int8"
    make_transformer_fast(transformer, capture_steps=True, exact=True)
    assert type(transformer) is FastErnieImageTransformer
    assert transformer.runtime.captured_step is not None
    assert transformer.runtime.products == "int8"
    assert transformer.runtime.exact


@torch.no_grad()
def test_without_diffusers_attention_dispatch_a_transformer_is_left_alone(monkeypatch):
    monkeypatch.setattr(fast_transformer, "attention_dispatch", lambda: None)
    transformer = build()
    make_transformer_fast(transformer, capture_steps=True)
    assert type(transformer) is ErnieImageTransformer2DModel
    call = inputs("cpu", torch.float32, (2, 3))
    expected = transformer(**call).sample
    monkeypatch.undo()
    make_transformer_fast(transformer, capture_steps=True)
    monkeypatch.setattr(fast_transformer, "attention_dispatch", lambda: None)  # as for a pickle that comes later
    assert torch.equal(transformer(**call).sample, expected)


@torch.no_grad()
def test_a_model_built_by_the_fast_class_itself_is_upstreams():
    transformer = build()
    expected = transformer(**inputs("cpu", torch.float32, (2, 3))).sample
    built = FastErnieImageTransformer.from_config(transformer.config).eval()
    built.load_state_dict(transformer.state_dict())
    assert torch.equal(built(**inputs("cpu", torch.float32, (2, 3))).sample, expected)
    make_transformer_fast(built, capture_steps=False)
    assert type(built.layers[0]) is FastErnieImageBlock
    error = (built(**inputs("cpu", torch.float32, (2, 3))).sample - expected).norm() / expected.norm()
    assert error < 2e-6


def test_training_goes_through_upstream():
    transformer = build()
    arguments = inputs("cpu", torch.float32, (2, 3))
    expected = transformer(**arguments).sample
    make_transformer_fast(transformer, capture_steps=False)
    got = transformer(**arguments).sample
    assert torch.equal(got, expected)
    got.sum().backward()
    assert transformer.layers[0].mlp.gate_proj.weight.grad is not None


WIDTHS = [(160, 32), (384, 64), (4096, 128)]  # torch adds rows of up to 128 values in yet another order


def kernel_inputs(dtype: torch.dtype, width: int, head: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "x": (2, 700, width),
        "branch": (2, 700, width),
        "weight": (width,),
        "modulation": (2, 3 * width),
        "heads": (2, 700, width // head, head),
        "angles": (2, 700, head),
    }
    return {name: torch.randn(shape, generator=generator).cuda().to(dtype) for name, shape in shapes.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "head"), WIDTHS)
def test_triton_kernels_give_what_torch_does(
    dtype: torch.dtype, width: int, head: int, monkeypatch: pytest.MonkeyPatch
):
    t = kernel_inputs(dtype, width, head)
    scale, shift, gate = t["modulation"].chunk(3, -1)
    packed, rows = t["x"].flatten(0, 1)[:200].unsqueeze(0), torch.tensor([0] * 80 + [1] * 120, device="cuda")
    calls = [
        lambda: elementwise.modulated_norm(t["x"], t["weight"], scale, shift, 1e-6),
        lambda: elementwise.rms_norm(t["x"], t["weight"], 1e-6),
        lambda: elementwise.gated_add_norm(t["x"], t["branch"], gate, t["weight"], scale, shift, 1e-6)[1],
        lambda: elementwise.gated_add_norm(t["x"], t["branch"], gate, t["weight"], scale, shift, 1e-6)[0],
        lambda: elementwise.gated_add(t["x"], t["branch"], gate),
        lambda: elementwise.modulated_norm(packed, t["weight"], scale, shift, 1e-6, rows),
        lambda: elementwise.gated_add_norm(packed, packed + 1, gate, t["weight"], scale, shift, 1e-6, rows)[1],
        lambda: elementwise.gated_add(packed, packed + 1, gate, rows),
        lambda: elementwise.norm_rotary(t["heads"], t["weight"][:head], t["angles"].cos(), t["angles"].sin(), 1e-6),
        lambda: elementwise.gelu_times(t["x"], t["branch"]),
    ]
    assert elementwise.triton_kernels(t["x"])
    fused = [call() for call in calls]
    monkeypatch.setattr(elementwise, "triton_kernels", lambda x: None)
    for number, (call, result) in enumerate(zip(calls, fused, strict=True)):
        if dtype == torch.float32:  # where torch's kernels fuse products and sums as they like
            assert (result - call()).norm() / call().norm() < 1e-6, number
        else:  # to the last bit: each difference in one grows from block to block
            assert torch.equal(result, call()), number


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gelu_is_torchs_for_every_value_there_is(dtype: torch.dtype):
    values = torch.arange(-(2**15), 2**15, device="cuda").to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    assert torch.equal(elementwise.gelu_times(values, torch.ones_like(values)), torch.nn.functional.gelu(values))


# The step as a CUDA graph


class OffloadHook(ModelHook):
    """As the memory modes have it: called as a forward pre-hook, found where accelerate's hooks are."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.on_offload = None
        module._hf_hook = self
        module.register_forward_pre_hook(self.called)

    def called(self, module: torch.nn.Module, args: tuple) -> None:
        self.pre_forward(module)


def test_a_captured_step_goes_when_the_transformer_leaves_its_device(monkeypatch):
    transformer, released = build(), []
    make_transformer_fast(transformer, capture_steps=True)
    monkeypatch.setattr(transformer.runtime.captured_step, "release", lambda: released.append(transformer.device.type))
    transformer.to("cpu")
    transformer.to(torch.float64)
    assert not released
    transformer.to(device="meta")
    assert released == ["meta"]


def test_hooks_keep_steps_from_being_captured():
    assert is_undisturbed(build())
    hooked = build()
    hooked.layers[1].register_forward_hook(lambda *args: None)
    assert not is_undisturbed(hooked)
    cast = build()
    apply_layerwise_casting(cast, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert not is_undisturbed(cast)


def test_the_transformers_own_offloading_hook_lets_steps_be_captured():
    wrapped = build()
    add_hook_to_module(wrapped, ModelHook())  # as diffusers' enable_model_cpu_offload
    assert is_undisturbed(wrapped)
    offloaded = build()
    OffloadHook(offloaded)
    assert is_undisturbed(offloaded)
    offloaded.register_forward_pre_hook(lambda *args: None)
    assert not is_undisturbed(offloaded)
    inside = build()
    OffloadHook(inside.layers[0])
    assert not is_undisturbed(inside)


def steps(transformer: ErnieImageTransformer2DModel, call: dict[str, torch.Tensor], count: int) -> list[torch.Tensor]:
    """Predictions of several steps of a picture: other latents and timesteps, the same text."""
    return [
        transformer(
            **call | {"hidden_states": call["hidden_states"] * (1 + n), "timestep": call["timestep"] - n}
        ).sample
        for n in range(count)
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("offloaded", [False, True])
@torch.no_grad()
def test_captured_steps_are_the_same_to_the_last_bit(offloaded):
    transformer = build().to("cuda", torch.bfloat16)
    make_transformer_fast(transformer, capture_steps=False)
    calls = [inputs("cuda", torch.bfloat16, lengths) for lengths in ((1, 9), (3, 9))]
    expected = [steps(transformer, call, 4) for call in calls]
    transformer.runtime = TransformerRuntime(capture_steps=True)
    if offloaded:
        OffloadHook(transformer)
    graphs = set()
    for call, pictures in zip(calls, expected, strict=True):
        for got, reference in zip(steps(transformer, call, 4), pictures, strict=True):
            assert torch.equal(got, reference)
        graphs.add(transformer.runtime.captured_step.graph)
    assert None not in graphs
    assert len(graphs) == 2  # one a picture


@pytest.fixture
def captured() -> FastErnieImageTransformer:
    """One on the GPU whose steps are captured."""
    transformer = build().to("cuda", torch.bfloat16)
    make_transformer_fast(transformer, capture_steps=True)
    return transformer


@pytest.mark.gpu
@torch.no_grad()
def test_a_graph_is_captured_once_a_picture_and_its_memory_given_back(captured):
    transformer, call = captured, inputs("cuda", torch.bfloat16, (1, 9))
    step = transformer.runtime.captured_step
    steps(transformer, call, 3)
    transformer.runtime.release_graph()  # as decoding a preview does
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    steps(transformer, call, 3)
    assert step.graph is None
    for number in range(3):
        steps(transformer, inputs("cuda", torch.bfloat16, (2 + number, 9)), 3)
        assert step.graph is not None
    transformer.runtime.release_graph()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


@pytest.mark.gpu
@torch.no_grad()
def test_a_copy_captures_a_step_of_its_own(captured):
    call = inputs("cuda", torch.bfloat16, (1, 9))
    expected = steps(captured, call, 4)
    twin = copy.deepcopy(captured)
    for weight in captured.parameters():
        weight.zero_()
    for got, reference in zip(steps(twin, call, 4), expected, strict=True):
        assert torch.equal(got, reference)
    assert twin.runtime.captured_step.graph is not None


@pytest.mark.gpu
@torch.no_grad()
def test_a_step_that_cannot_be_captured_goes_through_python(captured, monkeypatch):
    transformer, call = captured, inputs("cuda", torch.bfloat16, (1, 9))
    step = transformer.runtime.captured_step
    expected = steps(transformer, call, 1)[0]
    norm, predict = transformer.layers[0].adaLN_sa_ln.weight, FastErnieImageTransformer.predict

    def waiting(self, *arguments):
        norm.sum().item()  # waits for the GPU
        return predict(self, *arguments)

    monkeypatch.setattr(FastErnieImageTransformer, "predict", waiting)
    stream = torch.cuda.current_stream()
    for got in (transformer(**call).sample, transformer(**call).sample):
        assert torch.equal(got, expected)
    assert step.graph is None
    assert torch.cuda.current_stream() == stream
    torch.cuda.manual_seed(3)
    drawn = torch.rand(5, device="cuda")
    torch.cuda.manual_seed(3)
    assert torch.equal(torch.rand(5, device="cuda"), drawn)
    step.failed = False
    monkeypatch.setattr(FastErnieImageTransformer, "predict", predict)
    for got in steps(transformer, inputs("cuda", torch.bfloat16, (1, 9)), 3)[:1]:
        assert torch.equal(got, expected)
    assert step.graph is not None
