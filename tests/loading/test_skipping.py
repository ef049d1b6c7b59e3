"""Steps that leave something out: what is computed then, and that it holds wherever pipelines run."""

from __future__ import annotations

import copy as copying
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import ErnieImagePipeline, FlowMatchHeunDiscreteScheduler

from ernie_image_nf4 import Row, generate_batch, load, set_skipping
from ernie_image_nf4.errors import InvalidSettings
from ernie_image_nf4.fast.products import set_products
from ernie_image_nf4.fast.step_plan import Skipping, plan_steps
from ernie_image_nf4.fast.transformer import make_transformer_fast
from ernie_image_nf4.generation.image_file import read_settings
from ernie_image_nf4.generation.manifest import MANIFEST, read_manifest
from ernie_image_nf4.generation.settings import Settings
from ernie_image_nf4.generation.single import draw
from ernie_image_nf4.generation.stages import draw_group
from ernie_image_nf4.memory.offload import enable_offload
from ernie_image_nf4.repository.components import MODEL_INDEX

STEPS, GUIDANCE = 8, 4.0
PROMPT, NEGATIVE = "a cat on a wooden desk", "dark"
EACH = pytest.mark.parametrize(
    "skipping",
    [
        {"guidance_until": 0.5},
        {"cache": True},
        {"guidance_until": 0.25, "cache": 2},
        {"guidance_until": 0.6, "cache": 4},
    ],
    ids=str,
)
BOTH = {"guidance_until": 0.5, "cache": 3}


@pytest.fixture(scope="module")
def pipe(repository: Path) -> ErnieImagePipeline:
    """One of upstream's code paths, whose settings the tests change."""
    return loaded(repository)


@pytest.fixture(scope="module")
def fast(repository: Path) -> ErnieImagePipeline:
    """One with a fast transformer."""
    pipe = loaded(repository)
    make_transformer_fast(pipe.transformer, capture_steps=True)
    return pipe


@pytest.fixture(autouse=True)
def everything_again(pipe, fast) -> Iterator[None]:
    yield
    for each in (pipe, fast):
        set_skipping(each)


def quiet(pipe: ErnieImagePipeline) -> ErnieImagePipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def loaded(repository: Path, **options) -> ErnieImagePipeline:
    """A pipeline whose predictions depend on prompt and timestep more than those of small random weights do."""
    options = {"device": "cpu", "dtype": "float32", "prompt_enhancer": False} | options
    pipe = quiet(load(repository, **options))
    generator, transformer = torch.Generator().manual_seed(0), pipe.transformer
    layers = {transformer.text_proj: 1.0, transformer.time_embedding.linear_2: 0.3, transformer.final_linear: 0.2}
    for layer, deviation in layers.items():
        drawn = torch.empty(layer.weight.shape).normal_(std=deviation, generator=generator)
        layer.weight.data.copy_(drawn)
    return pipe


def latents(pipe: ErnieImagePipeline, *, pictures: int = 1, guidance: float = GUIDANCE, **options) -> torch.Tensor:
    """Final latents of prompts of different lengths."""
    device = pipe.text_encoder.device if pipe.text_encoder.device.type != "meta" else "cpu"
    noise = torch.randn(pictures, 128, 4, 4, generator=torch.Generator().manual_seed(0))
    if "prompt_embeds" not in options:
        options["prompt"] = [PROMPT * (number + 1) for number in range(pictures)]
        options["negative_prompt"] = [NEGATIVE] * pictures
    result = pipe(
        height=64,
        width=64,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=noise.to(options.pop("device", device), pipe.transformer.dtype),
        output_type="latent",
        use_pe=False,
        **options,
    )
    return getattr(result, "images", result)  # diffusers 0.38 returns the latents themselves


@contextmanager
def rows_computed(pipe: ErnieImagePipeline) -> Iterator[list[int]]:
    """Rows of each call of the transformer."""
    rows: list[int] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    yield rows
    hook.remove()


