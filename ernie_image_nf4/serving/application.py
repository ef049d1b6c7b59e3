"""The application: endpoint and page over one engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from .. import __version__
from ..errors import ErnieImageNF4Error
from .answers import ErrorAnswer, error_answer, invalid_fields, openai_error
from .endpoint import make_router
from .engine import Engine
from .security import BodyLimit, LocalOnly

DESCRIPTION = "Draws with ERNIE-Image. `POST /v1/images/generations` is OpenAI's, with a few fields more."


def make_app(engine: Engine, *, api_key: str | None = None, page: bool = True, local_only: bool = False) -> FastAPI:
    """The ASGI application. It starts the engine when it is started, and closes it at its end.

    Args:
        engine: Draws.
        api_key: That whoever asks must send; None for none.
        page: Whether there is a web page beside the endpoint.
        local_only: Whether to answer only what names this machine as its host, for a server without a key.
    """

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        try:
            yield
        finally:
            await engine.close()

    app = FastAPI(title="ERNIE-Image-NF4", description=DESCRIPTION, version=__version__, lifespan=life)
    app.include_router(make_router(engine, api_key))
    answer_errors(app)
    if page:
        from .page import mount_page

        app = mount_page(app, engine, api_key=api_key)
    app.add_middleware(BodyLimit, prefix="/v1/", most=engine.limits.max_body_bytes)
    if local_only:
        app.add_middleware(LocalOnly)
    return app


def answer_errors(app: FastAPI) -> None:
    """Let errors be answered in OpenAI's form."""

    def answered(answer: ErrorAnswer) -> JSONResponse:
        return JSONResponse(answer.body, answer.status, answer.headers)

    @app.exception_handler(ErnieImageNF4Error)
    async def ours(request: Request, error: ErnieImageNF4Error) -> JSONResponse:
        return answered(error_answer(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answered(invalid_fields(error.errors()))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        text = f"{request.method} {request.url.path}: {error.detail}."
        body = openai_error(text, "invalid_request_error")
        return answered(ErrorAnswer(error.status_code, body, dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        text = "The server came to an error that it doesn't know, see its log."
        return answered(ErrorAnswer(500, openai_error(text, "server_error")))
