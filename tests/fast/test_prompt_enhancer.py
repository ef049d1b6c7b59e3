"""Fast decoding of the prompt enhancer: upstream's tokens when greedy, upstream's distribution when sampled.

Uncaptured, the decode step is the same code on a CPU; what only capture can break is tested on a GPU.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.attention import sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Ministral3Config, Ministral3ForCausalLM
from transformers.models.ministral3 import modeling_ministral3

from ernie_image_nf4 import load
from ernie_image_nf4.fast import prompt_enhancer
from ernie_image_nf4.fast.prompt_enhancer import disable_fast_decoding, enable_fast_decoding, find_request, lean_layers
from ernie_image_nf4.memory.offload import enable_offload

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EOS, PAD = 2, 0
APPLY_ROTARY_POS_EMB = modeling_ministral3.apply_rotary_pos_emb


def build(device: str, vocabulary: int = 64, seed: int = 0) -> Ministral3ForCausalLM:
    torch.manual_seed(seed)
    rope = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16,
    }  # fmt: skip
    config = Ministral3Config(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=4096, rope_parameters=rope, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS,
        initializer_range=0.4,
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
    """Enable the fast path and collect the calls that it serves."""
    calls, original = [], prompt_enhancer.Decoder.generate
    monkeypatch.setattr(
        prompt_enhancer.Decoder, "generate", lambda self, call: calls.append(call) or original(self, call)
    )
    enable_fast_decoding(model)
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
    monkeypatch.setattr(prompt_enhancer, "CACHE_STEP", 16)
    inputs = prompt(model, 1, 5)
    options = {"max_new_tokens": 100, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    served(model, monkeypatch)
    assert torch.equal(model.generate(**inputs, **options), expected)


def test_a_text_does_not_depend_on_the_cache_of_a_longer_one_before(model, monkeypatch):
    monkeypatch.setattr(prompt_enhancer, "CACHE_STEP", 16)
    used, forward = [], prompt_enhancer.forward

    def noted(model, state, *args):
        used.append(state.capacity)
        return forward(model, state, *args)

    monkeypatch.setattr(prompt_enhancer, "forward", noted)
    served(model, monkeypatch)
    prefills = []
    for new in (8, 100, 8):
        used.clear()
        model.generate(**prompt(model, 1, 5), max_new_tokens=new, do_sample=False, pad_token_id=PAD, eos_token_id=None)
        prefills.append(used[0])
    assert prefills == [16, 16, 16]


def test_decoding_takes_no_attention_that_gives_other_bits_now_and_then(model, monkeypatch):
    served(model, monkeypatch)
    allowed = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda *_: allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
    )
    model.generate(**prompt(model, 1, 5), max_new_tokens=4, do_sample=False, pad_token_id=PAD, eos_token_id=None)
    assert len(allowed) >= 2
    assert not any(allowed)


@pytest.mark.gpu
def test_the_same_request_gives_the_same_text_at_full_depth():
    """Wide heads and many layers, as with those cuDNN's attention rounded differently now and then."""
    torch.manual_seed(0)
    config = Ministral3Config(
        vocab_size=32_000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=26, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS,
    )  # fmt: skip
    with torch.device("cuda"):
        model = Ministral3ForCausalLM(config).eval().to(torch.bfloat16)
    enable_fast_decoding(model)
    request = prompt(model, 1, 131) | {"max_new_tokens": 200, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    texts = []
    for _ in range(4):
        torch.manual_seed(5)
        texts.append(model.generate(**request, pad_token_id=PAD, eos_token_id=None).tolist())
    assert texts[1:] == texts[:1] * 3
    requests = [find_request(model, (), request | {"pad_token_id": PAD, "eos_token_id": None})] * 6
    together = model.generate.decoder.generate_together(requests, [5, 6, 5, 7, 5, 5], 4)
    assert [together[number].tolist() for number in (0, 2, 4, 5)] == texts
    assert len({str(text.tolist()) for text in together}) == 3


def test_sampled_tokens_follow_upstreams_distribution(model, monkeypatch):
    monkeypatch.setattr(prompt_enhancer, "CACHE_STEP", 8)  # so many rows need short caches
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
)
def test_other_calls_go_to_upstream(options):
    model = build("cpu")
    call = {**prompt(model, 1, 4), "max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD} | options
    assert find_request(model, (), call) is None
    expected = model.generate(**call)
    enable_fast_decoding(model)
    got = model.generate(**call)
    assert torch.equal(getattr(got, "sequences", got), getattr(expected, "sequences", expected))


def test_padded_prompts_go_to_upstream():
    model = build("cpu")
    inputs = prompt(model, 2, 4)
    inputs["attention_mask"][0, 0] = 0
    assert find_request(model, (), inputs | {"max_new_tokens": 5}) is None


def test_disabling_gives_upstreams_methods_back():
    model = build("cpu")
    norm = model.model.layers[0].input_layernorm
    enable_fast_decoding(model)
    assert "generate" in vars(model)
    assert "forward" in vars(norm)
    disable_fast_decoding(model)
    assert "generate" not in vars(model)
    assert "forward" not in vars(norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_norms_are_upstreams(model, dtype):
    norm = model.model.layers[0].input_layernorm.to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, model.config.hidden_size).to(model.device, dtype)
    with torch.no_grad():
        expected = norm(x)
        enable_fast_decoding(model)
        torch.testing.assert_close(norm(x), expected)
    x.requires_grad_()
    norm(x).sum().backward()  # trained, it is upstream's
    assert x.grad is not None


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("capacity", [512, 16])
def test_texts_written_together_are_those_written_alone(model, monkeypatch, count, capacity):
    monkeypatch.setattr(prompt_enhancer, "CACHE_STEP", capacity)
    decoder = prompt_enhancer.Decoder(model)
    options = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "pad_token_id": PAD, "eos_token_id": EOS}
    requests = [
        find_request(
            model, (), prompt(model, 1, 3 + 2 * number, seed=number) | options | {"max_new_tokens": 40 - number}
        )
        for number in range(5)
    ]
    alone = []
    for seed, request in enumerate(requests):
        torch.manual_seed(seed)
        alone.append(decoder.generate(request))
    state = torch.get_rng_state()
    for _ in range(2):
        together = decoder.generate_together(requests, range(5), count)
        assert [text.tolist() for text in together] == [text.tolist() for text in alone]
    assert torch.equal(torch.get_rng_state(), state)
    assert len({len(text[0]) for text in alone}) > 1  # some end earlier, and another text takes their place


