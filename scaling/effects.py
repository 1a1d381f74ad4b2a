"""Whether a capability did what it was switched on for: the same figures before the switch and after it.

Belongs here: reading both sides of a switch, comparing them, and the sentence about it. Does not: switching, or
measuring (what the sync did is in `sync.runs`, the sizes of tables are samples).

Figures of the sync come from `sync.runs`, where every scheduled run says what was in force. What people sync by hand is
in no run, and is no effect of a switch. A run's calls stand for the time until the next run starts, one hour at most,
so that a pause of the sync is neither cheap nor expensive.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from scaling import episodes
from scaling.capabilities import Capability
from scaling.databases import Connection
from scaling.episodes import Episode, EpisodeState

WINDOW = timedelta(days=7)
"""A week has working days and others; longer ago, or later on, other things have changed."""
LEAST_RUNS = 10
LEAST_TIME = timedelta(minutes=10)
"""Of each side; less says nothing."""
HOURS_OF_A_DAY = 24
PLANNED_FEWER_CALLS = (0.70, 0.90)
"""The scaling plan, section 2.1: API calls down 70 to 90 %."""
PLANNED_TICK_SECONDS = 45.0
"""The scaling plan, section 7.1: a mean from which the work has to be parallel."""
TABLE_METRIC = "audit_logs_bytes"
EPISODES_LOOKED_AT = 200

Basis = Literal["whole days", "hours", "samples"]
Verdict = Literal["as planned", "better than planned", "less than planned", "no plan to hold it against"]


@dataclass(frozen=True, slots=True)
class Effect:
    """What a switch changed.

    Attributes:
        capability: that was switched on.
        switched_at: when.
        measured_at: when this was measured.
        basis: whole UTC days on both sides; hours, as long as a side has no whole day; or samples of a size.
        is_final: it covers the whole window after the switch, and is not measured again.
        before: figures by name; see `Effect.figure`.
        after: the same figures after the switch.
        figure: name of the figure that the verdict is about.
        change: of that figure, as a share of what it was: -0.8 is 80 % less.
        verdict: against the scaling plan.
        sentence: all of it, for people.
    """

    capability: Capability
    switched_at: datetime
    measured_at: datetime
    basis: Basis
    is_final: bool
    before: Mapping[str, float]
    after: Mapping[str, float]
    figure: str
    change: float
    verdict: Verdict
    sentence: str

    def to_json(self) -> dict[str, Any]:
        """As `scaling.episodes.effect` holds it."""
        return {
            **asdict(self),
            "capability": self.capability.value,
            "switched_at": self.switched_at.isoformat(),
            "measured_at": self.measured_at.isoformat(),
        }


def measure_effect(
    connection: Connection, capability: Capability, switched_at: datetime, now: datetime
) -> Effect | None:
    """Compare a week before a switch with what there is after it, a week at most.

    Args:
        connection: in a transaction of the first shard.
        capability: that was switched on.
        switched_at: when.
        now: the moment of the measurement.

    Returns:
        The effect; None while too little is recorded of one of the sides.
    """
    match capability:
        case Capability.INCREMENTAL_SYNC | Capability.PARALLEL_SYNC:
            return _of_sync(connection, capability, switched_at, now)
        case Capability.AUDIT_LOG_PARTITIONING | Capability.AUDIT_LOG_RETENTION:
            return _of_table(connection, capability, switched_at, now)


def update(connection: Connection, now: datetime) -> list[Episode]:
    """Measure the effects of the episodes that were acted on, and store them; those that are final stay.

    Args:
        connection: in a transaction of the first shard.
        now: the moment of the measurement.

    Returns:
        The episodes whose effect is new or changed, as they are now.
    """
    changed = []
    for episode in episodes.listing(connection, states=[EpisodeState.ACTED], limit=EPISODES_LOOKED_AT):
        if episode.capability is None or episode.acted_at is None or (episode.effect or {}).get("is_final"):
            continue
        row = connection.execute(
            "SELECT min(changed_at) FROM scaling.capability_changes WHERE episode_id = %s AND active", [episode.id]
        ).fetchone()
        switched_at = row[0] if row and row[0] else episode.acted_at
        effect = measure_effect(connection, episode.capability, switched_at, now)
        if effect is not None:
            episodes.set_effect(connection, episode.id, effect.to_json())
            changed.append(episodes.get(connection, episode.id))
    return changed


# `flag` is what the measured capability was in each run, `other` the other one. A lost run never said what it called,
# so it is left out of calls; of time it took at least until its last sign of life.
_RUNS = """
WITH runs AS (
    SELECT started_at, finished_at, api_calls, workspaces_served, calendars_synced, calendars_live,
        CASE WHEN %(incremental)s THEN incremental ELSE parallel END AS flag,
        CASE WHEN %(incremental)s THEN parallel ELSE incremental END AS other,
        CASE WHEN finished_at IS NULL THEN extract(epoch FROM heartbeat_at - started_at)::float8
             ELSE duration_seconds END AS seconds,
        lead(started_at) OVER (ORDER BY started_at) - started_at AS gap
    FROM sync.runs
    WHERE started_at >= %(switched_at)s::timestamptz - %(window)s::interval
      AND started_at < least(%(switched_at)s::timestamptz + %(window)s::interval, %(now)s::timestamptz)
), sides AS (
    SELECT *, least(gap, interval '1 hour') AS stands_for, started_at >= %(switched_at)s AS is_after,
        (started_at AT TIME ZONE 'UTC')::date AS day,
        date_trunc('hour', started_at, 'UTC') AS hour
    FROM runs WHERE flag = (started_at >= %(switched_at)s) AND gap IS NOT NULL
), whole_days AS (
    SELECT is_after, day FROM sides
    WHERE day <> (%(switched_at)s::timestamptz AT TIME ZONE 'UTC')::date
    GROUP BY is_after, day HAVING count(DISTINCT hour) = %(hours)s
)
SELECT is_after, count(*), count(*) FILTER (WHERE finished_at IS NULL),
    coalesce(extract(epoch FROM sum(stands_for) FILTER (WHERE finished_at IS NOT NULL)), 0)::float8,
    coalesce(sum(api_calls) FILTER (WHERE finished_at IS NOT NULL), 0)::float8,
    coalesce(sum(calendars_live * extract(epoch FROM stands_for)) FILTER (WHERE finished_at IS NOT NULL), 0)::float8,
    sum(calendars_synced)::float8, sum(workspaces_served)::float8, avg(seconds)::float8, sum(seconds)::float8,
    count(DISTINCT day)::float8, avg(CASE WHEN other THEN 1 ELSE 0 END)::float8
