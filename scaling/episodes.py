"""Episodes: what crossed thresholds lead to, from the sample that crosses one to the action that has acted.

Belongs here: evaluating rules over stored samples, the outbox of episodes, people's decisions, and the claims of
actions. Does not: when a threshold counts as crossed (`scaling.thresholds`), what is measured (`scaling.samples`), or
what an action does, which its pipeline knows.

Every function takes a connection in a transaction of the first shard. Rows are locked in one order everywhere: states
by rule and dims, then episodes by id; so evaluators, sensors and actions side by side never deadlock, as long as one
transaction evaluates once. Deadlines and retries go by the database's clock.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

import orjson
from psycopg import Cursor
from psycopg.rows import TupleRow

from scaling import thresholds
from scaling.capabilities import Capability, Mode
from scaling.databases import Connection
from scaling.errors import UserError
from scaling.samples import Sample, Status
from scaling.thresholds import Event, Fired, Rearmed, Recovered, Rule, State

AUTO = "auto"
"""Who approves where nobody has to."""
MOST_ATTEMPTS = 3
FIRST_RETRY = timedelta(minutes=1)
LONGEST_RETRY = timedelta(hours=1)
LONGEST_ERROR = 2_000
RULES_AT_ONCE = 10
"""So few that a socket buffers their states (1,000 of 0.5 kB), or the database would wait for the judging."""


class EpisodeState(StrEnum):
    """Where an episode stands."""

    OBSERVED = "observed"
    """Recorded; nothing acts on it unless somebody approves it."""
    PROPOSED = "proposed"
    """Waits for somebody's approval."""
    APPROVED = "approved"
    ACTING = "acting"
    """An action has claimed it."""
    ACTED = "acted"
    ACTION_FAILED = "action_failed"
    """Is tried again."""
    NEEDS_HUMAN = "needs_human"
    """Is not tried again by itself: its attempts are used up, or its rule flaps."""
    EXPIRED = "expired"
    """Recovered, or its rule was re-armed, before anybody approved it."""


AGAIN = (EpisodeState.OBSERVED, EpisodeState.PROPOSED, EpisodeState.NEEDS_HUMAN, EpisodeState.EXPIRED)
"""What a person may approve."""


class ClaimLostError(Exception):
    """The episode was given to another run, or given up: whatever this run has not committed must not be."""


@dataclass(frozen=True, slots=True)
class Watch:
    """A rule that is evaluated, and what its crossings lead to.

    Attributes:
        rule: with the metric it is about.
        capability: whose action it starts; None: a person is told, and nothing acts.
        mode: of the capability.
    """

    rule: Rule
    capability: Capability | None = None
    mode: Mode = Mode.OBSERVE


@dataclass(frozen=True, slots=True)
class Happened:
    """An event of one rule, and what it is about."""

    rule: str
    dims: str
    event: Event


@dataclass(frozen=True, slots=True)
class Standing:
    """Where one rule stands."""

    rule: str
    dims: str
    state: State
    changed_at: datetime


@dataclass(frozen=True, slots=True)
class Episode:
    """One crossing of one threshold: a row of scaling.episodes."""

    id: int
    rule: str
    dims: str
    episode_no: int
    rule_version: str
    capability: Capability | None
    state: EpisodeState
    value: float
    threshold: float
    evidence: Mapping[str, Any]
    fired_at: datetime
    recovered_at: datetime | None
    approved_by: str | None
    approved_at: datetime | None
    acknowledged_by: str | None
    acknowledged_at: datetime | None
    attempts: int
    fence: int
    run_id: str | None
    acting_until: datetime | None
    retry_at: datetime | None
    error: str | None
    outcome: Mapping[str, Any] | None
    acted_at: datetime | None
    effect: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Decision:
    """What somebody's decision changed.

    Attributes:
        episode: as it is now.
        changed: False when there was nothing to change.
        sentence: what happened, for people.
    """

    episode: Episode
    changed: bool
    sentence: str


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to act on an episode, until somebody else gets it.

    Attributes:
        episode: as claimed.
        fence: raised by every claim; whoever has an older one has lost it.
    """

    episode: Episode
    fence: int


_COLUMNS = ", ".join(field.name for field in fields(Episode))
_FAILED = """
    state = CASE WHEN attempts >= %(most)s THEN 'needs_human' ELSE 'action_failed' END,
    retry_at = CASE WHEN attempts < %(most)s THEN clock_timestamp()
        + least(%(first)s::interval * 2 ^ least(greatest(attempts - 1, 0), 30), %(longest)s::interval) END,
    acting_until = NULL, error = %(error)s
