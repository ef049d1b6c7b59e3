"""What the endpoint sends: pictures, events and errors in the forms of OpenAI's API."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from .. import errors
from ..errors import ComeAgain, ErnieImageNF4Error, InvalidRequest
from .events import Event, Picture, Queued, Revised, Started, Step

FIELDS = {"count": "n", "width": "size", "height": "size"}  # of `DrawRequest`, by their names in the API

# Class of an error -> status, type and code.
KINDS: dict[type[ErnieImageNF4Error], tuple[int, str, str | None]] = {
    errors.InvalidRequest: (400, "invalid_request_error", None),
    errors.NotAuthorized: (401, "invalid_request_error", "invalid_api_key"),
    errors.UnknownModel: (404, "invalid_request_error", "model_not_found"),
    errors.QueueFull: (429, "rate_limit_error", "queue_full"),
    errors.ShuttingDown: (503, "server_error", "shutting_down"),
    errors.WorkerLost: (503, "server_error", "worker_lost"),
    errors.RequestTimedOut: (504, "server_error", "timed_out"),
    errors.DrawingFailed: (500, "server_error", "drawing_failed"),
}


@dataclass(frozen=True)
class ErrorAnswer:
    """An error as it is answered.

    Attributes:
        status: Of HTTP.
        body: In OpenAI's form.
        headers: Beside the usual ones.
    """

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


def error_answer(error: ErnieImageNF4Error) -> ErrorAnswer:
    """What an error of ours is answered with."""
    status, kind, code = KINDS.get(type(error), (500, "server_error", None))
    headers = {}
    if isinstance(error, ComeAgain):
        headers["Retry-After"] = str(error.retry_after)
    elif status >= 500:
        headers["x-should-retry"] = "false"  # OpenAI's client would try twice more what comes to the same
    elif status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    param = FIELDS.get(error.field, error.field) if isinstance(error, InvalidRequest) else None
    return ErrorAnswer(status, openai_error(str(error), kind, param=param, code=code), headers)


def invalid_fields(problems: Sequence[Any]) -> ErrorAnswer:
    """What is answered to a body that isn't as it should be.

    Args:
        problems: As pydantic lists them. The first is told.
    """
    problem = problems[0]
    kind, where = problem["type"], [str(part) for part in problem["loc"][1:]]
    name = ".".join(where) or None
    text = f"{name}: {problem['msg']}." if name else "The body is no JSON object: send one, as application/json."
    if kind == "json_invalid":
        name, text = None, "The body is no valid JSON."
    elif kind == "extra_forbidden":
        text = f"There is no field {name!r}."
    elif kind == "missing" and name:
        text = f"The field {name!r} is missing."
    return ErrorAnswer(400, openai_error(text, "invalid_request_error", param=name))


def openai_error(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's API has it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer(pictures: list[Picture]) -> dict[str, Any]:
    """The answer to a request that isn't streamed."""
    width, height = pictures[0].image.size
    return {
        "created": int(time.time()),
        "data": [
            {"b64_json": encoded(each), "revised_prompt": each.revised_prompt, "seed": each.seed} for each in pictures
        ],
        "size": f"{width}x{height}",
        "output_format": "png",
        "background": "opaque",
    }


def encoded(picture: Picture) -> str:
    return base64.b64encode(picture.png).decode()


async def server_sent(events: AsyncGenerator[Event, None], first: Event) -> AsyncIterator[str]:
    """What happens, as server-sent events."""
    async with aclosing(events):
        try:
            yield as_server_sent(first)
            async for event in events:
                yield as_server_sent(event)
        except ErnieImageNF4Error as error:
            yield sent("error", error_answer(error).body)
    yield "data: [DONE]\n\n"


def as_server_sent(event: Event) -> str:
    """An event as it is sent. The finished picture has OpenAI's form."""
    if isinstance(event, Queued):
        return sent("image_generation.queued", {"position": event.position})
    if isinstance(event, Started):
        return sent("image_generation.started", {})
    if isinstance(event, Revised):
        return sent("image_generation.revised_prompt", {"revised_prompt": event.prompt})
    if isinstance(event, Step):
        return sent("image_generation.step", {"step": event.step, "steps": event.steps, "index": event.picture})
    width, height = event.image.size
    described = {"created_at": int(time.time()), "size": f"{width}x{height}", "quality": "auto"}
    described |= {"background": "opaque", "output_format": "png", "index": event.index, "seed": event.seed}
    text = {"revised_prompt": event.revised_prompt, "b64_json": encoded(event)}
    return sent("image_generation.completed", {**described, **text})


def sent(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"
