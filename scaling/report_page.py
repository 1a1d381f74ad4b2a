"""The report as one HTML file: no script, no request, readable on a phone, in light and dark.

Belongs here: the words and classes that the template needs, and writing the file. Does not: what is judged
(`scaling.report`), how it is drawn (`scaling.report_charts`), the layout (`templates/report.html.j2`).
"""

import os
from calendar import month_name
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from tempfile import NamedTemporaryFile

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from scaling import headroom, report_charts
from scaling.catalogue import Recommendation
from scaling.episodes import Episode, EpisodeState
from scaling.errors import UserError
from scaling.headroom import Headroom
from scaling.report import (
    SOON,
    UNAUDITED_AFTER,
    ArchiveMonth,
    MonthState,
    Report,
    Severity,
    anchor,
    reached_about,
)
from scaling.thresholds import Phase
from scaling.units import Unit, shown

FINDINGS_SHOWN = 6
EXPANDED = 2
"""Of the metrics that are nearest to their thresholds; what is open is read, the others are one tap away."""
METER_END = 1.25
"""What the right end of a bar stands for, so that what is past its threshold is seen to be so."""
TEXT_SHOWN = 300
NOTHING = "–"
MONTH_NAMES = list(month_name)[1:]
GLYPHS = {"archived": "✓", "pruned": "✓", "open": "…", "archiving": "↑", "missing": "!", "failed": "✕"}
WORDS = {
    MonthState.ARCHIVED: "archived",
    MonthState.PRUNED: "archived, and pruned from Postgres",
    MonthState.OPEN: "open",
    MonthState.ARCHIVING: "being archived",
    MonthState.MISSING: "closed, not archived",
    MonthState.FAILED: "failed",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer to: is anything wrong."""

    kind: str
    mark: str
    title: str
    detail: str


@dataclass(frozen=True, slots=True)
class Glance:
    """One figure at the top of the page, and the sentence further down."""

    figure: str
    note: str
    kind: str = ""
    sentence: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One metric with a threshold, in the words of the page."""

    title: str
    anchor: str
    value: str
    threshold: str
    used: float | None
    width: float | None
    eta: str
    state: str
    kind: str
    expanded: bool
    picture: Markup | None
    forecast: str
    recommendation: Recommendation | None
    rule: str
    owner: str
    runbook: str


def render(report: Report) -> str:
    """Make the page.

    Args:
        report: what it shows.
    """
    pictures = {
        "calls": _drawn(report_charts.calls(report.days)) if report.days else None,
        "freshness": _drawn(report_charts.freshness(report.days)) if report.newest_fresh else None,
    }
    return _environment().get_template("report.html.j2").render(
        report=report,
        verdict=verdict(report),
        findings_shown=FINDINGS_SHOWN,
        saved=report.saved(7),
        fresh=report.newest_fresh,
        well=_well(report),
        archived=_archived(report),
        chain=_chain(report),
        thresholds=list(_rows(report)),
        pictures=pictures,
        years=_years(report.months),
        month_names=MONTH_NAMES,
        glyphs=GLYPHS,
        legend=[
            (state.value, words, count)
            for state, words in WORDS.items()
            if (count := sum(month.state is state for month in report.months))
        ],
    )  # fmt: skip


def write(page: str, path: Path) -> None:
    """Put the page where it is wanted, whole or not at all: somebody may be reading the one before.

    Args:
        page: of `render`.
        path: of the file; its directory is made.

    Raises:
        UserError: it cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False) as partial:
            partial.write(page)
        # A temporary file is its owner's alone; the page is for whoever may enter the directory.
        Path(partial.name).chmod(0o644)
        os.replace(partial.name, path)  # noqa: PTH105 - the same as Path.replace, on names
    except OSError as error:
        raise UserError(f"the report cannot be written to {path} ({error.strerror}); name another file") from None


def verdict(report: Report) -> Verdict:
    """Say in a sentence whether anything is wrong.

    Args:
        report: with its findings.
    """
    act = sum(each.severity is Severity.ACT for each in report.findings)
    look = len(report.findings) - act
    others = f"{_count(look, 'thing')} to look at besides." if look else "Nothing else to look at."
    if act:
        return Verdict("act", "!", f"{_count(act, 'thing')} {'need' if act > 1 else 'needs'} somebody now", others)
    if look:
        return Verdict("look", "i", "Nothing is broken", f"{_count(look, 'thing')} to look at in the next days.")
    recorded = [kept for kept in (report.days, report.thresholds, report.evidence, report.chain) if kept]
    if not recorded and report.last_run_at is None:
        return Verdict("unknown", "?", "Nothing is recorded yet", "No run, no figure and no month: nobody can tell.")
    if not report.thresholds:
        return Verdict("unknown", "?", "Nothing is known to be wrong", "But no threshold has been measured yet.")
    return Verdict("well", "✓", "All is well", f"{_count(len(report.thresholds), 'metric')} measured, none needs you.")


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _well(report: Report) -> Glance:
    total = sum(report.healths.values())
    if not total:
        return Glance(NOTHING, "no workspace was synced yet")
    stuck = report.healths.get("needs_human", 0)
    degraded = report.healths.get("degraded", 0)
    said = [f"{stuck:,} {'needs' if stuck == 1 else 'need'} a human"] * bool(stuck)
    said += [f"{degraded:,} {'recovers' if degraded == 1 else 'recover'}"] * bool(degraded)
    return Glance(
        f"{total - stuck - degraded:,} / {total:,}",
        ", ".join(said) or "all of them",
        "act" if stuck else "" if degraded else "well",
    )


def _archived(report: Report) -> Glance:
    closed = [month for month in report.months if month.state is not MonthState.OPEN]
    kept = [month for month in closed if month.state in (MonthState.ARCHIVED, MonthState.PRUNED)]
    rows, size = sum(month.rows for month in kept), sum(month.size for month in kept)
    if not kept:
        return Glance(NOTHING, "nothing is archived yet", sentence="Nothing is archived yet.")
    failed = sum(month.state is MonthState.FAILED for month in closed)
    missing = len(closed) - len(kept) - failed
    said = [f"{failed} failed"] * bool(failed) + [f"{missing} to go"] * bool(missing)
    return Glance(
        f"{len(kept):,} / {len(closed):,}",
        ", ".join(said) or f"{rows:,} rows",
        "act" if failed else "look" if missing else "well",
        f"{len(kept):,} of {len(closed):,} closed months are in the archive: {rows:,} rows, {shown(size, Unit.BYTES)}.",
    )


def _chain(report: Report) -> Glance:
    if not report.chain:
        return Glance(NOTHING, "no end is pinned")
    links = f"{sum(end.sequence for end in report.chain):,}"
    audits = [end.audit for end in report.chain if end.audit]
    findings = sum(audit.findings for audit in audits)
    if findings:
        return Glance(links, f"{_count(findings, 'finding')} of the audit", "act")
    signed = all(end.signed for end in report.chain)
    said = "signed" if signed else "not signed"
    if len(audits) < len(report.chain):
        return Glance(links, f"{said}, never audited", "look")
    oldest = min(audit.ended_at for audit in audits)
    sound = signed and report.now - oldest <= UNAUDITED_AFTER
    return Glance(links, f"{said}, audited {_age(oldest, report.now)}", "well" if sound else "look")


def _rows(report: Report) -> Iterator[Row]:
    for number, row in enumerate(report.thresholds):
        used = row.used
        yield Row(
            f"{row.metric.title} ({row.dims})" if row.dims else row.metric.title,
            anchor(row),
            headroom.value_in_words(row),
            headroom.threshold_in_words(row.metric),
            used,
            None if used is None else round(100 * min(max(used, 0.0), METER_END) / METER_END, 1),
            reached_about(row),
            headroom.state_in_words(row),
            _kind(row, report.now),
            number < EXPANDED,
            _drawn(report_charts.trend(row, number, report.now)) if len(row.history) > 1 else None,
            _sentence(row.forecast.reason) if row.forecast else "",
            row.metric.recommendation,
            headroom.condition_in_words(row.metric),
            row.metric.owner,
            row.metric.runbook,
        )


def _sentence(reason: str) -> str:
    return f"{reason[:1].upper()}{reason[1:]}{'' if reason.endswith('.') else '.'}"


def _kind(row: Headroom, now: datetime) -> str:
    if row.state is None:
        return "act" if row.crossed else "unknown"
    if row.state.phase is Phase.FIRED or row.crossed:
        return "act"
    if row.state.phase in (Phase.PENDING, Phase.CLEARING, Phase.LATCHED) or row.state.missing:
        return "look"
    if row.forecast and row.forecast.p50 and row.forecast.p50 - now <= SOON:
        return "look"
    return "well" if row.state.phase is Phase.OK else "unknown"


def _years(months: Sequence[ArchiveMonth]) -> list[tuple[int, list[ArchiveMonth | None]]]:
    by_year: dict[int, list[ArchiveMonth | None]] = {}
    for month in months:
        by_year.setdefault(month.first.year, [None] * 12)[month.first.month - 1] = month
    return sorted(by_year.items(), reverse=True)


def _drawn(svg: str) -> Markup:
    return Markup(svg)  # noqa: S704 - made by matplotlib and report_charts, which escape what is written in it


def _environment() -> Environment:
    environment = Environment(loader=PackageLoader("scaling"), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {
        "age": _age,
        "bytes": lambda size: shown(float(size), Unit.BYTES),
        "day": _day,
        "duration": _duration,
        "episode_kind": _episode_kind,
        "moment": _moment,
        "number": lambda figure: f"{figure:,}",
        "share": lambda part: NOTHING if part is None else f"{part:.1%}",
        "short": lambda text: text if len(text) <= TEXT_SHOWN else f"{text[:TEXT_SHOWN]} …",
        "usd": lambda figure: f"${figure:,.2f}" if figure >= 0.01 or not figure else "under $0.01",
        "value": headroom.value_in_words,
        "words": lambda name: name.replace("_", " "),
    }
    return environment


def _day(day: date) -> str:
    return f"{day.day} {day:%B %Y}"


def _moment(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _age(at: datetime, now: datetime) -> str:
    seconds = (now - at).total_seconds()
    for length, name in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
        if seconds >= length:
            return f"{_count(int(seconds // length), name)} ago"
    return "just now"


def _duration(seconds: int) -> str:
    for length, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.3g} {name}" if seconds < 7 * 86_400 else "over a week"
    return f"{seconds} s"


def _episode_kind(episode: Episode) -> str:
    match episode.state:
        case EpisodeState.NEEDS_HUMAN:
            return "act"
        case EpisodeState.PROPOSED | EpisodeState.ACTION_FAILED:
            return "look"
        case EpisodeState.ACTED:
            return "well"
        case _:
            return "look" if episode.recovered_at is None and episode.acknowledged_by is None else "unknown"
