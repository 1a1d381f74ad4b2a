"""When has a metric crossed its threshold, when is it over, and when may it happen again.

Belongs here: rules, and the pure machine that one sample after the other moves. Does not: what is done about a crossing
(`scaling.episodes`), what rules there are (`scaling.catalogue`), any clock or database.

The machine, per rule and what it is measured of::

    UNKNOWN --> OK <--> PENDING --> FIRED <--> CLEARING --> OK       repeat: the next crossing is the next episode
                                                        --> LATCHED  one_shot: until a human; period: until next month

What is decided here, and why:

- Time is the samples' own. `now` only tells what claims to be from the future. So the same samples lead to the same
  episodes in whatever batches, how often and how late they are fed.
- What is not ok moves nothing but the gap. It is dated by when it was asked, an ok sample by what it is true of: a bill
  of yesterday that arrives after today's error still counts. `State.wants` is the rule for both.
- A sample from more than `FUTURE_TOLERANCE` ahead waits: it is ignored, said once, and counts when fed again after its
  time has come.
- An episode starts with a sample that breaches, and ends with one at its recovery threshold; in between nothing does.
- LATCHED begins with recovery, not with FIRED: a one-shot stays visibly FIRED while its metric is over the threshold.
  One without a recovery threshold stays FIRED; `rearm` takes both.
- A figure that begins anew every month (`Sample.period`) recovers only by a month that closed at its recovery
  threshold, never by the first days of the next one. Votes and pending time of a month end with it.
- Votes (M of N) begin anew when the phase changes: the breaches that fired an episode fire no second one, and what was
  low before it is no recovery from it.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from math import isfinite
from typing import Self

import orjson

from scaling.errors import UserError
from scaling.samples import Sample, Status

FUTURE_TOLERANCE = timedelta(minutes=5)
"""Clocks of servers that are kept by NTP differ by less; what is further ahead has a wrong clock or time zone."""

LONGEST_WINDOW = 1000
"""Samples a rule may look back on; keeps a state's row below 50 kB."""

Point = tuple[datetime, float]
"""When, and the value then."""


class Compare(StrEnum):
    """On which side of its threshold a value breaches."""

    ABOVE = ">"
    AT_LEAST = ">="
    BELOW = "<"
    AT_MOST = "<="

    def holds(self, value: float, threshold: float) -> bool:
        """Whether a value breaches.

        Args:
            value: of the metric.
            threshold: in the same unit.
        """
        match self:
            case Compare.ABOVE:
                return value > threshold
            case Compare.AT_LEAST:
                return value >= threshold
            case Compare.BELOW:
                return value < threshold
            case Compare.AT_MOST:
                return value <= threshold


class Rearm(StrEnum):
    """What a rule waits for after an episode."""

    ONE_SHOT = "one_shot"
    """A human."""
    REPEAT = "repeat"
    """Recovery."""
    PERIOD = "period"
    """The next month, recovered or not; at most one episode a month."""


class Phase(StrEnum):
    """Where the machine stands."""

    UNKNOWN = "unknown"
    """Nothing was measured yet."""
    OK = "ok"
    PENDING = "pending"
    """It breaches, not yet often or long enough."""
    FIRED = "fired"
    CLEARING = "clearing"
    """It has recovered; the next sample confirms that, or returns to FIRED in the same episode."""
    LATCHED = "latched"
    """It has recovered, and fires no more until it is re-armed."""


