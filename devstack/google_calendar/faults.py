"""Scripted misbehaviour: which calls go wrong, how, and how often.

A rule names the calls it is for; every field left out matches everything. Rules that fire are applied by the server,
those that alter a page by `spoil` here.
"""

import random
from dataclasses import dataclass, field
from enum import StrEnum

from devstack.google_calendar import errors
from devstack.google_calendar.call import Call, ListPage
from devstack.google_calendar.cursors import page_number


class Kind(StrEnum):
    """How a call goes wrong."""

    LATENCY = "latency"  # wait `seconds`, then answer
    HANG = "hang"  # wait `seconds` (default 3600), then close the connection
    DROP = "drop"  # close the connection before a byte is sent
    DROP_BODY = "drop_body"  # close the connection in the middle of the body
    ERROR = "error"  # `status` 5xx (default 500)
    GONE = "gone"  # 410 fullSyncRequired
    UNAUTHORIZED = "unauthorized"  # 401 authError
    FORBIDDEN = "forbidden"  # 403 with `reason`
    RATE_LIMITED = "rate_limited"  # `status` 403 or 429 with `reason`, Retry-After if `retry_after`
    NOT_FOUND = "not_found"  # 404
    INVALID_GRANT = "invalid_grant"  # 400 of the token endpoint
    TRUNCATE = "truncate"  # a complete HTTP answer whose JSON breaks off
    HTML = "html"  # 200 with a HTML page
    EMPTY_PAGE = "empty_page"  # no items, and a nextPageToken that leads on
    NO_ITEMS = "no_items"  # the page without its items, its tokens as they are
    NO_SYNC_TOKEN = "no_sync_token"  # noqa: S105 - the last page without its token
    BOTH_TOKENS = "both_tokens"  # a page with nextPageToken and a nextSyncToken that must not be trusted
    REPEAT_PAGE_TOKEN = "repeat_page_token"  # noqa: S105 - the token just used comes again
    DUPLICATE_EVENT = "duplicate_event"  # the first item of the page comes twice
    SAME_SYNC_TOKEN = "same_sync_token"  # noqa: S105 - the token just used comes again
    DUPLICATE = "duplicate"  # method "push": the notification is sent twice


PAGE_KINDS = frozenset(
    {
        Kind.NO_ITEMS,
        Kind.NO_SYNC_TOKEN,
        Kind.BOTH_TOKENS,
        Kind.REPEAT_PAGE_TOKEN,
        Kind.DUPLICATE_EVENT,
        Kind.SAME_SYNC_TOKEN,
    }
)


@dataclass(slots=True)
class Rule:
    """One scripted fault; see `Kind` for which of the last fields it uses."""

    kind: Kind
    method: str | None = None  # "events.list", "oauth.token", "push", …
    user: str | None = None
    calendar: str | None = None
    page: int | None = None  # 1 is the first page
    incremental: bool | None = None  # only calls with (true) or without (false) a sync token
    after: int = 0  # let this many matching calls pass first
    times: int | None = None  # then fire this often; None: always
    probability: float = 1.0
    status: int = 0
    reason: str = ""
    retry_after: int = 0
    seconds: float = 0.0
    id: int = 0
    seen: int = field(default=0)
    fired: int = field(default=0)

    def matches(self, method: str, user: str, calendar: str, page: int, incremental: bool) -> bool:
        """Whether the rule is about this call."""
        return (
            self.method in (None, method)
            and self.user in (None, user)
            and self.calendar in (None, calendar)
            and self.page in (None, page)
            and self.incremental in (None, incremental)
        )


class Faults:
    """The rules in force."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - repeatable, not secret
        self._ids = 0
        self.rules: list[Rule] = []

    def add(self, rule: Rule) -> int:
        """Put a rule in force and return its id."""
        self._ids += 1
        rule.id = self._ids
        self.rules.append(rule)
        return rule.id

    def remove(self, rule_id: int | None = None) -> None:
        """Lift one rule, or all."""
        self.rules = [rule for rule in self.rules if rule_id is not None and rule.id != rule_id]

    def firing(
        self, method: str, user: str, calendar: str = "", *, page: int = 1, incremental: bool = False
    ) -> list[Rule]:
        """Return the rules that fire on this call, counting it for each rule that matches."""
        fired = []
        for rule in self.rules:
            if not rule.matches(method, user, calendar, page, incremental):
                continue
            rule.seen += 1
            spent = rule.times is not None and rule.fired >= rule.times
            if rule.seen <= rule.after or spent or self._random.random() >= rule.probability:
                continue
            rule.fired += 1
            fired.append(rule)
        return fired

    def firing_on(self, call: Call, calendar: str) -> list[Rule]:
        """Return the rules that fire on an API call."""
        return self.firing(
            call.method,
            call.user.email,
            calendar,
            page=page_number(call.text("pageToken")),
            incremental=call.text("syncToken") is not None,
        )


def refuse(rule: Rule) -> None:
    """Raise the error a rule scripts, if it scripts one.

    Raises:
        ApiError: as scripted.
    """
    match rule.kind:
        case Kind.ERROR:
            raise errors.backend_error(rule.status or 500)
        case Kind.GONE:
            raise errors.full_sync_required()
        case Kind.UNAUTHORIZED:
            raise errors.invalid_credentials()
        case Kind.FORBIDDEN:
            raise errors.forbidden(rule.reason or "forbidden")
        case Kind.RATE_LIMITED:
            reason = rule.reason or "rateLimitExceeded"
            raise errors.limit_exceeded(reason, rule.status or 403, rule.retry_after or None)
        case Kind.NOT_FOUND:
            raise errors.not_found()


def spoil(rule: Rule, call: Call, page: ListPage) -> None:
    """Alter a page as a rule scripts it."""
    match rule.kind:
        case Kind.NO_ITEMS:
            page.items.clear()
        case Kind.NO_SYNC_TOKEN:
            page.next_sync_token = None
        case Kind.BOTH_TOKENS:
            if page.next_page_token is not None:
                page.next_sync_token = "CAESmidlistingtoken="  # noqa: S105 - deliberately useless
        case Kind.REPEAT_PAGE_TOKEN:
            if repeated := call.text("pageToken"):
                page.next_page_token, page.next_sync_token = repeated, None
        case Kind.DUPLICATE_EVENT:
            page.items[:0] = page.items[:1]
        case Kind.SAME_SYNC_TOKEN:
            if page.next_sync_token is not None:
                page.next_sync_token = call.text("syncToken") or page.next_sync_token
