"""Pruning: what leaves Postgres, what must not, and that no row is lost whatever happens on the way."""

import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from archive_pipeline import prune
from archive_pipeline.archive import archive_month
from archive_pipeline.detaching import Patience
from archive_pipeline.erase import Erasure, erase
from archive_pipeline.errors import FencedError, MonthBusyError, PartitionsError
from archive_pipeline.legal_holds import place, release
from archive_pipeline.months import Month
from archive_pipeline.parts import PartSize
from archive_pipeline.prunable import MonthFacts, PartitionFacts, Policy, months_between, oldest_kept, why_not
from archive_pipeline.prune import Outcome, Pruned, Step, run
from archive_pipeline.restore import restore
from scaling.errors import UserError
from tests.archive_pipeline.conftest import JANUARY, TENANT, Room
from tests.archive_pipeline.partitioned import (
    AUTO,
    OFF,
    PROPOSE,
    SCHEMA,
    convert,
    detached,
    leave_detach_pending,
    partitions,
)

FEBRUARY = JANUARY.following
MARCH = FEBRUARY.following
JANUARY_TABLE = f"{SCHEMA}.audit_logs_2025_01"
QUICK = Patience(lock_timeout="100ms", attempts=4, first_wait=0.01, longest_wait=0.05, long_transaction=3600)
IN_POSTGRES = "SELECT count(*) FROM audit_logs WHERE created_at >= '2025-01-01+00' AND created_at < '2025-02-01+00'"


@pytest.fixture
def january(room: Room) -> Room:
    """January is archived, February has rows too; both are partitions."""
    convert(room.admin, room.shard, JANUARY, FEBRUARY)
    room.target = replace(room.target, part_size=PartSize())
    room.fill(300)
    room.fill(40, FEBRUARY)
    room.archive()
    return room


def pruned(room: Room, policy: Policy = AUTO, **options: Any) -> list[Pruned]:
    return run(room.shard, room.target, policy, **{"patience": QUICK, **options})


def outcomes(found: list[Pruned]) -> list[tuple[str, Outcome]]:
    return [(each.partition.removeprefix(f"{SCHEMA}."), each.outcome) for each in found]


def at(step: Step, *actions: Callable[[], object]) -> Callable[[Step], None]:
    """Do one of the actions each time a step is reached."""
    left = list(actions)

    def on_step(reached: Step) -> None:
        if reached is step and left:
            left.pop(0)()

    return on_step


def in_postgres(room: Room) -> int:
    row = room.admin.execute(IN_POSTGRES).fetchone()
    assert row is not None
    return int(row[0])


def archived(room: Room) -> tuple[int, int]:
    """Rows and distinct ids of January in the archive."""
    (row,) = room.rows(
        "SELECT count(*) AS n, count(DISTINCT id) AS ids FROM audit_logs WHERE year = 2025 AND month = 1"
    )
    return row["n"], row["ids"]


def late_row(room: Room, table: str = "public.audit_logs") -> Callable[[], None]:
    def insert() -> None:
        room.admin.execute(
            sql.SQL(
                "INSERT INTO {} (id, tenant_id, action, created_at) "
                "VALUES (gen_random_uuid(), %s, 'late', '2025-01-20+00')"
            ).format(sql.Identifier(*table.split("."))),
            (TENANT,),
        )

    return insert


def state(room: Room, name: str = "audit_logs_2025_01") -> tuple[str, str | None]:
    row = room.admin.execute(
        "SELECT state, reason FROM archive.prunes WHERE partition_name = %s ORDER BY id DESC LIMIT 1", (name,)
    ).fetchone()
    assert row is not None
    return row[0], row[1]


# -- which partitions may go ----------------------------------------------------------------------------------------


def test_the_configured_number_of_closed_months_stays_by_the_clock_of_the_database() -> None:
    policy, grace = Policy("auto", 2, zone="UTC"), timedelta(hours=1)
    assert oldest_kept(datetime(2025, 6, 1, 0, 59, tzinfo=UTC), policy, grace).name == "2025-03"
    assert oldest_kept(datetime(2025, 6, 1, 1, 0, tzinfo=UTC), policy, grace).name == "2025-04"
    assert oldest_kept(datetime(2025, 1, 15, tzinfo=UTC), policy, grace).name == "2024-11"
    tokyo = replace(policy, zone="Asia/Tokyo")
    assert oldest_kept(datetime(2025, 5, 31, 16, 0, tzinfo=UTC), tokyo, grace) == Month(2025, 4, "Asia/Tokyo")


def test_a_range_touches_the_months_of_its_first_and_last_instant() -> None:
    names = [m.name for m in months_between(datetime(2024, 12, 31, 23, tzinfo=UTC), FEBRUARY.start, "UTC")]
    assert names == ["2024-12", "2025-01"]
    assert [m.name for m in months_between(JANUARY.start, JANUARY.end, "Asia/Tokyo")] == ["2025-01", "2025-02"]


def facts(*months: MonthFacts, from_at: datetime | None = JANUARY.start) -> PartitionFacts:
    return PartitionFacts("p.t", from_at, JANUARY.end, months)


