"""The engine: pictures that are those of ``generate``, in order, and requests of which none is lost."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CHECKOUT
from PIL import Image
from running import Loop, events_of, request, running_engine, running_loop, until

from ernie_image_nf4 import load
from ernie_image_nf4.errors import (
    ErnieImageNF4Error,
    InvalidRequest,
    QueueFull,
    RequestTimedOut,
    ShuttingDown,
    WorkerLost,
)
from ernie_image_nf4.generation.single import draw_and_save
from ernie_image_nf4.serving.engine import Engine
from ernie_image_nf4.serving.events import Picture, Queued, Revised, Started, Step
from ernie_image_nf4.serving.requests import Limits

LONG = {"steps": 60, "width": 64, "height": 64}  # takes seconds


@pytest.fixture(scope="module")
def loop():
    with running_loop() as loop:
        yield loop


@pytest.fixture(scope="module")
def engine(loop, repository):
    """One engine for all tests of this file that leave it as it was."""
    with running_engine(loop, repository) as engine:
        yield engine


def drawn(loop: Loop, engine: Engine, **fields) -> list:
    return loop.run(events_of(engine.draw(request(**fields))))


def pictures(events: list) -> list[Picture]:
    return [event for event in events if isinstance(event, Picture)]


async def first(events, kind):
    """Wait for the first event of a kind."""
    async for event in events:
        if isinstance(event, kind):
            return event


# Pictures


def test_a_file_is_that_of_generate_to_the_byte(loop, engine, pipe, tmp_path):
    paths = [tmp_path / "1.png", tmp_path / "2.png"]
    options = {"height": 32, "width": 48, "steps": 2, "guidance": 3.0, "seed": 11, "negative": "dogs"}
    expected = list(draw_and_save(pipe, paths, "一只橙色的小猫", **options))
    fields = {"prompt": "一只橙色的小猫", "width": 48, "seed": 11, "negative_prompt": "dogs", "count": 2}
    found = pictures(drawn(loop, engine, **fields))
    assert [each.png for each in found] == [path.read_bytes() for path in paths]
    assert [each.revised_prompt for each in found] == [drawing.revised_prompt for drawing, _ in expected]
    assert [each.seed for each in found] == [11, 12]
    assert found[0].image.size == (48, 32)


def test_events_come_in_order(loop, engine):
    events = [event for event in drawn(loop, engine, steps=3, count=2) if not isinstance(event, Queued)]
    assert [type(event) for event in events] == [Started, Revised, *[Step] * 3, Picture, *[Step] * 3, Picture]
    assert [(each.step, each.steps, each.picture) for each in events if isinstance(each, Step)] == [
        (1, 3, 0), (2, 3, 0), (3, 3, 0), (1, 3, 1), (2, 3, 1), (3, 3, 1),
    ]  # fmt: skip
    assert events[1].prompt == events[5].revised_prompt


def test_without_the_enhancer_no_prompt_is_revised(loop, engine):
    events = drawn(loop, engine, use_pe=False)
    assert not [event for event in events if isinstance(event, Revised)]
    assert pictures(events)[0].revised_prompt is None


def test_a_seed_is_chosen_and_told_where_none_is_asked_for(loop, engine):
    (picture,) = pictures(drawn(loop, engine, seed=None))
    assert pictures(drawn(loop, engine, seed=picture.seed))[0].png == picture.png


def test_many_at_once_are_each_what_they_are_alone(loop, engine):
    fields = [{"seed": seed, "width": 32 + 16 * (seed % 2), "prompt": f"a cat {seed}"} for seed in range(6)]
    alone = [pictures(drawn(loop, engine, **each))[0].png for each in fields]
    together = [loop.start(events_of(engine.draw(request(**each)))) for each in fields]
    assert [pictures(each.result(60))[0].png for each in together] == alone


def test_the_server_doesnt_import_torch():
    code = "import sys; from ernie_image_nf4.serving.application import make_app; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# Requests that end otherwise


def test_what_cant_be_drawn_is_refused_before_it_waits(loop, engine):
    with pytest.raises(InvalidRequest, match="multiple of 16"):
        drawn(loop, engine, width=33)
    assert engine.unfinished == 0


def test_who_waits_is_told_the_place(loop, engine):
    async def places():
        busy = asyncio.create_task(events_of(engine.draw(request(**LONG, use_pe=False))))
        await asyncio.sleep(0.1)
        waiting = [asyncio.create_task(events_of(engine.draw(request(seed=seed)))) for seed in (1, 2)]
        await busy
        return [[e.position for e in await each if isinstance(e, Queued)] for each in waiting]

    assert loop.run(places()) == [[0], [1, 0]]


def test_a_dropped_request_frees_its_worker_within_a_step(loop, engine):
    async def drop_after_a_step():
        async with aclosing(engine.draw(request(**{**LONG, "steps": 100}, count=5))) as events:
            step = await first(events, Step)
        dropped = time.monotonic()
        await events_of(engine.draw(request(steps=1, use_pe=False)))
        return step.step, time.monotonic() - dropped

    began = time.monotonic()
    drawn(loop, engine, **{**LONG, "steps": 100}, use_pe=False)
    whole = time.monotonic() - began
    step, seconds = loop.run(drop_after_a_step())
    assert step == 1
    assert seconds < whole / 3
    assert engine.unfinished == engine.waiting == 0


def test_a_cancelled_task_drops_its_request_and_not_its_neighbour(loop, engine):
    async def two():
        one = asyncio.create_task(events_of(engine.draw(request(**LONG))))
        other = asyncio.create_task(events_of(engine.draw(request(seed=4))))
        await asyncio.sleep(0.2)
        one.cancel()
        return await other

    assert pictures(loop.run(two()))[0].png == pictures(drawn(loop, engine, seed=4))[0].png


def test_the_queue_is_bounded(loop, engine, monkeypatch):
    monkeypatch.setattr(engine, "limits", replace(engine.limits, queue_length=2))

    async def too_many():
        async with aclosing(engine.draw(request(**LONG))) as drawing:
            await first(drawing, Step)
            tasks = [asyncio.create_task(events_of(engine.draw(request(seed=seed)))) for seed in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(QueueFull, match="2 wait") as raised:
                await first(engine.draw(request()), Picture)
        await asyncio.gather(*tasks)
        return raised.value.retry_after

    assert 1 <= loop.run(too_many()) <= 120


def test_a_request_has_a_time_limit(loop, engine, monkeypatch):
    monkeypatch.setattr(engine, "limits", replace(engine.limits, seconds=0.3))
    with pytest.raises(RequestTimedOut, match=r"0\.3 s"):
        drawn(loop, engine, **{**LONG, "steps": 100}, count=5)
    assert engine.unfinished == engine.waiting == 0
    monkeypatch.undo()
    assert pictures(drawn(loop, engine))


# Workers


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_requests_are_drawn(loop, engine):
    deaths = engine.metrics.registry.get_sample_value("ernie_image_worker_deaths_total")
    expected = [pictures(drawn(loop, engine, seed=seed, **LONG))[0].png for seed in (1, 2)]
    waiting = [loop.start(events_of(engine.draw(request(seed=seed, **LONG)))) for seed in (1, 2)]
    kill_while_drawing(engine)
    assert [pictures(each.result(60))[0].png for each in waiting] == expected
    assert engine.metrics.registry.get_sample_value("ernie_image_worker_deaths_total") == deaths + 1


@pytest.mark.slow
def test_a_request_over_which_two_workers_die_is_told_to_come_again(loop, engine):
    deadly = loop.start(events_of(engine.draw(request(**LONG, count=1))))
    kill_while_drawing(engine)
    kill_while_drawing(engine)
    with pytest.raises(WorkerLost, match="try again") as raised:
        deadly.result(60)
    assert raised.value.retry_after > 0
    assert pictures(drawn(loop, engine))


def kill_while_drawing(engine: Engine) -> None:
    until(lambda: engine.workers and engine.workers[0].batch)
    worker = engine.workers[0]
    worker.kill()
    until(lambda: worker not in engine.workers)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs a signal that stops a process")
@pytest.mark.slow
def test_a_worker_that_is_stuck_is_replaced(loop, engine, monkeypatch):
    monkeypatch.setattr("ernie_image_nf4.serving.engine.STALLED_SECONDS", 0.1)
    monkeypatch.setattr(engine, "limits", replace(engine.limits, seconds=0.3))
    stuck = engine.workers[0]
    os.kill(stuck.process.pid, signal.SIGSTOP)
    with pytest.raises(RequestTimedOut):
        drawn(loop, engine)
    monkeypatch.undo()
    assert pictures(drawn(loop, engine))
    assert engine.workers[0] is not stuck


def test_a_model_that_cant_be_loaded_says_why(loop, copy):
    (copy / "transformer" / "config.json").write_text("{}")
    engine = Engine(str(copy), devices=("cpu",))
    with pytest.raises(ErnieImageNF4Error, match="transformer"):
        loop.run(engine.start())


def test_what_has_begun_is_finished_and_the_rest_refused(loop, engine, monkeypatch):
    monkeypatch.setattr(engine, "_draining", False)  # as it shall be again afterwards

    async def drain():
        begun = engine.draw(request(**LONG))
        await first(begun, Step)
        waiting = asyncio.create_task(events_of(engine.draw(request(seed=9))))
        await asyncio.sleep(0)
        engine.drain()
        with pytest.raises(ShuttingDown):
            await waiting
        with pytest.raises(ShuttingDown):
            await first(engine.draw(request()), Picture)
        assert not engine.healthy
        return await events_of(begun)

    assert pictures(loop.run(drain()))


@pytest.mark.gpu
def test_on_a_gpu_waiting_requests_share_a_batch_and_are_each_what_they_are_alone(
    loop, repository, tmp_path, pytestconfig
):
    options = {"height": 64, "width": 64, "steps": 20, "guidance": 3.0}
    loading = {"memory": "resident", "dtype": pytestconfig.getoption("--dtype")}  # workers don't hear of it
    paths = [tmp_path / f"{seed}.png" for seed in range(9)]
    list(draw_and_save(load(repository, **loading), paths, "a cat", seed=0, **options))
    with running_engine(loop, repository, devices=("cuda:0",), **loading) as engine:
        sent = [request("a cat", seed=seed, width=64, height=64, steps=20) for seed in range(9)]
        answers = [loop.start(events_of(engine.draw(each))) for each in sent]
        found = [pictures(answer.result(120))[0].png for answer in answers]
        batches = engine.metrics.registry.get_sample_value("ernie_image_batch_size_count")
    assert batches < 9
    apart = [np.abs(pixels(png) - pixels(path.read_bytes())).max() for png, path in zip(found, paths, strict=True)]
    assert max(apart) <= 2  # of 255: larger batches may round otherwise


@pytest.mark.gpu
def test_every_gpu_has_a_worker(loop, repository):
    with running_engine(loop, repository, devices=()) as engine:
        until(lambda: sum(worker.ready for worker in engine.workers) == torch.cuda.device_count())
        assert pictures(drawn(loop, engine))


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image).astype(int)


def test_limits_are_those_that_were_given(repository):
    assert Engine(str(repository), limits=Limits(max_steps=3)).limits.max_steps == 3


def test_a_script_that_ends_without_closing_its_engine_ends(repository, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import asyncio, sys\n"
        "from ernie_image_nf4.serving.engine import Engine\n"
        "async def main():\n"
        "    await Engine(sys.argv[1], devices=['cpu']).start()\n"
        "    raise ValueError('a fault of the script')\n"
        "if __name__ == '__main__':\n"
        "    asyncio.run(main())\n"
    )
    ended = subprocess.run([sys.executable, script, repository], capture_output=True, text=True, timeout=90)
    assert ended.returncode == 1
    assert ended.stderr.rstrip().endswith("ValueError: a fault of the script")


def test_the_documentations_script_draws(repository, tmp_path):
    page = (CHECKOUT / "docs" / "serving.md").read_text(encoding="utf-8")
    (code,) = (each for each in re.findall(r"```py\n(.*?)```", page, re.DOTALL) if "Engine" in each)
    code = code.replace("user/ERNIE-Image-NF4", str(repository)).replace("=1024", "=32").replace("=50", "=1")
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, check=True, timeout=90)
    with Image.open(tmp_path / "cat.png") as image:
        assert image.size == (32, 32)
