"""Storms in the suite; `make chaos-sync` runs hundreds of them."""

from collections import Counter

from devstack.google_calendar import Simulator
from devstack.servers import Database
from tests.sync_pipeline import chaos

TRIALS = 8


def test_workers_killed_frozen_and_cut_off_lose_duplicate_and_resurrect_nothing(
    database: Database, google: Simulator
) -> None:
    with chaos.arena(database, google) as ready:
        outcomes = [chaos.Trial(ready, seed).run() for seed in range(1, TRIALS + 1)]
    assert [outcome.raw() for outcome in outcomes if not outcome.ok] == []
    strikes = sum((outcome.strikes for outcome in outcomes), Counter[str]())
    assert {"killed", "stopped past its lease", "cut off from Postgres"} <= strikes.keys()
