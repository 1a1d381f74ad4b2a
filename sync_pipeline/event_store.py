"""Events in Postgres: pages, generations, tombstones, and the token that says how far they go.

Belongs here: the SQL that writes `sync.event_rows`, `sync.quarantine` and a calendar's cursor.
Does not: calls to Google, or transactions; the caller opens one, holds the lease in it, and commits.

Incremental syncs write into the live generation. A full sync writes the next one beside it, which readers do not
see until `complete` flips it together with its sync token; what the new generation lacks becomes a tombstone.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import date, datetime
from typing import LiteralString, Self

import psycopg
from psycopg import sql

from scaling.databases import Connection
from sync_pipeline.errors import LeaseLostError
from sync_pipeline.events import EventBatch, EventRow, UnreadableEvent
from sync_pipeline.leases import CalendarLease
from sync_pipeline.workspaces import Workspace

BREAKER_AFTER = 3
"""This many 410s in a row without one incremental sync between them open the breaker (compass issue 2841)."""
BREAKER_SECONDS = 6 * 3600
"""An open breaker leaves four full syncs a day."""
TOMBSTONE_DAYS = 90
CLOCKS_DIFFER_SECONDS = 300.0

TYPES: dict[str, LiteralString] = {
    "event_id": "text",
    "status": "text",
    "event_type": "text",
    "summary": "text",
    "description": "text",
    "location": "text",
    "start_at": "timestamptz",
    "start_date": "date",
    "start_zone": "text",
    "end_at": "timestamptz",
    "end_date": "date",
    "end_zone": "text",
    "recurrence": "text[]",
    "recurring_event_id": "text",
    "original_start_at": "timestamptz",
    "original_start_date": "date",
    "ical_uid": "text",
    "organizer_email": "text",
    "visibility": "text",
    "transparency": "text",
    "attendees_omitted": "boolean",
    "sequence": "bigint",
    "created_at": "timestamptz",
    "updated_at": "timestamptz",
    "flaws": "text[]",
    "raw": "jsonb",
}
"""The columns of an event and their types, as `EventRow` and the table name them."""
KEPT_IN_TOMBSTONES = {"event_id", "status", "recurring_event_id", "ical_uid", "updated_at", "raw"} | {
    "original_start_at",
    "original_start_date",
}


def _columns(prefix: LiteralString = "") -> sql.Composed:
    return sql.SQL(", ").join(sql.SQL(prefix) + sql.Identifier(name) for name in TYPES)


FRAGMENTS = {
    "calendar": sql.SQL("%(tenant)s, %(workspace)s, %(calendar)s"),
    "of_calendar": sql.SQL("(tenant_id, workspace_id, calendar_id) = (%(tenant)s, %(workspace)s, %(calendar)s)"),
    "columns": _columns(),
    "page_columns": _columns("page."),
    "excluded_columns": _columns("excluded."),
    "typed_columns": sql.SQL(", ").join(
        sql.Identifier(name) + sql.SQL(" ") + sql.SQL(kind) for name, kind in TYPES.items()
    ),
    "details_blanked": sql.SQL(", ").join(
        sql.Identifier(name) + sql.SQL(" = NULL") for name in TYPES if name not in KEPT_IN_TOMBSTONES
    ),
}


def _sql(text: LiteralString) -> sql.Composed:
    return sql.SQL(text).format(**FRAGMENTS)


UPSERT = _sql("""
WITH page AS MATERIALIZED (
    SELECT * FROM json_to_recordset(%(rows)s::json) AS r(is_tombstone boolean, {typed_columns})
), prior AS MATERIALIZED (
    SELECT e.event_id, e.raw, e.deleted_at, e.changed_at
    FROM sync.event_rows e JOIN page USING (event_id)
    WHERE {of_calendar} AND e.generation = %(live)s
), written AS (
    INSERT INTO sync.event_rows AS mine
        (tenant_id, workspace_id, calendar_id, generation, lease_epoch, {columns}, deleted_at, changed_at)
    SELECT {calendar}, %(generation)s, %(epoch)s, {page_columns},
        CASE WHEN page.is_tombstone THEN coalesce(prior.deleted_at, now()) END,
        CASE WHEN prior.raw = page.raw AND (prior.deleted_at IS NOT NULL) = page.is_tombstone
             THEN prior.changed_at ELSE now() END
    FROM page LEFT JOIN prior USING (event_id)
    ON CONFLICT (tenant_id, workspace_id, calendar_id, generation, event_id) DO UPDATE
    SET ({columns}, deleted_at, changed_at, lease_epoch) =
        ROW ({excluded_columns}, excluded.deleted_at, excluded.changed_at, excluded.lease_epoch)
    WHERE (mine.raw IS DISTINCT FROM excluded.raw OR (mine.deleted_at IS NULL) <> (excluded.deleted_at IS NULL))
      AND coalesce(excluded.updated_at >= mine.updated_at, true)
    RETURNING event_id, deleted_at, changed_at, updated_at
)
SELECT count(*) FILTER (WHERE written.deleted_at IS NULL AND written.changed_at = now()),
       count(*) FILTER (WHERE written.deleted_at IS NOT NULL AND prior.event_id IS NOT NULL
                          AND prior.deleted_at IS NULL),
       CASE WHEN %(generation)s = %(live)s
            THEN array_agg(extract(epoch FROM now() - written.updated_at)::float8)
                FILTER (WHERE written.changed_at = now() AND written.updated_at IS NOT NULL) END
