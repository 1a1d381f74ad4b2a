"""When a calendar is looked at again.

Belongs here: intervals, jitter, backoff. Pure functions of the settings and the injected randomness.
Does not: due times themselves; the database adds these seconds to its own clock.
"""

from dataclasses import dataclass
from random import Random

from sync_pipeline.errors import RateLimitedError, SyncError

JITTER = 0.25
"""Google asks for 25 % so that a fleet does not call in step (guides/quota)."""
FIRST_BACKOFF_SECONDS = 60.0
LONGEST_BACKOFF_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Cadence:
    """Intervals in seconds."""

    poll_seconds: float
    list_seconds: float
    rng: Random

    def next_poll(self) -> float:
        """Seconds until a synced calendar is due again."""
        return self._jittered(self.poll_seconds)

    def next_list(self) -> float:
        """Seconds until a connection's list of calendars is read again."""
        return self._jittered(self.list_seconds)

    def after(self, error: SyncError, *, failures: int) -> float:
        """Seconds until the next try after a failure.

        Args:
            error: what happened; some kinds know how long waiting makes sense.
            failures: how many tries in a row failed before this one.
        """
        if isinstance(error, RateLimitedError) and error.retry_after_seconds is not None:
            return error.retry_after_seconds * (1 + JITTER * self.rng.random())
        if error.backoff_seconds is not None:
            return self._jittered(error.backoff_seconds)
        if failures == 0:
            return self.next_poll()
        return self._jittered(min(FIRST_BACKOFF_SECONDS * 2.0 ** min(failures, 20), LONGEST_BACKOFF_SECONDS))

    def _jittered(self, seconds: float) -> float:
        return seconds * self.rng.uniform(1 - JITTER, 1 + JITTER)
