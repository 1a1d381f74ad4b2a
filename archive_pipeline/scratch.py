"""Directories on local disk for one attempt each, gone with it however it ends.

Belongs here: making one, and removing those of processes that died: by a signal, or because a thread of a C++ library
could not get memory, which ends a process at once. Does not: what is put there.

A directory is locked (`flock`) as long as its attempt lives, and the kernel unlocks it when the process ends; so one
that can be locked belongs to nobody. It gets its name after its lock, so that nobody finds it without.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Others use the system's directory too, so the name must be this program's alone.
PREFIX = "archive-audit-log-"


@contextmanager
def scratch_directory(parent: Path | None) -> Iterator[Path]:
    """Lend a directory for one attempt; what dead attempts of this user left beside it is removed first.

    Args:
        parent: where it may be; None is the system's directory for temporary files.
    """
    root = Path(tempfile.gettempdir()) if parent is None else parent
    remove_abandoned(root)
    unnamed = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=root))
    lock = os.open(unnamed, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = unnamed.rename(root / unnamed.name.removeprefix("."))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)


def remove_abandoned(root: Path) -> int:
    """Remove the directories whose attempts have ended without doing so.

    Args:
        root: where attempts have their directories.

    Returns:
        How many there were.
    """
    removed = 0
    for path in root.glob(f"{PREFIX}*"):
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # gone already, or not a directory of ours
            continue
        try:
            if os.fstat(lock).st_uid == os.getuid():
                with suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
                    removed += 1
        finally:
            os.close(lock)
    return removed