@dataclass(frozen=True, slots=True)
class Rule:
    """When a metric counts as crossed, and when as recovered.

    Attributes:
        name: unique; the key of its states and episodes.
        metric: whose samples it judges.
        compare: the side on which a value breaches.
        threshold: in the metric's unit.
        no_data_after: a gap this long raises `DataMissing`; a longer one voids what is pending. More than the time
            between two measurements and the source's own delay together, or two samples are never in a row.
        breaches: M, of the last N ok samples, that must breach.
        of: N.
        hold: least time from the first breach to the one that fires.
        recovery: at or on the far side of it a value has recovered; None: never does.
        recoveries: of the last `recovery_of` ok samples that must have recovered.
        recovery_of: how many are looked at for that.
        min_fired: an episode does not recover sooner.
        rearm: what it waits for after an episode.
        flap_episodes: as many within `flap_window` are flapping.
        flap_window: see there.
        version: 12 hex digits of the SHA-256 of all that decides: an edited threshold is another version.
    """

    name: str
    metric: str
    compare: Compare
    threshold: float
    no_data_after: timedelta
    breaches: int = 1
    of: int = 1
    hold: timedelta = timedelta(0)
    recovery: float | None = None
    recoveries: int = 1
    recovery_of: int = 1
    min_fired: timedelta = timedelta(0)
    rearm: Rearm = Rearm.ONE_SHOT
    flap_episodes: int = 3
    flap_window: timedelta = timedelta(days=7)
    version: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            UserError: the first such setting, and what it must be.
        """
        zero = timedelta(0)
        wants = {
            "threshold must be a finite number": isfinite(self.threshold),
            "recovery must be a finite number": self.recovery is None or isfinite(self.recovery),
            f"recovery must not itself be {self.compare} {self.threshold:g}": (
                self.recovery is None or not self.compare.holds(self.recovery, self.threshold)
            ),
            "breaches must be between 1 and of": 1 <= self.breaches <= self.of,
            "recoveries must be between 1 and recovery_of": 1 <= self.recoveries <= self.recovery_of,
            f"of and recovery_of must be at most {LONGEST_WINDOW}": max(self.of, self.recovery_of) <= LONGEST_WINDOW,
            "hold and min_fired must not be negative": self.hold >= zero and self.min_fired >= zero,
            "no_data_after must be longer than nothing": self.no_data_after > zero,
            f"flap_episodes must be between 2 and {LONGEST_WINDOW}": 2 <= self.flap_episodes <= LONGEST_WINDOW,
            "flap_window must be longer than nothing": self.flap_window > zero,
            "recovery must be set when rearm is repeat": self.recovery is not None or self.rearm is not Rearm.REPEAT,
        }
        for want, holds in wants.items():
            if not holds:
                raise UserError(f"rule {self.name}: {want}")
        decides = [_plain(getattr(self, each.name)) for each in fields(self) if each.name not in ("name", "version")]
        object.__setattr__(self, "version", hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12])

    def breached(self, value: float) -> bool:
        """Whether a value is on the wrong side of the threshold.

        Args:
            value: in the metric's unit.
        """
        return self.compare.holds(value, self.threshold)

    def recovered(self, value: float) -> bool:
        """Whether a value is at the recovery threshold or beyond it; between the two thresholds it is neither.

        Args:
            value: in the metric's unit.
        """
        if self.recovery is None:
            return False
        if self.compare in (Compare.ABOVE, Compare.AT_LEAST):
            return value <= self.recovery
        return value >= self.recovery


@dataclass(frozen=True, slots=True)
class State:
    """All the machine remembers of one rule and what it is measured of.

    Attributes:
        phase: where it stands.
        since: when that phase began; of `PENDING` the first breach.
        episode_no: of the latest episode; 0: there was none. The next is one more.
        votes: the ok samples that count towards the next phase, at most N.
        last_at: of the newest ok sample.
        last_value: its value.
        period: the month it belongs to; empty: to none.
        seen_at: of the newest sample, ok or not.
        gap: samples since the last ok one that were not ok.
        gap_since: since when there is no data.
        missing: whether that was said (`DataMissing`).
        fired_at: when the latest episode began.
        fired: when the latest episodes began, as many as make flapping.
        flapping: whether so many lie within the window now: nothing acts by itself.
        future_at: the furthest sample from the future that was spoken of.
        rule_version: of the rule that judged last.
    """

    phase: Phase = Phase.UNKNOWN
    since: datetime | None = None
    episode_no: int = 0
    votes: tuple[Point, ...] = ()
    last_at: datetime | None = None
    last_value: float | None = None
    period: str = ""
    seen_at: datetime | None = None
    gap: int = 0
    gap_since: datetime | None = None
    missing: bool = False
    fired_at: datetime | None = None
    fired: tuple[datetime, ...] = ()
    flapping: bool = False
    future_at: datetime | None = None
    rule_version: str = ""

    @classmethod
    def initial(cls) -> Self:
        """The state before the first sample."""
        return cls()

    def wants(self, sample: Sample) -> bool:
        """Whether a sample is news; feed those, oldest first. Any other changes nothing.

        In SQL: ``status = 'ok' AND at > last_at OR status <> 'ok' AND at > seen_at``.

        Args:
            sample: of the rule's metric.
        """
        newest = self.last_at if sample.status is Status.OK else self.seen_at
        return newest is None or sample.at > newest

    def to_json(self) -> str:
        """The state as a JSON object of its attributes."""
        return orjson.dumps(self).decode()

    @classmethod
    def from_json(cls, stored: str) -> Self:
        """The state that `to_json` wrote.

        Args:
            stored: its JSON text, spelled as whatever stores it likes.
        """
        values = orjson.loads(stored)
        value = values["last_value"]
        return cls(
            phase=Phase(values["phase"]),
            since=_moment(values["since"]),
            episode_no=values["episode_no"],
            votes=tuple((datetime.fromisoformat(at), float(value)) for at, value in values["votes"]),
            last_at=_moment(values["last_at"]),
            last_value=None if value is None else float(value),
            period=values["period"],
            seen_at=_moment(values["seen_at"]),
            gap=values["gap"],
            gap_since=_moment(values["gap_since"]),
            missing=values["missing"],
            fired_at=_moment(values["fired_at"]),
            fired=tuple(datetime.fromisoformat(at) for at in values["fired"]),
            flapping=values["flapping"],
            future_at=_moment(values["future_at"]),
            rule_version=values["rule_version"],
        )


@dataclass(frozen=True, slots=True)
class Fired:
    """An episode begins.

    Attributes:
        episode_no: its number.
        at: of the sample that fired it.
        value: of that sample.
        recent: the samples that voted, that one last.
        flapping: there were too many episodes: record it, and act on nothing by itself.
    """

    episode_no: int
    at: datetime
    value: float
    recent: tuple[Point, ...]
    flapping: bool = False


@dataclass(frozen=True, slots=True)
class Recovered:
    """An episode is over: by a sample, or by a month that closed at this value."""

    episode_no: int
    at: datetime
    value: float


@dataclass(frozen=True, slots=True)
class DataMissing:
    """There is no data since then; said once. `status` is of the sample that showed it, None: there was none."""

    since: datetime
    status: Status | None


@dataclass(frozen=True, slots=True)
class DataBack:
    """There is data again."""

    at: datetime


@dataclass(frozen=True, slots=True)
class Flapping:
    """Too many episodes in the window, this one the last; said once until it has calmed down. A human should look."""

    episode_no: int


@dataclass(frozen=True, slots=True)
class Rearmed:
    """This episode holds its rule no longer, recovered or not: a new month began, or the rule was edited."""

    episode_no: int
    at: datetime


@dataclass(frozen=True, slots=True)
class FromFuture:
    """A sample claims a moment that has not come; its clock, or ours, is wrong. It waits."""

    at: datetime
    now: datetime


Event = Fired | Recovered | DataMissing | DataBack | Flapping | Rearmed | FromFuture


def step(rule: Rule, state: State, sample: Sample, now: datetime) -> tuple[State, tuple[Event, ...]]:
    """Move the machine by one sample.

    Args:
        rule: as it is configured now; an edited one goes on with the state of the old one.
        state: of this rule and of what the sample was measured of.
        sample: of the rule's metric. One that is no news changes nothing.
        now: the clock of whoever evaluates.

    Returns:
        The state after it, and what happened, in order.

    Raises:
        ValueError: the sample is of another metric.
    """
    if sample.metric != rule.metric:
        raise ValueError(f"rule {rule.name} judges {rule.metric}, not {sample.metric}")
    if not state.wants(sample):
        return state, ()
    if sample.at > now + FUTURE_TOLERANCE:
        if state.future_at is not None and sample.at <= state.future_at:
            return state, ()
        return replace(state, future_at=sample.at), (FromFuture(sample.at, now),)
    if sample.value is None:
        return _without_data(rule, replace(state, seen_at=sample.at, gap=state.gap + 1), sample.at, sample.status)
    # A month is over when the first sample of the next one is in; a late figure of it must not begin it again.
    if _period(rule, sample) and _period(rule, sample) < state.period:
        return state, ()
    return _judge(rule, state, sample, sample.value)


def silence(rule: Rule, state: State, now: datetime) -> tuple[State, tuple[Event, ...]]:
    """Notice that nobody measures any more: no sample came, not even one that is not ok.

    Args:
        rule: as it is configured now.
        state: after all samples there are.
        now: the clock of whoever evaluates.

    Returns:
        The state, and `DataMissing` when the silence has become that long.
    """
    if state.seen_at is None:
        return state, ()
    return _without_data(rule, state, now, None)


def rearm(rule: Rule, state: State, now: datetime) -> State:
    """Let a one-shot fire again, because a human says so. Its flapping is forgotten with it: someone has looked.

    Args:
        rule: a one-shot.
        state: latched, or still fired: a metric that then still breaches begins a new episode.
        now: when.

    Raises:
        UserError: the rule re-arms by itself, or has no episode to re-arm after.
    """
    if rule.rearm is not Rearm.ONE_SHOT and state.phase is not Phase.LATCHED:
        raise UserError(f"{rule.name} re-arms by itself ({rule.rearm}); there is nothing to do")
    if state.phase not in (Phase.FIRED, Phase.CLEARING, Phase.LATCHED):
        raise UserError(f"{rule.name} is {state.phase}, so it is armed already; there is nothing to do")
    return replace(state, phase=Phase.OK, since=now, votes=(), fired=(), flapping=False)


def replay(rule: Rule, samples: Iterable[Sample]) -> list[tuple[Sample, State, tuple[Event, ...]]]:
    """What a rule would have done on samples that are on record, from the first one on.

    Args:
        rule: to try.
        samples: of its metric, in any order, of anything it is measured of.

    Returns:
        Every sample in the order of time, the state after it of what it was measured of, and what happened.
    """
    states: dict[str, State] = {}
    steps: list[tuple[Sample, State, tuple[Event, ...]]] = []
    for sample in sorted(samples, key=lambda each: each.at):
        state, events = step(rule, states.get(sample.dims, State.initial()), sample, sample.at)
        states[sample.dims] = state
        steps.append((sample, state, events))
    return steps


def _without_data(
    rule: Rule, state: State, at: datetime, status: Status | None
) -> tuple[State, tuple[DataMissing, ...]]:
    since = state.gap_since or state.last_at or at
    missing = at - since >= rule.no_data_after
    after = replace(state, gap_since=since, missing=state.missing or missing)
    return after, (DataMissing(since, status),) if missing and not state.missing else ()


def _judge(rule: Rule, state: State, sample: Sample, value: float) -> tuple[State, tuple[Event, ...]]:
    at = sample.at
    period = _period(rule, sample)
    phase, since, votes = state.phase, state.since, state.votes
    episode_no, fired_at, fired, flapping = state.episode_no, state.fired_at, state.fired, state.flapping
    events: list[Event] = [DataBack(at)] if state.missing else []

    def long_enough() -> bool:
        return fired_at is None or at - fired_at >= rule.min_fired

    interrupted = state.last_at is not None and at - state.last_at > rule.no_data_after
    if period and state.period and period > state.period:
        if rule.rearm is Rearm.PERIOD:
            if phase in (Phase.FIRED, Phase.CLEARING, Phase.LATCHED):
                events.append(Rearmed(episode_no, at))
            phase, since, votes = Phase.OK, at, ()
        elif phase is Phase.PENDING:
            phase, since, votes = Phase.OK, at, ()
        elif phase is Phase.OK:
            votes = ()
        elif phase is Phase.FIRED and not interrupted and state.last_at is not None and state.last_value is not None:
            votes = (*votes, (state.last_at, state.last_value))[-rule.recovery_of :]
            closed_well = rule.recovered(state.last_value)
            if closed_well and sum(rule.recovered(each) for _, each in votes) >= rule.recoveries and long_enough():
                events.append(Recovered(episode_no, at, state.last_value))
                phase, since, votes = _after_recovery(rule), at, ()
        elif phase is Phase.FIRED:
            votes = ()
    elif interrupted and not (sample.period and phase is Phase.FIRED):
        votes = ()
        if phase is Phase.PENDING:
            phase, since = Phase.OK, at
        elif phase is Phase.CLEARING:
            phase, since = Phase.FIRED, at

    if phase is Phase.LATCHED and rule.rearm is Rearm.REPEAT:
        events.append(Rearmed(episode_no, at))
        phase, since, votes = Phase.OK, at, ()
    # Only an edited rule finds no breach among the votes of what is pending.
    if phase is Phase.PENDING and not any(rule.breached(each) for _, each in votes[-rule.of :]):
        phase, since = Phase.OK, at

    breached = rule.breached(value)
    match phase:
        case Phase.UNKNOWN | Phase.OK | Phase.PENDING:
            votes = (*votes, (at, value))[-rule.of :]
            breaches = sum(rule.breached(each) for _, each in votes)
            if breached and phase is not Phase.PENDING:
                phase, since = Phase.PENDING, at
            if breached and breaches >= rule.breaches and at - (since or at) >= rule.hold:
                episode_no += 1
                fired_at, fired = at, (*fired, at)[-rule.flap_episodes :]
                flapping = _flapping(rule, fired, at)
                events.append(Fired(episode_no, at, value, votes, flapping))
                if flapping and not state.flapping:
                    events.append(Flapping(episode_no))
                phase, since, votes = Phase.FIRED, at, ()
            elif not breaches and phase is not Phase.OK:
                phase, since = Phase.OK, at
        case Phase.FIRED if not sample.period:
            votes = (*votes, (at, value))[-rule.recovery_of :]
            recoveries = sum(rule.recovered(each) for _, each in votes)
            if rule.recovered(value) and recoveries >= rule.recoveries and long_enough():
                phase, since, votes = Phase.CLEARING, at, ()
        case Phase.CLEARING if breached or rule.recovery is None:
            phase, since = Phase.FIRED, at
        case Phase.CLEARING if rule.recovered(value):
            events.append(Recovered(episode_no, at, value))
            phase, since = _after_recovery(rule), at
        case _:
            pass

    after = State(
        phase=phase,
        since=since,
        episode_no=episode_no,
        votes=votes,
        last_at=at,
        last_value=value,
        period=period or state.period,
        seen_at=at if state.seen_at is None else max(at, state.seen_at),
        fired_at=fired_at,
        fired=fired,
        flapping=flapping and _flapping(rule, fired, at),
        future_at=state.future_at,
        rule_version=rule.version,
    )
    return after, tuple(events)


def _after_recovery(rule: Rule) -> Phase:
    return Phase.OK if rule.rearm is Rearm.REPEAT else Phase.LATCHED


def _flapping(rule: Rule, fired: tuple[datetime, ...], at: datetime) -> bool:
    return len(fired) >= rule.flap_episodes and at - fired[-rule.flap_episodes] <= rule.flap_window


def _period(rule: Rule, sample: Sample) -> str:
    """The month a sample belongs to: as it says, or, for a rule by the month, that of its moment in UTC."""
    if sample.period or rule.rearm is not Rearm.PERIOD:
        return sample.period
    return f"{sample.at.astimezone(UTC):%Y-%m}"


def _plain(value: object) -> object:
    if isinstance(value, timedelta):
        return value.total_seconds()
    return float(value) if isinstance(value, int | float) else value


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
