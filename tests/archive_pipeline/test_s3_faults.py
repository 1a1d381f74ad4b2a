"""A month is archived through S3's bad days: what passes is ridden out, what lasts stops the run cleanly."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from archive_pipeline.archive import Outcome, Step
from archive_pipeline.bucket_protection import require
from archive_pipeline.objects import ArchiveBucket
from scaling.errors import UserError
from scaling.settings import ArchiveSettings, load
from tests.archive_pipeline.conftest import JANUARY, Room
from tests.archive_pipeline.s3_with_faults import Faults, Mistake, faulty_s3

ROWS = 1000
METHODS = ("GET", "PUT", "HEAD", "DELETE", "POST")


def reopen(room: Room) -> None:
    """Open the bucket again, with the environment as it is now."""
    room.target = replace(room.target, bucket=ArchiveBucket.from_settings(load(ArchiveSettings)))


@pytest.fixture
def faults(room: Room, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """A room whose S3 server makes mistakes."""
    with faulty_s3(room.bucket.server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        reopen(room)
        yield proxy


def everything(mistake: Mistake) -> list[tuple[str, str, Mistake]]:
    return [(method, "", mistake) for method in METHODS]


def first(step: Step, act: Callable[[], None]) -> Callable[[Step], None]:
    """Act the first time a step is reached."""
    turns = itertools.count()
    return lambda reached: act() if reached is step and next(turns) == 0 else None


def rows_in_postgres(room: Room) -> int:
    row = room.admin.execute("SELECT count(*) FROM audit_logs").fetchone()
    assert row is not None
    return int(row[0])


def nothing_was_published(room: Room) -> None:
    assert room.manifests() == []
    assert list(room.target.bucket.keys(room.target.layout.chain(room.shard.name))) == []
    assert room.month_row()["state"] == "failed"
    assert rows_in_postgres(room) == ROWS
    assert list(room.target.scratch.iterdir() if room.target.scratch else ()) == []


def it_converges(room: Room) -> None:
    report = room.archive()
    assert (report.outcome, report.manifest.digest.rows, report.strangers) == (Outcome.ARCHIVED, ROWS, ())
    assert room.data_keys() == sorted(part.key for part in report.manifest.parts)
    report = room.archive()
    assert (report.outcome, report.damaged) == (Outcome.UNCHANGED, ())


PASSING: list[tuple[str, str, Mistake]] = [
    ("PUT", "part-", "503"),
    ("PUT", "part-", "500"),
    ("PUT", "part-", "reset"),
    ("PUT", "part-", "reset mid-part"),
    ("PUT", "part-", "answer lost"),
    ("PUT", "part-", "no answer"),
    ("PUT", "part-", "conditional writes met"),
    ("PUT", "part-", "damaged on the way"),
    ("GET", "part-", "503"),
    ("GET", "part-", "reset"),
    ("GET", "part-", "cut off"),
    ("GET", "part-", "damaged on the way back"),
    ("PUT", "g0001.salts", "answer lost"),
    ("PUT", "g0001.json", "answer lost"),
    ("GET", "g0001.json", "cut off"),
    ("PUT", "chain", "answer lost"),
    ("PUT", "catalog.sql", "500"),
    ("GET", "list-type", "503"),
]


# case 43
# case 33
def test_every_passing_fault_of_s3_is_ridden_out_and_the_objects_are_those_of_a_run_without_one(
    room: Room, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archive_pipeline.objects.READ_TIMEOUT_SECONDS", 0.5)
    reopen(room)
    room.fill(ROWS)
    clean = room.archive()
    for key in list(room.target.bucket.keys("")):
        room.target.bucket.delete(key)
    room.admin.execute("TRUNCATE archive.months, archive.uploads, archive.chain_heads CASCADE")

    faults.script = list(PASSING)
    report = room.archive()
    assert sorted(faults.made) == sorted(mistake for *_, mistake in PASSING)
    assert (report.outcome, report.strangers) == (Outcome.ARCHIVED, ())
    assert [part.sha256 for part in report.manifest.parts] == [part.sha256 for part in clean.manifest.parts]
    assert room.data_keys() == sorted(part.key for part in clean.manifest.parts)
    assert room.archive().damaged == ()


def test_a_server_that_stays_down_fails_the_month_with_a_sentence_and_it_converges_later(
    room: Room, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archive_pipeline.objects.ATTEMPTS", 2)
    reopen(room)
    room.fill(ROWS)
    faults.lasting = [("PUT", "part-", "500")]
    with pytest.raises(UserError, match=r"S3 failed PutObject of .*part-.* 2 times \(InternalError\); try"):
        room.archive()
    nothing_was_published(room)
    assert room.data_keys() == []
    faults.lasting.clear()
    it_converges(room)


# case 44
def test_no_upload_is_ever_left_unfinished_because_each_object_is_one_put(
    room: Room, faults: Faults, tmp_path: Path
) -> None:
    room.fill(ROWS)
    arguments = [sys.executable, "-m", "tests.archive_pipeline.killed", Step.UPLOADED, "1", str(tmp_path)]
    assert subprocess.run(arguments, check=False, env=dict(os.environ)).returncode == -signal.SIGKILL
    assert [request.path for request in faults.requests if "upload" in request.path] == []
    assert "Uploads" not in room.target.bucket.client.list_multipart_uploads(Bucket=room.bucket.name)
    assert len(room.data_keys()) >= 1
    it_converges(room)
    assert list(tmp_path.iterdir()) == []


# case 45
@pytest.mark.parametrize("step", [Step.LEASED, Step.UPLOADED, Step.READ_BACK])
def test_credentials_that_expire_in_a_run_stop_it_cleanly_and_new_ones_go_on(
    room: Room, faults: Faults, step: Step
) -> None:
    room.fill(ROWS)
    expire = first(step, lambda: faults.lasting.extend(everything("credentials expired")))
    with pytest.raises(UserError, match=r"the AWS credentials expired at \w+ of s3://.*; renew them and run the month"):
        room.archive(on_step=expire)
    faults.lasting.clear()
    nothing_was_published(room)
    it_converges(room)


CREDENTIAL_PROCESS = """
n=$(wc -l < "{asked}"); echo >> "{asked}"
[ "$n" -lt {times} ] || exit 1
printf '{{"Version": 1, "AccessKeyId": "%s", "SecretAccessKey": "%s", "Expiration": "%s"}}' \
  "{key}" "{secret}" "$(date -u -d '+1 minute' +%Y-%m-%dT%H:%M:%SZ)"
