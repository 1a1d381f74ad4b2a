"""Calls per calendar and day, and the age of changes when they arrive, on a virtual clock.

`python -m bench.virtual_fleet` measures it and writes var/bench/virtual_fleet.json.

Belongs here: a small mixed fleet, the world that moves under it in steps, the schemes compared, their figures.
Does not: anything of the sync itself. What runs is `tick.run_tick`, the real receiver, Postgres and the simulator; the
clocks of the last two stand still while work is done and jump to the next moment at which anything happens.

Two-minute ticks start runs, each a few seconds late as Dagster's do. With push a run watches for notifications for as
long as the schedule lets it, and in the seconds between two runs nobody does. A call takes no virtual time; at Google
it takes about 0.1 s. Calendars change by Poisson processes; every change is an event of its own, so that none hides
another and the age of each is read from the database: `changed_at` less Google's `updated`.
"""

import argparse
import heapq
import json
import math
import os
import subprocess
import sys
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any

import psycopg
from cryptography.fernet import Fernet

from bench.fleet import NO_QUOTAS, Fleet, event
from devstack import postgres, saas
from devstack.google_calendar import Simulator, run_simulator
from devstack.processes import CHECKOUT, VAR, Supervisor
from devstack.servers import Database
from devstack.stack import start_webhook
from scaling import migrate
from scaling.settings import SyncSettings
from sync_pipeline.cadence import DAY, Cadence, FleetRates, observe
from sync_pipeline.quota import CallQuota
from sync_pipeline.services import Services
from sync_pipeline.tick import quantile, run_tick
from tests.sync_pipeline import virtual_clock

BEGIN = datetime(2026, 6, 1, tzinfo=UTC).timestamp()
TICK_SECONDS = 120.0
START_SECONDS = 10.0
"""From a tick to the first look of its run: evaluation by the daemon and start of the run's process."""
RATES = (0.2, 2.0, 10.0)
CONNECTIONS = 20
CALENDARS = 30
"""1.5 a connection, as in the demo world; as many of each rate."""
LEARNED_DAYS = 14.0
SEEDS = (1, 2, 3)
POLLED_EVERY_TICK = 86400 / TICK_SECONDS
SETTLE_DAYS = 1 / 24
# The bench's own settings elsewhere keep calendars from being due; here the documented defaults count.
DEFAULTS = {
    name.upper(): str(SyncSettings.model_fields[name].default)
    for name in (
        "sync_poll_interval_seconds",
        "sync_poll_ceiling_seconds",
        "sync_freshness_target_seconds",
        "sync_calendar_list_interval_seconds",
        "sync_safety_poll_seconds",
        "sync_time_budget_seconds",
    )
}


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way to keep up with the calendars, and for how long it is watched."""

    settings: Mapping[str, str] = field(default_factory=dict)
    push: bool = False
    warm_up_days: float = 1.0
    days: float = 5.0


SCHEMES = {
    "push": Scheme(push=True),
    "adaptive": Scheme(warm_up_days=0.5),
    "every tick": Scheme(
        {"SYNC_POLL_INTERVAL_SECONDS": "0", "SYNC_POLL_CEILING_SECONDS": "0"}, warm_up_days=1 / 24, days=4 / 24
    ),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one trial saw, by the calendars' change rate.

    Attributes:
        calls: rate -> method -> calls per calendar and day; those for a connection are shared by its calendars.
        ages: rate -> seconds from a change at Google to its row in Postgres.
    """

    calls: Mapping[float, Mapping[str, float]]
    ages: Mapping[float, Sequence[float]]

    @classmethod
    def from_json(cls, text: str) -> "Outcome":
        """Read what a trial printed."""
        raw = json.loads(text)
        return cls(*({float(rate): value for rate, value in raw[name].items()} for name in ("calls", "ages")))

    def total(self, rate: float | None = None) -> float:
        """Calendar API calls per calendar and day; without a rate, of the whole fleet."""
        return fmean(sum(self.calls[each].values()) for each in ([rate] if rate is not None else RATES))

    def all_ages(self) -> list[float]:
        """Ages of the whole fleet's changes."""
        return [age for ages in self.ages.values() for age in ages]

    def row(self) -> dict[str, Any]:
        """One table: per rate, calls by method, and how fresh."""
        return {
            f"{rate:g}": {
                "calls_per_calendar_and_day": round(self.total(rate), 2),
                "by_method": {method: round(calls, 3) for method, calls in sorted(self.calls[rate].items())},
                "changes": len(self.ages[rate]),
                "freshness_mean_s": round(fmean(self.ages[rate]), 1) if self.ages[rate] else None,
                "freshness_p95_s": round(quantile(self.ages[rate], 0.95), 1) if self.ages[rate] else None,
            }
            for rate in RATES
        }


