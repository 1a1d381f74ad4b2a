"""The metrics of the scaling plan: where each comes from, when it has crossed its threshold, and what is then to do.

Belongs here: every metric with its source, rule, capability, owner and recommendation, in one place. Does not: the SQL
(`scaling.queries`), how a source is asked (`scaling.sources`), how a rule is judged (`scaling.thresholds`), or what a
settings file changes (`scaling.overrides`).

Thresholds are those of the scaling plan; recovery, votes and windows are chosen so that noise does not fire: one
sample of a figure that only rises within its month, two of three of a day's, three of five of what goes up and down.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from scaling import queries
from scaling.capabilities import Capability, Mode
from scaling.episodes import Watch
from scaling.errors import UserError
from scaling.google_calls import TOKEN_REFRESH
from scaling.settings import ArchiveSourceSettings, SyncScheduleSettings
from scaling.sources import Source
from scaling.sources.anthropic import AnthropicCost, AnthropicUsage
from scaling.sources.derived import AiCostRatio, CallsGap, Derived, Ratio, SourceHealth
from scaling.sources.google_monitoring import GoogleCalendarCalls
from scaling.sources.prometheus import PrometheusScrape
from scaling.sources.sql import Across, SqlSource
from scaling.sources.supabase import SupabaseDisk, SupabasePlan, SupabasePooler
from scaling.sources.upstash import UpstashStats
from scaling.sources.vercel import VercelBilling, VercelMetrics
from scaling.thresholds import Compare, Rearm, Rule
from scaling.units import Unit

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
NO_DATA_PERIODS = 3
"""Of silence before a rule says that it has no data; two missed measurements may be a deployment."""
OWNER = "platform"


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What a person is told when a threshold is crossed.

    Attributes:
        do: what to do, first step first.
        effect: what it is expected to change.
        cost: what it costs: money, work, risk.
    """

    do: str
    effect: str
    cost: str


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure that is watched.

    Attributes:
        name: its key; the rule has the same.
        title: for people.
        unit: of the figure and of its thresholds.
        source: measures it, or derives it from other metrics.
        every: it is measured once in each interval of this length, counted from midnight UTC.
        requirement: row of the scaling plan it stands for; empty: it is evidence, or watches the others.
        rule: when it has crossed; None: nothing is judged, it is evidence.
        capability: whose action a crossing starts; None: a person is told.
        recommendation: what a person is told; None without a rule.
        owner: who looks at its episodes.
        runbook: where it says what to do, a path of this project or an address; empty without a rule.
    """

    name: str
    title: str
    unit: Unit
    source: Source | Derived
    every: timedelta
    requirement: str = ""
    rule: Rule | None = None
    capability: Capability | None = None
    recommendation: Recommendation | None = None
    owner: str = OWNER
    runbook: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            UserError: the rule is of another metric, or calls an ordinary wait between two samples a gap.
        """
        if self.every < timedelta(minutes=1):
            raise UserError(f"metric {self.name} is measured every {self.every}; a minute is the least")
        if self.rule is not None and self.rule.no_data_after <= self.every:
            raise UserError(
                f"metric {self.name} is measured every {self.every}, but its rule misses data after "
                f"{self.rule.no_data_after}; make that longer"
            )
        if self.rule is not None and not self.runbook:
            object.__setattr__(self, "runbook", f"docs/operations.md#{self.name}")


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All metrics by name, in the order of the scaling plan."""

    metrics: tuple[Metric, ...]
    _by_name: Mapping[str, Metric] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {metric.name: metric for metric in self.metrics})

    def __iter__(self) -> Iterator[Metric]:
        return iter(self.metrics)

    def get(self, name: str) -> Metric | None:
        """The metric of that name, or None: samples outlive the metrics they were measured of."""
        return self._by_name.get(name)

    def named(self, name: str) -> Metric:
        """The metric of that name.

        Args:
            name: as the tables show it.

        Raises:
            UserError: there is none.
        """
        if name not in self._by_name:
            raise UserError(f"there is no metric {name!r}; known: {', '.join(self._by_name)}")
        return self._by_name[name]

    def judged(self, name: str) -> tuple[Metric, Rule]:
        """The metric of that name, and its rule.

        Args:
            name: as the tables show it.

        Raises:
            UserError: there is none, or it has no rule.
        """
        metric = self.named(name)
        if metric.rule is None:
            raise UserError(f"metric {name} is evidence for others and has no threshold")
        return metric, metric.rule

    def watches(self, modes: Mapping[Capability, Mode]) -> list[Watch]:
        """What `episodes.evaluate` judges.

        Args:
            modes: of the capabilities.
        """
        return [
            Watch(metric.rule, metric.capability, modes[metric.capability] if metric.capability else Mode.OBSERVE)
            for metric in self.metrics
            if metric.rule is not None
        ]


def catalogue(archive: ArchiveSourceSettings, sync: SyncScheduleSettings) -> Catalogue:
    """Every metric, with the thresholds of the scaling plan.

    Args:
        archive: names the table of audit logs, and what is kept of it.
        sync: knows how long a run of the sync may take.

    Returns:
        The metrics before any settings file (`scaling.overrides`).
    """
    table = {"table": archive.archive_table}
    kept = {
        **table,
        "zone": archive.archive_time_zone,
        "retention": archive.archive_retention_months,
        "grace": timedelta(seconds=archive.archive_grace_seconds),
    }
    runs = {"budget": sync.sync_time_budget_seconds}
    return Catalogue(
        (
            *_audit_logs(table, kept),
            *_calendar_sync(runs),
            *_ai(),
            *_vercel(),
            *_database(),
            *_people(),
            Metric(
                "source_health",
                "Silence of a source",
                Unit.PERIODS,
                SourceHealth(),
                HOUR,
                "",
                _rule("source_health", Compare.ABOVE, 3, HOUR, recovery=2, rearm=Rearm.REPEAT),
                None,
                Recommendation(
                    "Open scaling_data_health: it has the last error of the source. Renew its credentials, or mend "
                    "what it says.",
                    "The thresholds that rest on it are judged again; until then they neither fire nor end.",
                    "Minutes, as a rule an expired token.",
                ),
            ),
        )
    )


def _rule(
    name: str,
    compare: Compare,
    threshold: float,
    every: timedelta,
    *,
    recovery: float | None = None,
    votes: tuple[int, int] = (1, 1),
    rearm: Rearm = Rearm.ONE_SHOT,
    flap_window: timedelta = timedelta(days=7),
) -> Rule:
    breaches, of = votes
    return Rule(
        name,
        name,
        compare,
        threshold,
        # A schedule that is coarser than the metric must not look like a gap either.
        NO_DATA_PERIODS * max(every, 2 * HOUR),
        breaches,
        of,
        recovery=recovery,
        recoveries=breaches,
        recovery_of=of,
        rearm=rearm,
        flap_window=flap_window,
    )


def _audit_logs(table: Mapping[str, object], kept: Mapping[str, object]) -> Iterable[Metric]:
    yield Metric(
        "audit_logs_bytes",
        "Size of the audit logs",
        Unit.BYTES,
        SqlSource(queries.AUDIT_LOGS_BYTES, Across.EACH, table),
        DAY,
        "1.1",
        # Deleting rows gives no bytes back, so nothing but a person decides that it is small again.
        _rule("audit_logs_bytes", Compare.ABOVE, 2**30, DAY, votes=(2, 3)),
        Capability.AUDIT_LOG_PARTITIONING,
        Recommendation(
            "Read the plan: a dry run of the job convert_audit_logs shows it. Then approve the episode: the table is "
            "converted to monthly partitions while it is written to, and every closed month is archived.",
            "Queries of recent months read one partition; old months leave Postgres by a drop, which takes no time "
            "and gives the bytes back, where deleting does not.",
            "Two short locks and one scan of the table beside the writers; one archive run per closed month.",
        ),
    )
    yield Metric(
        "audit_detachable_bytes",
        "Audit logs past retention",
        Unit.BYTES,
        SqlSource(queries.AUDIT_DETACHABLE_BYTES, Across.EACH, kept),
        DAY,
        "1.1",
        _rule(
            "audit_detachable_bytes",
            Compare.ABOVE,
            0,
            DAY,
            recovery=0,
            rearm=Rearm.REPEAT,
            flap_window=timedelta(hours=12),  # every month has its episode; that is no flapping
        ),
        Capability.AUDIT_LOG_RETENTION,
        Recommendation(
            "Approve the episode: months past retention are archived and verified, then pruned as ARCHIVE_PRUNE says.",
            "Postgres gets the bytes of those partitions back.",
            "Storage on S3; queries of those months go to the archive.",
        ),
    )


def _calendar_sync(runs: Mapping[str, object]) -> Iterable[Metric]:
    parallel = Recommendation(
        "Let parallel_sync switch on (SCALING_PARALLEL_SYNC=auto, or approve the episode); the next tick uses it.",
        "All due workspaces are served in one tick by a pool of workers, in place of five one after the other; a slow "
        "or failing tenant no longer holds up the others.",
        "More connections to Postgres (DATABASE_POOL_SIZE) and up to SYNC_PARALLELISM calls to Google at a time.",
    )
    yield Metric(
        "google_calls_month",
        "Calls to Google Calendar this month",
        Unit.CALLS,
        SqlSource(queries.GOOGLE_CALLS_MONTH, Across.SUM, {"not_a_call": TOKEN_REFRESH}),
        HOUR,
        "2.1",
        _rule("google_calls_month", Compare.ABOVE, 10_000, HOUR, recovery=8_000),
        Capability.INCREMENTAL_SYNC,
        Recommendation(
            "Let incremental_sync switch on (SCALING_INCREMENTAL_SYNC=auto, or approve the episode); the next tick "
            "uses it.",
            "70 to 90 % fewer calls: sync tokens read what changed, push notifications say when, quiet calendars are "
            "polled rarely.",
            "One complete read of each calendar more, to get its first token.",
        ),
    )
    yield Metric(
        "google_calls_month_billed",
        "Calls to Google Calendar this month, by Google's count",
        Unit.CALLS,
        GoogleCalendarCalls(),
        HOUR,
        "2.1",
    )
    yield Metric(
        "google_calls_gap",
        "Google's count of calls against the own one",
        Unit.SHARE,
        CallsGap("google_calls_month_billed", "google_calls_month"),
        HOUR,
        "2.1",
        _rule("google_calls_gap", Compare.ABOVE, 0.1, HOUR, recovery=0.05, votes=(3, 5), rearm=Rearm.REPEAT),
        None,
        Recommendation(
            "See which count is higher. Google's: look for retries inside the HTTP library, another app or a person "
            "with credentials of the same project (Metrics Explorer, request_count by credential_id), runs that were "
            "killed before they wrote their calls down (sync_timeouts_month). The own one: calls that never reached "
            "Google, or GOOGLE_MONITORING_PROJECT is not the project of GOOGLE_CLIENT_ID.",
            "google_calls_month, which switches incremental sync on, counts what Google's quota counts.",
            "An hour of reading; a project of its own for the other app, where there is one.",
        ),
    )
    yield Metric(
        "google_tenants",
        "Tenants with Google on",
        Unit.TENANTS,
        SqlSource(queries.GOOGLE_TENANTS),
        DAY,
        "7.1",
        _rule("google_tenants", Compare.AT_LEAST, 30, DAY, recovery=25, votes=(2, 2)),
        Capability.PARALLEL_SYNC,
        parallel,
    )
    yield Metric(
        "sync_mean_s",
        "Mean time of a sync run, last hour",
        Unit.SECONDS,
        SqlSource(queries.SYNC_MEAN_SECONDS, Across.MEAN, {**runs, "window": HOUR}, least=20),
        HOUR,
        "7.1",
        _rule("sync_mean_s", Compare.AT_LEAST, 45, HOUR, recovery=35, votes=(3, 5)),
        Capability.PARALLEL_SYNC,
        parallel,
    )
    yield Metric(
        "sync_timeouts_month",
        "Sync runs killed or out of time, 30 days",
        Unit.RUNS,
        SqlSource(queries.SYNC_TIMEOUTS, Across.SUM, {**runs, "window": 30 * DAY}),
        HOUR,
        "7.1",
        _rule("sync_timeouts_month", Compare.AT_LEAST, 3, HOUR, recovery=0),
        Capability.PARALLEL_SYNC,
        parallel,
    )
    yield Metric(
        "synced_events_day",
        "Events synced, last whole day",
        Unit.EVENTS,
        SqlSource(queries.SYNCED_EVENTS_DAY, least=1),
        DAY,
        "7.1",
        _rule("synced_events_day", Compare.AT_LEAST, 500, DAY, recovery=400, votes=(3, 5)),
        Capability.PARALLEL_SYNC,
        parallel,
    )


def _ai() -> Iterable[Metric]:
    yield Metric(
        "ai_chats_month",
        "AI chats this month",
        Unit.CHATS,
        SqlSource(queries.AI_CHATS_MONTH),
        HOUR,
        "3.1",
        _rule("ai_chats_month", Compare.ABOVE, 1_000, HOUR, recovery=800, rearm=Rearm.PERIOD),
        None,
        Recommendation(
            "Measure first how many prompts come again: the same model, parameters, system prompt and scope, by hour "
            "and by day. Cache answers to questions without user context for an hour (TTL 3600 s); key what has "
            "context by its user.",
            "As many calls fewer as prompts come again within the TTL.",
            "Work of a week and a Redis database. Leaving the user out of a key answers one user with another's data.",
        ),
    )
    yield Metric(
        "ai_cost_month",
        "Anthropic bill this month",
        Unit.DOLLARS,
        AnthropicCost(),
        HOUR,
        "3.2",
    )
    yield Metric(
        "ai_cost_own_month",
        "AI cost by the app's own count, this month",
        Unit.DOLLARS,
        SqlSource(queries.AI_COST_OWN),
        HOUR,
        "3.2",
    )
    yield Metric(
        "ai_tokens_month",
        "Tokens of Anthropic this month",
        Unit.TOKENS,
        AnthropicUsage(),
        DAY,
        "3.2",
    )
    yield Metric(
        "ai_cost_ratio",
        "AI cost of the monthly budget",
        Unit.SHARE,
        AiCostRatio("ai_cost_month", "ai_cost_own_month"),
        HOUR,
        "3.2",
        _rule("ai_cost_ratio", Compare.ABOVE, 0.5, HOUR, rearm=Rearm.PERIOD),
        None,
        Recommendation(
            "Sort the month's calls by feature and model (ai_tokens_month has them by model). Send what only sorts, "
            "extracts or summarises to the light model behind a switch, compare answers on a sample a person has "
            "graded, then raise its share. Shorten system prompts, and cache their prefix.",
            "The light model costs a fraction per token; the saving is that fraction times the share that moves.",
            "Grading a sample, one day; answers of the light model are worse where the sample says so.",
        ),
    )
    yield Metric(
        "cache_hit_rate",
        "Hit rate of the cache",
        Unit.SHARE,
        UpstashStats(),
        DAY,
        "3.1",
        _rule("cache_hit_rate", Compare.BELOW, 0.2, DAY, recovery=0.3, votes=(3, 5), rearm=Rearm.REPEAT),
        None,
        Recommendation(
            "Look which keys miss: limits of rates and sessions in the same database count as well. Count hits by "
            "namespace in the app, then raise the TTL of what rarely changes.",
            "Every percent of hits is a percent of calls to the model less.",
            "Older answers, by the longer TTL.",
        ),
    )


def _vercel() -> Iterable[Metric]:
    yield Metric(
        "bandwidth_cost_7d",
        "Bandwidth cost, last 7 days by the 4 weeks before",
        Unit.TIMES,
        VercelBilling(),
        DAY,
        "4.1, 4.2",
        _rule("bandwidth_cost_7d", Compare.ABOVE, 1.5, DAY, recovery=1.2, votes=(2, 3), rearm=Rearm.REPEAT),
        None,
        Recommendation(
            "List the paths with most bytes and how many of their requests missed the CDN. Give hashed files "
            "'public, max-age=31536000, immutable' (those below /_next/static have it), others a short max-age with "
            "stale-while-revalidate. Serve images as AVIF or WebP in the width that is shown.",
            "Bytes that the CDN serves cost less than those of the origin; WebP and AVIF have a fraction of a JPEG's.",
            "An audit of a day; time to encode each image once.",
        ),
    )
    yield Metric(
        "concurrency_peak",
        "Function invocations in flight, busiest minutes",
        Unit.CONNECTIONS,
        # Little's law: the time spent within a minute, divided by a minute, is the mean number at work.
        VercelMetrics(
            "vercel.function_duration_ms",
            "sum",
            "p99",
            window=HOUR,
            bucket=timedelta(minutes=1),
            empty_is="zero",
            divide_by=60_000,
        ),
        HOUR,
        "5.1",
        _rule("concurrency_peak", Compare.ABOVE, 100, HOUR, recovery=80, votes=(3, 5), rearm=Rearm.REPEAT),
        None,
        Recommendation(
            "Look at pooler_utilization first: Vercel scales far beyond 100, the pool of the database does not. Then "
            "set memory and maxDuration of the slow routes in vercel.json, and keep the pool per instance small.",
            "Shorter functions are fewer at a time (rate x duration).",
            "More memory costs more per second, and often as much less time.",
        ),
    )
    for share, slo in (("p95", 1_000), ("p99", 3_000)):
        yield Metric(
            f"api_{share}_ms",
            f"API latency, {share} by route",
            Unit.MILLISECONDS,
            VercelMetrics(
                "vercel.function_duration_ms",
                share,
                "max",
                window=HOUR,
                bucket=HOUR,
                group_by=("route",),
                max_age=2 * HOUR,
            ),
            HOUR,
            "6.2",
            _rule(f"api_{share}_ms", Compare.ABOVE, slo, HOUR, recovery=0.8 * slo, votes=(3, 5), rearm=Rearm.REPEAT),
            None,
            Recommendation(
                "Open the route's slowest requests: time in the database, in other APIs, or in a cold start?",
                "A query with an index, or one call less, is worth more than a larger function.",
                "Hours, for each route.",
            ),
        )


def _database() -> Iterable[Metric]:
    yield Metric(
        "db_conn_util",
        "Connections of Postgres in use",
        Unit.SHARE,
        SqlSource(queries.DATABASE_CONNECTIONS, Across.EACH),
        timedelta(minutes=5),
        "1.3, 6.2",
        _rule(
            "db_conn_util",
            Compare.ABOVE,
            0.8,
            timedelta(minutes=5),
            recovery=0.6,
            votes=(3, 5),
            rearm=Rearm.REPEAT,
        ),
        None,
        Recommendation(
            "Look at the evidence: idle connections are a pool that is too large, idle in transaction a code path "
            "that waits for something else. Send functions through the pooler in transaction mode (port 6543), keep "
            "their pool at 1 to 3. Only when active ones fill the limit: a larger instance, then shards.",
            "A pooler serves hundreds of clients with tens of connections.",
            "Transaction mode has no session state: prepared statements by name, LISTEN, advisory locks.",
        ),
    )
    yield Metric(
        "pooler_connections",
        "Clients of the pooler",
        Unit.CONNECTIONS,
        PrometheusScrape("supavisor_connections_active"),
        HOUR,
        "6.2",
    )
    yield Metric(
        "pooler_limit",
        "Clients the pooler takes",
        Unit.CONNECTIONS,
        SupabasePooler(),
        DAY,
        "6.2",
    )
    yield Metric(
        "pooler_utilization",
        "Clients of the pooler, of its limit",
        Unit.SHARE,
        Ratio("pooler_connections", "pooler_limit"),
        HOUR,
        "1.3, 6.2",
        _rule("pooler_utilization", Compare.ABOVE, 0.8, HOUR, recovery=0.6, votes=(3, 5), rearm=Rearm.REPEAT),
        None,
        Recommendation(
            "Make the pool of each function instance smaller (1 to 3), close it when the instance is frozen, raise "
            "max_client_conn where the plan allows it.",
            "Functions at their peak get a connection in place of an error.",
            "A larger limit needs a larger compute add-on.",
        ),
    )
    yield Metric(
        "pooler_clients_waiting",
        "Clients that wait for the pooler",
        Unit.CONNECTIONS,
        PrometheusScrape("pgbouncer_pools_client_waiting_connections"),
        HOUR,
        "6.2",
        _rule("pooler_clients_waiting", Compare.ABOVE, 0, HOUR, recovery=0, votes=(3, 5), rearm=Rearm.REPEAT),
        None,
        Recommendation(
            "Find what holds connections: db_conn_util tells active from idle in transaction. Raise "
            "default_pool_size only when they are active.",
            "Requests no longer wait before their first query.",
            "A larger pool takes from max_connections of Postgres.",
        ),
    )
    yield Metric(
        "disk_used",
        "Disk of the database in use",
        Unit.SHARE,
        SupabaseDisk(),
        HOUR,
        "1.1",
        _rule("disk_used", Compare.ABOVE, 0.8, HOUR, recovery=0.7, votes=(3, 5), rearm=Rearm.REPEAT),
        None,
        Recommendation(
            "See what grows: audit_logs_bytes first. Prune archived months, drop unused indexes, then enlarge the "
            "disk: Supabase does so by itself at 90 %, once in six hours at most.",
            "A disk that is full makes the database read-only.",
            "A larger disk cannot be made smaller.",
        ),
    )
    yield Metric(
        "supabase_plan",
        "Plan that may have read replicas",
        Unit.FLAG,
        SupabasePlan(),
        DAY,
        "1.2",
        _rule("supabase_plan", Compare.AT_LEAST, 1, DAY, recovery=0),
        None,
        Recommendation(
            "Take the ratio of reads to writes per table from pg_stat_statements, list the queries that may read what "
            "is a second old, set up a replica in the same region, then DATABASE_REPLICA_URL: exports of the archive "
            "read there once it has caught up.",
            "Reads that may be stale leave the primary; what was just written is read there as before.",
            "A replica costs what its compute costs. Reading without the position of the last write shows old rows.",
        ),
    )


def _people() -> Iterable[Metric]:
    yield Metric(
        "users_total",
        "Users",
        Unit.USERS,
        SqlSource(queries.USERS_TOTAL),
        DAY,
        "1.3, 5.2",
        _rule("users_total", Compare.ABOVE, 1_000, DAY, recovery=900, votes=(2, 3)),
        None,
        Recommendation(
            "Plan, do not build yet: size the tenants (bytes, rows a second, connections), name the tables without a "
            "tenant, decide where the lookup from tenant to database lives. Move one tenant by a publication with a "
            "row filter as a rehearsal. For Kubernetes: price the measured load there against the bill of Vercel.",
            "When db_conn_util or the disk do cross, shards are a switch and no project.",
            "Two weeks of work; no change of production.",
        ),
    )
    yield Metric(
        "complex_incidents_30d",
        "Complex incidents, 30 days",
        Unit.INCIDENTS,
        SqlSource(queries.COMPLEX_INCIDENTS),
        DAY,
        "6.1",
        _rule("complex_incidents_30d", Compare.AT_LEAST, 3, DAY, recovery=0),
        None,
        Recommendation(
            "Instrument the hops the incidents went through with OpenTelemetry, first the one between app and "
            "database; keep the trace id in the logs.",
            "The next incident is read off one trace in place of three logs.",
            "A collector and a store for traces; a few percent of time, by the rate of sampling.",
        ),
    )
