"""Keeps Dagster's event log bounded: deletes runs and events that nothing shows any more.

Belongs here: which of them those are, and deleting them. With `dagster_events` the one place that touches Dagster's
private tables. Does not: when it happens or for how long things are kept (`jobs`), the pipeline's own tables
(`history`).

Why: an event takes 1.7 kB and a tick writes twenty of them, 25 MB a day for an idle fleet, and Dagster OSS keeps them
all; its `retention` knows ticks of schedules and sensors only.

No status may change. Dagster derives the status of a partition from its newest materialization, its newest planned
materialization and the run of that one; of a check from its newest evaluation. So these, and the runs they belong to,
stay however old they are: at most a few per partition. tests/sync_pipeline/test_retention.py holds it to be true
against Postgres storage, with Dagster's status cache and without.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import dagster as dg
import sqlalchemy as sa
from dagster._core.storage.event_log.schema import (
    AssetCheckExecutionsTable,
    AssetEventTagsTable,
    SqlEventLogStorageTable,
)
from dagster._core.storage.event_log.sql_event_log import SqlEventLogStorage

from scaling.errors import UserError

RUNS_PER_BATCH = 100
EVENTS_PER_BATCH = 2000
SUPERSEDED_TYPES = (
    dg.DagsterEventType.ASSET_MATERIALIZATION.value,
    dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED.value,
)
STATUS_TYPES = (*SUPERSEDED_TYPES, dg.DagsterEventType.ASSET_OBSERVATION.value)
EVALUATED = ("SUCCEEDED", "FAILED")

_events = SqlEventLogStorageTable
_checks = AssetCheckExecutionsTable


@dataclass(frozen=True, slots=True)
class Retention:
    """How long things are kept that no status depends on."""

    successful_runs: timedelta
    failed_runs: timedelta
    superseded_events: timedelta


@dataclass(slots=True)
class Purge:
    """What a purge removed, or in a dry run would have; it grows while the purge goes on."""

    runs: int = 0
    runs_kept: int = 0
    events: int = 0
    check_evaluations: int = 0
    superseded_events: int = 0
    finished: bool = False
    event_log_bytes: int = field(default=0)

    def numbers(self) -> dict[str, int | bool]:
        """The counters by name."""
        return {
            "runs_deleted": self.runs,
            "runs_kept_for_a_status": self.runs_kept,
            "events_deleted": self.events + self.superseded_events,
            "superseded_events_deleted": self.superseded_events,
            "check_evaluations_deleted": self.check_evaluations,
            "event_log_bytes": self.event_log_bytes,
            "finished": self.finished,
        }


def purge(
    instance: dg.DagsterInstance,
    *,
    job: str,
    asset: dg.AssetKey,
    retention: Retention,
    out_of_time: Callable[[], bool],
    dry_run: bool = False,
) -> Purge:
    """Delete old runs of a job, and events of an asset's partitions that newer ones supersede.

    Every batch stands for itself: a purge that is stopped, or killed, leaves the rest to the next one.

    Args:
        instance: whose event log.
        job: whose runs; those of other jobs stay.
        asset: whose superseded events, of whatever run.
        retention: what is old.
        out_of_time: asked before each batch.
        dry_run: count only.

    Returns:
        What was removed, and whether everything old was.

    Raises:
        UserError: the instance does not keep its event log in Postgres.
    """
    storage = instance.event_log_storage
    if not isinstance(storage, SqlEventLogStorage) or type(storage).__name__ != "PostgresEventLogStorage":
        raise UserError("only an event log in Postgres can be purged; see dagster.yaml")
    now = _now(storage)
    done = Purge()
    finished = [
        _purge_runs(
            instance,
            storage,
            dg.RunsFilter(job_name=job, statuses=statuses, created_before=now - age),
            done,
            out_of_time=out_of_time,
            dry_run=dry_run,
        )
        for statuses, age in (
            ([dg.DagsterRunStatus.SUCCESS], retention.successful_runs),
            ([dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED], retention.failed_runs),
        )
    ] + [
        _purge_superseded(
            storage, asset, kind, now - retention.superseded_events, done, out_of_time=out_of_time, dry_run=dry_run
        )
        for kind in SUPERSEDED_TYPES
    ]
    done.finished = all(finished)
    with storage.index_connection() as connection:
        done.event_log_bytes = int(
            connection.execute(sa.select(sa.func.pg_total_relation_size(_events.name))).scalar_one()
        )
    return done


def _purge_runs(
    instance: dg.DagsterInstance,
    storage: SqlEventLogStorage,
    old: dg.RunsFilter,
    done: Purge,
    *,
    out_of_time: Callable[[], bool],
    dry_run: bool,
) -> bool:
    for run_ids in _pages(instance, old):
        if out_of_time():
            return False
        with storage.index_transaction() as connection:
            kept = _runs_with_a_status(connection, run_ids)
            doomed = [run_id for run_id in run_ids if run_id not in kept]
            done.runs_kept += len(kept)
            done.runs += len(doomed)
            if dry_run:
                done.events += _count(connection, _events.c.run_id.in_(doomed))
                done.check_evaluations += _count(connection, _checks.c.run_id.in_(doomed))
                continue
            # The rows of one page in one statement each; instance.delete_run would take 30 ms a run for them and
            # forget the evaluations. The runs go last, so that a killed purge finds them again.
            done.check_evaluations += connection.execute(_checks.delete().where(_checks.c.run_id.in_(doomed))).rowcount
            of_doomed = sa.select(_events.c.id).where(_events.c.run_id.in_(doomed), _events.c.asset_key.isnot(None))
            connection.execute(AssetEventTagsTable.delete().where(AssetEventTagsTable.c.event_id.in_(of_doomed)))
            done.events += connection.execute(_events.delete().where(_events.c.run_id.in_(doomed))).rowcount
        for run_id in doomed:
            instance.compute_log_manager.delete_logs(prefix=[run_id])
            instance.delete_run(run_id)
    return True


def _pages(instance: dg.DagsterInstance, old: dg.RunsFilter) -> Iterator[list[str]]:
    """Old runs, the oldest first; the next page is read before a page may be deleted, its cursor with it."""

    def read(cursor: str | None) -> list[str]:
        records = instance.get_run_records(old, limit=RUNS_PER_BATCH, ascending=True, cursor=cursor)
        return [record.dagster_run.run_id for record in records]

    page = read(None)
    while page:
        following = read(page[-1]) if len(page) == RUNS_PER_BATCH else []
        yield page
        page = following


def _runs_with_a_status(connection: sa.Connection, run_ids: Sequence[str]) -> set[str]:
    """Which of these runs hold the newest event of their kind of any asset partition, or of any check."""
    newer = _events.alias()
    same_kind = sa.and_(
        newer.c.asset_key == _events.c.asset_key,
        newer.c.dagster_event_type == _events.c.dagster_event_type,
        newer.c.id > _events.c.id,
    )
    of_these = sa.and_(
        _events.c.run_id.in_(run_ids),
        _events.c.dagster_event_type.in_(STATUS_TYPES),
        _events.c.asset_key.isnot(None),
    )
    later = _checks.alias()
    same_check = sa.and_(
        later.c.asset_key == _checks.c.asset_key,
        later.c.check_name == _checks.c.check_name,
        later.c.partition.is_not_distinct_from(_checks.c.partition),
        later.c.id > _checks.c.id,
    )
    queries = (
        # Two queries, because an index serves `=` and IS NULL but not IS NOT DISTINCT FROM.
        sa.select(_events.c.run_id).where(
            of_these,
            _events.c.partition.isnot(None),
            ~sa.exists().where(same_kind, newer.c.partition == _events.c.partition),
        ),
        sa.select(_events.c.run_id).where(
            of_these, _events.c.partition.is_(None), ~sa.exists().where(same_kind, newer.c.partition.is_(None))
        ),
        sa.select(_checks.c.run_id).where(_checks.c.run_id.in_(run_ids), ~sa.exists().where(same_check)),
        sa.select(_checks.c.run_id).where(
            _checks.c.run_id.in_(run_ids),
            _checks.c.execution_status.in_(EVALUATED),
            ~sa.exists().where(same_check, later.c.execution_status.in_(EVALUATED)),
        ),
    )
    return {str(run_id) for query in queries for run_id in connection.execute(query.distinct()).scalars()}


def _purge_superseded(
    storage: SqlEventLogStorage,
    asset: dg.AssetKey,
    kind: str,
    before: datetime,
    done: Purge,
    *,
    out_of_time: Callable[[], bool],
    dry_run: bool,
) -> bool:
    newer = _events.alias()
    after = 0
    while not out_of_time():
        with storage.index_transaction() as connection:
            doomed = list(
                connection.execute(
                    sa.select(_events.c.id)
                    .where(
                        _events.c.asset_key == asset.to_string(),
                        _events.c.dagster_event_type == kind,
                        _events.c.partition.isnot(None),
                        _events.c.timestamp < before.replace(tzinfo=None),  # the column is UTC without saying so
                        _events.c.id > after,
                        sa.exists().where(
                            newer.c.asset_key == _events.c.asset_key,
                            newer.c.dagster_event_type == _events.c.dagster_event_type,
                            newer.c.partition == _events.c.partition,
                            newer.c.id > _events.c.id,
                        ),
                    )
                    .order_by(_events.c.id)
                    .limit(EVENTS_PER_BATCH)
                ).scalars()
            )
            done.superseded_events += len(doomed)
            if doomed and not dry_run:
                connection.execute(AssetEventTagsTable.delete().where(AssetEventTagsTable.c.event_id.in_(doomed)))
                connection.execute(_events.delete().where(_events.c.id.in_(doomed)))
        if len(doomed) < EVENTS_PER_BATCH:
            return True
        after = doomed[-1]
    return False


def _count(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> int:
    return int(connection.execute(sa.select(sa.func.count()).where(condition)).scalar_one())


def _now(storage: SqlEventLogStorage) -> datetime:
    with storage.index_connection() as connection:
        moment: datetime = connection.execute(sa.select(sa.func.now())).scalar_one()
    return moment.astimezone(UTC)
