"""Requests and responses between the ASGI server and the parts that answer; nothing about calendars."""

import gzip
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from urllib.parse import parse_qsl

from devstack.google_calendar.resource import dumps

# The types of the ASGI specification.
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

_JSON = b"application/json; charset=UTF-8"


@dataclass(slots=True)
class Request:
    """One HTTP request, its body read."""

    method: str
    path: str  # as sent, still percent-encoded
    query: str
    headers: dict[bytes, bytes]
    body: bytes = b""

    def parameters(self) -> dict[str, list[str]]:
        """Return the query parameters, each with all its values."""
        found: dict[str, list[str]] = {}
        for name, value in parse_qsl(self.query, keep_blank_values=True):
            found.setdefault(name, []).append(value)
        return found


@dataclass(slots=True)
class Response:
    """One HTTP response; `close` asks for a broken connection instead of a whole answer."""

    status: int = 200
    body: bytes = b""
    content_type: bytes = _JSON
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    close: str = ""  # "", "before" or "within" the body


def json_response(value: object, status: int = 200) -> Response:
    """Return a response with a JSON body."""
    return Response(status, dumps(value))


async def read(scope: Message, receive: Receive) -> Request:
    """Read a whole request."""
    body = b""
    if scope["method"] != "GET":
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
    path = scope["raw_path"].decode("latin-1")
    return Request(scope["method"], path, scope["query_string"].decode("latin-1"), dict(scope["headers"]), body)


async def write(response: Response, request: Request, scope: Message, send: Send, gzip_from: int) -> None:
    """Send a response; bodies of `gzip_from` bytes are compressed if the client asks for it the way Google wants."""
    if response.close == "before":
        scope["transport"].abort()
        return
    body = response.body
    headers = [(b"content-type", response.content_type), *response.headers]
    # Both headers are needed, says guides/performance.
    if (
        len(body) >= gzip_from
        and b"gzip" in request.headers.get(b"accept-encoding", b"")
        and b"gzip" in request.headers.get(b"user-agent", b"")
    ):
        body = gzip.compress(body, compresslevel=1, mtime=0)
        headers.append((b"content-encoding", b"gzip"))
    if response.status not in (204, 304):
        headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    if response.close == "within":
        await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
        scope["transport"].close()
        return
    await send({"type": "http.response.body", "body": body})