@pytest.mark.parametrize(
    ("partition", "oldest", "reason"),
    [
        (facts(MonthFacts(JANUARY, has_rows=True, archived=True)), FEBRUARY, ""),
        (facts(MonthFacts(JANUARY, has_rows=True, archived=True)), JANUARY, "stay in Postgres"),
        (facts(MonthFacts(JANUARY, has_rows=True, archived=False)), FEBRUARY, "not archived: 2025-01"),
        (facts(MonthFacts(JANUARY, has_rows=False, archived=True)), FEBRUARY, ""),
        (facts(MonthFacts(JANUARY, has_rows=False, archived=True, pruned=True)), FEBRUARY, "to take late rows"),
        (facts(MonthFacts(JANUARY, has_rows=True, archived=True, pruned=True)), FEBRUARY, ""),
        (facts(MonthFacts(JANUARY, has_rows=True, archived=True, problem="x is missing")), FEBRUARY, "x is missing"),
        (facts(MonthFacts(JANUARY, has_rows=True, archived=True, holds=("hold 7",))), FEBRUARY, "hold 7"),
        (facts(from_at=None), FEBRUARY, "to take late rows"),
    ],
)
def test_a_partition_goes_only_when_nothing_speaks_against_it(
    partition: PartitionFacts, oldest: Month, reason: str
) -> None:
    found = why_not(partition, oldest)
    assert reason in found if reason else found == ""


# -- a month that leaves Postgres -----------------------------------------------------------------------------------


def test_an_archived_month_leaves_postgres_and_stays_in_the_archive(january: Room) -> None:
    found = pruned(january)

    assert found == [Pruned(JANUARY_TABLE, ("2025-01",), Outcome.DROPPED, rows=300, bytes=found[0].bytes)]
    assert in_postgres(january) == 0
    assert detached(january.admin) == []
    assert archived(january) == (300, 300)
    month = january.month_row()
    assert (month["pruned_rows"], month["rows"], month["generation"]) == (300, 300, 1)
    assert month["pruned_at"] is not None
    assert state(january) == ("dropped", None)
    # February is not archived.
    assert list(partitions(january.shard)) == ["audit_logs_2025_01_late", "audit_logs_2025_02"]
    assert pruned(january) == []


# case 62
def test_an_empty_month_with_its_signed_manifest_leaves_postgres_too(room: Room) -> None:
    convert(room.admin, room.shard, JANUARY)
    room.archive()
    assert outcomes(pruned(room)) == [("audit_logs_2025_01", Outcome.DROPPED)]
    assert room.month_row()["pruned_rows"] == 0
    assert pruned(room) == []


# case 24
def test_a_row_for_a_pruned_month_is_accepted_and_archived_as_a_further_part(january: Room) -> None:
    pruned(january)
    late_row(january)()
    january.archive()

    assert in_postgres(january) == 1
    assert archived(january) == (301, 301)
    newest = january.manifests()[-1].manifest
    assert (newest.generation, newest.digest.rows, newest.parts[-1].digest.rows) == (2, 301, 1)


def test_a_late_partition_is_pruned_like_any_other_and_another_takes_its_place(january: Room) -> None:
    pruned(january)
    for number in (2, 3):
        late_row(january)()
        name = "audit_logs_2025_01_late" + ("" if number == 2 else "_2")
        # The rows are archived on the way: nobody has to remember to.
        assert outcomes(pruned(january)) == [(name, Outcome.DROPPED)]
        assert archived(january) == (299 + number, 299 + number)
        assert in_postgres(january) == 0
    assert january.month_row()["pruned_rows"] == 302


def test_the_partition_for_late_rows_is_as_closed_as_the_others(january: Room) -> None:
    january.admin.execute(
        sql.SQL("ALTER DEFAULT PRIVILEGES FOR ROLE saas_owner IN SCHEMA {} GRANT ALL ON TABLES TO anon").format(
            sql.Identifier(SCHEMA)
        )
    )
    pruned(january)
    row = january.admin.execute(
        "SELECT relrowsecurity, relforcerowsecurity, relowner::regrole::text, "
        "has_table_privilege('anon', oid, 'SELECT'), "
        "(SELECT count(*) FROM pg_constraint WHERE conrelid = c.oid AND contype = 'f') "
        "FROM pg_class c WHERE relname = 'audit_logs_2025_01_late'"
    ).fetchone()
    assert row == (True, True, "saas_owner", False, 1)


def test_a_partition_of_many_months_goes_when_every_month_with_rows_is_archived(room: Room) -> None:
    december, november = Month(2024, 12), Month(2024, 11)
    convert(room.admin, room.shard, FEBRUARY, first=FEBRUARY)
    for month in (november, december, JANUARY):
        room.fill(20, month)
    for month in (november, JANUARY):
        room.archive(month)
    (candidate, _) = prune.propose(room.shard, room.target, AUTO)
    assert "2024-12" in candidate.reason
    assert pruned(room) == []

    room.archive(december)
    found = pruned(room)
    assert found == [
        Pruned(
            f"{SCHEMA}.audit_logs_before", ("2024-11", "2024-12", "2025-01"), Outcome.DROPPED, "", 60, found[0].bytes
        )
    ]
    assert room.rows("SELECT count(DISTINCT id) AS n FROM audit_logs") == [{"n": 60}]
    assert room.admin.execute("SELECT month::text, rows FROM archive.pruned_months ORDER BY 1").fetchall() == [
        ("2024-11-01", 20), ("2024-12-01", 20), ("2025-01-01", 20)
    ]  # fmt: skip
    assert list(partitions(room.shard)) == ["audit_logs_first_late", "audit_logs_2025_02"]
    room.log("2019-05-05 00:00:00+00")  # there is a place for it, and its month has to be archived first
    assert pruned(room) == []


