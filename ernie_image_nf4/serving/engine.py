"""The engine: takes requests, hands their pictures to workers batch by batch, and tells what happens as events."""

from __future__ import annotations

import asyncio
import io
import itertools
import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
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
from .lora import find_loras
from .messages import Drawn, Failed, Idle, StepDone, TextRevised, WorkerOptions
from .metrics import Metrics
from .pool import WorkerPool
from .queue import PictureQueue, pictures_of
from .requests import DrawRequest, Limits, check_request, recommended_within
from .worker import Worker

__all__ = ["Engine", "Event", "Picture", "Queued", "Revised", "Started", "Step"]

logger = logging.getLogger(__name__)

NO_WORKER = "No worker can be started, see the server's log: send the request again later."
STALLED_SECONDS = 120.0  # of silence, after which a worker is taken for stuck
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
        recommended: Size, steps and guidance scale that suit the model, within the limits.
        limits: What a request may ask for.
        loras: The LoRAs that a request may name, at strength 1.
        prompt_enhancer: Whether a request can have its prompt rewritten.
        log_prompts: Whether prompts are logged.
        created: When, in seconds since 1970.
        metrics: Figures of its work.
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
            InvalidLora: A LoRA isn't there.
            InvalidSettings: Two names stand for one LoRA.
        """
        folder = find_repository(
            model, prompt_enhancer=prompt_enhancer, revision=revision, local_files_only=local_files_only
        )
        metadata = read_metadata_if_ours(folder)
        self.model = model
        self.name = metadata.name if metadata is not None else model or folder.resolve().name
        self.limits = limits or Limits()
        self.recommended = recommended_within(
            self.limits, metadata.recommended if metadata is not None else Recommended()
        )
        self.loras, lora_paths = find_loras(loras or {}, local_files_only=local_files_only)
        self.prompt_enhancer = prompt_enhancer
        self.log_prompts = log_prompts
        self.created = int(time.time())
        self.metrics = Metrics()
        loading["prompt_enhancer"] = prompt_enhancer
        options = WorkerOptions(model, str(folder), None, loading, lora_paths)
        self._pool = WorkerPool(options, devices, hear=self._hear, lost=self._lost)
        self._queue = PictureQueue()
        self._jobs: dict[int, _Job] = {}
        self._numbers = itertools.count(1)
        self._seconds_a_picture = 5.0  # until it is known
        self._draining = False

    # For whoever asks

    async def draw(self, request: DrawRequest) -> AsyncGenerator[Event, None]:
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
        check_request(request, self.limits, lora_names=self.loras)
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
        return not self._draining and self._pool.ready

    @property
    def workers(self) -> list[Worker]:
        """The worker processes that are there, loading or drawing."""
        return self._pool.workers

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
        await self._pool.start()

    def drain(self) -> None:
        """Refuse what hasn't begun, from now on. What has begun is finished."""
        self._draining = True
        for job in list(self._jobs.values()):
            if not job.started:
                self._fail(job, ShuttingDown("The server is being stopped: send the request again.", 10))

    async def drained(self) -> None:
        """Wait until nothing is being drawn any more, whether or not all of it has been fetched."""
        while any(job.left for job in self._jobs.values()):
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Drop everything and end the workers."""
        self.drain()
        for job in list(self._jobs.values()):
            self._fail(job, ShuttingDown("The server was stopped: send the request again.", 10))
        await self._pool.close()

    # Requests

    def _check_open(self) -> None:
        """Refuse a request that would wait in vain."""
        if self._draining:
            raise ShuttingDown("The server is being stopped: send the request again.", 10)
        if not self._pool.hopeful:
            raise WorkerLost(NO_WORKER, 60)
        if len(self._queue) >= self.limits.queue_length:
            self.metrics.finished(QueueFull.__name__)
            raise QueueFull(
                f"{len(self._queue)} pictures are waiting, and the server lets {self.limits.queue_length} wait: "
                "send the request again later.",
                self._retry_after(),
            )

    def _retry_after(self) -> int:
        """Seconds after which there is room again, by the time that pictures took so far."""
        seconds = self._seconds_a_picture * len(self._queue) / max(1, len(self.workers))
        return min(LONGEST_RETRY_AFTER, max(1, math.ceil(seconds)))

    def _accept(self, request: DrawRequest) -> _Job:
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        job = _Job(next(self._numbers), request, seed, asyncio.get_running_loop().time(), request.count)
        self._jobs[job.number] = job
        self._queue.add(pictures_of(request, job.number, seed, self.loras))
        about = f": {request.prompt!r}" if self.log_prompts else ""
        logger.info(
            "Request %d: %d of %dx%d, %d steps%s", job.number, request.count, request.width, request.height,
            request.steps, about,
        )  # fmt: skip
        return job

    def _forget(self, job: _Job) -> None:
        """Take a request out everywhere: finished, failed or dropped."""
        self._queue.remove(job.number)
        for worker in self.workers:
            worker.drop(job.number)
        if self._jobs.pop(job.number, None) is not None:
            self.metrics.finished("drawn" if not job.left else "dropped")

    def _fail(self, job: _Job, error: ErnieImageNF4Error) -> None:
        """End a request with an error, unless all of it is there."""
        if not job.left or self._jobs.pop(job.number, None) is None:
            return
        self.metrics.finished(type(error).__name__)
        self._queue.remove(job.number)
        for worker in self.workers:
            worker.drop(job.number)
        job.events.put_nowait(error)

    def _expire(self, job: _Job) -> None:
        """A request's time is over. A worker that has said nothing for long is stuck, and would hold up the next."""
        now = asyncio.get_running_loop().time()
        for worker in self.workers:
            busy = worker.ready and not worker.idle
            if busy and now - max(worker.heard, worker.began) > STALLED_SECONDS:
                logger.warning("Worker %s doesn't answer: it is ended and started anew.", worker.process.pid)
                worker.kill()
        self._fail(job, RequestTimedOut(f"The request took longer than {self.limits.seconds:g} s: ask for less."))

    def _dispatch(self) -> None:
        """Give idle workers what waits, the oldest first, and tell those who wait their place."""
        idle = [worker for worker in self.workers if worker.idle]
        while idle and len(self._queue):
            worker = idle.pop()
            share = math.ceil(len(self._queue) / (len(idle) + 1))  # leaves something for the other idle ones
            batch = self._queue.take(worker.batch_size, share)
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

    def _lost(self, worker: Worker) -> None:
        """Put back what a dead worker was drawing, once, and then each picture alone: one may be to blame."""
        self.metrics.restarts.inc()
        again = []
        for each in worker.batch.values():
            if not each.alone:
                again.append(replace(each, alone=True))
            elif job := self._jobs.get(each.owner):
                self._fail(
                    job, WorkerLost("Two workers died over this request: try again, or ask for a smaller size.", 5)
                )
        self._queue.put_back([each for each in again if each.owner in self._jobs])
        if not self._pool.hopeful:
            for job in list(self._jobs.values()):
                self._fail(job, WorkerLost(NO_WORKER, 60))
        self._dispatch()

    def _hear(self, worker: Worker, message: Any) -> None:
        """Act upon what a worker says."""
        if isinstance(message, Idle):
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
