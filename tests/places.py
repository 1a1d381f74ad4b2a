"""Where a session of tests keeps its servers and temporary files: in memory, if there is plenty.

A new database costs a tenth there of what it costs on a disk, and most tests have one of their own.
"""

import contextlib
import os
import shutil
from pathlib import Path

import psutil

from devstack.processes import VAR

MEMORY = Path("/dev/shm")
VARIABLE = "TESTS_DIRECTORY"
"""Names another place; workers of a session inherit from it what its controller chose."""
ENOUGH_BYTES = 6 * 2**30
"""The shared servers take 0.1 GB; some tests start their own beside them, and a write-ahead log may grow to 4 GB."""


def directory() -> Path:
    """Choose the place, once for a session and all processes it starts."""
    if VARIABLE not in os.environ:
        in_memory = MEMORY / f"pipeline-tests-{os.getuid()}"
        os.environ[VARIABLE] = str(in_memory if _is_usable(in_memory) else VAR / "test")
    return Path(os.environ[VARIABLE])


def _is_usable(place: Path) -> bool:
    """Whether there is room, and the directory is our own: everybody may write beside it."""
    try:
        room = min(shutil.disk_usage(place.parent).free, psutil.virtual_memory().available)
        if room < ENOUGH_BYTES:
            return False
        place.mkdir(mode=0o700, exist_ok=True)
        return place.lstat().st_uid == os.getuid() and not place.is_symlink()
    except OSError:
        return False


def of_session(controller: int) -> Path:
    """The directory of one session, by the process id of its controller."""
    return directory() / str(controller)


def of_servers(controller: int) -> Path:
    """Where the servers of a session are, apart from all else: who starts and stops them kills whatever lies below."""
    return of_session(controller) / "servers"


def of_temporary_files(controller: int) -> Path:
    """Where the temporary files of a session are."""
    return of_session(controller) / "temporary"


def remove_what_the_dead_left() -> None:
    """Remove the directories of sessions that were killed before they could."""
    for left in directory().glob("[0-9]*"):
        owner = left.name.partition("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            with contextlib.suppress(OSError):  # another session removes it
                shutil.rmtree(left)
