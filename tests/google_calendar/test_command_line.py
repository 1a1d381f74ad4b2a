"""`python -m devstack.google_calendar`: the JSON line, the default world, life and death of the process."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from devstack.google_calendar import Simulator, run_simulator

COMMAND = [sys.executable, "-m", "devstack.google_calendar"]


@pytest.fixture
def standalone() -> Iterator[tuple[subprocess.Popen[bytes], dict[str, Any]]]:
    """The simulator as a stranger starts it, and the line it prints."""
    process = subprocess.Popen([*COMMAND, "--port", "0", "--seed", "1"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    yield process, json.loads(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()


def test_it_prints_one_json_line_and_serves_until_sigterm(
    standalone: tuple[subprocess.Popen[bytes], dict[str, Any]],
) -> None:
    process, described = standalone
    assert set(described) == {"url", "token_url", "users"}
    user = described["users"][0]
    assert {"email", "access_token", "refresh_token", "calendars"} <= set(user)
    for calendar in user["calendars"]:
        answer = httpx.get(
            f"{described['url']}/calendar/v3/calendars/{calendar.replace('#', '%23')}/events",
            headers={"Authorization": f"Bearer {user['access_token']}"},
        )
        assert answer.status_code == 200
        assert answer.json()["items"]
    form = {"grant_type": "refresh_token", "refresh_token": user["refresh_token"]}
    assert httpx.post(described["token_url"], data=form).status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) in (0, -signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.read() == b""


def test_the_same_seed_makes_the_same_world_and_another_seed_another() -> None:
    def contents(simulator: Simulator) -> list[dict[str, Any]]:
        return [simulator.truth(calendar).events for user in simulator.users for calendar in user.calendars]

    with run_simulator(seed=5, users=2, events=30) as simulator:
        first = contents(simulator)
        simulator.reset()
        assert contents(simulator) == first
        simulator.reset(seed=6)
        assert contents(simulator) != first


def test_the_demo_world_has_one_of_everything_that_goes_wrong(simulator_process: Simulator) -> None:
    simulator = simulator_process
    simulator.reset(profile="demo", settings={"quota_user_per_minute": 0})
    calendars = simulator.calendars()
    assert len(simulator.users) == 60
    assert len(calendars) == 90
    notes = {note: calendar for user in simulator.users for calendar, note in user.calendar_notes.items()}
    assert [user.note for user in simulator.users if user.note] == ["revoked_grant"]
    large = simulator.truth(notes["large"])
    assert (len(large.events), large.cancelled_instances) == (10_000, {})
    total = sum(calendar.events for calendar in calendars)
    assert 15_000 <= total - 10_000 <= 20_000
    nasty = simulator.truth(notes["nasty_values"]).events.values()
    assert any("\u0000" in event.get("summary", "") for event in nasty)
    assert any("\ud83d" in event.get("summary", "") for event in nasty)
    revoked = next(user for user in simulator.users if user.note)
    form = {"grant_type": "refresh_token", "refresh_token": revoked.refresh_token}
    assert httpx.post(simulator.token_url, data=form).json()["error"] == "invalid_grant"


def test_it_dies_with_its_parent() -> None:
    script = (
        "import sys; from devstack.google_calendar import run_simulator\n"
        "with run_simulator(events=0) as s: print(s.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    simulator = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    simulator.wait(10)
    assert not simulator.is_running()


def test_a_taken_port_is_one_clear_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        answer = subprocess.run([*COMMAND, "--port", str(port)], capture_output=True, text=True)
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr == f"Cannot listen on 127.0.0.1:{port}: Address already in use.\n"


def test_help_teaches_how_to_point_a_client_at_it() -> None:
    answer = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True)
    assert "api_endpoint" in answer.stdout
    assert "--quota-user-per-minute" in answer.stdout


def test_wrong_options_are_refused_before_anything_starts() -> None:
    answer = subprocess.run([*COMMAND, "--clock", "2026-06-01T00:00:00"], capture_output=True, text=True)
    assert answer.returncode == 2
    assert "needs a time zone offset" in answer.stderr


def test_a_simulator_that_cannot_start_raises() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(RuntimeError, match="did not start"),
        run_simulator(port=taken.getsockname()[1]),
    ):
        pass
