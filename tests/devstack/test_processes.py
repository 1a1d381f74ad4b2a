"""Whatever happens to the owner, nothing it started survives."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from devstack import processes
from devstack.processes import CHECKOUT, MARKER, ProcessFailedError, Supervisor, processes_of, wait_until
from devstack.servers import Servers
from scaling.errors import UserError
from tests import places

# A server that starts a helper in a session of its own, as Dagster starts run workers, and then says so.
SERVER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open("ready", "w").close()
time.sleep(600)
"""
OWNER = f"""
import os, sys
from pathlib import Path
from devstack.processes import Supervisor
directory = Path(sys.argv[1])
with Supervisor(directory) as supervisor:
    supervisor.start("server", [sys.executable, "-c", {SERVER!r}], environment={{}}, working_directory=directory,
                     ready=(directory / "ready").exists)
    (directory / "owner_ready").touch()
    supervisor.wait()
"""


def test_who_starts_the_shared_servers_ends_nothing_that_a_test_has_started(
    running_servers: Servers, tmp_path: Path
) -> None:
    shared = list(places.directory().glob("*/servers"))
    assert shared
    assert not [directory for directory in shared if tmp_path.is_relative_to(directory)]


@contextlib.contextmanager
def owner(directory: Path) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(directory)], cwd=CHECKOUT, stderr=subprocess.DEVNULL)
    try:
        wait_until((directory / "owner_ready").exists, timeout_seconds=30, what="the owner is ready")
        assert len(processes_of(directory)) == 2
        yield process
    finally:
        process.kill()
        process.wait()
        processes.kill_all(lambda: processes_of(directory), grace_seconds=0)


def start(supervisor: Supervisor, code: str, **options: object) -> processes.Child:
    return supervisor.start(
        "server",
        [sys.executable, "-c", code],
        environment={},
        working_directory=supervisor.directory,
        **{"ready": lambda: True, **options},  # type: ignore[arg-type]  # the options of start, by name
    )


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, -2)]
)
def test_nothing_outlives_its_owner_however_that_ends(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with owner(tmp_path) as process:
        process.send_signal(number)
        assert process.wait(20) == code
        wait_until(lambda: not processes_of(tmp_path), timeout_seconds=60, what="every process is gone")


def test_a_new_owner_waits_for_the_watchdog_of_a_killed_one_and_loses_nothing(tmp_path: Path) -> None:
    with owner(tmp_path) as process:
        process.kill()
        process.wait()
        with Supervisor(tmp_path) as supervisor:
            child = start(supervisor, "import time; time.sleep(600)")
            assert [each.pid for each in processes_of(tmp_path)] == [child.process.pid]


def test_no_new_owner_starts_while_the_watchdog_of_a_killed_one_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LEFTOVER_TIMEOUT_SECONDS", 0.3)
    with owner(tmp_path) as process:
        [watchdog] = [child for child in psutil.Process(process.pid).children() if "watch" in child.cmdline()]
        watchdog.suspend()
        try:
            process.kill()
            process.wait()
            with pytest.raises(UserError, match="already runs"):
                Supervisor(tmp_path).__enter__()
        finally:
            watchdog.resume()
        watchdog.wait(20)
        with Supervisor(tmp_path):
            assert processes_of(tmp_path) == []


def test_a_new_owner_clears_what_is_left_when_the_watchdog_was_killed_too(tmp_path: Path) -> None:
    with owner(tmp_path) as process:
        children = psutil.Process(process.pid).children()
        [watchdog] = [child for child in children if "watch" in child.cmdline()]
        watchdog.kill()
        process.kill()
        process.wait()
        assert len(processes_of(tmp_path)) == 2
        with Supervisor(tmp_path):
            assert processes_of(tmp_path) == []


def test_a_second_owner_is_refused_with_the_process_of_the_first(tmp_path: Path) -> None:
    with owner(tmp_path) as process, pytest.raises(UserError, match=rf"already runs \(process {process.pid}\)"):
        Supervisor(tmp_path).__enter__()


def test_stacks_in_different_directories_do_not_touch_each_other(tmp_path: Path) -> None:
    with owner(tmp_path / "one") as one:
        with owner(tmp_path / "two") as two:
            two.kill()
            two.wait()
            wait_until(lambda: not processes_of(tmp_path / "two"), timeout_seconds=60, what="the second is gone")
        assert one.poll() is None
        assert len(processes_of(tmp_path / "one")) == 2
        assert len(processes_of(tmp_path)) == 2


def test_clean_stops_every_stack_of_the_checkout_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "VAR", tmp_path / "var")
    with owner(tmp_path / "var" / "up") as ours, owner(tmp_path / "elsewhere") as other:
        assert processes.main(["clean"]) == 0
        assert processes_of(tmp_path / "var") == []
        assert capsys.readouterr().out == "Stopped 2 processes.\n"
        assert ours.wait(20) != 0, "its server is gone, so the owner ends with an error"
        assert other.poll() is None


