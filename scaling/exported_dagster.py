"""What is exported of Dagster: its runs, the ticks of schedules and sensors, its daemons.

Belongs here: reading the tables of Dagster's storage. Does not: dagster itself, which takes 2 s and 150 MB to import
and has no call for most of this.

The tables are those of dagster 1.13, which is pinned to the minor; tests/scaling/test_exported_dagster.py writes them
through a DagsterInstance and reads them here. They keep runs that were killed and runs that still wait, which a push
from the run itself would miss. `update_timestamp` and the times of ticks are UTC without saying so.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from prometheus_client.core import Metric

from scaling.databases import Connection, Shard
from scaling.exported import reading
from scaling.exposition import counter, gauge, histogram

BOUNDS = (1, 2, 5, 10, 20, 30, 45, 60, 90, 120, 300, 600, 1800, 3600, 7200, 14400)
LOCATION = "coalesce(substring(repository.value FROM '@(.+)$'), 'unknown')"
OF_RUN = "LEFT JOIN run_tags repository ON repository.run_id = r.run_id AND repository.key = '.dagster/repository'"
WAITING = ("NOT_STARTED", "QUEUED", "STARTING", "STARTED", "CANCELING")
OWN_FAILURES = ("RUN_EXCEPTION", "STEP_FAILURE", "JOB_INITIALIZATION_FAILURE")
"""Reasons a run gives itself; a run that was killed has another one, or none."""

Read = Callable[[], Sequence[Metric]]


def parts(shard: Shard, *, limit_seconds: float) -> Mapping[str, Read]:
    """What can be read, by name.

    Args:
        shard: Dagster's database.
        limit_seconds: after which it gives up on a statement.
    """
    reads: dict[str, Callable[[Connection], Sequence[Metric]]] = {
        "dagster_runs": runs,
        "dagster_ticks": ticks,
        "dagster_daemons": daemons,
    }
    return {name: partial(_read, shard, limit_seconds, read) for name, read in reads.items()}


def _read(shard: Shard, limit_seconds: float, read: Callable[[Connection], Sequence[Metric]]) -> Sequence[Metric]:
    with reading(shard, limit_seconds) as connection:
        return read(connection)


def runs(connection: Connection) -> Sequence[Metric]:
    """Runs that wait or are at work, and those that ended since midnight UTC.

    Args:
        connection: in a transaction of Dagster's database.
    """
    under_way = connection.execute(
        f"""
        SELECT {LOCATION}, r.status, count(*), max(greatest(0, extract(epoch FROM now())
            - coalesce(r.start_time, extract(epoch FROM r.create_timestamp AT TIME ZONE 'UTC'))))::float8
        FROM runs r {OF_RUN} WHERE r.status = ANY(%s) GROUP BY 1, 2
        """.encode(),  # noqa: S608 - constants only
        [list(WAITING)],
    ).fetchall()
    ended = connection.execute(
        f"""
        SELECT {LOCATION}, r.pipeline_name, r.status, coalesce(reason.value, ''),
            width_bucket(took.seconds, %(bounds)s::float8[]) AS bucket, count(*), sum(took.seconds)::float8
        FROM runs r {OF_RUN}
        LEFT JOIN run_tags reason ON reason.run_id = r.run_id AND reason.key = 'dagster/failure_reason'
        CROSS JOIN LATERAL (SELECT greatest(0, coalesce(r.end_time, extract(epoch FROM r.update_timestamp
                AT TIME ZONE 'UTC')) - coalesce(r.start_time, extract(epoch FROM r.create_timestamp
                AT TIME ZONE 'UTC')))::float8 AS seconds) took
        WHERE r.status IN ('SUCCESS', 'FAILURE', 'CANCELED')
          AND r.update_timestamp >= date_trunc('day', now() AT TIME ZONE 'UTC')
          AND coalesce(r.end_time, extract(epoch FROM r.update_timestamp AT TIME ZONE 'UTC'))
              >= extract(epoch FROM date_trunc('day', now(), 'UTC'))
        GROUP BY 1, 2, 3, 4, 5 ORDER BY 6 DESC
        """.encode(),  # noqa: S608 - constants only
        # A value on a bound belongs below it, and width_bucket counts it above.
        {"bounds": [bound + 1e-6 for bound in BOUNDS]},
    ).fetchall()
    locations = sorted({row[0] for row in [*under_way, *ended]} | {"sync_pipeline", "archive_pipeline", "scaling"})
    durations = {location: ([0.0] * (len(BOUNDS) + 1), 0.0) for location in locations}
    for location, _, _, _, bucket, count, seconds in ended:
        counts, total = durations[location]
        counts[bucket] += count
        durations[location] = (counts, total + seconds)
    return [
        gauge(
            "pipeline_dagster_runs",
            "Runs that wait or are at work, by Dagster's status; a killed one stays until run monitoring finds it.",
            [((location, status), count) for location, status, count, _ in under_way]
            + [((location, status), 0) for location in locations for status in WAITING],
            ["location", "status"],
        ),
        gauge(
            "pipeline_dagster_oldest_run_age_seconds",
            "How long the oldest of them has waited, or been at work.",
            [((location, status), age) for location, status, _, age in under_way]
            + [((location, status), 0) for location in locations for status in WAITING],
            ["location", "status"],
            together=max,
        ),
        counter(
            "pipeline_dagster_runs_ended",
            "Runs that ended since midnight UTC; reason: Dagster's of a failure, for example RUN_EXCEPTION.",
            [((location, job, status.lower(), reason), count) for location, job, status, reason, _, count, _ in ended]
            + [
                ((location, "", outcome, ""), 0)
                for location in locations
                for outcome in ("success", "failure", "canceled")
            ],
            ["location", "job", "outcome", "reason"],
        ),
        counter(
            "pipeline_dagster_runs_killed",
            "Runs that failed since midnight UTC without failing themselves: killed, lost, or never started.",
            [
                ((location,), count)
                for location, _, status, reason, _, count, _ in ended
                if status == "FAILURE" and reason not in OWN_FAILURES
            ]
            + [((location,), 0) for location in locations],
            ["location"],
        ),
        histogram(
            "pipeline_dagster_run_duration_seconds",
            "How long runs took that ended since midnight UTC, killed ones included.",
            [((location,), counts, total) for location, (counts, total) in durations.items()],
            BOUNDS,
            ["location"],
        ),
    ]


def ticks(connection: Connection) -> Sequence[Metric]:
    """What schedules and sensors did since midnight UTC.

    Args:
        connection: in a transaction of Dagster's database.
    """
    named = {
        selector: _named(body, kind, status)
        for selector, body, kind, status in connection.execute(
            "SELECT selector_id, instigator_body, instigator_type, status FROM instigators"
        )
    }
    counted = connection.execute(
        """
        SELECT i.selector_id, k.status, count(*) FROM instigators i JOIN job_ticks k ON k.selector_id = i.selector_id
         AND k.timestamp >= date_trunc('day', now() AT TIME ZONE 'UTC')
        GROUP BY 1, 2
        """
    ).fetchall()
    last = connection.execute(
        """
        SELECT i.selector_id, k.status, extract(epoch FROM (now() AT TIME ZONE 'UTC') - k.timestamp)::float8
        FROM instigators i CROSS JOIN LATERAL (
            SELECT status, timestamp FROM job_ticks WHERE selector_id = i.selector_id ORDER BY timestamp DESC LIMIT 1) k
        """
    ).fetchall()
    labels = ["location", "name", "kind"]
    return [
        counter(
            "pipeline_dagster_ticks",
            "Ticks of schedules and sensors since midnight UTC, by how they went.",
            [((*named[selector][:3], status.lower()), count) for selector, status, count in counted],
            [*labels, "status"],
        ),
        gauge(
            "pipeline_dagster_tick_age_seconds",
            "Since the newest tick.",
            [(named[selector][:3], max(0.0, age)) for selector, _, age in last],
            labels,
            together=max,
        ),
        gauge(
            "pipeline_dagster_tick_failed",
            "Whether the newest tick failed, 1 or 0.",
            [(named[selector][:3], float(status == "FAILURE")) for selector, status, _ in last],
            labels,
            together=max,
        ),
        gauge(
            "pipeline_dagster_automation_on",
            "Whether a schedule or sensor is on, 1 or 0; absent until somebody or its default switched it.",
            [(each[:3], float(each[3])) for each in named.values()],
            labels,
            together=max,
        ),
    ]


def _named(body: str, kind: str, status: str) -> tuple[str, str, str, bool]:
    """Location, name, kind of a schedule or sensor, and whether it is on."""
    origin = json.loads(body).get("origin") or {}
    repository = origin.get("repository_origin") or origin.get("external_repository_origin") or {}
    location = (repository.get("code_location_origin") or repository.get("repository_location_origin") or {}).get(
        "location_name"
    )
    name = origin.get("instigator_name") or origin.get("job_name")
    return (
        location or "unknown",
        name or "unknown",
        kind.lower(),
        status in ("RUNNING", "DECLARED_IN_CODE", "AUTOMATICALLY_RUNNING"),
    )


def daemons(connection: Connection) -> Sequence[Metric]:
    """When Dagster's daemons last said that they are there.

    Args:
        connection: in a transaction of Dagster's database.
    """
    return [
        gauge(
            "pipeline_dagster_daemon_age_seconds",
            "Since the last heartbeat of a daemon.",
            [
                ((kind,), max(0.0, age))
                for kind, age in connection.execute(
                    "SELECT daemon_type, extract(epoch FROM (now() AT TIME ZONE 'UTC') - timestamp)::float8"
                    " FROM daemon_heartbeats"
                )
            ],
            ["daemon"],
            together=max,
        )
    ]
