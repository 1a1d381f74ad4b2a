"""Supabase's management API.

Belongs here: the organization's plan, the disk's use, the pooler's configuration. Does not: the project's own metrics,
which are scraped (`scaling.sources.prometheus`), or SQL.

Shapes: the OpenAPI document of api.supabase.com/api/v1. The pooler's answer carries connection strings; of it only
figures and the mode reach a sample.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from pydantic import AwareDatetime, NonNegativeInt, TypeAdapter

from scaling.samples import Sample, Status, measured
from scaling.sources import Reach
from scaling.sources.http import Answer, Body, Request, SourceError, ask, drifted, parse, sampled, secret, unmeasured

PAID_PLANS = frozenset({"pro", "team", "enterprise"})
"""Plans that may have read replicas."""


class _Organization(Body):
    plan: Literal["free", "pro", "team", "enterprise", "platform"]


class _DiskMetrics(Body):
    fs_size_bytes: NonNegativeInt
    fs_avail_bytes: NonNegativeInt
    fs_used_bytes: NonNegativeInt


class _Disk(Body):
    timestamp: AwareDatetime
    metrics: _DiskMetrics


class _Pooler(Body):
    database_type: Literal["PRIMARY", "READ_REPLICA"]
    pool_mode: Literal["transaction", "session"]
    default_pool_size: NonNegativeInt | None
    max_client_conn: NonNegativeInt | None


_ORGANIZATION = TypeAdapter(_Organization)
_DISK = TypeAdapter(_Disk)
_POOLERS = TypeAdapter(list[_Pooler])


def _ask(reach: Reach, path: str) -> Answer:
    token = secret(reach.settings.supabase_access_token)
    return ask(
        reach,
        Request(
            "Supabase",
            "GET",
            f"{reach.settings.supabase_endpoint}{path}",
            "SUPABASE_ACCESS_TOKEN",
            headers={"Authorization": f"Bearer {token}"},
        ),
    )


def _project_needs(reach: Reach) -> dict[str, str]:
    settings = reach.settings
    return {
        "SUPABASE_ACCESS_TOKEN": secret(settings.supabase_access_token),
        "SUPABASE_PROJECT_REF": settings.supabase_project_ref or "",
    }


@dataclass(frozen=True, slots=True)
class SupabasePlan:
    """Whether the organization's plan may have read replicas: 1, or 0."""

    def describe(self) -> str:
        """What is asked of whom, in words for people."""
        return "Supabase: plan of SUPABASE_ORGANIZATION (1: pro, team or enterprise)"

    def read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        """Ask for the organization once; see `scaling.sources.Source`."""
        token = secret(reach.settings.supabase_access_token)
        needs = {"SUPABASE_ACCESS_TOKEN": token, "SUPABASE_ORGANIZATION": reach.settings.supabase_organization or ""}
        return sampled(metric, reach, lambda: self._read(metric, reach), needs=needs, private=(token,))

    def _read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        answer = _ask(reach, f"/v1/organizations/{reach.settings.supabase_organization}")
        plan = parse(_ORGANIZATION, answer).plan
        return (measured(metric, reach.now, float(plan in PAID_PLANS), evidence={**answer.evidence, "plan": plan}),)


@dataclass(frozen=True, slots=True)
class SupabaseDisk:
    """How much of the project's disk is used, as a fraction.

    Attributes:
        max_age: an older figure is stale.
    """

    max_age: timedelta = timedelta(hours=6)

    def describe(self) -> str:
        """What is asked of whom, in words for people."""
        return "Supabase: used share of the disk of SUPABASE_PROJECT_REF"

    def read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        """Ask for the disk once; see `scaling.sources.Source`."""
        needs = _project_needs(reach)
        private = (needs["SUPABASE_ACCESS_TOKEN"],)
        return sampled(metric, reach, lambda: self._read(metric, reach), needs=needs, private=private)

    def _read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        answer = _ask(reach, f"/v1/projects/{reach.settings.supabase_project_ref}/config/disk/util")
        disk = parse(_DISK, answer)
        size, used = disk.metrics.fs_size_bytes, disk.metrics.fs_used_bytes
        if not 0 < size >= used:
            raise drifted(answer, [f"metrics: {used} of {size} bytes are used"])
        evidence: dict[str, Any] = {
            **answer.evidence,
            "fs_size_bytes": size,
            "fs_used_bytes": used,
            "data_complete_until": disk.timestamp.isoformat(),
        }
        if reach.now - disk.timestamp > self.max_age:
            note = f"the figure is of {disk.timestamp:%Y-%m-%d %H:%M}"
            return (unmeasured(metric, reach, Status.STALE, note, evidence),)
        return (measured(metric, reach.now, used / size, evidence=evidence),)


@dataclass(frozen=True, slots=True)
class SupabasePooler:
    """A limit of the pooler of the project's primary.

    Attributes:
        limit: which one; connections.
    """

    limit: Literal["max_client_conn", "default_pool_size"] = "max_client_conn"

    def describe(self) -> str:
        """What is asked of whom, in words for people."""
        return f"Supabase: {self.limit} of the pooler of SUPABASE_PROJECT_REF"

    def read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        """Ask for the pooler once; see `scaling.sources.Source`."""
        needs = _project_needs(reach)
        private = (needs["SUPABASE_ACCESS_TOKEN"],)
        return sampled(metric, reach, lambda: self._read(metric, reach), needs=needs, private=private)

    def _read(self, metric: str, reach: Reach) -> tuple[Sample, ...]:
        answer = _ask(reach, f"/v1/projects/{reach.settings.supabase_project_ref}/config/database/pooler")
        primaries = [each for each in parse(_POOLERS, answer) if each.database_type == "PRIMARY"]
        if not primaries:
            return (unmeasured(metric, reach, Status.EMPTY, "the project has no pooler", answer.evidence),)
        if len(primaries) > 1:
            raise SourceError(f"Supabase names {len(primaries)} poolers of the primary", answer.evidence)
        evidence = {
            **answer.evidence,
            "pool_mode": primaries[0].pool_mode,
            "default_pool_size": primaries[0].default_pool_size,
            "max_client_conn": primaries[0].max_client_conn,
        }
        value = getattr(primaries[0], self.limit)
        if value is None:
            return (unmeasured(metric, reach, Status.EMPTY, f"{self.limit} is not set in Supabase", evidence),)
        return (measured(metric, reach.now, float(value), evidence=evidence),)