# -- rows that come, change or go on the way ------------------------------------------------------------------------


# case 25
@pytest.mark.parametrize("step", [Step.MATCHED, Step.DETACHING])
def test_a_row_that_comes_between_the_comparison_and_the_detach_is_archived(january: Room, step: Step) -> None:
    found = pruned(january, on_step=at(step, late_row(january)))
    assert (found[0].outcome, found[0].rows) == (Outcome.DROPPED, 301)
    assert archived(january) == (301, 301)
    assert january.manifests()[-1].manifest.kind == "late"


# case 26
@pytest.mark.parametrize(
    "change",
    [
        "UPDATE audit_logs SET action = 'edited' WHERE id = (SELECT id FROM audit_logs ORDER BY created_at LIMIT 1)",
        "DELETE FROM audit_logs WHERE id = (SELECT id FROM audit_logs ORDER BY created_at LIMIT 1)",
    ],
)
def test_a_month_whose_rows_were_changed_or_deleted_after_archiving_is_not_dropped(january: Room, change: str) -> None:
    january.admin.execute(change.encode())
    rows = in_postgres(january)
    (found,) = pruned(january)
    assert found.outcome is Outcome.REFUSED
    assert "after they were archived" in found.reason
    assert in_postgres(january) == rows
    assert state(january) == ("refused", found.reason)
    assert list(partitions(january.shard)) == ["audit_logs_2025_01", "audit_logs_2025_02"]


# case 26
@pytest.mark.parametrize(
    ("step", "change"),
    [
        (Step.DETACHED, "UPDATE {} SET action = 'edited'"),
        (Step.DETACHED, "DELETE FROM {} WHERE action = 'action 1'"),
        (Step.ARCHIVED, "UPDATE {} SET action = 'edited'"),
    ],
)
def test_a_change_after_the_detach_puts_the_partition_back(january: Room, step: Step, change: str) -> None:
    def edit() -> None:
        january.admin.execute(sql.SQL(change).format(sql.Identifier(*JANUARY_TABLE.split("."))))

    (found,) = pruned(january, on_step=at(step, edit))
    assert found.outcome is Outcome.PUT_BACK
    assert in_postgres(january) == (300 if change.startswith("UPDATE") else 240)
    assert list(partitions(january.shard)) == ["audit_logs_2025_01", "audit_logs_2025_02"]
    assert detached(january.admin) == []
    # Its foreign key is the table's again, which a tenant's deletion meets.
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        january.admin.execute("DELETE FROM tenants WHERE id = %s", (TENANT,))


def test_a_refused_partition_stays_beside_the_table_when_late_rows_took_its_place(january: Room) -> None:
    def edit_and_insert() -> None:
        january.admin.execute(f"UPDATE {JANUARY_TABLE} SET action = 'edited'")
        late_row(january)()

    (found,) = pruned(january, on_step=at(Step.REPLACED, edit_and_insert))
    assert found.outcome is Outcome.REFUSED
    assert "audit_logs_2025_01_late" in found.reason
    assert detached(january.admin) == ["audit_logs_2025_01"]
    assert january.admin.execute(f"SELECT count(*) FROM {JANUARY_TABLE}").fetchone() == (300,)
    (candidate, _) = prune.examine(january.shard, january.target, AUTO)
    assert "stands in the place of" in candidate.reason
    # Once the late row is away, it goes back.
    january.admin.execute(f"DELETE FROM {SCHEMA}.audit_logs_2025_01_late")
    (found,) = pruned(january, OFF)
    assert found.outcome is Outcome.PUT_BACK
    assert in_postgres(january) == 300


# case 27
@pytest.mark.parametrize("step", [Step.DETACHED, Step.ARCHIVED])
def test_a_row_written_to_the_detached_table_by_its_name_is_found_and_archived(january: Room, step: Step) -> None:
    found = pruned(january, on_step=at(step, late_row(january, JANUARY_TABLE)))
    assert (found[0].outcome, found[0].rows) == (Outcome.DROPPED, 301)
    assert archived(january) == (301, 301)


# case 27
def test_a_row_of_a_month_that_was_not_compared_is_found_and_archived(room: Room) -> None:
    convert(room.admin, room.shard, first=FEBRUARY)
    room.fill(20)
    room.archive()

    def insert() -> None:
        room.admin.execute(
            f"INSERT INTO {SCHEMA}.audit_logs_before (id, tenant_id, action, created_at) "
            "VALUES (gen_random_uuid(), %s, 'old', '2023-07-01+00')",
            (TENANT,),
        )

    (found,) = pruned(room, on_step=at(Step.ARCHIVED, insert))
    assert (found.outcome, found.rows, found.months) == (Outcome.DROPPED, 21, ("2023-07", "2025-01"))
    assert room.rows("SELECT count(*) AS n FROM audit_logs") == [{"n": 21}]