class World:
    """Google and Postgres at one virtual moment, and the edits people are going to make."""

    def __init__(
        self, google: Simulator, admin: psycopg.Connection[Any], rate_of: Mapping[str, float], rng: Random
    ) -> None:
        self.google = google
        self.rate_of = rate_of
        self.now = BEGIN
        self.edits: Counter[str] = Counter()
        self._admin = admin
        self._rng = rng
        self._upcoming = [(self._after(calendar), calendar) for calendar in rate_of]
        heapq.heapify(self._upcoming)
        self._watching_until = math.inf

    def clock(self) -> float:
        """The time, in seconds; also of a run."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass; while a run watches, as many sleeps at once as nothing happens in."""
        steps = max(1, math.ceil((min(self.next_moment(), self._watching_until) - self.now) / seconds))
        self.move(min(self.now + steps * seconds, max(self._watching_until, self.now + seconds)))

    def watch_until(self, moment: float) -> None:
        """No sleep reaches beyond this moment by more than it asked for."""
        self._watching_until = moment

    def move(self, moment: float) -> None:
        """Go to a moment; people edit, and notifications arrive, on the way."""
        while self._upcoming[0][0] <= moment:
            at, calendar = heapq.heappop(self._upcoming)
            self._set(at)
            self.google.edit(calendar, [{"op": "insert", "event": event("Change")}])
            self.google.settle_pushes()
            self.edits[calendar] += 1
            heapq.heappush(self._upcoming, (self._after(calendar), calendar))
        self._set(moment)

    def next_due(self) -> float:
        """When the sync next wants to look at something; it may be past."""
        row = self._admin.execute(
            "SELECT extract(epoch FROM least((SELECT min(due_at) FROM sync.calendar_state WHERE deleted_at IS NULL), "
            "(SELECT min(list_due_at) FROM sync.connection_state)))"
        ).fetchone()
        return float(row[0]) if row and row[0] is not None else self.now

    def next_moment(self) -> float:
        """When anything happens next."""
        return min(self.next_due(), self._upcoming[0][0])

    def _after(self, calendar: str) -> float:
        return self.now + self._rng.expovariate(self.rate_of[calendar] / DAY)

    def _set(self, moment: float) -> None:
        self.now = moment
        at = datetime.fromtimestamp(moment, UTC)
        virtual_clock.set(self._admin, at)
        self.google.set_clock(at)


def trial(scheme: Scheme, *, seed: int, name: str) -> Outcome:
    """Run a scheme over a fleet of its own, and measure it after the warm-up."""
    rng = Random(seed)
    with _world(rng, name) as (world, fleet, receiver), fleet.services(**{**DEFAULTS, **scheme.settings}) as made:
        keeper = made.keeper and replace(made.keeper, address=receiver if scheme.push else None)
        watch = made.time_budget_seconds if scheme.push else 0.0
        assert made.quota is not None
        # The quotas are out of reach, and a place in their lots that falls due microseconds later is no wait.
        quota = CallQuota(
            made.router.shards()[0],
            limits=made.quota.limits,
            max_in_flight=made.parallelism,
            clock=world.clock,
            sleep=lambda _: None,
        )
        services = replace(
            made,
            clock=world.clock,
            sleep=world.sleep,
            quota=quota,
            keeper=keeper,
            cadence=replace(made.cadence, rng=Random(seed)),
        )
        _run(services, world, watch, until=BEGIN + SETTLE_DAYS * DAY)
        _teach(fleet, world, made.cadence, rng)
        first = BEGIN + (SETTLE_DAYS + scheme.warm_up_days) * DAY
        last = first + scheme.days * DAY
        _run(services, world, watch, until=first)
        before, edits_before = world.google.counts(), world.edits.copy()
        _run(services, world, watch, until=last)
        after, edits = world.google.counts(), world.edits - edits_before
        calls = _shared(fleet, world, before.calls, after.calls, scheme.days)
        # Until the last change is here; what is asked for meanwhile is not counted.
        while not _all_arrived(fleet, world, last):
            _run(services, world, watch, until=world.now + 3600)
        return Outcome(calls, _ages(fleet, world, first, last, edits))


