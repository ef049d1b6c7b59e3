"""A worker as the server sees it: a process of its own with the model in it, and the pipe to it.

A process rather than a thread, because what kills one (the system's out-of-memory killer, a fault of the driver) must
leave the server and its queue alive.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from .messages import Draw, Drop, Idle, Task, WorkerOptions
from .queue import MAX_BATCH, Pending

STOPPING_SECONDS = 10.0  # that a worker has for leaving by itself


class Worker:
    """A worker process. Belongs to the event loop in which it is made.

    Attributes:
        options: What it loads.
        batch: Number of a task -> the picture, for those that it draws and somebody waits for.
        idle: Whether it waits for a batch.
        ready: Whether its model is loaded.
        began: When it got the batch, in seconds of the event loop's clock.
        heard: When it last said something, likewise.
    """

    def __init__(self, options: WorkerOptions) -> None:
        self.options = options
        self.batch: dict[int, Pending] = {}
        self.idle = self.ready = False
        self._room: Idle = Idle(None, {})
        self._loop = asyncio.get_running_loop()
        self.began = self.heard = self._loop.time()
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        context = get_context("spawn")  # A forked process can't use CUDA, and would hold the server's sockets
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=run_worker, args=(theirs, options), daemon=True)
        self.process.start()
        theirs.close()  # so that reading ends when the process does
        # A program that ends without `stop` would wait for it: multiprocessing sends a signal that it leaves to others.
        atexit.register(self.process.kill)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        """In a thread: hand on what the worker says, and None once it is gone."""
        message: Any = ...
        while message is not None:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                message = None
            with suppress(RuntimeError):  # the event loop is closed
                self._loop.call_soon_threadsafe(self._messages.put_nowait, message)

    async def messages(self) -> AsyncIterator[Any]:
        """What the worker says, until its process ends."""
        while (message := await self._messages.get()) is not None:
            self.heard = self._loop.time()
            if isinstance(message, Idle):
                self.idle, self._room = True, message
            yield message
        atexit.unregister(self.process.kill)

    def batch_size(self, picture: Pending) -> int:
        """Pictures like this one that it can draw together."""
        room = self._room
        if room.pixels_at_once is None:
            return 1
        return min(MAX_BATCH, max(1, room.pixels_at_once // picture.pixels), room.batch_sizes.get(picture.pixels, 8))

    def draw(self, tasks: dict[int, Pending]) -> None:
        """Give it a batch."""
        self.idle, self.batch, self.began = False, dict(tasks), self._loop.time()
        self._send(Draw(tuple(Task(number, each.settings) for number, each in tasks.items())))

    def drop(self, owner: int) -> None:
        """Tell it that nobody waits for the pictures of a request. It stops within a step if all of its batch go."""
        numbers = frozenset(number for number, each in self.batch.items() if each.owner == owner)
        if numbers:
            self.batch = {number: each for number, each in self.batch.items() if number not in numbers}
            self._send(Drop(numbers))

    def _send(self, message: object) -> None:
        with suppress(OSError):  # it is gone, which `messages` tells
            self._connection.send(message)

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()

    async def stop(self) -> None:
        """Let the process leave, and end it if it doesn't."""
        self._send(None)
        await asyncio.to_thread(self.process.join, STOPPING_SECONDS)
        if self.process.is_alive():
            logging.getLogger(__name__).warning("Worker %s doesn't stop: it is killed.", self.process.pid)
            self.kill()
            await asyncio.to_thread(self.process.join)
        atexit.unregister(self.process.kill)
        with suppress(OSError):
            self._connection.close()


def run_worker(connection: Connection, options: WorkerOptions) -> None:
    """The worker's process. The server ends it, so it leaves the signals to the server.

    Args:
        connection: The pipe to the server.
        options: What to load.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    from .drawing import load_and_draw  # torch is imported here, and not in the server

    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the server is gone
        load_and_draw(connection, options)
