"""What is exported of the pipeline's own tables, by part.

Belongs here: the SQL of every part, and what its figures are called. Does not: Dagster's tables
(`scaling.exported_dagster`), when and how often they are read (`scaling.exporter`), labels (`scaling.exposition`).

The SQL of both pipelines stands here, as that of the metrics stands in `scaling.queries`, because `scaling` imports
neither; tests hold it against the pipelines' own figures. Counters count from midnight UTC, as the tables do that they
are read from; what is kept longer shrinks when old days are purged, which a counter must not.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial

from prometheus_client.core import Metric
from psycopg import sql

from scaling import episodes, samples
from scaling.capabilities import Capability, in_force, modes
from scaling.catalogue import Catalogue
from scaling.databases import Connection, DatabaseRouter, Shard
from scaling.episodes import EpisodeState
from scaling.exposition import counter, gauge, histogram, one
from scaling.google_calls import AGES, POLLS_PER_HOUR, TOKEN_REFRESH
from scaling.headroom import Headroom
from scaling.overrides import configured
from scaling.samples import Sample, Status
from scaling.settings import ArchiveSourceSettings, ScalingSettings, SyncLimitSettings, load

CLASSES = ("free", "team", "enterprise")
"""Plans of tenants that are told apart; any other is `other`, and without the column all are `unknown`."""
HEALTHS = ("new", "healthy", "degraded", "needs_human")
CALENDAR_STATES = ("never_synced", "waiting", "failing", "overdue", "fresh")
NOTIFICATIONS = ("accepted", "sync", "unknown_channel", "wrong_token", "malformed")
BOUNDED_AGES = AGES[:-1]
OVERDUE_SECONDS = 900
DEAD_AFTER = "5 minutes"
"""Without a heartbeat, which comes every 30 seconds."""
CALLS_AT_ONCE_SHARE = 0.1
SPENT_WITHIN_SECONDS = 5.0
FACTOR_RECOVERY_SECONDS = 300.0
"""How `sync_pipeline.call_buckets` makes the project's bucket of its quota."""
GOOGLE_ZONE = "America/Los_Angeles"
SLOWEST = 20
"""Things one metric is measured of (routes) that are exported; the rest is the least of them."""
TODAY = "date_trunc('day', now(), 'UTC')"

Read = Callable[[], Sequence[Metric]]


def parts(router: DatabaseRouter, *, limit_seconds: float) -> Mapping[str, Read]:
    """What can be read, by name.

    Args:
        router: to the databases.
        limit_seconds: after which the database gives up on a statement.

    Raises:
        UserError: a setting is missing or wrong.
    """
    [shard] = router.shards()  # with more of them, every figure would need a way to put them together
    archive, limits = load(ArchiveSourceSettings), load(SyncLimitSettings)
    thresholds = load(ScalingSettings)
    known = configured(thresholds)
    reads: dict[str, Callable[[Connection], Sequence[Metric]]] = {
        "app": app,
        "calls": calls,
        "freshness": freshness,
        "sync_runs": partial(sync_runs, limits=limits),
        "sync_state": sync_state,
        "quota": partial(quota, limits=limits),
        "archive": partial(archived, settings=archive),
        "partitions": partial(partitions, settings=archive),
        "thresholds": partial(standing, catalogue=known),
        "episodes": partial(decisions, settings=thresholds),
    }
    return {name: partial(_read, shard, limit_seconds, read) for name, read in reads.items()}


@contextmanager
def reading(shard: Shard, limit_seconds: float) -> Iterator[Connection]:
    """Begin a transaction that writes nothing, waits for no lock, and is over in time.

    Args:
        shard: whose tables are read.
        limit_seconds: of every statement.

    Raises:
        UserError: the database does not answer.
    """
    with shard.transaction() as connection:
        connection.execute(
            "SELECT set_config('transaction_read_only', 'on', true), set_config('statement_timeout', %s, true),"
            " set_config('lock_timeout', '100ms', true), set_config('max_parallel_workers_per_gather', '0', true),"
            " set_config('jit', 'off', true), set_config('TimeZone', 'UTC', true)",
            [f"{limit_seconds * 1000:.0f}ms"],
        )
        yield connection


