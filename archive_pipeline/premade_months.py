"""Monthly partitions as the catalog shows them, and empty ones made ahead of time.

Belongs here: reading the partitions of the table, making those of coming months, the alarm when they run short, and
`python -m archive_pipeline.premade_months`. Does not: making the table partitioned in the first place
(`conversion`), taking partitions away (`prune`).

There is never a DEFAULT partition: `DETACH … CONCURRENTLY` is refused while there is one, and every new month would
scan it. The price is that Postgres refuses a row beyond the last premade month (23514, "no partition of relation
found"), so months are made well ahead, and an alarm tells when few are left.

`CREATE TABLE … PARTITION OF` would lock the whole table against readers and writers (ACCESS EXCLUSIVE). A table made
by itself and attached takes SHARE UPDATE EXCLUSIVE, which hinders neither; foreign keys, indexes and triggers are
cloned by the ATTACH, because a foreign key added by hand would lock the table it refers to exclusively.
"""

import argparse
import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise

import psycopg
import tenacity
from psycopg import sql

from archive_pipeline.errors import PartitionsError
from archive_pipeline.months import Month
from archive_pipeline.snapshot import SourceTable
from scaling import tracing
from scaling.databases import Connection, DatabaseRouter
from scaling.errors import run_command
from scaling.logs import Event, event
from scaling.settings import ArchiveSourceSettings, DatabaseSettings, load

logger = logging.getLogger(__name__)

# Writers of a referenced table wait behind the ATTACH, which waits for this long at most.
LOCK_TIMEOUT = "1s"
ATTEMPTS = 10
FIRST_WAIT_SECONDS = 0.25
LONGEST_WAIT_SECONDS = 8.0

IDENTIFIER_BYTES = 63

PARENT = """
SELECT c.oid, c.relkind::text, pg_get_partkeydef(c.oid) AS key, c.relowner, pg_get_userbyid(c.relowner) AS owner,
       c.relforcerowsecurity, c.relreplident::text, current_user = pg_get_userbyid(c.relowner) AS is_owner,
       (SELECT i.indexrelid FROM pg_index i WHERE i.indrelid = c.oid AND i.indisreplident) AS identity_index,
       (SELECT format_type(a.atttypid, NULL) FROM pg_attribute a
        WHERE a.attrelid = c.oid AND a.attname = 'created_at' AND NOT a.attisdropped) AS key_type
FROM pg_class c WHERE c.oid = to_regclass(%s)
"""

# reltuples is -1 until the first ANALYZE. A partition may be partitioned itself, and then has no size of its own.
PARTITIONS = r"""
SELECT n.nspname, c.relname, c.oid,
       b.bound ~ '^FOR VALUES FROM \((MINVALUE|''-infinity'')\)' AS is_first,
       (substring(b.bound FROM '^FOR VALUES FROM \(''(\d[^'']*)''\)'))::timestamptz AS from_at,
       (substring(b.bound FROM ' TO \(''(\d[^'']*)''\)$'))::timestamptz AS to_at,
       leaves.rows, leaves.bytes, i.inhdetachpending, b.bound = 'DEFAULT' AS is_default
FROM pg_inherits i
JOIN pg_class c ON c.oid = i.inhrelid
JOIN pg_namespace n ON n.oid = c.relnamespace
CROSS JOIN LATERAL (SELECT pg_get_expr(c.relpartbound, c.oid) AS bound) b
CROSS JOIN LATERAL (
    SELECT coalesce(sum(greatest(l.reltuples, 0)), 0)::bigint AS rows,
           coalesce(sum(pg_total_relation_size(l.oid)), 0)::bigint AS bytes
    FROM pg_partition_tree(c.oid) t JOIN pg_class l ON l.oid = t.relid WHERE t.isleaf
) leaves
WHERE i.inhparent = %s AND c.relispartition
ORDER BY from_at NULLS FIRST
"""

