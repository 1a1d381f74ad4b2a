"""Command line: `python -m devstack.google_calendar` starts one simulator and prints how to reach it."""

import argparse
from dataclasses import fields
from datetime import datetime
from enum import StrEnum

from devstack.google_calendar.launcher import serve
from devstack.google_calendar.settings import Settings
from devstack.google_calendar.simulation import Options
from devstack.google_calendar.world import Profile

_ABOUT = """\
A stateful simulator of the Google Calendar API v3.

It prints ONE line of JSON on stdout and then serves until SIGTERM or Ctrl-C:
  {"url": "http://127.0.0.1:40001", "token_url": "http://127.0.0.1:40001/token",
   "users": [{"email", "access_token", "refresh_token", "calendars": ["id", ...]}]}

Point google-api-python-client at it by its endpoint only:
  build("calendar", "v3", credentials=Credentials(access_token),
        client_options={"api_endpoint": url}, static_discovery=True)

The world is the same for the same --seed. Nothing fails unless a fault is scripted at POST {url}/_sim/faults.
"""


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(
        prog="python -m devstack.google_calendar",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="port to bind; 0 picks a free one (default)")
    parser.add_argument("--seed", type=int, default=1, help="decides the world (default %(default)s)")
    parser.add_argument(
        "--profile", choices=list(Profile), default=Profile.SMALL, help="size of the world (default small)"
    )
    parser.add_argument("--users", type=int, default=3, help="users of the small profile (default %(default)s)")
    parser.add_argument(
        "--events", type=int, default=100, help="mean events per calendar, small profile (default %(default)s)"
    )
    parser.add_argument("--clock", type=_moment, help="RFC 3339 moment virtual time starts at (default now)")
    parser.add_argument("--frozen", action="store_true", help="let virtual time stand still until told otherwise")
    parser.add_argument("--parent-pid", type=int, help="stop when this process is no longer the parent")
    group = parser.add_argument_group(
        "behaviour", "documented defaults of Google; see devstack/google_calendar/settings.py"
    )
    defaults = Settings()
    for item in fields(Settings):
        default = getattr(defaults, item.name)
        kind = _truth if isinstance(default, bool) else type(default)
        choices = list(type(default)) if isinstance(default, StrEnum) else None
        group.add_argument(
            f"--{item.name.replace('_', '-')}", type=kind, choices=choices, default=default, help="default %(default)s"
        )
    arguments = parser.parse_args()
    settings = Settings(**{item.name: getattr(arguments, item.name) for item in fields(Settings)})
    options = Options(
        seed=arguments.seed,
        profile=Profile(arguments.profile),
        users=arguments.users,
        events=arguments.events,
        clock=arguments.clock,
        frozen=arguments.frozen,
        settings=settings,
    )
    try:
        serve(options, arguments.host, arguments.port, parent=arguments.parent_pid)
    except OSError as error:
        parser.exit(2, f"Cannot listen on {arguments.host}:{arguments.port}: {error.strerror}.\n")


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise argparse.ArgumentTypeError("a moment needs a time zone offset, e.g. 2026-06-01T00:00:00Z")
    return moment


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError("true or false")
    return text.lower() == "true"


if __name__ == "__main__":
    main()