FROM written LEFT JOIN prior USING (event_id)
""")

# Google does not mention the exceptions of a deleted series. An exception may come a page before its restored master,
# so exceptions of masters buried earlier wait for the end of the listing.
BURY_EXCEPTIONS = _sql("""
UPDATE sync.event_rows exception
SET status = 'cancelled', deleted_at = now(), changed_at = now(), lease_epoch = %(epoch)s, {details_blanked},
    raw = jsonb_build_object('id', exception.event_id, 'status', 'cancelled')
FROM sync.event_rows master
WHERE (exception.tenant_id, exception.workspace_id, exception.calendar_id, exception.generation)
    = ({calendar}, %(generation)s)
  AND (master.tenant_id, master.workspace_id, master.calendar_id, master.generation) = ({calendar}, %(generation)s)
  AND master.event_id = exception.recurring_event_id AND master.deleted_at IS NOT NULL AND exception.deleted_at IS NULL
  AND (master.event_id = ANY(%(tombstones)s) OR %(listing_ends)s)
""")

QUARANTINE = _sql("""
INSERT INTO sync.quarantine (tenant_id, workspace_id, calendar_id, fingerprint, event_id, reason, raw, generation)
VALUES ({calendar}, %(fingerprint)s, %(event_id)s, %(reason)s, %(raw)s, %(generation)s)
ON CONFLICT (tenant_id, workspace_id, calendar_id, fingerprint) DO UPDATE
SET last_seen_at = now(), reason = excluded.reason, generation = excluded.generation
""")

# An event whose new version is unreadable keeps its last readable one.
KEEP_QUARANTINED = _sql("""
INSERT INTO sync.event_rows
    (tenant_id, workspace_id, calendar_id, generation, lease_epoch, {columns}, deleted_at, changed_at)
SELECT {calendar}, %(generation)s, %(epoch)s, {columns}, deleted_at, changed_at
FROM sync.event_rows
WHERE {of_calendar} AND generation = %(live)s AND event_id IN (
    SELECT event_id FROM sync.quarantine WHERE {of_calendar} AND generation = %(generation)s)
ON CONFLICT DO NOTHING
""")

BURY_ABSENT = _sql("""
WITH buried AS (
    INSERT INTO sync.event_rows
        (tenant_id, workspace_id, calendar_id, generation, lease_epoch, event_id, status, recurring_event_id,
         original_start_at, original_start_date, ical_uid, updated_at, deleted_at, changed_at, raw)
    SELECT {calendar}, %(generation)s, %(epoch)s, event_id, 'cancelled', recurring_event_id,
        original_start_at, original_start_date, ical_uid, updated_at, coalesce(deleted_at, now()),
        CASE WHEN deleted_at IS NULL THEN now() ELSE changed_at END,
        jsonb_build_object('id', event_id, 'status', 'cancelled')
    FROM sync.event_rows
    WHERE {of_calendar} AND generation = %(live)s
    ON CONFLICT DO NOTHING
    RETURNING changed_at
)
SELECT count(*) FILTER (WHERE changed_at = now()) FROM buried
""")


@dataclass(frozen=True, slots=True)
class Changes:
    """What a write changed for readers."""

    upserted: int = 0
    deleted: int = 0
    quarantined: int = 0
    ages: tuple[float, ...] = ()
    """Of incremental changes: seconds from Google's `updated` until now."""

    def __add__(self, other: Self) -> "Changes":
        return Changes(
            self.upserted + other.upserted,
            self.deleted + other.deleted,
            self.quarantined + other.quarantined,
            self.ages + other.ages,
        )


