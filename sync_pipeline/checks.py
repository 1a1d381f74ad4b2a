"""Asset checks of `calendar_events`: fresh, within the error budget and the quota, nothing stuck, nothing unreadable.

Belongs here: limits, severities, and what each check says. Does not: the SQL (`vital_signs`, `call_buckets`).
https://docs.dagster.io/guides/test/asset-checks
"""

from collections.abc import Iterator, Mapping, Sequence

import dagster as dg

from scaling.databases import DatabaseRouter
from scaling.errors import UserError
from scaling.resources import failing_with_a_sentence
from scaling.settings import SyncScheduleSettings, SyncSettings, load
from sync_pipeline import call_buckets, error_budget, vital_signs
from sync_pipeline.call_buckets import Headroom, QuotaLimits
from sync_pipeline.resources import SyncResource
from sync_pipeline.vital_signs import EXAMPLES, VitalSigns

CALENDAR_EVENTS = dg.AssetKey("calendar_events")
STALE_AFTER_POLLS = 5
STALE_AFTER_AT_LEAST_SECONDS = 900.0
STALE_BUDGET = 0.01
"""Share of workspaces that may be stale before the check warns."""

Shown = str | int | float | dg.MetadataValue


def _spec(name: str, description: str) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(name, asset=CALENDAR_EVENTS, description=description)


@dg.multi_asset_check(
    name="calendar_events_checks",
    can_subset=True,  # or the UI offers no button to run them
    description="Reads the state tables once and judges the whole sync; takes milliseconds and changes nothing. Every "
    "tick does so at its end.",
    specs=[
        _spec(
            "workspaces_are_fresh",
            "At most 1 % of the workspaces have a calendar that has been due for too long (five shortest poll "
            "intervals, at least 15 min), or that fails and is older than five of its own intervals.",
        ),
        _spec(
            "failures_are_within_budget",
            "In at most 5 % of the workspaces, or at most two, something fails that may pass by itself.",
        ),
        _spec(
            "quota_has_headroom",
            "Warns when 80 % of the day's calls are used or more than all of them will be; an error when none is left.",
        ),
        _spec(
            "nobody_is_needed",
            "No workspace waits for a human: no refused grant, no denied access, nothing that has failed or stood "
            "still for too long.",
        ),
        _spec("every_event_is_readable", "No event had to be put into sync.quarantine."),
    ],
)
def calendar_events_checks(context: dg.AssetCheckExecutionContext, sync: SyncResource) -> Iterator[dg.AssetCheckResult]:
    """Judge the state of the sync."""
    asked = {key.name for key in context.selected_asset_check_keys}
    with failing_with_a_sentence(), sync.databases() as router:
        limits = QuotaLimits.from_settings(load(SyncSettings))
        for evaluation in evaluations(router, limits):
            if evaluation.check_name not in asked:
                continue
            yield dg.AssetCheckResult(
                check_name=evaluation.check_name,
                asset_key=evaluation.asset_key,
                passed=evaluation.passed,
                severity=evaluation.severity,
                description=evaluation.description,
                metadata=evaluation.metadata,
            )


def evaluations_of_tick(sync: SyncResource) -> tuple[dg.AssetCheckEvaluation, ...]:
    """Judge the state of the sync at the end of a tick.

    A step of its own would cost three rows of the event log per check and two more for the step, every two minutes;
    reported from within the tick they cost one each.

    Args:
        sync: opens the databases.

    Returns:
        What can be judged: nothing without a database, nothing of the quota while settings are missing. The tick says
        which.
    """
    try:
        limits = QuotaLimits.from_settings(load(SyncSettings))
    except UserError:
        limits = None
    try:
        with sync.databases() as router:
            return tuple(evaluations(router, limits))
    except UserError:
        return ()


def evaluations(router: DatabaseRouter, limits: QuotaLimits | None) -> Iterator[dg.AssetCheckEvaluation]:
    """Read the vital signs and judge them.

    Args:
        router: to the databases.
        limits: the quotas; None leaves them unjudged.
    """
    polls = load(SyncScheduleSettings).sync_poll_interval_seconds * STALE_AFTER_POLLS
    stale_after = max(polls, STALE_AFTER_AT_LEAST_SECONDS)
    [shard] = router.shards()  # with more of them, a check would need one verdict over all
    with shard.transaction() as connection:
        signs = vital_signs.read(connection, stale_after_seconds=stale_after)
        headroom = call_buckets.headroom(connection, limits) if limits else None
    yield from judge(signs, stale_after_seconds=stale_after)
    if headroom:
        yield judge_quota(headroom)


