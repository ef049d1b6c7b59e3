"""Fast decoding of the prompt enhancer: upstream's tokens when greedy, upstream's distribution when sampled.

Uncaptured, the decode step is the same code on a CPU; what only capture can break is tested on a GPU.
"""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from accelerate.hooks import ModelHook
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, Ministral3Config, Ministral3ForCausalLM
from transformers.models.ministral3 import modeling_ministral3
from transformers.models.ministral3.modeling_ministral3 import Ministral3Attention, Ministral3RMSNorm

from ernie_image_nf4 import load
from ernie_image_nf4.fast import decoder, decoder_runtime, prompt_enhancer
from ernie_image_nf4.fast.prompt_enhancer import (
    FastAttention,
    FastPromptEnhancer,
    FastRMSNorm,
    RotaryTables,
    make_prompt_enhancer_fast,
)
from ernie_image_nf4.upstream import gone, models

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EOS, PAD = 2, 0


def build(device: str, vocabulary: int = 64, seed: int = 0) -> Ministral3ForCausalLM:
    torch.manual_seed(seed)
    rope = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
        "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16,
    }  # fmt: skip
    config = Ministral3Config(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, rope_parameters=rope, pad_token_id=PAD,
        bos_token_id=1, eos_token_id=EOS, initializer_range=0.4,
    )  # fmt: skip
    return Ministral3ForCausalLM(config).eval().to(device)


@pytest.fixture(params=DEVICES)
def model(request: pytest.FixtureRequest) -> Ministral3ForCausalLM:
    return build(request.param)


