"""Sync tokens and page tokens: opaque to clients, self-contained for the server.

A token is a sealed JSON array. Whether its content is still good for the request at hand is for the listing to judge.
"""

import zlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass, fields

import orjson

from devstack.google_calendar.resource import JsonValue

Params = tuple[tuple[str, str], ...]


class BadTokenError(ValueError):
    """The text is not a token this server issued."""


@dataclass(frozen=True, slots=True)
class SyncToken:
    """Where an incremental listing goes on, and what the initial listing was asked."""

    collection: str  # "e<calendar number>" or "l<user number>"
    incarnation: int
    epoch: int
    role: str
    version: int
    issued: int  # virtual seconds
    params: Params  # of the initial request, filters included


@dataclass(frozen=True, slots=True)
class PageToken:
    """Where a listing goes on within itself."""

    collection: str
    incarnation: int
    epoch: int
    base_version: int  # version of the sync token that was sent, -1 in a full listing
    sync_token_crc: int  # 0 in a full listing
    snapshot_version: int
    snapshot_seq: int
    position: int | str
    page: int  # 1-based number of the page this token opens
    issued: int
    frozen: Params  # parameters of the initial listing
    params: Params  # parameters of this listing


def crc(text: str) -> int:
    """Return a short fingerprint of a token."""
    return zlib.crc32(text.encode())


def seal_sync(token: SyncToken) -> str:
    """Return the text of a sync token."""
    return _seal(b"S", [getattr(token, name) for name in _SYNC_FIELDS])


def open_sync(text: str) -> SyncToken:
    """Read a sync token.

    Raises:
        BadTokenError: if this server never issued it.
    """
    *values, params = _open(b"S", text)
    return SyncToken(**dict(zip(_SYNC_FIELDS, (*values, _params(params)), strict=True)))


def seal_page(token: PageToken) -> str:
    """Return the text of a page token."""
    return _seal(b"P", [getattr(token, name) for name in _PAGE_FIELDS])


def open_page(text: str) -> PageToken:
    """Read a page token.

    Raises:
        BadTokenError: if this server never issued it.
    """
    *values, frozen, params = _open(b"P", text)
    return PageToken(**dict(zip(_PAGE_FIELDS, (*values, _params(frozen), _params(params)), strict=True)))


_SYNC_FIELDS = tuple(item.name for item in fields(SyncToken))
_PAGE_FIELDS = tuple(item.name for item in fields(PageToken))


def _seal(kind: bytes, values: list[JsonValue]) -> str:
    payload = kind + orjson.dumps(values)
    return urlsafe_b64encode(zlib.crc32(payload).to_bytes(4, "big") + payload).decode()


def _open(kind: bytes, text: str) -> list[JsonValue]:
    try:
        sealed = urlsafe_b64decode(text)
    except ValueError as error:
        raise BadTokenError("not base64") from error
    payload = sealed[4:]
    if payload[:1] != kind or zlib.crc32(payload).to_bytes(4, "big") != sealed[:4]:
        raise BadTokenError("not a token of this server")
    values: list[JsonValue] = orjson.loads(payload[1:])
    return values


def _params(value: JsonValue) -> Params:
    return tuple((name, text) for name, text in value)
