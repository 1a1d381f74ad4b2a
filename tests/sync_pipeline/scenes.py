"""What the tests of the sync tell their stories with: events, series, small pages, the passing of time.

Belongs here: what several test modules need and no fixture gives. Does not: fixtures (`conftest`), assertions.
"""

from collections.abc import Callable

from devstack.google_calendar import Simulator
from sync_pipeline.events import Json
from sync_pipeline.tick import TickResult
from sync_pipeline.workspaces import Workspace
from tests.sync_pipeline.conftest import Saas

Tick = Callable[[], TickResult]


def meeting(number: int = 1, **fields: Json) -> dict[str, Json]:
    """A meeting on Monday, 2 March 2026, 10:00 to 11:00 in Berlin."""
    return {
        "summary": f"Meeting {number}",
        "start": {"dateTime": "2026-03-02T10:00:00+01:00", "timeZone": "Europe/Berlin"},
        "end": {"dateTime": "2026-03-02T11:00:00+01:00", "timeZone": "Europe/Berlin"},
        **fields,
    }


def connected(google: Simulator, saas: Saas, name: str = "ann") -> tuple[Workspace, str]:
    """A workspace whose connection sees one empty calendar: workspace, calendar id."""
    user = google.add_user(f"{name}@example.com")
    workspace = saas.workspace()
    saas.connect(workspace, user)
    return workspace, user.calendars[0]


def insert(google: Simulator, calendar: str, *events: dict[str, Json]) -> list[str]:
    """Let the owner make events; their ids."""
    made = google.edit(calendar, [{"op": "insert", "event": event} for event in events])
    return [str(event["id"]) for event in made if event]


def patch(google: Simulator, calendar: str, event_id: str, **fields: Json) -> None:
    """Let the owner change an event, an instance, or restore a deleted one (`status="confirmed"`)."""
    google.edit(calendar, [{"op": "patch", "id": event_id, "event": fields}])


def delete(google: Simulator, calendar: str, *event_ids: str) -> None:
    """Let the owner delete events or instances."""
    google.edit(calendar, [{"op": "delete", "id": event_id} for event_id in event_ids])


def kinds(result: TickResult) -> list[str]:
    """What went wrong in a tick."""
    return [trouble.kind for failed in result.failed for trouble in failed.troubles]


def make_due(saas: Saas, workspace: Workspace) -> None:
    """Let backoff, breaker and parking pass."""
    for statement in (
        "UPDATE sync.calendar_state SET due_at = 'epoch', breaker_until = NULL WHERE workspace_id = %s",
        "UPDATE sync.connection_state SET list_due_at = 'epoch', parked_until = NULL WHERE workspace_id = %s",
    ):
        saas.execute(statement, workspace.workspace_id)


def end_leases(saas: Saas) -> None:
    """Let every lease run out, as when its worker died some time ago."""
    saas.execute("UPDATE sync.calendar_state SET lease_until = now() - interval '1 second' WHERE lease_until > now()")
    saas.execute("UPDATE sync.connection_state SET lease_until = now() - interval '1 second' WHERE lease_until > now()")


def row_versions(saas: Saas) -> list[tuple[object, ...]]:
    """Every stored event with the transaction that wrote it; equal lists mean that nothing was written."""
    return saas.execute(
        "SELECT workspace_id, calendar_id, generation, event_id, xmin::text, changed_at FROM sync.event_rows "
        "ORDER BY 1, 2, 3, 4"
    )