# case 27
def test_a_writer_who_comes_during_the_last_comparison_waits_and_is_told_that_the_table_is_gone(january: Room) -> None:
    errors: list[BaseException] = []
    writer = threading.Thread(target=lambda: errors.append(_failure(late_row(january, JANUARY_TABLE))))

    def begin() -> None:
        writer.start()
        with january.shard.owner() as owner:
            wait_until(lambda: owner.execute("SELECT FROM pg_locks WHERE NOT granted").rowcount > 0)

    (found,) = pruned(january, on_step=at(Step.COMPARED, begin))
    writer.join()
    assert (found.outcome, found.rows) == (Outcome.DROPPED, 300)
    assert [type(error) for error in errors] == [psycopg.errors.UndefinedTable]


# case 39
def test_a_table_to_which_rows_keep_coming_is_not_dropped_and_the_next_run_goes_on(january: Room) -> None:
    more = [late_row(january, JANUARY_TABLE)] * 10
    (found,) = pruned(january, on_step=at(Step.ARCHIVED, *more))
    assert found.outcome is Outcome.STOPPED
    assert "keep coming" in found.reason
    assert detached(january.admin) == ["audit_logs_2025_01"]
    (found,) = pruned(january)
    assert (found.outcome, found.rows) == (Outcome.DROPPED, 303)
    assert archived(january) == (303, 303)


# case 39
def test_a_partition_that_somebody_attached_again_is_not_dropped(january: Room) -> None:
    def attach() -> None:
        january.admin.execute(f"DROP TABLE {SCHEMA}.audit_logs_2025_01_late")
        january.admin.execute(
            f"ALTER TABLE audit_logs ATTACH PARTITION {JANUARY_TABLE} FOR VALUES FROM ('2025-01-01+00') "
            "TO ('2025-02-01+00')"
        )

    (found,) = pruned(january, on_step=at(Step.ARCHIVED, attach))
    assert found.outcome is Outcome.STOPPED
    assert in_postgres(january) == 300
    assert outcomes(pruned(january)) == [("audit_logs_2025_01", Outcome.DROPPED)]


def test_a_late_row_that_comes_while_the_detached_month_waits_is_counted_once(january: Room) -> None:
    """It is archived before the detached rows are dropped, and must not be missed among them."""

    def insert_and_archive() -> None:
        late_row(january)()
        archive_month(january.shard, january.target, JANUARY)

    (found,) = pruned(january, on_step=at(Step.REPLACED, insert_and_archive))
    assert (found.outcome, found.rows) == (Outcome.DROPPED, 300)
    assert (archived(january), in_postgres(january)) == ((301, 301), 1)
    (found,) = pruned(january)
    assert (found.outcome, found.rows) == (Outcome.DROPPED, 1)
    assert january.month_row()["pruned_rows"] == 301


def test_rows_erased_from_the_archive_do_not_count_as_deleted_from_postgres(january: Room) -> None:
    pruned(january)
    request = Erasure("tenant_id", str(uuid.UUID(int=2)), "privacy", "asked for")
    erased = erase(january.shard, january.target, request, dry_run=False).months[0].rows
    late_row(january)()

    (found,) = pruned(january)
    assert (found.outcome, found.rows) == (Outcome.DROPPED, 1)
    assert archived(january) == (301 - erased, 301 - erased)


def test_a_restored_month_is_pruned_again(january: Room) -> None:
    pruned(january)
    late_row(january)()
    restore(january.shard, january.target, [JANUARY], attach=True, dry_run=False)
    assert in_postgres(january) == 301

    (found,) = pruned(january)
    assert (found.outcome, found.rows) == (Outcome.DROPPED, 301)
    assert (in_postgres(january), archived(january)) == (0, (301, 301))
    late_row(january)()
    assert [each.outcome for each in pruned(january)] == [Outcome.DROPPED]


def test_a_late_row_that_is_archived_and_then_deleted_keeps_the_partition(january: Room) -> None:
    pruned(january)
    late_row(january)()
    late_row(january)()
    january.archive()
    january.admin.execute("DELETE FROM audit_logs WHERE id = (SELECT id FROM audit_logs LIMIT 1)")
    (found,) = pruned(january)
    assert found.outcome is Outcome.REFUSED
    assert "1 row(s) of month 2025-01 less than it should" in found.reason


def test_a_proposal_whose_table_somebody_dropped_is_forgotten(january: Room) -> None:
    prune.propose(january.shard, january.target, PROPOSE)
    january.admin.execute(f"DROP TABLE {JANUARY_TABLE}")
    assert pruned(january, PROPOSE) == []
    assert january.admin.execute("SELECT FROM archive.prunes").rowcount == 0


def test_a_column_that_was_added_since_and_has_values_keeps_the_partition(january: Room) -> None:
    january.admin.execute("ALTER TABLE audit_logs ADD COLUMN severity int")
    january.admin.execute("UPDATE audit_logs SET severity = 1 WHERE created_at = '2025-01-01+00'")
    (found,) = pruned(january)
    assert found.outcome is Outcome.PUT_BACK
    assert "column severity" in found.reason
    january.admin.execute("UPDATE audit_logs SET severity = NULL")
    assert outcomes(pruned(january)) == [("audit_logs_2025_01", Outcome.DROPPED)]


