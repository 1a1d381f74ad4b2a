"""Rate limits: sliding one-minute windows per project and per user, and a daily cap, on the virtual clock."""

from collections import deque

from devstack.google_calendar import errors
from devstack.google_calendar.settings import Settings
from devstack.google_calendar.state import DAY

# guides/quota: "events.patch costs 3 units"; every other method costs one.
_UNITS = {"events.patch": 3}


class Quotas:
    """Admits calls as long as the limits of `settings` allow."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._project: deque[float] = deque()
        self._users: dict[str, deque[float]] = {}
        self._day = 0
        self._today = 0

    def admit(self, user: str, method: str, now: float) -> None:
        """Count a call, or refuse it without counting it.

        Args:
            user: whom to charge: the e-mail address, or quotaUser if the client sent one.
            method: API method, which decides the cost.
            now: virtual seconds.

        Raises:
            ApiError: 403 or 429 of domain usageLimits.
        """
        settings = self._settings
        window = self._users.get(user)
        if window is None:
            window = self._users[user] = deque()
        _slide(window, now)
        _slide(self._project, now)
        if int(now // DAY) != self._day:
            self._day, self._today = int(now // DAY), 0
        if settings.quota_user_per_minute and len(window) >= settings.quota_user_per_minute:
            raise self._refusal("userRateLimitExceeded")
        if settings.quota_project_per_minute and len(self._project) >= settings.quota_project_per_minute:
            raise self._refusal("rateLimitExceeded")
        if settings.quota_project_per_day and self._today >= settings.quota_project_per_day:
            raise errors.limit_exceeded("dailyLimitExceeded", 403)
        units = _UNITS.get(method, 1)
        self._today += units
        for _ in range(units):
            window.append(now)
            self._project.append(now)

    def _refusal(self, reason: str) -> errors.ApiError:
        settings = self._settings
        if settings.quota_status == 429:
            reason = "rateLimitExceeded"
        return errors.limit_exceeded(reason, settings.quota_status, settings.retry_after or None)


def _slide(window: deque[float], now: float) -> None:
    if window and window[-1] > now:  # the clock was set back
        window.clear()
    while window and window[0] <= now - 60:
        window.popleft()
