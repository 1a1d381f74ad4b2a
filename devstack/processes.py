"""Child processes that never outlive their owner.

Belongs here: starting, watching and stopping the servers of one directory; the watchdog that stops
them when the owner is killed; the lock that keeps a second owner out; free ports.
Does not: what any particular server needs (postgres.py, s3.py, stack.py).

Every child inherits the environment variable `DEVSTACK_DIRECTORY`, and so do the processes it starts
(Dagster's code servers and run workers). Whoever cleans up finds them all by it, parent or not, and
`DEVSTACK_STOP_SIGNAL` says how each wants to be stopped.
"""

import argparse
import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType

import psutil

from scaling.errors import UserError, run_command

CHECKOUT = Path(__file__).resolve().parent.parent
VAR = CHECKOUT / "var"
MARKER = "DEVSTACK_DIRECTORY"
STOP_SIGNAL = "DEVSTACK_STOP_SIGNAL"
STOP_TIMEOUT_SECONDS = 10.0
LEFTOVER_TIMEOUT_SECONDS = 30.0
POLL_SECONDS = 0.05
TERMINATING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class ProcessFailedError(UserError):
    """A server did not start or died; the sentence names it and its log file."""


def free_port(preferred: int | None = None) -> int:
    """Find a TCP port of 127.0.0.1 that nobody listens on.

    Args:
        preferred: taken if it is free.

    Returns:
        The port. Another process may take it before the caller binds it: retry with another.
    """
    for candidate in (preferred or 0, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", candidate))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise UserError("No TCP port of 127.0.0.1 is free; stop some servers and try again.")


def free_ports(names: Sequence[str]) -> dict[str, int]:
    """Find distinct free TCP ports of 127.0.0.1, one per name.

    Args:
        names: what the ports are for.

    Returns:
        Name to port.
    """
    probes = [socket.socket() for _ in names]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return {name: int(probe.getsockname()[1]) for name, probe in zip(names, probes, strict=True)}
    finally:
        for probe in probes:
            probe.close()


def wait_until(condition: Callable[[], bool], *, timeout_seconds: float, what: str) -> None:
    """Wait for a condition.

    Args:
        condition: asked every 50 ms.
        timeout_seconds: how long at most.
        what: names the condition in the error, as in "the S3 server answers".

    Raises:
        UserError: the time is up.
    """
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise UserError(f"Waited {timeout_seconds:.0f} seconds in vain until {what}.")
        time.sleep(POLL_SECONDS)


def processes_of(directory: Path) -> list[psutil.Process]:
    """Find every process that belongs to the stack of a directory, or to one below it.

    Args:
        directory: of a `Supervisor`, or a parent of such directories.

    Returns:
        The live processes, children of children included, without this one and its ancestors.
    """
    marked = directory.resolve()
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        try:
            marker = process.environ().get(MARKER)
        except (psutil.Error, OSError):  # gone meanwhile, a kernel thread, or another user's process
            continue
        if marker and process.pid not in own and Path(marker).is_relative_to(marked):
            found.append(process)
    return found


def kill_all(find: Callable[[], Iterable[psutil.Process]], *, grace_seconds: float) -> int:
    """Stop processes by the signal each wants, kill those that stay, and look again until none is left.

    Args:
        find: finds the processes; called again because a dying process may start another.
        grace_seconds: between that signal and SIGKILL.

    Returns:
        How many processes were found.
    """
    seen: set[psutil.Process] = set()
    deadline = time.monotonic() + grace_seconds
    while left := list(find()):
        expired = time.monotonic() > deadline
        for process in left:
            if expired or process not in seen:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL if expired else _stop_signal(process))
        seen.update(left)
        psutil.wait_procs(left, timeout=0.2)
    return len(seen)


def _stop_signal(process: psutil.Process) -> int:
    try:
        return int(process.environ().get(STOP_SIGNAL, signal.SIGTERM))
    except (psutil.AccessDenied, OSError):
        return signal.SIGTERM


@dataclass(slots=True)
class Child:
    """One supervised process."""

    name: str
    log: Path
    stop_signal: signal.Signals
    process: "subprocess.Popen[bytes]"
    litter: tuple[Path, ...]

    def failure(self) -> str:
        """Say in one sentence that the process ended, with the end of its log."""
        tail = self.log.read_text(errors="replace").strip().splitlines()[-5:]
        said = f" Its last words: {' | '.join(tail)}" if tail else ""
        return f"{self.name} ended with exit code {self.process.returncode}; see {self.log}.{said}"