class Operations(TorchDispatchMode):
    """Counts what is started on the device while it lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 40])
@torch.no_grad()
def test_lean_layers_give_upstreams_values_with_fewer_operations(model, dtype, length):
    model = model.to(dtype)
    inputs = prompt(model, 2, length)
    positions = torch.arange(30, 30 + length, device=model.device)[None]  # beyond those that the scale leaves alone
    with Operations() as upstream, sdpa_kernel(prompt_enhancer.ATTENTION):
        expected = model.model(input_ids=inputs["input_ids"], position_ids=positions).last_hidden_state
    with Operations() as lean, lean_layers(dtype), sdpa_kernel(prompt_enhancer.ATTENTION):
        got = model.model(input_ids=inputs["input_ids"], position_ids=positions).last_hidden_state
    assert torch.equal(got, expected)
    assert (upstream.names.count("log"), lean.names.count("log")) == (2, 1)  # two layers
    assert [names.count("neg") for names in (upstream.names, lean.names)] == [4, 1]
    assert modeling_ministral3.apply_rotary_pos_emb is APPLY_ROTARY_POS_EMB


def test_other_threads_keep_upstreams_layers():
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    angles = torch.randn(1, 3, 8)
    with ThreadPoolExecutor(1) as pool, lean_layers(torch.float32):
        arguments = query, key, angles.cos(), angles.sin()
        with Operations() as lean:
            own = modeling_ministral3.apply_rotary_pos_emb(*arguments)
        others = pool.submit(modeling_ministral3.apply_rotary_pos_emb, *arguments).result()
        assert "roll" in lean.names
        assert all(torch.equal(one, other) for one, other in zip(own, others, strict=True))

        def operations() -> list[str]:
            with Operations() as counted:
                modeling_ministral3.apply_rotary_pos_emb(*arguments)
            return counted.names

        assert "roll" not in pool.submit(operations).result()


@pytest.mark.gpu
def test_the_step_is_captured_once_for_calls_of_one_kind():
    model = build("cuda")
    decoder = prompt_enhancer.Decoder(model)
    request = find_request(model, (), prompt(model, 1, 6) | {"max_new_tokens": 8, "do_sample": False})
    decoder.generate(request)
    (state,) = decoder.writer.states.values()
    graph = state.graph
    assert graph is not None
    decoder.generate(request)
    assert list(decoder.writer.states.values()) == [state]
    assert state.graph is graph


def test_offloaded_the_state_stays_until_the_enhancer_leaves(repository):
    pipe = load(repository, device="cpu")
    request = {"input_ids": torch.tensor([[1, 5, 9]]), "max_new_tokens": 4, "do_sample": False}
    expected = pipe.pe.generate(**request)
    enable_fast_decoding(pipe.pe)
    enable_offload(pipe, torch.device("cpu"))
    decoder = pipe.pe.generate.decoder
    assert torch.equal(pipe.pe.generate(**request), expected)
    (state,) = decoder.writer.states.values()
    assert torch.equal(pipe.pe.generate(**request), expected)
    assert next(iter(decoder.writer.states.values())) is state
    pipe.encode_prompt("a cat", torch.device("cpu"))
    assert not decoder.writer.states
    assert torch.equal(pipe.pe.generate(**request), expected)


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
    enable_fast_decoding(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model.generate(**prompt(model, 1, 5), max_new_tokens=3)


@pytest.mark.parametrize(("constant", "value"), [("ATTENTION_SCALES", ()), ("ROTARY", "another")])
def test_a_transformers_with_other_names_keeps_its_layers(model, monkeypatch, constant, value):
    call = prompt(model, 1, 5)
    expected = model.generate(**call, max_new_tokens=6, do_sample=False)
    monkeypatch.setattr(prompt_enhancer, constant, value)
    upstream = vars(modeling_ministral3).copy()
    with lean_layers(model.dtype):
        assert vars(modeling_ministral3) == upstream
    calls = served(model, monkeypatch)
    assert torch.equal(model.generate(**call, max_new_tokens=6, do_sample=False), expected)
    assert len(calls) == 1
