"""Erasing: the rows are gone from every object, everything else is there and provable, nothing says whose they were."""

import hashlib
import subprocess
import sys
import uuid
from dataclasses import replace
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from archive_pipeline import erase as erasing
from archive_pipeline import legal_holds, merkle, publication
from archive_pipeline import manifest as manifests
from archive_pipeline.digest import Digest, ParquetReader
from archive_pipeline.erase import Erasure, ErasureReport, Step, erase, value_hash
from archive_pipeline.errors import ErasureError, LegalHoldError, MonthBusyError, ObjectLockedError
from archive_pipeline.ledger import lease
from archive_pipeline.manifest import Part, Published
from archive_pipeline.months import Month
from archive_pipeline.objects import Protection
from archive_pipeline.parts import PartSize
from archive_pipeline.restore import months_between, restore
from scaling.errors import UserError
from tests.archive_pipeline.conftest import JANUARY, TENANT, Room

FEBRUARY = Month(2025, 2)
OTHER = uuid.UUID(int=2)
PERSON = uuid.UUID(int=0xABCDEF)


def gone(room: Room, value: object = TENANT, column: str = "tenant_id", **options: Any) -> ErasureReport:
    request = Erasure(column, str(value), "ann", "request 4711")
    return erase(room.shard, room.target, request, **{"dry_run": False, **options})


def newest(room: Room) -> list[Published]:
    return manifests.newest(room.manifests())


def every_byte(room: Room) -> dict[str, bytes]:
    """All versions of all objects."""
    client = room.bucket.server.client()
    found = {}
    for page in client.get_paginator("list_object_versions").paginate(Bucket=room.bucket.name):
        for entry in page.get("Versions", []):
            body = client.get_object(Bucket=room.bucket.name, Key=entry["Key"], VersionId=entry["VersionId"])["Body"]
            found[f"{entry['Key']}@{entry['VersionId']}"] = body.read()
    return found


def rows_in_objects(room: Room, tenant: uuid.UUID, tmp_path: Path) -> int:
    """Rows of a tenant in any version of any Parquet object, listed or not."""
    found = 0
    with ParquetReader(tmp_path) as reader:
        for number, (name, body) in enumerate(every_byte(room).items()):
            if ".parquet@" in name:
                path = tmp_path / f"every-{number}.parquet"
                path.write_bytes(body)
                found += len(reader.rows_where("tenant_id", str(tenant), path))
    return found


def prune(room: Room) -> None:
    room.admin.execute("DELETE FROM audit_logs")


def digests(room: Room) -> dict[str, Digest]:
    return {each.manifest.month.name: each.manifest.digest for each in newest(room)}


def left_by(room: Room, condition: str) -> list[dict[str, Any]]:
    return room.rows(f"SELECT * FROM audit_logs WHERE {condition} ORDER BY id")


# -- what an erasure does --------------------------------------------------------------------------------------------


def test_a_tenants_rows_are_gone_from_every_object_and_nobody_elses_are(room: Room, tmp_path: Path) -> None:
    room.fill(700)
    room.fill(70, FEBRUARY)
    room.archive()
    room.archive(FEBRUARY)
    prune(room)
    stays = left_by(room, f"tenant_id <> '{TENANT}'")
    report = gone(room)

    assert [(each.month, each.rows, each.generation) for each in report.months] == [
        ("2025-01", 100, 2),
        ("2025-02", 10, 2),
    ]
    assert left_by(room, "true") == stays
    assert len(stays) == 660
    assert rows_in_objects(room, TENANT, tmp_path) == 0
    assert room.data_keys() == sorted(part.key for each in newest(room) for part in each.manifest.parts)
    row = room.month_row()
    assert (row["generation"], row["rows"], row["erased_rows"], row["state"]) == (2, 600, 100, "archived")


