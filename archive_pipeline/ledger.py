"""The month's lease and its row in ``archive.months``: who may work on it, and how it went.

Belongs here: every statement on schema ``archive``. Does not: S3, or the source table.

Two guards keep one writer: a session advisory lock, which the database releases when the process dies, and an
epoch, which a run that lost its session without noticing finds moved on before it writes again.
"""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime

import psycopg
from psycopg.rows import TupleRow

from archive_pipeline.chain import Head
from archive_pipeline.errors import FencedError, MonthBusyError
from archive_pipeline.manifest import Published
from archive_pipeline.months import Month
from archive_pipeline.signing import Signer
from archive_pipeline.snapshot import ErasedValue, SourceTable
from scaling.databases import Connection, Shard
from scaling.errors import UserError

LOCK = "SELECT pg_try_advisory_lock(hashtextextended(%s, 0))"

OTHER_ZONE = """
SELECT time_zone FROM archive.months
WHERE source_table = %(source_table)s AND shard = %(shard)s AND time_zone <> %(time_zone)s AND manifest_key IS NOT NULL
LIMIT 1
"""

CLAIM = """
INSERT INTO archive.months AS m (source_table, shard, month, time_zone, from_at, to_at, state, epoch, owner, started_at)
VALUES (%(source_table)s, %(shard)s, %(month)s, %(time_zone)s, %(from_at)s, %(to_at)s, 'archiving', 1, %(owner)s,
        clock_timestamp())
ON CONFLICT (source_table, shard, month) DO UPDATE
SET epoch = m.epoch + 1, owner = excluded.owner, started_at = excluded.started_at, error = NULL,
    time_zone = excluded.time_zone, from_at = excluded.from_at, to_at = excluded.to_at,
    state = CASE WHEN m.manifest_key IS NULL THEN 'archiving' ELSE 'archived' END
RETURNING epoch
"""

MINE = "source_table = %(source_table)s AND shard = %(shard)s AND month = %(month)s AND epoch = %(epoch)s"
OF_MONTH = "source_table = %(source_table)s AND shard = %(shard)s AND month = %(month)s"

OWNER = f"SELECT owner FROM archive.months WHERE {OF_MONTH}"  # noqa: S608 - constants only
UPLOADS = f"SELECT key FROM archive.uploads WHERE {OF_MONTH} ORDER BY key"  # noqa: S608 - constants only

RECORD_UPLOAD = """
INSERT INTO archive.uploads (key, source_table, shard, month, epoch, sha256, bytes)
VALUES (%(key)s, %(source_table)s, %(shard)s, %(month)s, %(epoch)s, %(sha256)s, %(bytes)s)
ON CONFLICT (key) DO UPDATE SET epoch = excluded.epoch, recorded_at = clock_timestamp()
"""

RECORD_PUBLISHED = f"""
UPDATE archive.months
SET state = 'archived', finished_at = clock_timestamp(), error = NULL, generation = %(generation)s, rows = %(rows)s,
    row_digest = %(row_digest)s, parts = %(parts)s, bytes = %(bytes)s, snapshot_lsn = %(snapshot_lsn)s::pg_lsn,
    manifest_key = %(manifest_key)s, manifest_sha256 = %(manifest_sha256)s, archived_at = %(archived_at)s,
    verified_at = clock_timestamp(), source_rows = %(source_rows)s, read_from = %(read_from)s,
    late_rows = late_rows + CASE WHEN %(kind)s = 'late' AND generation < %(generation)s THEN %(rows)s - rows ELSE 0 END,
    erased_rows = erased_rows + CASE WHEN generation < %(generation)s THEN %(erased_rows)s ELSE 0 END
WHERE {MINE}
"""  # noqa: S608 - constants only

CHAIN_HEAD = """
SELECT sequence, link_key, link_sha256, signature FROM archive.chain_heads
WHERE source_table = %(source_table)s AND shard = %(shard)s
"""

