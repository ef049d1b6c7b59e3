"""OpenAI's images API over the engine, and what a service is watched by: ``/healthz`` and ``/metrics``.

Beyond OpenAI's fields: ``negative_prompt``, ``seed``, ``steps``, ``guidance_scale``, ``guidance_until``, ``cache``,
``use_pe`` and ``lora``. With ``stream`` the answer is server-sent events, from ``image_generation.queued`` to
``image_generation.completed``.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field

from ..errors import InvalidRequest, NotAuthorized, UnknownModel
from ..fast.step_plan import ALL_STEPS, EVERY_STEP
from .answers import answer, server_sent
from .engine import Engine
from .events import Event, Picture
from .requests import DrawRequest
from .security import is_api_key

OWNER = "ernie-image-nf4"
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
CLIENT_IS_GONE = 499  # nginx's; nobody reads it


class LoraChoice(BaseModel):
    """A LoRA that the server offers."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    strength: float = 1.0


class ImageRequest(BaseModel):
    """The body of ``POST /v1/images/generations``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(description="What to draw.")]
    model: Annotated[str | None, Field(description="Name of the model, as /v1/models has it.")] = None
    n: Annotated[int | None, Field(description="Pictures, with seeds counting up.")] = None
    size: Annotated[str | None, Field(description="WIDTHxHEIGHT in pixels, multiples of 16, or auto.")] = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    background: Literal["auto", "opaque"] | None = None
    quality: Literal["auto", "standard"] | None = None
    moderation: Literal["auto", "low"] | None = None
    user: str | None = None
    stream: Annotated[bool | None, Field(description="Answer by server-sent events, with progress.")] = None
    partial_images: Literal[0] | None = None
    negative_prompt: Annotated[str | None, Field(description="What not to draw.")] = None
    seed: Annotated[int | None, Field(description="Makes the picture repeatable. Default: a random one.")] = None
    steps: Annotated[int | None, Field(description="Denoising steps.")] = None
    guidance_scale: Annotated[float | None, Field(description="1 for none.")] = None
    guidance_until: Annotated[float | None, Field(description="Share of the steps with guidance. Default: 1.")] = None
    cache: Annotated[int | None, Field(description="Compute about every n-th step only. Default: 1, all.")] = None
    use_pe: Annotated[bool | None, Field(description="Whether the prompt enhancer rewrites the prompt.")] = None
    lora: Annotated[list[LoraChoice] | None, Field(description="LoRAs that the server offers.")] = None


def make_router(engine: Engine, api_key: str | None) -> APIRouter:
    """The endpoint's routes.

    Args:
        engine: Draws.
        api_key: To be sent as ``Authorization: Bearer KEY`` for all but ``/healthz``; None for no key.
    """

    async def check_key(
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    ) -> None:
        if api_key is not None and not (credentials and is_api_key(credentials.credentials, api_key)):
            raise NotAuthorized("No valid API key was given: send it as `Authorization: Bearer KEY`.")

    open_routes, router = APIRouter(), APIRouter(dependencies=[Depends(check_key)])

    @router.post("/v1/images/generations", summary="Draw pictures")
    async def images(body: ImageRequest, http: Request) -> Response:
        check_model(engine, body.model)
        request = to_draw_request(body, engine)
        events = unless_gone(http, engine.draw(request))
        if body.stream:
            first = await anext(events, None)  # Errors up to here are answered with their status
            if first is None:
                return Response(status_code=CLIENT_IS_GONE)
            return StreamingResponse(server_sent(events, first), media_type="text/event-stream")
        pictures = await all_pictures(events)
        return (
            JSONResponse(answer(pictures)) if len(pictures) == request.count else Response(status_code=CLIENT_IS_GONE)
        )

    @router.get("/v1/models", summary="The model")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(engine)]}

    @router.get("/v1/models/{name:path}", summary="The model by its name")
    async def model(name: str) -> dict[str, Any]:
        check_model(engine, name)
        return described(engine)

    # Here, as the page answers all other paths, and in a form of its own.
    @router.api_route("/v1/{path:path}", methods=METHODS, include_in_schema=False)
    async def unknown(path: str) -> None:
        raise HTTPException(404, "There is none here but POST /v1/images/generations and GET /v1/models")

    @router.get("/metrics", summary="Figures for Prometheus")
    async def metrics() -> Response:
        return Response(generate_latest(engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @open_routes.get("/healthz", summary="Whether requests are taken")
    async def health() -> JSONResponse:
        state = {"status": "ok" if engine.healthy else "unavailable", "waiting": engine.waiting}
        return JSONResponse(state, status_code=200 if engine.healthy else 503)

    open_routes.include_router(router)
    return open_routes


def check_model(engine: Engine, name: str | None) -> None:
    """Refuse a request for another model.

    Raises:
        UnknownModel: It is none of the names that this one has.
    """
    if name not in (None, engine.name, engine.model):
        raise UnknownModel(f"There is no model {name!r} here: this server has {engine.name!r}.")


def described(engine: Engine) -> dict[str, Any]:
    """The model as OpenAI's API describes one."""
    return {"id": engine.name, "object": "model", "created": engine.created, "owned_by": OWNER}


def to_draw_request(body: ImageRequest, engine: Engine) -> DrawRequest:
    """The request with what the model recommends for what it leaves open.

    Raises:
        InvalidRequest: The size can't be read.
    """
    recommended = engine.recommended
    width, height = recommended.width, recommended.height
    if body.size not in (None, "auto"):
        match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", str(body.size), re.ASCII)
        if match is None:
            raise InvalidRequest("size", f"Size {body.size!r} is no size: write it like {width}x{height}.")
        width, height = int(match[1]), int(match[2])
    return DrawRequest(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt or "",
        width=width,
        height=height,
        steps=recommended.num_inference_steps if body.steps is None else body.steps,
        guidance_scale=recommended.guidance_scale if body.guidance_scale is None else body.guidance_scale,
        guidance_until=ALL_STEPS if body.guidance_until is None else body.guidance_until,
        cache=EVERY_STEP if body.cache is None else body.cache,
        seed=body.seed,
        count=1 if body.n is None else body.n,
        use_pe=body.use_pe is not False,
        lora=tuple((each.name, each.strength) for each in body.lora or ()),
    )


async def unless_gone(http: Request, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    """The events for as long as the client is there. When it is gone, the request is dropped.

    Not left to what sends the answer: it notices only with the next event, and with uvicorn 0.30 not at all.
    """
    leaving = asyncio.create_task(disconnected(http))
    try:
        async with aclosing(events):
            while True:
                coming = asyncio.create_task(next_event(events))
                try:
                    await asyncio.wait({coming, leaving}, return_when=asyncio.FIRST_COMPLETED)
                    event = await coming if coming.done() else None
                finally:
                    coming.cancel()
                    await asyncio.gather(coming, return_exceptions=True)  # nothing closes while it waits
                if event is None:
                    return
                yield event
    finally:
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)


async def next_event(events: AsyncGenerator[Event, None]) -> Event | None:
    """The next event; None behind the last one."""
    return await anext(events, None)


async def all_pictures(events: AsyncGenerator[Event, None]) -> list[Picture]:
    """The pictures in order."""
    async with aclosing(events):
        return sorted([event async for event in events if isinstance(event, Picture)], key=lambda each: each.index)


async def disconnected(http: Request) -> None:
    """Return once the client is gone. The body must have been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
