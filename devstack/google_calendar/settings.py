"""What a person can configure about the simulator, with Google's documented values as defaults."""

from dataclasses import dataclass
from enum import StrEnum


class Drift(StrEnum):
    """What happens when a client repeats a token with other parameters, which Google calls undefined behaviour."""

    COUNT = "count"  # answer as asked and count it
    REJECT = "reject"  # count it and answer 400
    ODD = "odd"  # count it and answer no changes and the same token again, hiding every change


class Tombstones(StrEnum):
    """How much of a deleted event is returned."""

    AUTO = "auto"  # details on the organizer's calendar if showDeleted=true was asked for, else the bare id
    FULL = "full"
    BARE = "bare"


@dataclass(slots=True)
class Settings:
    """Behaviour of one simulator. All durations are virtual seconds."""

    # guides/quota as of 1 May 2026. 0 switches a limit off.
    quota_project_per_minute: int = 10_000
    quota_user_per_minute: int = 600
    quota_project_per_day: int = 0
    quota_status: int = 403  # 403 or 429: both are documented
    retry_after: int = 0  # seconds in a Retry-After header; 0 sends none, as Google mostly does

    client_id: str = ""  # when set, the token endpoint insists on this client
    client_secret: str = ""
    access_token_seconds: int = 3599

    page_token_seconds: int = 3600  # undocumented; "page tokens expire" is
    tombstone_days: int = 30  # deletions are remembered, and sync tokens accepted, this long
    updated_min_days: int = 28  # the cut-off was measured by others at 29 days

    tombstones: Tombstones = Tombstones.AUTO
    sparse_instances: bool = False  # cancelled instances as bare {id, status}, as clients have met them
    drift: Drift = Drift.COUNT

    channel_seconds: int = 604_800  # guides/push: default ttl
    channel_max_seconds: int = 2_592_000
    push_retry_base: float = 0.05  # real seconds before the first retry of a push; doubles each time
    gzip_from_bytes: int = 512  # smaller answers are sent as they are