def _read(shard: Shard, limit_seconds: float, read: Callable[[Connection], Sequence[Metric]]) -> Sequence[Metric]:
    with reading(shard, limit_seconds) as connection:
        return read(connection)


def _plan_is_readable(connection: Connection) -> bool:
    """Whether tenants have a plan, and this login may see it: the data contract asks for neither."""
    row = connection.execute(
        "SELECT coalesce((SELECT has_column_privilege(attrelid, attname, 'SELECT') FROM pg_attribute"
        " WHERE attrelid = to_regclass('public.tenants') AND attname = 'plan' AND NOT attisdropped), false)"
    ).fetchone()
    return bool(row and row[0])


def _class(plan: str | None) -> str:
    return plan if plan in CLASSES else "unknown" if plan is None else "other"


def app(connection: Connection) -> Sequence[Metric]:
    """The four figures of the SaaS that the scaling plan wants on a dashboard, as they were measured last.

    Args:
        connection: in a transaction.
    """
    newest: dict[str, list[Sample]] = {}
    for series in samples.series(connection):
        if series.newest.status is Status.OK:
            newest.setdefault(series.newest.metric, []).append(series.newest)

    def largest(metric: str) -> float | None:
        return max((sample.value for sample in newest.get(metric, ()) if sample.value is not None), default=None)

    connections = [
        float(count)
        for sample in newest.get("db_conn_util", ())
        if isinstance(count := sample.evidence.get("connections"), int | float)
    ]
    routes = [
        (("0.95" if share == "p95" else "0.99", _of(sample.dims)), sample.value / 1000)
        for share in ("p95", "p99")
        for sample in _largest(newest.get(f"api_{share}_ms", ()))
        if sample.value is not None
    ]
    return [
        gauge(
            "app_concurrent_connections",
            "Connections at a time: clients of Postgres and of its pooler, invocations of functions in flight.",
            [
                (("postgres",), max(connections, default=None)),
                (("pooler",), largest("pooler_connections")),
                (("functions",), largest("concurrency_peak")),
            ],
            ["of"],
        ),
        one("app_cache_hit_ratio", "Hits of the cache by all lookups, last day.", largest("cache_hit_rate")),
        gauge(
            "app_database_pool_utilization_ratio",
            "Connections in use by those there may be.",
            [(("postgres",), largest("db_conn_util")), (("pooler",), largest("pooler_utilization"))],
            ["pool"],
        ),
        gauge(
            "app_api_latency_seconds",
            "Duration of the SaaS's functions in the last hour, by quantile, of the slowest routes.",
            routes,
            ["quantile", "of"],
            together=max,
        ),
    ]


def _of(dims: str) -> str:
    return dims or "all"


def _largest(of_metric: Sequence[Sample]) -> list[Sample]:
    return sorted(of_metric, key=lambda sample: -(sample.value or 0.0))[:SLOWEST]