def test_only_the_parts_that_hold_the_rows_are_rewritten_and_counts_and_digests_reconcile(room: Room) -> None:
    room.fill(1500)
    before = room.archive().manifest
    prune(room)
    report = gone(room)
    after = newest(room)[0].manifest

    kept = {part.key for part in before.parts} & {part.key for part in after.parts}
    assert 1 <= report.months[0].parts < report.months[0].of_parts == len(before.parts)
    assert len(kept) == len(before.parts) - report.months[0].parts
    assert (after.kind, after.read_from, after.generation) == ("erasure", "archive", 2)
    assert after.erased_rows == before.digest.rows - after.digest.rows == report.rows
    assert after.supersedes == next(each.sha256 for each in room.manifests() if each.manifest.generation == 1)
    # The order and the schema are those of before: the same rows would give the same bytes.
    ids = [row["id"] for row in room.rows("SELECT id FROM audit_logs ORDER BY tenant_id, created_at_us, id")]
    assert [row["id"] for row in room.rows("SELECT id FROM audit_logs")] == ids
    assert all(part.key.startswith("audit_logs/year=2025/month=01/part-main-g0002") for part in after.parts[:1])


def test_a_users_rows_are_erased_across_tenants(room: Room) -> None:
    room.fill(70)
    room.log("2025-01-05", user_id=PERSON)
    room.log("2025-01-06", user_id=PERSON, tenant_id=OTHER)
    room.archive()
    prune(room)
    assert gone(room, str(PERSON).upper(), "user_id").rows == 2
    assert len(room.rows()) == 70
    assert room.rows(f"SELECT id FROM audit_logs WHERE user_id = '{PERSON}'") == []


def test_a_month_with_nothing_but_the_tenants_rows_becomes_an_empty_one(room: Room, tmp_path: Path) -> None:
    room.log("2025-01-05")
    room.archive()
    prune(room)
    gone(room)
    assert (newest(room)[0].manifest.parts, room.data_keys()) == ((), [])
    assert rows_in_objects(room, TENANT, tmp_path) == 0
    assert gone(room).months == ()
    # Rows that come late go on from there.
    room.log("2025-01-06", tenant_id=room.tenant(OTHER))
    assert room.archive().late_rows == 1
    assert len(room.rows()) == 1


def test_late_rows_are_erased_with_the_others(room: Room, tmp_path: Path) -> None:
    room.fill(70)
    room.archive()
    room.log("2025-01-20")
    room.archive()
    prune(room)
    assert gone(room).rows == 11
    assert newest(room)[0].manifest.generation == 3
    assert rows_in_objects(room, TENANT, tmp_path) == 0


def test_what_remains_in_postgres_is_counted_by_month_and_left_there(room: Room) -> None:
    room.fill(70)
    room.archive()
    room.fill(14, FEBRUARY)  # not archived
    report = gone(room)
    assert report.remaining == {"2025-01": 10, "2025-02": 2}
    assert report.would_return == 10
    assert room.admin.execute("SELECT count(*) FROM audit_logs WHERE tenant_id = %s", (TENANT,)).fetchone() == (12,)


def test_copies_that_restores_made_are_named(room: Room) -> None:
    room.fill(7)
    room.archive()
    restore(room.shard, room.target, [JANUARY], dry_run=False)
    assert gone(room, dry_run=True).copies == ("audit_partitions.audit_logs_restored_2025_01",)


# -- what stays provable ---------------------------------------------------------------------------------------------


def kept_provable(room: Room, old: Part, rows: list[str]) -> None:
    """The old part's root can be computed from the rows that are left and what the newest erasure kept."""
    manifest = max((e.manifest for e in room.manifests() if e.manifest.kind == "erasure"), key=lambda m: m.generation)
    body = room.target.bucket.read(room.target.layout.erased(manifest.month, "main", manifest.generation))
    assert hashlib.sha256(body).hexdigest() == manifest.erased_sha256
    [punctured] = [each for each in merkle.punctured_from_bytes(body) if each.root.hex() == old.merkle_root]
    assert merkle.root(punctured.leaves(rows)) == punctured.root
    assert len(punctured.erased) == old.digest.rows - len(rows)


