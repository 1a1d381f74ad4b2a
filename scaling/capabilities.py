"""What thresholds switch on: which capabilities there are, whether one is in force, and who switched it.

Belongs here: modes, the switch and its record. Does not: when to switch (`scaling.thresholds`, `scaling.episodes`), or
what a capability does, which its pipeline knows.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from scaling.databases import Connection
from scaling.errors import UserError
from scaling.settings import CapabilitySettings


class Mode(StrEnum):
    """What a crossed threshold leads to. `OFF` and `ON` hold whatever was switched before."""

    OFF = "off"
    """Not in force; crossings are recorded, and nothing acts on them."""
    OBSERVE = "observe"
    """Crossings are recorded, and nothing acts on them; what is on stays on."""
    PROPOSE = "propose"
    """A human approves each action."""
    AUTO = "auto"
    """Acts by itself."""
    ON = "on"
    """In force without any threshold."""


class Capability(StrEnum):
    """What a threshold switches on, or has done."""

    INCREMENTAL_SYNC = "incremental_sync"
    """Sync tokens, push and adaptive polling; without it every calendar is read completely at every interval."""
    PARALLEL_SYNC = "parallel_sync"
    """The pool of workers; without it five workspaces a tick, one after the other."""
    AUDIT_LOG_PARTITIONING = "audit_log_partitioning"
    """Conversion of the table of audit logs to monthly partitions, then the archive of every closed month."""
    AUDIT_LOG_RETENTION = "audit_log_retention"
    """Archive of months past retention, then their prune as ARCHIVE_PRUNE says."""


@dataclass(frozen=True, slots=True)
class Change:
    """One switch of one capability."""

    capability: Capability
    active: bool
    changed_by: str
    reason: str
    episode_id: int | None
    changed_at: datetime


def modes(settings: CapabilitySettings) -> dict[Capability, Mode]:
    """The mode of every capability.

    Args:
        settings: as the environment has them.
    """
    return {each: Mode(getattr(settings, f"scaling_{each.value}")) for each in Capability}


def in_force(mode: Mode, *, switched_on: bool) -> bool:
    """Whether a capability is in force.

    Args:
        mode: of the capability.
        switched_on: what a threshold, or a human, has switched.
    """
    match mode:
        case Mode.ON:
            return True
        case Mode.OFF:
            return False
        case _:
            return switched_on


def active(connection: Connection, settings: CapabilitySettings) -> frozenset[Capability]:
    """Read which capabilities are in force now; asked at the start of every run, so a switch acts on the next one.

    Args:
        connection: in a transaction of the first shard.
        settings: their modes.
    """
    on = switched(connection)
    return frozenset(each for each, mode in modes(settings).items() if in_force(mode, switched_on=each in on))


def switched(connection: Connection) -> frozenset[Capability]:
    """Read which capabilities a threshold, or a person, has switched on; the mode decides whether they are in force.

    Args:
        connection: in a transaction of the first shard.
    """
    on = {name for (name,) in connection.execute("SELECT name FROM scaling.capabilities WHERE active")}
    return frozenset(each for each in Capability if each.value in on)


def switch(
    connection: Connection,
    capability: Capability,
    *,
    on: bool,
    by: str,
    reason: str,
    episode_id: int | None = None,
) -> bool:
    """Switch a capability, and record who did it and why.

    Args:
        connection: in a transaction of the first shard.
        capability: which.
        on: whether it is to be on.
        by: a person, or the rule that fired.
        reason: in a sentence.
        episode_id: of the crossing that led to it.

    Returns:
        False when it already was as wanted; nothing is recorded then.

    Raises:
        UserError: nobody, or no reason, is named.
    """
    if not by.strip() or not reason.strip():
        raise UserError(f"{capability} was not switched; say who switches it (by) and why (reason)")
    changed = connection.execute(
        "INSERT INTO scaling.capabilities AS now (name, active) VALUES (%s, %s)"
        " ON CONFLICT (name) DO UPDATE SET active = EXCLUDED.active, changed_at = clock_timestamp()"
        " WHERE now.active IS DISTINCT FROM EXCLUDED.active RETURNING name",
        [capability.value, on],
    ).fetchone()
    if changed is None:
        return False
    connection.execute(
        "INSERT INTO scaling.capability_changes (capability, active, changed_by, reason, episode_id)"
        " VALUES (%s, %s, %s, %s, %s)",
        [capability.value, on, by, reason, episode_id],
    )
    return True


def changes(connection: Connection) -> list[Change]:
    """Read every switch, newest first.

    Args:
        connection: in a transaction of the first shard.
    """
    rows = connection.execute(
        "SELECT capability, active, changed_by, reason, episode_id, changed_at FROM scaling.capability_changes"
        " ORDER BY id DESC"
    ).fetchall()
    return [Change(Capability(name), *rest) for name, *rest in rows]


def named(name: str) -> Capability:
    """The capability of that name.

    Args:
        name: as the settings and the UI write it.

    Raises:
        UserError: there is none.
    """
    try:
        return Capability(name)
    except ValueError:
        raise UserError(f"there is no capability {name!r}; known: {', '.join(Capability)}") from None
