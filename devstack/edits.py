"""What people do in their calendars: the edits of the demo, made with Google's own client.

Belongs here: the edits, and whether Postgres shows what Google has. Does not: the sync in between.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from google.oauth2.credentials import Credentials
from googleapiclient import discovery

from devstack.google_calendar import SimulatedUser, Simulator


@dataclass(frozen=True, slots=True)
class Edited:
    """A calendar that was edited."""

    calendar: str
    edits: int


def edit_calendars(google: Simulator, count: int) -> list[Edited]:
    """Insert, rename, delete and except events in the own calendars of some accounts.

    Args:
        google: whose accounts; those with a note stay as they are.
        count: how many accounts.

    Returns:
        The calendars with how many edits each got.
    """
    return [_edit(google, user) for user in _untroubled(google)[:count]]


def is_mirrored(google: Simulator, calendar: str, dsn: str) -> bool:
    """Tell whether Postgres shows exactly the events that a calendar has.

    Args:
        google: the truth.
        calendar: its id.
        dsn: of the SaaS's database.
    """
    truth = google.truth(calendar)
    wanted = {event_id: event.get("summary") for event_id, event in truth.events.items()}
    wanted |= dict.fromkeys(truth.cancelled_instances)
    with psycopg.connect(dsn) as connection:
        shown: dict[str, object] = dict(
            connection.execute(
                "SELECT event_id, CASE WHEN status <> 'cancelled' THEN summary END FROM sync.calendar_events"
                " WHERE calendar_id = %s",
                [calendar],
            ).fetchall()
        )
    return shown == wanted


def _untroubled(google: Simulator) -> Sequence[SimulatedUser]:
    return [user for user in google.users if user.note is None and not user.calendar_notes]


def _edit(google: Simulator, user: SimulatedUser) -> Edited:
    calendar = user.email  # the id of an account's own calendar is its address
    events = discovery.build(
        "calendar",
        "v3",
        credentials=Credentials(user.access_token),  # type: ignore[no-untyped-call]  # google-auth has no types
        client_options={"api_endpoint": google.url},
        static_discovery=True,
        cache_discovery=False,
    ).events()
    present: list[dict[str, Any]] = events.list(calendarId=calendar, maxResults=2500).execute()["items"]
    series = [event for event in present if "recurrence" in event]
    single = [
        event for event in present if not {"recurrence", "recurringEventId"} & event.keys() and event.get("start")
    ]
    requests = [
        events.insert(
            calendarId=calendar,
            body={
                "summary": "Moved in from the demo 🦊",
                "start": {"dateTime": "2026-07-01T09:00:00", "timeZone": "Europe/Berlin"},
                "end": {"dateTime": "2026-07-01T10:00:00", "timeZone": "Europe/Berlin"},
            },
        )
    ]
    if single:
        moved = {
            "summary": "Moved to another day",
            "start": {"date": "2026-07-02", "dateTime": None, "timeZone": None},
            "end": {"date": "2026-07-03", "dateTime": None, "timeZone": None},
        }
        requests.append(events.patch(calendarId=calendar, eventId=single[0]["id"], body=moved))
    if len(single) > 1:
        requests.append(events.delete(calendarId=calendar, eventId=single[1]["id"]))
    if series:
        instances = events.instances(calendarId=calendar, eventId=series[0]["id"], maxResults=2).execute()["items"]
        if instances:
            requests.append(
                events.patch(calendarId=calendar, eventId=instances[0]["id"], body={"summary": "This once, elsewhere"})
            )
        if len(instances) > 1:
            requests.append(events.delete(calendarId=calendar, eventId=instances[1]["id"]))
    for request in requests:
        request.execute()
    return Edited(calendar, len(requests))