@torch.no_grad()
def by_hand(pipe: ErnieImagePipeline, skipping: dict) -> torch.Tensor:
    """What `latents` gives, in a loop of its own."""
    plan = plan_steps(
        STEPS,
        Skipping(skipping.get("guidance_until", 1.0), {True: 3}.get(skipping.get("cache"), skipping.get("cache", 1))),
    )
    x = torch.randn(1, 128, 4, 4, generator=torch.Generator().manual_seed(0))
    negative, prompt = (pipe.encode_prompt(text, "cpu")[0] for text in (NEGATIVE, PROMPT))
    both = torch.nn.utils.rnn.pad_sequence([negative, prompt], batch_first=True)
    lengths = torch.tensor([len(negative), len(prompt)])
    pipe.scheduler.set_timesteps(sigmas=torch.linspace(1, 0, STEPS + 1)[:-1], device="cpu")
    for step, t in zip(plan, pipe.scheduler.timesteps, strict=True):
        if step.computed and step.guided:
            without, known = pipe.transformer(torch.cat([x, x]), t.expand(2), both, lengths, return_dict=False)[
                0
            ].split(1)
        elif step.computed:
            known = pipe.transformer(x, t.expand(1), prompt[None], lengths[1:], return_dict=False)[0]
        guided = without + GUIDANCE * (known - without) if step.guided else known
        x = pipe.scheduler.step(guided, t, x).prev_sample
    return x


# What is computed


@EACH
def test_pictures_are_those_of_a_loop_that_leaves_the_same_out(pipe, skipping):
    set_skipping(pipe, **skipping)
    torch.testing.assert_close(latents(pipe), by_hand(pipe, skipping), rtol=1e-6, atol=1e-6)


def test_the_transformer_sees_the_prompts_half_alone_once_guidance_is_over(pipe):
    set_skipping(pipe, guidance_until=0.5)
    with rows_computed(pipe) as rows:
        latents(pipe, pictures=3)
    assert rows == [6] * 4 + [3] * 4


def test_the_transformer_is_not_called_in_steps_that_reuse_its_prediction(pipe):
    set_skipping(pipe, cache=True)
    with rows_computed(pipe) as rows:
        latents(pipe)
        latents(pipe)
    assert rows == [2] * 4 * 2  # each picture begins anew


def test_without_guidance_only_the_cache_counts(pipe):
    set_skipping(pipe, **BOTH)
    with rows_computed(pipe) as rows:
        latents(pipe, guidance=1.0)
    assert rows == [1] * 4


def test_off_again_is_the_picture_of_before_to_the_bit(pipe, fast):
    for each in (pipe, fast):
        before = latents(each)
        set_skipping(each, **BOTH)
        assert not torch.equal(latents(each), before)
        set_skipping(each)
        assert torch.equal(latents(each), before)


def test_all_steps_asked_for_in_words_are_the_picture_of_before_to_the_bit(pipe):
    before = latents(pipe)
    set_skipping(pipe, guidance_until=1, cache=1)
    assert torch.equal(latents(pipe), before)


def test_schedulers_that_call_the_model_twice_a_step_count_their_calls(pipe):
    parts = {**pipe.components, "scheduler": FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)}
    own = quiet(type(pipe)(**parts))
    calls = 2 * STEPS - 1
    noise = torch.zeros(1, 128, 4, 4)
    set_skipping(own, guidance_until=0.5)
    own.scheduler.set_timesteps = lambda sigmas, device: type(own.scheduler).set_timesteps(
        own.scheduler, len(sigmas), device
    )
    with rows_computed(pipe) as rows:
        own(PROMPT, height=64, width=64, num_inference_steps=STEPS, latents=noise, use_pe=False, output_type="latent")
    assert rows == [2] * STEPS + [1] * (calls - STEPS)


# Where it holds


@EACH
def test_a_fast_transformer_draws_upstreams_pictures_up_to_rounding(pipe, fast, skipping):
    for each in (pipe, fast):
        set_skipping(each, **skipping)
    torch.testing.assert_close(latents(fast), latents(pipe), rtol=1e-3, atol=1e-3)
    make_transformer_fast(fast.transformer, capture_steps=False, exact=True)
    torch.testing.assert_close(latents(fast), latents(pipe), rtol=1e-3, atol=1e-3)


