"""The conversion of the live table of audit logs to monthly range partitions, and the way back.

Belongs here: doing what `conversion_plan` lays out, cleaning up after an attempt that did not end, the alarm for one
that nobody cleaned up. Does not: what the SQL says (`table_statements`), the command line (`convert`).

Everything slow happens beside the writers: a unique index is built CONCURRENTLY, and a CHECK that all rows lie before
a bound is validated. Then one short transaction makes the table the first partition of a new one; thanks to the CHECK
nothing is scanned in it. It reads every object of the table before and after, and rolls back on any difference.

While the CHECK is there, rows at or after the bound are refused. It is therefore made last, lies at least four weeks
ahead, is dropped on failure, dropped by the next start after a crash, and `conversion_state` tells of one that stayed.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TypeVar

import psycopg
import tenacity
from psycopg import sql
from psycopg.types.json import Jsonb

from archive_pipeline import table_statements as statements
from archive_pipeline.conversion_plan import Plan, dependant_blockers, plan_of, preflight, without_additions
from archive_pipeline.errors import ConversionBusyError, ConversionError, ConversionRefusedError
from archive_pipeline.premade_months import MonthPartition, premake
from archive_pipeline.snapshot import SourceTable
from archive_pipeline.table_objects import SESSION, TableObjects, as_json, capture, differences, from_json, read
from archive_pipeline.table_statements import Names
from scaling.databases import Connection, Shard
from scaling.logs import Event, event
from scaling.settings import ArchiveSourceSettings

logger = logging.getLogger(__name__)

NEAR_BOUND_DAYS = 14.0

# A swap that takes longer is rolled back: everybody waits for it. So is one whose client froze.
SWAP_LIMIT_SECONDS = 10.0
# Other DDL and autovacuum hold this lock, writers do not care for it; autovacuum yields after deadlock_timeout.
QUIET_LOCK_SECONDS = 30.0

T = TypeVar("T")

UNAVAILABLE = (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected, psycopg.errors.QueryCanceled)


@dataclass(frozen=True, slots=True)
class LockPolicy:
    """How the lock that blocks everybody is asked for.

    Writers queue behind a request that waits, so each waits briefly: short enough for nobody to notice at first, longer
    when that does not do. It stays below Postgres's deadlock_timeout (1 s), so it is never an application's
    transaction that is ended as the victim of a deadlock.

    Attributes:
        first_seconds: how long the first request waits.
        longest_seconds: how long any waits.
        attempts: until the conversion gives up.
        pause_seconds: longest pause between two attempts; jittered, it grows from a fiftieth of it.
    """

    first_seconds: float = 0.05
    longest_seconds: float = 0.5
    attempts: int = 60
    pause_seconds: float = 10.0

    def timeout(self, attempt: int) -> float:
        """How long an attempt waits for the lock.

        Args:
            attempt: from 1.
        """
        return min(self.longest_seconds, self.first_seconds * 1.2 ** (attempt - 1))

    def pause(self, attempt: int, rng: random.Random) -> float:
        """How long to leave everybody alone after an attempt.

        Args:
            attempt: from 1.
            rng: jitters it.
        """
        return min(self.pause_seconds, self.pause_seconds / 50 * 1.3 ** (attempt - 1)) * rng.uniform(0.5, 1.0)


class Outcome(StrEnum):
    """How a run ended."""

    CONVERTED = "converted"
    ROLLED_BACK = "rolled back"
    UNCHANGED = "unchanged"


class Step(StrEnum):
    """What a run has just done."""

    CLEANED = "what an earlier attempt left was removed"
    RECORDED = "the attempt is on record"
    INDEXED = "the index is built"
    CHECKED = "the CHECK is in place"
    VALIDATED = "the CHECK is validated"
    LOCKED = "the table is locked"
    SWAPPED = "the tables are swapped and compared, not yet committed"
    COMMITTED = "the swap is committed"
    MADE = "months are made ahead"


@dataclass(frozen=True, slots=True)
class Conversion:
    """Which table is converted, and to what."""

    table: SourceTable
    partition_schema: str
    zone: str
    premade_months: int

    @classmethod
    def from_settings(cls, settings: ArchiveSourceSettings) -> "Conversion":
        """The configured one.

        Args:
            settings: of the archive.
        """
        return cls(
            SourceTable.parse(settings.archive_table),
            settings.archive_partition_schema,
            settings.archive_time_zone,
            settings.archive_premade_months,
        )


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did.

    Attributes:
        blocked_seconds: from the request for the lock that was granted until the end of the transaction; the longest
            that anybody waited for the swap.
        attempts: that the lock took.
        made: partitions made ahead.
    """

    outcome: Outcome
    bound: datetime | None = None
    blocked_seconds: float = 0.0
    attempts: int = 0
    made: tuple[MonthPartition, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ConversionState:
    """Where the conversion of a table stands, and whether somebody should act.

    Attributes:
        partitioned: it is converted.
        running: a run is at work on it now.
        check_bound: rows at or after it are refused, by the CHECK of an attempt; None when there is none.
        days_left: until then, by the database's clock.
        leftovers: what an attempt added and nobody removed.
        finding: what somebody should know, with the remedy; None when all is well.
    """

    partitioned: bool
    running: bool
    check_bound: datetime | None
    days_left: float | None
    leftovers: tuple[str, ...]
    finding: str | None


STATE = """
SELECT c.relkind::text,
       EXISTS (SELECT FROM pg_locks l, (SELECT hashtextextended(%(lock)s, 0) AS key) k
               WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted AND l.pid <> pg_backend_pid()
                 AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                 AND ((l.classid::bigint << 32) | l.objid::bigint) = k.key) AS running,
       (SELECT substring(pg_get_constraintdef(k.oid) FROM '''([^'']+)''')::timestamptz FROM pg_constraint k
        WHERE k.conrelid = c.oid AND k.contype = 'c' AND k.conname = %(check)s) AS bound,
       (SELECT coalesce(array_agg(format('%%I.%%I', n.nspname, i.relname)), '{}')
        FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid JOIN pg_namespace n ON n.oid = i.relnamespace
        WHERE (x.indrelid = c.oid OR x.indrelid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = c.oid))
          AND i.relname = %(index)s
          AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = x.indexrelid)) AS indexes,
       clock_timestamp()
FROM pg_class c WHERE c.oid = to_regclass(%(table)s)
"""

BLOCKING = """
SELECT count(DISTINCT a.pid), array_agg(DISTINCT a.pid), max(extract(epoch FROM clock_timestamp() - a.xact_start))
FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'relation' AND l.granted AND l.pid <> pg_backend_pid()
  AND l.relation = ANY (SELECT to_regclass(t)::oid FROM unnest(%s::text[]) t)
"""

# A GRANT takes no lock on the table; this tells whether one came between the last look and the lock.
VERSION_OF_ROWS = """
SELECT c.xmin::text, (SELECT string_agg(a.xmin::text, ' ' ORDER BY a.attnum) FROM pg_attribute a
                      WHERE a.attrelid = c.oid)
FROM pg_class c WHERE c.oid = to_regclass(%s)
"""

# What must not be true of the plain table after it became a partition.
EXPOSED = """
SELECT format('%%s can still reach %%s itself', pg_describe_object(d.classid, d.objid, 0), c.oid::regclass)
FROM pg_class c JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = c.oid
WHERE c.oid = to_regclass(%(legacy)s)
  AND d.classid IN ('pg_rewrite'::regclass, 'pg_policy'::regclass, 'pg_proc'::regclass)
UNION ALL
SELECT format('%%s has %%s on %%s', coalesce(pg_get_userbyid(nullif(g.grantee, 0)), 'PUBLIC'), g.privilege_type,
              c.oid::regclass)
FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) g
WHERE c.oid = to_regclass(%(legacy)s) AND g.grantee <> c.relowner
  AND pg_get_userbyid(g.grantee) IS DISTINCT FROM %(reader)s
UNION ALL
SELECT format('row-level security of %%s is off', c.oid::regclass)
FROM pg_class c WHERE c.oid = to_regclass(%(legacy)s) AND NOT c.relrowsecurity
UNION ALL
SELECT format('%%s has USAGE on schema %%I', coalesce(pg_get_userbyid(nullif(g.grantee, 0)), 'PUBLIC'), n.nspname)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace CROSS JOIN LATERAL aclexplode(n.nspacl) g
WHERE c.oid = to_regclass(%(legacy)s) AND g.grantee NOT IN (n.nspowner, c.relowner)
  AND pg_get_userbyid(g.grantee) IS DISTINCT FROM %(reader)s
"""

COUNTERPARTS = """
SELECT 'index', child.relname, parent.relname
FROM pg_inherits h JOIN pg_class child ON child.oid = h.inhrelid JOIN pg_class parent ON parent.oid = h.inhparent
JOIN pg_index i ON i.indexrelid = child.oid
WHERE i.indrelid = to_regclass(%(legacy)s)
UNION ALL
SELECT 'constraint', child.conname, parent.conname
FROM pg_constraint child JOIN pg_constraint parent ON parent.oid = child.conparentid
WHERE child.conrelid = to_regclass(%(legacy)s) AND child.contype = 'f'
UNION ALL
SELECT 'statistics', n.nspname, s.stxname
FROM pg_statistic_ext s JOIN pg_namespace n ON n.oid = s.stxnamespace
WHERE s.stxrelid = to_regclass(%(legacy)s)
"""

RECORD = """
INSERT INTO archive.conversions (source_table, shard, state, bound, check_name, index_name, legacy_schema, legacy_name,
                                 before)
VALUES (%(table)s, %(shard)s, 'preparing', %(bound)s, %(check)s, %(index)s, %(schema)s, %(legacy)s, %(before)s)
ON CONFLICT (source_table, shard) DO UPDATE SET
    state = 'preparing', bound = excluded.bound, check_name = excluded.check_name, index_name = excluded.index_name,
    legacy_schema = excluded.legacy_schema, legacy_name = excluded.legacy_name, before = excluded.before,
    after = NULL, error = NULL, started_at = clock_timestamp(), finished_at = NULL
"""


def plan(shard: Shard, conversion: Conversion) -> Plan:
    """Lay out what `convert` would do; nothing is changed.

    Args:
        shard: where the table is.
        conversion: which table.

    Raises:
        UserError: the database does not answer, or there is no such table.
    """
    names = _names(shard, conversion)
    with shard.owner() as connection:
        _prepare_session(connection, conversion.table)
        return preflight(connection, names, conversion.zone)


def convert(
    shard: Shard,
    conversion: Conversion,
    *,
    on_step: Callable[[Step], None] = lambda _: None,
    policy: LockPolicy | None = None,
    sleep: Callable[[float], None] = time.sleep,
    rng: random.Random | None = None,
) -> Report:
    """Convert the table; a converted one is left as it is, and months are made ahead in both cases.

    Args:
        shard: where the table is.
        conversion: which table, and to what.
        on_step: hears of each step.
        policy: how the lock is asked for.
        sleep: waits between two attempts.
        rng: jitters the waits.

    Returns:
        What was done.

    Raises:
        ConversionRefusedError: something is in the way; nothing was changed.
        ConversionBusyError: another run is at work on the table.
        ConversionError: the lock was not to be had, or the result was not what was there before; the table is as it
            was, and what the attempt added is removed.
    """
    started = time.monotonic()
    worker = _Worker(shard, conversion, policy or LockPolicy(), on_step, sleep, rng or random.Random())  # noqa: S311 - jitter
    with worker.connected():
        found = capture(worker.connection, conversion.table)
        if found.kind == "p":
            worker.clean()
            worker.record_converted(found)
            made = worker.premake()
            return Report(Outcome.UNCHANGED, made=made, seconds=time.monotonic() - started)
        worker.clean()
        report = worker.convert()
        made = worker.premake()
        worker.connection.execute(sql.SQL("ANALYZE {}").format(conversion.table.identifier))
    return Report(
        report.outcome, report.bound, report.blocked_seconds, report.attempts, made, time.monotonic() - started
    )


def rollback(
    shard: Shard,
    conversion: Conversion,
    *,
    on_step: Callable[[Step], None] = lambda _: None,
    policy: LockPolicy | None = None,
    sleep: Callable[[float], None] = time.sleep,
    rng: random.Random | None = None,
) -> Report:
    """Give the plain table back, with the rows of all partitions; clean up after an attempt that did not end.

    Rows of the premade months are copied into the old table while everybody waits, so this is quick for as long as
    they are few.

    Args:
        shard: where the table is.
        conversion: which table.
        on_step: hears of each step.
        policy: how the lock is asked for.
        sleep: waits between two attempts.
        rng: jitters the waits.

    Returns:
        What was done; UNCHANGED for a table that is plain.

    Raises:
        ConversionRefusedError: the old table is no partition any more, or something is in the way.
        ConversionBusyError: another run is at work on the table.
        ConversionError: the lock was not to be had, or the result differs; the table is partitioned as before.
    """
    started = time.monotonic()
    worker = _Worker(shard, conversion, policy or LockPolicy(), on_step, sleep, rng or random.Random())  # noqa: S311 - jitter
    with worker.connected():
        worker.clean()
        if capture(worker.connection, conversion.table).kind != "p":
            return Report(Outcome.UNCHANGED, seconds=time.monotonic() - started)
        report = worker.roll_back()
        worker.connection.execute(sql.SQL("ANALYZE {}").format(conversion.table.identifier))
    return Report(report.outcome, None, report.blocked_seconds, report.attempts, (), seconds=time.monotonic() - started)


def conversion_state(shard: Shard, table: SourceTable) -> ConversionState:
    """Tell where the conversion of a table stands; any role may ask.

    Args:
        shard: where the table is.
        table: to be converted.

    Raises:
        ConversionError: there is no such table.
    """
    names = Names(table, "")
    with shard.transaction() as connection:
        connection.execute("SET LOCAL TimeZone = 'UTC'")
        connection.execute("SET LOCAL DateStyle = 'ISO, YMD'")
        row = connection.execute(
            STATE,
            {
                "lock": _lock_name(table),
                "check": names.check,
                "index": names.index,
                "table": table.identifier.as_string(None),
            },
        ).fetchone()
    if row is None:
        raise ConversionError(f"there is no table {table} in the database; check ARCHIVE_TABLE")
    kind, running, bound, indexes, now = row
    days = None if bound is None else (bound - now).total_seconds() / 86400
    leftovers = (*([f"CHECK {names.check}"] if bound is not None else []), *(f"index {each}" for each in indexes))
    finding = None
    remedy = "run python -m archive_pipeline.convert rollback --yes, which removes it, or apply --yes, which goes on"
    if bound is not None and not running:
        finding = (
            f"an attempt to convert {table} ended early and left CHECK {names.check}, which refuses rows from "
            f"{bound:%Y-%m-%d %H:%M} UTC on, {'now' if (days or 0) <= 0 else f'in {days:.1f} days'}; {remedy}"
        )
    elif bound is not None and (days or 0) < NEAR_BOUND_DAYS:
        finding = (
            f"the conversion of {table} is still at work, and its CHECK refuses rows from {bound:%Y-%m-%d %H:%M} UTC "
            f"on, in {days:.1f} days; end it in time (pg_stat_activity)"
        )
    elif indexes and not running:
        finding = f"an attempt to convert {table} ended early and left {' and '.join(leftovers)}; {remedy}"
    return ConversionState(kind == "p", running, bound, days, leftovers, finding)


class _Worker:
    """One run on one table, with its connection and the lock that keeps others out."""

    def __init__(
        self,
        shard: Shard,
        conversion: Conversion,
        policy: LockPolicy,
        on_step: Callable[[Step], None],
        sleep: Callable[[float], None],
        rng: random.Random,
    ) -> None:
        self.shard = shard
        self.conversion = conversion
        self.table = conversion.table
        self.policy = policy
        self.on_step = on_step
        self.sleep = sleep
        self.rng = rng
        self.names = _names(shard, conversion)
        self.connection: Connection

    @contextmanager
    def connected(self) -> Iterator[None]:
        with self.shard.owner() as connection:
            self.connection = connection
            _prepare_session(connection, self.table)
            (mine,) = connection.execute(
                "SELECT pg_try_advisory_lock(hashtextextended(%s, 0))", [_lock_name(self.table)]
            ).fetchone() or (False,)
            if not mine:
                raise ConversionBusyError(
                    f"another run is converting {self.table} or rolling its conversion back; wait for its end, "
                    "python -m archive_pipeline.convert status tells"
                )
            yield

    def convert(self) -> Report:
        planned = preflight(self.connection, self.names, self.conversion.zone)
        if planned.blockers:
            raise ConversionRefusedError(str(self.table), [str(each) for each in planned.blockers])
        self._record(planned)
        try:
            self.on_step(Step.RECORDED)
            self._make_schema()
            key = statements.key_columns(planned.before)
            if planned.before.primary_key is None or planned.before.primary_key.columns != key:
                self._build_index(self.table, key)
            self.on_step(Step.INDEXED)
            self._with_lock([self.table], lambda: self.connection.execute(_encoded(self._check(planned))))
            self.on_step(Step.CHECKED)
            self.connection.execute(_encoded(statements.validate_check(self.names)))
            self.on_step(Step.VALIDATED)
            report, before, after = self._swap(planned)
        except BaseException as error:
            self._abort(error)
            if isinstance(error, psycopg.Error):
                raise ConversionError(_sentence(error, self.table, "converted")) from None
            raise
        self.on_step(Step.COMMITTED)
        self._record_end("converted", before=before, after=after)
        return report

    def roll_back(self) -> Report:
        now = capture(self.connection, self.table)
        plain = self._plain()
        key = plain.primary_key
        self._require_legacy(now)
        try:
            if key is not None and now.primary_key is not None and key.columns != now.primary_key.columns:
                self._build_index(self.names.legacy, key.columns)
            self.on_step(Step.INDEXED)
            report, after = self._unswap(plain)
        except BaseException as error:
            self._clean_quietly()
            if isinstance(error, psycopg.errors.UniqueViolation):
                raise ConversionError(
                    f"{self.table} was not rolled back: rows of different months have the same primary key of old, "
                    f"({', '.join(key.columns if key else ())}); find them with GROUP BY … HAVING count(*) > 1"
                ) from None
            if isinstance(error, psycopg.Error):
                raise ConversionError(_sentence(error, self.table, "rolled back")) from None
            raise
        self.on_step(Step.COMMITTED)
        self._record_end("rolled back", after=after)
        return report

    def clean(self) -> None:
        """Remove what an attempt that did not end has left."""
        self._clean(self.connection)
        self.on_step(Step.CLEANED)

    def premake(self) -> tuple[MonthPartition, ...]:
        made = premake(
            self.connection,
            self.table,
            self.conversion.partition_schema,
            self.conversion.zone,
            self.conversion.premade_months,
        )
        self.on_step(Step.MADE)
        return tuple(made)

    def record_converted(self, found: TableObjects) -> None:
        """A run that was killed after the swap has not said so."""
        with self.shard.transaction() as connection:
            connection.execute(
                "UPDATE archive.conversions SET state = 'converted', after = %s, error = NULL, "
                "finished_at = clock_timestamp() WHERE source_table = %s AND shard = %s AND state <> 'converted'",
                (Jsonb(as_json(found)), str(self.table), self.shard.name),
            )

    def _check(self, planned: Plan) -> str:
        return statements.add_check(self.names, planned.bound)

    def _record(self, planned: Plan) -> None:
        with self.shard.transaction() as connection:
            connection.execute(
                RECORD,
                {
                    "table": str(self.table),
                    "shard": self.shard.name,
                    "bound": planned.bound,
                    "check": self.names.check,
                    "index": self.names.index,
                    "schema": self.names.legacy.schema,
                    "legacy": self.names.legacy.name,
                    "before": Jsonb(as_json(planned.before)),
                },
            )

    def _record_end(
        self,
        state: str,
        *,
        before: TableObjects | None = None,
        after: TableObjects | None = None,
        error: str | None = None,
    ) -> None:
        with self.shard.transaction() as connection:
            connection.execute(
                "UPDATE archive.conversions SET state = %s, before = coalesce(%s, before), after = %s, error = %s, "
                "finished_at = clock_timestamp() WHERE source_table = %s AND shard = %s",
                (
                    state,
                    None if before is None else Jsonb(as_json(before)),
                    None if after is None else Jsonb(as_json(after)),
                    error,
                    str(self.table),
                    self.shard.name,
                ),
            )

    def _abort(self, error: BaseException) -> None:
        cleaned = self._clean_quietly()
        said = str(error) if isinstance(error, ConversionError | ConversionRefusedError) else type(error).__name__
        try:
            self._record_end("aborted", error=said if cleaned else f"{said}; what it added is still there")
        except Exception as failure:  # noqa: BLE001 - the error that ended the attempt is the one to be raised
            logger.warning(
                "the end of the conversion of %s is not on record: %s",
                self.table,
                type(failure).__name__,
                extra=event(Event.CONVERSION_UNRECORDED, table=str(self.table)),
            )

    def _clean_quietly(self) -> bool:
        try:
            # The connection of the attempt may be what broke.
            with self.shard.owner() as connection:
                _prepare_session(connection, self.table)
                self._clean(connection)
        except Exception as failure:  # noqa: BLE001 - the error that ended the attempt is the one to be raised
            logger.warning(
                "what the conversion of %s added is not removed (%s); the next run does it, and "
                "python -m archive_pipeline.convert status tells",
                self.table,
                type(failure).__name__,
                extra=event(Event.CONVERSION_LEFTOVERS, table=str(self.table)),
            )
            return False
        return True

    def _clean(self, connection: Connection) -> None:
        state = conversion_state(self.shard, self.table)
        if state.check_bound is not None:
            self._with_lock(
                [self.table], lambda: connection.execute(_encoded(statements.drop_check(self.names))), on=connection
            )
        for table in (self.table, self.names.legacy):
            for (name,) in connection.execute(
                "SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
                "WHERE i.indrelid = to_regclass(%s) AND c.relname = %s "
                "AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.indexrelid)",
                (table.identifier.as_string(None), self.names.index),
            ).fetchall():
                connection.execute(_encoded(statements.drop_index(table.schema, name)))

    def _make_schema(self) -> None:
        schema = sql.Identifier(self.names.partition_schema)
        with self.connection.transaction():
            if not self.connection.execute(
                "SELECT FROM pg_namespace WHERE nspname = %s", [self.names.partition_schema]
            ).rowcount:
                self.connection.execute(sql.SQL("CREATE SCHEMA {}").format(schema))
                # Somebody may have been given USAGE by ALTER DEFAULT PRIVILEGES … ON SCHEMAS.
                for (grantee,) in self.connection.execute(
                    "SELECT DISTINCT pg_get_userbyid(nullif(g.grantee, 0)) FROM pg_namespace n "
                    "CROSS JOIN LATERAL aclexplode(n.nspacl) g WHERE n.nspname = %s AND g.grantee <> n.nspowner",
                    [self.names.partition_schema],
                ).fetchall():
                    who = sql.SQL("PUBLIC") if grantee is None else sql.Identifier(grantee)
                    self.connection.execute(sql.SQL("REVOKE ALL ON SCHEMA {} FROM {}").format(schema, who))
            if self.names.reader is not None:
                self.connection.execute(
                    sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(schema, sql.Identifier(self.names.reader))
                )

    def _build_index(self, table: SourceTable, columns: Sequence[str]) -> None:
        for attempt in tenacity.Retrying(
            sleep=self.sleep,
            wait=lambda state: self.policy.pause(state.attempt_number, self.rng),
            stop=tenacity.stop_after_attempt(3),
            retry=tenacity.retry_if_exception_type((psycopg.errors.DeadlockDetected, psycopg.errors.LockNotAvailable)),
            reraise=True,
        ):
            with attempt:
                self.connection.execute(_encoded(statements.drop_index(table.schema, self.names.index)))
                self.connection.execute(_encoded(statements.build_index(self.names.index, table, columns)))

    def _swap(self, planned: Plan) -> tuple[Report, TableObjects, TableObjects]:
        done: list[tuple[TableObjects, TableObjects]] = []

        def exchange(before: TableObjects) -> None:
            self.connection.execute(_encoded(statements.script(statements.swap(before, self.names, planned.bound))))
            after = read(self.connection, self.table)
            found = differences(statements.comparable(statements.partitioned(before)), statements.comparable(after))
            found += [
                sentence
                for (sentence,) in self.connection.execute(
                    EXPOSED, {"legacy": self.names.legacy.identifier.as_string(None), "reader": self.names.reader}
                )
            ]
            if found:
                raise ConversionError(f"{self.table} would not be what it was: {'; '.join(found)}; nothing was changed")
            done.append((before, after))

        def prepare() -> tuple[TableObjects, Sequence[SourceTable]]:
            # Read again: others may have changed the table while the index was built.
            before = without_additions(read(self.connection, self.table), self.names)
            again = plan_of(before, planned.facts, self.names, planned.zone, planned.bound)
            if again.blockers:
                raise ConversionRefusedError(str(self.table), [str(each) for each in again.blockers])
            return before, [SourceTable(each.schema, each.name) for each in before.references if each.lockable]

        report = self._exchange(prepare, exchange, Outcome.CONVERTED, planned.bound)
        return report, *done[-1]

    def _unswap(self, plain: TableObjects) -> tuple[Report, TableObjects]:
        done: list[TableObjects] = []

        def prepare() -> tuple[TableObjects, Sequence[SourceTable]]:
            now = read(self.connection, self.table)
            self._require_legacy(now)
            return now, [SourceTable(each.schema, each.name) for each in now.references if each.lockable]

        def exchange(now: TableObjects) -> None:
            pairs = self.connection.execute(
                COUNTERPARTS, {"legacy": self.names.legacy.identifier.as_string(None)}
            ).fetchall()
            written = statements.unswap(
                now,
                plain,
                self.names,
                indexes=[(was, becomes) for kind, was, becomes in pairs if kind == "index"],
                constraints=[(was, becomes) for kind, was, becomes in pairs if kind == "constraint"],
                statistics=[(schema, name) for kind, schema, name in pairs if kind == "statistics"],
            )
            # The copy of the premade months' rows takes as long as it takes.
            self.connection.execute("SET LOCAL statement_timeout = 0")
            self.connection.execute(_encoded(statements.script(written)))
            after = read(self.connection, self.table)
            wanted = statements.comparable(statements.unpartitioned(now, plain))
            if found := differences(wanted, statements.comparable(after)):
                raise ConversionError(f"{self.table} would not be what it was: {'; '.join(found)}; nothing was changed")
            done.append(after)

        return self._exchange(prepare, exchange, Outcome.ROLLED_BACK, None), done[-1]

    def _exchange(
        self,
        prepare: Callable[[], tuple[TableObjects, Sequence[SourceTable]]],
        exchange: Callable[[TableObjects], None],
        outcome: Outcome,
        bound: datetime | None,
    ) -> Report:
        """One transaction that exchanges the tables, tried again while the lock is not to be had."""
        table = self.table.identifier.as_string(None)

        def once(attempt: int) -> float:
            with self.connection.transaction():
                self.connection.execute(SESSION)
                self._quiet(self.connection)
                objects, referenced = prepare()
                version = self.connection.execute(VERSION_OF_ROWS, [table]).fetchone()
                # Inserts lock the table and then the rows they refer to, many transactions the other way round:
                # either order can be the one that never succeeds, so they take turns.
                tables = [self.table, *referenced] if attempt % 2 else [*referenced, self.table]
                asked = time.monotonic()
                self._lock(
                    self.connection, tables, self.policy.timeout(attempt), first=statements.lock_dependants(objects)
                )
                if self.connection.execute(VERSION_OF_ROWS, [table]).fetchone() != version:
                    raise psycopg.errors.LockNotAvailable("the table was changed just before the lock")
                self.on_step(Step.LOCKED)
                try:
                    exchange(objects)
                except psycopg.errors.QueryCanceled:
                    raise ConversionError(
                        f"{self.table} is as it was: the swap was not done in {SWAP_LIMIT_SECONDS:g} s, for which "
                        "everybody would have waited; run it again when the server is less busy"
                    ) from None
                self.on_step(Step.SWAPPED)
            return time.monotonic() - asked

        seconds, attempts = self._persistently(once, [self.table])
        return Report(outcome, bound, seconds, attempts)

    def _with_lock(
        self, tables: Sequence[SourceTable], change: Callable[[], object], *, on: Connection | None = None
    ) -> None:
        connection = on or self.connection

        def once(attempt: int) -> None:
            with connection.transaction():
                self._quiet(connection)
                self._lock(connection, tables, self.policy.timeout(attempt))
                change()

        self._persistently(once, tables, on=connection)

    def _quiet(self, connection: Connection) -> None:
        """Keep other DDL out; readers and writers go on."""
        connection.execute(
            f"SET LOCAL idle_in_transaction_session_timeout = '{SWAP_LIMIT_SECONDS:.0f}s'; "
            f"SET LOCAL lock_timeout = '{QUIET_LOCK_SECONDS:.0f}s'; SET LOCAL statement_timeout = 0".encode()
        )
        connection.execute(sql.SQL("LOCK TABLE ONLY {} IN SHARE UPDATE EXCLUSIVE MODE").format(self.table.identifier))

    def _lock(
        self, connection: Connection, tables: Sequence[SourceTable], timeout: float, *, first: Sequence[str] = ()
    ) -> None:
        # lock_timeout counts anew for each table, statement_timeout for all of them together.
        milliseconds = max(1, round(timeout * 1000))
        connection.execute(
            f"SET LOCAL lock_timeout = {milliseconds}; SET LOCAL statement_timeout = {milliseconds}".encode()
        )
        if first:
            connection.execute(_encoded(statements.script(first)))
        connection.execute(
            sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(
                sql.SQL(", ").join(each.identifier for each in tables)
            )
        )
        connection.execute(f"SET LOCAL statement_timeout = '{SWAP_LIMIT_SECONDS:.0f}s'".encode())

    def _persistently(
        self, once: Callable[[int], T], tables: Sequence[SourceTable], *, on: Connection | None = None
    ) -> tuple[T, int]:
        retrying = tenacity.Retrying(
            sleep=self.sleep,
            wait=lambda state: self.policy.pause(state.attempt_number, self.rng),
            stop=tenacity.stop_after_attempt(self.policy.attempts),
            retry=tenacity.retry_if_exception_type(UNAVAILABLE),
            reraise=True,
        )
        try:
            for attempt in retrying:
                with attempt:
                    number = attempt.retry_state.attempt_number
                    result = once(number)
        except UNAVAILABLE:
            raise ConversionError(
                f"{self.table} is as it was: it was not to be locked in {self.policy.attempts} attempts, each of which "
                f"let nobody wait longer than {self.policy.longest_seconds:g} s; {self._blocking(on, tables)}"
            ) from None
        return result, number

    def _blocking(self, on: Connection | None, tables: Sequence[SourceTable]) -> str:
        row = (
            (on or self.connection).execute(BLOCKING, [[each.identifier.as_string(None) for each in tables]]).fetchone()
        )
        if not row or not row[0]:
            return "nobody holds a lock now, run it again"
        count, pids, seconds = row
        return (
            f"{count} session(s) hold locks on it, the oldest transaction for {seconds or 0:,.0f} s (pid "
            f"{', '.join(map(str, pids[:5]))}); end them, or wait, and run it again"
        )

    def _plain(self) -> TableObjects:
        with self.shard.transaction() as connection:
            row = connection.execute(
                "SELECT before FROM archive.conversions WHERE source_table = %s AND shard = %s",
                (str(self.table), self.shard.name),
            ).fetchone()
        if row is None or row[0] is None:
            raise ConversionRefusedError(
                str(self.table),
                ["archive.conversions does not tell what it was before its conversion: it was partitioned by others"],
            )
        return from_json(row[0])

    def _require_legacy(self, now: TableObjects) -> None:
        attached = self.connection.execute(
            "SELECT NOT inhdetachpending FROM pg_inherits "
            "WHERE inhrelid = to_regclass(%s) AND inhparent = to_regclass(%s)",
            (self.names.legacy.identifier.as_string(None), self.table.identifier.as_string(None)),
        ).fetchone()
        blockers = [str(each) for each in dependant_blockers(now.dependants, self.table)]
        if attached is None or not attached[0]:
            blockers.append(
                f"{self.names.legacy} is not its partition any more (detached or pruned), and there is no plain table "
                "to go back to: restore the months you need from the archive"
            )
        if blockers:
            raise ConversionRefusedError(str(self.table), blockers)


def _prepare_session(connection: Connection, table: SourceTable) -> None:
    # Supabase limits a statement to two minutes by role; an index over years of rows takes longer.
    connection.execute(
        "SET statement_timeout = 0; SET lock_timeout = 0; SET idle_in_transaction_session_timeout = '60s'; "
        "SET row_security = off; SET TimeZone = 'UTC'; SET plan_cache_mode = force_generic_plan"
    )
    owner = connection.execute(
        "SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = to_regclass(%s) AND relowner <> "
        "(SELECT oid FROM pg_roles WHERE rolname = current_user) AND pg_has_role(relowner, 'MEMBER')",
        [table.identifier.as_string(None)],
    ).fetchone()
    if owner is not None:
        # What is made then belongs to the table's owner, as the table does.
        connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(owner[0])))


def _names(shard: Shard, conversion: Conversion) -> Names:
    with shard.transaction() as connection:
        (reader,) = connection.execute("SELECT current_user").fetchone() or (None,)
    return Names(conversion.table, conversion.partition_schema, reader)


def _lock_name(table: SourceTable) -> str:
    return f"archive conversion of {table}"


def _encoded(statement: str) -> bytes:
    # As bytes psycopg sends it as it is: one or several statements, no parameters.
    return statement.encode()


def _sentence(error: psycopg.Error, table: SourceTable, what: str) -> str:
    said = (error.diag.message_primary or type(error).__name__).rstrip(".")
    return f"{table} was not {what}, and is as it was: Postgres said {said!r} ({error.sqlstate or 'connection lost'})"
