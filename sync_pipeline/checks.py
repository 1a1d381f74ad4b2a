"""Asset checks of `calendar_events`: fresh, within the error budget, nothing stuck, nothing unreadable.

Belongs here: limits, severities, and what each check says. Does not: the SQL (`sync_pipeline.vital_signs`).
https://docs.dagster.io/guides/test/asset-checks
"""

from collections.abc import Iterator

import dagster as dg

from scaling.resources import failing_with_a_sentence
from scaling.settings import SyncScheduleSettings, load
from sync_pipeline import vital_signs
from sync_pipeline.assets import calendar_events
from sync_pipeline.resources import SyncResource
from sync_pipeline.vital_signs import VitalSigns

STALE_AFTER_POLLS = 5
STALE_AFTER_AT_LEAST_SECONDS = 900.0
STALE_BUDGET = 0.01
"""Share of calendars that may be stale before the check warns."""
FAILING_BUDGET = 0.05
"""Share of calendars whose last sync may have failed before the check warns."""


def _spec(name: str, description: str) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(name, asset=calendar_events.key, description=description)


@dg.multi_asset_check(
    name="calendar_events_checks",
    # After the tick whose run they are in, also when it failed; a dependency on sync_ticks would skip them then.
    op_tags={"dagster/priority": "-1"},
    description="Reads the state tables once and judges the whole sync; takes milliseconds and changes nothing.",
    specs=[
        _spec(
            "calendars_are_fresh", "At most 1 % of the calendars were last synced too long ago (five polls, 15 min)."
        ),
        _spec("failures_are_within_budget", "The last sync failed for at most 5 % of the calendars."),
        _spec(
            "nobody_is_needed", "No workspace waits for a human: no refused grant, no denied access, no open breaker."
        ),
        _spec("every_event_is_readable", "No event had to be put into sync.quarantine."),
    ],
)
def calendar_events_checks(sync: SyncResource) -> Iterator[dg.AssetCheckResult]:
    """Judge the state of the sync."""
    polls = load(SyncScheduleSettings).sync_poll_interval_seconds * STALE_AFTER_POLLS
    stale_after = max(polls, STALE_AFTER_AT_LEAST_SECONDS)
    with failing_with_a_sentence(), sync.databases() as router:
        for shard in router.shards():
            with shard.transaction() as connection:
                signs = vital_signs.read(connection, stale_after_seconds=stale_after)
            yield from judge(signs, stale_after_seconds=stale_after)


def judge(signs: VitalSigns, *, stale_after_seconds: float) -> Iterator[dg.AssetCheckResult]:
    """Turn the vital signs into check results.

    Args:
        signs: as read.
        stale_after_seconds: the limit they were read with.
    """
    calendars = max(signs.calendars, 1)
    yield _result(
        "calendars_are_fresh",
        passed=signs.stale_calendars / calendars <= STALE_BUDGET,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"{signs.stale_calendars} of {signs.calendars} calendars were last synced more than "
        f"{stale_after_seconds:.0f} s ago.",
        metadata={
            "calendars": signs.calendars,
            "stale_calendars": signs.stale_calendars,
            "never_synced_calendars": signs.never_synced_calendars,
            "oldest_sync_seconds": round(signs.oldest_sync_seconds, 1),
        },
    )
    yield _result(
        "failures_are_within_budget",
        passed=signs.failing_calendars / calendars <= FAILING_BUDGET,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"The last sync of {signs.failing_calendars} of {signs.calendars} calendars failed.",
        metadata={
            "failing_calendars": signs.failing_calendars,
            "workspaces": dg.MetadataValue.json(list(signs.workspaces_failing)),
        },
    )
    yield _result(
        "nobody_is_needed",
        passed=not signs.workspaces_needing_human,
        severity=dg.AssetCheckSeverity.ERROR,
        description="These workspaces wait for a human: " + ", ".join(signs.workspaces_needing_human)
        if signs.workspaces_needing_human
        else "No workspace waits for a human.",
        metadata={
            "connections": signs.connections,
            "refused_connections": signs.refused_connections,
            "open_breakers": signs.open_breakers,
            "workspaces": dg.MetadataValue.json(list(signs.workspaces_needing_human)),
        },
    )
    yield _result(
        "every_event_is_readable",
        passed=signs.quarantined == 0,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"{signs.quarantined} events of {signs.quarantined_in_calendars} calendars are in sync.quarantine.",
        metadata={
            "quarantined": signs.quarantined,
            "reasons": dg.MetadataValue.json(list(signs.quarantine_reasons)),
        },
    )


def _result(
    name: str,
    *,
    passed: bool,
    severity: dg.AssetCheckSeverity,
    description: str,
    metadata: dict[str, int | float | dg.JsonMetadataValue],
) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name=name,
        asset_key=calendar_events.key,
        passed=passed,
        severity=severity,
        description=description,
        metadata=metadata,
    )
