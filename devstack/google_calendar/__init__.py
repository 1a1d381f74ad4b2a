"""A stateful simulator of the Google Calendar API v3, for tests, demos and load trials of calendar clients.

`run_simulator()` starts one as a child process and yields a `Simulator` to control it; `python -m
devstack.google_calendar` starts one from the command line. README.md in this directory is the manual.
"""

from devstack.google_calendar.control import (
    CountedCalls,
    Counts,
    SimulatedCalendar,
    SimulatedUser,
    Simulator,
    SimulatorError,
    Truth,
)
from devstack.google_calendar.launcher import run_simulator

__all__ = [
    "CountedCalls",
    "Counts",
    "SimulatedCalendar",
    "SimulatedUser",
    "Simulator",
    "SimulatorError",
    "Truth",
    "run_simulator",
]
