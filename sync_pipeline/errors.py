"""Everything that can go wrong while syncing, by what must be done about it.

Belongs here: the error types; what each decides (retry now, later, never); the short names stored in Postgres.
Does not: recognising them in Google's answers (`sync_pipeline.google_calendar`) or acting on them.

An error's text is safe to log and to store: a fixed sentence and at most Google's own reason code.
Sources: https://developers.google.com/workspace/calendar/api/guides/errors and
https://developers.google.com/identity/protocols/oauth2.
"""

from typing import ClassVar

PARK_SECONDS = 3600.0
HUMAN_BACKOFF_SECONDS = 6 * 3600.0


class SyncError(Exception):
    """One calendar, or one connection, could not be synced this time."""

    kind: ClassVar[str]
    """Short name, stored as last_error."""
    retried_at_once: ClassVar[bool] = False
    """Another try within the same run may help."""
    stops_connection: ClassVar[bool] = False
    """No other calendar of the connection is tried in this run."""
    backoff_seconds: ClassVar[float | None] = None
    """How long to wait before the next run tries; None doubles from the poll interval."""


class TransientError(SyncError):
    """A 5xx, a broken connection, a timeout, or a body that is not the JSON it should be."""

    kind = "transient"
    retried_at_once = True


class RateLimitedError(SyncError):
    """Google asks for fewer calls per minute (403 rateLimitExceeded, userRateLimitExceeded, 429)."""

    kind = "rate_limited"
    stops_connection = True

    def __init__(self, message: str, *, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class QuotaExceededError(SyncError):
    """A long quota is used up (403 quotaExceeded, dailyLimitExceeded); trying again soon makes it worse."""

    kind = "quota_exceeded"
    stops_connection = True
    backoff_seconds = PARK_SECONDS


class ThrottledError(SyncError):
    """This installation's own quota keeping says wait; Google was not asked, so nothing failed."""

    kind = "throttled"

    def __init__(self, message: str, *, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class DailyBudgetError(ThrottledError):
    """SYNC_CALLS_PER_DAY is used up; every tenant waits until midnight, Pacific time."""

    kind = "daily_budget"


class AccessTokenRefusedError(SyncError):
    """A 401 right after the access token was refreshed."""

    kind = "access_token_refused"
    stops_connection = True


class GrantRefusedError(SyncError):
    """The stored grant is worthless: revoked, expired, or not readable; its owner has to connect again."""

    kind = "reauth_required"
    stops_connection = True


class ClientRefusedError(SyncError):
    """Google does not accept this installation's OAuth client; no tenant can help that."""

    kind = "client_refused"
    stops_connection = True
    backoff_seconds = PARK_SECONDS


class AccessDeniedError(SyncError):
    """The grant works but does not cover this (403 forbidden, insufficientPermissions, accessNotConfigured…)."""

    kind = "access_denied"
    backoff_seconds = HUMAN_BACKOFF_SECONDS


class PushUnsupportedError(SyncError):
    """400 pushNotSupportedForRequestedResource: Google sends no notifications for this calendar; it is polled."""

    kind = "push_unsupported"


class NotFoundError(SyncError):
    """404: the calendar is gone or not visible; only the calendar list tells which."""

    kind = "not_found"


class SyncTokenGoneError(SyncError):
    """410, or 400 "Invalid sync token value.": the token covers nothing any more."""

    kind = "gone"


class PageTokenRefusedError(SyncError):
    """400 on a request with a page token: the listing has to start again."""

    kind = "page_token_refused"


class BadRequestError(SyncError):
    """Another 400, which is a mistake of this program."""

    kind = "bad_request"
    backoff_seconds = HUMAN_BACKOFF_SECONDS


class ProtocolError(SyncError):
    """Google broke its own rules, for example a last page without a sync token."""

    kind = "protocol"


class LeaseLostError(SyncError):
    """Another worker holds the calendar now; nothing more may be written."""

    kind = "lease_lost"


class InternalError(SyncError):
    """Something nobody foresaw; only its type is told, because its text may hold personal data."""

    kind = "internal"