"""


def short_lived_credentials(room: Room, directory: Path, monkeypatch: pytest.MonkeyPatch, *, times: int) -> Path:
    """Give boto3 credentials that it must renew before each request, as often as `times`."""
    server, asked = room.bucket.server, directory / "asked"
    asked.touch()
    script = directory / "credentials.sh"
    script.write_text(
        CREDENTIAL_PROCESS.format(asked=asked, times=times, key=server.access_key_id, secret=server.secret_access_key)
    )
    config = directory / "config"
    config.write_text(f"[default]\ncredential_process = /bin/sh {script}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    reopen(room)
    return asked


# case 45
def test_credentials_that_can_be_renewed_are_renewed_in_a_run(
    room: Room, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    room.fill(ROWS)
    asked = short_lived_credentials(room, tmp_path_factory.mktemp("aws"), monkeypatch, times=10_000)
    it_converges(room)
    assert len(asked.read_text().splitlines()) > len(room.data_keys())


# case 45
def test_credentials_that_can_no_longer_be_renewed_stop_the_run_cleanly(
    room: Room, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    room.fill(ROWS)
    with monkeypatch.context() as patch:
        short_lived_credentials(room, tmp_path_factory.mktemp("aws"), patch, times=6)
        with pytest.raises(UserError, match=r"the AWS credentials could not be renewed for s3://"):
            room.archive()
    reopen(room)
    nothing_was_published(room)
    it_converges(room)


# case 46
def test_a_part_that_is_damaged_on_its_way_up_is_refused_by_s3_and_sent_again(room: Room, faults: Faults) -> None:
    room.fill(ROWS)
    faults.script = [("PUT", "part-", "damaged on the way")] * 2
    it_converges(room)
    assert faults.made == ["damaged on the way"] * 2


# case 46
def test_a_line_that_damages_every_part_fails_the_month_and_leaves_nothing(
    room: Room, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archive_pipeline.objects.REPEATS", 2)
    room.fill(ROWS)
    faults.lasting = [("PUT", "part-", "damaged on the way")]
    with pytest.raises(UserError, match=r"S3 refuses PutObject of .*part-.* \((BadDigest|X\w+Mismatch)\)"):
        room.archive()
    nothing_was_published(room)
    assert room.data_keys() == []
    faults.lasting.clear()
    it_converges(room)


# case 50
@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (("GET", "part-", "decrypt denied"), r"KMS refuses GetObject of .*part-.*credentials need kms:Decrypt on the"),
        (("PUT", "part-", "another region"), r"bucket test-\w+ is in another region; correct AWS_REGION"),
    ],
)
def test_a_wrong_region_or_a_key_that_may_not_decrypt_fails_the_month_and_nothing_is_published_or_dropped(
    room: Room, faults: Faults, fault: tuple[str, str, Mistake], sentence: str
) -> None:
    room.fill(ROWS)
    faults.lasting = [fault]
    with pytest.raises(UserError, match=sentence):
        room.archive()
    nothing_was_published(room)
    assert room.data_keys() == []
    faults.lasting.clear()
    it_converges(room)


# case 51
@pytest.mark.lockable_bucket
def test_a_month_goes_into_a_bucket_with_object_lock_and_only_what_an_erasure_removes_stays_unlocked(
    room: Room, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHIVE_OBJECT_LOCK", "governance")
    monkeypatch.setenv("ARCHIVE_OBJECT_LOCK_DAYS", "1")
    reopen(room)
    room.fill(ROWS)
    require(room.target.bucket, room.target.layout)
    it_converges(room)
    puts = [request for request in faults.requests if request.method == "PUT"]
    assert [request.path for request in puts if "x-amz-checksum-sha256" not in request.headers] == []
    locks = {each.key: room.target.bucket.head(each.key) for each in room.target.bucket.versions("")}
    unlocked = [key for key, found in locks.items() if found is not None and found.lock is None]
    assert sorted(unlocked) == sorted(
        [room.target.layout.catalog, room.target.layout.salts(JANUARY, room.shard.name, 1)]
    )
    assert all(part.version_id for part in room.manifests()[0].manifest.parts)


# case 52
@pytest.mark.lockable_bucket
def test_a_later_run_gets_keys_of_its_own_and_no_archived_object_is_ever_written_again(room: Room) -> None:
    room.fill(ROWS)
    room.archive()
    before = {(each.key, each.version_id) for each in room.target.bucket.versions(room.target.layout.data)}
    room.log(JANUARY.start)
    assert room.archive().outcome is Outcome.LATE
    # Not even a ledger that was lost makes a run start over.
    room.admin.execute("TRUNCATE archive.months, archive.uploads, archive.chain_heads CASCADE")
    room.log(JANUARY.start)
    report = room.archive()
    assert (report.outcome, report.manifest.generation) == (Outcome.LATE, 3)

    layout = room.target.layout
    versions = list(room.target.bucket.versions(layout.data)) + list(room.target.bucket.versions(layout.manifests))
    once = [each.key for each in versions if each.key != layout.catalog]
    assert len(once) == len(set(once))
    assert before <= {(each.key, each.version_id) for each in versions}
    assert not any(each.is_delete_marker for each in versions)