# Whoever was given something on a new table by ALTER DEFAULT PRIVILEGES.
GRANTEES = """
SELECT DISTINCT CASE WHEN g.grantee = 0 THEN 'public' ELSE pg_get_userbyid(g.grantee) END, g.grantee = 0
FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) g WHERE c.oid = %s AND g.grantee <> c.relowner
"""

MAY_ENTER = """
SELECT CASE WHEN g.grantee = 0 THEN 'PUBLIC' ELSE pg_get_userbyid(g.grantee) END
FROM pg_namespace n CROSS JOIN LATERAL aclexplode(n.nspacl) g LEFT JOIN pg_roles r ON r.oid = g.grantee
WHERE n.nspname = %s AND g.privilege_type = 'USAGE' AND g.grantee <> n.nspowner AND NOT coalesce(r.rolbypassrls, false)
"""

PUBLISHED_BY_LEAF = """
SELECT p.pubname FROM pg_publication p
WHERE NOT p.pubviaroot AND (p.puballtables
    OR EXISTS (SELECT FROM pg_publication_rel r WHERE r.prpubid = p.oid AND r.prrelid = %(table)s)
    OR EXISTS (SELECT FROM pg_publication_namespace s JOIN pg_class c ON c.relnamespace = s.pnnspid
               WHERE s.pnpubid = p.oid AND c.oid = %(table)s))
ORDER BY 1
"""


@dataclass(frozen=True, slots=True)
class MonthPartition:
    """One partition of the table.

    Attributes:
        schema: it is in.
        name: of the table.
        oid: which tells it from another table made later under the same name.
        from_at: the first instant that belongs to it; None is the beginning of time.
        to_at: the first instant after it.
        rows_estimate: by the statistics.
        bytes: on disk, with indexes and TOAST.
        pending_detach: a `DETACH … CONCURRENTLY` was interrupted; its rows are not seen through the table any more.
    """

    schema: str
    name: str
    oid: int
    from_at: datetime | None
    to_at: datetime
    rows_estimate: int = 0
    bytes: int = 0
    pending_detach: bool = False

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"

    @property
    def table(self) -> SourceTable:
        """The partition as a table of its own."""
        return SourceTable(self.schema, self.name)

    def month(self, zone: str) -> Month | None:
        """The calendar month it holds, None when it holds anything but exactly one.

        Args:
            zone: IANA time zone.
        """
        if self.from_at is None:
            return None
        month = Month.containing(self.from_at, zone)
        return month if (month.start, month.end) == (self.from_at, self.to_at) else None

    def overlaps(self, month: Month) -> bool:
        """Whether an instant belongs to both."""
        return self.to_at > month.start and (self.from_at is None or self.from_at < month.end)


@dataclass(frozen=True, slots=True)
class Gap:
    """A range between two partitions for which there is none: Postgres refuses its rows."""

    from_at: datetime
    to_at: datetime

    def __str__(self) -> str:
        return f"{self.from_at:%Y-%m-%d %H:%M} to {self.to_at:%Y-%m-%d %H:%M} UTC"


@dataclass(frozen=True, slots=True)
class _Parent:
    oid: int
    relkind: str
    key: str | None
    owner_oid: int
    owner: str
    forces_row_security: bool
    replica_identity: str
    is_owner: bool
    identity_index: int | None
    key_type: str | None


def partitions_of(connection: Connection, table: SourceTable) -> tuple[MonthPartition, ...]:
    """Read the partitions of the table, oldest first.

    Args:
        connection: any role.
        table: partitioned by `created_at`; a plain table has none.

    Returns:
        The partitions, those whose detach is pending included.

    Raises:
        PartitionsError: there is no such table, or a partition is not a range of time.
    """
    parent = _parent(connection, table)
    # Bounds print in the session's time zone and date style; the rollback gives the session its own back.
    with connection.transaction(force_rollback=True):
        connection.execute("SET LOCAL TimeZone = 'UTC'")
        connection.execute("SET LOCAL DateStyle = 'ISO, YMD'")
        rows = connection.execute(PARTITIONS, (parent.oid,)).fetchall()
    found = []
    for schema, name, oid, is_first, from_at, to_at, estimate, size, pending, is_default in rows:
        if is_default:
            raise PartitionsError(
                f"{table} has a DEFAULT partition, {schema}.{name}: new months and DETACH CONCURRENTLY are not "
                "possible beside it; move its rows to partitions of their months and drop it"
            )
        if to_at is None or (from_at is None and not is_first):
            raise PartitionsError(
                f"partition {schema}.{name} of {table} is not a range of created_at with an end; "
                "only such partitions can be archived and pruned by month"
            )
        found.append(MonthPartition(schema, name, oid, from_at, to_at, estimate, size, pending))
    return tuple(found)


