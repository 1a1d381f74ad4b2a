"""Whatever an event or a page holds: it is stored, or named and put aside, and the sync goes on (cases 44 to 55)."""

import tracemalloc
from collections.abc import Callable
from random import Random

import pytest

from devstack.google_calendar import Simulator
from sync_pipeline.events import Json
from sync_pipeline.workspaces import Workspace
from tests.sync_pipeline.conftest import Saas, Sleeps, differences
from tests.sync_pipeline.scenes import Tick, connected, insert, kinds, meeting, patch

PagesOf = Callable[[int], None]


@pytest.fixture
def ann(google: Simulator, saas: Saas) -> tuple[Workspace, str]:
    """A workspace with one empty calendar, not yet synced."""
    return connected(google, saas)


@pytest.mark.parametrize("unstorable", ["\0", "\ud800"], ids=["NUL", "lone surrogate"])
def test_a_character_postgres_cannot_hold_is_replaced_named_and_counted(
    unstorable: str, google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    _, calendar = ann
    bad = f"a{unstorable}b"
    google.put_raw(
        calendar,
        [meeting(1, id="bad", summary=bad, extendedProperties={"private": {bad: bad}}), meeting(2, id="good")],
    )
    result = tick_once()
    assert (kinds(result), result.tally.quarantined, result.tally.events_upserted) == ([], 0, 2)
    assert saas.execute(
        "SELECT event_id, summary, raw #>> '{extendedProperties,private,a�b}', flaws "
        "FROM sync.calendar_events ORDER BY 1"
    ) == [("bad", "a�b", "a�b", ["characters_replaced"]), ("good", "Meeting 2", None, [])]


@pytest.mark.parametrize(
    "text",
    [
        "<p>" + "x" * 8_000 + "</p>",
        "<ul>" + "<li>é ß 漢字 &amp; <b>bold</b></li>\r\n\t" * 25_000 + "</ul>",
        "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 \U0010ffff",
        "\u202e\u05e4\u05d2\u05d9\u05e9\u05d4 \u0627\u062c\u062a\u0645\u0627\u0639\u200f",
        "\\u0000 is six characters, NULL is four, and '; DROP TABLE sync.event_rows; --",
    ],
    ids=["8 kB", "1 MB", "emoji", "right to left", "looks dangerous"],
)
def test_a_long_or_strange_text_comes_back_as_it_was(
    text: str, google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    insert(google, calendar, meeting(description=text))
    tick_once()
    assert saas.one("SELECT description, raw ->> 'description', flaws FROM sync.calendar_events") == (text, text, [])
    assert differences(saas, workspace, calendar, google.truth(calendar)) == {}


def test_an_event_without_start_and_end_is_stored_and_named(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    _, calendar = ann
    google.put_raw(calendar, [{"id": "timeless", "summary": "?"}, meeting(2, id="good")])
    result = tick_once()
    assert (kinds(result), result.tally.quarantined) == ([], 0)
    assert saas.one(
        "SELECT status, start_at, start_date, end_at, end_date, flaws FROM sync.calendar_events "
        "WHERE event_id = 'timeless'"
    ) == ("confirmed", None, None, None, None, ["start_missing", "end_missing"])


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ({"date": "0001-01-01"}, {"date": "0001-01-02"}),
        ({"date": "0000-01-01"}, {"date": "0000-01-02"}),
        ({"dateTime": "0001-01-01T00:00:00+14:00"}, {"dateTime": "0001-01-01T00:00:00Z"}),
        ({"dateTime": "0000-12-31T23:00:00Z"}, {"dateTime": "0000-12-31T23:30:00Z"}),
        ({"dateTime": "9999-12-31T23:59:59-12:00"}, {"dateTime": "9999-12-31T23:59:59-12:00"}),
    ],
)
def test_a_year_no_calendar_has_becomes_null_and_is_named(
    start: Json, end: Json, google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    _, calendar = ann
    google.put_raw(calendar, [meeting(1, id="old", start=start, end=end), meeting(2, id="good")])
    result = tick_once()
    assert (kinds(result), result.tally.quarantined, result.tally.events_upserted) == ([], 0, 2)
    assert saas.one(
        "SELECT start_at, start_date, end_at, end_date, flaws, raw -> 'start' = %s::jsonb "
        "FROM sync.calendar_events WHERE event_id = 'old'",
        str(start).replace("'", '"'),
    ) == (None, None, None, None, ["start_unreadable", "end_unreadable"], True)


def test_an_end_before_at_or_beside_the_start_is_stored_as_it_came(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    _, calendar = ann
    start: Json = {"dateTime": "2026-03-02T10:00:00Z"}
    google.put_raw(
        calendar,
        [
            meeting(id="before", start=start, end={"dateTime": "2026-03-02T09:00:00Z"}),
            meeting(id="zero", start=start, end=start),
            meeting(id="open", start=start, end=start, endTimeUnspecified=True),
            meeting(id="mixed", start={"date": "2026-03-02"}, end={"dateTime": "2026-03-02T09:00:00Z"}),
        ],
    )
    result = tick_once()
    assert (kinds(result), result.tally.quarantined) == ([], 0)
    assert saas.execute(
        "SELECT event_id, extract(epoch FROM end_at - start_at)::int, start_date::text, flaws, "
        "(raw ->> 'endTimeUnspecified')::boolean FROM sync.calendar_events ORDER BY 1"
    ) == [
        ("before", -3600, None, [], None),
        ("mixed", None, "2026-03-02", [], None),
        ("open", 0, None, [], True),
        ("zero", 0, None, [], None),
    ]


def test_a_trimmed_list_of_guests_says_that_it_is_not_complete(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    _, calendar = ann
    guests: list[Json] = [{"email": f"guest-{n}@example.com", "responseStatus": "needsAction"} for n in range(250)]
    google.put_raw(calendar, [meeting(id="party", attendees=guests)])
    tick_once()
    stored = "SELECT attendees_omitted, jsonb_array_length(raw -> 'attendees') FROM sync.calendar_events"
    assert saas.one(stored) == (None, 250)
    google.put_raw(calendar, [meeting(id="party", attendees=guests[:1], attendeesOmitted=True)])
    result = tick_once()
    assert (result.tally.events_upserted, result.tally.events_deleted) == (1, 0), "no guest is inferred to have left"
    assert saas.one(stored) == (True, 1)


def test_every_type_of_event_is_stored_and_what_nobody_knows_yet_is_kept_raw(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    _, calendar = ann
    types = ["birthday", "default", "focusTime", "fromGmail", "outOfOffice", "workingLocation", "telepathy"]
    google.put_raw(
        calendar,
        [
            meeting(id=name, eventType=name, telepathyProperties={"depth": [1, {"a": None}]}, status="dreamt")
            for name in types
        ],
    )
    result = tick_once()
    assert (kinds(result), result.tally.quarantined) == ([], 0)
    assert saas.execute(
        "SELECT event_type, status, raw #>> '{telepathyProperties,depth,1}' FROM sync.calendar_events "
        'ORDER BY event_type COLLATE "C"'
    ) == [(name, "dreamt", '{"a": null}') for name in sorted(types)]


def test_a_private_event_of_somebody_else_is_a_nameless_block_of_time(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, _ = ann
    google.add_user("bob@example.com")
    shared = google.add_calendar("bob@example.com", "Shared")
    google.share(shared, "ann@example.com", "reader")
    (event_id,) = insert(google, shared, meeting(visibility="private", description="secret"))
    result = tick_once()
    assert (kinds(result), result.tally.quarantined) == ([], 0)
    assert saas.one(
        "SELECT event_id, summary, description, visibility, start_at IS NOT NULL, flaws FROM sync.calendar_events"
    ) == (event_id, None, None, "private", True, [])
    patch(google, shared, event_id, visibility="default")
    tick_once()
    assert saas.events(workspace, shared)[event_id][2] == "Meeting 1"


def test_a_downgrade_to_free_busy_takes_details_away_but_deletes_no_event(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, _ = ann
    google.add_user("bob@example.com")
    shared = google.add_calendar("bob@example.com", "Shared")
    google.share(shared, "ann@example.com", "reader")
    single, master = insert(google, shared, meeting(1), meeting(2, recurrence=["RRULE:FREQ=WEEKLY;COUNT=4"]))
    tick_once()
    assert saas.events(workspace, shared)[single][2] == "Meeting 1"

    google.share(shared, "ann@example.com", "freeBusyReader")
    result = tick_once()
    assert (kinds(result), result.tally.full_syncs, result.tally.events_deleted) == ([], 1, 0)
    assert saas.execute(
        "SELECT event_id, status, deleted_at, summary, start_at IS NOT NULL FROM sync.calendar_event_changes "
        "WHERE calendar_id = %s ORDER BY recurrence NULLS FIRST",
        shared,
    ) == [(single, "confirmed", None, None, True), (master, "confirmed", None, None, True)]
    assert saas.calendar(shared, "access_role, deleted_at") == ("freeBusyReader", None)

    google.share(shared, "ann@example.com", "reader")
    assert tick_once().tally.events_deleted == 0
    assert saas.events(workspace, shared)[single][2] == "Meeting 1"


def test_a_poison_event_is_quarantined_while_the_others_and_the_token_go_on(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    tick_once()
    (before,) = saas.calendar(calendar, "sync_token")
    google.advance(1)
    google.put_raw(calendar, [meeting(2, id="good"), meeting(3, id="poison", summary={"not": "text"})])
    result = tick_once()
    assert (kinds(result), result.tally.quarantined, result.tally.events_upserted) == ([], 1, 1)
    assert saas.one("SELECT event_id, reason, raw::jsonb #>> '{summary,not}' FROM sync.quarantine") == (
        "poison",
        "summary is not text",
        "text",
    )
    assert set(saas.events(workspace, calendar)) == {"good"}
    assert saas.calendar(calendar, "sync_token <> %s, last_outcome".replace("%s", f"'{before}'")) == (
        True,
        "incremental",
    )
    assert saas.one("SELECT quarantined::int FROM sync.runs ORDER BY started_at DESC LIMIT 1") == (1,), "the alarm"

    google.put_raw(calendar, [meeting(3, id="poison", summary="cured")])
    tick_once()
    assert saas.one("SELECT count(*) FROM sync.quarantine") == (0,)
    assert saas.events(workspace, calendar)["poison"][2] == "cured"


@pytest.mark.parametrize("field", ["id", "recurringEventId"])
def test_an_id_no_index_can_hold_is_quarantined_while_the_others_go_on(
    field: str, google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    rng = Random(1)
    long = "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(1024))  # incompressible, 3 bytes each
    google.put_raw(calendar, [{**meeting(1, id="poison"), field: long}, meeting(2, id="good")])
    result = tick_once()
    assert (kinds(result), result.tally.quarantined) == ([], 1)
    assert set(saas.events(workspace, calendar)) == {"good"}


def test_an_event_that_turns_to_poison_keeps_its_last_readable_version_even_over_a_full_sync(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    workspace, calendar = ann
    google.put_raw(calendar, [meeting(1, id="event1")])
    tick_once()
    google.put_raw(calendar, [meeting(1, id="event1", summary=7)])
    tick_once()
    google.expire_sync_tokens(calendar)
    result = tick_once()
    assert (result.tally.full_syncs, result.tally.events_deleted) == (1, 0)
    assert saas.events(workspace, calendar)["event1"][2] == "Meeting 1"


def test_an_event_only_postgres_refuses_is_found_and_quarantined(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    _, calendar = ann
    saas.execute(
        "CREATE FUNCTION sync.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF new.summary = 'Meeting 3' THEN RAISE SQLSTATE '22P02'; END IF; RETURN new; END $$"
    )
    saas.execute("CREATE TRIGGER refuse BEFORE INSERT ON sync.event_rows FOR EACH ROW EXECUTE FUNCTION sync.refuse()")
    insert(google, calendar, *(meeting(n) for n in range(2, 6)))
    result = tick_once()
    assert (kinds(result), result.tally.quarantined, result.tally.events_upserted) == ([], 1, 3)
    assert saas.one("SELECT reason FROM sync.quarantine") == ("Postgres refuses it (SQLSTATE 22P02)",)


def test_ten_thousand_events_take_four_calls(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str]
) -> None:
    _, calendar = ann
    google.put_raw(calendar, [meeting(n, id=f"event{n:05}") for n in range(10_000)])
    assert kinds(tick_once()) == []
    assert google.counts().count("events.list") == 4
    assert saas.one("SELECT count(*) FROM sync.calendar_events") == (10_000,)


def test_many_pages_need_the_memory_of_one(
    google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str], pages_of: PagesOf
) -> None:
    _, calendar = ann

    def peak(events: int) -> int:
        google.put_raw(calendar, [meeting(n, id=f"event{n}", description="x" * 4096) for n in range(events)])
        tracemalloc.start()
        try:
            assert kinds(tick_once()) == []
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    pages_of(150)
    tick_once()  # what is only ever loaded once is not measured
    one_page = peak(150)
    assert peak(1500) < 1.25 * one_page


@pytest.mark.parametrize("broken", ["truncate", "html"])
def test_a_broken_body_is_a_passing_disturbance_that_moves_no_token(
    broken: str, google: Simulator, saas: Saas, tick_once: Tick, ann: tuple[Workspace, str], sleeps: Sleeps
) -> None:
    workspace, calendar = ann
    tick_once()
    state = "sync_token, live_generation"
    before = saas.calendar(calendar, state)
    (event_id,) = insert(google, calendar, meeting())
    google.add_fault(broken, method="events.list")
    assert kinds(tick_once()) == ["transient"]
    assert sleeps, "it was tried again within the run"
    assert saas.calendar(calendar, state) == before
    assert saas.calendar(calendar, "last_outcome, last_error") == ("failed", "transient")
    google.clear_faults()
    google.add_fault(broken, method="events.list", times=1)
    assert kinds(tick_once()) == []
    assert set(saas.events(workspace, calendar)) == {event_id}
