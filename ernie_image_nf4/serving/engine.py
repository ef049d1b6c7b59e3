"""The engine: takes requests, hands their pictures to workers batch by batch, and tells what happens as events."""

from __future__ import annotations

import asyncio
import io
import itertools
import logging
import math
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from ..errors import (
    DrawingFailed,
    ErnieImageNF4Error,
    QueueFull,
    RequestTimedOut,
    ShuttingDown,
    WorkerLost,
)
from ..repository.metadata import Recommended, read_metadata_if_ours
from ..repository.resolve import find_repository
from .events import Event, Picture, Queued, Revised, Started, Step
from .messages import Drawn, Failed, Idle, Ready, StepDone, TextRevised, Unable, WorkerOptions
from .metrics import Metrics
from .queue import PictureQueue, pictures_of
from .requests import DrawRequest, Limits, check_request
from .worker import Worker

__all__ = ["Engine", "Event", "Picture", "Queued", "Revised", "Started", "Step"]

logger = logging.getLogger(__name__)

FAILED_STARTS = 3  # of a worker in a row, after which requests no longer wait for it
LONGEST_PAUSE = 60.0  # seconds between two starts
LONGEST_RETRY_AFTER = 120  # seconds that a client is told to wait at most


@dataclass(eq=False)
class _Job:
    """A request that isn't finished."""

    number: int
    request: DrawRequest
    seed: int
    arrived: float
    left: int
    events: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)
    position: int | None = None
    started: bool = False
    revised: bool = False