# The chain only grows: whoever comes late with an older link changes nothing.
PIN = """
INSERT INTO archive.chain_heads AS h (source_table, shard, sequence, link_key, link_sha256, signature)
VALUES (%(source_table)s, %(shard)s, %(sequence)s, %(link_key)s, %(link_sha256)s, %(signature)s)
ON CONFLICT (source_table, shard) DO UPDATE
SET sequence = excluded.sequence, link_key = excluded.link_key, link_sha256 = excluded.link_sha256,
    signature = excluded.signature, pinned_at = clock_timestamp()
WHERE h.sequence < excluded.sequence
"""

SIGNING_KEY = """
INSERT INTO archive.signing_keys (fingerprint, algorithm, public_key, source)
VALUES (%(fingerprint)s, 'RSASSA_PKCS1_V1_5_SHA_256', %(public_key)s, %(source)s)
ON CONFLICT (fingerprint) DO UPDATE SET last_used_at = clock_timestamp()
"""

# A month whose manifest is published stays archived, whatever befalls a later look at it.
RECORD_FAILED = f"""
UPDATE archive.months
SET state = CASE WHEN manifest_key IS NULL THEN 'failed' ELSE 'archived' END, finished_at = clock_timestamp(),
    error = %(error)s
WHERE {MINE}
"""  # noqa: S608 - constants only


PRUNED = f"""
SELECT pruned_at IS NOT NULL OR EXISTS (
  SELECT FROM archive.prunes p
  WHERE p.source_table = m.source_table AND p.shard = m.shard
    AND p.state IN ('detaching', 'detached', 'replaced', 'dropping')
    AND coalesce(p.from_at, '-infinity') < m.to_at AND p.to_at > m.from_at)
FROM archive.months m WHERE {MINE}
"""  # noqa: S608 - constants only

ERASURES = """
SELECT id::text, column_name, value_sha256, requested_at FROM archive.erasures
WHERE source_table = %(source_table)s AND shard = %(shard)s
"""