"""
_CLAIMABLE = """(
    state = 'approved'
    OR state = 'action_failed' AND retry_at <= clock_timestamp() AND attempts < %(most)s
    OR state = 'acting' AND acting_until < clock_timestamp() AND attempts < %(most)s
)"""
_LAST = "coalesce((s.state->>'last_at')::timestamptz, '-infinity')"
_SEEN = "coalesce((s.state->>'seen_at')::timestamptz, '-infinity')"
# What `State.wants` wants; the first conditions are those an index serves.
_NEWS = f"""
    SELECT json_agg(json_build_array(x.at, x.value, x.status, x.period) ORDER BY x.at)::text FROM scaling.samples x
    WHERE x.metric = w.metric AND x.dims = s.dims AND x.at > {_LAST} AND (x.status = 'ok' OR x.at > {_SEEN})
"""  # noqa: S608
_SILENT = """
    s.state->>'missing' = 'false'
    AND coalesce(s.state->>'gap_since', s.state->>'last_at')::timestamptz <= %(now)s - w.no_data_after
"""
_WATCHED = "unnest(%(rules)s::text[], %(metrics)s::text[], %(no_data)s::interval[]) AS w (rule, metric, no_data_after)"
_SERIES = f"""
WITH RECURSIVE series (rule, metric, dims) AS (
  SELECT w.rule, w.metric, (SELECT min(x.dims) FROM scaling.samples x WHERE x.metric = w.metric) FROM {_WATCHED}
  UNION ALL
  SELECT rule, metric, (SELECT min(x.dims) FROM scaling.samples x WHERE x.metric = series.metric
                        AND x.dims > series.dims)
  FROM series WHERE dims IS NOT NULL
)
SELECT rule, dims, (SELECT coalesce(max(e.episode_no), 0) FROM scaling.episodes e
                    WHERE e.rule = series.rule AND e.dims = series.dims)