def calls(connection: Connection) -> Sequence[Metric]:
    """Calls to Google since midnight UTC, and how many incremental sync has saved.

    Args:
        connection: in a transaction.
    """
    # By tenant through the primary key: a table that keeps 400 days of 10,000 tenants is not read as a whole.
    plan = sql.SQL("t.plan" if _plan_is_readable(connection) else "NULL")
    rows = connection.execute(
        sql.SQL("""
            SELECT {plan}, a.method, a.outcome, sum(a.calls)::float8
            FROM public.tenants t, LATERAL (
                SELECT method, outcome, calls FROM sync.api_calls
                WHERE tenant_id = t.id AND day = (now() AT TIME ZONE 'UTC')::date OFFSET 0) a
            GROUP BY 1, 2, 3 ORDER BY 4 DESC
            """).format(plan=plan)
    ).fetchall()
    found = connection.execute(
        sql.SQL("""
            SELECT coalesce(sum(live), 0)::float8 FROM (
                SELECT avg(calendars_live) AS live FROM sync.runs WHERE started_at >= {today}
                GROUP BY extract(hour FROM started_at AT TIME ZONE 'UTC')) AS hours
            """).format(today=sql.SQL(TODAY))
    ).fetchone()
    complete = POLLS_PER_HOUR * (found[0] if found else 0.0)
    sent = sum(count for _, method, _, count in rows if method != TOKEN_REFRESH)
    return [
        counter(
            "pipeline_sync_api_calls",
            "Requests to Google since midnight UTC, retries included; oauth.refresh counts against no quota.",
            [((_class(tier), method, outcome), count) for tier, method, outcome, count in rows],
            ["class", "method", "outcome"],
        ),
        one(
            "pipeline_sync_calls_of_complete_reads",
            "Calls that reading every calendar every two minutes would have cost since midnight UTC, in the hours in "
            "which the sync ran.",
            complete,
        ),
        one("pipeline_sync_calls_saved", "Calls of complete reads less those that were made, today.", complete - sent),
    ]


def freshness(connection: Connection) -> Sequence[Metric]:
    """How old changes were when they became visible, and notifications, since midnight UTC.

    Args:
        connection: in a transaction.
    """
    by_bound: Counter[int] = Counter()
    for bound, changes in connection.execute(
        "SELECT le_seconds, changes FROM sync.freshness WHERE day = (now() AT TIME ZONE 'UTC')::date"
    ):
        by_bound[bound if bound in BOUNDED_AGES else 0] += changes
    return [
        histogram(
            "pipeline_sync_change_age_seconds",
            "Age of changes when they became visible here, since midnight UTC.",
            [((), [*(by_bound[bound] for bound in BOUNDED_AGES), by_bound[0]], None)],
            BOUNDED_AGES,
        ),
        counter(
            "pipeline_sync_notifications",
            "Notifications of Google since midnight UTC.",
            [
                ((outcome,), messages)
                for outcome, messages in connection.execute(
                    "SELECT outcome, messages FROM sync.webhook_messages WHERE day = (now() AT TIME ZONE 'UTC')::date"
                )
            ]
            + [((outcome,), 0) for outcome in NOTIFICATIONS],
            ["outcome"],
        ),
    ]


