"""One page's worth of facts for people without Grafana: is anything wrong, and how is it going.

Belongs here: reading what the schemas sync, archive and scaling say about the last 90 days, and judging what of it
needs somebody. Does not: pictures (`scaling.report_charts`), HTML (`scaling.report_page`), a source of metrics, S3 or
Google: whatever the page shows was recorded by a run before.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from zoneinfo import ZoneInfo

from scaling import capabilities, episodes, headroom, notifications
from scaling.capabilities import Capability, Change, Mode
from scaling.catalogue import Catalogue
from scaling.databases import Connection, DatabaseRouter, Shard
from scaling.episodes import Episode, EpisodeState
from scaling.google_calls import POLLS_PER_HOUR, TOKEN_REFRESH
from scaling.headroom import Headroom
from scaling.overrides import configured
from scaling.prices import storage_usd
from scaling.samples import Status
from scaling.settings import ArchiveSourceSettings, ScalingSettings, load
from scaling.thresholds import Phase
from scaling.units import Unit

DAYS = 90
UNAUDITED_AFTER = timedelta(days=2)
"""The chain is audited every night."""
QUIET_AFTER = timedelta(minutes=15)
"""Ticks start every two minutes and work for less; so long without one, and the sync stands still."""
UNMEASURED_AFTER = timedelta(hours=3)
SOON = timedelta(days=30)
EPISODES_SHOWN = 30
TROUBLES_SHOWN = 20
MONTHS_OF_GROWTH = 3


class Severity(StrEnum):
    """How much a finding matters."""

    ACT = "act"
    """Somebody has to do something."""
    LOOK = "look"
    """Worth a look in the next days."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be.

    Attributes:
        severity: how much it matters.
        title: what it is, in a few words.
        detail: the figures.
        do: what to do.
        section: of the page, where there is more.
    """

    severity: Severity
    title: str
    detail: str
    do: str
    section: str


@dataclass(frozen=True, slots=True)
class Day:
    """One UTC day of the sync.

    Attributes:
        day: which.
        calls: Calendar API requests, retries included.
        failed: of these, refused or unanswered.
        polling: requests that two-minute polling would have cost in the hours in which the sync ran.
        p50: bound in seconds that half of the changes stayed within; None: no change was timed.
        p95: the same of 95 %.
        changes: that were timed.
    """

    day: date
    calls: int
    failed: int
    polling: float
    p50: int | None
    p95: int | None
    changes: int

    @property
    def saved(self) -> float | None:
        """Share of the calls that polling would have cost and this did not; None: nothing ran."""
        return 1 - self.calls / self.polling if self.polling else None


class MonthState(StrEnum):
    """Where a month of the audit logs is."""

    ARCHIVED = "archived"
    """In the archive, and in Postgres too."""
    PRUNED = "pruned"
    """In the archive only."""
    OPEN = "open"
    """Not over yet, or within its grace period."""
    ARCHIVING = "archiving"
    MISSING = "missing"
    """Over, and not in the archive."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ArchiveMonth:
    """One month of the audit logs, over all databases.

    Attributes:
        first: its first day.
        state: where it is.
        rows: in the archive.
        size: of its Parquet, in bytes.
        late_rows: of the rows, those that came after the month was archived first.
        archived_at: its newest generation.
        pruned_at: when it left Postgres.
        error: why it failed.
    """

    first: date
    state: MonthState
    rows: int = 0
    size: int = 0
    late_rows: int = 0
    archived_at: datetime | None = None
    pruned_at: datetime | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Audit:
    """What an audit of one database's chain found.

    Attributes:
        ended_at: when it was over.
        deep: every row was read, too.
        links: of the chain.
        findings: how many things are not as they were published.
        worst: the first of them, a sentence each.
    """

    ended_at: datetime
    deep: bool
    links: int
    findings: int
    worst: Sequence[str]


