"""The decisions of people without the UI, through the command itself."""

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from devstack.servers import Database
from scaling import episodes, samples
from scaling.capabilities import Capability, Mode
from scaling.episodes import EpisodeState, Watch
from scaling.samples import Sample
from scaling.thresholds import Compare, Rule

RULE = Rule("slow", "mean", Compare.ABOVE, 10, timedelta(hours=6), recovery=5)


@pytest.fixture
def proposed(database: Database, settings_environment: Callable[..., None]) -> int:
    settings_environment(database)
    now = datetime.now(UTC)
    with psycopg.connect(database.dsn) as connection:
        samples.record(connection, [Sample("mean", now, 20.0)])
        episodes.evaluate(connection, [Watch(RULE, Capability.PARALLEL_SYNC, Mode.PROPOSE)], now)
        [episode] = episodes.listing(connection)
    assert episode.state is EpisodeState.PROPOSED
    return episode.id


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "scaling", *arguments], env=dict(os.environ), capture_output=True, text=True, check=False
    )


def stored(database: Database, number: int) -> episodes.Episode:
    with psycopg.connect(database.dsn) as connection:
        return episodes.get(connection, number)


def test_an_episode_is_approved_once_with_the_name_of_whoever_did_it(database: Database, proposed: int) -> None:
    said = command("approve", str(proposed), "--by", "Ada")
    assert said.returncode == 0, said.stderr
    approved = stored(database, proposed)
    assert (approved.state, approved.approved_by) == (EpisodeState.APPROVED, "Ada")
    again = command("approve", str(proposed), "--by", "Bob")
    assert again.returncode == 0
    assert "approved already, by Ada" in again.stdout
    assert stored(database, proposed) == approved


def test_an_acknowledged_episode_still_waits_for_approval(database: Database, proposed: int) -> None:
    assert command("acknowledge", str(proposed), "--by", "Ada").returncode == 0
    after = stored(database, proposed)
    assert (after.state, after.acknowledged_by) == (EpisodeState.PROPOSED, "Ada")


def test_an_unknown_episode_is_a_sentence_that_names_those_there_are(database: Database, proposed: int) -> None:
    said = command("approve", str(proposed + 1), "--by", "Ada")
    assert said.returncode == 2
    assert said.stderr.startswith(f"error: there is no episode {proposed + 1}")
    assert f"{proposed} (slow, proposed)" in said.stderr