def prompt(model: Ministral3ForCausalLM, *shape: int, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, shape, generator=generator).to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def served(model: Ministral3ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Make the model fast and collect the calls that the decoder serves."""
    calls, original = [], decoder_runtime.DecoderRuntime.generate

    def noted(self, model, request):
        calls.append(request)
        return original(self, model, request)

    monkeypatch.setattr(decoder_runtime.DecoderRuntime, "generate", noted)
    make_prompt_enhancer_fast(model)
    return calls


@pytest.mark.parametrize("shape", [(1, 7), (3, 5)])
@pytest.mark.parametrize("minimum", [None, 30])
def test_greedy_tokens_are_upstreams(model, monkeypatch, shape, minimum):
    inputs = prompt(model, *shape)
    options = {
        "max_new_tokens": 60,
        "min_new_tokens": minimum,
        "do_sample": False,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    }
    expected = model.generate(**inputs, **options)
    calls = served(model, monkeypatch)
    for _ in range(2):  # the second call takes the first one's cache
        assert torch.equal(model.generate(**inputs, **options), expected)
    assert len(calls) == 2


def test_an_early_end_token_ends_the_text_as_upstream_does(model, monkeypatch):
    inputs = prompt(model, 2, 4)
    free = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=PAD, eos_token_id=None)
    eos = [int(free[0, 9]), int(free[1, 14])]
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": PAD, "eos_token_id": eos}
    expected = model.generate(**inputs, **options)
    assert expected.shape[1] < 24
    assert served(model, monkeypatch) == []
    assert torch.equal(model.generate(**inputs, **options), expected)


def test_a_text_longer_than_the_cache_makes_it_grow(model, monkeypatch):
    monkeypatch.setattr(decoder, "CACHE_STEP", 16)
    inputs = prompt(model, 1, 5)
    options = {"max_new_tokens": 100, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    served(model, monkeypatch)
    assert torch.equal(model.generate(**inputs, **options), expected)


def test_a_text_does_not_depend_on_the_cache_of_a_longer_one_before(model, monkeypatch):
    monkeypatch.setattr(decoder, "CACHE_STEP", 16)
    used, forward = [], decoder.forward

    def noted(model, buffers, *args):
        used.append(buffers.capacity)
        return forward(model, buffers, *args)

    monkeypatch.setattr(decoder, "forward", noted)
    served(model, monkeypatch)
    prefills = []
    for new in (8, 100, 8):
        used.clear()
        model.generate(**prompt(model, 1, 5), max_new_tokens=new, do_sample=False, pad_token_id=PAD, eos_token_id=None)
        prefills.append(used[0])
    assert prefills == [16, 16, 16]


@torch.no_grad()
def test_decoding_computes_attention_by_one_kernel_and_changes_no_setting_of_other_threads(model):
    make_prompt_enhancer_fast(model)
    switches = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda *_: switches.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()))
    )
    ids = prompt(model, 1, 5)["input_ids"]
    with Operations() as operations:
        decoded(model, ids, torch.arange(5, device=model.device)[None])
    assert switches == [(True, True)]
    kernels = [name for name in operations.names if name.startswith("_scaled_dot_product")]
    expected = {"_scaled_dot_product_efficient_attention"} if model.device.type == "cuda" else set()
    assert {name for name in kernels if "cudnn" in name or "efficient" in name} == expected


@pytest.mark.gpu
def test_the_same_request_gives_the_same_text_at_full_depth():
    """Wide heads and many layers, as with those cuDNN's attention rounded differently now and then."""
    torch.manual_seed(0)
    config = Ministral3Config(
        vocab_size=32_000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=26, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS,
    )  # fmt: skip
    with torch.device("cuda"):
        model = Ministral3ForCausalLM(config).eval().to(torch.bfloat16)
    make_prompt_enhancer_fast(model)
    request = prompt(model, 1, 131) | {"max_new_tokens": 200, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    texts = []
    for _ in range(4):
        torch.manual_seed(5)
        texts.append(model.generate(**request, pad_token_id=PAD, eos_token_id=None).tolist())
    assert texts[1:] == texts[:1] * 3
    requests = [model.decode_request(**request, pad_token_id=PAD, eos_token_id=None)] * 6
    together = model.generate_together(requests, [5, 6, 5, 7, 5, 5], 4)
    assert [together[number].tolist() for number in (0, 2, 4, 5)] == texts
    assert len({str(text.tolist()) for text in together}) == 3


def test_sampled_tokens_follow_upstreams_distribution(model, monkeypatch):
    monkeypatch.setattr(decoder, "CACHE_STEP", 8)  # so many rows need short caches
    inputs = prompt(model, 1, 6)
    draws = {name: tensor.expand(20_000, -1) for name, tensor in inputs.items()}
    options = {
        "max_new_tokens": 2,
        "do_sample": True,
        "temperature": 3.0,
        "top_p": 0.8,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    }
    torch.manual_seed(0)
    expected = model.generate(**draws, **options)[:, 6:]
    calls = served(model, monkeypatch)
    got = model.generate(**draws, **options)[:, 6:]
    assert len(calls) == 1
    for column in range(2):
        counts = [torch.bincount(tokens[:, column], minlength=64).float() / 20_000 for tokens in (expected, got)]
        # Two samples of 20,000 from one distribution over 64 tokens are about 0.03 apart in total variation.
        assert (counts[0] - counts[1]).abs().sum() / 2 < 0.045
    assert len(set(expected[:, 0].tolist())) > 3


def test_sampling_is_repeatable_by_the_global_seed(model, monkeypatch):
    served(model, monkeypatch)
    inputs = prompt(model, 1, 6)
    options = {
        "max_new_tokens": 30,
        "do_sample": True,
        "temperature": 2.0,
        "top_p": 0.99,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    }
    texts = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        texts.append(model.generate(**inputs, **options).tolist())
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"repetition_penalty": 1.3},
        {"logits_processor": []},
        {"max_length": 20, "max_new_tokens": None},
        {"output_scores": True, "return_dict_in_generate": True},
    ],
    ids=str,
)
def test_other_calls_go_to_upstream(monkeypatch, options):
    model = build("cpu")
    call = {**prompt(model, 1, 4), "max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD} | options
    expected = model.generate(**call)
    calls = served(model, monkeypatch)
    assert model.decode_request(**call) is None
    got = model.generate(**call)
    assert torch.equal(getattr(got, "sequences", got), getattr(expected, "sequences", expected))
    assert not calls


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"repetition_penalty": 1.3},
        {"return_dict_in_generate": True},
        {"max_time": 60.0},
        {"num_return_sequences": 2, "do_sample": True},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_settings_of_the_model_itself_are_seen_too(monkeypatch, options):
    model = build("cpu")
    model.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS, **options)
    calls = served(model, monkeypatch)
    call = {**prompt(model, 1, 4), "max_new_tokens": 5}
    assert model.decode_request(**call) is None
    model.generate(**call)
    assert not calls