# -- crashes and concurrency ----------------------------------------------------------------------------------------


class Killer:
    """Runs prunes that die, in children of one process that has imported everything."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.archive_pipeline.prune_killed"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def kill_at(self, room: Room, step: Step, scratch: Path) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        variables = {**room.database.environment(), **room.bucket.environment()}
        line = [step.value, str(scratch), *(f"{name}={value}" for name, value in variables.items())]
        self._process.stdin.write("\t".join(line) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline().strip() == "-9"

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    killer = Killer()
    yield killer
    killer.close()


# case 30
# case 32
@pytest.mark.parametrize("step", list(Step))
def test_a_prune_killed_after_any_step_is_finished_by_the_next_and_no_row_is_lost(
    january: Room, tmp_path: Path, killer: Killer, step: Step
) -> None:
    killer.kill_at(january, step, tmp_path)
    # Wherever it died, the month is whole in the archive, and its late rows find a place once the next run began.
    rows = 300
    assert archived(january) == (300, 300)
    if step in (Step.MATCHED, Step.DETACHING, Step.REPLACED, Step.ARCHIVED, Step.DROPPED):
        late_row(january)()
        rows = 301
    until_free(lambda: pruned(january))
    until_free(lambda: pruned(january))

    assert archived(january) == (rows, rows)
    assert (in_postgres(january), detached(january.admin)) == (0, [])
    assert january.month_row()["pruned_rows"] == rows
    assert january.admin.execute("SELECT DISTINCT state FROM archive.prunes").fetchall() == [("dropped",)]
    assert next(name for name in partitions(january.shard) if "2025_01" in name).startswith("audit_logs_2025_01_late")


# case 34
def test_a_run_that_lost_its_session_stops_before_the_detach(january: Room) -> None:
    with pytest.raises(FencedError):
        pruned(january, on_step=at(Step.DETACHING, lambda: end_leases(january)))
    assert list(partitions(january.shard)) == ["audit_logs_2025_01", "audit_logs_2025_02"]
    assert in_postgres(january) == 300
    assert outcomes(pruned(january)) == [("audit_logs_2025_01", Outcome.DROPPED)]


# case 34
@pytest.mark.parametrize("step", [Step.COMPARED, Step.DROPPING])
def test_a_run_whose_lease_was_taken_over_stops_before_the_drop(january: Room, step: Step) -> None:
    def take_over() -> None:
        january.admin.execute("UPDATE archive.months SET epoch = epoch + 1")

    with pytest.raises(FencedError):
        pruned(january, on_step=at(step, take_over))
    assert detached(january.admin) == ["audit_logs_2025_01"]
    assert january.admin.execute(f"SELECT count(*) FROM {JANUARY_TABLE}").fetchone() == (300,)
    assert outcomes(pruned(january)) == [("audit_logs_2025_01", Outcome.DROPPED)]


# case 35
def test_a_cancelled_detach_is_finished_by_the_next_run_and_inserts_recover(january: Room) -> None:
    leave_detach_pending(january.shard, "audit_logs_2025_01")
    with pytest.raises(psycopg.errors.CheckViolation):
        late_row(january)()
    (candidate, _) = prune.examine(january.shard, january.target, AUTO)
    assert "interrupted" in candidate.reason

    found = pruned(january, on_step=at(Step.REPLACED, late_row(january)))
    assert outcomes(found)[0] == ("audit_logs_2025_01", Outcome.DROPPED)
    assert archived(january) == (301, 301)


# case 35
def test_a_detach_that_the_server_still_runs_for_a_dead_client_is_waited_for(january: Room) -> None:
    prune.propose(january.shard, january.target, AUTO)
    january.admin.execute("UPDATE archive.prunes SET state = 'detaching'")
    found: list[Pruned] = []

    def orphaned() -> None:
        with january.shard.owner() as owner:
            try:
                owner.execute(f"ALTER TABLE audit_logs DETACH PARTITION {JANUARY_TABLE} CONCURRENTLY")
            except psycopg.Error:  # the finishing came first
                return

    def waiting(statement: str) -> bool:
        query = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE %s"
        return january.admin.execute(query, (f"ALTER TABLE%{statement}",)).rowcount == 1

    orphan = threading.Thread(target=orphaned)
    runner = threading.Thread(target=lambda: found.extend(until_free(lambda: pruned(january))))
    with january.shard.owner(autocommit=False) as reader:
        reader.execute("SELECT count(*) FROM audit_logs")
        orphan.start()
        wait_until(lambda: waiting("CONCURRENTLY"))
        runner.start()
        wait_until(lambda: waiting("FINALIZE"))
    orphan.join()
    runner.join()
    assert ("audit_logs_2025_01", Outcome.DROPPED) in outcomes(found)
    assert archived(january) == (300, 300)


# case 35
def test_the_pending_detach_of_a_month_that_must_stay_is_finished_and_undone(january: Room) -> None:
    leave_detach_pending(january.shard, "audit_logs_2025_02")
    (found, _) = pruned(january)
    assert outcomes([found]) == [("audit_logs_2025_02", Outcome.PUT_BACK)]
    assert "not archived: 2025-02" in found.reason
    room = january
    room.log("2025-02-03 00:00:00+00")
    assert room.admin.execute("SELECT count(*) FROM audit_logs WHERE created_at >= '2025-02-01+00'").fetchone() == (41,)


def test_with_pruning_off_what_a_dead_run_detached_is_put_back(january: Room, tmp_path: Path, killer: Killer) -> None:
    killer.kill_at(january, Step.UNREFERENCED, tmp_path)
    assert detached(january.admin) == ["audit_logs_2025_01"]
    until_free(lambda: pruned(january, OFF))
    assert (in_postgres(january), detached(january.admin)) == (300, [])
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        january.admin.execute("DELETE FROM tenants WHERE id = %s", (TENANT,))


# case 36
def test_another_months_pending_detach_is_finished_first(january: Room) -> None:
    def other() -> None:
        leave_detach_pending(january.shard, "audit_logs_2025_02")

    january.archive(FEBRUARY)
    found = pruned(january, on_step=at(Step.MATCHED, other))
    assert sorted(outcomes(found)) == [("audit_logs_2025_01", Outcome.DROPPED), ("audit_logs_2025_02", Outcome.DROPPED)]
    assert pruned(january) == []


# case 36
def test_another_months_pending_detach_is_undone_in_the_same_run_when_that_month_must_stay(january: Room) -> None:
    def other() -> None:
        leave_detach_pending(january.shard, "audit_logs_2025_02")

    found = pruned(january, on_step=at(Step.MATCHED, other))
    assert outcomes(found) == [("audit_logs_2025_01", Outcome.DROPPED), ("audit_logs_2025_02", Outcome.PUT_BACK)]
    january.log("2025-02-03 00:00:00+00")


# case 37
def test_a_drop_that_waits_for_a_busy_referenced_table_never_holds_up_its_writers(january: Room) -> None:
    waits: list[float] = []
    reader = psycopg.connect(january.database.owner_dsn)

    def open_reader() -> None:
        reader.execute("SELECT count(*) FROM tenants")

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        # Whoever queued behind the waiting statement is through as soon as it gave up.
        with psycopg.connect(january.database.owner_dsn, autocommit=True) as writer:
            writer.execute("SET lock_timeout = '50ms'")
            writer.execute("UPDATE tenants SET name = 'written'")
        if len(waits) == 3:
            reader.rollback()

    patience = replace(QUICK, attempts=6, sleep=sleep)
    writing = Writing(january)
    with reader, writing:
        (found,) = pruned(january, patience=patience, on_step=at(Step.ARCHIVED, open_reader))
    assert found.outcome is Outcome.DROPPED
    assert len(waits) == 3
    assert writing.errors == []
    assert writing.writes > 0


# case 37
def test_a_referenced_table_that_stays_busy_stops_the_prune_and_the_next_run_goes_on(january: Room) -> None:
    reader = psycopg.connect(january.database.owner_dsn)
    with reader:
        (found,) = pruned(january, on_step=at(Step.ARCHIVED, lambda: reader.execute("SELECT count(*) FROM tenants")))
        assert found.outcome is Outcome.STOPPED
        assert "audit_logs_tenant_id_fkey" in found.reason
    assert detached(january.admin) == ["audit_logs_2025_01"]
    assert outcomes(pruned(january)) == [("audit_logs_2025_01", Outcome.DROPPED)]


def test_a_detach_is_not_begun_while_a_long_transaction_has_the_table_open(january: Room) -> None:
    with january.shard.owner(autocommit=False) as reader:
        reader.execute("SELECT count(*) FROM audit_logs")
        time.sleep(0.2)
        (found,) = pruned(january, patience=replace(QUICK, long_transaction=0.1))
        assert found.outcome is Outcome.STOPPED
        assert "transaction(s) have had public.audit_logs open" in found.reason
        late_row(january)()  # nothing is pending
    assert outcomes(pruned(january)) == [("audit_logs_2025_01", Outcome.DROPPED)]
    assert archived(january) == (301, 301)


# case 38
def test_a_table_made_later_under_the_partitions_name_is_not_dropped(january: Room) -> None:
    def swap() -> None:
        january.admin.execute(f"ALTER TABLE {JANUARY_TABLE} RENAME TO hidden")
        january.admin.execute(f"CREATE TABLE {JANUARY_TABLE} (LIKE audit_logs)")

    (found,) = pruned(january, on_step=at(Step.ARCHIVED, swap))
    assert found.outcome is Outcome.REFUSED
    assert "not the table any more that was meant" in found.reason
    assert january.admin.execute(f"SELECT count(*) FROM {SCHEMA}.hidden").fetchone() == (300,)
    assert detached(january.admin) == ["audit_logs_2025_01", "hidden"]
    (found,) = pruned(january)
    assert found.outcome is Outcome.REFUSED


def test_a_second_prune_of_the_table_is_told_that_it_is_busy(january: Room) -> None:
    def second() -> None:
        with pytest.raises(MonthBusyError):
            pruned(january)

    assert [each.outcome for each in pruned(january, on_step=at(Step.REPLACED, second))] == [Outcome.DROPPED]


def test_an_export_of_the_month_during_the_detach_is_told_that_it_is_busy(january: Room) -> None:
    def export() -> None:
        with pytest.raises(MonthBusyError):
            january.archive()

    assert [each.outcome for each in pruned(january, on_step=at(Step.DETACHING, export))] == [Outcome.DROPPED]


# -- the bucket -----------------------------------------------------------------------------------------------------


# case 47
@pytest.mark.parametrize(
    ("step", "how"),
    [
        (None, "replaced"),
        (Step.ARCHIVED, "deleted"),
        (Step.ARCHIVED, "replaced"),
        (Step.ARCHIVED, "hidden by another version"),
    ],
)
def test_an_object_that_is_gone_or_replaced_keeps_the_month_in_postgres(
    room: Room, step: Step | None, how: str
) -> None:
    client, name = room.bucket.server.client(), room.bucket.name
    if how.startswith("hidden"):
        client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    convert(room.admin, room.shard, JANUARY)
    room.fill(300)
    room.archive()
    key = room.data_keys()[-1]

    def damage() -> None:
        body = client.get_object(Bucket=name, Key=key)["Body"].read()
        client.delete_object(Bucket=name, Key=key)
        if how == "replaced":
            client.put_object(Bucket=name, Key=key, Body=body[:-1] + b"x")
        if how.startswith("hidden"):
            client.put_object(Bucket=name, Key=key, Body=body)

    if step is None:
        damage()
        (candidate,) = prune.examine(room.shard, room.target, AUTO)
        assert key in candidate.reason
        assert pruned(room) == []
    else:
        (found,) = pruned(room, on_step=at(step, damage))
        assert found.outcome is Outcome.PUT_BACK
        assert key in found.reason
    assert in_postgres(room) == 300


def test_a_manifest_without_its_link_in_the_chain_keeps_the_month_in_postgres(january: Room) -> None:
    client, layout = january.bucket.server.client(), january.target.layout
    for key in january.target.bucket.keys(layout.chain("main")):
        client.delete_object(Bucket=january.bucket.name, Key=key)
    (candidate, _) = prune.examine(january.shard, january.target, AUTO)
    assert "has no link in the chain" in candidate.reason
    assert pruned(january) == []
    assert in_postgres(january) == 300


# -- who decides ----------------------------------------------------------------------------------------------------


def test_a_proposal_is_dropped_only_after_somebody_approved_it(january: Room) -> None:
    (proposed, other) = prune.propose(january.shard, january.target, PROPOSE)
    assert (proposed.state, proposed.reason, proposed.months) == ("proposed", "", ("2025-01",))
    assert "not archived" in other.reason
    assert pruned(january, PROPOSE) == []
    assert in_postgres(january) == 300
    with pytest.raises(UserError, match=r"no partition of public\.audit_logs is proposed for 2025-02"):
        prune.approve(january.shard, january.target.table, FEBRUARY, "ada")
    with pytest.raises(UserError, match="name"):
        prune.approve(january.shard, january.target.table, JANUARY, " ")

    assert prune.approve(january.shard, january.target.table, JANUARY, "ada") == [JANUARY_TABLE]
    assert outcomes(pruned(january, PROPOSE)) == [("audit_logs_2025_01", Outcome.DROPPED)]
    row = january.admin.execute("SELECT approved_by, approved_at IS NOT NULL FROM archive.prunes").fetchone()
    assert row == ("ada", True)


def test_a_refused_partition_needs_another_approval(january: Room) -> None:
    (proposed, _) = prune.propose(january.shard, january.target, PROPOSE)
    prune.approve(january.shard, january.target.table, str(proposed.partition), "ada")
    original = january.admin.execute("SELECT action FROM audit_logs WHERE created_at = '2025-01-01+00'").fetchone()
    january.admin.execute("UPDATE audit_logs SET action = 'edited' WHERE created_at = '2025-01-01+00'")
    assert [each.outcome for each in pruned(january, PROPOSE)] == [Outcome.REFUSED]
    january.admin.execute("UPDATE audit_logs SET action = %s WHERE created_at = '2025-01-01+00'", original)
    assert pruned(january, PROPOSE) == []
    prune.approve(january.shard, january.target.table, JANUARY, "grace")
    assert [each.outcome for each in pruned(january, PROPOSE)] == [Outcome.DROPPED]


def test_with_pruning_off_nothing_is_proposed_or_dropped(january: Room) -> None:
    assert prune.propose(january.shard, january.target, OFF) == []
    assert pruned(january, OFF) == []
    assert january.admin.execute("SELECT FROM archive.prunes").rowcount == 0
    assert in_postgres(january) == 300


# case 73
def test_a_dry_run_says_what_would_be_dropped_and_writes_nothing(january: Room) -> None:
    def everything() -> list[object]:
        tables = ("months", "prunes", "pruned_months", "uploads", "chain_heads")
        return [january.admin.execute(f"SELECT * FROM archive.{each} ORDER BY 1").fetchall() for each in tables]

    keys, before = list(january.target.bucket.keys("")), everything()
    found = pruned(january, dry_run=True)
    assert [(each.partition, each.months, each.outcome) for each in found] == [
        (JANUARY_TABLE, ("2025-01",), Outcome.WOULD_DROP)
    ]
    assert (list(january.target.bucket.keys("")), everything(), in_postgres(january)) == (keys, before, 300)
    leave_detach_pending(january.shard, "audit_logs_2025_01")
    assert pruned(january, dry_run=True) == []
    assert everything() == before


# case 71
def test_a_month_under_legal_hold_stays_in_postgres(january: Room) -> None:
    table = january.target.table
    with january.shard.transaction() as connection:
        hold = place(connection, table, month=JANUARY, tenant=str(TENANT), reason="a lawsuit", by="legal")
    (candidate, _) = prune.examine(january.shard, january.target, AUTO)
    assert "legal hold 1" in candidate.reason
    assert str(TENANT) not in candidate.reason
    assert pruned(january) == []
    assert in_postgres(january) == 300
    with january.shard.transaction() as connection:
        release(connection, table, hold.number, by="legal")
    assert outcomes(pruned(january)) == [("audit_logs_2025_01", Outcome.DROPPED)]


def test_a_hold_placed_while_a_month_is_half_pruned_puts_it_back(january: Room, tmp_path: Path, killer: Killer) -> None:
    killer.kill_at(january, Step.REPLACED, tmp_path)
    with january.shard.transaction() as connection:
        place(connection, january.target.table, reason="a lawsuit", by="legal")
    found = until_free(lambda: pruned(january))
    assert outcomes(found) == [("audit_logs_2025_01", Outcome.PUT_BACK)]
    assert in_postgres(january) == 300


# case 71
def test_a_hold_placed_just_before_the_drop_puts_the_month_back(january: Room) -> None:
    def hold() -> None:
        with january.shard.transaction() as connection:
            place(connection, january.target.table, month=JANUARY, reason="a lawsuit", by="legal")

    (found,) = pruned(january, on_step=at(Step.ARCHIVED, hold))
    assert found.outcome is Outcome.PUT_BACK
    assert "legal hold" in found.reason
    assert in_postgres(january) == 300


def test_only_the_month_that_was_asked_for_is_pruned(january: Room) -> None:
    january.archive(FEBRUARY)
    assert outcomes(pruned(january, month=FEBRUARY)) == [("audit_logs_2025_02", Outcome.DROPPED)]
    assert in_postgres(january) == 300


def test_a_plain_table_is_never_pruned_and_the_sentence_says_how_to_convert_it(room: Room) -> None:
    room.fill(10)
    room.archive()
    with pytest.raises(PartitionsError, match=r"plain table.*archive_pipeline\.convert"):
        pruned(room)
    assert in_postgres(room) == 10


def test_a_role_that_does_not_own_the_table_is_told_so(january: Room) -> None:
    january.admin.execute("ALTER TABLE audit_logs OWNER TO postgres")
    with pytest.raises(UserError, match="must own the table"):
        pruned(january)


def test_the_command_line_shows_proposes_approves_and_drops(
    january: Room, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(UserError, match="ARCHIVE_PRUNE is off"):
        prune.main(["propose"])
    monkeypatch.setenv("ARCHIVE_PRUNE", "propose")
    monkeypatch.setenv("ARCHIVE_RETENTION_MONTHS", "1")
    assert prune.main(["propose"]) == 0
    assert prune.main(["approve", "2025-01", "--by", "ada"]) == 0
    assert prune.main(["status"]) == 0
    assert "approved by ada" in capsys.readouterr().out
    assert prune.main(["run", "--dry-run"]) == 0
    assert "would be dropped" in capsys.readouterr().out
    january.admin.execute("CREATE VIEW v AS SELECT id FROM audit_partitions.audit_logs_2025_01")
    assert prune.main(["run"]) == 1
    assert "something depends on" in capsys.readouterr().out
    january.admin.execute("DROP VIEW v")
    assert prune.main(["approve", "audit_logs_2025_01", "--by", "ada"]) == 0
    assert prune.main(["run", "--month", "2025-01"]) == 0
    assert "dropped; 300 rows" in capsys.readouterr().out
    assert in_postgres(january) == 0


# -- shorthands -----------------------------------------------------------------------------------------------------


class Writing:
    """An application that writes to tenants all the time, and gives up when it waits for a lock for long."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write)
        self.errors: list[Exception] = []
        self.writes = 0

    def __enter__(self) -> "Writing":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _write(self) -> None:
        with psycopg.connect(self._room.database.owner_dsn, autocommit=True) as connection:
            # Twenty times the prune's own timeout: what waits longer was held up by more than one attempt.
            connection.execute("SET lock_timeout = '2s'")
            while not self._stop.is_set():
                try:
                    connection.execute("UPDATE tenants SET name = 'busy' WHERE id = %s", (TENANT,))
                    self.writes += 1
                except psycopg.Error as error:
                    self.errors.append(error)


def end_leases(room: Room) -> None:
    """End the sessions that hold a month's lease."""
    room.admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND database = "
        "(SELECT oid FROM pg_database WHERE datname = current_database())"
    )


def until_free(attempt: Callable[[], list[Pruned]]) -> list[Pruned]:
    """The killed run's session ends as soon as Postgres notices that its socket is closed."""
    deadline = time.monotonic() + 30
    while True:
        assert time.monotonic() < deadline
        try:
            found = attempt()
        except MonthBusyError:
            continue
        if Outcome.STOPPED not in [each.outcome for each in found]:
            return found


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _failure(action: Callable[[], None]) -> BaseException:
    try:
        action()
    except psycopg.Error as error:
        return error
    raise AssertionError("it did not fail")