def gaps(partitions: Sequence[MonthPartition]) -> list[Gap]:
    """Ranges of time between the partitions, which Postgres refuses rows for.

    Args:
        partitions: of one table; one whose detach is pending receives no rows and counts as absent.
    """
    there = _receiving(partitions)
    return [
        Gap(before.to_at, after.from_at)
        for before, after in pairwise(there)
        if after.from_at is not None and before.to_at < after.from_at
    ]


def missing_months(
    partitions: Sequence[MonthPartition], table: SourceTable, *, now: datetime, zone: str, ahead: int
) -> list[Month]:
    """Which months have no partition: up to `ahead` after the present one, and skipped ones between older partitions.

    Args:
        partitions: of the table.
        table: named in errors.
        now: the database's clock.
        zone: whose calendar months the partitions are.
        ahead: how many months beyond the present one.

    Returns:
        The months, oldest first.

    Raises:
        PartitionsError: a month is covered in part, so that its partition would overlap another.
    """
    last = Month.containing(now, zone)
    for _ in range(ahead):
        last = last.following
    first = Month.containing(now, zone)
    if partitions:
        first = min(first, Month.containing(min(each.to_at for each in partitions), zone))
    months: list[Month] = []
    month = first
    while not last < month:
        overlapping = [each for each in partitions if each.overlaps(month)]
        if not overlapping:
            months.append(month)
        elif not _covered(month, overlapping):
            raise PartitionsError(
                f"a partition for {month.name} ({month.start:%Y-%m-%d %H:%M} to {month.end:%Y-%m-%d %H:%M} UTC) would "
                f"overlap {', '.join(map(str, overlapping))} of {table}, which is not a month of {zone}; "
                "ARCHIVE_TIME_ZONE must be the zone the table was partitioned in"
            )
        month = month.following
    return months