class Lease:
    """The right to archive one month; made by `lease`.

    Every method raises `FencedError` when the right is gone.
    """

    def __init__(self, connection: Connection, identity: dict[str, object]) -> None:
        self._connection = connection
        self._identity = identity

    def confirm(self) -> None:
        """Make sure that the lease still holds; asked before every write to the bucket."""
        self._update(f"UPDATE archive.months SET epoch = epoch WHERE {MINE}")  # noqa: S608 - constants only

    def clock(self) -> datetime:
        """The database's time."""
        row = self._execute("SELECT clock_timestamp()").fetchone()
        if row is None or not isinstance(row[0], datetime):
            raise TypeError
        return row[0]

    def uploads(self) -> list[str]:
        """Keys of objects that unfinished attempts may have left in the bucket."""
        return [key for (key,) in self._execute(UPLOADS)]

    def record_upload(self, key: str, sha256: str, size: int) -> None:
        """Note an object before it is put.

        Args:
            key: of the object.
            sha256: of its bytes, hex.
            size: bytes.
        """
        self.confirm()
        self._execute(RECORD_UPLOAD, key=key, sha256=sha256, bytes=size)

    def forget_uploads(self, keys: Sequence[str]) -> None:
        """Remove notes of objects that are gone or listed.

        Args:
            keys: of the objects.
        """
        self._execute("DELETE FROM archive.uploads WHERE key = ANY(%(keys)s)", keys=list(keys))

    def record_published(self, found: Published, source_rows: int) -> None:
        """Record the month as archived, and its parts as listed.

        Args:
            found: the manifest in the bucket.
            source_rows: rows of the month in Postgres.
        """
        manifest = found.manifest
        with self._alive(), self._connection.transaction():
            self._update(
                RECORD_PUBLISHED,
                generation=manifest.generation,
                rows=manifest.digest.rows,
                row_digest=manifest.digest.value,
                parts=len(manifest.parts),
                bytes=manifest.size,
                snapshot_lsn=manifest.snapshot_lsn,
                manifest_key=found.key,
                manifest_sha256=found.sha256,
                archived_at=manifest.created_at,
                source_rows=source_rows,
                read_from=manifest.read_from,
                kind=manifest.kind,
                erased_rows=manifest.erased_rows,
            )
            self.forget_uploads([part.key for part in manifest.parts])

    def chain_head(self) -> Head | None:
        """The newest link that is pinned; None before the first."""
        row = self._execute(CHAIN_HEAD).fetchone()
        return Head(*row) if row else None

    def pin(self, head: Head) -> None:
        """Pin the chain's newest link; an older one changes nothing.

        Args:
            head: the link.
        """
        self._execute(PIN, sequence=head.sequence, link_key=head.key, link_sha256=head.sha256, signature=head.signature)

    def record_signing_key(self, signer: Signer) -> None:
        """Note that a key signed.

        Args:
            signer: whose public key is kept.
        """
        self._execute(SIGNING_KEY, fingerprint=signer.fingerprint, public_key=signer.public_key, source=signer.source)

    def signing_keys(self) -> dict[str, bytes]:
        """The public keys (SPKI, DER) that ever signed, by fingerprint."""
        return dict(self._execute("SELECT fingerprint, public_key FROM archive.signing_keys").fetchall())

    def erasures(self) -> list[ErasedValue]:
        """What has been erased from the archive of this table."""
        return [ErasedValue(*row) for row in self._execute(ERASURES)]

    def pruned(self) -> bool:
        """Whether the month's rows were dropped from Postgres, or are on their way out of the table."""
        row = self._execute(PRUNED).fetchone()
        return bool(row and row[0])

    def record_failed(self, error: str) -> None:
        """Record what stopped the attempt.

        Args:
            error: one sentence without row content.
        """
        self._update(RECORD_FAILED, error=error)

    def _update(self, statement: str, **values: object) -> None:
        if self._execute(statement, **values).rowcount != 1:
            raise FencedError(f"another run took over month {self._identity['month']}")

    def _execute(self, statement: str, **values: object) -> psycopg.Cursor[TupleRow]:
        with self._alive():
            return self._connection.execute(statement.encode(), {**self._identity, **values})

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except psycopg.OperationalError:
            raise FencedError(f"the database session of the lease on month {self._identity['month']} is gone") from None


@contextmanager
def lease(shard: Shard, table: SourceTable, month: Month, *, session: Connection | None = None) -> Iterator[Lease]:
    """Take the month, for as long as the block runs.

    Args:
        shard: whose rows are archived; its ``archive`` schema keeps the row.
        table: the source.
        month: to be archived.
        session: that holds the lease until it ends, for many months at once; None opens one for the block.

    Raises:
        MonthBusyError: another run has it.
        UserError: months of this table were archived in another time zone, so the new one would overlap them.
    """
    identity: dict[str, object] = {"source_table": str(table), "shard": shard.name, "month": month.partition_key}
    with shard.dedicated() if session is None else nullcontext(session) as connection:
        row = connection.execute(LOCK, (f"archive {table} {month.name}",)).fetchone()
        if not (row and row[0]):
            owner = connection.execute(OWNER.encode(), identity).fetchone()
            by = f" by {owner[0]}" if owner else ""
            raise MonthBusyError(f"month {month.name} is being archived{by}; wait for that run to end, or stop it")
        other = connection.execute(OTHER_ZONE, {**identity, "time_zone": month.zone}).fetchone()
        if other:
            raise UserError(
                f"{table} has months archived in time zone {other[0]}; months in {month.zone} would overlap them; "
                f"set ARCHIVE_TIME_ZONE back to {other[0]}"
            )
        claimed = connection.execute(
            CLAIM,
            {
                **identity,
                "time_zone": month.zone,
                "from_at": month.start,
                "to_at": month.end,
                "owner": f"{socket.gethostname()}:{os.getpid()}",
            },
        ).fetchone()
        yield Lease(connection, {**identity, "epoch": claimed[0] if claimed else 0})