@dataclass(frozen=True, slots=True)
class ChainEnd:
    """The pinned end of one database's chain of signed links.

    Attributes:
        shard: the database.
        sequence: number of its newest link.
        sha256: of that link.
        signed: whether it is.
        pinned_at: when it became the end.
        audit: the newest; None: there was none.
        deep_audit_at: when every row was read last; None: never.
    """

    shard: str
    sequence: int
    sha256: str
    signed: bool
    pinned_at: datetime
    audit: Audit | None = None
    deep_audit_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Trouble:
    """A workspace that is not well."""

    workspace: str
    health: str
    reason: str
    since: datetime


@dataclass(frozen=True, slots=True)
class CapabilityStanding:
    """One capability.

    Attributes:
        capability: which.
        mode: of it.
        in_force: whether it is.
        last: switch; None: it was never switched, or it is no switch.
        acted: the newest episode for which it acted, where it is an action; None: there was none.
    """

    capability: Capability
    mode: Mode
    in_force: bool
    last: Change | None
    acted: Episode | None


@dataclass(frozen=True, slots=True)
class Costs:
    """What is known or estimated to be paid a month, in USD.

    Attributes:
        stored_bytes: of Parquet.
        storage: a month of them at the list price.
        storage_in_a_year: the same in twelve months, when each adds as much as the last three did; None: too few.
        billed: title of a metric in USD to its newest figure.
    """

    stored_bytes: int
    storage: float
    storage_in_a_year: float | None
    billed: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Report:
    """All that the page shows.

    Attributes:
        now: when it was read.
        findings: what needs somebody, the worst first; empty: all is well.
        thresholds: metrics with a rule that were measured, the nearest to its threshold first.
        evidence: metrics without a rule that were measured.
        unmeasured: metrics that were never measured, or are not configured.
        days: of the sync, oldest first; only those on record.
        last_run_at: start of the newest run of the sync; None: there was none.
        calendars: that are synced, by the newest run.
        healths: how many workspaces by health.
        troubles: the workspaces that are not well, the longest first.
        quarantined: events that could not be stored.
        months: of the audit logs, oldest first.
        zone: whose calendar months these are.
        chain: the pinned ends.
        unlisted: objects in the bucket that a failed attempt may have left.
        costs: in USD.
        episodes: the newest first.
        open_episodes: that have neither recovered nor are over.
        capabilities: in their order.
    """

    now: datetime
    findings: Sequence[Finding]
    thresholds: Sequence[Headroom]
    evidence: Sequence[Headroom]
    unmeasured: Sequence[Headroom]
    days: Sequence[Day]
    last_run_at: datetime | None
    calendars: int
    healths: Mapping[str, int]
    troubles: Sequence[Trouble]
    quarantined: int
    months: Sequence[ArchiveMonth]
    zone: str
    chain: Sequence[ChainEnd]
    unlisted: int
    costs: Costs
    episodes: Sequence[Episode]
    capabilities: Sequence[CapabilityStanding]

    def saved(self, days: int) -> float | None:
        """Share of the calls of two-minute polling that were not made, of the last days; None: nothing ran.

        Args:
            days: how many, today included.
        """
        recent = [day for day in self.days if day.day > self.now.date() - timedelta(days=days)]
        polling = sum(day.polling for day in recent)
        return 1 - sum(day.calls for day in recent) / polling if polling else None

    @property
    def newest_fresh(self) -> Day | None:
        """The newest day on which changes were timed."""
        return next((day for day in reversed(self.days) if day.p95 is not None), None)


@dataclass(frozen=True, slots=True)
class _OfShard:
    """What one database says."""

    calls: Mapping[date, tuple[int, int]]
    polling: Mapping[date, float]
    freshness: Mapping[date, Mapping[int, int]]
    last_run_at: datetime | None
    calendars: int
    healths: Mapping[str, int]
    troubles: Sequence[Trouble]
    quarantined: int
    months: Sequence[ArchiveMonth]
    chain: Sequence[ChainEnd]
    unlisted: int


