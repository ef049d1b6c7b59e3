"""The workers of an engine: one for each device, and a new one for each that dies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..errors import ErnieImageNF4Error
from .messages import Ready, Unable, WorkerOptions
from .worker import Worker

logger = logging.getLogger(__name__)

FAILED_STARTS = 3  # of a worker in a row, after which nobody is to wait for it
LONGEST_PAUSE = 60.0  # seconds between two starts


class WorkerPool:
    """Worker processes that are kept going. Belongs to the event loop in which it is started.

    Attributes:
        workers: Those that are there, loading or drawing.
        deaths: How many died so far.
    """

    def __init__(
        self,
        options: WorkerOptions,
        devices: Sequence[str],
        *,
        hear: Callable[[Worker, Any], None],
        lost: Callable[[Worker], None],
    ) -> None:
        """Nothing is started before `start`.

        Args:
            options: What each worker loads.
            devices: One worker for each. Empty for all GPUs, or else the best device there is.
            hear: Called with all that a worker says once it is ready.
            lost: Called when a worker has died.
        """
        self.workers: list[Worker] = []
        self.deaths = 0
        self._options = options
        self._devices = tuple(devices)
        self._hear = hear
        self._lost = lost
        self._keepers: list[asyncio.Task[None]] = []
        self._failed_starts: dict[int, int] = {}
        self._first_ready: asyncio.Future[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether there is a worker with its model loaded."""
        return any(worker.ready for worker in self.workers)

    @property
    def hopeful(self) -> bool:
        """Whether there is a ready worker, or one that can be expected to become so."""
        return self.ready or any(failed < FAILED_STARTS for failed in self._failed_starts.values())

    async def start(self) -> None:
        """Start the workers. Returns when the first one is ready.

        Raises:
            ErnieImageNF4Error: The model can't be loaded; the text says why.
        """
        if self._keepers:
            return
        self._first_ready = asyncio.get_running_loop().create_future()
        self._keep(self._devices or (None,))
        try:
            await self._first_ready
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End all workers."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in self.workers))
        self.workers, self._keepers, self._failed_starts = [], [], {}

    def _keep(self, devices: Sequence[str | None]) -> None:
        for device in devices:
            number = len(self._keepers)
            self._failed_starts[number] = 0
            self._keepers.append(asyncio.create_task(self._keep_going(number, device)))

    async def _keep_going(self, number: int, device: str | None) -> None:
        """Start a worker, listen to it, and when it dies start another."""
        reason = "The worker ended while it loaded the model: is there enough memory?"
        while True:
            worker = Worker(replace(self._options, device=device))
            self.workers.append(worker)
            async for message in worker.messages():
                if isinstance(message, Unable):
                    reason = message.text
                elif isinstance(message, Ready):
                    self._welcome(worker, number, message)
                else:
                    self._hear(worker, message)
            self.workers.remove(worker)
            self.deaths += 1
            if not worker.ready:
                self._failed_starts[number] += 1
                logger.error("A worker can't start. %s", reason)
                if self._first_ready is not None and not self._first_ready.done():
                    self._first_ready.set_exception(ErnieImageNF4Error(reason))
                    return
            self._lost(worker)
            await asyncio.to_thread(worker.process.join)
            logger.warning("A worker ended with exit code %s: another is started.", worker.process.exitcode)
            if self._failed_starts[number]:
                await asyncio.sleep(min(LONGEST_PAUSE, 2.0 ** self._failed_starts[number]))

    def _welcome(self, worker: Worker, number: int, message: Ready) -> None:
        """A worker is ready. The very first one tells how many devices there are."""
        worker.ready = True
        self._failed_starts[number] = 0
        if self._first_ready is not None and not self._first_ready.done():
            if not self._devices:
                self._keep([device for device in message.devices if device != message.device])
            self._first_ready.set_result(None)
