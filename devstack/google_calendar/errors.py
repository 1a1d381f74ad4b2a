"""The documented error bodies of the Calendar API, one constructor for each.

Bodies follow https://developers.google.com/workspace/calendar/api/guides/errors and the answers quoted in public issue
threads. When an error is due is decided by the modules that raise it.
"""

from devstack.google_calendar.resource import Resource, dumps


class ApiError(Exception):
    """An answer of the API that is not a success; carries everything its body needs."""

    def __init__(
        self,
        status: int,
        reason: str,
        message: str,
        *,
        domain: str = "global",
        location_type: str | None = None,
        location: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.domain = domain
        self.location_type = location_type
        self.location = location
        self.retry_after = retry_after

    def body(self) -> bytes:
        """Return the JSON body Google sends with this error."""
        detail: Resource = {"domain": self.domain, "reason": self.reason, "message": self.message}
        if self.location_type:
            detail |= {"locationType": self.location_type, "location": self.location}
        return dumps({"error": {"errors": [detail], "code": self.status, "message": self.message}})


def bad_request(message: str) -> ApiError:
    """400 for a request no retry can mend."""
    return ApiError(400, "badRequest", message)


def parse_error() -> ApiError:
    """400 for a body that is not a JSON object."""
    return ApiError(400, "parseError", "Parse Error")


def invalid(message: str, parameter: str | None = None) -> ApiError:
    """400 for a field or, when `parameter` is named, a query parameter with an unusable value."""
    return ApiError(400, "invalid", message, location_type="parameter" if parameter else None, location=parameter)


def invalid_parameter(name: str, value: str, expected: str) -> ApiError:
    """400 for a query parameter of the wrong type."""
    return ApiError(
        400,
        "invalidParameter",
        f"Invalid {expected} value: '{value}'.",
        location_type="parameter",
        location=name,
    )


def required(message: str, parameter: str | None = None) -> ApiError:
    """400 for a field or query parameter that must be present."""
    return ApiError(400, "required", message, location_type="parameter" if parameter else None, location=parameter)


def sync_token_restrictions() -> ApiError:
    """400 for a parameter that must not accompany a sync token."""
    return ApiError(
        400,
        "syncTokenWithRequestRestrictions",
        "Sync token cannot be used with other request restrictions.",
        domain="calendar",
        location_type="parameter",
        location="syncToken",
    )


def invalid_sync_token() -> ApiError:
    """400 for a sync token this server never issued for this collection."""
    return invalid("Invalid sync token value.", "syncToken")


def invalid_page_token() -> ApiError:
    """400 for a page token that is malformed, expired or belongs to another query."""
    return invalid("Invalid page token value.", "pageToken")


def time_range_empty() -> ApiError:
    """400 for timeMin >= timeMax and for events that end before they start."""
    return ApiError(
        400,
        "timeRangeEmpty",
        "The specified time range is empty.",
        domain="calendar",
        location_type="parameter",
        location="timeMax",
    )


def full_sync_required() -> ApiError:
    """410 for a sync token that was invalidated: wipe and list again without a token."""
    return ApiError(
        410,
        "fullSyncRequired",
        "Sync token is no longer valid, a full sync is required.",
        domain="calendar",
        location_type="parameter",
        location="syncToken",
    )


def updated_min_too_long_ago() -> ApiError:
    """410 for an updatedMin beyond the horizon for which deletions are remembered."""
    return ApiError(
        410,
        "updatedMinTooLongAgo",
        "The requested minimum modification time lies too far in the past.",
        domain="calendar",
        location_type="parameter",
        location="updatedMin",
    )


def deleted() -> ApiError:
    """410 for a write on an event that is already deleted."""
    return ApiError(410, "deleted", "Resource has been deleted")


def not_found() -> ApiError:
    """404: the resource never existed, or the user may not know of it."""
    return ApiError(404, "notFound", "Not Found")


def duplicate() -> ApiError:
    """409 for an identifier that is taken."""
    return ApiError(409, "duplicate", "The requested identifier already exists.")


def condition_not_met() -> ApiError:
    """412 for an If-Match that does not match."""
    return ApiError(412, "conditionNotMet", "Precondition Failed", location_type="header", location="If-Match")


def login_required() -> ApiError:
    """401 for a request without credentials."""
    return ApiError(401, "required", "Login Required.", location_type="header", location="Authorization")


def invalid_credentials() -> ApiError:
    """401 for an unknown, expired or revoked access token."""
    return ApiError(401, "authError", "Invalid Credentials", location_type="header", location="Authorization")


def forbidden(reason: str = "forbidden", message: str = "Forbidden", domain: str = "global") -> ApiError:
    """403 that is not about rates."""
    return ApiError(403, reason, message, domain=domain)


def writer_access_required() -> ApiError:
    """403 for a write by a user who may only read."""
    return forbidden("requiredAccessLevel", "You need to have writer access to this calendar.", "calendar")


_LIMIT_MESSAGES = {
    "rateLimitExceeded": "Rate Limit Exceeded",
    "userRateLimitExceeded": "User Rate Limit Exceeded",
    "quotaExceeded": "Calendar usage limits exceeded.",
    "dailyLimitExceeded": "Daily Limit Exceeded",
}


def limit_exceeded(reason: str, status: int = 403, retry_after: int | None = None) -> ApiError:
    """403 or 429 of domain usageLimits; `reason` as documented, `retry_after` in seconds if the header is wanted."""
    message = _LIMIT_MESSAGES.get(reason, "Rate Limit Exceeded")
    return ApiError(status, reason, message, domain="usageLimits", retry_after=retry_after)


def backend_error(status: int = 500) -> ApiError:
    """5xx answers; all but 500 are worded as Google's front end words them."""
    messages = {500: "Backend Error", 502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout"}
    return ApiError(status, "backendError", messages.get(status, "Backend Error"))


def not_implemented(what: str) -> ApiError:
    """501 naming a method of the real API that this simulator does not have."""
    return ApiError(501, "notImplemented", f"The calendar simulator does not implement {what}.")
