"""Calendars of a simulated Google arrive in Postgres and stay equal to it."""

from devstack.google_calendar import Simulator
from tests.sync_pipeline.conftest import Saas, differences
from tests.sync_pipeline.scenes import Tick, meeting


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


def test_requests_are_counted_by_tenant(google: Simulator, saas: Saas, tick_once: Tick) -> None:
    user = google.add_user("ann@example.com")
    workspace = saas.workspace()
    saas.connect(workspace, user)
    results = [tick_once(), tick_once()]
    counted = saas.execute("SELECT tenant_id, method, outcome, calls::int FROM sync.api_calls ORDER BY method")
    assert counted == [
        (workspace.tenant_id, "calendarList.list", "200", 2),
        (workspace.tenant_id, "events.list", "200", 2),
        (workspace.tenant_id, "oauth.refresh", "200", 1),
    ]
    assert sum(result.tally.api_calls for result in results) == 4
    assert google.counts().count("events.list") == 2
    runs = saas.execute("SELECT workspaces_served, api_calls::int, finished_at IS NOT NULL FROM sync.runs")
    assert runs == [(1, 2, True), (1, 2, True)]