def texts(room: Room, part: Part, columns: Any, tmp_path: Path) -> list[str]:
    path = tmp_path / "texts.parquet"
    room.target.bucket.download(part.key, path)
    with ParquetReader(tmp_path) as reader:
        return list(reader.texts(columns, path))


def test_old_roots_stay_provable_and_no_salt_of_an_erased_row_is_left(room: Room, tmp_path: Path) -> None:
    room.fill(90)
    room.target = replace(room.target, part_size=PartSize())
    before = room.archive().manifest
    [old] = before.parts
    old_texts = texts(room, old, before.columns, tmp_path)
    salts = merkle.salts_from_bytes(room.target.bucket.read(room.target.layout.salts(JANUARY, "main", 1)))[0]
    prune(room)
    first = gone(room)
    after = newest(room)[0].manifest
    kept_provable(room, old, texts(room, after.parts[0], after.columns, tmp_path))

    # Once more, another tenant: the first root stays provable too, and neither tenant's salts are left.
    gone(room, OTHER)
    final = newest(room)[0].manifest
    rows = texts(room, final.parts[0], final.columns, tmp_path)
    assert len(rows) == 90 - 13 - 13
    kept_provable(room, old, rows)
    kept_provable(room, after.parts[0], rows)
    assert first.rows == 13
    whole = b"".join(every_byte(room).values())
    assert salts.seeds not in whole
    for row, text in enumerate(old_texts):
        is_gone = text not in rows
        assert (bytes.fromhex(salts.salt(row)) in whole) is not is_gone
    assert [key for key in room.target.bucket.keys("audit_logs_manifests/year=2025/") if "g0003" not in key] == [
        "audit_logs_manifests/year=2025/month=01/main-g0001.json",
        "audit_logs_manifests/year=2025/month=01/main-g0002.json",
    ]


def test_the_new_salts_prove_the_new_parts_and_those_that_stayed(room: Room, tmp_path: Path) -> None:
    room.fill(1500)
    room.archive()
    prune(room)
    gone(room)
    manifest = newest(room)[0].manifest
    body = room.target.bucket.read(room.target.layout.salts(JANUARY, "main", 2))
    assert hashlib.sha256(body).hexdigest() == manifest.salts_sha256
    path = tmp_path / "part.parquet"
    with ParquetReader(tmp_path) as reader:
        for part, seeds in zip(manifest.parts, merkle.salts_from_bytes(body), strict=True):
            assert room.target.bucket.download(part.key, path) == part.sha256
            found = reader.verify(manifest.columns, path, seeds)
            assert (found.digest, found.merkle_root.hex()) == (part.digest, part.merkle_root)


# -- the record ------------------------------------------------------------------------------------------------------


def test_the_record_tells_what_was_done_and_not_whose_rows_they_were(room: Room) -> None:
    room.fill(70)
    room.fill(70, FEBRUARY)
    room.archive()
    room.archive(FEBRUARY)
    prune(room)
    report = gone(room)
    assert report.request is not None
    row = room.admin.execute(
        "SELECT id, column_name, value_sha256, requested_by, reason, months, rows, finished_at IS NOT NULL "
        "FROM archive.erasures"
    ).fetchone()
    expected = value_hash(report.request, str(TENANT))
    assert row == (report.request, "tenant_id", expected, "ann", "request 4711", 2, 20, True)
    # A row can be recognised by it, in SQL too.
    assert room.admin.execute(
        "SELECT encode(sha256(convert_to(id::text || ':' || %s, 'UTF8')), 'hex') = value_sha256 FROM archive.erasures",
        (str(TENANT),),
    ).fetchone() == (True,)
    everything = room.admin.execute("SELECT e::text FROM archive.erasures e").fetchall()
    everything += room.admin.execute("SELECT m::text FROM archive.months m").fetchall()
    assert str(TENANT) not in str(everything)
    assert str(TENANT).encode() not in b"".join(every_byte(room).values())
    assert str(TENANT) not in repr(Erasure("tenant_id", str(TENANT), "ann", "r"))


# -- what is in the way ----------------------------------------------------------------------------------------------