def premake(
    connection: Connection,
    table: SourceTable,
    schema: str,
    zone: str,
    ahead: int,
    *,
    now: datetime | None = None,
    sleep: Callable[[float], None] = time.sleep,
    rng: random.Random | None = None,
) -> list[MonthPartition]:
    """Make the partitions that are missing: of the present month, of those ahead, and of skipped ones before.

    Each month is one short transaction that takes SHARE UPDATE EXCLUSIVE on the table and is repeated when a lock is
    not to be had. Readers and writers of the table do not notice.

    Args:
        connection: of the table's owner.
        table: partitioned by range of `created_at`.
        schema: private, for the partitions; it is made if it is not there.
        zone: whose calendar months they are.
        ahead: how many months beyond the present one.
        now: the present; None asks the database.
        sleep: waits between two attempts.
        rng: jitters the waits.

    Returns:
        What was made, oldest first; nothing when all were there.

    Raises:
        PartitionsError: the table is not partitioned so, a partition is in the way, the schema is open to others, or
            a lock was not to be had.
    """
    parent = _partitioned(connection, table)
    if not parent.is_owner and not _is_member(connection, parent.owner_oid):
        raise PartitionsError(f"only {parent.owner}, who owns {table}, can make its partitions; see DATABASE_OWNER_URL")
    now = now or database_now(connection)
    rng = rng or random.Random()  # noqa: S311 - jitter
    _require_private_schema(connection, schema, parent)
    made = []
    for month in missing_months(partitions_of(connection, table), table, now=now, zone=zone, ahead=ahead):
        name = partition_name(table, month)
        if _is_taken(connection, schema, name) and month < Month.containing(now, zone):
            # A past month on its way out of Postgres: its rows wait there, its replacement is the pruning's business.
            logger.warning(
                "%s has no partition for %s, and %s.%s is not attached",
                table,
                month.name,
                schema,
                name,
                extra=event(Event.PARTITION_NOT_ATTACHED, table=str(table), month=month.name),
            )
            continue
        retrying = tenacity.Retrying(
            sleep=sleep,
            wait=lambda state: (
                min(FIRST_WAIT_SECONDS * 2.0 ** (state.attempt_number - 1), LONGEST_WAIT_SECONDS)
                * rng.uniform(0.5, 1.0)
            ),
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            retry=tenacity.retry_if_exception_type((psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected)),
            reraise=True,
        )
        try:
            one = retrying(_make, connection, table, SourceTable(schema, name), month)
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
            raise PartitionsError(
                f"the partition of {table} for {month.name} could not be attached: another transaction has held a lock "
                f"on the table, or on one it refers to, through {ATTEMPTS} attempts; end it (pg_stat_activity) and "
                "run again"
            ) from None
        if one is not None:
            made.append(one)
            logger.info(
                "made partition %s of %s for %s",
                one,
                table,
                month.name,
                extra=event(Event.PARTITION_MADE, table=str(table), month=month.name),
            )
    if made and (names := published_by_leaf(connection, table)):
        logger.warning(
            "publication %s sends changes of %s under the names of its partitions; its subscribers need tables of "
            "these names too, or: ALTER PUBLICATION … SET (publish_via_partition_root = true)",
            ", ".join(names),
            table,
            extra=event(Event.PUBLICATION_BY_PARTITION, table=str(table)),
        )
    return made


def months_left(connection: Connection, table: SourceTable, *, zone: str = "UTC", now: datetime | None = None) -> int:
    """Count the months after the present one, up to the first that has no partition.

    Args:
        connection: any role.
        table: partitioned.
        zone: whose calendar months they are.
        now: the present; None asks the database.

    Returns:
        0 when only the present month has a partition, -1 when not even that one has: inserts fail.

    Raises:
        PartitionsError: the table is not partitioned by range of time.
    """
    _partitioned(connection, table)
    there = _receiving(partitions_of(connection, table))
    month = Month.containing(now or database_now(connection), zone)
    left = -1
    while _covered(month, there):
        left += 1
        month = month.following
    return left


def shortage(left: int, table: SourceTable, ahead: int) -> str | None:
    """Say that the premade months run short; None while they do not.

    The alarm stays silent when the month has just turned and the next run is yet to come.

    Args:
        left: of `months_left`.
        table: named in the sentence.
        ahead: how many are kept, ARCHIVE_PREMADE_MONTHS.
    """
    if left >= max(ahead - 1, 1):
        return None
    remedy = "materialize audit_logs_partitions, or run: python -m archive_pipeline.premade_months premake"
    if left < 0:
        return f"{table} has no partition for the present month and refuses every insert (23514); {remedy}"
    months = "no month" if left == 0 else "one month" if left == 1 else f"{left} months"
    return (
        f"{table} has partitions for {months} after the present one, {ahead} are to be kept ready; when they run out, "
        f"inserts fail (23514); {remedy}"
    )


