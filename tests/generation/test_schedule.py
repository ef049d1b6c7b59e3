"""What is drawn: file names, batches that fit the memory, groups, and the shares of processes."""

from __future__ import annotations

import pytest
import torch

from ernie_image_nf4 import load
from ernie_image_nf4.generation import schedule
from ernie_image_nf4.generation.prompt_file import Row
from ernie_image_nf4.generation.schedule import (
    DENOISE_BYTES_PER_PIXEL,
    MAX_BATCH,
    WORKING_BYTES,
    Picture,
    choose_batch_size,
    choose_pixels_at_once,
    find_batch_size,
    find_pixels_at_once,
    groups,
    plan_pictures,
    share,
    slug,
)
from ernie_image_nf4.generation.settings import Settings
from ernie_image_nf4.memory.offload import enable_offload
from ernie_image_nf4.memory.placement import GIB
from ernie_image_nf4.memory.precision import BFLOAT16, Precision

DEFAULTS = Settings("", "none", 32, 32, 2, 3.0, seed=5)
MIXED, FLOAT32 = Precision(torch.float16, mixed=True), Precision(torch.float32)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("An Orange  cat, on_a desk!", "an-orange-cat-on-a-desk"),
        ("一只橙色的小猫,坐在木桌上", "一只橙色的小猫-坐在木桌上"),
        ("../../etc/passwd", "etc-passwd"),
        ("🐱", ""),
        ("word " * 20, "word-word-word-word-word-word-word-word"),
        ("字" * 50, "字" * 40),
    ],
)
def test_slugs(prompt, expected):
    assert slug(prompt) == expected


def test_a_prompt_without_words_leaves_the_number():
    assert [picture.file for picture in plan_pictures([Row("🐱")], DEFAULTS)] == ["0001.png"]


def test_a_row_overrides_the_defaults_and_zero_is_a_value():
    row = Row("a", negative="", seed=0, height=64, width=48, steps=7, guidance=0)
    (picture,) = plan_pictures([row], DEFAULTS)
    assert picture.settings == Settings("a", "", 64, 48, 7, 0.0, seed=0)
    assert isinstance(picture.settings.guidance_scale, float)
    (picture,) = plan_pictures([Row("a")], DEFAULTS)
    assert picture.settings == Settings("a", "none", 32, 32, 2, 3.0, seed=5)


@pytest.mark.parametrize(
    ("side", "free", "expected"),
    [
        (512, None, 1),
        (512, 60 * GIB, MAX_BATCH),
        (512, 3 * GIB, 4),
        (1024, 6 * GIB, 2),
        (1024, 1 * GIB, 1),
        (512, 0, 1),
    ],
)
def test_a_batch_fits_the_memory(side, free, expected):
    assert choose_batch_size(side * side, free) == choose_batch_size(side * side, free, BFLOAT16) == expected


@pytest.mark.parametrize(("precision", "expected"), [(BFLOAT16, 8), (MIXED, 6), (FLOAT32, 4)])
def test_a_batch_is_smaller_where_a_picture_takes_more(precision, expected):
    assert choose_batch_size(512**2, 5 * GIB, precision) == expected
    assert choose_batch_size(512**2, None, precision) == 1


def test_more_memory_never_makes_a_smaller_batch_nor_a_wider_precision_a_larger_one():
    for free in range(0, 12 * GIB, GIB // 3):
        in_bfloat16, mixed, in_float32 = (choose_pixels_at_once(free, each) for each in (BFLOAT16, MIXED, FLOAT32))
        assert in_bfloat16 >= mixed >= in_float32 >= in_bfloat16 // 2
        assert choose_pixels_at_once(free + GIB, MIXED) >= mixed


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", 8), ("float16", 6), ("float32", 4)])
def test_a_pipelines_own_precision_counts(repository, monkeypatch, dtype, expected):
    pipe = load(repository, device="cpu", dtype=dtype, prompt_enhancer=False)
    monkeypatch.setattr(schedule, "free_memory", lambda device: 5 * GIB)
    assert find_batch_size(pipe, Settings("a cat", "", 512, 512, 1, 1.0, seed=0)) == expected
    assert find_pixels_at_once(pipe) // 512**2 == expected


@pytest.mark.parametrize(("memory", "expected"), [("resident", 4), ("offload", 3)])
def test_weights_that_are_still_to_come_take_their_room(repository, monkeypatch, memory, expected):
    pipe = load(repository, device="cpu", prompt_enhancer=False)
    if memory == "offload":
        enable_offload(pipe, torch.device("cpu"))
    settings = Settings("a cat", "", 512, 512, 1, 1.0, seed=0)
    assert find_batch_size(pipe, settings) == 1  # on a CPU
    just_four = WORKING_BYTES + 4 * int(DENOISE_BYTES_PER_PIXEL) * 512**2
    monkeypatch.setattr(schedule, "free_memory", lambda device: just_four)
    assert find_batch_size(pipe, settings) == expected


def shaped(number: int, height: int) -> Picture:
    return Picture(f"{number}.png", Settings("", "", height, 32, 1, 1.0, seed=number))


def test_batches_are_of_one_shape_and_groups_of_several_batches():
    pictures = [shaped(number, 32 if number % 3 else 16) for number in range(10)]
    found = [[[p.file[0] for p in batch] for batch in group] for group in groups(pictures, lambda _: 2, least=4)]
    assert found == [[["0", "3"], ["6", "9"]], [["1", "2"], ["4", "5"]], [["7", "8"]]]


def test_every_process_gets_its_share_of_each_size():
    pictures = [shaped(number, 16 if number < 5 else 32) for number in range(10)]
    shares = [share(pictures, process, 2) for process in range(2)]
    assert [picture.settings.height for picture in shares[0]] == [16, 16, 16, 32, 32]
    assert [picture.settings.height for picture in shares[1]] == [16, 16, 32, 32, 32]
    assert {picture.file for part in shares for picture in part} == {picture.file for picture in pictures}


def test_processes_without_a_picture_have_nothing_to_do():
    shares = [share([shaped(0, 32)], process, 3) for process in range(3)]
    assert [len(part) for part in shares] == [1, 0, 0]