def sync_runs(connection: Connection, limits: SyncLimitSettings) -> Sequence[Metric]:
    """What runs of the sync did since midnight UTC, and what is at work now.

    Args:
        connection: in a transaction.
        limits: how many calls a run has under way.
    """
    row = connection.execute(
        sql.SQL("""
            SELECT count(*) FILTER (WHERE finished_at IS NOT NULL),
                count(*) FILTER (WHERE finished_at IS NULL AND heartbeat_at < now() - {dead}::interval),
                count(*) FILTER (WHERE finished_at IS NULL AND heartbeat_at >= now() - {dead}::interval),
                coalesce(sum(events_upserted), 0)::float8, coalesce(sum(events_deleted), 0)::float8,
                coalesce(sum(quarantined), 0)::float8, coalesce(sum(workspaces_served), 0)::float8,
                coalesce(sum(workspaces_failed), 0)::float8, coalesce(sum(waited_seconds), 0)::float8
            FROM sync.runs WHERE started_at >= {today}
            """).format(dead=sql.Literal(DEAD_AFTER), today=sql.SQL(TODAY))
    ).fetchone()
    last = connection.execute(
        "SELECT extract(epoch FROM now() - started_at)::float8 FROM sync.runs ORDER BY started_at DESC LIMIT 1"
    ).fetchone()
    leases: dict[str, int] = dict(
        connection.execute(
            "SELECT 'calendar', count(*) FROM sync.calendar_state WHERE lease_owner IS NOT NULL AND lease_until > now()"
            " UNION ALL SELECT 'connection', count(*) FROM sync.connection_state"
            " WHERE lease_owner IS NOT NULL AND lease_until > now()"
        ).fetchall()
    )
    if row is None:
        raise AssertionError("aggregates without GROUP BY return a row")
    finished, died, at_work, upserted, tombstoned, quarantined, served, failed, waited = row
    under_way = min(sum(leases.values()), at_work * limits.sync_parallelism)
    return [
        counter(
            "pipeline_sync_runs",
            "Runs of the sync that started since midnight UTC, by how they ended; died: no heartbeat for 5 minutes.",
            [(("finished",), finished), (("died",), died)],
            ["outcome"],
        ),
        one("pipeline_sync_runs_at_work", "Runs of the sync at work now.", at_work),
        one(
            "pipeline_sync_last_run_age_seconds",
            "Since the newest run of the sync started; absent before the first.",
            last[0] if last else None,
        ),
        counter(
            "pipeline_sync_events",
            "Events changed here by runs that started since midnight UTC.",
            [(("upserted",), upserted), (("tombstoned",), tombstoned), (("quarantined",), quarantined)],
            ["change"],
        ),
        counter(
            "pipeline_sync_workspaces_served",
            "Workspaces visited by runs that started since midnight UTC.",
            [(("well",), served - failed), (("failed",), failed)],
            ["outcome"],
        ),
        counter(
            "pipeline_sync_quota_wait_seconds", "Time workers waited for quota since midnight UTC.", [((), waited)]
        ),
        gauge(
            "pipeline_sync_leases",
            "Leases held now: on calendars being synced, on connections whose list of calendars is being read.",
            [((kind,), count) for kind, count in leases.items()],
            ["kind"],
        ),
        one(
            "pipeline_sync_calls_in_flight",
            "Calls to Google that are under way at most: one a lease, SYNC_PARALLELISM a run at work.",
            under_way,
        ),
    ]