FROM sides WHERE NOT %(whole)s OR (is_after, day) IN (SELECT is_after, day FROM whole_days)
GROUP BY is_after
"""


def _of_sync(connection: Connection, capability: Capability, switched_at: datetime, now: datetime) -> Effect | None:
    incremental = capability is Capability.INCREMENTAL_SYNC
    for basis in ("whole days", "hours"):
        rows = connection.execute(
            _RUNS,
            {
                "incremental": incremental,
                "switched_at": switched_at,
                "window": WINDOW,
                "now": now,
                "hours": HOURS_OF_A_DAY,
                "whole": basis == "whole days",
            },
        ).fetchall()
        sides = {row[0]: _figures(*row[1:]) for row in rows}
        if len(sides) == 2 and all(
            side["runs"] >= LEAST_RUNS and side["hours"] * 3600 >= LEAST_TIME.total_seconds() for side in sides.values()
        ):
            break
    else:
        return None
    before, after = sides[False], sides[True]
    figure = "calls_per_calendar_and_day" if incremental else "seconds_per_workspace"
    if not before.get(figure) or figure not in after:
        return None
    change = round(after[figure] / before[figure] - 1, 4)
    verdict, held_against = _judged(capability, after, change)
    said = (
        f"{_said_of_calls(before, after)} {held_against} {_said_of_ticks(before, after)}"
        if incremental
        else f"{_said_of_ticks(before, after)} {held_against} {_said_of_calls(before, after)}"
    )
    measured_over = (
        f" Measured over {after['days']:.0f} whole days after the switch and {before['days']:.0f} before it."
        if basis == "whole days"
        else f" Measured over {after['hours']:.1f} h after the switch and {before['hours']:.1f} h before it, so far."
    )
    other = Capability.PARALLEL_SYNC if incremental else Capability.INCREMENTAL_SYNC
    confounded = (
        f" {other} changed in the same time, so not all of it is the effect of {capability}."
        if abs(before["share_with_the_other"] - after["share_with_the_other"]) > 0.05
        else ""
    )
    return Effect(
        capability,
        switched_at,
        now,
        "whole days" if basis == "whole days" else "hours",
        now >= switched_at + WINDOW,
        before,
        after,
        figure,
        change,
        verdict,
        said + measured_over + confounded,
    )


def _figures(
    runs: int,
    lost: int,
    seconds: float,
    calls: float,
    calendar_seconds: float,
    visits: float,
    workspaces: float,
    mean_tick: float,
    ticks: float,
    days: float,
    other: float,
) -> dict[str, float]:
    """Figures of one side by name; what cannot be divided is absent."""
    figures = {
        "runs": float(runs),
        "runs_lost": float(lost),
        "days": days,
        "hours": round(seconds / 3600, 2),
        "mean_tick_seconds": round(mean_tick, 4),
        "workspaces_per_tick": round(workspaces / runs, 2),
        "share_with_the_other": round(other, 4),
    }
    if seconds:
        figures["calls_per_day"] = round(calls / seconds * 86400, 1)
    if calendar_seconds:
        figures["calls_per_calendar_and_day"] = round(calls / calendar_seconds * 86400, 3)
    if visits:
        figures["calls_per_visit"] = round(calls / visits, 3)
    if workspaces:
        figures["seconds_per_workspace"] = round(ticks / workspaces, 4)
    return figures


def _judged(capability: Capability, after: Mapping[str, float], change: float) -> tuple[Verdict, str]:
    """The verdict, and the sentence that says what it is held against."""
    if capability is Capability.INCREMENTAL_SYNC:
        least, most = PLANNED_FEWER_CALLS
        plan = f"the plan expects {least:.0%} to {most:.0%} fewer"
        if -change < least:
            return "less than planned", f"That is less than planned: {plan}."
        if -change > most:
            return "better than planned", f"That is better than planned: {plan}."
        return "as planned", f"That is as planned: {plan}."
    if after["mean_tick_seconds"] < PLANNED_TICK_SECONDS and change < 0:
        return "as planned", f"That is as planned: a tick stays below {PLANNED_TICK_SECONDS:.0f} s."
    return (
        "less than planned",
        f"That is less than planned: a tick should stay below {PLANNED_TICK_SECONDS:.0f} s, a workspace take less.",
    )


def _said_of_calls(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    name = "calls_per_calendar_and_day"
    if not before.get(name) or name not in after:
        return "Calls to Google cannot be compared."
    return (
        f"Calls to Google per calendar and day: {after[name]:,.1f}, before {before[name]:,.1f} "
        f"({after[name] / before[name] - 1:+.0%}); all calls a day: {after['calls_per_day']:,.0f}, "
        f"before {before['calls_per_day']:,.0f}."
    )


def _said_of_ticks(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    name = "seconds_per_workspace"
    each = (
        f"; per workspace served: {after[name]:.2f} s, before {before[name]:.2f} s "
        f"({after[name] / before[name] - 1:+.0%})"
        if before.get(name) and name in after
        else ""
    )
    return (
        f"A tick takes {after['mean_tick_seconds']:.1f} s for {after['workspaces_per_tick']:.1f} workspaces, before "
        f"{before['mean_tick_seconds']:.1f} s for {before['workspaces_per_tick']:.1f}{each}."
    )


def _of_table(connection: Connection, capability: Capability, acted_at: datetime, now: datetime) -> Effect | None:
    row = connection.execute(
        """
        SELECT (SELECT value FROM scaling.samples
                WHERE metric = %(metric)s AND status = 'ok' AND at <= %(acted)s
                  AND at >= %(acted)s::timestamptz - %(window)s::interval
                ORDER BY at DESC LIMIT 1),
               (SELECT value FROM scaling.samples
                WHERE metric = %(metric)s AND status = 'ok' AND at > %(acted)s
                  AND at <= least(%(acted)s::timestamptz + %(window)s::interval, %(now)s::timestamptz)
                ORDER BY at DESC LIMIT 1)
        """,
        {"metric": TABLE_METRIC, "acted": acted_at, "window": WINDOW, "now": now},
    ).fetchone()
    if row is None or not row[0] or row[1] is None:
        return None
    before, after = float(row[0]), float(row[1])
    change = round(after / before - 1, 4)
    return Effect(
        capability,
        acted_at,
        now,
        "samples",
        now >= acted_at + WINDOW,
        {"table_bytes": before},
        {"table_bytes": after},
        "table_bytes",
        change,
        "no plan to hold it against",
        f"The audit logs take {after / 2**20:,.1f} MiB, before {before / 2**20:,.1f} MiB ({change:+.0%}).",
    )
