"""Who may ask, and how much may be sent: checked before a request is read."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from .answers import openai_error

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

API_KEY = "ERNIE_IMAGE_NF4_API_KEY"  # variable of the environment
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


def fault_of_api_key(key: str) -> str | None:
    """What is wrong with a key to ask for; None if nothing is."""
    if not key.strip():
        return "is empty, which would let everybody in."
    if not re.fullmatch(r"[!-~]([ -~]*[!-~])?", key):
        return (
            "can't be sent in a header, so that nobody could get in: use letters, digits and signs of ASCII, without "
            "spaces or line ends around them."
        )
    return None


def is_api_key(given: str, expected: str) -> bool:
    """Whether a key is the right one, in a time that doesn't depend on where or how much it differs."""
    return hmac.compare_digest(
        *(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest() for key in (given, expected))
    )


def is_this_machine(host: str) -> bool:
    """Whether only this machine reaches an address to listen on."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class BodyLimit:
    """Refuses requests whose body is too large, by what they announce and by what comes."""

    def __init__(self, app: App, *, prefix: str, most: int) -> None:
        """Wrap an application.

        Args:
            app: Any ASGI application.
            prefix: Of the paths that it is about.
            most: Bytes of a body.
        """
        self.app, self.prefix, self.most = app, prefix, most

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(self.prefix):
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        announced = header(scope, b"content-length")
        too_large = announced.isdigit() and int(announced) > self.most
        while more and not too_large:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            too_large = len(body) > self.most
        if too_large:
            text = f"The request has more than {self.most} bytes: send less."
            await refuse(send, 413, openai_error(text, "invalid_request_error"))
            return
        await self.app(scope, replay(body, receive), send)


def replay(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read already, then what comes."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message


class LocalOnly:
    """For a server without a key on this machine: refuses what a web page of somebody else makes a browser send.

    Such a page can have its own name point to 127.0.0.1 (DNS rebinding), which ``Host`` shows, or send a request
    across sites, which ``Origin`` shows.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            origin = header(scope, b"origin")
            names = [hostname(f"//{header(scope, b'host')}"), *([hostname(origin)] if origin else [])]
            if any(name not in LOCAL_NAMES for name in names):
                text = "This server answers its own machine only: use http://127.0.0.1, or start it with an API key."
                await refuse(send, 403, openai_error(text, "invalid_request_error"))
                return
        await self.app(scope, receive, send)


def hostname(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def header(scope: Message, name: bytes) -> str:
    """A header of a request, empty if it has none."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


async def refuse(send: Send, status: int, body: dict[str, Any]) -> None:
    """Answer without asking the application."""
    content = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": content})