@EACH
def test_pictures_of_a_batch_are_those_drawn_alone(fast, skipping):
    same = {"guidance_until": 1.0, "cache": 1} | skipping | ({"cache": 3} if skipping.get("cache") is True else {})
    batch = [
        Settings(PROMPT * length, NEGATIVE, 64, 64, STEPS, GUIDANCE, seed=seed, use_pe=False, **same)
        for seed, length in enumerate((1, 3, 2))
    ]
    with rows_computed(fast) as rows:
        together = list(draw_group(fast, [batch], {}))
    assert set(rows) <= {6, 3}
    for drawing, settings in zip(together, batch, strict=True):
        assert drawing.batch_size == 3
        difference = torch.tensor(list(drawing.image.tobytes())).float() - torch.tensor(
            list(draw(fast, settings).image.tobytes())
        )
        assert difference.abs().max() <= 1


@pytest.mark.parametrize("stream_blocks", [False, True])
def test_offloaded_pipelines_draw_the_same(repository, pipe, stream_blocks):
    own = loaded(repository)
    enable_offload(own, torch.device("cpu"), stream_blocks=stream_blocks)
    for each in (own, pipe):
        set_skipping(each, **BOTH)
    expected = latents(pipe)
    for _ in range(2):
        assert torch.equal(latents(own, device="cpu"), expected)


def test_products_in_8_bits_differ_by_their_rounding(repository, pipe):
    own = loaded(repository)
    make_transformer_fast(own.transformer, capture_steps=False)
    for each in (own, pipe):
        set_skipping(each, **BOTH)
    expected = latents(own)
    torch.testing.assert_close(expected, latents(pipe), rtol=1e-3, atol=1e-3)
    set_products(own.transformer, "int8")
    rounded = latents(own)
    assert 0 < (rounded - expected).norm() / expected.norm() < 0.01


def test_a_callback_gets_the_pipeline_with_its_own_transformer(pipe):
    set_skipping(pipe, **BOTH)
    seen = []

    def on_step_end(given, step, timestep, kwargs):
        seen.append((given is pipe, given.transformer is pipe.components["transformer"], step))
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == STEPS - 1 else {}

    assert not latents(pipe, callback_on_step_end=on_step_end).any()
    assert seen == [(True, True, step) for step in range(STEPS)]


def test_an_error_in_the_middle_leaves_a_pipeline_that_draws_as_before(pipe):
    set_skipping(pipe, **BOTH)
    expected = latents(pipe)

    def fail(*_) -> dict:
        raise KeyError("stop")

    with pytest.raises(KeyError):
        latents(pipe, callback_on_step_end=fail)
    assert torch.equal(latents(pipe), expected)


def test_pipelines_that_share_their_models_skip_each_its_own_in_threads(pipe):
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    other = quiet(type(pipe)(**{**pipe.components, "scheduler": scheduler}))
    set_skipping(pipe, **BOTH)
    # Embeddings: transformers 5.0 mixes up what threads get of a text encoder that they share.
    texts, negatives = (pipe.encode_prompt(text, "cpu", 1) for text in (PROMPT, NEGATIVE))

    def draw_embeddings(each: ErnieImagePipeline) -> torch.Tensor:
        return latents(each, prompt_embeds=texts, negative_prompt_embeds=negatives)

    alone = [draw_embeddings(pipe), draw_embeddings(other)]
    assert not torch.equal(*alone)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            assert all(map(torch.equal, pool.map(draw_embeddings, [pipe, other]), alone))


def test_it_is_nothing_of_what_is_saved_and_copies_keep_it(pipe, tmp_path):
    plain = json.loads(Path(pipe.name_or_path, MODEL_INDEX).read_text())
    set_skipping(pipe, **BOTH)
    pipe.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / MODEL_INDEX).read_text())
    assert {name: saved[name] for name in ("_class_name", "transformer")} == {
        name: plain[name] for name in ("_class_name", "transformer")
    }
    assert set(saved) <= set(plain) | {"_name_or_path", "pe", "pe_tokenizer"}
    assert torch.equal(latents(copying.copy(pipe)), latents(pipe))


