"""The thresholds on a terminal: where each metric stands, why, and what a person decides.

Belongs here: tables and sentences of ``python -m scaling status | explain | replay | measure | capabilities …``. Does
not: arguments (`scaling.__main__`), or anything they show (`scaling.headroom`, `scaling.episodes`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import httpx
from rich.console import Console
from rich.panel import Panel
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from scaling import capabilities, episodes, headroom, measure, samples
from scaling.capabilities import in_force, modes, named
from scaling.databases import Connection, DatabaseRouter
from scaling.episodes import Episode, EpisodeState
from scaling.headroom import Headroom
from scaling.overrides import configured
from scaling.samples import Sample, Status
from scaling.settings import DatabaseSettings, ScalingSettings, load
from scaling.sources import Reach
from scaling.thresholds import Phase
from scaling.units import Unit, shown

SAMPLES_SHOWN = 12
UNDECIDED = (EpisodeState.OBSERVED, EpisodeState.PROPOSED, EpisodeState.NEEDS_HUMAN)
EPISODES_SHOWN = 10
COLOURS = {Phase.FIRED: "red", Phase.CLEARING: "yellow", Phase.PENDING: "yellow", Phase.LATCHED: "cyan"}


@contextmanager
def databases(name: str) -> Iterator[DatabaseRouter]:
    """Open the databases of the environment.

    Args:
        name: of the command, shown in ``pg_stat_activity``.

    Raises:
        UserError: a setting is missing or wrong.
    """
    with DatabaseRouter.from_settings(load(DatabaseSettings), application_name=f"scaling {name}") as router:
        yield router


@contextmanager
def first_shard(name: str) -> Iterator[Connection]:
    """Begin a transaction where the thresholds keep their tables.

    Args:
        name: of the command.

    Raises:
        UserError: a setting is missing or wrong, or the database does not answer.
    """
    with databases(name) as router, router.shards()[0].transaction() as connection:
        yield connection


def status(console: Console) -> int:
    """Print every metric: value, threshold, how much is used up, when it will cross, where its rule stands.

    Args:
        console: where the table goes.

    Returns:
        0; a crossed threshold is no failure of the command.
    """
    now = datetime.now(UTC)
    known = configured(load(ScalingSettings))
    with first_shard("status") as connection:
        rows = headroom.table(connection, known, now)
        waiting = episodes.listing(connection, states=UNDECIDED, limit=EPISODES_SHOWN)
    asleep = [row for row in rows if row.sample is None or row.sample.status is Status.NOT_CONFIGURED]
    empty = [row for row in rows if row.sample is not None and row.sample.status is Status.EMPTY]
    quiet = [row for row in rows if row.metric.name == "source_health" and not row.crossed]
    table = Table(title=f"Scaling thresholds, {now:%Y-%m-%d %H:%M} UTC", title_justify="left")
    for heading in ("metric", "value", "threshold", "used", "crosses about", "state"):
        table.add_column(heading, justify="right" if heading in ("value", "threshold", "used") else "left")
    for row in headroom.by_urgency([row for row in rows if row not in (*asleep, *empty, *quiet) and row.metric.rule]):
        table.add_row(*_cells(row))
    if table.row_count:
        console.print(table)
    for row in rows:
        if row not in (*asleep, *empty) and not row.metric.rule:
            console.print(f"evidence: {row.name} is {headroom.value_in_words(row)}", soft_wrap=True)
    if empty:
        console.print(f"nothing of it here: {', '.join(row.name for row in empty)}", soft_wrap=True)
    if asleep:
        console.print(_asleep(asleep), soft_wrap=True)
    for episode in waiting:
        console.print(_waits(episode), soft_wrap=True, markup=False)
    return 0


def explain(console: Console, name: str) -> int:
    """Print all there is to know of one metric.

    Args:
        console: where it goes.
        name: of the metric.

    Returns:
        0.

    Raises:
        UserError: there is no such metric.
    """
    now = datetime.now(UTC)
    known = configured(load(ScalingSettings))
    metric = known.named(name)
    with first_shard("explain") as connection:
        rows = headroom.table(connection, known, now, only=name)
        recent = samples.history(connection, name)[-SAMPLES_SHOWN * max(len(rows), 1) :]
        found = [each for each in episodes.listing(connection, limit=1000) if each.rule == name][:EPISODES_SHOWN]
    console.print(Panel(f"[bold]{metric.title}[/bold] ({metric.name}), {metric.unit}", expand=False))
    console.print(f"Asked: {metric.source.describe()}", soft_wrap=True, markup=False)
    console.print(headroom.condition_in_words(metric), soft_wrap=True, markup=False)
    if metric.capability:
        console.print(f"A crossing is about the capability {metric.capability}.", soft_wrap=True)
    for row in rows:
        of = f" of {row.dims}" if row.dims else ""
        console.print(
            f"Now{of}: {headroom.value_in_words(row)}; {headroom.state_in_words(row)}"
            + (f"; {row.forecast.reason}" if row.forecast else "")
            + ".",
            soft_wrap=True,
            markup=False,
        )
    if recent:
        console.print(_samples(recent, metric.unit))
        console.print(f"Evidence of the newest: {_evidence(recent[-1])}", soft_wrap=True, markup=False)
    if found:
        console.print(_episodes(found, metric.unit))
    if metric.recommendation:
        for heading, text in (
            ("What to do", metric.recommendation.do),
            ("What it changes", metric.recommendation.effect),
            ("What it costs", metric.recommendation.cost),
        ):
            console.print(f"[bold]{heading}:[/bold] {text}", soft_wrap=True)
    runbook = f" Runbook: {metric.runbook}" if metric.runbook else ""
    console.print(f"Owner: {metric.owner}.{runbook}", soft_wrap=True, markup=False)
    return 0


def replay(console: Console, name: str, changed: Mapping[str, object]) -> int:
    """Print what the rule of a metric would have done on everything on record.

    Args:
        console: where it goes.
        name: of the metric.
        changed: attributes of the rule that are to differ.

    Returns:
        0.

    Raises:
        UserError: there is no such metric, it has no rule, or the changed rule cannot work.
    """
    metric, _ = configured(load(ScalingSettings)).judged(name)
    with first_shard("replay") as connection:
        rule, found = headroom.replay(connection, metric, changed)
    tried = headroom.condition_in_words(replace(metric, rule=rule))
    console.print(f"Tried, and nothing is changed by it: {tried}", soft_wrap=True, markup=False)
    if not found:
        console.print("Nothing is on record.")
    for each in found:
        of = f" of {each.dims}" if each.dims else ""
        console.print(f"{each.samples} samples{of}, {len(each.events)} events; at the end it is {each.state.phase}.")
        for sample, event in each.events:
            console.print(f"  {sample.at:%Y-%m-%d %H:%M}  {headroom.event_in_words(metric, event)}", markup=False)
    return 0


def measure_now(console: Console, names: Sequence[str]) -> int:
    """Measure, record and judge, as the hourly run does.

    Args:
        console: where the outcome goes.
        names: of the metrics to measure, due or not; none: whatever is due.

    Returns:
        0; a source that does not answer is a sample, and no failure of the command.

    Raises:
        UserError: there is no such metric, or the database does not answer.
    """
    settings = load(ScalingSettings)
    known = configured(settings)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn())
    with (
        databases("measure") as router,
        httpx.Client() as client,
        Progress(*columns, console=console, transient=True) as bar,
    ):
        task = bar.add_task("measuring", total=len(names) or len(known.metrics))
        done = measure.measure(
            known,
            modes(settings),
            Reach(router, client, settings, datetime.now(UTC)),
            only=names or None,
            progress=lambda _: bar.advance(task),
        )
    table = Table("metric", "of", "value", "status")
    for sample in done.samples:
        value = "" if sample.value is None else shown(sample.value, known.named(sample.metric).unit)
        why = sample.evidence.get("error") or sample.evidence.get("note") or ""
        table.add_row(sample.metric, sample.dims, value, f"{sample.status.value}{': ' if why else ''}{why}")
    if table.row_count:
        console.print(table)
    for each in done.happened:
        of = f" ({each.dims})" if each.dims else ""
        metric = known.named(each.rule)
        console.print(f"{each.rule}{of} {headroom.event_in_words(metric, each.event)}", soft_wrap=True, markup=False)
    console.print(f"{len(done.samples)} figures taken, {len(done.not_due)} metrics not due.")
    return 0


def report(console: Console, out: Path | None) -> int:
    """Write the page for people without Grafana.

    Args:
        console: where the verdict goes.
        out: the file; None: SCALING_REPORT_FILE.

    Returns:
        0, whatever the page says.

    Raises:
        UserError: a database does not answer, or the file cannot be written.
    """
    from scaling import report as facts  # matplotlib takes 0.6 s to import, and the other commands draw nothing
    from scaling import report_page

    path = out or load(ScalingSettings).scaling_report_file
    with databases("report") as router:
        found = facts.current(router)
    report_page.write(report_page.render(found), path)
    said = report_page.verdict(found)
    console.print(f"{said.title}. {said.detail}", soft_wrap=True, markup=False)
    for each in found.findings:
        console.print(f"  {each.severity.value}: {each.title}; {each.do}", soft_wrap=True, markup=False)
    console.print(f"The page is {path.absolute().as_uri()}", soft_wrap=True, markup=False)
    return 0


def rearm(console: Console, name: str, dims: str, by: str) -> int:
    """Let a rule fire again.

    Args:
        console: where the outcome goes.
        name: of the metric.
        dims: what it is measured of.
        by: who decides.

    Returns:
        0.

    Raises:
        UserError: there is no such metric, it is armed, or nobody is named.
    """
    _, rule = configured(load(ScalingSettings)).judged(name)
    with first_shard("rearm") as connection:
        episodes.rearm(connection, rule, dims, by)
    console.print(f"{name} is armed again by {by}; the next sample that breaches begins a new episode.", soft_wrap=True)
    return 0


def show_capabilities(console: Console) -> int:
    """Print every capability: its mode, whether it is in force, and who switched it last and why.

    Args:
        console: where the table goes.

    Returns:
        0.
    """
    wanted = modes(load(ScalingSettings))
    with first_shard("capabilities") as connection:
        switched = capabilities.switched(connection)
        last = {change.capability: change for change in reversed(capabilities.changes(connection))}
    table = Table("capability", "mode", "in force", "switched", "by", "why")
    for each, mode in wanted.items():
        change = last.get(each)
        table.add_row(
            each.value,
            mode.value,
            "yes" if in_force(mode, switched_on=each in switched) else "no",
            f"{'on' if change.active else 'off'} {change.changed_at:%Y-%m-%d %H:%M}" if change else "never",
            change.changed_by if change else "",
            change.reason if change else "",
        )
    console.print(table)
    return 0


def switch(console: Console, name: str, *, on: bool, by: str, reason: str) -> int:
    """Switch a capability by hand.

    Args:
        console: where the outcome goes.
        name: of the capability.
        on: whether it is to be on.
        by: who decides.
        reason: why.

    Returns:
        0, also when it already was so.

    Raises:
        UserError: there is no such capability, or who or why is missing.
    """
    capability = named(name)
    mode = modes(load(ScalingSettings))[capability]
    with first_shard("switch") as connection:
        changed = capabilities.switch(connection, capability, on=on, by=by, reason=reason)
    now = in_force(mode, switched_on=on)
    holds = "" if now is on else f" SCALING_{name.upper()} is {mode}, so it is {'' if now else 'not '}in force anyway."
    state = "on" if on else "off"
    said = f"{name} is switched {state}, from the next run on." if changed else f"{name} was {state} already."
    console.print(said + holds, soft_wrap=True)
    return 0


def decide(console: Console, what: str, episode: int, by: str) -> int:
    """Approve or acknowledge an episode, and say what that changed.

    Args:
        console: where the outcome goes.
        what: ``approve`` or ``acknowledge``.
        episode: its number.
        by: who decides.

    Returns:
        0, also when there was nothing to change.

    Raises:
        UserError: there is no such episode, or nobody is named.
    """
    decide_on = episodes.approve if what == "approve" else episodes.acknowledge
    with first_shard(what) as connection:
        decision = decide_on(connection, episode, by)
    console.print(decision.sentence, soft_wrap=True)
    return 0


def _cells(row: Headroom) -> tuple[str, ...]:
    colour = COLOURS.get(row.state.phase) if row.state else None
    state = headroom.state_in_words(row)
    return (
        row.name,
        headroom.value_in_words(row),
        headroom.threshold_in_words(row.metric),
        "" if row.used is None else f"{row.used:.0%}",
        headroom.eta_in_words(row),
        f"[{colour}]{state}[/{colour}]" if colour else state,
    )


def _asleep(rows: Sequence[Headroom]) -> str:
    missing = ", ".join(row.name for row in rows if row.sample is None)
    unset: dict[str, list[str]] = {}
    for row in rows:
        if row.sample is not None:
            unset.setdefault(str(row.sample.evidence.get("note", "")), []).append(row.name)
    said = [f"not measured yet (python -m scaling measure): {missing}"] if missing else []
    said += [f"not configured: {', '.join(names)} - {why}" for why, names in unset.items()]
    return "\n".join(said)


def _waits(episode: Episode) -> str:
    what = f"episode {episode.id}, {episode.rule}, {episode.state.value.replace('_', ' ')}"
    if episode.capability is None:
        return f"{what}: python -m scaling explain {episode.rule} says what to do"
    return f"{what}: python -m scaling approve {episode.id} --by NAME lets {episode.capability} act"


def _samples(recent: Sequence[Sample], unit: Unit) -> Table:
    table = Table("measured", "of", "value", "status", title="Newest samples", title_justify="left")
    for sample in recent:
        value = "" if sample.value is None else shown(sample.value, unit)
        table.add_row(f"{sample.at:%Y-%m-%d %H:%M}", sample.dims, value, sample.status.value)
    return table


def _evidence(sample: Sample) -> str:
    return ", ".join(f"{key} {value}" for key, value in sample.evidence.items() if key != "query_sha256") or "none"


def _episodes(found: Sequence[Episode], unit: Unit) -> Table:
    table = Table("episode", "fired", "value", "recovered", "state", "by", "effect", title="Episodes")
    table.title_justify = "left"
    for episode in found:
        table.add_row(
            str(episode.id),
            f"{episode.fired_at:%Y-%m-%d %H:%M}",
            shown(episode.value, unit),
            f"{episode.recovered_at:%Y-%m-%d %H:%M}" if episode.recovered_at else "",
            episode.state.value,
            episode.approved_by or "",
            str((episode.effect or {}).get("sentence", episode.error or "")),
        )
    return table
