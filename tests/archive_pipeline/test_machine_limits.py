"""The disk or the memory of this machine runs out: the month fails and leaves nothing, and the next run converges."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from archive_pipeline.archive import Outcome
from archive_pipeline.clustering import Clusters
from archive_pipeline.parts import PartSize
from archive_pipeline.scratch import PREFIX, scratch_directory
from scaling.errors import UserError
from tests.archive_pipeline.conftest import JANUARY, TENANT, Room

ROWS = 1000


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Make every write beyond a size fail, as one to a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def nothing_is_left(room: Room, scratch: Path) -> None:
    assert list(scratch.iterdir()) == []
    assert list(room.target.bucket.keys("")) == []
    assert room.month_row()["state"] == "failed"


# case 65
@pytest.mark.parametrize(
    ("part_size", "limit"),
    [
        (PartSize(row_group_bytes=100_000, part_bytes=50_000), 30_000),  # the rows on their way do not fit
        (PartSize(row_group_bytes=20_000, part_bytes=500_000), 40_000),  # they do, and the part they become does not
    ],
)
def test_a_disk_that_is_full_in_the_middle_fails_the_month_and_leaves_neither_files_nor_objects(
    room: Room, tmp_path: Path, part_size: PartSize, limit: int
) -> None:
    room.target = replace(room.target, part_size=part_size)
    room.fill(ROWS)
    with no_file_larger_than(limit), pytest.raises(UserError, match=rf"the disk of {tmp_path} is full; .*set TMPDIR"):
        room.archive()
    nothing_is_left(room, tmp_path)
    report = room.archive()
    assert (report.outcome, report.manifest.digest.rows) == (Outcome.ARCHIVED, ROWS)
    assert max(part.size for part in report.manifest.parts) > (limit if part_size.row_group_bytes < limit else 0)


def run_with_little_memory(room: Room, scratch: Path, more_bytes: int) -> "subprocess.CompletedProcess[str]":
    room.fill(ROWS)
    room.admin.execute(
        "INSERT INTO audit_logs (tenant_id, action, details, created_at) "
        "VALUES (%s, 'large', jsonb_build_object('text', repeat('a', 10000000)), %s)",
        (TENANT, JANUARY.start),
    )
    arguments = [sys.executable, "-m", "tests.archive_pipeline.limited", str(more_bytes), str(scratch)]
    return subprocess.run(arguments, check=False, env=dict(os.environ), capture_output=True, text=True)


# case 65
def test_memory_that_runs_out_in_the_middle_fails_the_month_and_what_is_left_goes_with_the_next_run(
    room: Room, tmp_path: Path
) -> None:
    ended = run_with_little_memory(room, tmp_path, 32_000_000)
    # A thread of a C++ library that meets std::bad_alloc ends the process at once, which then cleans nothing.
    assert ended.returncode != 0
    if ended.returncode == 1:
        assert "UserError: there is not enough memory for the month; lower ARCHIVE_PARALLELISM" in ended.stderr
        nothing_is_left(room, tmp_path)
    assert list(room.target.bucket.keys("")) == []
    report = room.archive()
    assert (report.outcome, report.manifest.digest.rows) == (Outcome.ARCHIVED, ROWS + 1)
    assert list(tmp_path.iterdir()) == []


# case 65
@pytest.mark.parametrize(
    "error", [MemoryError(), pa.ArrowMemoryError("malloc of size 10 failed"), OSError("[libpq] failed: out of memory")]
)
def test_memory_that_a_library_could_not_get_is_told_in_a_sentence_and_leaves_nothing(
    room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def add(clusters: Clusters, batch: pa.RecordBatch) -> None:
        raise error

    room.fill(10)
    with monkeypatch.context() as patch:
        patch.setattr(Clusters, "add", add)
        with pytest.raises(UserError, match="there is not enough memory for the month"):
            room.archive()
    nothing_is_left(room, tmp_path)
    assert room.archive().outcome is Outcome.ARCHIVED


def test_the_directory_of_a_dead_attempt_goes_and_that_of_a_living_one_stays(tmp_path: Path) -> None:
    holding = "import sys, time, pathlib; from archive_pipeline.scratch import scratch_directory as lend\n"
    holding += "with lend(pathlib.Path(sys.argv[1])) as mine: print(mine, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", holding, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        (theirs / "rows").write_bytes(b"rows")
        with scratch_directory(tmp_path) as mine:
            assert sorted(tmp_path.iterdir()) == sorted([mine, theirs])
        other.kill()
    assert list(tmp_path.iterdir()) == [theirs]
    with scratch_directory(tmp_path) as mine:
        assert list(tmp_path.iterdir()) == [mine]
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_of_an_attempt_is_never_removed(tmp_path: Path) -> None:
    others = [tmp_path / "archive-of-somebody", tmp_path / f"{PREFIX}link", tmp_path / f"{PREFIX}file"]
    others[0].mkdir()
    others[1].symlink_to(others[0])
    others[2].write_text("")
    with scratch_directory(tmp_path):
        pass
    assert sorted(tmp_path.iterdir()) == sorted(others)
