"""What happens to people: memory that runs out, and many pictures in a row."""

from __future__ import annotations

import gc
import itertools
import os
import resource
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from ernie_image_nf4 import load
from ernie_image_nf4.errors import DeviceUnavailable
from ernie_image_nf4.generation.settings import Settings
from ernie_image_nf4.generation.single import draw, draw_and_save

SMALL = Settings("a cat", "", 32, 48, 2, 4.0, seed=0, use_pe=False)
HUGE = Settings("a cat", "", 2**20, 2**20, 2, 4.0, seed=0, use_pe=False)  # its latents alone take 2 TB


# Memory


def test_running_out_of_memory_says_what_to_do_and_leaves_a_pipeline_that_works(pipe):
    expected = np.asarray(draw(pipe, SMALL).image)
    with pytest.raises(DeviceUnavailable, match=r"The memory of cpu ran out at 1048576x1048576: draw a smaller size\."):
        draw(pipe, HUGE)
    assert np.array_equal(np.asarray(draw(pipe, SMALL).image), expected)


def test_running_out_of_memory_in_the_middle_leaves_nothing_behind(pipe):
    """A layer asks for too much while others' results are alive: they must not outlive the error."""
    others: list[weakref.ref[torch.Tensor]] = []

    def ask_for_too_much(module: torch.nn.Module, inputs: tuple) -> None:
        alive = torch.zeros(1000)
        others.append(weakref.ref(alive))
        torch.empty(2**50)

    handle = pipe.transformer.layers[-1].register_forward_pre_hook(ask_for_too_much)
    try:
        with pytest.raises(DeviceUnavailable) as caught:
            draw(pipe, SMALL)
    finally:
        handle.remove()
    assert caught.value.__cause__ is not None
    assert [other() for other in others] == [None]
    draw(pipe, SMALL)


def test_other_errors_of_the_libraries_stay_what_they_are(pipe):
    def fail(module: torch.nn.Module, inputs: tuple) -> None:
        raise RuntimeError("something else")

    handle = pipe.transformer.register_forward_pre_hook(fail, with_kwargs=False)
    try:
        with pytest.raises(RuntimeError, match="something else"):
            draw(pipe, SMALL)
    finally:
        handle.remove()


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["resident", "offload"])
def test_running_out_of_gpu_memory_says_what_to_do_and_leaves_a_pipeline_that_works(repository, memory):
    gc.collect()
    torch.cuda.empty_cache()  # what earlier tests left would be room enough
    pipe = load(repository, device="cuda", memory=memory)
    expected = np.asarray(draw(pipe, SMALL).image)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 32 * 2**20) / total)
    try:
        with pytest.raises(DeviceUnavailable, match="offload" if memory == "resident" else "stream"):
            draw(pipe, Settings("a cat", "", 4096, 4096, 2, 4.0, seed=0, use_pe=False))
        assert np.array_equal(np.asarray(draw(pipe, SMALL).image), expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# Many pictures


def test_pictures_in_a_row_take_no_more_memory_and_no_more_files(pipe, tmp_path):
    def drawn(count: int) -> tuple[int, int]:
        paths = [tmp_path / f"{number}.png" for number in range(count)]
        for _ in draw_and_save(pipe, paths, "a cat", height=32, width=32, steps=1, seed=0):
            pass
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])  # there now: the peak may lie in an earlier test
        return pages * resource.getpagesize(), len(os.listdir("/proc/self/fd"))

    drawn(3)
    memory, files = zip(*(drawn(6) for _ in range(4)), strict=True)
    assert len(set(files)) == 1
    growth = [later - earlier for earlier, later in itertools.pairwise(memory)]
    assert min(growth) < 5e6  # bytes; what leaks does so every time, what else the process does may add to one


def test_loading_again_and_again_leaves_no_files_open(repository):
    load(repository, device="cpu")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        load(repository, device="cpu")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before