def begin_generation(
    connection: Connection, lease: CalendarLease, *, token_is_gone: bool, token_is_used: bool = True
) -> int:
    """Start a full sync beside the generation readers see; the rows of an abandoned one are removed.

    Args:
        connection: within a transaction.
        lease: of the calendar.
        token_is_gone: Google does not know the sync token any more; it is forgotten and the event is counted.
        token_is_used: False: no sync token would be used anyway, so that lost ones open no breaker.

    Returns:
        The generation to write.

    Raises:
        LeaseLostError: the calendar is somebody else's now.
    """
    row = connection.execute(
        _sql("""
        UPDATE sync.calendar_state
        SET next_generation = coalesce(next_generation, live_generation) + 1,
            gone_count = CASE WHEN NOT %(used)s THEN 0 WHEN %(gone)s THEN gone_count + 1 ELSE gone_count END,
            sync_token = CASE WHEN %(gone)s THEN NULL ELSE sync_token END
        WHERE {of_calendar} AND lease_epoch = %(epoch)s
        RETURNING next_generation
        """),
        {**lease.key, "gone": token_is_gone, "used": token_is_used},
    ).fetchone()
    if row is None:
        raise LeaseLostError("another worker holds the calendar now")
    _remove_generations_other_than(connection, lease, lease.live_generation)
    return int(row[0])


def write_page(connection: Connection, lease: CalendarLease, *, generation: int, batch: EventBatch) -> Changes:
    """Write one page; writing it again changes nothing.

    An older version of an event never replaces a newer one; one with the same `updated` does, because changed
    reminders do not move it.

    Args:
        connection: within a transaction that holds the lease.
        lease: of the calendar.
        generation: the live one (incremental) or the one begun (full).
        batch: the page.

    Returns:
        What readers see changed, or will see once the generation is complete.
    """
    unreadable = list(batch.unreadable)
    changes = Changes()
    if batch.rows:
        try:
            with connection.transaction():
                changes = _upsert(connection, lease, generation, batch.rows)
        except psycopg.DataError:
            # Postgres refuses a value that passed the reading; find out which event it is.
            for row in batch.rows:
                try:
                    with connection.transaction():
                        changes += _upsert(connection, lease, generation, [row])
                except psycopg.DataError as error:
                    reason = f"Postgres refuses it (SQLSTATE {error.sqlstate})"
                    unreadable.append(UnreadableEvent(row.event_id, reason, json.dumps(row.raw, sort_keys=True)))
        refused = {event.event_id for event in unreadable}
        readable = [row.event_id for row in batch.rows if row.event_id not in refused]
        connection.execute(
            _sql("DELETE FROM sync.quarantine WHERE {of_calendar} AND event_id = ANY(%(ids)s)"),
            {**lease.key, "ids": readable},
        )
    for event in unreadable:
        poison = {
            "fingerprint": event.fingerprint,
            "event_id": event.event_id,
            "reason": event.reason,
            "raw": event.raw,
            "generation": generation,
        }
        connection.execute(QUARANTINE, {**lease.key, **poison})
    return changes + Changes(quarantined=len(unreadable))


