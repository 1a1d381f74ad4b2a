"""Partial responses: the `fields` parameter, e.g. `items(id,start/dateTime),nextSyncToken`.

A field that a mask leaves out is gone from the answer, nextSyncToken included: that is how clients lose their token.
"""

from functools import lru_cache
from typing import Optional, TypeAlias

from devstack.google_calendar import errors
from devstack.google_calendar.resource import Resource

# Field name -> its own mask, None for the whole field; "*" stands for every field.
Mask: TypeAlias = dict[str, Optional["Mask"]]


_LIST = frozenset({"etag", "items", "kind", "nextPageToken", "nextSyncToken"})
_EVENT = (
    "anyoneCanAddSelf attachments attendees attendeesOmitted birthdayProperties colorId conferenceData created creator"
    " description end endTimeUnspecified etag eventLabelId eventType extendedProperties focusTimeProperties gadget"
    " guestsCanInviteOthers guestsCanModify guestsCanSeeOtherGuests hangoutLink htmlLink iCalUID id kind location"
    " locked organizer originalStartTime outOfOfficeProperties privateCopy recurrence recurringEventId reminders"
    " sequence source start status summary transparency updated visibility workingLocationProperties"
)
_ENTRY = (
    "accessRole autoAcceptInvitations backgroundColor colorId conferenceProperties dataOwner defaultReminders deleted"
    " description etag foregroundColor hidden id kind location notificationSettings primary selected summary"
    " summaryOverride timeZone"
)
# The field names of the discovery document's schemas, by kind; other kinds are not checked.
_KNOWN: dict[str, frozenset[str]] = {
    "calendar#events": _LIST | {"accessRole", "defaultReminders", "description", "summary", "timeZone", "updated"},
    "calendar#event": frozenset(_EVENT.split()),
    "calendar#calendarList": _LIST,
    "calendar#calendarListEntry": frozenset(_ENTRY.split()),
}
_ITEMS = {"calendar#events": "calendar#event", "calendar#calendarList": "calendar#calendarListEntry"}


@lru_cache(maxsize=256)
def parse(text: str, kind: str) -> Mask:
    """Parse a `fields` value for a resource of this kind.

    Raises:
        ApiError: 400 if it cannot be parsed or names a field that a resource of the kind never has.
    """
    mask, rest = _fields(text, text)
    if rest:
        raise _bad(text)
    _check(mask, kind)
    return mask


def _check(mask: Mask, kind: str) -> None:
    known = _KNOWN.get(kind)
    if known is None:
        return
    for name, inner in mask.items():
        if name != "*" and name not in known:
            raise _bad(name)
        if name == "items" and inner is not None:
            _check(inner, _ITEMS[kind])


def masked(value: Resource, mask: Mask) -> Resource:
    """Return the parts of `value` that the mask names."""
    if "*" in mask:
        inner = mask["*"]
        return {name: _part(part, inner) for name, part in value.items()}
    return {name: _part(value[name], inner) for name, inner in mask.items() if name in value}


def _part(value: object, mask: Mask | None) -> object:
    if mask is None:
        return value
    if isinstance(value, list):
        return [_part(item, mask) for item in value]
    return masked(value, mask) if isinstance(value, dict) else value


def _fields(text: str, whole: str) -> tuple[Mask, str]:
    """Parse `a,b/c,d(e,f)` up to a closing parenthesis; return the mask and what is left."""
    mask: Mask = {}
    while True:
        text = _field(text, whole, mask)
        if not text or text[0] == ")":
            return mask, text
        if text[0] != ",":
            raise _bad(whole)
        text = text[1:]


def _field(text: str, whole: str, mask: Mask) -> str:
    """Parse one field into the mask and return what is left."""
    end = next((i for i, char in enumerate(text) if char in ",/()"), len(text))
    name, text = text[:end].strip(), text[end:]
    if not name:
        raise _bad(whole)
    inner: Mask | None = None
    if text.startswith("/"):
        inner = {}
        text = _field(text[1:], whole, inner)
    elif text.startswith("("):
        inner, text = _fields(text[1:], whole)
        if not text.startswith(")"):
            raise _bad(whole)
        text = text[1:]
    known = mask.get(name)
    mask[name] = {**known, **inner} if known and inner else inner
    return text


def _bad(text: str) -> errors.ApiError:
    return errors.ApiError(
        400, "invalidParameter", f"Invalid field selection {text}", location_type="parameter", location="fields"
    )