def configuration() -> tuple[Catalogue, ScalingSettings, ArchiveSourceSettings]:
    """What the environment says of what is read: the metrics, the modes of the capabilities, the archived table.

    Raises:
        UserError: a setting is wrong.
    """
    settings = load(ScalingSettings)
    return configured(settings), settings, load(ArchiveSourceSettings)


def current(router: DatabaseRouter) -> Report:
    """Read everything as it is now, with the settings of the environment.

    Args:
        router: to the databases.

    Raises:
        UserError: a database does not answer, or a setting is wrong.
    """
    return read(router, *configuration(), datetime.now(UTC))


def read(
    router: DatabaseRouter,
    catalogue: Catalogue,
    settings: ScalingSettings,
    archive: ArchiveSourceSettings,
    now: datetime,
) -> Report:
    """Read everything.

    Args:
        router: to the databases.
        catalogue: the metrics.
        settings: the modes of the capabilities.
        archive: which table is archived, since when, and when a month is closed.
        now: the end of the time that is shown.

    Raises:
        UserError: a database does not answer.
    """
    since = now.date() - timedelta(days=DAYS - 1)
    shards = [_of_shard(shard, archive, since) for shard in router.shards()]
    with router.shards()[0].transaction() as connection:
        rows = headroom.by_urgency(headroom.table(connection, catalogue, now))
        newest = episodes.listing(connection, limit=EPISODES_SHOWN)
        waiting = episodes.listing(connection, states=(EpisodeState.NEEDS_HUMAN, EpisodeState.PROPOSED))
        standing = _capabilities(connection, settings)
        untold = notifications.waiting(connection)
    asleep = [row for row in rows if row.sample is None or row.sample.status is Status.NOT_CONFIGURED]
    measured = [row for row in rows if row not in asleep]
    months = _timeline([month for shard in shards for month in shard.months], len(shards), archive, now)
    chain = [end for shard in shards for end in shard.chain]
    healths: Counter[str] = Counter()
    for shard in shards:
        healths.update(shard.healths)
    last_runs = [shard.last_run_at for shard in shards if shard.last_run_at]
    troubles = sorted((each for shard in shards for each in shard.troubles), key=lambda each: each.since)
    findings = [
        *_of_workspaces(healths, max(last_runs, default=None), now),
        *_of_thresholds(measured, now),
        *_of_episodes(waiting),
        *_of_months(months),
        *_of_chain(months, chain, now),
        *_of_alerts(untold),
    ]
    return Report(
        now,
        sorted(findings, key=lambda finding: finding.severity is not Severity.ACT),
        [row for row in measured if _is_shown(row)],
        [row for row in measured if not row.metric.rule],
        asleep,
        _days(shards),
        max(last_runs, default=None),
        sum(shard.calendars for shard in shards),
        healths,
        troubles[:TROUBLES_SHOWN],
        sum(shard.quarantined for shard in shards),
        months,
        archive.archive_time_zone,
        chain,
        sum(shard.unlisted for shard in shards),
        _costs(months, measured),
        newest,
        standing,
    )


CHAIN_ENDS = """
SELECT h.shard, h.sequence, h.link_sha256, h.signature IS NOT NULL, h.pinned_at,
    (SELECT max(ended_at) FROM archive.audits d WHERE (d.source_table, d.shard) = (h.source_table, h.shard) AND d.deep),
    a.ended_at, a.deep, a.links, a.findings,
    ARRAY(SELECT concat(f ->> 'month', ': ', f ->> 'text') FROM jsonb_array_elements(a.worst) f)
FROM archive.chain_heads h
LEFT JOIN LATERAL (SELECT * FROM archive.audits a WHERE (a.source_table, a.shard) = (h.source_table, h.shard)
                   ORDER BY a.ended_at DESC LIMIT 1) a ON true
WHERE h.source_table = %s ORDER BY h.shard
"""