class Engine:
    """Draws requests, with one worker process for each GPU. One engine serves one process and its event loop.

    Attributes:
        name: The model's name.
        model: Folder or Hub id as it was asked for, None for the repository of this package.
        recommended: Size, steps and guidance scale that suit the model.
        limits: What a request may ask for.
        lora_names: The adapters that a request may name.
        log_prompts: Whether prompts are logged.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        devices: Sequence[str] = (),
        loras: Mapping[str, str] | None = None,
        limits: Limits | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        prompt_enhancer: bool = True,
        log_prompts: bool = False,
        **loading: Any,
    ) -> None:
        """Find the repository, downloading it if need be. Nothing is loaded before `start`.

        Args:
            model: Folder or Hub id; None for the repository of this package.
            devices: One worker for each, ``("cuda:1",)``. Empty for all GPUs, or else the best device there is.
            loras: Name to offer -> file or Hub id.
            limits: What a request may ask for.
            revision: Branch, tag or commit of a Hub repository.
            local_files_only: Take what the Hub cache holds, without any network call.
            prompt_enhancer: Whether it is loaded.
            log_prompts: Whether prompts are logged.
            loading: Further arguments of `load`: ``memory``, ``dtype``, ``products``, ``fast``.

        Raises:
            RepositoryNotFound: No such folder or Hub repository, or it can't be reached.
            InvalidRepository: Its metadata can't be read.
        """
        folder = find_repository(
            model, prompt_enhancer=prompt_enhancer, revision=revision, local_files_only=local_files_only
        )
        metadata = read_metadata_if_ours(folder)
        self.model = model
        self.name = metadata.name if metadata is not None else model or folder.resolve().name
        self.recommended = metadata.recommended if metadata is not None else Recommended()
        self.limits = limits or Limits()
        self.lora_names = tuple(loras or ())
        self.log_prompts = log_prompts
        self.metrics = Metrics()
        loading["prompt_enhancer"] = prompt_enhancer
        self._options = WorkerOptions(model, str(folder), None, loading, dict(loras or {}))
        self._devices: tuple[str | None, ...] = tuple(devices) or (None,)
        self._queue = PictureQueue()
        self._jobs: dict[int, _Job] = {}
        self._workers: list[Worker] = []
        self._keepers: list[asyncio.Task[None]] = []
        self._failed_starts: dict[int, int] = {}
        self._numbers = itertools.count(1)
        self._seconds_a_picture = 5.0  # until it is known
        self._draining = False
        self._first_ready: asyncio.Future[None] | None = None

    # For whoever asks

    async def draw(self, request: DrawRequest) -> AsyncIterator[Event]:
        """Draw a request. Closing the iterator, or cancelling the task that runs it, drops the request.

        Args:
            request: What to draw.

        Yields:
            Queued and Started, Revised, Step and Picture.

        Raises:
            InvalidRequest: It can't be drawn, or the limits don't allow it.
            QueueFull: Too many pictures wait.
            ShuttingDown: The server is being stopped.
            WorkerLost: Workers died over it, or none can be started.
            RequestTimedOut: It took too long.
            DrawingFailed: A picture came to an error.
        """
        check_request(request, self.limits, lora_names=self.lora_names)
        self._check_open()
        job = self._accept(request)
        expiry = asyncio.get_running_loop().call_later(self.limits.seconds, self._expire, job)
        try:
            self._dispatch()
            while job.left or not job.events.empty():
                event = await job.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            expiry.cancel()
            self._forget(job)

    @property
    def healthy(self) -> bool:
        """Whether a worker is there and requests are taken."""
        return not self._draining and any(worker.ready for worker in self._workers)

    @property
    def waiting(self) -> int:
        """Pictures that wait."""
        return len(self._queue)

    @property
    def unfinished(self) -> int:
        """Requests that aren't answered yet."""
        return len(self._jobs)

    # Life

    async def start(self) -> None:
        """Start the workers. Returns when the first one can draw.

        Raises:
            ErnieImageNF4Error: The model can't be loaded; the text says why.
        """
        if self._keepers:
            return
        self._first_ready = asyncio.get_running_loop().create_future()
        self._keep_workers(self._devices)
        try:
            await self._first_ready
        except BaseException:
            await self.close()
            raise

    def drain(self) -> None:
        """Refuse what hasn't begun, from now on. What has begun is finished."""
        self._draining = True
        for job in list(self._jobs.values()):
            if not job.started:
                self._fail(job, ShuttingDown("The server is being stopped: send the request again.", 10))

    async def drained(self) -> None:
        """Wait until nothing is being drawn any more."""
        while self._jobs:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Drop everything and end the workers."""
        self.drain()
        for job in list(self._jobs.values()):
            self._fail(job, ShuttingDown("The server was stopped: send the request again.", 10))
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        self._keepers = []
        await asyncio.gather(*(worker.stop() for worker in self._workers))
        self._workers = []

    # Requests

    def _check_open(self) -> None:
        """Refuse a request that would wait in vain."""
        if self._draining:
            raise ShuttingDown("The server is being stopped: send the request again.", 10)
        if not self._can_draw():
            raise WorkerLost("No worker can be started, see the server's log: try again later.", 60)
        if len(self._queue) >= self.limits.queue_length:
            raise QueueFull(
                f"{len(self._queue)} pictures are waiting, and the server lets {self.limits.queue_length} wait: "
                "send the request again later.",
                self._retry_after(),
            )

    def _can_draw(self) -> bool:
        """Whether a worker is there or there is hope for one."""
        return any(worker.ready for worker in self._workers) or any(
            failed < FAILED_STARTS for failed in self._failed_starts.values()
        )

    def _retry_after(self) -> int:
        """Seconds after which there is room again, by the time that pictures took so far."""
        seconds = self._seconds_a_picture * len(self._queue) / max(1, len(self._workers))
        return min(LONGEST_RETRY_AFTER, max(1, math.ceil(seconds)))

    def _accept(self, request: DrawRequest) -> _Job:
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        job = _Job(next(self._numbers), request, seed, asyncio.get_running_loop().time(), request.count)
        self._jobs[job.number] = job
        self._queue.add(pictures_of(request, job.number, seed))
        about = f": {request.prompt!r}" if self.log_prompts else ""
        logger.info(
            "Request %d: %d of %dx%d, %d steps%s", job.number, request.count, request.width, request.height,
            request.steps, about,
        )  # fmt: skip
        return job

    def _forget(self, job: _Job) -> None:
        """Take a request out everywhere: finished, failed or dropped."""
        self._queue.remove(job.number)
        for worker in self._workers:
            worker.drop(job.number)
        if self._jobs.pop(job.number, None) is not None:
            self.metrics.finished("drawn" if not job.left else "dropped")

    def _fail(self, job: _Job, error: ErnieImageNF4Error) -> None:
        """End a request with an error."""
        if self._jobs.pop(job.number, None) is None:
            return
        self.metrics.finished(type(error).__name__)
        self._queue.remove(job.number)
        for worker in self._workers:
            worker.drop(job.number)
        job.events.put_nowait(error)

    def _expire(self, job: _Job) -> None:
        """A request's time is over. A worker that said nothing for long holds it up, and will hold up the next."""
        now = asyncio.get_running_loop().time()
        for worker in self._workers:
            busy_with_it = any(each.owner == job.number for each in worker.batch.values())
            if busy_with_it and now - max(worker.heard, worker.began) > self.limits.seconds / 2:
                logger.warning("Worker %s doesn't answer: it is ended and started anew.", worker.process.pid)
                worker.kill()
        self._fail(job, RequestTimedOut(f"The request took longer than {self.limits.seconds:g} s: ask for less."))

    def _dispatch(self) -> None:
        """Give idle workers what waits, the oldest first, and tell those who wait their place."""
        idle = [worker for worker in self._workers if worker.idle]
        while idle and len(self._queue):
            worker = idle.pop()
            share = math.ceil(len(self._queue) / (len(idle) + 1))  # leaves something for the other idle ones
            batch = self._queue.take(lambda each, worker=worker, share=share: min(share, worker.batch_size(each)))
            for each in batch:
                job = self._jobs[each.owner]
                if not job.started:
                    job.started = True
                    job.events.put_nowait(Started())
            worker.draw({next(self._numbers): each for each in batch})
            self.metrics.batch_sizes.observe(len(batch))
        for owner, position in self._queue.positions():
            job = self._jobs[owner]
            if not job.started and job.position != position:
                job.position = position
                job.events.put_nowait(Queued(position))
        self.metrics.waiting.set(len(self._queue))

    # Workers

    def _keep_workers(self, devices: Sequence[str | None]) -> None:
        for device in devices:
            number = len(self._keepers)
            self._failed_starts[number] = 0
            self._keepers.append(asyncio.create_task(self._keep_worker(number, device)))

    async def _keep_worker(self, number: int, device: str | None) -> None:
        """Start a worker, listen to it, and when it dies start it anew."""
        while True:
            worker = Worker(replace(self._options, device=device))
            self._workers.append(worker)
            async for message in worker.messages():
                self._hear(worker, number, message)
            self._workers.remove(worker)
            await asyncio.to_thread(worker.process.join)
            if not worker.ready:
                self._failed_starts[number] += 1
            logger.warning("A worker ended with exit code %s: it is started anew.", worker.process.exitcode)
            self.metrics.restarts.inc()
            self._draw_again(worker)
            if self._first_ready is not None and not self._first_ready.done():
                self._first_ready.set_exception(
                    WorkerLost("The worker ended while it loaded the model: is there enough memory?", 60)
                )
                return
            if not self._can_draw():
                for job in list(self._jobs.values()):
                    self._fail(job, WorkerLost("No worker can be started, see the server's log: try again later.", 60))
            if self._failed_starts[number]:
                await asyncio.sleep(min(LONGEST_PAUSE, 2.0 ** self._failed_starts[number]))

    def _draw_again(self, worker: Worker) -> None:
        """Put back what a dead worker was drawing, once, and then each picture alone: one may be to blame."""
        again = []
        for each in worker.batch.values():
            if each.alone:
                self._fail(
                    self._jobs[each.owner],
                    WorkerLost("The worker died twice over this request: try again, or ask for a smaller size.", 5),
                )
            else:
                again.append(replace(each, alone=True))
        self._queue.put_back([each for each in again if each.owner in self._jobs])
        self._dispatch()

    def _hear(self, worker: Worker, number: int, message: Any) -> None:
        """Act upon what a worker says."""
        if isinstance(message, Ready):
            worker.ready = True
            self._failed_starts[number] = 0
            if self._first_ready is not None and not self._first_ready.done():
                if self._devices == (None,):
                    self._keep_workers([device for device in message.devices if device != message.device])
                self._first_ready.set_result(None)
        elif isinstance(message, Unable):
            logger.error("A worker can't load the model: %s", message.text)
            if self._first_ready is not None and not self._first_ready.done():
                self._first_ready.set_exception(DrawingFailed(message.text))
        elif isinstance(message, Idle):
            self._dispatch()
        elif isinstance(message, StepDone):
            for each in filter(None, map(worker.batch.get, message.numbers)):
                steps = each.settings.num_inference_steps
                self._jobs[each.owner].events.put_nowait(Step(message.step, steps, each.index))
        elif message.number in worker.batch:
            self._hear_of_picture(worker, message)

    def _hear_of_picture(self, worker: Worker, message: TextRevised | Drawn | Failed) -> None:
        each = worker.batch[message.number]
        job = self._jobs[each.owner]
        if isinstance(message, Failed):
            self._fail(job, DrawingFailed(message.text))
        elif isinstance(message, TextRevised):
            if not job.revised:
                job.revised = True
                job.events.put_nowait(Revised(message.prompt))
        else:
            del worker.batch[message.number]
            job.left -= 1
            now = asyncio.get_running_loop().time()
            self._seconds_a_picture += 0.2 * ((now - worker.began) / message.batch_size - self._seconds_a_picture)
            self.metrics.pictures.inc()
            image = Image.open(io.BytesIO(message.png))
            job.events.put_nowait(Picture(each.index, image, message.png, each.settings.seed, message.revised_prompt))
            if not job.left:
                self.metrics.seconds.observe(now - job.arrived)
