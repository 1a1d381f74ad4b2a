"""The virtual clock: every time stamp, expiry and quota window of the simulator is read from it.

It either runs with the machine's clock at an offset or stands still until a test moves it.
"""

import time
from datetime import UTC, datetime


class VirtualClock:
    """A clock that can be set, advanced and frozen."""

    def __init__(self, start: datetime | None = None, *, frozen: bool = False) -> None:
        """Start at `start` (aware; default now), running unless `frozen`."""
        begin = start.timestamp() if start else time.time()
        self._offset = begin - time.time()
        self._frozen_at: float | None = begin if frozen else None

    def now(self) -> float:
        """Return the virtual time in seconds since the Unix epoch."""
        return time.time() + self._offset if self._frozen_at is None else self._frozen_at

    @property
    def frozen(self) -> bool:
        """Whether the clock stands still."""
        return self._frozen_at is not None

    def set(self, moment: float) -> None:
        """Jump to `moment` (seconds since the epoch), running or frozen as before."""
        if self._frozen_at is None:
            self._offset = moment - time.time()
        else:
            self._frozen_at = moment

    def advance(self, seconds: float) -> None:
        """Jump by `seconds`."""
        self.set(self.now() + seconds)

    def freeze(self) -> None:
        """Stop at the present virtual time."""
        self._frozen_at = self.now()

    def run(self) -> None:
        """Run on from the present virtual time."""
        self._offset = self.now() - time.time()
        self._frozen_at = None


def stamp(moment: float) -> str:
    """Render seconds since the epoch as Google renders `updated`: RFC 3339, UTC, milliseconds."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