def _of_shard(shard: Shard, archive: ArchiveSourceSettings, since: date) -> _OfShard:
    with shard.transaction() as connection:
        calls = connection.execute(
            "SELECT day, sum(calls)::bigint, sum(calls) FILTER (WHERE outcome !~ '^[23]')::bigint FROM sync.api_calls"
            " WHERE day >= %s AND method <> %s GROUP BY day",
            [since, TOKEN_REFRESH],
        ).fetchall()
        polling = connection.execute(
            "SELECT hour::date, sum(live)::float8 * %s FROM (SELECT date_trunc('hour', started_at AT TIME ZONE 'UTC')"
            " AS hour, avg(calendars_live) AS live FROM sync.runs"
            " WHERE started_at >= %s::timestamp AT TIME ZONE 'UTC' GROUP BY 1) hours GROUP BY 1",
            [POLLS_PER_HOUR, since],
        ).fetchall()
        freshness: dict[date, dict[int, int]] = {}
        for day, bound, changes in connection.execute(
            "SELECT day, le_seconds, changes FROM sync.freshness WHERE day >= %s", [since]
        ):
            freshness.setdefault(day, {})[bound] = changes
        last = connection.execute(
            "SELECT started_at, calendars_live FROM sync.runs ORDER BY started_at DESC LIMIT 1"
        ).fetchone()
        healths = connection.execute("SELECT health, count(*) FROM sync.workspace_state GROUP BY 1").fetchall()
        troubles = connection.execute(
            "SELECT tenant_id || ':' || workspace_id, health, coalesce(health_reason, ''), health_since"
            " FROM sync.workspace_state WHERE health IN ('needs_human', 'degraded')"
            " ORDER BY health <> 'needs_human', health_since LIMIT %s",
            [TROUBLES_SHOWN],
        ).fetchall()
        counted = connection.execute(
            "SELECT (SELECT count(*) FROM sync.quarantine),"
            " (SELECT count(*) FROM archive.uploads WHERE source_table = %s)",
            [archive.archive_table],
        ).fetchone() or (0, 0)
        months = connection.execute(
            "SELECT month, CASE WHEN state = 'archived' AND pruned_at IS NOT NULL THEN 'pruned' ELSE state END,"
            " coalesce(rows, 0), coalesce(bytes, 0), late_rows, archived_at, pruned_at,"
            " CASE WHEN state = 'failed' THEN coalesce(error, '') ELSE '' END"
            " FROM archive.months WHERE source_table = %s",
            [archive.archive_table],
        ).fetchall()
        ends = connection.execute(CHAIN_ENDS, [archive.archive_table]).fetchall()
    return _OfShard(
        {day: (made, failed or 0) for day, made, failed in calls},
        dict(polling),
        freshness,
        last[0] if last else None,
        last[1] if last else 0,
        dict(healths),
        [Trouble(*row) for row in troubles],
        counted[0],
        [ArchiveMonth(first, MonthState(state), *others) for first, state, *others in months],
        [
            ChainEnd(shard, sequence, sha256, signed, pinned_at, Audit(*audit) if audit[0] else None, deep_audit_at)
            for shard, sequence, sha256, signed, pinned_at, deep_audit_at, *audit in ends
        ],
        counted[1],
    )


def _days(shards: Sequence[_OfShard]) -> list[Day]:
    known = sorted({day for shard in shards for day in (*shard.calls, *shard.polling, *shard.freshness)})
    days = []
    for day in known:
        histogram: Counter[int] = Counter()
        for shard in shards:
            histogram.update(shard.freshness.get(day, {}))
        made = [shard.calls.get(day, (0, 0)) for shard in shards]
        days.append(
            Day(
                day,
                sum(calls for calls, _ in made),
                sum(failed for _, failed in made),
                sum(shard.polling.get(day, 0.0) for shard in shards),
                _quantile(histogram, 0.5),
                _quantile(histogram, 0.95),
                sum(histogram.values()),
            )
        )
    return days


