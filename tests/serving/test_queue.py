"""The queue: the oldest picture first, and with it those of its shape."""

from __future__ import annotations

from dataclasses import replace

from ernie_image_nf4.generation.settings import LoraUse
from ernie_image_nf4.serving.queue import Pending, PictureQueue, pictures_of
from ernie_image_nf4.serving.requests import DrawRequest

BASE = DrawRequest(prompt="a cat", width=64, height=64, steps=4, guidance_scale=4.0)


def pictures(owner: int, **changes) -> list[Pending]:
    return pictures_of(replace(BASE, **changes), owner, 7, {"style": LoraUse("style.safetensors", 1.0, "0" * 64)})


def queue_of(*requests: list[Pending]) -> PictureQueue:
    queue = PictureQueue()
    for each in requests:
        queue.add(each)
    return queue


def owners(batch: list[Pending]) -> list[int]:
    return [each.owner for each in batch]


def test_pictures_of_a_request_have_seeds_that_count_up():
    assert [each.settings.seed for each in pictures(1, count=3)] == [7, 8, 9]


def test_the_oldest_picture_takes_those_of_its_shape_with_it():
    queue = queue_of(pictures(1), pictures(2, width=32), pictures(3), pictures(4, steps=5), pictures(5))
    assert owners(queue.take(lambda each: 8)) == [1, 3, 5]
    assert owners(queue.take(lambda each: 8)) == [2]
    assert owners(queue.take(lambda each: 8)) == [4]
    assert queue.take(lambda each: 8) == []


def test_a_batch_is_as_large_as_the_worker_says_and_the_rest_waits_in_order():
    queue = queue_of(pictures(1, count=3), pictures(2))
    assert owners(queue.take(lambda each: 2)) == [1, 1]
    assert owners(queue.take(lambda each: 8, at_most=1)) == [1]
    assert owners(queue.take(lambda each: 8)) == [2]


def test_other_adapters_make_another_batch():
    queue = queue_of(pictures(1), pictures(2, lora=(("style", 1.0),)), pictures(3, lora=(("style", 0.5),)))
    assert [owners(queue.take(lambda each: 8)) for _ in range(3)] == [[1], [2], [3]]


def test_what_steps_leave_out_makes_another_batch():
    queue = queue_of(pictures(1), pictures(2, guidance_until=0.5), pictures(3, cache=2), pictures(4, cache=2))
    assert [owners(queue.take(lambda each: 8)) for _ in range(3)] == [[1], [2], [3, 4]]


def test_what_a_dead_worker_had_comes_first_and_alone():
    queue = queue_of(pictures(1, count=2))
    queue.put_back([replace(each, alone=True) for each in pictures(9, count=2)])
    assert [owners(queue.take(lambda each: 8)) for _ in range(3)] == [[9], [9], [1, 1]]


def test_a_dropped_request_leaves_nothing():
    queue = queue_of(pictures(1, count=2), pictures(2), pictures(1))
    queue.remove(1)
    assert owners(queue.waiting) == [2]


def test_places_count_the_pictures_before():
    queue = queue_of(pictures(1, count=2), pictures(2), pictures(3))
    assert list(queue.positions()) == [(1, 0), (2, 2), (3, 3)]