def sync_state(connection: Connection) -> Sequence[Metric]:
    """Where workspaces, calendars and connections stand.

    Args:
        connection: in a transaction.
    """
    readable = _plan_is_readable(connection)
    plan = sql.SQL("t.plan" if readable else "NULL")
    tenants = sql.SQL("LEFT JOIN public.tenants t ON t.id = x.tenant_id" if readable else "")
    workspaces = connection.execute(
        sql.SQL("SELECT {plan}, x.health, count(*) FROM sync.workspace_state x {tenants} GROUP BY 1, 2").format(
            plan=plan, tenants=tenants
        )
    ).fetchall()
    calendars = connection.execute(
        sql.SQL("""
            SELECT {plan}, x.state, sum(x.calendars)::bigint, sum(x.breakers_open)::bigint,
                sum(x.breakers_half_open)::bigint, max(x.overdue)
            FROM (
                SELECT c.tenant_id,
                    CASE WHEN c.last_succeeded_at IS NULL THEN 'never_synced'
                         WHEN s.status <> 'active' OR s.parked_until > now() OR c.breaker_until > now() THEN 'waiting'
                         WHEN c.consecutive_failures > 0 THEN 'failing'
                         WHEN greatest(c.due_at, c.last_finished_at) < now() - {overdue} * interval '1 second'
                            THEN 'overdue' ELSE 'fresh' END AS state,
                    count(*) AS calendars, count(*) FILTER (WHERE c.breaker_until > now()) AS breakers_open,
                    count(*) FILTER (WHERE c.breaker_until <= now()) AS breakers_half_open,
                    extract(epoch FROM now() - min(greatest(c.due_at, c.last_finished_at)))::float8 AS overdue
                FROM sync.calendar_state c
                LEFT JOIN sync.connection_state s USING (tenant_id, workspace_id, connection_id)
                WHERE c.deleted_at IS NULL GROUP BY 1, 2
            ) AS x {tenants} GROUP BY 1, 2
            """).format(plan=plan, tenants=tenants, overdue=sql.Literal(OVERDUE_SECONDS))
    ).fetchall()
    connections = connection.execute(
        "SELECT CASE WHEN status <> 'active' THEN 'refused' WHEN parked_until > now() THEN 'parked' ELSE 'active' END,"
        " CASE WHEN failed_visits = 0 THEN 'closed' WHEN parked_until > now() THEN 'open' ELSE 'half_open' END,"
        " count(*) FROM sync.connection_state GROUP BY 1, 2"
    ).fetchall()
    poison = connection.execute("SELECT count(*) FROM sync.quarantine").fetchone()
    breakers: Counter[tuple[str, str]] = Counter(
        {(kind, state): 0 for kind in ("calendar", "connection") for state in ("closed", "half_open", "open")}
    )
    for _, _, count, opened, half_open, _ in calendars:
        breakers["calendar", "open"] += opened
        breakers["calendar", "half_open"] += half_open
        breakers["calendar", "closed"] += count - opened - half_open
    for _, breaker, count in connections:
        breakers["connection", breaker] += count
    overdue = [late for _, state, _, _, _, late in calendars if state in ("overdue", "fresh") and late is not None]
    return [
        gauge(
            "pipeline_sync_workspaces",
            "Workspaces by what they need.",
            [((_class(tier), health), count) for tier, health, count in workspaces]
            + [((tier, health), 0) for tier in (*CLASSES, "unknown") for health in HEALTHS],
            ["class", "health"],
        ),
        gauge(
            "pipeline_sync_calendars",
            "Calendars by how they stand; waiting: for a new grant, for quota, or behind an open breaker.",
            [((_class(tier), state), count) for tier, state, count, *_ in calendars]
            + [((tier, state), 0) for tier in (*CLASSES, "unknown") for state in CALENDAR_STATES],
            ["class", "state"],
        ),
        one(
            "pipeline_sync_overdue_seconds",
            "How long the calendar has been due that has been due for longest, of those that nothing holds up.",
            max([0.0, *overdue]),
        ),
        gauge(
            "pipeline_sync_connections",
            "Grants by how they stand; refused: somebody has to connect the account again.",
            [((state,), count) for state, _, count in connections]
            + [((state,), 0) for state in ("active", "parked", "refused")],
            ["state"],
        ),
        gauge(
            "pipeline_sync_breakers",
            "Breakers by state: of calendars that answer 410 every time, of connections Google does not answer for.",
            breakers.items(),
            ["kind", "state"],
        ),
        one("pipeline_sync_quarantined_events", "Events that nobody can read.", poison[0] if poison else None),
    ]


