"""Pipelines in threads, as web servers use them: every picture is the one that is drawn alone."""

from __future__ import annotations

import copy as copying
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ErnieImagePipeline

from ernie_image_nf4 import load
from ernie_image_nf4.errors import InvalidSettings
from ernie_image_nf4.fast.prompt_enhancer import make_prompt_enhancer_fast
from ernie_image_nf4.fast.random_state import SeededDraws, drawing_as_caller
from ernie_image_nf4.fast.streams import CaptureStreams
from ernie_image_nf4.fast.transformer import make_transformer_fast, several_pictures
from ernie_image_nf4.generation.settings import Settings
from ernie_image_nf4.generation.single import draw
from ernie_image_nf4.generation.stages import draw_group
from ernie_image_nf4.memory.offload import enable_offload

CPU = torch.device("cpu")
THREADS = 4
SIZE = {
    "prompt": "a cat", "height": 32, "width": 32, "num_inference_steps": 4, "use_pe": False,
    "latents": torch.ones(1, 128, 2, 2),
}  # fmt: skip


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def quiet(pipe: ErnieImagePipeline) -> ErnieImagePipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def settings(seed: int) -> Settings:
    """A picture with an enhanced prompt; each seed has a size of its own, so that a mixed up state shows."""
    return Settings("a cat", "dark", 64, 32 + 32 * seed, 4, 4.0, seed=seed, use_pe=True)


def picture(pipe: ErnieImagePipeline, seed: int) -> tuple[bytes, str | None]:
    """Pixels and enhanced prompt."""
    drawing = draw(pipe, settings(seed))
    return drawing.image.tobytes(), drawing.revised_prompt


def in_threads(work: Callable[[int], object], count: int = THREADS) -> list:
    """`work(0)`, `work(1)` ... in threads that start together."""
    start = threading.Barrier(count)

    def run(number: int) -> object:
        start.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


# One pipeline


@pytest.mark.parametrize(
    "memory", ["resident", *(pytest.param(mode, marks=pytest.mark.gpu) for mode in ("offload", "stream"))]
)
def test_threads_that_share_a_pipeline_draw_what_they_draw_alone(repository, device, memory):
    if device == "cpu" and memory != "resident":
        pytest.skip("the CPU keeps all weights")
    pipe = quiet(load(repository, device=device, memory=memory))
    alone = [picture(pipe, seed) for seed in range(THREADS)]
    for _ in range(3):
        assert in_threads(lambda seed: picture(pipe, seed)) == alone


def test_groups_and_single_calls_take_turns(repository, device):
    pipe = quiet(load(repository, device=device))

    def group() -> list[bytes]:
        return [each.image.tobytes() for each in draw_group(pipe, [[settings(0)], [settings(1)]], {})]

    alone = group(), picture(pipe, 2)
    got = in_threads(lambda number: picture(pipe, 2) if number else group(), 2)
    assert (got[0], got[1]) == alone


def test_a_group_may_go_on_in_another_thread(repository):
    """As a web framework does that asks a generator for its next value in whichever thread is free."""
    pipe = quiet(load(repository, device="cpu"))
    drawings = draw_group(pipe, [[settings(0)], [settings(1)]], {})
    next(drawings)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(next, drawings).result(timeout=60)
        assert pool.submit(picture, pipe, 0).result(timeout=60)


