"""A server over a tiny random model, in its own process's event loop or as a command, and clients of it."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from conftest import CHECKOUT
from openai import OpenAI

from ernie_image_nf4.serving.application import make_app
from ernie_image_nf4.serving.engine import Engine
from ernie_image_nf4.serving.requests import DrawRequest
from ernie_image_nf4.serving.server import bind, url_of

# A worker computes in as many threads as the tests do: how many there are changes how sums are rounded.
os.environ["OMP_NUM_THREADS"] = "1"


class Loop:
    """An event loop in a thread, for tests that call the engine from outside."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def start(self, coroutine: Any) -> Any:
        """A future of what a coroutine returns."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Any, timeout: float = 60) -> Any:
        return self.start(coroutine).result(timeout)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@contextmanager
def running_loop() -> Iterator[Loop]:
    loop = Loop()
    try:
        yield loop
    finally:
        loop.close()


@contextmanager
def running_engine(loop: Loop, repository: Path, **options: Any) -> Iterator[Engine]:
    """An engine with one worker on the CPU."""
    engine = Engine(str(repository), **{"devices": ("cpu",), **options})
    loop.run(engine.start())
    try:
        yield engine
    finally:
        loop.run(engine.close())


@contextmanager
def serving(loop: Loop, engine: Engine, **options: Any) -> Iterator[str]:
    """The engine's application at a free port of this machine: its address. Without a page unless it is asked for."""
    bound = bind("127.0.0.1", 0)
    app = make_app(engine, **{"page": False, **options})
    # A page has a queue of its own to start. With it, the engine ends with the server.
    lifespan: Any = "on" if options.get("page") else "off"
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan=lifespan))
    running = loop.start(server.serve([bound]))
    while not server.started:
        time.sleep(0.01)
    try:
        yield url_of(bound)
    finally:
        server.should_exit = True
        running.result(30)


def client_of(url: str, api_key: str = "none", **options: Any) -> OpenAI:
    """OpenAI's client, which tells errors at once."""
    return OpenAI(base_url=f"{url}/v1", api_key=api_key, timeout=60, **{"max_retries": 0, **options})


def request(prompt: str = "a cat on a wooden desk", **fields: Any) -> DrawRequest:
    """A request that takes a fraction of a second."""
    defaults = {"width": 32, "height": 32, "steps": 2, "guidance_scale": 3.0, "seed": 0}
    return DrawRequest(prompt=prompt, **{**defaults, **fields})


async def events_of(events: AsyncGenerator[Any, None]) -> list[Any]:
    return [event async for event in events]


def until(true: Callable[[], Any], seconds: float = 60) -> None:
    """Wait for something to become true."""
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "it never came"
        time.sleep(0.01)


@contextmanager
def serve_command(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``ernie-image-nf4 serve`` without a page at a free port: the process and its address."""
    command = [sys.executable, "-m", "ernie_image_nf4", "serve", *arguments, "--no-page", "--port", "0"]
    variables = {**os.environ, "PYTHONPATH": str(CHECKOUT), **environment}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables)
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"is ready at (\S+) after", line):
                break
        else:
            pytest.fail("".join(lines))
        yield process, found.group(1)
    finally:
        process.kill()
        process.communicate()