def complete(
    connection: Connection,
    lease: CalendarLease,
    *,
    generation: int,
    sync_token: str,
    token_fingerprint: bytes,
    wrote: bool,
    change_count: float,
    observed_days: float,
    due_in_seconds: float,
) -> Changes:
    """Commit the cursor with the last page, make the generation the live one, and give the lease back.

    The cursor of a calendar whose role changed meanwhile is dropped: what a role newly shows is not listed again.

    Args:
        connection: within the transaction that wrote the last page.
        lease: of the calendar.
        generation: the one the pages went into.
        sync_token: from the last page.
        token_fingerprint: what the token is bound to.
        wrote: the listing had any item.
        change_count: what is known of how often it changes, see `sync_pipeline.cadence`.
        observed_days: what is known of how often it changes.
        due_in_seconds: when the calendar is due again, unless its breaker is open; at once when a notification came
            while it was being read.

    Returns:
        The tombstones a full sync adds.

    Raises:
        LeaseLostError: the calendar is somebody else's now.
    """
    full = generation != lease.live_generation
    buried = 0
    if wrote:  # an idle poll has nothing to bury
        buried = connection.execute(
            BURY_EXCEPTIONS, {**lease.key, "generation": generation, "tombstones": [], "listing_ends": True}
        ).rowcount
    if full:
        generations = {**lease.key, "generation": generation, "live": lease.live_generation}
        connection.execute(KEEP_QUARANTINED, generations)
        row = connection.execute(BURY_ABSENT, generations).fetchone()
        buried += int(row[0]) if row else 0
        _remove_generations_other_than(connection, lease, generation)
        connection.execute(
            _sql("DELETE FROM sync.quarantine WHERE {of_calendar} AND generation <> %(generation)s"), generations
        )
    committed = connection.execute(
        _sql("""
        UPDATE sync.calendar_state
        SET sync_token = CASE WHEN access_role IS NOT DISTINCT FROM %(role)s THEN %(token)s END,
            token_fingerprint = %(fingerprint)s,
            live_generation = %(generation)s, next_generation = NULL,
            lease_owner = NULL, lease_until = NULL,
            last_finished_at = now(), last_succeeded_at = now(),
            last_full_sync_at = CASE WHEN %(full)s THEN now() ELSE last_full_sync_at END,
            last_outcome = CASE WHEN %(full)s THEN 'full' ELSE 'incremental' END,
            last_error = NULL, consecutive_failures = 0,
            gone_count = CASE WHEN %(full)s THEN gone_count ELSE 0 END,
            breaker_until = CASE WHEN %(full)s AND gone_count >= %(breaker_after)s
                                 THEN now() + make_interval(secs => %(breaker_seconds)s) END,
            change_count = %(change_count)s, observed_days = %(observed_days)s,
            due_at = CASE
                WHEN %(full)s AND gone_count >= %(breaker_after)s
                    THEN now() + make_interval(secs => %(breaker_seconds)s)
                WHEN notified_at >= last_started_at OR access_role IS DISTINCT FROM %(role)s THEN now()
                ELSE now() + make_interval(secs => %(due_in)s) END
        WHERE {of_calendar} AND lease_epoch = %(epoch)s
        """),
        {
            **lease.key,
            "token": sync_token,
            "role": lease.access_role,
            "fingerprint": token_fingerprint,
            "generation": generation,
            "full": full,
            "breaker_after": BREAKER_AFTER,
            "breaker_seconds": BREAKER_SECONDS,
            "change_count": change_count,
            "observed_days": observed_days,
            "due_in": due_in_seconds,
        },
    )
    if committed.rowcount != 1:
        raise LeaseLostError("another worker holds the calendar now")
    return Changes(deleted=buried)


def purge_tombstones(connection: Connection, workspace: Workspace) -> None:
    """Remove a workspace's tombstones after `TOMBSTONE_DAYS`; consumers have had that long to see them."""
    connection.execute(
        "DELETE FROM sync.event_rows WHERE tenant_id = %s AND workspace_id = %s "
        "AND deleted_at < now() - make_interval(days => %s)",
        [workspace.tenant_id, workspace.workspace_id, TOMBSTONE_DAYS],
    )


def _upsert(connection: Connection, lease: CalendarLease, generation: int, rows: Sequence[EventRow]) -> Changes:
    generations = {**lease.key, "generation": generation, "live": lease.live_generation}
    counted = connection.execute(UPSERT, {**generations, "rows": _as_json(rows)}).fetchone()
    upserted, deleted, ages = counted or (0, 0, None)
    tombstones = [row.event_id for row in rows if row.is_tombstone]
    if tombstones:
        deleted += connection.execute(
            BURY_EXCEPTIONS, {**generations, "tombstones": tombstones, "listing_ends": False}
        ).rowcount
    # An event that was changed long ago and only now came into sight says nothing about how fast the sync is.
    longest = (lease.seconds_since_sync or 0.0) + CLOCKS_DIFFER_SECONDS
    return Changes(upserted=upserted, deleted=deleted, ages=tuple(age for age in ages or () if age <= longest))


def _remove_generations_other_than(connection: Connection, lease: CalendarLease, generation: int) -> None:
    connection.execute(
        _sql("DELETE FROM sync.event_rows WHERE {of_calendar} AND generation <> %(generation)s"),
        {**lease.key, "generation": generation},
    )


FIELD_NAMES = tuple(field.name for field in fields(EventRow))


def _as_json(rows: Sequence[EventRow]) -> str:
    return json.dumps([{name: getattr(row, name) for name in FIELD_NAMES} for row in rows], default=_iso)


def _iso(value: object) -> str:
    if isinstance(value, date | datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not JSON")
