"""One API call as the handlers see it, and what they answer with.

Reading HTTP and writing it belong to the server; finding the calendar and the rights a call needs belongs here.
"""

from dataclasses import dataclass, field

from devstack.google_calendar import errors
from devstack.google_calendar.partial import Mask, masked
from devstack.google_calendar.resource import Resource, dumps, loads_object
from devstack.google_calendar.state import RANK, Calendar, User, World


@dataclass(slots=True)
class Call:
    """A decoded, authenticated request."""

    world: World
    user: User
    method: str  # e.g. "events.list"
    path: dict[str, str]  # calendarId, eventId, …
    query: dict[str, list[str]]
    headers: dict[bytes, bytes]
    body: bytes = b""
    sent: Resource | None = None  # the body's JSON object, when it did not come over the wire
    page: int = 1
    page_limit: int | None = None  # a fault's way to shorten this page
    drift: list[str] = field(default_factory=list)

    def text(self, name: str) -> str | None:
        """Return a query parameter, None if it is absent or empty."""
        values = self.query.get(name)
        return values[-1] or None if values else None

    def flag(self, name: str) -> bool | None:
        """Return a boolean query parameter, None if it is absent."""
        value = self.text(name)
        return None if value is None else boolean(name, value)

    def limit(self, default: int, maximum: int) -> int:
        """Return the page size: maxResults, its default, at most the documented maximum."""
        if self.page_limit is not None:
            return self.page_limit
        value = self.text("maxResults")
        if value is None:
            return default
        if not value.isdecimal() or int(value) < 1:
            raise errors.invalid_parameter("maxResults", value, "integer")
        return min(int(value), maximum)

    def resource(self) -> Resource:
        """Return the JSON object in the body.

        Raises:
            ApiError: 400 parseError if it is none.
        """
        if self.sent is not None:
            return self.sent
        try:
            return loads_object(self.body)
        except ValueError as error:
            raise errors.parse_error() from error

    def calendar(self, least: str = "freeBusyReader", name: str | None = None) -> tuple[Calendar, str]:
        """Return the calendar the path (or `name`) means and the user's role on it.

        Args:
            least: the role the call needs.
            name: a calendar id other than the path's.

        Raises:
            ApiError: 404 if the user cannot see the calendar, 403 if the role is too low.
        """
        calendar_id = name or self.path["calendarId"]
        if calendar_id == "primary":
            calendar_id = self.user.email
        calendar = self.world.calendars.get(calendar_id)
        role = calendar.roles.get(self.user.email) if calendar else None
        if calendar is None or role is None:
            raise errors.not_found()
        if RANK[role] < RANK[least]:
            raise errors.writer_access_required()
        return calendar, role

    def check_etag(self, etag: str) -> None:
        """Honour If-Match.

        Raises:
            ApiError: 412 if the header names another version.
        """
        wanted = self.headers.get(b"if-match")
        if wanted is not None and wanted.decode("latin-1") not in ("*", etag):
            raise errors.condition_not_met()


@dataclass(slots=True)
class ListPage:
    """One page of a collection; its items are serialised already."""

    head: Resource
    items: list[bytes]
    next_page_token: str | None = None
    next_sync_token: str | None = None

    @property
    def etag(self) -> str:
        """The collection's ETag."""
        return str(self.head["etag"])

    def render(self, mask: Mask | None) -> bytes:
        """Return the JSON body, reduced to the `fields` asked for."""
        head = self.head
        if self.next_page_token is not None:
            head = head | {"nextPageToken": self.next_page_token}
        if self.next_sync_token is not None:
            head = head | {"nextSyncToken": self.next_sync_token}
        items: list[bytes] | None = self.items
        if mask is not None:
            inner = mask.get("items", mask.get("*"))
            if "items" not in mask and "*" not in mask:
                items = None
            elif inner is not None:
                items = [dumps(masked(loads_object(item), inner)) for item in self.items]
            head = masked(head, mask)
        text = dumps(head)
        if items is None:
            return text
        comma = b"," if len(text) > len(b"{}") else b""
        return b"".join((text[:-1], comma, b'"items":[', b",".join(items), b"]}"))


def boolean(name: str, value: str) -> bool:
    """Read a boolean query parameter.

    Raises:
        ApiError: 400 if it is neither true nor false.
    """
    if value in ("true", "True", "1"):
        return True
    if value in ("false", "False", "0"):
        return False
    raise errors.invalid_parameter(name, value, "boolean")