@dataclass(slots=True)
class Supervisor:
    """Owner of all processes of one directory: a context manager that leaves none behind.

    Entering takes the directory's lock, kills what an earlier owner left, and starts the watchdog.
    Leaving stops the children in reverse order and then everything else that carries the marker.
    SIGTERM and SIGHUP become `SystemExit`, so that the same path runs; after a SIGKILL of the owner
    the watchdog does it, and keeps the lock until it is done.
    """

    directory: Path
    _children: list[Child] = field(default_factory=list)
    _lock: int = -1
    _watchdog: "subprocess.Popen[bytes] | None" = None
    _handlers: dict[signal.Signals, object] = field(default_factory=dict)

    def __enter__(self) -> "Supervisor":
        self.directory = self.directory.resolve()
        (self.directory / "log").mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(self.directory / "lock")
        kill_all(lambda: processes_of(self.directory), grace_seconds=STOP_TIMEOUT_SECONDS)
        # Its own session: Ctrl-C in the terminal must not reach it.
        self._watchdog = subprocess.Popen(
            [sys.executable, "-m", "devstack.processes", "watch", str(self.directory)],
            cwd=CHECKOUT,
            env={name: value for name, value in os.environ.items() if name != MARKER},
            stdin=subprocess.PIPE,
            pass_fds=[self._lock],
            start_new_session=True,
        )
        for number in TERMINATING_SIGNALS:
            try:
                self._handlers[number] = signal.signal(number, _exit)
            except ValueError:  # not the main thread: the owner's signals are somebody else's
                break
        return self

    def start(
        self,
        name: str,
        arguments: Sequence[str | Path],
        *,
        environment: Mapping[str, str],
        working_directory: Path,
        ready: Callable[[], bool],
        ready_timeout_seconds: float = 60.0,
        stop_signal: signal.Signals = signal.SIGTERM,
        output: Path | None = None,
        litter: Sequence[Path] = (),
    ) -> Child:
        """Start a process and wait until it is ready.

        Args:
            name: names the process in messages and its log file (`log/<name>.log`).
            arguments: program and arguments.
            environment: its whole environment; the marker is added.
            working_directory: where it runs.
            ready: true once it serves.
            ready_timeout_seconds: how long that may take.
            stop_signal: asks it to stop; it is killed 10 seconds later.
            output: a fresh, private file for its standard output, which otherwise goes to the log.
            litter: files that it leaves behind; removed when it has stopped.

        Returns:
            The running process.

        Raises:
            ProcessFailedError: it ended, or was not ready in time; it is stopped then.
        """
        log = self.directory / "log" / f"{name}.log"
        with contextlib.ExitStack() as files:
            messages = files.enter_context(log.open("ab"))
            if output is not None:
                output.unlink(missing_ok=True)
                output.touch(mode=0o600)
            process = subprocess.Popen(
                [str(argument) for argument in arguments],
                cwd=working_directory,
                env={**environment, MARKER: str(self.directory), STOP_SIGNAL: str(int(stop_signal))},
                stdin=subprocess.DEVNULL,
                stdout=messages if output is None else files.enter_context(output.open("wb")),
                stderr=messages,
                start_new_session=True,
            )
        child = Child(name, log, stop_signal, process, tuple(litter))
        self._children.append(child)
        deadline = time.monotonic() + ready_timeout_seconds
        while not ready():
            if process.poll() is not None:
                self.stop(child)
                raise ProcessFailedError(child.failure())
            if time.monotonic() > deadline:
                self.stop(child)
                raise ProcessFailedError(f"{name} was not ready after {ready_timeout_seconds:.0f} seconds; see {log}.")
            time.sleep(POLL_SECONDS)
        return child

    def stop(self, child: Child) -> None:
        """Stop one process: its stop signal, then SIGKILL after 10 seconds.

        Args:
            child: what `start` returned; one that has ended already is fine.
        """
        if child in self._children:
            self._children.remove(child)
        if child.process.poll() is None:
            child.process.send_signal(child.stop_signal)
            try:
                child.process.wait(STOP_TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        for path in child.litter:
            path.unlink(missing_ok=True)

    def wait(self) -> None:
        """Wait until a child ends or a signal arrives.

        Raises:
            ProcessFailedError: a child ended.
            KeyboardInterrupt: Ctrl-C.
            SystemExit: SIGTERM or SIGHUP.
        """
        while True:
            self.check()
            time.sleep(0.5)

    def check(self) -> None:
        """Make sure that every child is alive.

        Raises:
            ProcessFailedError: one is not.
        """
        for child in self._children:
            if child.process.poll() is not None:
                raise ProcessFailedError(child.failure())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        impatient = self._ignore_signals()
        while self._children:
            self.stop(self._children[-1])
        kill_all(lambda: processes_of(self.directory), grace_seconds=STOP_TIMEOUT_SECONDS)
        if self._watchdog is not None and self._watchdog.stdin is not None:
            self._watchdog.stdin.close()
            self._watchdog.wait()
        os.close(self._lock)
        for number, handler in {**impatient, **self._handlers}.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned

    def _ignore_signals(self) -> dict[signal.Signals, object]:
        """A second Ctrl-C must not leave the stop half done; each stop is bounded."""
        if not self._handlers:
            return {}
        for number in TERMINATING_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        return {signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)}


def _exit(number: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + number)


def _take_lock(path: Path) -> int:
    """Lock a file for the life of the descriptor; waits while a dead owner's watchdog still cleans up."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + LEFTOVER_TIMEOUT_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 20, 0).decode().strip()
            if time.monotonic() > deadline or (owner and psutil.pid_exists(int(owner))):
                os.close(descriptor)
                raise UserError(
                    f"The stack in {path.parent} already runs (process {owner or 'unknown'}); stop that one first."
                ) from None
            time.sleep(POLL_SECONDS)
        else:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            return descriptor


def watch(directory: Path) -> None:
    """Wait until the owner is gone, however it went, and kill what it left behind.

    Args:
        directory: of the `Supervisor`; standard input is the pipe that ends with it.
    """
    for number in (signal.SIGINT, *TERMINATING_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    kill_all(lambda: processes_of(directory), grace_seconds=STOP_TIMEOUT_SECONDS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: `watch DIRECTORY` is the watchdog, `clean` stops every stack of this checkout.

    Args:
        arguments: without the program's name; None takes them from the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m devstack.processes", description="Processes of the stacks.")
    commands = parser.add_subparsers(dest="command", required=True)
    watchdog = commands.add_parser("watch", help="stop a stack's processes when standard input ends")
    watchdog.add_argument("directory", type=Path)
    commands.add_parser("clean", help="stop every process of this checkout's stacks")
    options = parser.parse_args(arguments)
    if options.command == "watch":
        watch(options.directory)
    else:
        count = kill_all(lambda: processes_of(VAR), grace_seconds=STOP_TIMEOUT_SECONDS)
        if count:
            sys.stdout.write(f"Stopped {count} processes.\n")
    return 0


if __name__ == "__main__":
    run_command(main)