# case 71
def test_a_legal_hold_on_a_month_makes_erasing_refuse_and_nothing_is_touched(room: Room) -> None:
    room.fill(70)
    room.fill(70, FEBRUARY)
    room.archive()
    room.archive(FEBRUARY)
    before = every_byte(room)
    with room.shard.transaction() as connection:
        hold = legal_holds.place(connection, room.target.table, month=FEBRUARY, reason="a lawsuit", by="ann")
    with pytest.raises(LegalHoldError, match=f"nothing was erased: legal hold {hold.number} on month 2025-02"):
        gone(room)
    assert every_byte(room) == before
    assert room.admin.execute("SELECT count(*) FROM archive.erasures").fetchone() == (0,)
    planned = gone(room, dry_run=True)
    assert [bool(month.obstacles) for month in planned.months] == [False, True]
    with room.shard.transaction() as connection:
        legal_holds.release(connection, room.target.table, hold.number, by="ann")
    assert gone(room).rows == 20


def test_a_hold_on_a_tenant_keeps_a_users_rows_of_that_tenant(room: Room) -> None:
    room.fill(7)
    room.log("2025-01-05", user_id=PERSON)
    room.log("2025-01-06", user_id=uuid.UUID(int=77), tenant_id=OTHER)
    room.archive()
    with room.shard.transaction() as connection:
        legal_holds.place(connection, room.target.table, tenant=str(TENANT), reason="r", by="ann")
    with pytest.raises(LegalHoldError, match="on one tenant's rows of every month"):
        gone(room, PERSON, "user_id")
    assert gone(room, uuid.UUID(int=77), "user_id").rows == 1


def lock(room: Room, mode: Any, days: int = 400) -> None:
    room.target.bucket.protection = Protection(lock=mode, days=days, versioned=True)


# case 70
@pytest.mark.lockable_bucket
def test_a_user_is_erased_from_fourteen_locked_months_and_everything_agrees(room: Room, tmp_path: Path) -> None:
    lock(room, "governance")
    months = months_between(Month(2024, 1), Month(2025, 2))
    for month in months:
        room.log(month.start, user_id=PERSON)
        room.log(month.start + timedelta(days=1), user_id=PERSON, tenant_id=room.tenant(OTHER))
        for hour in range(3):
            room.log(month.start + timedelta(hours=hour), tenant_id=OTHER)
        room.archive(month)
    prune(room)
    before, stays = digests(room), room.rows("SELECT * FROM audit_logs WHERE user_id IS NULL ORDER BY id")
    part = newest(room)[0].manifest.parts[0]
    with pytest.raises(ObjectLockedError):
        room.target.bucket.delete(part.key, part.version_id)

    report = gone(room, PERSON, "user_id")
    assert (report.rows, len(report.months)) == (28, 14)
    assert {name: digest.rows for name, digest in digests(room).items()} == dict.fromkeys(before, 3)
    # No version of an old part, none of an old seed, and no delete marker is left; the chain has a link for each step.
    client = room.bucket.server.client()
    listed = client.list_object_versions(Bucket=room.bucket.name, Prefix="audit_logs/")
    assert {entry["Key"] for entry in listed["Versions"]} == {
        part.key for e in newest(room) for part in e.manifest.parts
    }
    assert "DeleteMarkers" not in listed
    assert str(PERSON).encode() not in b"".join(every_byte(room).values())
    links = list(room.target.bucket.keys(room.target.layout.chain("main")))
    assert len(links) == 28
    # The query, the restore and Athena, which reads whatever lies under the prefix, agree.
    assert room.rows("SELECT * FROM audit_logs ORDER BY id") == stays
    restored = restore(room.shard, room.target, months, dry_run=False, into=room.target.table)
    assert sum(each.rows for each in restored) == 42
    assert room.admin.execute("SELECT count(*), count(user_id) FROM audit_logs").fetchone() == (42, 0)
    assert room.admin.execute("SELECT months, rows FROM archive.erasures").fetchone() == (14, 28)