FROM series WHERE dims IS NOT NULL
AND NOT EXISTS (SELECT FROM scaling.rule_states s WHERE s.rule = series.rule AND s.dims = series.dims)
ORDER BY rule, dims
"""  # noqa: S608


def evaluate(connection: Connection, watches: Sequence[Watch], now: datetime) -> list[Happened]:
    """Feed every rule the samples it has not seen, and write the episodes that begin or end by them.

    States and episodes are one transaction's, so a crossing has its episode however the process ends. Evaluators side
    by side wait for each other's states. A rule without news is not written.

    Args:
        connection: in a transaction of the first shard, in which nothing was evaluated yet.
        watches: the rules, each once.
        now: the clock of whoever evaluates; only tells what claims to be from the future, and who is silent.

    Returns:
        What happened, by rule and dims, in order.

    Raises:
        UserError: two rules have the same name.
    """
    by_rule = {watch.rule.name: watch for watch in watches}
    if len(by_rule) < len(watches):
        names = [watch.rule.name for watch in watches]
        raise UserError(f"two rules are named {next(name for name in names if names.count(name) > 1)}; rename one")
    _begin(connection, _arguments(watches, now))
    ordered = [by_rule[name] for name in sorted(by_rule)]
    first, *others = [ordered[n : n + RULES_AT_ONCE] for n in range(0, len(ordered), RULES_AT_ONCE)] or [[]]
    happened: list[Happened] = []
    moved: list[_Row] = []
    with connection.pipeline():  # while a part is judged the database writes the last one and reads the next
        coming = _with_news(connection, first, now)
        for following in [*others, []]:
            rows = coming.fetchall()
            _write_states(connection, moved)
            coming = _with_news(connection, following, now)
            moved = []
            for name, dims, stored, news in rows:
                before = State.from_json(stored)
                state, events = _judge(by_rule[name].rule, before, dims, news, now)
                happened += [Happened(name, dims, event) for event in events]
                if state != before:
                    moved.append(_row(name, dims, state))
        _write_states(connection, moved)
    _write_episodes(connection, by_rule, happened)
    return happened


def _arguments(watches: Sequence[Watch], now: datetime) -> dict[str, Any]:
    return {
        "rules": [watch.rule.name for watch in watches],
        "metrics": [watch.rule.metric for watch in watches],
        "no_data": [watch.rule.no_data_after for watch in watches],
        "now": now,
    }


def _with_news(connection: Connection, watches: Sequence[Watch], now: datetime) -> Cursor[TupleRow]:
    """Lock the states that there is news or silence of, in the order they are sorted in: by bytes, like the parts.

    Of a row that another evaluator held this has the state as that one left it, and the news of before; what of it is
    none any more moves nothing.
    """
    return connection.execute(
        f"SELECT s.rule, s.dims, s.state::text, n.news FROM {_WATCHED} JOIN scaling.rule_states s USING (rule)"  # noqa: S608
        f" CROSS JOIN LATERAL ({_NEWS}) n (news) WHERE n.news IS NOT NULL OR ({_SILENT})"
        ' ORDER BY s.rule COLLATE "C", s.dims FOR NO KEY UPDATE OF s',
        _arguments(watches, now),
    )


def _judge(rule: Rule, state: State, dims: str, news: str | None, now: datetime) -> tuple[State, tuple[Event, ...]]:
    events: tuple[Event, ...] = ()
    for at, value, status, period in orjson.loads(news or "[]"):
        figure = None if value is None else float(value)
        sample = Sample(rule.metric, datetime.fromisoformat(at), figure, Status(status), dims, period)
        state, new = thresholds.step(rule, state, sample, now)
        events += new
    heard = state.gap_since or state.last_at
    if heard is not None and not state.missing and now - heard >= rule.no_data_after:
        after, said = thresholds.silence(rule, state, now)
        return (after if said else state), (*events, *said)
    return state, events


def standings(connection: Connection) -> list[Standing]:
    """Read where every rule stands, by rule and dims.

    Args:
        connection: in a transaction of the first shard.
    """
    rows = connection.execute("SELECT rule, dims, state::text, changed_at FROM scaling.rule_states ORDER BY rule, dims")
    return [Standing(rule, dims, State.from_json(state), at) for rule, dims, state, at in rows]


def _begin(connection: Connection, arguments: Mapping[str, Any]) -> None:
    """Make the states of what was never evaluated; numbers go on where episodes are on record without their state."""
    new = connection.execute(_SERIES, arguments).fetchall()
    if not new:
        return
    states = [replace(State.initial(), episode_no=number) for _, _, number in new]
    connection.execute(
        "INSERT INTO scaling.rule_states (rule, dims, phase, episode_no, state)"
        " SELECT rule, dims, phase, episode_no, state::jsonb"
        " FROM unnest(%s::text[], %s::text[], %s::text[], %s::int[], %b::text[])"
        " n (rule, dims, phase, episode_no, state) ON CONFLICT DO NOTHING",
        [
            [rule for rule, _, _ in new],
            [dims for _, dims, _ in new],
            [state.phase.value for state in states],
            [state.episode_no for state in states],
            [state.to_json() for state in states],
        ],
    )


_Row = tuple[str, str, str, int, str]
"""Rule, dims, phase, number of the latest episode, state as JSON text."""


def _row(rule: str, dims: str, state: State) -> _Row:
    return rule, dims, state.phase.value, state.episode_no, state.to_json()


def _write_states(connection: Connection, moved: Sequence[_Row]) -> None:
    # In binary: psycopg escapes each quote of a text array in Python, 10 s for 100,000 states.
    if moved:
        connection.execute(
            "UPDATE scaling.rule_states s SET phase = n.phase, episode_no = n.episode_no, state = n.state,"
            " changed_at = CASE WHEN s.phase = n.phase THEN s.changed_at ELSE clock_timestamp() END"
            " FROM (SELECT rule, dims, phase, episode_no, state::jsonb"
            " FROM unnest(%b::text[], %b::text[], %b::text[], %b::int[], %b::text[])"
            " x (rule, dims, phase, episode_no, state)) n"
            " WHERE s.rule = n.rule AND s.dims = n.dims",
            list(map(list, zip(*moved, strict=True))),
        )


def _write_episodes(connection: Connection, by_rule: Mapping[str, Watch], happened: Sequence[Happened]) -> None:
    """Write the episodes that began, then the ends, also of those that began just now."""
    began = [(each.rule, each.dims, each.event) for each in happened if isinstance(each.event, Fired)]
    ended: dict[tuple[str, str, int], datetime] = {}
    for each in happened:
        if isinstance(each.event, Recovered | Rearmed):
            ended.setdefault((each.rule, each.dims, each.event.episode_no), each.event.at)
    if began:
        watches = [by_rule[rule] for rule, _, _ in began]
        states = [_first_state(watch, event) for watch, (_, _, event) in zip(watches, began, strict=True)]
        connection.execute(
            "INSERT INTO scaling.episodes (rule, dims, episode_no, rule_version, capability, state, value, threshold,"
            " evidence, fired_at, error, approved_by, approved_at) SELECT n.rule, n.dims, n.episode_no, n.version,"
            " n.capability, n.state, n.value, n.threshold, n.evidence || jsonb_build_object('sample', x.evidence),"
            " n.fired_at, n.error, n.approved_by, CASE WHEN n.approved_by IS NOT NULL THEN clock_timestamp() END"
            " FROM unnest(%s::text[], %s::text[], %s::int[], %s::text[], %s::text[], %s::text[], %s::float8[],"
            " %s::float8[], %s::jsonb[], %s::timestamptz[], %s::text[], %s::text[], %s::text[])"
            " n (rule, dims, episode_no, version, capability, state, value, threshold, evidence, fired_at, metric,"
            " approved_by, error)"
            " LEFT JOIN scaling.samples x ON x.metric = n.metric AND x.dims = n.dims AND x.at = n.fired_at",
            [
                [rule for rule, _, _ in began],
                [dims for _, dims, _ in began],
                [event.episode_no for _, _, event in began],
                [watch.rule.version for watch in watches],
                [watch.capability and watch.capability.value for watch in watches],
                [state.value for state in states],
                [event.value for _, _, event in began],
                [float(watch.rule.threshold) for watch in watches],
                [json.dumps(_evidence(watch, event)) for watch, (_, _, event) in zip(watches, began, strict=True)],
                [event.at for _, _, event in began],
                [watch.rule.metric for watch in watches],
                [AUTO if state is EpisodeState.APPROVED else None for state in states],
                [_why(watch.rule, event) for watch, (_, _, event) in zip(watches, began, strict=True)],
            ],
        )
    if ended:
        _end(connection, ended)


def _end(connection: Connection, ended: Mapping[tuple[str, str, int], datetime]) -> None:
    """Close episodes that hold their rule no longer, each at its moment; what is closed already stays as it is."""
    connection.execute(
        "WITH over AS (SELECT e.id, n.at FROM unnest(%s::text[], %s::text[], %s::int[], %s::timestamptz[])"
        " n (rule, dims, episode_no, at) JOIN scaling.episodes e USING (rule, dims, episode_no)"
        " WHERE e.recovered_at IS NULL ORDER BY e.id FOR NO KEY UPDATE OF e)"
        " UPDATE scaling.episodes e SET recovered_at = over.at,"
        " state = CASE e.state WHEN 'proposed' THEN 'expired' ELSE e.state END FROM over WHERE e.id = over.id",
        [*map(list, zip(*ended, strict=True)), list(ended.values())],
    )


def _first_state(watch: Watch, fired: Fired) -> EpisodeState:
    if fired.flapping:
        return EpisodeState.NEEDS_HUMAN
    if watch.capability is None:
        return EpisodeState.OBSERVED
    match watch.mode:
        case Mode.AUTO:
            return EpisodeState.APPROVED
        case Mode.PROPOSE:
            return EpisodeState.PROPOSED
        case _:
            return EpisodeState.OBSERVED


def _why(rule: Rule, fired: Fired) -> str | None:
    if not fired.flapping:
        return None
    return (
        f"{rule.name} fired {rule.flap_episodes} times within {rule.flap_window}, so nothing acts by itself; "
        "look whether threshold and recovery are too close, then approve the episode or edit the rule"
    )


def _evidence(watch: Watch, fired: Fired) -> dict[str, Any]:
    rule = watch.rule
    return {
        "metric": rule.metric,
        "compare": rule.compare.value,
        "mode": watch.mode.value,
        "recent": [[at.isoformat(), value] for at, value in fired.recent],
    }


def listing(
    connection: Connection,
    *,
    states: Sequence[EpisodeState] | None = None,
    capability: Capability | None = None,
    limit: int = 100,
) -> list[Episode]:
    """Read episodes, newest first.

    Args:
        connection: in a transaction of the first shard.
        states: only of these; None: of all.
        capability: only of this; None: of all, and those without one.
        limit: as many at most.
    """
    return _select(
        connection,
        "WHERE (%(states)s::text[] IS NULL OR state = ANY(%(states)s))"
        " AND (%(capability)s::text IS NULL OR capability = %(capability)s)"
        " ORDER BY fired_at DESC, id DESC LIMIT %(limit)s",
        {
            "states": None if states is None else [state.value for state in states],
            "capability": capability and capability.value,
            "limit": limit,
        },
    )


def latest(connection: Connection) -> list[Episode]:
    """Read the latest episode of every rule and what it is measured of, by rule and dims.

    Args:
        connection: in a transaction of the first shard.
    """
    return _select(
        connection,
        "WHERE (rule, dims, episode_no) IN (SELECT rule, dims, max(episode_no) FROM scaling.episodes GROUP BY 1, 2)"
        " ORDER BY rule, dims",
        {},
    )


def recent(connection: Connection, since: datetime) -> list[Episode]:
    """Read the episodes that are open, or that recovered or were acted on lately, oldest first.

    Args:
        connection: in a transaction of the first shard.
        since: what is over before it is left out.
    """
    return _select(
        connection,
        "WHERE recovered_at IS NULL OR recovered_at >= %(since)s OR acted_at >= %(since)s ORDER BY id",
        {"since": since},
    )


def get(connection: Connection, episode_id: int) -> Episode:
    """Read one episode.

    Args:
        connection: in a transaction of the first shard.
        episode_id: its number in the listing.

    Raises:
        UserError: there is none.
    """
    return _one(connection, episode_id)


def approve(connection: Connection, episode_id: int, by: str) -> Decision:
    """Let the action of an episode run; also of one that was only observed, gave up or expired: a second try.

    Args:
        connection: in a transaction of the first shard.
        episode_id: its number in the listing.
        by: who says so.

    Returns:
        What changed; nothing when it is approved already, acting, or acted on.

    Raises:
        UserError: there is no such episode, it has no action, or nobody is named.
    """
    _check_person(by)
    episode = _one(connection, episode_id, lock=True)
    what = f"episode {episode.id} ({episode.rule})"
    if episode.capability is None:
        raise UserError(f"{what} starts no action, so there is nothing to approve; acknowledge it instead")
    if episode.state not in AGAIN:
        already = {
            EpisodeState.APPROVED: f"is approved already, by {episode.approved_by}",
            EpisodeState.ACTING: f"was approved by {episode.approved_by} and is being acted on",
            EpisodeState.ACTED: f"was approved by {episode.approved_by} and has been acted on",
            EpisodeState.ACTION_FAILED: f"was approved by {episode.approved_by}; tried again at {episode.retry_at}",
        }
        return Decision(episode, changed=False, sentence=f"{what} {already[episode.state]}; nothing changed")
    [after] = _update(
        connection,
        "SET state = 'approved', approved_by = %(by)s, approved_at = clock_timestamp(), retry_at = NULL"
        " WHERE id = %(id)s",
        {"id": episode_id, "by": by},
    )
    return Decision(after, changed=True, sentence=f"{what} is approved by {by}; {after.capability} acts on it next")


def acknowledge(connection: Connection, episode_id: int, by: str) -> Decision:
    """Say that somebody knows of an episode: nothing reminds of it any more. The rule goes on as before.

    Args:
        connection: in a transaction of the first shard.
        episode_id: its number in the listing.
        by: who.

    Raises:
        UserError: there is no such episode, or nobody is named.
    """
    _check_person(by)
    episode = _one(connection, episode_id, lock=True)
    what = f"episode {episode.id} ({episode.rule})"
    if episode.acknowledged_by is not None:
        sentence = f"{what} is acknowledged already, by {episode.acknowledged_by}; nothing changed"
        return Decision(episode, changed=False, sentence=sentence)
    [after] = _update(
        connection,
        "SET acknowledged_by = %(by)s, acknowledged_at = clock_timestamp() WHERE id = %(id)s",
        {"id": episode_id, "by": by},
    )
    return Decision(after, changed=True, sentence=f"{what} is acknowledged by {by}")


def rearm(connection: Connection, rule: Rule, dims: str, by: str) -> State:
    """Let a one-shot fire again. Its episode is over by that, recovered or not, and its evidence keeps who did it.

    Args:
        connection: in a transaction of the first shard, in which nothing was evaluated yet.
        rule: a one-shot that has fired.
        dims: what it was measured of.
        by: who.

    Returns:
        The state it has now.

    Raises:
        UserError: it never fired, or is armed; or nobody is named.
    """
    _check_person(by)
    found = connection.execute(
        "SELECT state::text, clock_timestamp() FROM scaling.rule_states WHERE rule = %s AND dims = %s"
        " FOR NO KEY UPDATE",
        [rule.name, dims],
    ).fetchone()
    if found is None:
        known = connection.execute(
            "SELECT dims FROM scaling.rule_states WHERE rule = %s ORDER BY 1 LIMIT 9", [rule.name]
        )
        names = ", ".join(repr(each) for (each,) in known) or "nothing yet"
        raise UserError(f"{rule.name} was never evaluated of {dims!r}, so it is armed; it was evaluated of: {names}")
    state = thresholds.rearm(rule, State.from_json(found[0]), found[1])
    _write_states(connection, [_row(rule.name, dims, state)])
    _end(connection, {(rule.name, dims, state.episode_no): found[1]})
    connection.execute(
        "UPDATE scaling.episodes SET evidence = evidence || jsonb_build_object('rearmed',"
        " jsonb_build_object('by', %s::text, 'at', %s::timestamptz)) WHERE rule = %s AND dims = %s AND episode_no = %s",
        [by, found[1], rule.name, dims, state.episode_no],
    )
    return state


def actionable(
    connection: Connection, capability: Capability, *, mode: Mode, max_attempts: int = MOST_ATTEMPTS
) -> list[Episode]:
    """What runs are to be requested for now. The same answer until one of them claims it, so no cursor is needed.

    In AUTO what was proposed is approved first, in PROPOSE what AUTO approved is proposed again. Where AUTO is not the
    mode only what a person approved is acted on; when it is OFF nothing is.

    Args:
        connection: in a transaction of the first shard.
        capability: whose actions.
        mode: of it.
        max_attempts: of each episode; a person's approval gives one more.

    Returns:
        The episodes, oldest first.
    """
    if mode is Mode.OFF:
        return []
    changes = {
        Mode.AUTO: ("proposed", "SET state = 'approved', approved_by = %(auto)s, approved_at = clock_timestamp()"),
        Mode.PROPOSE: ("approved", "SET state = 'proposed', approved_by = NULL, approved_at = NULL"),
    }
    arguments = {
        "capability": capability.value,
        "auto": AUTO,
        "most": max_attempts,
        "any": mode is Mode.AUTO,
    }
    if mode in changes:
        state, change = changes[mode]
        connection.execute(
            f"UPDATE scaling.episodes {change} WHERE id IN (SELECT id FROM scaling.episodes"  # noqa: S608
            f" WHERE capability = %(capability)s AND state = '{state}' AND recovered_at IS NULL"
            " AND approved_by IS NOT DISTINCT FROM "
            + ("NULL" if mode is Mode.AUTO else "%(auto)s")
            + " ORDER BY id FOR NO KEY UPDATE SKIP LOCKED)",
            arguments,
        )
    return _select(
        connection,
        f"WHERE capability = %(capability)s AND {_CLAIMABLE} AND (%(any)s OR approved_by <> %(auto)s) ORDER BY id",
        arguments,
    )


def run_key(episode: Episode) -> str:
    """The key of the run that is requested for an episode's next attempt.

    Args:
        episode: as `actionable` gave it.
    """
    return f"{episode.rule}:{episode.dims}:{episode.episode_no}:{episode.attempts}"


def claim(
    connection: Connection, episode_id: int, run_id: str, lease: timedelta, *, max_attempts: int = MOST_ATTEMPTS
) -> Claim | None:
    """Take an episode to act on it. Of all who try, one gets it.

    Args:
        connection: in a transaction of the first shard; commit before acting.
        episode_id: of what the run was requested for.
        run_id: of the run.
        lease: how long the run may be silent before others get the episode; `extend` begins it anew.
        max_attempts: of each episode.

    Returns:
        The claim; None when there is nothing to do (any more), or not yet.
    """
    taken = _update(
        connection,
        "SET state = 'acting', fence = fence + 1, attempts = attempts + 1, run_id = %(run)s, retry_at = NULL,"
        " acting_until = clock_timestamp() + %(lease)s::interval"
        f" WHERE id = %(id)s AND {_CLAIMABLE}",
        {"id": episode_id, "run": run_id, "lease": lease, "most": max_attempts},
    )
    return Claim(taken[0], taken[0].fence) if taken else None


def hold(connection: Connection, claimed: Claim) -> None:
    """Prove a claim for the rest of the transaction: nobody else gets the episode before it ends.

    Args:
        connection: in the transaction that writes what the action does.
        claimed: of this run.

    Raises:
        ClaimLostError: somebody else has it, or it was given up; roll back.
    """
    held = connection.execute(
        "SELECT FROM scaling.episodes WHERE id = %s AND fence = %s AND state = 'acting' FOR NO KEY UPDATE",
        [claimed.episode.id, claimed.fence],
    )
    if not held.rowcount:
        raise _lost(claimed)


def extend(connection: Connection, claimed: Claim, lease: timedelta) -> bool:
    """Begin the lease anew, as a sign of life.

    Args:
        connection: in a transaction of the first shard; commit it.
        claimed: of this run.
        lease: from now on.

    Returns:
        False when the claim is lost: stop acting.
    """
    return bool(
        _update(
            connection,
            "SET acting_until = clock_timestamp() + %(lease)s::interval"
            " WHERE id = %(id)s AND fence = %(fence)s AND state = 'acting'",
            {"id": claimed.episode.id, "fence": claimed.fence, "lease": lease},
        )
    )


def finish(connection: Connection, claimed: Claim, outcome: Mapping[str, Any]) -> None:
    """Record that the action has done its work. In the transaction of its writes, if these are in this database.

    Args:
        connection: in a transaction of the first shard.
        claimed: of this run.
        outcome: what it did, JSON values only.

    Raises:
        ClaimLostError: somebody else has the episode, or it was given up; roll back.
    """
    if not _update(
        connection,
        "SET state = 'acted', outcome = %(outcome)s::jsonb, acted_at = clock_timestamp(), acting_until = NULL,"
        " error = NULL WHERE id = %(id)s AND fence = %(fence)s AND state = 'acting'",
        {"id": claimed.episode.id, "fence": claimed.fence, "outcome": json.dumps(outcome, default=str)},
    ):
        raise _lost(claimed)


def fail(
    connection: Connection,
    claimed: Claim,
    error: str,
    *,
    max_attempts: int = MOST_ATTEMPTS,
    first_retry: timedelta = FIRST_RETRY,
) -> bool:
    """Record that the action failed: it is tried again after a while, or a human is asked.

    Args:
        connection: in a transaction of the first shard.
        claimed: of this run.
        error: in a sentence, without secrets.
        max_attempts: then a human is asked.
        first_retry: the wait after the first attempt; doubles with each, up to `LONGEST_RETRY`.

    Returns:
        False when the claim was lost before, and nothing changed.
    """
    arguments = {**_failing(max_attempts, first_retry, error), "id": claimed.episode.id, "fence": claimed.fence}
    return bool(
        _update(connection, f"SET {_FAILED} WHERE id = %(id)s AND fence = %(fence)s AND state = 'acting'", arguments)
    )


def run_ended(
    connection: Connection,
    episode_id: int,
    *,
    run_id: str,
    attempts: int,
    error: str,
    max_attempts: int = MOST_ATTEMPTS,
    first_retry: timedelta = FIRST_RETRY,
) -> bool:
    """Record that a requested run ended badly from outside: before its claim, or killed while it acted.

    Without it a run that ended before its claim would never be requested again, as its run key is used up.

    Args:
        connection: in a transaction of the first shard.
        episode_id: what the run was requested for.
        run_id: of the run.
        attempts: of the episode when it was requested, the last part of the run key.
        error: how it ended, in a sentence.
        max_attempts: then a human is asked.
        first_retry: see `fail`.

    Returns:
        False when it matters to nobody: the episode went on without that run.
    """
    arguments = {
        **_failing(max_attempts, first_retry, error),
        "id": episode_id,
        "run": run_id,
        "requested": attempts,
    }
    counted = _update(
        connection,
        "SET attempts = attempts + 1 WHERE id = %(id)s AND attempts = %(requested)s"
        " AND state IN ('approved', 'action_failed')",
        arguments,
    )
    if counted:
        _update(connection, f"SET {_FAILED} WHERE id = %(id)s", arguments)
        return True
    return bool(
        _update(connection, f"SET {_FAILED} WHERE id = %(id)s AND run_id = %(run)s AND state = 'acting'", arguments)
    )


def reap(
    connection: Connection, *, max_attempts: int = MOST_ATTEMPTS, first_retry: timedelta = FIRST_RETRY
) -> list[Episode]:
    """Give up actions that were silent for their lease: they count as failed.

    Args:
        connection: in a transaction of the first shard.
        max_attempts: then a human is asked.
        first_retry: see `fail`.

    Returns:
        The episodes, as they are now.
    """
    return _update(
        connection,
        f"SET {_FAILED} WHERE id IN (SELECT id FROM scaling.episodes WHERE state = 'acting'"  # noqa: S608
        " AND acting_until < clock_timestamp() ORDER BY id FOR NO KEY UPDATE SKIP LOCKED)",
        _failing(max_attempts, first_retry, "the run that acted on it stopped giving signs of life"),
    )


def set_effect(connection: Connection, episode_id: int, effect: Mapping[str, Any]) -> None:
    """Record what an action changed, measured before and after it.

    Args:
        connection: in a transaction of the first shard.
        episode_id: that was acted on.
        effect: JSON values only.

    Raises:
        UserError: there is no such episode.
    """
    _one(connection, episode_id, lock=True)
    _update(
        connection,
        "SET effect = %(effect)s::jsonb WHERE id = %(id)s",
        {"id": episode_id, "effect": json.dumps(effect, default=str)},
    )


def _failing(max_attempts: int, first_retry: timedelta, error: str) -> dict[str, Any]:
    return {"most": max_attempts, "first": first_retry, "longest": LONGEST_RETRY, "error": error[:LONGEST_ERROR]}


def _lost(claimed: Claim) -> ClaimLostError:
    return ClaimLostError(
        f"episode {claimed.episode.id} ({claimed.episode.rule}) is no longer claimed by run {claimed.episode.run_id}"
    )


def _check_person(by: str) -> None:
    if not by.strip() or by.strip() == AUTO:
        raise UserError(f"say who decides (by): a person's name, not {by!r}")


def _one(connection: Connection, episode_id: int, *, lock: bool = False) -> Episode:
    found = _select(connection, "WHERE id = %(id)s" + (" FOR NO KEY UPDATE" if lock else ""), {"id": episode_id})
    if found:
        return found[0]
    newest = [f"{each.id} ({each.rule}, {each.state})" for each in listing(connection, limit=5)]
    what = f"the newest are: {', '.join(newest)}" if newest else "no threshold has been crossed yet"
    raise UserError(f"there is no episode {episode_id}; {what}")


def _select(connection: Connection, clauses: str, arguments: Mapping[str, Any]) -> list[Episode]:
    rows = connection.execute(f"SELECT {_COLUMNS} FROM scaling.episodes {clauses}".encode(), arguments)  # noqa: S608
    return [_episode(row) for row in rows]


def _update(connection: Connection, change: str, arguments: Mapping[str, Any]) -> list[Episode]:
    rows = connection.execute(f"UPDATE scaling.episodes {change} RETURNING {_COLUMNS}".encode(), arguments)
    return [_episode(row) for row in rows]


def _episode(row: tuple[Any, ...]) -> Episode:
    values = dict(zip(_COLUMNS.split(", "), row, strict=True))
    capability = values["capability"]
    values["capability"] = None if capability is None else Capability(capability)
    values["state"] = EpisodeState(values["state"])
    return Episode(**values)
