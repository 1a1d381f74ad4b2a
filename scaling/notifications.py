"""Who is told what, once: the outbox of alerts.

Belongs here: what of episodes, gaps and failed runs is worth a message, writing it before it is sent, sending what is
due, trying again. Does not: how a channel takes it (`scaling.notifier`).

A look is level-triggered: it compares what is with what was told, so a killed daemon or a second one changes nothing.
A message is written for each channel in one transaction, once per subject and what happened to it. An attempt moves the
next one ahead before it begins; one that dies, or whose success could not be noted, is made again with the same key. So
each message arrives at least once as long as its channel comes back within `GIVEN_UP_AFTER`.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import NAMESPACE_OID, UUID, uuid5

from scaling import episodes
from scaling.catalogue import OWNER, Catalogue, Metric
from scaling.databases import Connection, Shard
from scaling.episodes import Episode, EpisodeState
from scaling.headroom import threshold_in_words
from scaling.notifier import Channel, Failed, Happened, Message, Sender
from scaling.units import shown

FIRST_RETRY = timedelta(minutes=1)
LONGEST_RETRY = timedelta(hours=1)
GIVEN_UP_AFTER = timedelta(days=3)
KEPT = timedelta(days=400)
"""Of what was told; then the episodes are old too."""
LOOKED_BACK = timedelta(days=14)
"""An effect is measured within a week of the switch."""
SECONDS_TO_SEND = 35.0
"""Of one look; Dagster ends a sensor after 60 s, and one attempt may take a few timeouts."""
FOR_EPISODES = (Channel.SLACK, Channel.WEBHOOK, Channel.EMAIL)
NOT_REPEATED = (Happened.FIRED, Happened.PROPOSED, Happened.NEEDS_HUMAN)
"""What somebody who has acknowledged the episode knows."""


@dataclass(frozen=True, slots=True)
class Sent:
    """How a look went.

    Attributes:
        written: messages that are new.
        sent: that were taken.
        failed: channel to why it did not take one.
    """

    written: int
    sent: int
    failed: Mapping[Channel, str]

    @property
    def sentence(self) -> str:
        """For people."""
        said = f"{self.written} new, {self.sent} sent"
        return said + "".join(f"; {channel} is tried again: {why}" for channel, why in self.failed.items()) + "."


@dataclass(frozen=True, slots=True)
class Waiting:
    """Messages that did not arrive.

    Attributes:
        late: written over an hour ago, and still tried.
        dropped: given up in the last days.
    """

    late: int
    dropped: int


def look(shard: Shard, catalogue: Catalogue, senders: Mapping[Channel, Sender], now: datetime) -> Sent:
    """Write what is to be told, and send what is due.

    Args:
        shard: the first one.
        catalogue: the metrics.
        senders: the channels that are configured.
        now: the moment of the look.

    Raises:
        UserError: the database does not answer.
    """
    with shard.transaction() as connection:
        written = write(connection, catalogue, [each for each in FOR_EPISODES if each in senders], now)
    sent, failed = deliver(shard, senders)
    return Sent(written, sent, failed)


def write(connection: Connection, catalogue: Catalogue, channels: Sequence[Channel], now: datetime) -> int:
    """Write what episodes and gaps are to tell, and drop what is no longer worth it.

    Args:
        connection: in a transaction of the first shard.
        catalogue: the metrics.
        channels: that are told; none: nothing is written, so a channel that is added is told what is open then.
        now: the moment of the look.

    Returns:
        How many messages are new.
    """
    _drop(connection)
    if not channels:
        return 0
    told: dict[int, set[tuple[str, str]]] = {}
    for episode_id, happened, channel in connection.execute(
        "SELECT episode_id, happened, channel FROM scaling.notifications"
        " WHERE episode_id IS NOT NULL AND channel = ANY(%s) AND written_at > %s",
        [[each.value for each in channels], now - KEPT],
    ):
        told.setdefault(episode_id, set()).add((happened, channel))
    written = 0
    for episode in episodes.recent(connection, now - LOOKED_BACK):
        already = told.get(episode.id, set())
        for channel in channels:
            before = {happened for happened, where in already if where == channel.value}
            for happened in _worth_telling(episode, before):
                if happened.value not in before:
                    written += _insert(
                        connection, of_episode(episode, catalogue.get(episode.rule), happened), [channel]
                    )
    for standing in episodes.standings(connection):
        metric = catalogue.get(standing.rule)
        if metric is not None and standing.state.missing:
            since = standing.state.gap_since or standing.state.last_at
            written += _insert(connection, of_gap(metric, standing.dims, since), channels)
    return written


def note(connection: Connection, message: Message, channels: Iterable[Channel]) -> int:
    """Write one message for every channel that was not told it before.

    Args:
        connection: in a transaction of the first shard.
        message: what happened.
        channels: that are to be told.

    Returns:
        How many are new.
    """
    return _insert(connection, message, list(channels))


def deliver(
    shard: Shard, senders: Mapping[Channel, Sender], *, seconds: float = SECONDS_TO_SEND
) -> tuple[int, dict[Channel, str]]:
    """Send what is due, the oldest first; a channel that fails is left alone until the next look.

    Args:
        shard: the first one.
        senders: the channels that are configured; messages of others wait.
        seconds: no attempt is begun later.

    Returns:
        How many were taken, and why a channel did not take one.

    Raises:
        UserError: the database does not answer.
    """
    sent, failed = 0, dict[Channel, str]()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        open_channels = [channel for channel in senders if channel not in failed]
        with shard.transaction() as connection:
            due = _take(connection, open_channels)
        if due is None:
            break
        number, channel, key, message, written_at = due
        problem = senders[channel].send(message, key, written_at)
        with shard.transaction() as connection:
            _settle(connection, number, problem)
        if problem is None:
            sent += 1
        else:
            failed[channel] = problem.sentence
    return sent, failed


def waiting(connection: Connection) -> Waiting:
    """Count what did not arrive.

    Args:
        connection: in a transaction of the first shard.
    """
    row = connection.execute(
        "SELECT count(*) FILTER (WHERE dropped_at IS NULL AND written_at < clock_timestamp() - interval '1 hour'),"
        " count(*) FILTER (WHERE dropped_at > clock_timestamp() - interval '3 days' AND attempts > 0)"
        " FROM scaling.notifications WHERE sent_at IS NULL"
    ).fetchone() or (0, 0)
    return Waiting(*row)


def of_episode(episode: Episode, metric: Metric | None, happened: Happened) -> Message:
    """What is told of an episode.

    Args:
        episode: as it is.
        metric: it is about; None: the catalogue no longer has it.
        happened: to it.
    """
    of = f" ({episode.dims})" if episode.dims else ""
    name = (metric.title if metric else episode.rule) + of
    value = shown(episode.value, metric.unit) if metric else f"{episode.value:g}"
    limit = threshold_in_words(metric) if metric else f"{episode.threshold:g}"
    crossed = f"It was {value} at {episode.fired_at:%Y-%m-%d %H:%M} UTC, threshold {limit}."
    approve = f"python -m scaling approve {episode.id} --by NAME"
    match happened:
        case Happened.FIRED:
            title, text = f"{name} is over its threshold", crossed
            if episode.state in (EpisodeState.APPROVED, EpisodeState.ACTING, EpisodeState.ACTION_FAILED):
                text += f" {episode.capability} acts on it by itself."
        case Happened.PROPOSED:
            title = f"{name} is over its threshold; {episode.capability} waits for approval"
            text = f"{crossed} Read what it would do, then approve; job approve_episode does the same."
        case Happened.NEEDS_HUMAN:
            title = f"{name}: episode {episode.id} needs a human"
            text = f"{crossed} Given up after {episode.attempts} attempts: {episode.error or 'its rule flaps'}"
        case Happened.ACTED:
            title = f"{name}: {episode.capability} has acted"
            text = str((episode.effect or {}).get("sentence", ""))
        case _:
            title = f"{name} has recovered"
            text = f"{crossed} It recovered at {episode.recovered_at:%Y-%m-%d %H:%M} UTC."
    asks = happened in NOT_REPEATED
    return Message(
        happened,
        f"episode {episode.id}",
        title,
        text,
        metric.owner if metric else OWNER,
        metric.runbook if metric else "docs/operations.md",
        _recommendation(metric) if asks else {},
        approve if asks and happened is not Happened.FIRED and episode.capability else "",
        {"rule": episode.rule, "of": episode.dims, "value": episode.value, "threshold": episode.threshold},
        episode.id,
    )


def of_gap(metric: Metric, dims: str, since: datetime | None) -> Message:
    """What is told of a metric without data.

    Args:
        metric: that is not measured.
        dims: what it was measured of.
        since: the last good figure; None: there never was one.
    """
    when = f"{since:%Y-%m-%d %H:%M} UTC" if since else "the beginning"
    of = f" ({dims})" if dims else ""
    return Message(
        Happened.DATA_MISSING,
        f"data of {metric.name}{of} since {when}",
        f"{metric.title}{of} has no data since {when}",
        f"Its rule neither fires nor recovers meanwhile. python -m scaling explain {metric.name} shows why.",
        metric.owner,
        metric.runbook,
        facts={"rule": metric.name, "of": dims},
    )


def of_failed_run(
    location: str, job: str, run_id: str, what: str, sentence: str, runbook: str, at: datetime
) -> Message:
    """What is told of a failed run; of a job that goes on failing with the same sentence once an hour.

    Args:
        location: code location.
        job: its name.
        run_id: of the run.
        what: its partition; empty: it has none.
        sentence: it failed with.
        runbook: where it says what to do.
        at: when.
    """
    digest = hashlib.sha256(f"{what}\n{sentence}".encode()).hexdigest()[:12]
    of = f" ({what})" if what else ""
    return Message(
        Happened.RUN_FAILED,
        f"{location}: runs of {job} that failed at {at:%Y-%m-%d %H}h, {digest}",
        f"Run {run_id} of {job}{of} failed",
        sentence,
        OWNER,
        runbook,
        facts={"location": location, "job": job, "run": run_id, "partition": what},
    )


def key_of(message: Message) -> UUID:
    """The key of a message that no database could give one.

    Args:
        message: to be sent.
    """
    return uuid5(NAMESPACE_OID, f"{message.subject} {message.happened}")


def _worth_telling(episode: Episode, before: Sequence[str] | set[str]) -> list[Happened]:
    """What has happened to an episode, in order; of its beginning one message, the one that asks for most."""
    known = episode.acknowledged_by is not None
    over = episode.recovered_at is not None
    began = bool(set(before) & {each.value for each in NOT_REPEATED})
    said: list[Happened] = []
    match episode.state:
        case EpisodeState.NEEDS_HUMAN if (episode.attempts or not known) and not (over and not episode.attempts):
            said.append(Happened.NEEDS_HUMAN)
        case EpisodeState.PROPOSED if not known and not over:
            said.append(Happened.PROPOSED)
        case EpisodeState.OBSERVED | EpisodeState.APPROVED | EpisodeState.ACTING | EpisodeState.ACTION_FAILED if (
            not known and not over and not began
        ):
            said.append(Happened.FIRED)
        case EpisodeState.ACTED if (episode.effect or {}).get("sentence"):
            said.append(Happened.ACTED)
        case _:
            pass
    if over and before:
        said.append(Happened.RECOVERED)
    return said


def _recommendation(metric: Metric | None) -> dict[str, str]:
    if metric is None or metric.recommendation is None:
        return {}
    return {
        "What to do": metric.recommendation.do,
        "What it changes": metric.recommendation.effect,
        "What it costs": metric.recommendation.cost,
    }


def _insert(connection: Connection, message: Message, channels: Sequence[Channel]) -> int:
    return connection.execute(
        "INSERT INTO scaling.notifications (subject, happened, channel, episode_id, message)"
        " SELECT %s, %s, channel, %s, %s::jsonb FROM unnest(%s::text[]) channel ON CONFLICT DO NOTHING",
        [
            message.subject,
            message.happened.value,
            message.episode,
            json.dumps(message.to_json()),
            [each.value for each in channels],
        ],
    ).rowcount


def _drop(connection: Connection) -> None:
    connection.execute(
        "UPDATE scaling.notifications n SET dropped_at = clock_timestamp(), error = 'somebody has acknowledged it'"
        " FROM scaling.episodes e WHERE e.id = n.episode_id AND e.acknowledged_by IS NOT NULL AND e.attempts = 0"
        " AND n.sent_at IS NULL AND n.dropped_at IS NULL AND n.happened = ANY(%s)",
        [[each.value for each in NOT_REPEATED]],
    )
    connection.execute(
        "UPDATE scaling.notifications SET dropped_at = clock_timestamp(), error = coalesce(error, 'nobody took it')"
        " WHERE sent_at IS NULL AND dropped_at IS NULL AND written_at < clock_timestamp() - %s::interval",
        [GIVEN_UP_AFTER],
    )


def _take(connection: Connection, channels: Sequence[Channel]) -> tuple[int, Channel, UUID, Message, datetime] | None:
    """Begin an attempt: what it is worth is noted before it is made, so that nobody else makes it meanwhile."""
    row = connection.execute(
        "UPDATE scaling.notifications SET attempts = attempts + 1, next_at = clock_timestamp()"
        " + least(%(first)s::interval * 2 ^ least(attempts, 30), %(longest)s::interval)"
        " WHERE id = (SELECT id FROM scaling.notifications WHERE sent_at IS NULL AND dropped_at IS NULL"
        " AND next_at <= clock_timestamp() AND channel = ANY(%(channels)s)"
        " ORDER BY id LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED)"
        " RETURNING id, channel, key, message, written_at",
        {"first": FIRST_RETRY, "longest": LONGEST_RETRY, "channels": [each.value for each in channels]},
    ).fetchone()
    if row is None:
        return None
    number, channel, key, message, written_at = row
    return number, Channel(channel), key, Message.from_json(message), written_at


def _settle(connection: Connection, number: int, problem: Failed | None) -> None:
    if problem is None:
        connection.execute(
            "UPDATE scaling.notifications SET sent_at = clock_timestamp(), error = NULL WHERE id = %s", [number]
        )
        return
    connection.execute(
        "UPDATE scaling.notifications SET error = %(why)s, next_at = greatest(next_at, clock_timestamp()"
        " + make_interval(secs => %(wait)s)) WHERE id = %(id)s",
        {"why": problem.sentence, "wait": problem.retry_after or 0, "id": number},
    )