def findings(
    connection: Connection, table: SourceTable, *, zone: str, ahead: int, now: datetime | None = None
) -> list[str]:
    """Everything about the partitions that somebody should act on, one sentence each.

    Args:
        connection: any role.
        table: partitioned.
        zone: whose calendar months they are.
        ahead: how many are kept, ARCHIVE_PREMADE_MONTHS.
        now: the present; None asks the database.

    Returns:
        The sentences; nothing when all is well.

    Raises:
        PartitionsError: the table is not partitioned by range of time.
    """
    partitions = partitions_of(connection, table)
    now = now or database_now(connection)
    sentences = []
    if short := shortage(months_left(connection, table, zone=zone, now=now), table, ahead):
        sentences.append(short)
    sentences += [f"{table} has no partition for {gap}, and refuses its rows (23514)" for gap in gaps(partitions)]
    sentences += [
        f"the detach of {each} was interrupted; rows of its range are refused until it is finished, which the next "
        "run of audit_log_pruned does"
        for each in partitions
        if each.pending_detach
    ]
    sentences += [
        f"partition {each} of {table} ({each.from_at:%Y-%m-%d %H:%M} to {each.to_at:%Y-%m-%d %H:%M} UTC) is not one "
        f"calendar month of {zone} (ARCHIVE_TIME_ZONE), so it cannot be pruned by month"
        for each in partitions
        if each.from_at is not None and each.month(zone) is None
    ]
    return sentences


def published_by_leaf(connection: Connection, table: SourceTable) -> list[str]:
    """Publications that send the table's changes under the names of its partitions.

    A subscriber then needs a table for each month. `ALTER PUBLICATION … SET (publish_via_partition_root = true)`
    makes one of them all.

    Args:
        connection: any role.
        table: partitioned.

    Returns:
        Their names.
    """
    rows = connection.execute(PUBLISHED_BY_LEAF, {"table": _parent(connection, table).oid}).fetchall()
    return [name for (name,) in rows]


def partition_name(table: SourceTable, month: Month) -> str:
    """What the partition of a month is called: `audit_logs_2025_01`.

    Args:
        table: partitioned.
        month: it holds.

    Returns:
        The name; that of a table with a long name is cut to what Postgres can keep apart.
    """
    suffix = f"_{month.year:04}_{month.month:02}"
    return table.name.encode()[: IDENTIFIER_BYTES - len(suffix)].decode(errors="ignore") + suffix


def database_now(connection: Connection) -> datetime:
    """The time by the database's clock."""
    [row] = connection.execute("SELECT clock_timestamp() AT TIME ZONE 'UTC'").fetchall()
    now: datetime = row[0]
    return now.replace(tzinfo=UTC)


def _make(connection: Connection, table: SourceTable, partition: SourceTable, month: Month) -> MonthPartition | None:
    with tracing.committed(connection.transaction()):
        connection.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(LOCK_TIMEOUT))
        # Conflicts with itself, so two runs make months one after the other; not with readers or writers.
        connection.execute(sql.SQL("LOCK TABLE ONLY {} IN SHARE UPDATE EXCLUSIVE MODE").format(table.identifier))
        if any(each.overlaps(month) for each in partitions_of(connection, table)):
            return None
        if _is_taken(connection, partition.schema, partition.name):
            raise PartitionsError(
                f"{table} needs a partition for {month.name}, but a table {partition} exists that is not attached to "
                "it; attach it if it is the month's, otherwise rename it"
            )
        return make_range(connection, table, partition, month.start, month.end)


def make_range(
    connection: Connection, table: SourceTable, partition: SourceTable, from_at: datetime | None, to_at: datetime
) -> MonthPartition:
    """Make one empty partition, in the caller's transaction, whose lock_timeout bounds the waits.

    Args:
        connection: of the table's owner.
        table: partitioned by range of `created_at`.
        partition: what it is called; nothing has that name.
        from_at: the first instant that belongs to it; None is the beginning of time.
        to_at: the first instant after it.

    Returns:
        The partition, attached.
    """
    parent = _parent(connection, table)
    child = partition.identifier
    connection.execute(
        sql.SQL("CREATE TABLE {} (LIKE {} INCLUDING ALL EXCLUDING IDENTITY EXCLUDING INDEXES)").format(
            child, table.identifier
        )
    )
    oid = _parent(connection, partition).oid
    _close_to_others(connection, child, oid, parent)
    attach(connection, table, partition, from_at, to_at)
    _copy_replica_identity(connection, partition, oid, parent)
    return MonthPartition(partition.schema, partition.name, oid, from_at, to_at)