def quota(connection: Connection, limits: SyncLimitSettings) -> Sequence[Metric]:
    """How much of Google's quotas is left.

    Args:
        connection: in a transaction.
        limits: the quotas.
    """
    capacity = max(1, int(limits.sync_calls_per_minute * CALLS_AT_ONCE_SHARE))
    per_second = max(limits.sync_calls_per_minute - capacity, 0.98) / (60.0 + SPENT_WITHIN_SECONDS)
    row = connection.execute(
        """
        WITH moment AS MATERIALIZED (
            SELECT at, (at AT TIME ZONE %(zone)s)::date AS day FROM (SELECT clock_timestamp() AS at) AS clock
        ), bucket AS (
            SELECT least(%(capacity)s::float8, b.tokens + %(rate)s::float8
                    * greatest(0, extract(epoch FROM at - b.refilled_at)::float8)) / %(capacity)s::float8 AS fill,
                least(1, b.factor + coalesce(greatest(0, extract(epoch FROM at - b.factor_at)::float8), 0)
                    / %(recovery)s::float8) AS factor
            FROM sync.call_buckets b, moment WHERE b.scope = 'project' AND b.key = ''
        )
        SELECT coalesce((SELECT calls FROM sync.call_days WHERE day = moment.day), 0)::float8,
            extract(epoch FROM at - (day::timestamp AT TIME ZONE %(zone)s))::float8,
            extract(epoch FROM ((day + 1)::timestamp AT TIME ZONE %(zone)s) - at)::float8,
            coalesce((SELECT fill FROM bucket), 1), coalesce((SELECT factor FROM bucket), 1)
        FROM moment
        """,
        {"zone": GOOGLE_ZONE, "capacity": capacity, "rate": per_second, "recovery": FACTOR_RECOVERY_SECONDS},
    ).fetchone()
    if row is None:
        raise AssertionError("a query over one moment returns one row")
    today, elapsed, remaining, fill, factor = row
    return [
        one("pipeline_quota_calls_today", "Calls taken from the day's budget, since midnight in California.", today),
        gauge(
            "pipeline_quota_calls_limit",
            "Google's quotas, as configured.",
            [
                (("day",), limits.sync_calls_per_day),
                (("minute",), limits.sync_calls_per_minute),
                (("minute_and_user",), limits.sync_calls_per_minute_and_user),
            ],
            ["window"],
        ),
        one(
            "pipeline_quota_headroom_ratio",
            "What is left of the day's budget, 0 to 1.",
            max(0.0, 1 - today / limits.sync_calls_per_day),
        ),
        one(
            "pipeline_quota_projected_calls",
            "Calls by midnight in California, if the day goes on as it went so far; its first hour counts as a whole.",
            today + today / max(elapsed, 3600.0) * remaining,
        ),
        one("pipeline_quota_fill_ratio", "How full the minute's bucket is; below 0 processes wait for it.", fill),
        one("pipeline_quota_rate_ratio", "Share of the rate in force; below 1 Google refused several tenants.", factor),
    ]


def archived(connection: Connection, settings: ArchiveSourceSettings) -> Sequence[Metric]:
    """What is in the archive, and what is not right with it.

    Args:
        connection: in a transaction.
        settings: name the table.
    """
    rows = connection.execute(
        """
        SELECT CASE WHEN pruned_at IS NOT NULL THEN 'pruned' ELSE state END, count(*), coalesce(sum(rows), 0)::float8,
            coalesce(sum(bytes), 0)::float8, coalesce(sum(late_rows), 0)::float8,
            coalesce(sum(greatest(source_rows - rows, 0)) FILTER (WHERE pruned_at IS NULL), 0)::float8,
            count(*) FILTER (WHERE error LIKE '%%failed verification%%'), count(*) FILTER (WHERE error IS NOT NULL),
            extract(epoch FROM max(archived_at))::float8, extract(epoch FROM max(to_at))::float8,
            coalesce(sum(erased_rows), 0)::float8
        FROM archive.months WHERE source_table = %s GROUP BY 1
        """,
        [settings.archive_table],
    ).fetchall()
    at_work = connection.execute(
        "SELECT count(*) FILTER (WHERE recorded_at < now() - interval '6 hours') FROM archive.uploads"
        " WHERE source_table = %s",
        [settings.archive_table],
    ).fetchone()

    audited = connection.execute(
        "SELECT sum(findings)::float8, extract(epoch FROM min(ended_at))::float8 FROM"
        " (SELECT DISTINCT ON (shard) findings, ended_at FROM archive.audits WHERE source_table = %s"
        " ORDER BY shard, ended_at DESC) newest",
        [settings.archive_table],
    ).fetchone()

    def total(position: int) -> float:
        return float(sum(row[position] for row in rows))

    newest = max((row[8] for row in rows if row[8] is not None), default=None)
    return [
        gauge(
            "pipeline_archive_months",
            "Months by state; pruned: archived, and dropped from Postgres.",
            [((state,), count) for state, count, *_ in rows]
            + [((state,), 0) for state in ("archiving", "archived", "failed", "pruned")],
            ["state"],
        ),
        one("pipeline_archive_rows", "Rows in the archive.", total(2)),
        one("pipeline_archive_bytes", "Bytes of Parquet in the archive.", total(3)),
        gauge(
            "pipeline_archive_late_rows",
            "Rows that came after their month was archived: as a further part in the archive, or waiting for that.",
            [(("archived",), total(4)), (("waiting",), total(5))],
            ["state"],
        ),
        one(
            "pipeline_archive_verification_failures",
            "Months whose newest attempt was not what Postgres holds; nothing of it was published.",
            total(6),
        ),
        one("pipeline_archive_errors", "Months whose newest attempt failed, for whatever reason.", total(7)),
        one("pipeline_archive_erased_rows", "Rows erased from the archive on request.", total(10)),
        one("pipeline_archive_last_timestamp_seconds", "When a month was archived last; absent before.", newest),
        one(
            "pipeline_archive_abandoned_uploads",
            "Objects noted by attempts that ended hours ago; the next run of their month removes them.",
            at_work[0] if at_work else None,
        ),
        one(
            "pipeline_archive_audit_findings",
            "What the newest audit of the chain found not to be as published; absent before the first.",
            audited[0] if audited else None,
        ),
        one(
            "pipeline_archive_audited_timestamp_seconds",
            "When the chain was audited last; absent before.",
            audited[1] if audited else None,
        ),
    ]


