"""Which handler answers which method and path of the Calendar API, by the discovery document's method ids."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from devstack.google_calendar import calendar_lists, calendars, events_list, events_write
from devstack.google_calendar.call import Call, ListPage
from devstack.google_calendar.push import Push
from devstack.google_calendar.resource import Resource

Handler: TypeAlias = Callable[[Call], Resource | ListPage | None]
# Resources of the real API that clients may ask for and this simulator does not have.
NOT_IMPLEMENTED = frozenset({"acl", "settings", "freeBusy", "transferOwnership"})


@dataclass(frozen=True, slots=True)
class Route:
    """One API method."""

    verb: str
    path: tuple[str, ...]  # segments after /calendar/v3; "{name}" matches any one
    method: str
    handler: Handler


class Routes:
    """The table of API methods."""

    def __init__(self, push: Push) -> None:
        self._by_shape: dict[tuple[str, int, str], list[Route]] = {}
        for route in _table(push):
            self._by_shape.setdefault((route.verb, len(route.path), route.path[0]), []).append(route)

    def match(self, verb: str, segments: list[str]) -> tuple[Route, dict[str, str]] | None:
        """Return the route for a request and the values of its path parameters, None if there is none."""
        for route in self._by_shape.get((verb, len(segments), segments[0]), ()):
            values = {}
            for pattern, segment in zip(route.path, segments, strict=True):
                if pattern[0] == "{":
                    values[pattern[1:-1]] = segment
                elif pattern != segment:
                    break
            else:
                return route, values
        return None


def _table(push: Push) -> list[Route]:
    rows: list[tuple[str, str, str, Handler]] = [
        ("GET", "calendars/{calendarId}/events", "events.list", events_list.list_events),
        ("POST", "calendars/{calendarId}/events", "events.insert", events_write.insert_event),
        ("POST", "calendars/{calendarId}/events/import", "events.import", events_write.import_event),
        ("POST", "calendars/{calendarId}/events/quickAdd", "events.quickAdd", events_write.quick_add),
        ("POST", "calendars/{calendarId}/events/watch", "events.watch", push.watch_events),
        ("GET", "calendars/{calendarId}/events/{eventId}", "events.get", events_write.get_event),
        ("PUT", "calendars/{calendarId}/events/{eventId}", "events.update", events_write.update_event),
        ("PATCH", "calendars/{calendarId}/events/{eventId}", "events.patch", events_write.patch_event),
        ("DELETE", "calendars/{calendarId}/events/{eventId}", "events.delete", events_write.delete_event),
        ("GET", "calendars/{calendarId}/events/{eventId}/instances", "events.instances", events_list.list_instances),
        ("POST", "calendars/{calendarId}/events/{eventId}/move", "events.move", events_write.move_event),
        ("POST", "calendars/{calendarId}/clear", "calendars.clear", events_write.clear_calendar),
        ("POST", "calendars", "calendars.insert", calendars.insert_calendar),
        ("GET", "calendars/{calendarId}", "calendars.get", calendars.get_calendar),
        ("PUT", "calendars/{calendarId}", "calendars.update", calendars.update_calendar),
        ("PATCH", "calendars/{calendarId}", "calendars.patch", calendars.patch_calendar),
        ("DELETE", "calendars/{calendarId}", "calendars.delete", calendars.delete_calendar),
        ("GET", "users/me/calendarList", "calendarList.list", calendar_lists.list_calendars),
        ("POST", "users/me/calendarList", "calendarList.insert", calendar_lists.insert_entry),
        ("POST", "users/me/calendarList/watch", "calendarList.watch", push.watch_list),
        ("GET", "users/me/calendarList/{calendarId}", "calendarList.get", calendar_lists.get_entry),
        ("PUT", "users/me/calendarList/{calendarId}", "calendarList.update", calendar_lists.update_entry),
        ("PATCH", "users/me/calendarList/{calendarId}", "calendarList.patch", calendar_lists.patch_entry),
        ("DELETE", "users/me/calendarList/{calendarId}", "calendarList.delete", calendar_lists.delete_entry),
        ("POST", "channels/stop", "channels.stop", push.stop),
        ("GET", "colors", "colors.get", calendars.get_colors),
    ]
    return [Route(verb, tuple(path.split("/")), method, handler) for verb, path, method, handler in rows]
