"""Models that are loaded, drawn with and let go, again and again, as a page that offers several models does it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from ernie_image_nf4 import load

pytestmark = pytest.mark.gpu
MODES = ("resident", "offload", "stream")
ROUNDS = 12


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def rounds(repository, use_pe: bool) -> list[tuple[int, int, int]]:
    """Allocated bytes before loading, after drawing, and after `del`, of each round; all memory modes in turn."""
    seen = []
    for number in range(ROUNDS):
        before = torch.cuda.memory_allocated()
        pipe = load(repository, device="cuda", memory=MODES[number % len(MODES)])
        pipe.set_progress_bar_config(disable=True)
        pipe("a cat", height=64, width=64, num_inference_steps=3, use_pe=use_pe)
        held = torch.cuda.memory_allocated()
        del pipe
        seen.append((before, held, torch.cuda.memory_allocated()))
    return seen


@pytest.mark.parametrize("use_pe", [True, False])
def test_nothing_stays_from_the_third_round_on(repository, use_pe):
    after = [after for _, _, after in rounds(repository, use_pe)]
    assert after[-1] - after[2] < (ROUNDS - 3) * 2**18


def test_del_frees_a_pipelines_memory_at_once(repository):
    seen = rounds(repository, True)[3:]
    assert all(held - after >= 0.95 * (held - before) for before, held, after in seen), seen


def test_del_frees_what_several_texts_were_decoded_with(repository):
    for number in range(4):
        before = torch.cuda.memory_allocated()
        pipe = load(repository, device="cuda", dtype="bfloat16", memory="resident")
        request = pipe.pe.decode_request(
            input_ids=torch.tensor([[5, 17]]), max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        pipe.pe.generate_together([request] * 3, range(3), 3)
        assert pipe.pe.runtime.batch is not None
        held = torch.cuda.memory_allocated()
        del pipe
        if number:  # the first leaves workspaces of cuBLAS
            assert held - torch.cuda.memory_allocated() >= 0.95 * (held - before)
