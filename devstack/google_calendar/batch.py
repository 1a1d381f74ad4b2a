"""Batch requests: many API calls in one multipart HTTP request (guides/batch). Each inner call costs its own quota."""

from collections.abc import Awaitable, Callable
from email import message_from_bytes
from email.message import Message
from email.policy import HTTP
from http import HTTPStatus
from secrets import token_hex

from devstack.google_calendar.errors import bad_request
from devstack.google_calendar.http import Request, Response

MAX_CALLS = 1000  # guides/batch


async def respond(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
    """Answer a batch by answering its calls one after another."""
    head = b"Content-Type: " + request.headers.get(b"content-type", b"") + b"\r\n\r\n"
    envelope = message_from_bytes(head + request.body, policy=HTTP)
    parts = envelope.get_payload()
    if not envelope.is_multipart() or not isinstance(parts, list) or len(parts) > MAX_CALLS:
        error = bad_request(f"A batch is a multipart/mixed request of at most {MAX_CALLS} calls.")
        return Response(error.status, error.body())
    boundary = f"batch_{token_hex(16)}"
    lines: list[bytes] = []
    for part in parts:
        if not isinstance(part, Message):
            continue
        response = await answer(_inner(part, request))
        content_id = str(part.get("Content-ID", "")).strip()
        inner_id = f"<response-{content_id[1:]}" if content_id.startswith("<") else f"response-{content_id}"
        lines += [
            f"--{boundary}\r\nContent-Type: application/http\r\nContent-ID: {inner_id}\r\n\r\n".encode(),
            f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}\r\n".encode(),
            b"Content-Type: " + response.content_type + b"\r\n",
            *(name + b": " + value + b"\r\n" for name, value in response.headers),
            f"Content-Length: {len(response.body)}\r\n\r\n".encode(),
            response.body,
            b"\r\n",
        ]
    lines.append(f"--{boundary}--".encode())
    return Response(200, b"".join(lines), f"multipart/mixed; boundary={boundary}".encode())


def _inner(part: Message, outer: Request) -> Request:
    """Return the call inside one part; it inherits the batch's Authorization unless it carries its own."""
    payload = part.get_payload(decode=True)
    text = payload if isinstance(payload, bytes) else b""
    request_line, _, rest = text.replace(b"\r\n", b"\n").partition(b"\n")
    head, _, body = rest.partition(b"\n\n")
    verb, _, target = request_line.decode("latin-1").partition(" ")
    path, _, query = target.partition(" ")[0].partition("?")
    headers = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(b":") for line in head.split(b"\n") if line)
    }
    if b"authorization" in outer.headers:
        headers.setdefault(b"authorization", outer.headers[b"authorization"])
    return Request(verb, path, query, headers, body.strip())
