"""Seeds: what they decide, and that no random state of torch is another one afterwards."""

from __future__ import annotations

import threading

import pytest
import torch

from ernie_image_nf4 import load
from ernie_image_nf4.generation.seeding import seeded
from ernie_image_nf4.generation.settings import Settings
from ernie_image_nf4.generation.single import draw

CPU = torch.device("cpu")


def test_a_seed_gives_the_numbers_of_manual_seed():
    torch.manual_seed(5)
    expected = torch.rand(3)
    with seeded(5, CPU):
        assert torch.equal(torch.rand(3), expected)


def test_the_state_before_comes_back_even_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError), seeded(5, CPU):
        torch.rand(3) @ torch.rand(4)
    assert torch.equal(torch.get_rng_state(), state)


def test_drawing_on_a_cpu_seeds_no_accelerator(pipe, monkeypatch):
    """One that isn't in use yet would keep torch's note of the seed until it is."""
    seeds = []
    for module, name in ((torch.cuda, "manual_seed_all"), (torch.xpu, "manual_seed_all"), (torch.mps, "manual_seed")):
        monkeypatch.setattr(module, name, seeds.append)
    draw(pipe, Settings("a cat", "", 32, 32, 1, 1.0, seed=0))
    assert seeds == []


def test_threads_that_seed_at_once_restore_what_was_there_before_both():
    state, inside, drawn = torch.get_rng_state(), threading.Barrier(2, timeout=0.2), []

    def work(seed: int) -> None:
        with seeded(seed, CPU):
            try:
                inside.wait()
            except threading.BrokenBarrierError:  # the other one waits outside
                drawn.append((seed, torch.rand(1).item()))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.get_rng_state(), state)
    alone = {seed: torch.rand(1, generator=torch.Generator().manual_seed(seed)).item() for seed in (1, 2)}
    assert dict(drawn) == alone


@pytest.mark.gpu
def test_drawing_leaves_the_random_states_of_all_gpus_alone(repository):
    pipe = load(repository, device="cuda:0")
    others = range(1, torch.cuda.device_count())
    torch.manual_seed(1)
    before = torch.cuda.get_rng_state_all()
    during = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda *_: during.append([torch.cuda.get_rng_state(other) for other in others])
    )
    draw(pipe, Settings("a cat", "", 32, 32, 1, 1.0, seed=0))
    hook.remove()
    assert all(map(torch.equal, torch.cuda.get_rng_state_all(), before))
    assert all(map(torch.equal, during[0], before[1:]))


@pytest.mark.gpu
def test_on_a_gpu_a_seed_gives_the_numbers_of_manual_seed():
    device = torch.device("cuda:0")
    torch.manual_seed(5)
    expected = torch.rand(3, device=device)
    with seeded(5, device):
        assert torch.equal(torch.rand(3, device=device), expected)