# What can't work


@pytest.mark.parametrize("bad", [{"guidance_until": 0}, {"guidance_until": 1.5}, {"cache": 0}, {"cache": 2.5}], ids=str)
def test_bad_values_are_refused_everywhere_and_change_nothing(pipe, tmp_path, bad):
    (name,) = bad
    set_skipping(pipe, cache=2)
    with pytest.raises(InvalidSettings, match=name):
        set_skipping(pipe, **bad)
    assert pipe.skipping == Skipping(cache=2)
    with pytest.raises(InvalidSettings, match=name):
        generate_batch(pipe, [Row(PROMPT)], tmp_path / "out", **bad)
    with pytest.raises(InvalidSettings, match=f"Row 1, {name}: "):
        generate_batch(pipe, [Row(PROMPT, **bad)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_none_is_everything(pipe):
    set_skipping(pipe, guidance_until=0.5, cache=2)
    set_skipping(pipe, guidance_until=None, cache=None)
    assert pipe.skipping == Skipping()


def test_a_pipeline_that_is_not_from_load_can_only_compute_everything(pipe):
    upstream = quiet(ErnieImagePipeline(**pipe.components))
    set_skipping(upstream)
    with pytest.raises(InvalidSettings, match=r"Only a pipeline of load\(\) can leave out steps"):
        set_skipping(upstream, cache=True)


# Pictures and manifests


def settings_of(folder: Path) -> dict[str, tuple]:
    return {
        path.name[:4]: (kept.get("guidance_until"), kept.get("cache"))
        for path in sorted(folder.glob("*.png"))
        if (kept := read_settings(path))
    }


def test_rows_have_settings_of_their_own_which_files_and_manifest_note(fast, tmp_path):
    rows = [
        Row(PROMPT),
        Row(PROMPT, guidance_until=0.5),
        Row(PROMPT, cache=2),
        Row(PROMPT, guidance_until=1.0, cache=1),
    ]
    options = {"height": 32, "width": 32, "steps": 4, "cache": True, "batch_size": 4}
    records = list(generate_batch(fast, rows, tmp_path, **options))
    assert [record.error for record in records] == [None] * 4
    assert {record.batch_size for record in records} == {1}  # no two of them are drawn together
    assert settings_of(tmp_path) == {
        "0001": (None, "3"), "0002": ("0.5", "3"), "0003": (None, "2"), "0004": (None, None),
    }  # fmt: skip
    kept = {record.file[:4]: record.settings.skipping for record in read_manifest(tmp_path / MANIFEST)}
    assert kept == {
        "0001": Skipping(1.0, 3), "0002": Skipping(0.5, 3), "0003": Skipping(1.0, 2), "0004": Skipping(),
    }  # fmt: skip
    assert fast.skipping.is_off
    assert list(generate_batch(fast, rows, tmp_path, **options)) == []
    assert len(list(generate_batch(fast, rows, tmp_path, **options | {"cache": 4}))) == 2  # of those that don't say


def test_what_is_set_on_the_pipeline_holds_where_nothing_else_is_said(fast, tmp_path):
    set_skipping(fast, **BOTH)
    list(generate_batch(fast, [Row(PROMPT), Row(PROMPT, cache=1)], tmp_path, height=32, width=32, steps=4))
    assert settings_of(tmp_path) == {"0001": ("0.5", "3"), "0002": ("0.5", None)}
    assert fast.skipping == Skipping(0.5, 3)


def test_a_picture_is_drawn_again_by_what_it_notes(fast):
    settings = Settings(PROMPT, NEGATIVE, 64, 64, STEPS, GUIDANCE, seed=0, use_pe=False, guidance_until=0.5, cache=2)
    first = draw(fast, settings)
    set_skipping(fast, cache=5)  # another one's
    assert draw(fast, first.settings).image.tobytes() == first.image.tobytes()
    assert fast.skipping == Skipping(cache=5)


def test_manifests_from_before_are_read(fast, tmp_path):
    options = {"height": 32, "width": 32, "steps": 2}
    list(generate_batch(fast, [Row(PROMPT)], tmp_path, **options))
    manifest = tmp_path / MANIFEST
    line = json.loads(manifest.read_text())
    assert (line.pop("guidance_until"), line.pop("cache")) == (1.0, 1)
    manifest.write_text(json.dumps(line) + "\n")
    assert list(generate_batch(fast, [Row(PROMPT)], tmp_path, **options)) == []


def test_prompt_files_and_options_of_generate_set_it(command, repository, tmp_path):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt,guidance_until,cache\na cat,,\na dog,0.25,2\n")
    size = ("--height", 32, "--width", 32, "--steps", 4, "--no-pe", "--device", "cpu", "-m", repository)
    skip = ("--guidance-until", 0.5, "--cache", 3)
    run = command("generate", "--prompts-file", prompts, "--out-dir", tmp_path / "out", *skip, *size)
    assert run.code == 0, run.err
    assert settings_of(tmp_path / "out") == {"0001": ("0.5", "3"), "0002": ("0.25", "2")}
    assert command("generate", "a cat", "-o", tmp_path / "one.png", *skip, *size).code == 0
    assert settings_of(tmp_path) == {"one.": ("0.5", "3")}
    refused = command("generate", "a cat", "--guidance-until", 2, *size)
    assert refused.code == 1
    assert refused.err.startswith("Error: 2.0 is no share of the steps for guidance_until")


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["resident", "offload", "stream"])
@pytest.mark.parametrize("fast", [True, "exact", False])
def test_on_a_gpu_each_mode_draws_the_same(repository, memory, fast):
    plain = loaded(repository, device="cuda", memory="resident", fast=False)
    own = loaded(repository, device="cuda", memory=memory, fast=fast)
    for each in (plain, own):
        set_skipping(each, **BOTH)
    first = latents(own, device="cuda")
    torch.testing.assert_close(first, latents(plain, device="cuda"), rtol=1e-2, atol=1e-2)
    assert torch.equal(latents(own, device="cuda"), first)
    set_skipping(own)
    assert not torch.equal(latents(own, device="cuda"), first)


@pytest.mark.gpu
def test_on_a_gpu_steps_with_and_without_guidance_are_captured_once_each(repository, monkeypatch):
    from ernie_image_nf4.fast import cuda_graphs

    captures = []
    capture = cuda_graphs.capture
    monkeypatch.setattr(cuda_graphs, "capture", lambda *args, **kwargs: captures.append(1) or capture(*args, **kwargs))
    pipe = loaded(repository, device="cuda", memory="resident")
    for skipping, expected in (({}, 1), ({"cache": 2}, 1), ({"guidance_until": 0.5}, 2)):
        captures.clear()
        set_skipping(pipe, **skipping)
        captured = latents(pipe, device="cuda")
        assert len(captures) == expected
        step, pipe.transformer.runtime.captured_step = pipe.transformer.runtime.captured_step, None
        assert torch.equal(latents(pipe, device="cuda"), captured)
        pipe.transformer.runtime.captured_step = step


@pytest.mark.gpu
@pytest.mark.parametrize("products", ["int8", "fp8"])
def test_on_a_gpu_products_in_8_bits_draw_in_a_batch_what_they_draw_alone(repository, products):
    try:
        pipe = loaded(repository, device="cuda", memory="resident", dtype="bfloat16", products=products)
    except InvalidSettings as error:  # a card without
        pytest.skip(str(error))
    batch = [
        Settings(PROMPT * length, "", 64, 64, STEPS, GUIDANCE, seed=length, use_pe=False, **BOTH) for length in (1, 3)
    ]
    together = [drawing.image.tobytes() for drawing in draw_group(pipe, [batch], {})]
    for drawn, settings in zip(together, batch, strict=True):
        alone = next(draw_group(pipe, [[settings]], {})).image.tobytes()
        assert max(abs(one - other) for one, other in zip(drawn, alone, strict=True)) <= 2
