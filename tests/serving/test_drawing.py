"""What a worker does with a batch: messages in order, bad pictures that spoil no other, an end within a step."""

from __future__ import annotations

from multiprocessing import Pipe

import pytest
import torch

from ernie_image_nf4.generation.settings import Settings
from ernie_image_nf4.generation.stages import DrawingStopped
from ernie_image_nf4.serving.drawing import ServerStops, devices_beside, draw_batch
from ernie_image_nf4.serving.messages import Draw, Drawn, Drop, Failed, StepDone, Task, TextRevised

SMALL = Settings("a cat", "", 32, 32, 3, 3.0, seed=0)


def batch_of(count: int) -> Draw:
    return Draw(tuple(Task(number, Settings("a cat", "", 32, 32, 3, 3.0, seed=number)) for number in range(count)))


def drawn(pipe, batch: Draw, *sent: object, limits: dict | None = None) -> list:
    """What a worker says while it draws a batch, if the server has sent this before."""
    server, worker = Pipe()
    for message in sent:
        server.send(message)
    with server, worker:
        try:
            draw_batch(pipe, worker, batch, {} if limits is None else limits, "ERNIE-Tiny-NF4")
        except DrawingStopped as stopped:
            worker.send(stopped)
        messages = []
        while server.poll():
            messages.append(server.recv())
        return messages


def test_a_batch_is_told_text_by_text_step_by_step_and_picture_by_picture(pipe):
    messages = drawn(pipe, batch_of(2))
    assert [type(message) for message in messages] == [TextRevised] * 2 + [StepDone] * 3 + [Drawn] * 2
    assert [message.numbers for message in messages[2:5]] == [(0, 1)] * 3
    assert [message.step for message in messages[2:5]] == [1, 2, 3]
    assert [(message.number, message.batch_size) for message in messages[5:]] == [(0, 2), (1, 2)]


def test_the_same_picture_twice_is_told_for_both(pipe):
    messages = drawn(pipe, Draw((Task(7, SMALL), Task(8, SMALL))))
    pngs = [message.png for message in messages if isinstance(message, Drawn)]
    assert len(pngs) == 2
    assert pngs[0] == pngs[1]
    assert {message.numbers for message in messages if isinstance(message, StepDone)} == {(7, 8)}


def test_a_picture_that_nobody_waits_for_is_left_out_and_the_others_are_drawn(pipe):
    messages = drawn(pipe, batch_of(2), Drop(frozenset({0, 99})))
    assert [message.number for message in messages if isinstance(message, Drawn)] == [1]


def test_a_batch_that_nobody_waits_for_ends_before_its_first_step(pipe):
    messages = drawn(pipe, batch_of(2), Drop(frozenset({0})), Drop(frozenset({1})))
    assert [type(message) for message in messages] == [DrawingStopped]
    assert drawn(pipe, batch_of(1))  # the pipeline goes on


def test_a_server_that_ends_ends_the_batch(pipe):
    assert [type(message) for message in drawn(pipe, batch_of(1), None)] == [ServerStops]


def test_a_picture_that_comes_to_nothing_spoils_no_other(pipe):
    calls = []

    def spoil_the_first(module, inputs, output):
        calls.append(1)
        return output * float("nan") if len(calls) == 1 else output

    handle = pipe.vae.decoder.register_forward_hook(spoil_the_first)
    try:
        messages = drawn(pipe, batch_of(3))
    finally:
        handle.remove()
    (failed,) = [message for message in messages if isinstance(message, Failed)]
    assert "there is no picture" in failed.text
    assert [message.number for message in messages if isinstance(message, Drawn)] == [1, 2]


def test_out_of_memory_halves_the_batch(pipe):
    def too_many(module, args, options):
        if len(options["hidden_states"]) > 4:  # two rows a picture
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    limits: dict[int, int] = {}
    handle = pipe.transformer.register_forward_pre_hook(too_many, with_kwargs=True)
    try:
        messages = drawn(pipe, batch_of(4), limits=limits)
    finally:
        handle.remove()
    assert [message.batch_size for message in messages if isinstance(message, Drawn)] == [2] * 4
    assert limits == {32 * 32: 2}


@pytest.mark.gpu
def test_every_gpu_is_named():
    own, devices = devices_beside(torch.device("cuda"))
    assert own in devices
    assert len(devices) == torch.cuda.device_count()