@pytest.mark.lockable_bucket
def test_compliance_mode_refuses_and_names_the_end_of_the_retention_and_the_alternative(room: Room) -> None:
    lock(room, "compliance", days=1)
    room.fill(14)
    room.archive()
    before = every_byte(room)
    with pytest.raises(ObjectLockedError, match=r"nothing was erased: month 2025-01: Object Lock in compliance") as no:
        gone(room)
    assert no.value.until is not None
    assert f"until {no.value.until:%Y-%m-%d %H:%M} UTC" in str(no.value)
    assert "ask again then, or destroy the bucket's KMS key" in str(no.value)
    assert every_byte(room) == before


@pytest.mark.lockable_bucket
def test_without_the_permission_to_bypass_the_rows_are_hidden_and_a_later_run_removes_them(
    room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock(room, "governance")
    room.fill(70)
    room.archive()
    prune(room)
    delete = room.target.bucket.delete

    def without_permission(key: str, version_id: str | None = None, *, bypass_governance: bool = False) -> None:
        delete(key, version_id)

    monkeypatch.setattr(room.target.bucket, "delete", without_permission)
    with pytest.raises(ObjectLockedError, match="month 2025-01 no longer shows the rows, but old versions still hold"):
        gone(room)
    assert room.data_keys() == [part.key for part in newest(room)[0].manifest.parts]
    assert rows_in_objects(room, TENANT, tmp_path) == 10
    monkeypatch.setattr(room.target.bucket, "delete", delete)
    report = gone(room)
    assert (report.rows, report.removed_objects > 0) == (0, True)
    assert rows_in_objects(room, TENANT, tmp_path) == 0
    assert room.admin.execute("SELECT months, rows, finished_at IS NOT NULL FROM archive.erasures").fetchall() == [
        (1, 10, True)
    ]


def test_a_dry_run_is_the_default_and_writes_nothing(room: Room) -> None:
    room.fill(70)
    room.archive()
    before, row = every_byte(room), room.month_row()
    report = erase(room.shard, room.target, Erasure("tenant_id", str(TENANT), "ann", "r"))
    assert (report.request, report.rows, report.months[0].generation) == (None, 10, None)
    assert (every_byte(room), room.month_row()) == (before, row)
    assert room.admin.execute("SELECT count(*) FROM archive.erasures").fetchone() == (0,)


def test_an_unknown_column_or_a_wrong_value_is_refused_and_the_value_is_not_repeated(room: Room) -> None:
    room.fill(7)
    room.archive()
    with pytest.raises(UserError, match=r"public\.audit_logs has no column userid"):
        gone(room, PERSON, "userid")
    with pytest.raises(UserError, match="not of type uuid") as refused:
        gone(room, "somebody@example.org", "user_id")
    assert "somebody" not in str(refused.value)
    with pytest.raises(UserError, match="rows cannot be chosen by created_at"):
        gone(room, "2025-01-01", "created_at")


def test_a_damaged_part_is_not_rewritten_and_the_month_is_untouched(room: Room) -> None:
    room.fill(70)
    part = room.archive().manifest.parts[0]
    prune(room)
    body = room.target.bucket.read(part.key)
    client = room.bucket.server.client()
    client.put_object(Bucket=room.bucket.name, Key=part.key, Body=body[:60] + bytes([body[60] ^ 1]) + body[61:])
    with pytest.raises(ErasureError, match=r"2025-01 is untouched: .* is missing or not what its manifest says"):
        gone(room)
    assert len(room.manifests()) == 1
    assert room.target.bucket.head(part.key) is not None


def test_a_part_without_its_salts_is_not_rewritten(room: Room) -> None:
    room.fill(70)
    room.archive()
    room.target.bucket.delete(room.target.layout.salts(JANUARY, "main", 1))
    with pytest.raises(ErasureError, match=r"main-g0001\.salts is missing or damaged"):
        gone(room)
    assert len(room.manifests()) == 1


def test_a_month_under_lease_is_not_erased_from_at_the_same_time(room: Room) -> None:
    room.fill(7)
    room.archive()
    with lease(room.shard, room.target.table, JANUARY), pytest.raises(MonthBusyError):
        gone(room)
    assert gone(room).rows == 1
    assert room.admin.execute("SELECT count(*) FROM archive.erasures").fetchone() == (1,)


def test_another_shards_objects_are_left_alone_whatever_its_name(room: Room) -> None:
    room.fill(7)
    room.archive()
    key = "audit_logs/year=2025/month=01/part-main-gold-g0001-00000-0123456789abcdef.parquet"
    room.target.bucket.put_bytes(key, b"another shard's", content_type="text/plain")
    gone(room)
    assert room.target.bucket.read(key) == b"another shard's"


# -- crashes ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a run at once: no handler of an Exception tidies up after it."""


def killed_in_a_process_of_its_own(step: str, times: int, scratch: Path) -> None:
    command = [sys.executable, "-m", "tests.archive_pipeline.erase_killed", str(TENANT), step, str(times), str(scratch)]
    killed = subprocess.run(command, check=False, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()


def killed_here(room: Room, step: str, times: int) -> None:
    seen: list[str] = []

    def die(reached: StrEnum) -> None:
        seen.append(str(reached))
        if seen.count(step) == times:
            raise Killed

    with pytest.raises(Killed):
        gone(room, on_step=die)


@pytest.mark.parametrize(
    ("step", "times", "by_signal"),
    [
        (Step.REWRITTEN, 1, False),
        (Step.NOTED, 1, False),
        (publication.Step.UPLOADED, 1, True),
        (publication.Step.READ_BACK, 1, False),
        (publication.Step.SALTS, 1, False),
        (publication.Step.MANIFEST, 1, True),
        (publication.Step.LINKED, 2, False),
        (Step.HIDDEN, 1, False),
        (Step.REMOVED, 1, True),
        (Step.DONE, 1, False),
    ],
)
@pytest.mark.lockable_bucket
def test_an_erasure_killed_anywhere_is_completed_by_the_next_run(
    room: Room, step: str, times: int, by_signal: bool, tmp_path: Path
) -> None:
    room.fill(70)
    room.log("2025-02-10")
    room.archive()
    room.archive(FEBRUARY)
    prune(room)
    stays = left_by(room, f"tenant_id <> '{TENANT}'")
    if by_signal:
        killed_in_a_process_of_its_own(step, times, tmp_path)
    else:
        killed_here(room, step, times)

    gone(room)
    assert left_by(room, "true") == stays
    assert len(stays) == 60
    assert rows_in_objects(room, TENANT, tmp_path) == 0
    assert room.data_keys() == sorted(part.key for each in newest(room) for part in each.manifest.parts)
    assert {each.manifest.generation for each in newest(room)} == {2}
    assert room.admin.execute("SELECT months, rows, finished_at IS NOT NULL FROM archive.erasures").fetchall() == [
        (2, 11, True)
    ]
    assert room.admin.execute("SELECT sum(erased_rows), sum(rows) FROM archive.months").fetchone() == (11, 60)
    assert len(list(room.target.bucket.keys(room.target.layout.chain("main")))) == 4
    assert gone(room).removed_objects == 0


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_would_do_and_does_it_when_told(
    room: Room, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    room.fill(70)
    room.archive()
    arguments = ["--tenant", str(TENANT), "--reason", "r", "--by", "ann"]
    assert erasing.main(arguments) == 1
    said = capsys.readouterr().out
    assert "nothing was changed; run it with --yes to do it" in said
    assert "Postgres still holds 10 such row(s) (2025-01: 10)" in said
    assert "archives them again as late rows" in said
    assert str(TENANT) not in said
    prune(room)
    assert erasing.main([*arguments, "--yes"]) == 0
    assert "erased 10 row(s); recorded as request " in capsys.readouterr().out
    with pytest.raises(UserError, match="--where must be COLUMN=VALUE"):
        erasing.main(["--where", "user_id", "--reason", "r", "--by", "ann"])