def partitions(connection: Connection, settings: ArchiveSourceSettings) -> Sequence[Metric]:
    """How far ahead the table of audit logs has partitions; Postgres refuses rows beyond.

    Args:
        connection: in a transaction.
        settings: name the table.
    """
    row = connection.execute(
        """
        WITH parent AS (SELECT oid, relkind FROM pg_class WHERE oid = to_regclass(%s)), bounds AS (
            SELECT substring(b.bound FROM $$FROM \\('(\\d[^']*)'\\)$$)::timestamptz AS from_at,
                substring(b.bound FROM $$TO \\('(\\d[^']*)'\\)$$)::timestamptz AS to_at
            FROM parent JOIN pg_inherits i ON i.inhparent = parent.oid AND NOT i.inhdetachpending
            JOIN pg_class c ON c.oid = i.inhrelid
            CROSS JOIN LATERAL (SELECT pg_get_expr(c.relpartbound, c.oid) AS bound) b
        )
        SELECT (SELECT relkind = 'p' FROM parent), (SELECT count(*) FROM bounds WHERE from_at > now()),
            (SELECT extract(epoch FROM max(to_at) - now())::float8 FROM bounds)
        """,
        [settings.archive_table],
    ).fetchone()
    partitioned, ahead, seconds = row or (None, 0, None)
    return [
        one(
            "pipeline_archive_partitioned",
            "Whether the table of audit logs is partitioned, 1 or 0; absent: there is no such table.",
            None if partitioned is None else float(partitioned),
        ),
        one(
            "pipeline_archive_premade_partitions",
            "Empty partitions of coming months; absent while the table is not partitioned.",
            float(ahead) if partitioned else None,
        ),
        one(
            "pipeline_archive_premade_partitions_wanted",
            "Partitions of coming months that are to be kept ready, ARCHIVE_PREMADE_MONTHS.",
            settings.archive_premade_months,
        ),
        one(
            "pipeline_archive_partitions_end_seconds",
            "Until rows are refused because no partition takes them; absent while the table is not partitioned.",
            seconds if partitioned else None,
        ),
    ]


