"""The short version of `make chaos-archive`; a failing seed is run again with `--trials 1 --seed N`."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from devstack.servers import Database
from tests.archive_pipeline.chaos import Arena, Outcome, Trial, own_arena

SEEDS = range(1, 7)


@pytest.fixture(scope="module")
def chaos_arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    """Servers of its own, because some trials crash them."""
    with own_arena(Path(tmp_path_factory.mktemp("chaos"))) as arena:
        yield arena


@pytest.mark.xdist_group("archive-chaos")
@pytest.mark.parametrize("seed", SEEDS)
def test_no_row_is_lost_or_doubled_when_workers_are_killed_and_servers_fail(chaos_arena: Arena, seed: int) -> None:
    outcome = Trial(chaos_arena, seed).run()
    assert outcome.ok, outcome.raw()
    assert outcome.rows


@pytest.mark.xdist_group("archive-chaos")
def test_the_trials_notice_a_row_that_is_lost_doubled_or_altered(
    chaos_arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Trial._judge_rows

    def spoil(self: Trial, hands: object, writer: object, database: Database, *rest: object, **options: object) -> None:
        with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
            admin.execute("SET session_replication_role = replica")
            newest = "(SELECT ctid FROM audit_logs ORDER BY created_at DESC, id OFFSET %s LIMIT 1)"
            admin.execute(f"DELETE FROM audit_logs WHERE ctid = {newest % 0}".encode())
            admin.execute(f"UPDATE audit_logs SET resource_id = 'other' WHERE ctid = {newest % 1}".encode())
            admin.execute("INSERT INTO audit_logs (id, tenant_id, action) VALUES (%s, %s, '')", (uuid.uuid4(), ONE))
        judge(self, hands, writer, database, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Trial, "_judge_rows", spoil)
    monkeypatch.setattr(Trial, "_storm", lambda *_: None)
    outcome = Trial(chaos_arena, PLAIN_SEED).run()
    assert _counts(outcome) == (1, 1, 1)


ONE = uuid.UUID(int=1)
PLAIN_SEED = 1


def _counts(outcome: Outcome) -> tuple[int, int, int]:
    return outcome.lost, outcome.altered, outcome.unknown
