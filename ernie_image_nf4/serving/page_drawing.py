"""A draw as the page shows it: progress while the engine's events come in, then pictures, or what went wrong."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from ..errors import ErnieImageNF4Error, InvalidRequest, QueueFull, RequestTimedOut, WorkerLost
from .events import Event, Picture, Queued, Revised, Started, Step
from .page_texts import Refusal, texts
from .requests import DrawRequest

if TYPE_CHECKING:
    from .engine import Engine

logger = logging.getLogger(__name__)

Running = dict[str, "asyncio.Task[None]"]  # what is being drawn for each browser tab


@dataclass
class Progress:
    """How far a draw has come.

    Attributes:
        request: What is drawn.
        started: When it was asked for, by `time.perf_counter`.
        drawing_since: When its first step was done.
        done: Steps done of each picture.
        drawn: Pictures that are finished.
        revised: Its prompt as the enhancer rewrote it.
    """

    request: DrawRequest
    started: float = field(default_factory=time.perf_counter)
    drawing_since: float | None = None
    done: dict[int, int] = field(default_factory=dict)
    drawn: int = 0
    revised: str | None = None


async def follow(
    engine: Engine, request: DrawRequest, language: str, running: Running, session: str
) -> AsyncGenerator[tuple[str, Picture | None], None]:
    """Draw a request. Closing the iterator, or cancelling the session's task, drops it.

    Args:
        engine: Draws.
        request: What to draw.
        language: To tell of it in.
        running: Gets the session's task while it runs.
        session: The browser tab that asks.

    Yields:
        The line of status as HTML, and the picture that has just been finished.
    """
    progress = Progress(request)
    events: asyncio.Queue[Event | None] = asyncio.Queue()
    task = asyncio.create_task(_collect(engine, request, events))
    task.add_done_callback(lambda _: events.put_nowait(None))
    running[session] = task
    try:
        yield status(texts(language)["sending"]), None
        while (event := await events.get()) is not None:
            note(progress, event)
            yield progress_line(progress, event, language), event if isinstance(event, Picture) else None
        yield last_line(progress, task, language), None
    finally:
        task.cancel()
        running.pop(session, None)


async def _collect(engine: Engine, request: DrawRequest, events: asyncio.Queue[Event | None]) -> None:
    async with aclosing(engine.draw(request)) as coming:
        async for event in coming:
            events.put_nowait(event)


def last_line(progress: Progress, task: asyncio.Task[None], language: str) -> str:
    """What is said at the end of a draw, as HTML."""
    if task.cancelled():
        return status(texts(language)["stopped"])
    error = task.exception()
    if error is None:
        count, seconds = progress.request.count, time.perf_counter() - progress.started
        line = texts(language)["done" if count == 1 else "done_many"]
        return status(line.format(seconds=f"{seconds:.1f}", count=count))
    if isinstance(error, ErnieImageNF4Error):
        return problem(message(error, language))
    logger.error("A draw that the page asked for failed", exc_info=error)
    return problem(texts(language)["broken"])


def note(progress: Progress, event: Event) -> None:
    """Bring a draw's progress up to date."""
    if isinstance(event, Step):
        progress.done[event.picture] = event.step
        if progress.drawing_since is None:
            progress.drawing_since = time.perf_counter()
    elif isinstance(event, Revised):
        progress.revised = event.prompt
    elif isinstance(event, Picture):
        progress.done[event.index] = progress.request.steps
        progress.drawn += 1


def seconds_left(progress: Progress, now: float) -> float | None:
    """How long the remaining steps take at the pace of those since the first, None before the third."""
    done, in_all = sum(progress.done.values()), progress.request.steps * progress.request.count
    if progress.drawing_since is None or done < 3:
        return None
    return (now - progress.drawing_since) / (done - 1) * (in_all - done)


def progress_line(progress: Progress, event: Event, language: str) -> str:
    """The bar and what is going on, as HTML."""
    words, request = texts(language), progress.request
    done, in_all = sum(progress.done.values()), request.steps * request.count
    if isinstance(event, Queued):
        line = words["queued"].format(position=event.position)
    elif isinstance(event, Started) or not done:
        line = words["started"]
    else:
        key = "step" if request.count == 1 else "step_of"
        line = words[key].format(step=done, steps=in_all, drawn=progress.drawn, count=request.count)
        left = seconds_left(progress, time.perf_counter())
        if left is not None and left >= 1:
            line += f" · {words['left'].format(seconds=round(left))}"
    values = f'aria-label="{words["progress"]}" aria-valuemin="0" aria-valuemax="{in_all}" aria-valuenow="{done}"'
    bar = f'<div class="bar" role="progressbar" {values}><span style="width: {100 * done / in_all:.1f}%"></span></div>'
    revised = f'<p class="aside">{escape(words["enhanced"].format(prompt=progress.revised))}</p>'
    return f'<div class="status">{bar}<p role="status">{line}</p>{revised if progress.revised else ""}</div>'


def status(line: str) -> str:
    """A line that a screen reader reads out when it is free, as HTML."""
    return f'<div class="status"><p role="status">{escape(line)}</p></div>'


def problem(line: str) -> str:
    """A line about what went wrong, which a screen reader reads out at once, as HTML."""
    return f'<div class="status problem"><p role="alert">{escape(line)}</p></div>'


def message(error: ErnieImageNF4Error, language: str) -> str:
    """What the page says about an error."""
    words = texts(language)
    if isinstance(error, Refusal):
        return error.said(language)
    if isinstance(error, QueueFull):
        return words["full"].format(seconds=error.retry_after)
    if isinstance(error, InvalidRequest):
        return words["invalid"].format(reason=error)
    for kind, key in ((RequestTimedOut, "late"), (WorkerLost, "lost")):
        if isinstance(error, kind):
            return words[key]
    return words["failed"].format(reason=error)
