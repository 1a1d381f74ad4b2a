"""Calendars of a simulated Google arrive in Postgres and stay equal to it."""

from collections.abc import Callable

from devstack.google_calendar import Simulator
from sync_pipeline.tick import TickResult
from tests.sync_pipeline.conftest import Saas, differences

Tick = Callable[[], TickResult]


def meeting(number: int = 1, **fields: object) -> dict[str, object]:
    return {
        "summary": f"Meeting {number}",
        "start": {"dateTime": "2026-03-02T10:00:00+01:00", "timeZone": "Europe/Berlin"},
        "end": {"dateTime": "2026-03-02T11:00:00+01:00", "timeZone": "Europe/Berlin"},
        **fields,
    }


def test_a_new_connection_is_synced_completely_by_one_tick(google: Simulator, saas: Saas, tick_once: Tick) -> None:
    user = google.add_user("ann@example.com")
    (calendar,) = user.calendars
    google.edit(calendar, [{"op": "insert", "event": meeting(n)} for n in range(5)])
    workspace = saas.workspace()
    saas.connect(workspace, user)

    result = tick_once()

    assert result.failed == ()
    assert result.tally.full_syncs == 1
    assert result.tally.events_upserted == 5
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def test_the_second_tick_asks_for_changes_only(google: Simulator, saas: Saas, tick_once: Tick) -> None:
    user = google.add_user("ann@example.com")
    (calendar,) = user.calendars
    first, second, _ = google.edit(calendar, [{"op": "insert", "event": meeting(n)} for n in range(3)])
    workspace = saas.workspace()
    saas.connect(workspace, user)
    tick_once()

    assert first is not None
    assert second is not None
    google.edit(
        calendar,
        [
            {"op": "patch", "id": first["id"], "event": {"summary": "Moved"}},
            {"op": "delete", "id": second["id"]},
            {"op": "insert", "event": meeting(4)},
        ],
    )
    google.reset_counts()
    result = tick_once()

    assert (result.tally.full_syncs, result.tally.incremental_syncs) == (0, 1)
    assert (result.tally.events_upserted, result.tally.events_deleted) == (2, 1)
    assert google.counts().count("events.list", incremental=True) == 1
    assert google.counts().drift == {}
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}
