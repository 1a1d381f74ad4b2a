"""Units of the metrics, and how a figure is written for people.

Belongs here: units and their text. Does not: which metric has which (`scaling.catalogue`).
"""

from enum import StrEnum


class Unit(StrEnum):
    """What one of a figure is."""

    BYTES = "bytes"
    CALLS = "calls"
    TENANTS = "tenants"
    USERS = "users"
    SECONDS = "seconds"
    MILLISECONDS = "milliseconds"
    RUNS = "runs"
    EVENTS = "events"
    CHATS = "chats"
    TOKENS = "tokens"
    CONNECTIONS = "connections"
    INCIDENTS = "incidents"
    DOLLARS = "USD"
    SHARE = "share"
    """A part of a whole, 0 to 1."""
    TIMES = "times"
    """A multiple."""
    FLAG = "flag"
    """1: yes, 0: no."""
    PERIODS = "periods"
    """Times the interval between two measurements."""


def shown(value: float, unit: Unit) -> str:
    """Write a figure for people.

    Args:
        value: in the unit.
        unit: its unit.
    """
    match unit:
        case Unit.BYTES:
            return _bytes(value)
        case Unit.SHARE:
            return f"{value:.1%}"
        case Unit.TIMES:
            return f"{value:.2f} x"
        case Unit.FLAG:
            return "yes" if value else "no"
        case Unit.DOLLARS:
            return f"${value:,.2f}"
        case Unit.SECONDS:
            return f"{value:,.1f} s"
        case Unit.MILLISECONDS:
            return f"{value:,.0f} ms"
        case _:
            return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def _bytes(value: float) -> str:
    size, unit = float(value), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