def _quantile(histogram: Mapping[int, int], fraction: float) -> int | None:
    """The bound that this share of the changes stayed within; None without changes."""
    wanted = math.ceil(fraction * sum(histogram.values()))
    for bound, changes in sorted(histogram.items()):
        wanted -= changes
        if wanted <= 0 and changes:
            return bound
    return None


def _timeline(
    recorded: Sequence[ArchiveMonth], shards: int, archive: ArchiveSourceSettings, now: datetime
) -> list[ArchiveMonth]:
    """Every month since the first one, also those of which nothing is recorded."""
    by_month: dict[date, list[ArchiveMonth]] = {}
    for each in recorded:
        by_month.setdefault(each.first, []).append(each)
    zone = ZoneInfo(archive.archive_time_zone)
    present = now.astimezone(zone).date().replace(day=1)
    first = min([date.fromisoformat(f"{archive.archive_first_month}-01"), *by_month])
    months = []
    while first <= present:
        following = (first + timedelta(days=32)).replace(day=1)
        end = datetime(following.year, following.month, 1, tzinfo=zone)
        closed = end + timedelta(seconds=archive.archive_grace_seconds) <= now
        months.append(_merged(first, by_month.get(first, []), shards, closed=closed))
        first = following
    return months


def _merged(first: date, found: Sequence[ArchiveMonth], shards: int, *, closed: bool) -> ArchiveMonth:
    states = {each.state for each in found}
    worst = (MonthState.FAILED, MonthState.ARCHIVING)
    state = next((each for each in worst if each in states), None)
    if state is None and len(found) < shards:
        state = MonthState.MISSING if closed else MonthState.OPEN
    return ArchiveMonth(
        first,
        state or (MonthState.PRUNED if states == {MonthState.PRUNED} else MonthState.ARCHIVED),
        sum(each.rows for each in found),
        sum(each.size for each in found),
        sum(each.late_rows for each in found),
        max((each.archived_at for each in found if each.archived_at), default=None),
        max((each.pruned_at for each in found if each.pruned_at), default=None),
        next((each.error for each in found if each.error), ""),
    )


def _capabilities(connection: Connection, settings: ScalingSettings) -> list[CapabilityStanding]:
    on = capabilities.switched(connection)
    last: dict[Capability, Change] = {}
    for change in reversed(capabilities.changes(connection)):
        last[change.capability] = change
    return [
        CapabilityStanding(
            each,
            mode,
            capabilities.in_force(mode, switched_on=each in on),
            last.get(each),
            next(
                iter(episodes.listing(connection, states=(EpisodeState.ACTED,), capability=each, limit=1)),
                None,
            ),
        )
        for each, mode in capabilities.modes(settings).items()
    ]


def _costs(months: Sequence[ArchiveMonth], measured: Sequence[Headroom]) -> Costs:
    sizes = [month.size for month in months if month.state in (MonthState.ARCHIVED, MonthState.PRUNED)]
    stored = sum(sizes)
    recent = sizes[-MONTHS_OF_GROWTH:]
    grown = stored + 12 * sum(recent) // len(recent) if len(recent) == MONTHS_OF_GROWTH else None
    billed = {
        row.metric.title: row.sample.value
        for row in measured
        if row.metric.unit is Unit.DOLLARS and row.sample is not None and row.sample.value is not None
    }
    return Costs(stored, storage_usd(stored), None if grown is None else storage_usd(grown), billed)


def _of_workspaces(healths: Mapping[str, int], last_run_at: datetime | None, now: datetime) -> Iterator[Finding]:
    if stuck := healths.get("needs_human", 0):
        yield Finding(
            Severity.ACT,
            f"{stuck:,} workspace{'s need' if stuck > 1 else ' needs'} a human",
            f"of {sum(healths.values()):,}; all others are served",
            "Do what the reason below asks for; docs/operations.md has a line for each.",
            "sync",
        )
    if last_run_at is not None and now - last_run_at > QUIET_AFTER:
        yield Finding(
            Severity.ACT,
            "The calendar sync stands still",
            f"the last run started {last_run_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC",
            "Look whether Dagster's daemon runs and the schedule calendar_sync_schedule is on.",
            "sync",
        )


