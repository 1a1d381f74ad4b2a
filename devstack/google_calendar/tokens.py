"""Sync tokens and page tokens: opaque to clients, self-contained for the server.

A token is a sealed JSON array. Whether its content is still good for the request at hand is for the listing to judge.
"""

import zlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass

import orjson

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


def _seal(kind: bytes, fields: list[object]) -> str:
    payload = kind + orjson.dumps(fields)
    return urlsafe_b64encode(zlib.crc32(payload).to_bytes(4, "big") + payload).decode()


def _open(kind: bytes, text: str) -> list[object]:
    try:
        sealed = urlsafe_b64decode(text)
    except ValueError as error:
        raise BadTokenError("not base64") from error
    payload = sealed[4:]
    if payload[:1] != kind or zlib.crc32(payload).to_bytes(4, "big") != sealed[:4]:
        raise BadTokenError("not a token of this server")
    fields: list[object] = orjson.loads(payload[1:])
    return fields


def seal_sync(token: SyncToken) -> str:
    """Return the text of a sync token."""
    return _seal(
        b"S",
        [token.collection, token.incarnation, token.epoch, token.role, token.version, token.issued, token.params],
    )


def open_sync(text: str) -> SyncToken:
    """Read a sync token.

    Raises:
        BadTokenError: if this server never issued it.
    """
    *fields, params = _open(b"S", text)
    return SyncToken(*fields, _params(params))  # type: ignore[arg-type] - sealed by seal_sync


def seal_page(token: PageToken) -> str:
    """Return the text of a page token."""
    return _seal(
        b"P",
        [
            token.collection,
            token.incarnation,
            token.epoch,
            token.base_version,
            token.sync_token_crc,
            token.snapshot_version,
            token.snapshot_seq,
            token.position,
            token.page,
            token.issued,
            token.frozen,
            token.params,
        ],
    )


def open_page(text: str) -> PageToken:
    """Read a page token.

    Raises:
        BadTokenError: if this server never issued it.
    """
    *fields, frozen, params = _open(b"P", text)
    return PageToken(*fields, _params(frozen), _params(params))  # type: ignore[arg-type] - sealed by seal_page


def _params(value: object) -> Params:
    return tuple((name, text) for name, text in value)  # type: ignore[attr-defined] - sealed by this module