def _run(services: Services, world: World, watch: float, *, until: float) -> None:
    """Tick every two minutes in which anything is due, up to a moment."""
    while True:
        if watch:
            tick = math.floor((world.next_moment() - START_SECONDS) / TICK_SECONDS)
        else:
            tick = math.ceil((world.next_due() - START_SECONDS) / TICK_SECONDS)
        started = math.floor((world.now - START_SECONDS) / TICK_SECONDS)  # that tick had its run already
        start = max(tick, started + 1) * TICK_SECONDS + START_SECONDS
        if start > until:
            world.move(until)
            return
        world.move(start)
        world.watch_until(start + watch)
        result = run_tick(services, run_id=f"bench-{uuid.uuid4()}", watch_seconds=watch)
        world.watch_until(math.inf)
        if result.failed:
            raise AssertionError([str(trouble) for each in result.failed for trouble in each.troubles])


def _teach(fleet: Fleet, world: World, cadence: Cadence, rng: Random) -> None:
    """Let the change rates be known as after two weeks: the same estimator, fed without engine and database."""
    true_rates = FleetRates(tuple((1, rate) for rate in world.rate_of.values()), fmean(world.rate_of.values()))
    schedule = replace(cadence.for_fleet(true_rates), rng=rng)
    for calendar, rate in world.rate_of.items():
        known, days = (0.0, 0.0), 0.0
        while days < LEARNED_DAYS:
            wait = max(schedule.next_poll(rate), TICK_SECONDS)
            known = observe(*known, wait, rng.random() < 1 - math.exp(-rate * wait / DAY))
            days += wait / DAY
        fleet.execute(
            "UPDATE sync.calendar_state SET change_count = %s, observed_days = %s WHERE calendar_id = %s",
            *known,
            calendar,
        )


def _shared(
    fleet: Fleet, world: World, before: Sequence[Any], after: Sequence[Any], days: float
) -> dict[float, dict[str, float]]:
    """Calendar API calls per calendar and day by rate and method; those of a connection divided over its calendars."""
    counted: Counter[tuple[str, str, str]] = Counter()
    for sign, calls in ((1, after), (-1, before)):
        for each in calls:
            counted[each.method, each.user, each.calendar] += sign * each.count
    calendars_of = {user.email: user.calendars for user in fleet.google.users}
    number_of = Counter(world.rate_of.values())
    found: dict[float, dict[str, float]] = {rate: defaultdict(float) for rate in RATES}
    for (method, user, calendar), count in counted.items():
        if method.startswith("oauth."):
            continue
        for one in [calendar] if calendar in world.rate_of else calendars_of[user]:
            rate = world.rate_of[one]
            share = 1 if calendar in world.rate_of else 1 / len(calendars_of[user])
            found[rate][method] += share * count / number_of[rate] / days
    return {rate: dict(methods) for rate, methods in found.items()}


def _all_arrived(fleet: Fleet, world: World, last: float) -> bool:
    (row,) = fleet.execute(
        "SELECT count(*) FROM sync.calendar_state WHERE last_started_at < to_timestamp(%s) AND deleted_at IS NULL", last
    )
    (seen,) = fleet.execute("SELECT count(*) FROM sync.calendar_events")
    return 0 in (row[0], world.edits.total() - seen[0])