def test_groups_in_threads_leave_torchs_number_of_threads_as_it_was(repository):
    pipes = [quiet(load(repository, device="cpu", prompt_enhancer=False)) for _ in range(3)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(3):
            in_threads(lambda number: list(draw_group(pipes[number], [[settings(number)]], {})), 3)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("called", [lambda pipe: pipe("a dog", num_inference_steps=1), lambda pipe: picture(pipe, 0)])
def test_a_callback_that_calls_the_pipeline_is_told_so(repository, called):
    pipe = quiet(load(repository, device="cpu", prompt_enhancer=False))
    size = {"height": 32, "width": 32, "num_inference_steps": 2}
    with pytest.raises(InvalidSettings, match="callback"):
        pipe("a cat", **size, callback_on_step_end=lambda *_: called(pipe))
    assert pipe("a cat", **size).images  # the pipeline goes on


def test_a_callback_may_change_adapters_and_devices(repository):
    pipe = quiet(load(repository, device="cpu", prompt_enhancer=False))

    def callback(pipe: ErnieImagePipeline, *_: object) -> dict:
        pipe.to("cpu")
        return {}

    assert pipe("a cat", height=32, width=32, num_inference_steps=2, callback_on_step_end=callback).images


@pytest.mark.parametrize("copied", [copying.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_has_a_turn_of_its_own(repository, copied):
    pipe = quiet(load(repository, device="cpu", prompt_enhancer=False))
    twin = copied(pipe)
    with ThreadPoolExecutor(1) as pool, pipe.turn.take(CPU):
        twin_picture = pool.submit(picture, twin, 1).result(timeout=60)
    assert twin_picture == picture(pipe, 1)


def test_is_written_as_upstreams_pipeline(repository, tmp_path):
    pipe = load(repository, device="cpu")
    files = []
    theirs = ErnieImagePipeline(**pipe.components)
    theirs.register_to_config(_name_or_path=pipe.config["_name_or_path"])
    for name, each in (("ours", pipe), ("theirs", theirs)):
        each.save_pretrained(tmp_path / name)
        files.append({path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")})
    assert files[0] == files[1]


# Several pipelines


@pytest.mark.parametrize("fast", [True, False])
def test_threads_with_a_pipeline_each_draw_what_they_draw_alone(repository, device, fast):
    pipes = [quiet(load(repository, device=device, memory="resident", fast=fast)) for _ in range(THREADS)]
    alone = [picture(pipe, seed) for seed, pipe in enumerate(pipes)]
    for _ in range(3):
        assert in_threads(lambda seed: picture(pipes[seed], seed)) == alone


@pytest.mark.gpu
def test_pipelines_of_all_memory_modes_draw_at_once(repository):
    modes = ("resident", "offload", "stream", "resident")
    pipes = [quiet(load(repository, device="cuda", memory=mode)) for mode in modes]
    alone = [picture(pipe, seed) for seed, pipe in enumerate(pipes)]
    for _ in range(3):
        assert in_threads(lambda seed: picture(pipes[seed], seed)) == alone


def test_a_thread_may_load_while_another_one_draws(repository, device):
    pipe = quiet(load(repository, device=device))
    alone = picture(pipe, 1)
    loaded = threading.Event()

    def draws() -> list:
        pictures = [picture(pipe, 1)]
        while not loaded.is_set():
            pictures.append(picture(pipe, 1))
        return pictures

    def loads() -> list:
        try:
            return [picture(quiet(load(repository, device=device)), 1) for _ in range(3)]
        finally:
            loaded.set()

    pictures = in_threads(lambda number: loads() if number else draws(), 2)
    assert {*pictures[0], *pictures[1]} == {alone}


@pytest.mark.gpu
def test_pipelines_that_share_their_parts_draw_in_threads_on_streams_of_their_own(repository):
    pipe = quiet(load(repository, device="cuda", memory="resident"))
    alone = [picture(pipe, seed) for seed in range(2)]
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    pipes = [pipe, quiet(ErnieImagePipeline(**{**pipe.components, "scheduler": scheduler}))]

    def work(seed: int) -> tuple:
        with torch.cuda.stream(torch.cuda.Stream()):
            return picture(pipes[seed], seed)

    for _ in range(3):
        assert in_threads(work, 2) == alone


# Random state


def test_drawing_leaves_the_global_random_state_alone(repository, device):
    pipe = quiet(load(repository, device=device))
    picture(pipe, 0)
    states = lambda: [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device == "cuda" else ())]  # noqa: E731
    before = states()
    picture(pipe, 1)
    list(draw_group(pipe, [[settings(0)]], {}))
    assert all(map(torch.equal, states(), before))


def test_seeded_draws_are_those_of_a_seeded_process():
    torch.manual_seed(5)
    weights = torch.rand(3, 100)
    draws = lambda: [torch.multinomial(weights, 2), torch.multinomial(weights, 1), torch.randperm(9)]  # noqa: E731
    torch.manual_seed(7)
    expected = draws()
    torch.manual_seed(8)
    state = torch.get_rng_state()
    with SeededDraws(7):
        assert all(map(torch.equal, draws(), expected))
    assert torch.equal(torch.get_rng_state(), state)
    with ThreadPoolExecutor(1) as pool, SeededDraws(7):  # other threads draw as ever
        assert torch.equal(pool.submit(torch.randperm, 9).result(), torch.randperm(9, generator=_with_state(state)))


def _with_state(state: torch.Tensor) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(state)
    return generator


def test_a_text_is_sampled_from_the_callers_random_state(device):
    own = torch.Generator(torch.device(device, 0) if device == "cuda" else device)
    sample = lambda generator=None: torch.rand(4, device=device, generator=generator)  # noqa: E731
    torch.manual_seed(3)
    expected = sample(), sample()
    torch.manual_seed(3)
    with drawing_as_caller(own):
        assert torch.equal(sample(own), expected[0])
    assert torch.equal(sample(), expected[1])  # the caller's state is behind what was drawn
    with SeededDraws(3), drawing_as_caller(own):
        assert torch.equal(sample(own), expected[0])


def test_who_draws_after_the_handing_over_goes_on_behind_the_draws():
    own = torch.Generator()
    torch.manual_seed(3)
    expected = torch.rand(8)
    torch.manual_seed(3)
    with drawing_as_caller(own) as hand_over:
        got = [torch.rand(4, generator=own)]
        hand_over()
        got.append(torch.rand(4))
    assert torch.equal(torch.cat(got), expected)
    assert torch.equal(torch.rand(4), torch.rand(12, generator=torch.Generator().manual_seed(3))[8:])


def test_a_text_that_upstream_decodes_is_sampled_from_the_calls_generator(repository):
    pe = load(repository, device="cpu").pe
    make_prompt_enhancer_fast(pe)
    ids = {"input_ids": torch.tensor([[1, 5, 6]]), "do_sample": True, "max_new_tokens": 4, "penalty_alpha": None}
    options = {**ids, "output_scores": True, "return_dict_in_generate": True}
    assert pe.decode_request(**options) is None
    torch.manual_seed(5)
    expected, state = pe.generate(**options).sequences, torch.get_rng_state()
    torch.manual_seed(5)
    own = torch.Generator()
    with drawing_as_caller(own):
        assert torch.equal(pe.generate(**options).sequences, expected)
        assert not torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_others_make_of_the_callers_random_state_meanwhile_stays():
    own = torch.Generator()
    with drawing_as_caller(own):
        torch.rand(4, generator=own)
        torch.manual_seed(9)
    assert torch.equal(torch.rand(4), torch.rand(4, generator=torch.Generator().manual_seed(9)))


def test_the_callers_random_state_goes_on_after_an_error():
    def draw_and_fail() -> None:
        with drawing_as_caller(own):
            draws.append(torch.rand(4, generator=own))
            raise KeyError

    own, draws = torch.Generator(), []
    for _ in range(2):
        with pytest.raises(KeyError):
            draw_and_fail()
    assert not torch.equal(*draws)


def test_a_pipeline_made_of_anothers_parts_has_a_turn(repository):
    pipe = quiet(load(repository, device="cpu", prompt_enhancer=False))
    assert picture(quiet(type(pipe)(**pipe.components)), 1) == picture(pipe, 1)


def test_texts_that_are_sampled_at_once_are_not_sampled_from_the_same_numbers():
    torch.manual_seed(3)
    all_draw = threading.Barrier(3)

    def work(_: int) -> tuple[float, ...]:
        own = torch.Generator()
        with drawing_as_caller(own):
            all_draw.wait()
            return tuple(torch.rand(8, generator=own).tolist())

    assert len({*in_threads(work, 3)}) == 3


@pytest.mark.gpu
def test_calls_without_a_generator_draw_while_other_threads_capture(repository):
    """In torch 2.11 else: "Offset increment outside graph capture encountered unexpectedly"."""
    pipes = [quiet(load(repository, device="cuda", memory="resident")) for _ in range(THREADS)]
    size = {"height": 32, "width": 32, "num_inference_steps": 3}

    def work(number: int) -> list[bytes]:
        return [pipes[number]("a cat", **size).images[0].tobytes() for _ in range(20)]

    pictures = [picture for pictures in in_threads(work) for picture in pictures]
    assert len({*pictures}) == len(pictures)


@pytest.mark.gpu
@pytest.mark.parametrize("fast", [True, False])
def test_a_call_without_a_generator_draws_from_the_global_state(repository, fast):
    pipe = quiet(load(repository, device="cuda", memory="resident", fast=fast))
    plain = quiet(ErnieImagePipeline(**load(repository, device="cuda", memory="resident", fast=False).components))
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
    results = []
    for each in (pipe, plain):
        torch.manual_seed(11)
        drawn: list[torch.Tensor] = []
        callback = lambda *_, drawn=drawn: drawn.append(torch.rand(3, device="cuda")) or {}  # noqa: E731
        latents = each("a cat", use_pe=False, callback_on_step_end=callback, **size).images
        results.append((latents, torch.stack([*drawn, torch.rand(3, device="cuda")])))
    assert torch.equal(results[0][1], results[1][1])
    # In float16 the fast one gives float32.
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0.1, atol=0.1, check_dtype=False)


# Parts


@pytest.mark.parametrize("stream_blocks", [False, True])
@pytest.mark.parametrize(
    "part",
    [lambda pipe: pipe.pe.generate(torch.tensor([[1, 5]]), max_new_tokens=2), lambda pipe: copying.deepcopy(pipe.pe)],
)
def test_an_offloaded_part_that_is_used_by_itself_waits_for_the_picture(repository, part, stream_blocks):
    pipe = quiet(load(repository, device="cpu", dtype=torch.float32))  # as the latents of SIZE
    make_prompt_enhancer_fast(pipe.pe)
    enable_offload(pipe, CPU, stream_blocks=stream_blocks, turn=pipe.turn)
    expected = picture(pipe, 1)
    steps = []

    def use(*_: object) -> dict:
        steps.append(len(done))
        if len(steps) == 1:
            pool.submit(part, pipe).add_done_callback(done.append)
            time.sleep(0.3)
        return {}

    done: list[object] = []
    with ThreadPoolExecutor(1) as pool:
        got = pipe(**SIZE, callback_on_step_end=use)
    assert steps == [0] * SIZE["num_inference_steps"]
    done[0].result()
    assert got.images[0].tobytes() == pipe(**SIZE).images[0].tobytes()
    assert picture(pipe, 1) == expected


def test_how_many_pictures_a_call_has_is_its_threads(repository):
    """Pipelines may share a transformer, and one of them may draw groups."""
    transformer = load(repository, device="cpu", prompt_enhancer=False).transformer
    make_transformer_fast(transformer, capture_steps=False)
    with several_pictures(transformer, 2), ThreadPoolExecutor(1) as pool:
        assert transformer.runtime.pictures == 2
        assert pool.submit(lambda: transformer.runtime.pictures).result() == 1
    assert transformer.runtime.pictures == 1


# Streams


@pytest.mark.gpu
def test_a_stream_is_found_among_those_that_others_have_taken():
    streams, device = CaptureStreams(), torch.device("cuda", 0)
    taken = [streams.take(device)]
    for _ in range(31):  # torch hands out the same one again after these
        torch.cuda.Stream(device, priority=-1)
    assert streams.take(device) not in taken


@pytest.mark.gpu
def test_a_capture_stream_has_one_owner_and_is_taken_again():
    streams, device = CaptureStreams(), torch.device("cuda", 0)
    taken = [streams.take(device) for _ in range(32)]
    assert len({stream.cuda_stream for stream in taken}) == 32
    with pytest.raises(RuntimeError, match="captured on"):
        streams.take(device)
    streams.give_back(taken[3])
    assert streams.take(device) == taken[3]


@pytest.mark.gpu
def test_pictures_are_right_when_no_stream_is_left(repository, monkeypatch):
    pipe = quiet(load(repository, device="cuda", memory="resident"))
    expected = np.frombuffer(picture(pipe, 1)[0], np.uint8)

    def none(self: CaptureStreams, device: torch.device) -> torch.cuda.Stream:
        raise RuntimeError("All streams are captured on.")

    monkeypatch.setattr(CaptureStreams, "take", none)
    pipe = quiet(load(repository, device="cuda", memory="resident"))
    assert np.array_equal(np.frombuffer(picture(pipe, 1)[0], np.uint8), expected)


def test_pipelines_do_not_wait_for_each_other(repository: Path):
    """Waiting threads hold no lock that a draw needs: two pipelines' turns are their own."""
    pipes = [quiet(load(repository, device="cpu", prompt_enhancer=False)) for _ in range(2)]
    with ThreadPoolExecutor(1) as pool, pipes[0].turn.take(CPU):
        assert pool.submit(picture, pipes[1], 0).result(timeout=60)