def attach(
    connection: Connection, table: SourceTable, partition: SourceTable, from_at: datetime | None, to_at: datetime
) -> None:
    """Attach a table as a partition; Postgres reads it unless a CHECK says that its rows are in the range.

    Args:
        connection: of the table's owner.
        table: partitioned by range of `created_at`.
        partition: the table.
        from_at: the first instant that belongs to it; None is the beginning of time.
        to_at: the first instant after it.
    """
    connection.execute(
        sql.SQL("ALTER TABLE {} ATTACH PARTITION {} FOR VALUES FROM ({}) TO ({})").format(
            table.identifier,
            partition.identifier,
            sql.SQL("MINVALUE") if from_at is None else sql.Literal(from_at.isoformat()),
            sql.Literal(to_at.isoformat()),
        )
    )


def _close_to_others(connection: Connection, child: sql.Identifier, oid: int, parent: _Parent) -> None:
    """Nobody but the owner reads or writes a partition by its name: only the table's policies filter by tenant."""
    connection.execute(sql.SQL("ALTER TABLE {} ENABLE ROW LEVEL SECURITY").format(child))
    if parent.forces_row_security:
        connection.execute(sql.SQL("ALTER TABLE {} FORCE ROW LEVEL SECURITY").format(child))
    for name, everybody in connection.execute(GRANTEES, (oid,)).fetchall():
        grantee = sql.SQL("PUBLIC") if everybody else sql.Identifier(name)
        connection.execute(sql.SQL("REVOKE ALL ON {} FROM {}").format(child, grantee))
    if not parent.is_owner:
        connection.execute(sql.SQL("ALTER TABLE {} OWNER TO {}").format(child, sql.Identifier(parent.owner)))


def _copy_replica_identity(connection: Connection, partition: SourceTable, oid: int, parent: _Parent) -> None:
    """Set what the table has: a partition does not take it over, and updates of a published one would fail."""
    match parent.replica_identity:
        case "f":
            identity: sql.Composable = sql.SQL("FULL")
        case "n":
            identity = sql.SQL("NOTHING")
        case "i":
            row = connection.execute(
                "SELECT c.relname FROM pg_inherits i JOIN pg_index x ON x.indexrelid = i.inhrelid "
                "JOIN pg_class c ON c.oid = x.indexrelid WHERE i.inhparent = %s AND x.indrelid = %s",
                (parent.identity_index, oid),
            ).fetchone()
            if row is None:
                return
            identity = sql.SQL("USING INDEX {}").format(sql.Identifier(row[0]))
        case _:
            return
    connection.execute(sql.SQL("ALTER TABLE {} REPLICA IDENTITY {}").format(partition.identifier, identity))


def _require_private_schema(connection: Connection, schema: str, parent: _Parent) -> None:
    if connection.execute("SELECT FROM pg_namespace WHERE nspname = %s", (schema,)).rowcount == 0:
        # IF NOT EXISTS does not see a schema that another run has not committed yet.
        with suppress(psycopg.errors.UniqueViolation), connection.transaction():
            connection.execute(
                sql.SQL("CREATE SCHEMA IF NOT EXISTS {} AUTHORIZATION {}").format(
                    sql.Identifier(schema), sql.Identifier(parent.owner)
                )
            )
    if others := [name for (name,) in connection.execute(MAY_ENTER, (schema,))]:
        raise PartitionsError(
            f"schema {schema} (ARCHIVE_PARTITION_SCHEMA) is open to {', '.join(others)}, who could read the partitions "
            f"without the table's policies; REVOKE USAGE ON SCHEMA {schema} FROM them, or name another schema"
        )


def _parent(connection: Connection, table: SourceTable) -> _Parent:
    row = connection.execute(PARENT, (table.identifier.as_string(connection),)).fetchone()
    if row is None:
        raise PartitionsError(f"there is no table {table} (ARCHIVE_TABLE)")
    return _Parent(*row)


