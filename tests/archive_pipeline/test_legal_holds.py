"""Legal holds: what they cover, who may go on, and the command line."""

from collections.abc import Callable

import pytest

from archive_pipeline import legal_holds
from archive_pipeline.errors import LegalHoldError
from archive_pipeline.legal_holds import holds, place, release, require_none
from archive_pipeline.months import Month
from scaling.errors import UserError
from tests.archive_pipeline.conftest import JANUARY, Room

FEBRUARY = Month(2025, 2)


def test_a_hold_covers_what_it_names_and_everything_of_what_it_leaves_open(room: Room) -> None:
    table = room.target.table
    with room.shard.transaction() as connection:
        month = place(connection, table, month=JANUARY, reason="case 1", by="ann")
        tenant = place(connection, table, tenant="a", reason="case 2", by="bob")
        both = place(connection, table, month=FEBRUARY, tenant="b", reason="case 3", by="cid")

        assert holds(connection, table) == [month, tenant, both]
        assert holds(connection, table, JANUARY) == [month, tenant]
        assert holds(connection, table, JANUARY, "b") == [month]
        assert holds(connection, table, FEBRUARY, "b") == [both]
        assert holds(connection, table, FEBRUARY, "a") == [tenant]
        assert holds(connection, table, tenant="c") == [month]
        assert holds(connection, table, Month(2025, 3), "c") == []


def test_a_refusal_names_the_hold_and_how_to_release_it_and_no_tenant(room: Room) -> None:
    with room.shard.transaction() as connection:
        hold = place(connection, room.target.table, month=JANUARY, tenant="secret-tenant", reason="r", by="ann")
        with pytest.raises(LegalHoldError) as refused:
            require_none(connection, room.target.table, "pruned", JANUARY)
        sentence = f"nothing was pruned: legal hold {hold.number} on one tenant's rows of month 2025-01"
        assert sentence in str(refused.value)
        assert f"release {hold.number} --by NAME" in str(refused.value)
        assert "secret-tenant" not in str(refused.value)


def test_a_released_hold_holds_no_longer_and_stays_on_record(room: Room) -> None:
    with room.shard.transaction() as connection:
        hold = place(connection, room.target.table, month=JANUARY, reason="r", by="ann")
        released = release(connection, room.target.table, hold.number, by="bob")
        require_none(connection, room.target.table, "pruned", JANUARY)
        assert (released.placed_by, released.released_by) == ("ann", "bob")
        with pytest.raises(UserError, match=rf"no legal hold {hold.number} on public.audit_logs that still holds"):
            release(connection, room.target.table, hold.number, by="bob")
    assert room.admin.execute("SELECT count(*) FROM archive.legal_holds").fetchone() == (1,)


def test_the_command_line_places_lists_and_releases(
    room: Room, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert legal_holds.main(["place", "--month", "2025-01", "--reason", "a lawsuit", "--by", "ann"]) == 0
    assert legal_holds.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert "2025-01" in shown
    assert "every tenant" in shown
    assert "a lawsuit" in shown
    assert legal_holds.main(["release", "1", "--by", "bob"]) == 0
    capsys.readouterr()
    assert legal_holds.main(["list"]) == 0
    assert "a lawsuit" not in capsys.readouterr().out
    assert legal_holds.main(["list", "--all"]) == 0
    assert "bob" in capsys.readouterr().out


def test_a_hold_on_everything_must_be_asked_for(room: Room, settings_environment: Callable[..., None]) -> None:
    with pytest.raises(UserError, match="say what is held"):
        legal_holds.main(["place", "--reason", "r", "--by", "ann"])
    assert legal_holds.main(["place", "--everything", "--reason", "r", "--by", "ann"]) == 0
    with room.shard.transaction() as connection:
        assert len(holds(connection, room.target.table, Month(2031, 1), "anybody")) == 1