def _ages(fleet: Fleet, world: World, first: float, last: float, edits: Mapping[str, int]) -> dict[float, list[float]]:
    rows = fleet.execute(
        "SELECT calendar_id, extract(epoch FROM changed_at - updated_at)::float8 FROM sync.calendar_events "
        "WHERE updated_at > to_timestamp(%s) AND updated_at <= to_timestamp(%s)",
        first,
        last,
    )
    if (arrived := Counter(calendar for calendar, _ in rows)) != Counter(edits):
        raise AssertionError(f"{arrived.total()} changes arrived of {sum(edits.values())}")
    ages: dict[float, list[float]] = {rate: [] for rate in RATES}
    for calendar, age in rows:
        ages[world.rate_of[calendar]].append(age)
    return ages


@contextmanager
def _world(rng: Random, name: str) -> Iterator[tuple[World, Fleet, str]]:
    """Start the servers and a fleet nobody has synced yet; yields also the receiver's address."""
    with ExitStack() as stack:
        supervisor = stack.enter_context(Supervisor(VAR / "bench" / name))
        server = postgres.start(supervisor, disposable=True)
        google = stack.enter_context(
            run_simulator(
                users=0,
                clock=datetime.fromtimestamp(BEGIN, UTC).isoformat(),
                frozen=True,
                # The client compares the expiry of its access token with the host's clock, which stands still here.
                settings={**NO_QUOTAS, "access_token_seconds": 10 * 365 * 86400},
            )
        )
        database_name = f"virtual_{uuid.uuid4().hex[:12]}"
        admin_dsn = server.create_database(database_name)
        stack.callback(server.drop_database, database_name)
        saas.create(server, database_name)
        plain = saas.pipeline_dsn(server, database_name)
        migrate.upgrade(plain)
        virtual_clock.install(admin_dsn, datetime.fromtimestamp(BEGIN, UTC))
        admin = stack.enter_context(psycopg.connect(admin_dsn, autocommit=True))
        database = Database(database_name, admin_dsn, virtual_clock.dsn(plain), saas.owner_dsn(server, database_name))
        fleet = Fleet(
            supervisor=supervisor,
            server=server,
            database=database,
            google=google,
            members=[],
            key=Fernet.generate_key().decode(),
        )
        calendars = _connect(fleet)
        rates = [RATES[number % len(RATES)] for number in range(len(calendars))]
        rng.shuffle(rates)
        receiver = start_webhook(supervisor, database)["SYNC_WEBHOOK_URL"]
        yield World(google, admin, dict(zip(calendars, rates, strict=True)), rng), fleet, receiver


def _connect(fleet: Fleet) -> list[str]:
    """Make a workspace with a connected account per connection; return all calendars."""
    fernet = Fernet(fleet.key)
    tenant = workspace = uuid.uuid4()
    for number in range(CONNECTIONS):
        user = fleet.google.add_user(f"user-{number:02}@example.com")
        if number < CALENDARS - CONNECTIONS:
            fleet.google.add_calendar(user.email)
        if number % 4 == 0:
            tenant = uuid.uuid4()
            fleet.execute("INSERT INTO public.tenants (id, name) VALUES (%s, 'T')", tenant)
        workspace, person = uuid.uuid4(), uuid.uuid4()
        fleet.execute("INSERT INTO public.workspaces (id, tenant_id, name) VALUES (%s, %s, 'W')", workspace, tenant)
        fleet.execute(
            "INSERT INTO public.users (id, tenant_id, email, google_api_enabled) VALUES (%s, %s, %s, true)",
            person,
            tenant,
            f"{person}@saas.example",
        )
        fleet.execute(
            "INSERT INTO public.google_connections "
            "(id, tenant_id, workspace_id, user_id, google_account, refresh_token_encrypted) "
            "VALUES (gen_random_uuid(), %s, %s, %s, %s, %s)",
            tenant,
            workspace,
            person,
            user.email,
            fernet.encrypt(user.refresh_token.encode()),
        )
    fleet.google.refresh()
    return [calendar for user in fleet.google.users for calendar in user.calendars]