def test_a_process_that_ends_at_once_is_reported_with_its_last_words(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor, pytest.raises(ProcessFailedError, match=r"exit code 3.*no such port"):
        start(supervisor, "import sys; print('no such port'); sys.exit(3)", ready=lambda: False)


def test_a_process_that_is_not_ready_in_time_is_stopped(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        with pytest.raises(ProcessFailedError, match="not ready after"):
            start(supervisor, "import time; time.sleep(600)", ready=lambda: False, ready_timeout_seconds=0.2)
        assert processes_of(tmp_path) == []


def test_a_process_that_dies_later_ends_the_wait(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        child = start(supervisor, "import time; time.sleep(600)")
        child.process.kill()
        with pytest.raises(ProcessFailedError, match="server ended with exit code -9"):
            supervisor.wait()


def test_a_process_that_ignores_its_stop_signal_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STOP_TIMEOUT_SECONDS", 0.2)
    ready = tmp_path / "ready"
    with Supervisor(tmp_path) as supervisor:
        child = start(
            supervisor,
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('ready', 'w'); time.sleep(600)",
            ready=ready.exists,
        )
    assert child.process.returncode == -9


def test_processes_stop_in_reverse_order_of_their_start(tmp_path: Path) -> None:
    code = """
import os, signal, sys, time
def stop(*_):
    with open("stopped", "a") as file: file.write(os.environ["NUMBER"])
    sys.exit()
signal.signal(signal.SIGTERM, stop); open("ready" + os.environ["NUMBER"], "w"); time.sleep(600)
"""
    with Supervisor(tmp_path) as supervisor:
        for number in "123":
            supervisor.start(
                f"server-{number}",
                [sys.executable, "-c", code],
                environment={"NUMBER": number},
                working_directory=tmp_path,
                ready=(tmp_path / f"ready{number}").exists,
            )
    assert (tmp_path / "stopped").read_text() == "321"


def test_the_output_file_is_fresh_and_private(tmp_path: Path) -> None:
    output = tmp_path / "said"
    output.write_text("old")
    with Supervisor(tmp_path) as supervisor:
        start(
            supervisor,
            "import time; print('new', flush=True); time.sleep(600)",
            output=output,
            ready=lambda: output.read_text() == "new\n",
        )
        assert output.stat().st_mode & 0o777 == 0o600


def test_the_marker_of_an_outer_stack_does_not_confuse_an_inner_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARKER, str(tmp_path))
    with Supervisor(tmp_path):
        assert processes_of(tmp_path) == []
    assert psutil.pid_exists(os.getpid())


def test_ports_picked_together_are_distinct() -> None:
    ports = processes.free_ports(["a", "b", "c", "d"])
    assert len(set(ports.values())) == 4


def test_a_preferred_port_is_taken_only_when_it_is_free() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert processes.free_port(port) != port
    assert processes.free_port(port) == port
