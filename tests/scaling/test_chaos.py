"""Storms in the suite; `python -m tests.scaling.chaos` runs hundreds of them."""

from devstack.servers import Database
from tests.scaling import chaos

TRIALS = 8


def test_daemons_killed_and_frozen_at_their_commits_act_once_on_every_crossing(database: Database) -> None:
    with chaos.arena(database.dsn) as ready:
        outcomes = [chaos.Trial(ready, seed).run() for seed in range(1, TRIALS + 1)]
    assert [outcome.raw() for outcome in outcomes if not outcome.ok] == []
    assert sum(outcome.crossings for outcome in outcomes) > 2 * TRIALS
    strikes = {name.split()[0] for outcome in outcomes for name in outcome.strikes}
    assert strikes == {"killed", "frozen"}
