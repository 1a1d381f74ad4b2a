"""calendarList.*: a user's list of calendars, with its own pages and sync tokens.

Only what the user sets about an entry (selected, hidden, colours, name override, reminders) is a change of the list;
a renamed calendar or another access role is read-only here and never shows up incrementally (discovery).
"""

from devstack.google_calendar import errors
from devstack.google_calendar.call import Call, ListPage
from devstack.google_calendar.cursors import begin, next_page_token, next_sync_token
from devstack.google_calendar.resource import Resource, dumps, patched
from devstack.google_calendar.state import RANK, ListEntry, User

DEFAULT_PAGE, MAX_PAGE = 100, 250  # discovery: calendarList.list.maxResults
_RESTRICTIONS = ("minAccessRole", "showOwnOrganizationOnly")
_FINGERPRINT = frozenset({"showDeleted", "showHidden"})
_OWN = (
    "selected", "hidden", "colorId", "backgroundColor", "foregroundColor", "summaryOverride", "defaultReminders",
    "notificationSettings",
)  # fmt: skip


def list_calendars(call: Call) -> ListPage:
    """Answer calendarList.list."""
    user = call.user
    if call.text("syncToken") and (
        any(name in call.query for name in _RESTRICTIONS)
        or call.flag("showDeleted") is False
        or call.flag("showHidden") is False
    ):
        raise errors.sync_token_restrictions()
    least = call.text("minAccessRole") or "none"
    if least not in RANK:
        raise errors.invalid_parameter("minAccessRole", least, "string")
    params = tuple((name, "true") for name in sorted(_FINGERPRINT) if call.flag(name))
    cursor = begin(
        call,
        collection=f"l{user.number}",
        role="owner",
        epoch=user.list_epoch,
        version=user.list_version,
        last_seq=0,
        params=params,
        fingerprint=_FINGERPRINT,
    )
    page = ListPage({"kind": "calendar#calendarList", "etag": f'"l{user.number}v{user.list_version}"'}, [])
    if cursor.stuck:
        page.next_sync_token = call.text("syncToken")
        return page
    incremental = cursor.base_version >= 0
    limit = call.limit(DEFAULT_PAGE, MAX_PAGE)
    position = cursor.position if isinstance(cursor.position, int) else 0
    for entry in sorted(user.entries.values(), key=lambda entry: entry.version):
        if not max(position, cursor.base_version) < entry.version <= cursor.snapshot_version:
            continue
        if not incremental:
            if (entry.deleted and not call.flag("showDeleted")) or (
                entry.own.get("hidden") and not call.flag("showHidden")
            ):
                continue
            if RANK[entry.calendar.roles.get(user.email, "none")] < RANK[least]:
                continue
        if len(page.items) == limit:
            page.next_page_token = next_page_token(call, cursor, position)
            return page
        position = entry.version
        page.items.append(dumps(_shown(user, entry)))
    if limit == 0:  # a fault's empty page leads on even when nothing is left
        page.next_page_token = next_page_token(call, cursor, position)
    else:
        page.next_sync_token = next_sync_token(call, cursor)
    return page


def get_entry(call: Call) -> Resource:
    """Answer calendarList.get."""
    return _shown(call.user, _entry(call))


def insert_entry(call: Call) -> Resource:
    """Answer calendarList.insert: an existing calendar the user may see joins the list."""
    sent = call.resource()
    calendar, role = call.calendar(name=str(sent.get("id", "")))
    entry = call.user.entries.get(calendar.id) or ListEntry(calendar, role=role)
    entry.deleted = False
    entry.own = {"selected": True} | {name: sent[name] for name in _OWN if name in sent}
    call.world.commit_entry(call.user, entry)
    return _shown(call.user, entry)


def patch_entry(call: Call) -> Resource:
    """Answer calendarList.patch."""
    entry = _entry(call)
    return _store(call, entry, patched(entry.own, {k: v for k, v in call.resource().items() if k in _OWN}))


def update_entry(call: Call) -> Resource:
    """Answer calendarList.update."""
    return _store(call, _entry(call), {k: v for k, v in call.resource().items() if k in _OWN})


def delete_entry(call: Call) -> None:
    """Answer calendarList.delete: the calendar leaves the list; the user's access stays."""
    entry = _entry(call)
    if entry.calendar.primary and entry.calendar.owner == call.user.email:
        raise errors.forbidden("cannotRemovePrimaryCalendar", "The primary calendar cannot be removed.", "calendar")
    entry.deleted = True
    call.world.commit_entry(call.user, entry)


def _entry(call: Call) -> ListEntry:
    calendar_id = call.path["calendarId"]
    entry = call.user.entries.get(call.user.email if calendar_id == "primary" else calendar_id)
    if entry is None or entry.deleted:
        raise errors.not_found()
    call.check_etag(_etag(call.user, entry))
    return entry


def _store(call: Call, entry: ListEntry, own: Resource) -> Resource:
    if own != entry.own:
        entry.own = own
        call.world.commit_entry(call.user, entry)
    return _shown(call.user, entry)


def _etag(user: User, entry: ListEntry) -> str:
    return f'"l{user.number}e{entry.version}c{entry.calendar.properties_version}"'


def _shown(user: User, entry: ListEntry) -> Resource:
    calendar = entry.calendar
    body: Resource = {
        "kind": "calendar#calendarListEntry",
        "etag": _etag(user, entry),
        "id": calendar.id,
        "summary": calendar.summary,
        "timeZone": calendar.time_zone,
        "accessRole": calendar.roles.get(user.email, entry.role),
        "conferenceProperties": {"allowedConferenceSolutionTypes": ["hangoutsMeet"]},
        "colorId": "14",
        "backgroundColor": "#9fe1e7",
        "foregroundColor": "#000000",
        "defaultReminders": [],
    }
    body |= {name: value for name, value in entry.own.items() if value not in (False, None)}
    if calendar.description is not None:
        body["description"] = calendar.description
    if calendar.location is not None:
        body["location"] = calendar.location
    if calendar.primary and calendar.owner == user.email:
        body["primary"] = True
    elif calendar.owner:
        body["dataOwner"] = calendar.owner
    if entry.deleted:
        body["deleted"] = True
    return body