def figures(seeds: Sequence[int] = SEEDS) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure every scheme with every seed, several at a time: time is virtual, and a trial waits more than it works.

    Args:
        seeds: one trial each; figures are the medians.

    Returns:
        The figures, and the table behind them.
    """
    wanted = [(scheme, seed) for scheme in SCHEMES for seed in (seeds if scheme != "every tick" else seeds[:1])]
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as threads:
        done = list(threads.map(lambda one: _apart(*one), wanted))
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    for (scheme, _), outcome in zip(wanted, done, strict=True):
        outcomes[scheme].append(outcome)
    return _judge(outcomes), {
        "connections": CONNECTIONS,
        "calendars": CALENDARS,
        "days": {name: scheme.days for name, scheme in SCHEMES.items()},
        "runs": {name: [outcome.row() for outcome in each] for name, each in outcomes.items()},
    }


def _apart(scheme: str, seed: int) -> Outcome:
    """Run a trial in a process of its own."""
    answer = subprocess.run(
        [sys.executable, "-m", "bench.virtual_fleet", "--scheme", scheme, "--seed", str(seed)],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Outcome.from_json(answer.stdout)


def _judge(outcomes: Mapping[str, Sequence[Outcome]]) -> list[dict[str, Any]]:
    push, adaptive, fixed = (outcomes[name] for name in SCHEMES)
    fleet = (
        f"{CALENDARS} calendars of {CONNECTIONS} connections, a third each of {', '.join(f'{r:g}' for r in RATES)} "
        f"changes a day, {SCHEMES['push'].days:g} virtual days, median of {len(push)} seeds"
    )
    counted = "events, lists and channels counted, lists divided over the calendars"

    def freshness(each: Sequence[Outcome]) -> str:
        mean = median(fmean(outcome.all_ages()) for outcome in each)
        p95 = median(quantile(outcome.all_ages(), 0.95) for outcome in each)
        return f"changes {mean:.0f} s old on average, {p95:.0f} s at p95"

    by_rate = ", ".join(f"{rate:g}: {median(one.total(rate) for one in push):.2f}" for rate in RATES)
    push_calls = median(one.total(2.0) for one in push)
    push_p95 = median(quantile(one.all_ages(), 0.95) for one in push)
    polls = median(one.total() for one in adaptive)
    reduction = 1 - polls / POLLED_EVERY_TICK
    polled_by_rate = ", ".join(f"{rate:g}: {median(one.total(rate) for one in adaptive):.1f}" for rate in RATES)
    every_tick = median(one.total() for one in fixed)
    return [
        _figure(
            "push_calls_per_day",
            push_calls,
            "<= 4",
            push_calls <= 4,
            f"per calendar with 2 changes a day, {counted}; by rate {by_rate}; {fleet}",
        ),
        _figure(
            "push_freshness_p95_s",
            push_p95,
            "<= 60",
            push_p95 <= 60,
            f"all changes of the fleet; {freshness(push)}; runs start {START_SECONDS:g} s after their tick, "
            f"calls take no virtual time; {fleet}",
        ),
        _figure(
            "adaptive_reduction",
            reduction,
            ">= 0.9",
            reduction >= 0.9,
            f"{polls:.1f} calls a calendar and day (by rate {polled_by_rate}) against {POLLED_EVERY_TICK:.0f} polls of "
            f"every two minutes; {counted}; {freshness(adaptive)}; polled at every tick {every_tick:.0f} calls, "
            f"{freshness(fixed)} ({SCHEMES['every tick'].days * 24:g} h measured); rates learned for "
            f"{LEARNED_DAYS:g} days before; {fleet}",
        ),
    ]


def _figure(name: str, value: float, target: str, ok: bool, how: str) -> dict[str, Any]:
    return {"name": name, "value": round(value, 3), "target": target, "ok": ok, "how": how}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure everything, or one trial of one scheme, whose outcome is printed as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.virtual_fleet", description="Calls a day on a virtual clock."
    )
    parser.add_argument("--scheme", choices=SCHEMES)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.scheme:
        name = f"virtual-{options.scheme.replace(' ', '-')}-{options.seed}"
        outcome = trial(SCHEMES[options.scheme], seed=options.seed, name=name)
        sys.stdout.write(json.dumps(asdict(outcome)) + "\n")
        return 0
    found, raw = figures()
    path = Path("var/bench/virtual_fleet.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"figures": found, **raw}, indent=2) + "\n")
    for one in found:
        sys.stdout.write(
            f"{'ok  ' if one['ok'] else 'MISS'} {one['name']}: {one['value']:g} ({one['target']}) {one['how']}\n"
        )
    return 0 if all(one["ok"] for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