def judge(signs: VitalSigns, *, stale_after_seconds: float) -> Iterator[dg.AssetCheckEvaluation]:
    """Turn the vital signs into evaluations.

    Args:
        signs: as read.
        stale_after_seconds: the limit they were read with.
    """
    warn, error = dg.AssetCheckSeverity.WARN, dg.AssetCheckSeverity.ERROR
    yield _evaluation(
        "workspaces_are_fresh",
        passed=signs.stale_workspaces <= signs.workspaces * STALE_BUDGET,
        severity=warn,
        description=f"{signs.stale_workspaces} of {signs.workspaces} workspaces have a calendar that has waited longer "
        f"than {stale_after_seconds:.0f} s or several of its intervals.",
        metadata={
            "workspaces": signs.workspaces,
            "stale_workspaces": signs.stale_workspaces,
            "calendars": signs.calendars,
            "never_synced_calendars": signs.never_synced_calendars,
            "oldest_sync_seconds": round(signs.oldest_sync_seconds, 1),
            **_table(
                "stalest",
                ("workspace", "calendars", "seconds"),
                [(one.workspace, one.calendars, round(one.oldest_seconds)) for one in signs.stale],
            ),
        },
    )
    yield _evaluation(
        "failures_are_within_budget",
        passed=not error_budget.is_exceeded(signs.failing_workspaces, signs.workspaces),
        severity=warn,
        description=f"Something fails in {signs.failing_workspaces} of {signs.workspaces} workspaces; "
        f"{error_budget.SHARE:.0%} may.",
        metadata={
            "failing_workspaces": signs.failing_workspaces,
            "failing_share": round(signs.failing_workspaces / max(signs.workspaces, 1), 4),
            "failing_calendars": signs.failing_calendars,
            **({"failing": dg.MetadataValue.json(list(signs.failing))} if signs.failing else {}),
        },
    )
    shown = ", ".join(f"{one.workspace} ({', '.join(one.reasons)})" for one in signs.stuck)
    more = f" and {signs.stuck_workspaces - EXAMPLES} more" if signs.stuck_workspaces > EXAMPLES else ""
    yield _evaluation(
        "nobody_is_needed",
        passed=not signs.stuck_workspaces,
        severity=error,
        description=f"{signs.stuck_workspaces} workspaces wait for a human: {shown}{more}"
        if signs.stuck_workspaces
        else "No workspace waits for a human.",
        metadata={
            "stuck_workspaces": signs.stuck_workspaces,
            "connections": signs.connections,
            "refused_connections": signs.refused_connections,
            "open_breakers": signs.open_breakers,
            **_table(
                "stuck",
                ("workspace", "reasons", "hours"),
                [(one.workspace, ", ".join(one.reasons), round(one.hours, 1)) for one in signs.stuck],
            ),
        },
    )
    yield _evaluation(
        "every_event_is_readable",
        passed=signs.quarantined == 0,
        severity=warn,
        description=f"{signs.quarantined} events of {signs.quarantined_in_calendars} calendars are in sync.quarantine.",
        metadata={
            "quarantined": signs.quarantined,
            **({"reasons": dg.MetadataValue.json(list(signs.quarantine_reasons))} if signs.quarantined else {}),
        },
    )


def judge_quota(headroom: Headroom) -> dg.AssetCheckEvaluation:
    """Turn the quota's numbers into an evaluation.

    Args:
        headroom: as read.
    """
    used = f"{headroom.calls_today:,} of {headroom.calls_per_day:,} calls of the day (Pacific time) are used"
    if headroom.is_used_up:
        outlook = (
            f"nothing is synced for {headroom.seconds_to_midnight / 3600:.1f} h; raise SYNC_CALLS_PER_DAY only if "
        )
        outlook += "Google granted more"
    else:
        outlook = f"{headroom.projected_calls:,} are expected by midnight"
    return _evaluation(
        "quota_has_headroom",
        passed=not headroom.is_short,
        severity=dg.AssetCheckSeverity.ERROR if headroom.is_used_up else dg.AssetCheckSeverity.WARN,
        description=f"{used}; {outlook}.",
        metadata={
            "calls_today": headroom.calls_today,
            "calls_per_day": headroom.calls_per_day,
            "share_used": round(headroom.share_used, 4),
            "projected_calls": headroom.projected_calls,
            "project_factor": round(headroom.project_factor, 4),
            "project_fill": round(headroom.project_fill, 4),
            "hours_to_midnight": round(headroom.seconds_to_midnight / 3600, 2),
        },
    )


def _table(
    name: str, columns: Sequence[str], rows: Sequence[tuple[str | int | float, ...]]
) -> dict[str, dg.MetadataValue]:
    """A table of examples; none at all when there are none, because it would be stored at every tick."""
    if not rows:
        return {}
    types = {str: "text", int: "int", float: "float"}
    return {
        name: dg.MetadataValue.table(
            [dg.TableRecord(dict(zip(columns, row, strict=True))) for row in rows[:EXAMPLES]],
            schema=dg.TableSchema(
                columns=[
                    dg.TableColumn(column, types[type(value)]) for column, value in zip(columns, rows[0], strict=True)
                ]
            ),
        )
    }


def _evaluation(
    name: str, *, passed: bool, severity: dg.AssetCheckSeverity, description: str, metadata: Mapping[str, Shown]
) -> dg.AssetCheckEvaluation:
    return dg.AssetCheckEvaluation(
        asset_key=CALENDAR_EVENTS,
        check_name=name,
        passed=passed,
        severity=severity,
        description=description,
        metadata=metadata,
    )