def standing(connection: Connection, catalogue: Catalogue) -> Sequence[Metric]:
    """Every metric of the scaling plan: figure, threshold, how much of the way is gone, where its rule stands.

    Args:
        connection: in a transaction.
        catalogue: the metrics.
    """
    now = datetime.now(UTC)
    states = {(each.rule, each.dims): each.state for each in episodes.standings(connection)}
    by_metric: dict[str, list[Sample]] = {}
    for series in samples.series(connection):
        by_metric.setdefault(series.newest.metric, []).append(series.newest)
    rows = [
        Headroom(metric, sample.dims, sample, states.get((metric.name, sample.dims)), None, None)
        for metric in catalogue
        for sample in _largest(by_metric.get(metric.name, ()))
    ]
    named = [((row.metric.name, _of(row.dims)), row) for row in rows]
    return [
        gauge(
            "pipeline_scaling_value",
            "The newest figure of a metric, in its own unit; absent while there is none.",
            [(labels, row.sample.value if row.sample else None) for labels, row in named],
            ["metric", "of"],
            together=max,
        ),
        gauge(
            "pipeline_scaling_threshold",
            "Where the rule of a metric fires, in the metric's unit.",
            [((metric.name, metric.rule.compare.value), metric.rule.threshold) for metric in catalogue if metric.rule],
            ["metric", "compare"],
        ),
        gauge(
            "pipeline_scaling_used_ratio",
            "How much of the way to the threshold is gone; 1 is there.",
            [(labels, row.used) for labels, row in named],
            ["metric", "of"],
            together=max,
        ),
        gauge(
            "pipeline_scaling_crossed",
            "Whether the newest figure is on the wrong side of its threshold.",
            [(labels, float(row.crossed)) for labels, row in named if row.metric.rule],
            ["metric", "of"],
            together=max,
        ),
        gauge(
            "pipeline_scaling_phase",
            "1 for the phase the rule of a metric is in.",
            [((*labels, row.state.phase.value), 1.0) for labels, row in named if row.state],
            ["metric", "of", "phase"],
            together=max,
        ),
        gauge(
            "pipeline_scaling_sample_age_seconds",
            "Since a metric was measured last, whatever came of it.",
            [(labels, max(0.0, (now - row.sample.at).total_seconds())) for labels, row in named if row.sample],
            ["metric", "of"],
            together=max,
        ),
        gauge(
            "pipeline_scaling_sample_status",
            "1 for how the newest measurement of a metric went; what is not ok moves no rule.",
            [((*labels, row.sample.status.value), 1.0) for labels, row in named if row.sample],
            ["metric", "of", "status"],
            together=max,
        ),
        gauge(
            "pipeline_scaling_metrics",
            "Metrics of the catalogue by whether they were ever measured.",
            [(("measured" if metric.name in by_metric else "never_measured",), 1.0) for metric in catalogue],
            ["state"],
        ),
    ]


def decisions(connection: Connection, settings: ScalingSettings) -> Sequence[Metric]:
    """Episodes by state, what waits for a person, and the capabilities in force.

    Args:
        connection: in a transaction.
        settings: modes of the capabilities.
    """
    rows = connection.execute(
        "SELECT capability, state, count(*), extract(epoch FROM now() - min(fired_at) FILTER"
        " (WHERE acknowledged_at IS NULL AND recovered_at IS NULL))::float8 FROM scaling.episodes GROUP BY 1, 2"
    ).fetchall()
    switched: dict[str, bool] = dict(connection.execute("SELECT name, active FROM scaling.capabilities").fetchall())
    names = [*(each.value for each in Capability), "none"]
    known = modes(settings)
    return [
        gauge(
            "pipeline_scaling_episodes",
            "Episodes on record by state; capability none: a person is told.",
            [((capability or "none", state), count) for capability, state, count, _ in rows]
            + [((name, state.value), 0) for name in names for state in EpisodeState],
            ["capability", "state"],
        ),
        gauge(
            "pipeline_scaling_episode_waits_seconds",
            "Since the oldest episode of this state fired that nobody acknowledged and that is not over.",
            [((state,), waits) for _, state, _, waits in rows] + [((state.value,), 0) for state in EpisodeState],
            ["state"],
            together=max,
        ),
        gauge(
            "pipeline_scaling_capability_in_force",
            "Whether a capability is in force, 1 or 0.",
            [
                ((each.value,), float(in_force(known[each], switched_on=bool(switched.get(each.value)))))
                for each in Capability
            ],
            ["capability"],
        ),
    ]
