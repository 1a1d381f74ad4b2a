"""How far each partition is on its way out of Postgres, as ``archive.prunes`` keeps it, and what was compared.

Belongs here: every statement on ``archive.prunes`` and ``archive.pruned_months``, and what a prune reads of
``archive.months``. Does not: the catalog, or what the states are for (`archive_pipeline.prune`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from archive_pipeline.digest import Digest
from archive_pipeline.manifest import Published
from archive_pipeline.months import Month
from archive_pipeline.premade_months import MonthPartition
from archive_pipeline.snapshot import SourceTable
from scaling.databases import Shard

State = Literal["proposed", "approved", "detaching", "detached", "replaced", "dropping", "dropped", "refused"]

OF_TABLE = "source_table = %(source_table)s AND shard = %(shard)s"
FIELDS = (
    "id, partition_oid, partition_schema, partition_name, from_at, to_at, state, reason, rows, bytes, "
    "approved_by, approved_at"
)

UNDER_WAY = f"SELECT {FIELDS} FROM archive.prunes WHERE {OF_TABLE} AND state <> 'dropped' ORDER BY to_at, id"  # noqa: S608 - constants only

PROPOSE = f"""
INSERT INTO archive.prunes AS p (source_table, shard, partition_oid, partition_schema, partition_name, from_at, to_at,
                                 state, rows, bytes)
VALUES (%(source_table)s, %(shard)s, %(oid)s, %(schema)s, %(name)s, %(from_at)s, %(to_at)s, 'proposed', %(rows)s,
        %(bytes)s)
ON CONFLICT (source_table, shard, partition_oid) WHERE state <> 'dropped' DO UPDATE
SET rows = excluded.rows, bytes = excluded.bytes
RETURNING {FIELDS}
"""  # noqa: S608 - constants only

APPROVE = f"""
UPDATE archive.prunes
SET state = 'approved', reason = NULL, approved_by = %(by)s, approved_at = clock_timestamp(),
    changed_at = clock_timestamp()
WHERE {OF_TABLE} AND state IN ('proposed', 'approved', 'refused')
  AND (partition_name = %(name)s OR partition_schema || '.' || partition_name = %(name)s
       OR (to_at > %(start)s AND (from_at IS NULL OR from_at < %(end)s)))
RETURNING partition_schema || '.' || partition_name
"""  # noqa: S608 - constants only

RECORD = """
UPDATE archive.prunes SET state = %(state)s, reason = %(reason)s, changed_at = clock_timestamp() WHERE id = %(id)s
"""

ARCHIVED = f"""
SELECT to_char(month, 'YYYY-MM'), manifest_key, manifest_sha256, pruned_at IS NOT NULL FROM archive.months
WHERE {OF_TABLE} AND month = ANY(%(months)s) AND manifest_key IS NOT NULL AND time_zone = ANY(%(zones)s)
"""  # noqa: S608 - constants only

# Only while the month counts as pruned: a restore clears that.
GONE = f"""
SELECT g.gone_rows, g.gone_digest, m.erased_rows - g.erased_rows
FROM archive.pruned_months g JOIN archive.prunes p ON p.id = g.prune_id
JOIN archive.months m USING (source_table, shard, month)
WHERE {OF_TABLE} AND g.month = %(month)s AND p.state = 'dropped' AND m.pruned_at IS NOT NULL
ORDER BY p.changed_at DESC LIMIT 1
"""  # noqa: S608 - constants only

COMPARED = f"""
INSERT INTO archive.pruned_months (prune_id, month, rows, row_digest, gone_rows, gone_digest, erased_rows, manifest_key,
                                   manifest_sha256)
SELECT %(id)s, month, %(rows)s, %(row_digest)s, %(gone_rows)s, %(gone_digest)s, erased_rows, %(manifest_key)s,
       %(manifest_sha256)s
FROM archive.months WHERE {OF_TABLE} AND month = %(month)s
ON CONFLICT (prune_id, month) DO UPDATE
SET rows = excluded.rows, row_digest = excluded.row_digest, gone_rows = excluded.gone_rows,
    gone_digest = excluded.gone_digest, erased_rows = excluded.erased_rows, manifest_key = excluded.manifest_key,
    manifest_sha256 = excluded.manifest_sha256
