"""What the sync works with, made once per process from the settings.

Belongs here: wiring; the only place that knows the real clock, sleep and randomness.
Does not: any work.
"""

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random, SystemRandom

from scaling import capabilities, settings
from scaling.capabilities import Capability
from scaling.databases import DatabaseRouter
from scaling.settings import CapabilitySettings, DatabaseSettings, SyncSettings
from sync_pipeline.cadence import Cadence
from sync_pipeline.call_buckets import QuotaLimits
from sync_pipeline.channels import ChannelKeeper
from sync_pipeline.google_calendar import GoogleCalendar
from sync_pipeline.grants import GrantCipher
from sync_pipeline.leases import PushTerms
from sync_pipeline.quota import CallQuota


@dataclass(frozen=True, slots=True)
class InForce:
    """Which capabilities are in force for one run; without both the sync works as the SaaS's own cron did."""

    incremental: bool = True
    """Sync tokens, push and adaptive polling; False: every visit reads a calendar completely, at a fixed interval."""
    parallel: bool = True
    """The pool of workers; False: a few workspaces a tick, one after the other (`sync_pipeline.tick`)."""

    def __str__(self) -> str:
        named = ((Capability.INCREMENTAL_SYNC, self.incremental), (Capability.PARALLEL_SYNC, self.parallel))
        return ", ".join(capability.value for capability, on in named if on) or "none"


@dataclass(frozen=True, slots=True)
class Services:
    """Database, Google, keys, and time; `clock` is the one that `quota` was made with."""

    router: DatabaseRouter
    google: GoogleCalendar
    cipher: GrantCipher
    cadence: Cadence
    parallelism: int
    time_budget_seconds: float
    tenant_parallelism: int = 4
    quota: CallQuota | None = None
    """None: calls are not counted against any quota."""
    keeper: ChannelKeeper | None = None
    """None: no push, every calendar is polled."""
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    in_force: InForce = InForce()

    def as_in_force(self) -> "Services":
        """The same without what is not in force; channels met without push are stopped."""
        limited = self
        if not self.in_force.incremental:
            limited = replace(
                limited,
                cadence=limited.cadence.fixed(),
                keeper=replace(limited.keeper, address=None) if limited.keeper else None,
            )
        return limited if self.in_force.parallel else replace(limited, parallelism=1)

    @property
    def push_terms(self) -> PushTerms:
        """Which push channels are good enough to be left alone."""
        return self.keeper.terms if self.keeper else PushTerms(b"", 0.0)


@contextmanager
def open_services(*, rng: Random | None = None, sleep: Callable[[float], None] = time.sleep) -> Iterator[Services]:
    """Read the settings and what is in force, make the services, and close them afterwards.

    Args:
        rng: source of jitter; by default the system's.
        sleep: waits between attempts.

    Raises:
        UserError: a setting is missing or wrong, or the database does not answer.
    """
    database = settings.load(DatabaseSettings)
    sync = settings.load(SyncSettings)
    modes = settings.load(CapabilitySettings)
    rng = rng or SystemRandom()
    with (
        DatabaseRouter.from_settings(database, application_name="sync_pipeline") as router,
        CallQuota(
            router.shards()[0],
            limits=QuotaLimits.from_settings(sync),
            max_in_flight=sync.sync_parallelism,
            clock=time.monotonic,
            sleep=sleep,
        ) as quota,
    ):
        with router.shards()[0].transaction() as connection:
            active = capabilities.active(connection, modes)
        yield Services(
            router=router,
            google=GoogleCalendar(
                endpoint=sync.google_api_endpoint,
                token_url=sync.google_token_url,
                client_id=sync.google_client_id,
                client_secret=sync.google_client_secret.get_secret_value(),
                sleep=sleep,
                rng=rng,
            ),
            cipher=GrantCipher([key.get_secret_value() for key in sync.grant_encryption_keys]),
            cadence=Cadence(
                poll_seconds=sync.sync_poll_interval_seconds,
                list_seconds=sync.sync_calendar_list_interval_seconds,
                rng=rng,
                ceiling_seconds=sync.sync_poll_ceiling_seconds,
                freshness_seconds=sync.sync_freshness_target_seconds,
                safety_seconds=sync.sync_safety_poll_seconds,
            ),
            parallelism=sync.sync_parallelism,
            time_budget_seconds=sync.sync_time_budget_seconds,
            tenant_parallelism=sync.sync_tenant_parallelism,
            quota=quota,
            keeper=ChannelKeeper(
                sync.sync_webhook_url, new_token=lambda: secrets.token_urlsafe(32), random_bytes=secrets.token_bytes
            ),
            sleep=sleep,
            in_force=InForce(
                incremental=Capability.INCREMENTAL_SYNC in active, parallel=Capability.PARALLEL_SYNC in active
            ),
        )
