"""The process of ``ernie-image-nf4 serve``: listens, says when it is ready, and ends in order."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ..errors import InvalidSettings
from .engine import Engine

logger = logging.getLogger(__name__)

LAST_WORDS = 5.0  # seconds for sending answers to the end, once all is drawn and the server is being stopped


def bind(host: str, port: int) -> socket.socket:
    """A socket for the address, before the model is loaded for one that is taken. It doesn't listen yet.

    Raises:
        InvalidSettings: The address is taken, or isn't this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InvalidSettings(f"There is no address {host} ({error.strerror}): try another --host.") from error
    try:
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise InvalidSettings(f"Can't listen on {host}, port {port} ({error.strerror}): try another --port.") from error
    return bound


class Server(uvicorn.Server):
    """uvicorn's server. A signal to end it lets the engine finish what it is drawing, and refuses the rest."""

    def __init__(self, config: uvicorn.Config, engine: Engine, began: float) -> None:
        super().__init__(config)
        self.engine, self.began = engine, began

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.loop = asyncio.get_running_loop()
        if self.started and sockets:
            address = url_of(sockets[0])
            logger.info("%s is ready at %s after %.1f s", self.engine.name, address, time.monotonic() - self.began)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self.loop.call_soon_threadsafe(self.finish)

    def finish(self) -> None:
        """Refuse what waits. Connections that are open when all is drawn, as a page's, are closed soon after."""
        self.engine.drain()
        self.finishing = asyncio.ensure_future(self.end())

    async def end(self) -> None:
        await self.engine.drained()
        await asyncio.sleep(LAST_WORDS)
        self.force_exit = True


def url_of(bound: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def run_server(engine: Engine, app: FastAPI, bound: socket.socket, *, began: float) -> None:
    """Load the model and answer until a signal ends it.

    Args:
        engine: The engine of the application.
        app: As from `make_app`.
        bound: As from `bind`.
        began: When the program was started, by `time.monotonic`.

    Raises:
        ErnieImageNF4Error: The model can't be loaded.
    """
    try:
        await engine.start()
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
        await Server(config, engine, began).serve([bound])
    finally:
        await engine.close()
