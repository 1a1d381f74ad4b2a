"""Where a listing stands: the shared logic of sync tokens and page tokens for events and for calendar lists.

A listing works on a snapshot: its sync token carries the version at which its first page was read, so whatever changes
while a client pages is reported by the next incremental listing.
"""

from dataclasses import dataclass

from devstack.google_calendar import errors
from devstack.google_calendar.call import Call
from devstack.google_calendar.settings import Drift
from devstack.google_calendar.state import DAY
from devstack.google_calendar.tokens import (
    BadTokenError,
    PageToken,
    Params,
    SyncToken,
    crc,
    open_page,
    open_sync,
    seal_page,
    seal_sync,
)


@dataclass(frozen=True, slots=True)
class Cursor:
    """The state of one listing."""

    collection: str
    epoch: int
    role: str
    base_version: int  # version of the sync token; -1 in a full listing
    snapshot_version: int
    snapshot_seq: int
    position: int | str  # of the last entry served
    frozen: Params  # parameters of the initial listing
    params: Params  # parameters of this request
    stuck: bool = False  # drift mode "odd": report no changes and the same token


def begin(
    call: Call,
    *,
    collection: str,
    role: str,
    epoch: int,
    version: int,
    last_seq: int,
    params: Params,
    fingerprint: frozenset[str],
    always_gone: bool = False,
) -> Cursor:
    """Work out where the call's listing stands.

    Args:
        call: the request; its `page` and `drift` are filled in.
        collection: what is listed; tokens of another collection are refused.
        role: the caller's role; tokens of another role are gone.
        epoch: counts invalidations; sync tokens of an earlier epoch are gone.
        version: the collection's present version.
        last_seq: the collection's highest record number.
        params: the request's selecting parameters in canonical form.
        fingerprint: names of the parameters that must not differ between the requests of one sync.
        always_gone: whether every sync token is answered with 410.

    Raises:
        ApiError: 400 or 410 as documented.
    """
    sync_text, page_text = call.text("syncToken"), call.text("pageToken")
    if page_text is not None:
        page = _open_page(call, page_text, collection)
        call.page = page.page
        if page.base_version >= 0 and (page.epoch != epoch or always_gone):
            raise errors.full_sync_required()
        stuck = _drift(call, "page_parameters", page.params != params)
        if page.sync_token_crc != (crc(sync_text) if sync_text else 0):
            stuck |= _drift(call, "page_sync_token", happened=True)
        return Cursor(
            collection, epoch, role, page.base_version, page.snapshot_version, page.snapshot_seq, page.position,
            page.frozen, params, stuck,
        )  # fmt: skip
    if sync_text is None:
        return Cursor(collection, epoch, role, -1, version, last_seq, 0, params, params)
    try:
        token = open_sync(sync_text)
    except BadTokenError:
        raise errors.invalid_sync_token() from None
    world = call.world
    if token.incarnation == world.incarnation and token.collection != collection:
        raise errors.invalid_sync_token()
    expired = world.clock.now() - token.issued > world.settings.tombstone_days * DAY
    current = (world.incarnation, epoch, role)
    if always_gone or expired or (token.incarnation, token.epoch, token.role) != current:
        raise errors.full_sync_required()
    stuck = _drift(call, "sync_parameters", _part(token.params, fingerprint) != _part(params, fingerprint))
    return Cursor(collection, epoch, role, token.version, version, last_seq, 0, token.params, params, stuck)


def next_page_token(call: Call, cursor: Cursor, position: int | str) -> str:
    """Return the token for the page after `position`."""
    sync_text = call.text("syncToken")
    world = call.world
    return seal_page(
        PageToken(
            cursor.collection,
            world.incarnation,
            cursor.epoch,
            cursor.base_version,
            crc(sync_text) if sync_text else 0,
            cursor.snapshot_version,
            cursor.snapshot_seq,
            position,
            call.page + 1,
            int(world.clock.now()),
            cursor.frozen,
            cursor.params,
        )
    )


def next_sync_token(call: Call, cursor: Cursor) -> str:
    """Return the token from which the next incremental listing goes on."""
    world = call.world
    return seal_sync(
        SyncToken(
            cursor.collection,
            world.incarnation,
            cursor.epoch,
            cursor.role,
            cursor.snapshot_version,
            int(world.clock.now()),
            cursor.frozen,
        )
    )


def page_number(text: str | None) -> int:
    """Return the number of the page a page token opens; 1 without or with an unreadable one."""
    if text is None:
        return 1
    try:
        return open_page(text).page
    except BadTokenError:
        return 1


def _open_page(call: Call, text: str, collection: str) -> PageToken:
    try:
        page = open_page(text)
    except BadTokenError:
        raise errors.invalid_page_token() from None
    world = call.world
    expired = world.clock.now() - page.issued > world.settings.page_token_seconds
    if expired or page.incarnation != world.incarnation or page.collection != collection:
        raise errors.invalid_page_token()
    return page


def _drift(call: Call, kind: str, happened: bool) -> bool:
    """Make drifting parameters visible; return whether the answer must be odd."""
    if not happened:
        return False
    call.drift.append(kind)
    mode = call.world.settings.drift
    if mode is Drift.REJECT:
        raise errors.bad_request("The parameters differ from those of the request that issued the token.")
    return mode is Drift.ODD


def _part(params: Params, names: frozenset[str]) -> Params:
    return tuple(pair for pair in params if pair[0] in names)