"""  # noqa: S608 - constants only

DROPPED = f"""
WITH dropped AS (
    UPDATE archive.prunes SET state = 'dropped', reason = NULL, changed_at = clock_timestamp(),
        rows = (SELECT sum(rows) FROM archive.pruned_months WHERE prune_id = %(id)s)
    WHERE id = %(id)s AND state = 'dropping' RETURNING id
)
UPDATE archive.months m SET pruned_at = clock_timestamp(), pruned_rows = coalesce(m.pruned_rows, 0) + g.rows
FROM archive.pruned_months g JOIN dropped ON dropped.id = g.prune_id
WHERE {OF_TABLE} AND m.month = g.month
"""  # noqa: S608 - constants only

COMPARED_BEFORE = "SELECT to_char(month, 'YYYY-MM') FROM archive.pruned_months WHERE prune_id = %s ORDER BY month"


@dataclass(frozen=True, slots=True)
class Prune:
    """One partition on its way out.

    Attributes:
        id: of the row.
        oid: of the table that was meant, whatever has its name later.
        schema: it was in.
        name: it had.
        from_at: the first instant that belonged to it; None is the beginning of time.
        to_at: the first instant after it.
        state: how far it has come.
        reason: why it did not come further, in words.
        rows: dropped, or an estimate.
        bytes: it occupied.
        approved_by: who approved.
        approved_at: when.
    """

    id: int
    oid: int
    schema: str
    name: str
    from_at: datetime | None
    to_at: datetime
    state: State
    reason: str | None
    rows: int | None
    bytes: int | None
    approved_by: str | None
    approved_at: datetime | None

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"

    @property
    def table(self) -> SourceTable:
        """The partition as a table of its own."""
        return SourceTable(self.schema, self.name)

    @property
    def is_begun(self) -> bool:
        """Whether this pipeline may have detached it."""
        return self.state not in ("proposed", "approved")

    def overlaps(self, partition: MonthPartition) -> bool:
        """Whether an instant belongs to both it and another partition."""
        begins = partition.from_at is None or partition.from_at < self.to_at
        return begins and (self.from_at is None or self.from_at < partition.to_at) and partition.oid != self.oid


@dataclass(frozen=True, slots=True)
class ArchivedMonth:
    """What is recorded of an archived month.

    Attributes:
        key: of its newest manifest.
        sha256: of that manifest, hex.
        pruned: whether rows of it left Postgres.
    """

    key: str
    sha256: str
    pruned: bool


@dataclass(frozen=True, slots=True)
class Compared:
    """What a partition was found to hold of a month, before it is dropped.

    Attributes:
        month: it is.
        found: the manifest that lists every row.
        rows: of the partition.
        gone: what of the archive is in Postgres no longer once the partition is dropped.
    """

    month: Month
    found: Published
    rows: Digest
    gone: Digest


class Prunes:
    """The rows of one table and shard.

    Args:
        shard: whose ``archive`` schema keeps them.
        table: the source.
    """

    def __init__(self, shard: Shard, table: SourceTable) -> None:
        self._shard = shard
        self._identity: Mapping[str, object] = {"source_table": str(table), "shard": shard.name}

    def under_way(self) -> list[Prune]:
        """Every one that is not dropped, oldest month first."""
        with self._shard.transaction() as connection:
            return [Prune(*row) for row in connection.execute(UNDER_WAY.encode(), self._identity)]

    def propose(self, partition: MonthPartition) -> Prune:
        """Note a partition; one that is noted already keeps its state.

        Args:
            partition: to be pruned.
        """
        values = {
            **self._identity,
            "oid": partition.oid,
            "schema": partition.schema,
            "name": partition.name,
            "from_at": partition.from_at,
            "to_at": partition.to_at,
            "rows": partition.rows_estimate,
            "bytes": partition.bytes,
        }
        with self._shard.transaction() as connection:
            row = connection.execute(PROPOSE.encode(), values).fetchone()
        assert row is not None  # noqa: S101 - RETURNING of one row
        return Prune(*row)

    def approve(self, what: Month | str, by: str) -> list[str]:
        """Approve what is proposed or was refused.

        Args:
            what: a month, or a partition's name.
            by: who approves.

        Returns:
            The partitions, ``schema.name``.
        """
        month = what if isinstance(what, Month) else None
        values = {
            **self._identity,
            "by": by,
            "name": None if month else what,
            "start": month and month.start,
            "end": month and month.end,
        }
        with self._shard.transaction() as connection:
            return sorted(name for (name,) in connection.execute(APPROVE.encode(), values))

    def record(self, row: Prune, state: State, reason: str | None = None) -> None:
        """Note how far a partition has come.

        Args:
            row: of the partition.
            state: it is in.
            reason: why it did not come further.
        """
        with self._shard.transaction() as connection:
            connection.execute(RECORD, {"id": row.id, "state": state, "reason": reason})

    def forget(self, row: Prune) -> None:
        """Remove a proposal.

        Args:
            row: of the partition; nothing was done about it.
        """
        with self._shard.transaction() as connection:
            connection.execute("DELETE FROM archive.prunes WHERE id = %s", (row.id,))

    def record_reason(self, row: Prune, reason: str) -> None:
        """Note why a partition did not come further, whatever state it has reached.

        Args:
            row: of the partition.
            reason: in words.
        """
        with self._shard.transaction() as connection:
            connection.execute("UPDATE archive.prunes SET reason = %s WHERE id = %s", (reason, row.id))

    def record_dropping(self, row: Prune, compared: Iterable[Compared]) -> None:
        """Note what was compared; the drop comes next.

        Args:
            row: of the partition.
            compared: its months.
        """
        with self._shard.transaction() as connection:
            connection.execute("DELETE FROM archive.pruned_months WHERE prune_id = %s", (row.id,))
            for each in compared:
                values = {
                    **self._identity,
                    "id": row.id,
                    "month": each.month.partition_key,
                    "rows": each.rows.rows,
                    "row_digest": each.rows.value,
                    "gone_rows": each.gone.rows,
                    "gone_digest": each.gone.value,
                    "manifest_key": each.found.key,
                    "manifest_sha256": each.found.sha256,
                }
                connection.execute(COMPARED.encode(), values)
            connection.execute(RECORD, {"id": row.id, "state": "dropping", "reason": None})

    def record_dropped(self, row: Prune) -> None:
        """Note that the table is gone, and its months are pruned; once, however often it is called.

        Args:
            row: of the partition.
        """
        with self._shard.transaction() as connection:
            connection.execute(DROPPED.encode(), {**self._identity, "id": row.id})

    def outcome(self, row: Prune) -> tuple[int, list[str]]:
        """Rows of a partition as they are known now, and the months that were compared.

        Args:
            row: of the partition.
        """
        with self._shard.transaction() as connection:
            rows = connection.execute("SELECT rows FROM archive.prunes WHERE id = %s", (row.id,)).fetchone()
            months = connection.execute(COMPARED_BEFORE, (row.id,)).fetchall()
        return (rows and rows[0]) or 0, [name for (name,) in months]

    def archived(self, months: Sequence[Month]) -> dict[Month, ArchivedMonth]:
        """Which months are archived.

        Args:
            months: of one time zone.
        """
        zones = {month.zone for month in months}
        values = {**self._identity, "months": [month.partition_key for month in months], "zones": list(zones)}
        with self._shard.transaction() as connection:
            rows = connection.execute(ARCHIVED.encode(), values).fetchall()
        named = {month.name: month for month in months}
        return {named[name]: ArchivedMonth(key, sha256, pruned) for name, key, sha256, pruned in rows}

    def gone(self, month: Month) -> tuple[Digest, int]:
        """What earlier prunes dropped of a month, and how many rows were erased from its archive since.

        Args:
            month: it is.
        """
        with self._shard.transaction() as connection:
            row = connection.execute(GONE.encode(), {**self._identity, "month": month.partition_key}).fetchone()
        rows, value, erased = row or (0, 0, 0)
        return Digest(rows, int(value)), erased

    def keys(self) -> dict[str, bytes]:
        """Public keys that signed the chain, by fingerprint."""
        with self._shard.transaction() as connection:
            return dict(connection.execute("SELECT fingerprint, public_key FROM archive.signing_keys").fetchall())