def _partitioned(connection: Connection, table: SourceTable) -> _Parent:
    parent = _parent(connection, table)
    if parent.relkind != "p" or parent.key != "RANGE (created_at)" or parent.key_type != "timestamp with time zone":
        raise PartitionsError(
            f"{table} is {f'partitioned by {parent.key}' if parent.key else 'a plain table'}, not partitioned by range "
            "of created_at timestamptz; convert it with: python -m archive_pipeline.convert"
        )
    return parent


def _is_member(connection: Connection, role: int) -> bool:
    row = connection.execute("SELECT pg_has_role(%s::oid, 'MEMBER')", (role,)).fetchone()
    return bool(row and row[0])


def _is_taken(connection: Connection, schema: str, name: str) -> bool:
    relation = sql.Identifier(schema, name).as_string(connection)
    return connection.execute("SELECT WHERE to_regclass(%s) IS NOT NULL", (relation,)).rowcount == 1


def _receiving(partitions: Sequence[MonthPartition]) -> list[MonthPartition]:
    return [each for each in partitions if not each.pending_detach]


def _covered(month: Month, partitions: Iterable[MonthPartition]) -> bool:
    """Whether every instant of the month belongs to a partition; they are in order."""
    reached = month.start
    for each in partitions:
        if (each.from_at is None or each.from_at <= reached) and reached < each.to_at:
            reached = each.to_at
    return reached >= month.end


def _show(connection: Connection, table: SourceTable, settings: ArchiveSourceSettings) -> None:
    from rich.console import Console
    from rich.table import Table

    zone = settings.archive_time_zone
    shown = Table("partition", "month", "from (UTC)", "to (UTC)", "rows, estimated", "MB", "", title=str(table))
    for each in partitions_of(connection, table):
        month = each.month(zone)
        shown.add_row(
            str(each),
            month.name if month else "",
            f"{each.from_at:%Y-%m-%d %H:%M}" if each.from_at else "the beginning",
            f"{each.to_at:%Y-%m-%d %H:%M}",
            f"{each.rows_estimate:,}",
            f"{each.bytes / 1e6:,.1f}",
            "detach pending" if each.pending_detach else "",
        )
    console = Console()
    console.print(shown)
    console.print(f"months ready after the present one: {months_left(connection, table, zone=zone)}")
    for name in published_by_leaf(connection, table):
        console.print(
            f"publication {name} sends changes under the partitions' names (publish_via_partition_root = off)"
        )


def _status(router: DatabaseRouter, settings: ArchiveSourceSettings) -> int:
    table = SourceTable.parse(settings.archive_table)
    sentences = []
    for shard in router.shards():
        with shard.transaction() as connection:
            _show(connection, table, settings)
            sentences += findings(
                connection, table, zone=settings.archive_time_zone, ahead=settings.archive_premade_months
            )
    for sentence in sentences:
        print(sentence)
    return 1 if sentences else 0


def _premake(router: DatabaseRouter, settings: ArchiveSourceSettings) -> int:
    table = SourceTable.parse(settings.archive_table)
    for shard in router.shards():
        with shard.owner() as connection:
            made = premake(
                connection,
                table,
                settings.archive_partition_schema,
                settings.archive_time_zone,
                settings.archive_premade_months,
            )
        print(f"{shard.name}: made {', '.join(map(str, made)) or 'nothing, all months are there'}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes them from the process.

    Returns:
        The exit code: 1 when `status` has something somebody should act on.
    """
    parser = argparse.ArgumentParser(
        prog="python -m archive_pipeline.premade_months",
        description="The monthly partitions of the audit logs: show them, or make those of coming months.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="show the partitions; exit code 1 when months run short or something is wrong")
    commands.add_parser("premake", help="make the partitions that are missing (DATABASE_OWNER_URL)")
    options = parser.parse_args(arguments)
    settings = load(ArchiveSourceSettings)
    with DatabaseRouter.from_settings(load(DatabaseSettings), application_name="premade_months") as router:
        return {"status": _status, "premake": _premake}[options.command](router, settings)


if __name__ == "__main__":
    run_command(main)
