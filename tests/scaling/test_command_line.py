"""The decisions of people without the UI, through the command itself."""

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from devstack.servers import Database
from scaling import episodes, samples
from scaling.capabilities import Capability, Mode
from scaling.catalogue import catalogue
from scaling.episodes import EpisodeState, Watch
from scaling.samples import Sample
from scaling.settings import ArchiveSourceSettings, SyncScheduleSettings, load
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


@pytest.fixture
def growing(database: Database, settings_environment: Callable[..., None]) -> Database:
    """Users that have grown past their threshold, tenants that will, and a source without credentials."""
    settings_environment(database, COLUMNS="200")
    now = datetime.now(UTC)
    with psycopg.connect(database.dsn) as connection:
        users = [Sample("users_total", now - timedelta(days=n), 1003.0 - n) for n in range(6, -1, -1)]
        tenants = [Sample("google_tenants", now - timedelta(days=n), 29.0 - n / 2) for n in range(20, -1, -1)]
        samples.record(connection, [*users, *tenants])
        watches = catalogue(load(ArchiveSourceSettings), load(SyncScheduleSettings)).watches(
            dict.fromkeys(Capability, Mode.PROPOSE)
        )
        episodes.evaluate(connection, watches, now)
    return database


def test_status_shows_what_is_crossed_first_and_when_the_next_one_will_be(growing: Database) -> None:
    said = command("status")
    assert said.returncode == 0, said.stderr
    users, tenants = (next(line for line in said.stdout.splitlines() if name in line) for name in ("users", "tenants"))
    assert said.stdout.index(users) < said.stdout.index(tenants)
    assert "1,003" in users
    assert "> 1,000" in users
    assert "crossed" in users
    assert "fired, episode 1 observed" in users
    assert str(datetime.now(UTC).year) in tenants or str(datetime.now(UTC).year + 1) in tenants
    assert "not measured yet (python -m scaling measure): audit_logs_bytes" in said.stdout
    assert "python -m scaling explain users_total says what to do" in said.stdout


def test_explain_tells_the_rule_the_figures_and_what_to_do(growing: Database) -> None:
    said = command("explain", "users_total")
    assert said.returncode == 0, said.stderr
    assert "Fires when 2 of 3 samples in a row are > 1,000. Recovers at 900 or less" in said.stdout
    assert "What to do: Plan, do not build yet" in said.stdout
    assert "Runbook: docs/operations.md#users_total" in said.stdout
    assert "SELECT coalesce(sum(users), 0)" in said.stdout


def test_replay_tells_what_another_threshold_would_have_done_and_changes_nothing(growing: Database) -> None:
    as_it_is = command("replay", "users_total")
    assert "fires: episode 1 at 1,002" in as_it_is.stdout
    earlier = command("replay", "users_total", "--threshold", "998", "--recovery", "900")
    assert "fires: episode 1 at 1,000" in earlier.stdout
    never = command("replay", "users_total", "--threshold", "5000")
    assert "7 samples, 0 events; at the end it is ok" in never.stdout
    with psycopg.connect(growing.dsn) as connection:
        assert len(episodes.listing(connection)) == 1
    wrong = command("replay", "users_total", "--threshold", "800")
    assert (wrong.returncode, "recovery must not itself be > 800" in wrong.stderr) == (2, True)


def test_a_metric_that_there_is_not_is_refused_with_those_there_are(growing: Database) -> None:
    for arguments in (["explain", "nothing"], ["replay", "nothing"], ["measure", "nothing"]):
        said = command(*arguments)
        assert said.returncode == 2
        assert said.stderr.startswith("error: there is no metric 'nothing'; known: audit_logs_bytes, ")


def test_measure_takes_the_figures_that_are_due_and_says_what_they_led_to(growing: Database) -> None:
    with psycopg.connect(growing.admin_dsn, autocommit=True) as connection:
        connection.execute("INSERT INTO tenants (id, name) SELECT gen_random_uuid(), 'T' FROM generate_series(1, 30)")
        connection.execute(
            "INSERT INTO users (tenant_id, email, google_api_enabled)"
            " SELECT id, id || '@example.com', true FROM tenants"
        )
    said = command("measure", "google_tenants")
    assert said.returncode == 0, said.stderr
    assert "1 figures taken" in said.stdout
    again = command("measure", "google_tenants")
    assert "google_tenants fires: episode 1 at 30" in again.stdout
    everything = command("measure")
    assert everything.returncode == 0, everything.stderr
    assert "not_configured: set" in everything.stdout


def test_a_capability_is_switched_by_name_with_who_and_why(growing: Database) -> None:
    os.environ["SCALING_PARALLEL_SYNC"] = "propose"
    try:
        said = command("switch", "parallel_sync", "on", "--by", "Ada", "--reason", "rehearsal")
        assert said.stdout == "parallel_sync is switched on, from the next run on.\n"
        table = command("capabilities").stdout
        os.environ["SCALING_PARALLEL_SYNC"] = "off"
        held = command("switch", "parallel_sync", "on", "--by", "Ada", "--reason", "rehearsal")
    finally:
        del os.environ["SCALING_PARALLEL_SYNC"]
    row = next(line for line in table.splitlines() if "parallel_sync" in line)
    assert [word for word in ("propose", "yes", "Ada", "rehearsal") if word in row] == [
        "propose",
        "yes",
        "Ada",
        "rehearsal",
    ]
    assert "was on already. SCALING_PARALLEL_SYNC is off, so it is not in force anyway." in held.stdout


def test_a_rule_that_waits_for_a_person_is_re_armed_by_name(growing: Database) -> None:
    said = command("rearm", "users_total", "--by", "Ada")
    assert (said.returncode, "users_total is armed again by Ada" in said.stdout) == (0, True)
    again = command("rearm", "users_total", "--by", "Ada")
    assert (again.returncode, "armed already" in again.stderr) == (2, True)


def test_check_reads_the_settings_file_of_the_thresholds(
    database: Database, settings_environment: Callable[..., None], tmp_path: Path
) -> None:
    path = tmp_path / "thresholds.toml"
    path.write_text("[users_totl]\nthreshold = 1\n")
    settings_environment(database, SCALING_CATALOGUE_FILE=str(path))
    said = command("check")
    assert said.returncode == 1
    assert "names the metric 'users_totl'" in said.stdout
