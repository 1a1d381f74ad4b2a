"""What one tenant's trouble costs the others: 429s for everything, 97 dead grants, 410 storms.

Belongs here: those three poisons, and how long the other tenants wait for their workspaces in one tick.
Does not: targets.

The calm run is the same tick of the same fleet with nobody in trouble. Runs alternate, so that a machine that gets
slower is not taken for a poison.
"""

import statistics
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from bench.fleet import WORKSPACES_PER_TENANT, Fleet
from sync_pipeline.tick import run_tick

POISONED = 97
OTHERS = 200
LATENCY_SECONDS = 0.1
TIME_BUDGET_SECONDS = 20.0
KINDS = ("rate_limited", "dead_grants", "gone_storm")


def measure(fleet: Fleet, *, rounds: int = 3) -> dict[str, Any]:
    """Run calm and poisoned ticks in turn.

    Args:
        fleet: its first `POISONED` workspaces become one tenant's.
        rounds: how often each.

    Returns:
        The others' p95 of each run, medians, and each poison's ratio to the calm run.
    """
    tenant = _one_tenant(fleet)
    fleet.google.add_fault("latency", seconds=LATENCY_SECONDS)
    p95: dict[str, list[float]] = {kind: [] for kind in ("calm", *KINDS)}
    runs = []
    for _ in range(rounds):
        for kind in p95:
            with _poison(fleet, kind):
                fleet.make_due()
                run_id = f"bench-{uuid.uuid4()}"
                with fleet.services(SYNC_TIME_BUDGET_SECONDS=str(TIME_BUDGET_SECONDS)) as services:
                    result = run_tick(services, run_id=run_id)
                p95[kind].append(_p95_of_others(fleet, run_id, tenant))
                runs.append(
                    {
                        "kind": kind,
                        "others_p95_s": round(p95[kind][-1], 3),
                        "run_s": round(result.duration_seconds, 2),
                        "failed": len(result.failed),
                        "calls": {f"{method} {outcome}": n for (method, outcome), n in result.tally.calls.items()},
                    }
                )
    fleet.google.clear_faults()
    medians = {kind: statistics.median(values) for kind, values in p95.items()}
    return {
        "medians_s": {kind: round(value, 3) for kind, value in medians.items()},
        "ratios": {kind: round(medians[kind] / medians["calm"], 3) for kind in KINDS},
        "runs": runs,
    }


def _one_tenant(fleet: Fleet) -> uuid.UUID:
    """Let the first workspaces belong to one tenant."""
    tenant = fleet.members[0].workspace.tenant_id
    chosen = [member.workspace.workspace_id for member in fleet.members[:POISONED]]
    for table in ("workspace_state", "connection_state", "calendar_state", "event_rows"):
        fleet.execute(f"UPDATE sync.{table} SET tenant_id = %s WHERE workspace_id = ANY(%s)", tenant, chosen)
    fleet.execute("UPDATE public.workspaces SET tenant_id = %s WHERE id = ANY(%s)", tenant, chosen)
    fleet.execute("UPDATE public.google_connections SET tenant_id = %s WHERE workspace_id = ANY(%s)", tenant, chosen)
    fleet.execute(
        "UPDATE public.users u SET tenant_id = %s FROM public.google_connections g "
        "WHERE g.user_id = u.id AND g.workspace_id = ANY(%s)",
        tenant,
        chosen,
    )
    return tenant


@contextmanager
def _poison(fleet: Fleet, kind: str) -> Iterator[None]:
    google = fleet.google
    victims = [member.user.email for member in fleet.members[:POISONED]]
    faults = []
    for victim in victims:
        if kind == "rate_limited":
            refusal: Mapping[str, object] = {"status": 429, "reason": "rateLimitExceeded"}
            faults.append(google.add_fault("rate_limited", user=victim, **refusal))
        elif kind == "dead_grants":
            google.revoke(victim)
        elif kind == "gone_storm":
            google.set_always_gone(victim)
    try:
        yield
    finally:
        for fault in faults:
            google.clear_faults(fault)
        for victim in victims:
            if kind == "dead_grants":
                google.reinstate(victim)
            elif kind == "gone_storm":
                google.set_always_gone(victim, gone=False)


def _p95_of_others(fleet: Fleet, run_id: str, tenant: uuid.UUID) -> float:
    """Seconds from the run's start, when everything was due, until 95 % of the other workspaces were done."""
    ((p95, unfinished),) = fleet.execute(
        """
        SELECT percentile_disc(0.95) WITHIN GROUP (ORDER BY extract(epoch FROM c.last_succeeded_at - r.started_at)),
               count(*) FILTER (WHERE c.last_succeeded_at < r.started_at)
        FROM sync.calendar_state c, sync.runs r WHERE r.run_id = %s AND c.tenant_id <> %s
        """,
        run_id,
        tenant,
    )
    if unfinished:
        raise AssertionError(f"{unfinished} workspaces of healthy tenants were not served at all")
    return float(p95)


FLEET_SIZE = -(-(POISONED + OTHERS) // WORKSPACES_PER_TENANT) * WORKSPACES_PER_TENANT