def test_a_call_with_positional_arguments_goes_to_upstream(monkeypatch):
    model = build("cpu")
    ids = prompt(model, 1, 4)["input_ids"]
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    calls = served(model, monkeypatch)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)
    model.generate(None, GenerationConfig(repetition_penalty=1.3), input_ids=ids, max_new_tokens=5, pad_token_id=PAD)
    assert not calls


def test_a_call_without_a_number_of_new_tokens_goes_to_upstream():
    model = build("cpu")
    make_prompt_enhancer_fast(model)
    assert model.decode_request(**prompt(model, 1, 4), do_sample=False, pad_token_id=PAD) is None


@pytest.mark.parametrize("masked", [True, False])
def test_padded_prompts_go_to_upstream(monkeypatch, masked):
    model = build("cpu")
    inputs = prompt(model, 2, 4)
    inputs["input_ids"][0, 0] = PAD
    if masked:
        inputs["attention_mask"][0, 0] = 0
    else:  # upstream infers the mask
        del inputs["attention_mask"]
    call = inputs | {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD}
    expected = model.generate(**call)
    calls = served(model, monkeypatch)
    assert model.decode_request(**call) is None
    assert torch.equal(model.generate(**call), expected)
    assert not calls


def test_a_request_holds_what_the_call_asks_for():
    model = build("cpu")
    make_prompt_enhancer_fast(model)
    inputs = prompt(model, 1, 4)
    call = {**inputs, "max_new_tokens": 9, "min_new_tokens": 3, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    request = model.decode_request(**call, pad_token_id=PAD, eos_token_id=[EOS, 5])
    assert request.input_ids is inputs["input_ids"]
    assert (request.max_new_tokens, request.min_new_tokens, request.do_sample) == (9, 3, True)
    assert (request.eos_token_ids, request.pad_token_id) == ((EOS, 5), PAD)
    tensors = model.decode_request(**call, pad_token_id=torch.tensor(PAD), eos_token_id=torch.tensor(EOS))
    assert (tensors.eos_token_ids, tensors.pad_token_id) == ((EOS,), PAD)
    assert {"TemperatureLogitsWarper", "TopPLogitsWarper"} <= {type(item).__name__ for item in request.warpers}
    greedy = model.decode_request(**call | {"do_sample": False}, pad_token_id=PAD)
    assert (greedy.do_sample, greedy.eos_token_ids, list(greedy.warpers)) == (False, (EOS,), [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_norms_are_upstreams(model, dtype):
    norm = model.model.layers[0].input_layernorm.to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, model.config.hidden_size).to(model.device, dtype)
    with torch.no_grad():
        expected = norm(x)
        make_prompt_enhancer_fast(model)
        assert type(norm) is FastRMSNorm
        torch.testing.assert_close(norm(x), expected)
    x.requires_grad_()
    norm(x).sum().backward()  # trained, it is upstream's
    assert x.grad is not None


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("capacity", [512, 16])
def test_texts_decoded_together_are_those_decoded_alone(model, monkeypatch, count, capacity):
    monkeypatch.setattr(decoder, "CACHE_STEP", capacity)
    make_prompt_enhancer_fast(model)
    options = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "pad_token_id": PAD, "eos_token_id": EOS}
    requests = [
        model.decode_request(**prompt(model, 1, 3 + 2 * number, seed=number), **options, max_new_tokens=40 - number)
        for number in range(5)
    ]
    alone = []
    for seed, request in enumerate(requests):
        torch.manual_seed(seed)
        alone.append(model.runtime.generate(model, request))
    state = torch.get_rng_state()
    for _ in range(2):
        together = model.generate_together(requests, range(5), count)
        assert [text.tolist() for text in together] == [text.tolist() for text in alone]
    assert torch.equal(torch.get_rng_state(), state)
    assert len({len(text[0]) for text in alone}) > 1  # some end earlier, and another text takes their place


EFFICIENT = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # without cuDNN's


class Operations(TorchDispatchMode):
    """Counts what is started on the device while it lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


def assert_same(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """To the bit, but for norms in float32 on a GPU, where PyTorch's kernels fuse products and sums as they like."""
    if got.is_cuda and dtype == torch.float32:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(got, expected)


def decoded(model: Ministral3ForCausalLM, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits behind `ids` over a static cache, as the decoder computes them."""
    call = {"input_ids": ids, "max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD}
    request = build("cpu") if type(model) is Ministral3ForCausalLM else model
    make_prompt_enhancer_fast(request)
    generator = torch.Generator(model.device)
    buffers = decoder.new_buffers(model, request.decode_request(**call), 128, generator)
    return decoder.forward(model, buffers, ids, positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 40])
@torch.no_grad()
def test_fast_layers_give_upstreams_values_with_fewer_operations(model, dtype, length):
    model = model.to(dtype)
    ids = prompt(model, 2, length)["input_ids"]
    positions = torch.arange(30, 30 + length, device=model.device)[None]  # beyond those that the scale leaves alone
    decoded(model, ids, positions)
    with Operations() as upstream:
        expected = decoded(model, ids, positions)
    make_prompt_enhancer_fast(model)
    with Operations() as fast:
        got = decoded(model, ids, positions)
    assert_same(got, expected, dtype)
    assert (upstream.names.count("log"), fast.names.count("log")) == (2, 1)  # two layers
    assert [names.count("neg") for names in (upstream.names, fast.names)] == [4, 1]


@torch.no_grad()
def test_fast_layers_serve_a_forward_pass_without_a_cache(model):
    ids = prompt(model, 2, 40)["input_ids"]
    with Operations() as upstream, sdpa_kernel(EFFICIENT):
        expected = model(ids, use_cache=False).logits
    make_prompt_enhancer_fast(model)
    with Operations() as fast, sdpa_kernel(EFFICIENT):
        got = model(ids, use_cache=False).logits
    assert_same(got, expected, model.dtype)
    assert [names.count("neg") for names in (upstream.names, fast.names)] == [4, 1]


@torch.no_grad()
def test_fast_attention_computes_shapes_on_the_meta_device():
    model = build("cpu")
    make_prompt_enhancer_fast(model)
    attention, call = attention_call(model)
    tables = call.pop("position_embeddings")
    on_meta = RotaryTables(table.to("meta") for table in tables)
    on_meta.signed_sine = tables.signed_sine.to("meta")
    call = {name: value if value is None else value.to("meta") for name, value in call.items()}
    output = attention.to("meta")(position_embeddings=on_meta, **call)[0]
    assert output.shape == call["hidden_states"].shape
    assert on_meta.attention_scale is not None


def attention_call(model: Ministral3ForCausalLM) -> tuple[FastAttention, dict[str, torch.Tensor]]:
    """A layer's attention and what its layer calls it with."""
    x, positions = torch.randn(2, 5, model.config.hidden_size), torch.arange(20, 25).expand(2, -1)
    tables = model.model.rotary_emb(x, position_ids=positions)
    call = {"hidden_states": x, "position_embeddings": tables, "attention_mask": None}
    # Where the scale finds positions in transformers 5.0 and in later versions.
    return model.model.layers[0].self_attn, call | {"cache_position": positions[0], "position_ids": positions}


def test_attention_leaves_to_upstream_what_it_does_not_serve(monkeypatch):
    model = build("cpu")
    make_prompt_enhancer_fast(model)
    calls, upstream = [], Ministral3Attention.forward
    monkeypatch.setattr(
        Ministral3Attention, "forward", lambda *args, **kwargs: calls.append(1) or upstream(*args, **kwargs)
    )
    with torch.no_grad():
        attention, call = attention_call(model)
        expected = attention(**call)[0]
        assert isinstance(call["position_embeddings"], RotaryTables)
        assert not calls
        plain = tuple(call["position_embeddings"])
        copied = RotaryTables(plain)  # as hooks that move a tuple's tensors make it
        cache = modeling_ministral3.DynamicCache(config=model.config)
        name = models.cache_argument(upstream)
        others = [{"position_embeddings": plain}, {"position_embeddings": copied}, {name: cache}]
        for count, other in enumerate(others, 1):
            torch.testing.assert_close(attention(**call | other)[0], expected)
            assert len(calls) == count
        with torch.autocast("cpu", torch.bfloat16):
            attention(**call)
        assert len(calls) == 4
    attention(**call)[0].sum().backward()
    assert len(calls) == 5
    assert attention.q_proj.weight.grad is not None


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_another_attention_implementation_is_upstreams(monkeypatch, implementation):
    model = build("cpu")
    model.set_attn_implementation(implementation)
    call = {**prompt(model, 1, 5), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**call)
    calls = served(model, monkeypatch)
    assert torch.equal(model.generate(**call), expected)
    assert len(calls) == (implementation == "sdpa")
    with torch.no_grad():
        tables = attention_call(model)[1]["position_embeddings"]
    assert isinstance(tables, RotaryTables) == (implementation == "sdpa")


def test_hidden_states_and_attentions_can_be_asked_for():
    models_of = build("cpu"), build("cpu")
    make_prompt_enhancer_fast(models_of[1])
    for options in ({"output_hidden_states": True}, {"output_attentions": True}):
        for model in models_of:
            model.set_attn_implementation("eager" if "output_attentions" in options else "sdpa")
        with torch.no_grad():
            expected, got = (model(**prompt(model, 1, 5), **options) for model in models_of)
        name = next(iter(options)).removeprefix("output_")
        assert len(got[name]) == len(expected[name]) > 1
        for one, other in zip(got[name], expected[name], strict=True):
            assert torch.equal(one, other)


@pytest.mark.gpu
def test_the_step_is_captured_once_for_calls_of_one_kind():
    model = build("cuda")
    make_prompt_enhancer_fast(model)
    call = prompt(model, 1, 6) | {"max_new_tokens": 8, "do_sample": False}
    model.generate(**call)
    (buffers,) = model.runtime.slot.buffers.values()
    graph = buffers.graph
    assert graph is not None
    model.generate(**call)
    assert list(model.runtime.slot.buffers.values()) == [buffers]
    assert buffers.graph is graph


class OffloadHook(ModelHook):
    """As the memory modes have it: found where accelerate's hooks are, and tells before weights leave."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.on_offload, self.onloaded = None, 0
        module._hf_hook = self
        module.register_forward_pre_hook(lambda module, args: self.pre_forward(module))

    def pre_forward(self, module: torch.nn.Module, *args, **kwargs):
        self.onloaded += 1
        return args, kwargs


def test_offloaded_the_buffers_stay_until_the_enhancer_leaves():
    model = build("cpu")
    request = prompt(model, 1, 3) | {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**request)
    make_prompt_enhancer_fast(model)
    hook = OffloadHook(model)
    assert torch.equal(model.generate(**request), expected)
    assert hook.onloaded == 1
    (buffers,) = model.runtime.slot.buffers.values()
    assert torch.equal(model.generate(**request), expected)
    assert next(iter(model.runtime.slot.buffers.values())) is buffers
    hook.on_offload()
    assert not model.runtime.slot.buffers
    assert torch.equal(model.generate(**request), expected)


def test_under_a_hook_that_does_not_tell_nothing_is_kept():
    model = build("cpu")
    make_prompt_enhancer_fast(model)
    model._hf_hook = ModelHook()  # accelerate's own offloading
    model.generate(**prompt(model, 1, 3), max_new_tokens=4)
    assert not model.runtime.slot.buffers


@pytest.mark.gpu
def test_offloaded_inputs_on_the_gpu_bring_no_warning(repository):
    pipe = load(repository, device="cuda", memory="offload")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe.pe.generate(input_ids=torch.tensor([[1, 5, 9]], device="cuda"), max_new_tokens=4, do_sample=False)


def test_a_call_in_inference_mode_does_not_spoil_the_next(model, monkeypatch):
    served(model, monkeypatch)
    inputs = prompt(model, 1, 4) | {"max_new_tokens": 5, "do_sample": False}
    with torch.inference_mode():
        first = model.generate(**inputs)
    assert torch.equal(model.generate(**inputs), first)


@pytest.mark.gpu
def test_weights_that_moved_are_captured_anew(repository):
    pipe = load(repository, device="cuda", memory="resident")
    request = {"input_ids": torch.tensor([[1, 5, 9]], device="cuda"), "max_new_tokens": 8, "do_sample": False}
    expected = pipe.pe.generate(**request)
    pipe.to("cpu")
    filler = torch.empty(1 << 20, device="cuda")
    pipe.to("cuda")
    assert torch.equal(pipe.pe.generate(**request), expected)
    del filler


def test_decoding_asks_for_nothing_that_transformers_is_about_to_drop(model):
    make_prompt_enhancer_fast(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model.generate(**prompt(model, 1, 5), max_new_tokens=3)


def test_no_private_method_of_generate_is_called(monkeypatch):
    """All that is called by name is public; upstream's own calls are its affair."""
    names = {
        name
        for function in (FastPromptEnhancer.generate, FastPromptEnhancer.decode_request)
        for name in function.__code__.co_names
    }
    assert not [name for name in names if name.startswith("_") and name != "_decoding_method"]


@pytest.fixture
def fresh_names():
    """Private names are looked up anew, before the test and after it."""
    looked_up = (models.ministral_attention_scale, models.note_gone)
    for each in looked_up:
        each.cache_clear()
    yield
    for each in looked_up:
        each.cache_clear()


def test_without_the_attention_scales_function_attention_stays_upstreams(model, monkeypatch, caplog, fresh_names):
    call = prompt(model, 1, 5)
    expected = model.generate(**call, max_new_tokens=6, do_sample=False)
    scale = models.ministral_attention_scale().compute
    models.ministral_attention_scale.cache_clear()
    monkeypatch.delattr(modeling_ministral3, scale.__name__)
    with caplog.at_level(logging.INFO, gone.__name__):
        calls = served(model, monkeypatch)
        make_prompt_enhancer_fast(build("cpu"))
    assert len(caplog.records) == 1
    kinds = {type(module).__qualname__ for module in model.modules()}
    assert {"FastPromptEnhancer", "FastRMSNorm", "Ministral3Attention", "Ministral3RotaryEmbedding"} <= kinds
    monkeypatch.setattr(modeling_ministral3, scale.__name__, scale, raising=False)  # upstream's needs it
    assert torch.equal(model.generate(**call, max_new_tokens=6, do_sample=False), expected)
    assert len(calls) == 1


@pytest.mark.parametrize("gone", ["custom_generate", "cache", "attention implementation"])
def test_without_the_names_that_decoding_needs_generate_is_upstreams(monkeypatch, gone):
    model = build("cpu")
    call = prompt(model, 1, 5) | {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**call)
    calls = served(model, monkeypatch)
    if gone == "custom_generate":
        monkeypatch.setattr(prompt_enhancer, "supports_custom_generate", lambda generate: False)
    elif gone == "cache":
        monkeypatch.setattr(decoder, "CACHE_ARGUMENT", None)
    else:
        monkeypatch.setattr(prompt_enhancer, "attention_implementation", lambda config: None)
    assert torch.equal(model.generate(**call), expected)
    assert not calls


def test_an_enhancer_of_another_class_is_left_alone(caplog):
    class Other(Ministral3ForCausalLM):
        pass

    model = Other(build("cpu").config)
    with caplog.at_level(logging.INFO, prompt_enhancer.__name__):
        make_prompt_enhancer_fast(model)
    assert type(model) is Other
    assert not any(isinstance(module, FastRMSNorm) for module in model.modules())
    assert "Other" in caplog.text


def test_a_model_built_by_the_fast_class_itself_is_upstreams():
    model = build("cpu")
    call = prompt(model, 1, 5) | {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**call)
    built = FastPromptEnhancer(model.config).eval()
    built.load_state_dict(model.state_dict())
    assert torch.equal(built.generate(**call), expected)
    assert built.decode_request(**call) is None
    with pytest.raises(TypeError, match="make_prompt_enhancer_fast"):
        built.generate_together([], [], 1)
    assert type(built.model.norm) is Ministral3RMSNorm
    for _ in range(2):
        make_prompt_enhancer_fast(built)
    assert type(built.model.norm) is FastRMSNorm
    assert torch.equal(built.generate(**call), expected)
    assert built.runtime.slot.buffers