def _of_thresholds(rows: Sequence[Headroom], now: datetime) -> Iterator[Finding]:
    newest = max((row.sample.at for row in rows if row.sample), default=None)
    if newest is not None and now - newest > UNMEASURED_AFTER:
        yield Finding(
            Severity.ACT,
            "Nothing is measured any more",
            f"the newest figure is of {newest.astimezone(UTC):%Y-%m-%d %H:%M} UTC",
            "Look whether Dagster's daemon runs and the schedule scaling_metrics_schedule is on.",
            "thresholds",
        )
    for row in rows:
        recommendation = row.metric.recommendation
        # The rest of it stands with the metric.
        do = f"{recommendation.do.split('. ')[0].rstrip('.')}." if recommendation else f"See {row.metric.runbook}."
        section = f"metric-{anchor(row)}" if _is_shown(row) else "thresholds"
        if row.crossed and _holds(row) and not taken_up(row):
            yield Finding(
                Severity.ACT,
                f"{row.metric.title}{f' ({row.dims})' if row.dims else ''} is over its threshold",
                f"{headroom.value_in_words(row)}, threshold {headroom.threshold_in_words(row.metric)}",
                do,
                section,
            )
        elif _is_shown(row) and row.forecast and row.forecast.p50 and row.forecast.p50 - now <= SOON:
            yield Finding(
                Severity.LOOK,
                f"{row.metric.title}{f' ({row.dims})' if row.dims else ''} will reach its threshold soon",
                reached_about(row),
                do,
                section,
            )
        if (row.state and row.state.missing) or (row.sample and row.sample.status in (Status.ERROR, Status.STALE)):
            yield Finding(
                Severity.LOOK,
                f"{row.metric.title}{f' ({row.dims})' if row.dims else ''} cannot be measured",
                headroom.value_in_words(row),
                f"python -m scaling explain {row.metric.name} shows why; nothing fires meanwhile.",
                section,
            )


def _of_episodes(waiting: Sequence[Episode]) -> Iterator[Finding]:
    for episode in waiting:
        if episode.state is EpisodeState.NEEDS_HUMAN:
            yield Finding(
                Severity.ACT,
                f"Episode {episode.id} was given up ({episode.rule})",
                episode.error or "its rule flaps",
                f"Mend what it says, then: python -m scaling approve {episode.id} --by NAME",
                "episodes",
            )
        elif episode.acknowledged_by is None:
            yield Finding(
                Severity.LOOK,
                f"Episode {episode.id} waits for approval ({episode.rule})",
                f"it would start {episode.capability}",
                f"python -m scaling approve {episode.id} --by NAME, or job approve_episode",
                "episodes",
            )


def _of_months(months: Sequence[ArchiveMonth]) -> Iterator[Finding]:
    failed = [month for month in months if month.state is MonthState.FAILED]
    if failed:
        yield Finding(
            Severity.ACT,
            f"{len(failed)} month{'s were' if len(failed) > 1 else ' was'} not archived",
            f"{_names(failed)}: {failed[-1].error}" if failed[-1].error else _names(failed),
            "Mend what it says, and materialize the month of audit_log_archive again.",
            "archive",
        )
    kept = _kept(months)
    missing = [month for month in months if month.state is MonthState.MISSING]
    if kept and missing:
        yield Finding(
            Severity.LOOK,
            f"{len(missing)} closed month{'s are' if len(missing) > 1 else ' is'} not in the archive",
            _names(missing),
            "Backfill them: asset audit_log_archive, Materialize, pick the months.",
            "archive",
        )


def _of_chain(months: Sequence[ArchiveMonth], chain: Sequence[ChainEnd], now: datetime) -> Iterator[Finding]:
    for end in chain:
        if end.audit is not None and end.audit.findings:
            count = end.audit.findings
            yield Finding(
                Severity.ACT,
                f"The archive is not what was published: {count:,} finding{'s' if count > 1 else ''}",
                end.audit.worst[0] if end.audit.worst else f"database {end.shard}",
                "python -m archive_pipeline.audit verify shows each, and how to get the right bytes back.",
                "chain",
            )
        last = end.audit.ended_at if end.audit else None
        if now - (last or end.pinned_at) > UNAUDITED_AFTER:
            yield Finding(
                Severity.LOOK,
                "The chain is not audited",
                f"the last audit was on {last.astimezone(UTC):%Y-%m-%d}" if last else "never, as far as is recorded",
                "Look whether Dagster's daemon runs and the schedule audit_log_upkeep_schedule is on.",
                "chain",
            )
    kept = _kept(months)
    if kept and not chain:
        yield Finding(
            Severity.LOOK,
            "The end of the chain is not pinned",
            f"{len(kept)} months are archived",
            "python -m archive_pipeline.audit pin, once verify finds nothing.",
            "chain",
        )
    if any(not end.signed for end in chain):
        yield Finding(
            Severity.LOOK,
            "The chain is not signed",
            "its newest link carries no signature",
            "Set ARCHIVE_SIGNING_KEY (python -m archive_pipeline.audit new-key), or a KMS key.",
            "chain",
        )


def _kept(months: Sequence[ArchiveMonth]) -> list[ArchiveMonth]:
    return [month for month in months if month.state in (MonthState.ARCHIVED, MonthState.PRUNED)]


def _of_alerts(untold: notifications.Waiting) -> Iterator[Finding]:
    if untold.late or untold.dropped:
        yield Finding(
            Severity.ACT,
            "Alerts do not arrive",
            f"{untold.late:,} are tried again for over an hour, {untold.dropped:,} were given up in three days",
            "SELECT channel, error FROM scaling.notifications WHERE sent_at IS NULL says why; mend ALERT_….",
            "episodes",
        )


def taken_up(row: Headroom) -> bool:
    """Whether somebody, or an action, has taken up a crossing.

    Args:
        row: that is crossed.
    """
    if row.episode is None:
        return False
    at_work = (EpisodeState.APPROVED, EpisodeState.ACTING, EpisodeState.ACTED, EpisodeState.ACTION_FAILED)
    # What is proposed or given up is a finding of its own.
    waits = (EpisodeState.PROPOSED, EpisodeState.NEEDS_HUMAN)
    return row.episode.acknowledged_by is not None or row.episode.state in (*at_work, *waits)


def reached_about(row: Headroom) -> str:
    """When the threshold will be reached, as short as a line takes; empty: it is, or nobody can tell.

    Args:
        row: of the metric.
    """
    foreseen = row.forecast
    if row.crossed or foreseen is None or not foreseen.trend or foreseen.p50 is None:
        return ""
    first, last = (f"{each:%d %b}" if each else "" for each in (foreseen.p10, foreseen.p90))
    span = f" ({first or '?'} to {last or 'never'})" if first != last or not first else ""
    return f"about {foreseen.p50:%d %b %Y}{span}"


def _is_shown(row: Headroom) -> bool:
    """Whether it has a line of its own: it is judged, and no source that is well."""
    return row.metric.rule is not None and (row.metric.unit is not Unit.PERIODS or row.crossed)


def _holds(row: Headroom) -> bool:
    return row.state is not None and row.state.phase in (Phase.FIRED, Phase.CLEARING, Phase.LATCHED)


def anchor(row: Headroom) -> str:
    """What a page's links call a metric and what it was measured of.

    Args:
        row: of the metric.
    """
    return "".join(each if each.isalnum() and each.isascii() else "-" for each in f"{row.metric.name}-{row.dims}")


def _names(months: Sequence[ArchiveMonth]) -> str:
    shown = ", ".join(f"{month.first:%Y-%m}" for month in months[-6:])
    return shown if len(months) <= 6 else f"{shown} and {len(months) - 6} before"
