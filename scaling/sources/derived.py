"""Metrics that are made of other metrics.

Belongs here: what is computed of the newest samples of others. Does not: any asking of a source, or thresholds.

What cannot be computed is said in a status, like everywhere: a part that is missing is never a zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol, runtime_checkable

from scaling.samples import Sample, Series, Status, measured
from scaling.settings import ScalingSettings

SICK = (Status.ERROR, Status.STALE, Status.PARTIAL)


@dataclass(frozen=True, slots=True)
class Watched:
    """What is known of one metric.

    Attributes:
        every: it is measured once in this time.
        series: of each thing it was measured of.
    """

    every: timedelta
    series: tuple[Series, ...]


Known = Mapping[str, Watched]
"""By metric; what was ever measured and still is in the catalogue."""


@runtime_checkable
class Derived(Protocol):
    """One way to compute a metric; every kind is a frozen dataclass."""

    def derive(self, metric: str, known: Known, settings: ScalingSettings, now: datetime) -> tuple[Sample, ...]:
        """Compute, once.

        Args:
            metric: the name the samples carry.
            known: of the other metrics.
            settings: budgets.
            now: the moment of the measurement.

        Returns:
            The samples; none when there is nothing to compute from yet.
        """

    def describe(self) -> str:
        """What it is computed of, in words for people."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """One metric divided by another one.

    Attributes:
        part: the metric above the line.
        whole: the metric below it.
    """

    part: str
    whole: str

    def derive(self, metric: str, known: Known, settings: ScalingSettings, now: datetime) -> tuple[Sample, ...]:
        """See `Derived`."""
        del settings
        sides = [_only(known, self.part), _only(known, self.whole)]
        if any(side is None for side in sides):
            return ()
        part, whole = (side for side in sides if side is not None)
        evidence = {self.part: part.value, self.whole: whole.value}
        for side in (part, whole):
            if side.value is None:
                return (_without(metric, now, side, evidence),)
        if not whole.value or part.value is None:
            return (Sample(metric, now, None, Status.ERROR, evidence={**evidence, "error": f"{self.whole} is 0"}),)
        return (measured(metric, now, part.value / whole.value, evidence=evidence),)

    def describe(self) -> str:
        """See `Derived`."""
        return f"{self.part} / {self.whole}"


@dataclass(frozen=True, slots=True)
class AiCostRatio:
    """What the AI chat has cost this month, as a share of its budget.

    The bill has whole days only, so the open one is added by the app's own count; without a bill the app's own count
    is all there is.

    Attributes:
        billed: metric of the bill, month to date.
        own: metric of the app's own count, month to date, with `today_usd` in its evidence.
    """

    billed: str
    own: str

    def derive(self, metric: str, known: Known, settings: ScalingSettings, now: datetime) -> tuple[Sample, ...]:
        """See `Derived`."""
        budget = settings.ai_monthly_budget_usd
        if budget is None:
            note = "set AI_MONTHLY_BUDGET_USD, the budget of the AI chat a month"
            return (Sample(metric, now, None, Status.NOT_CONFIGURED, evidence={"note": note}),)
        bill, own = _only(known, self.billed), _only(known, self.own)
        if bill is None or own is None:
            return ()
        period = f"{now.astimezone(UTC):%Y-%m}"
        evidence: dict[str, object] = {"budget_usd": budget, "billed_usd": bill.value, "own_usd": own.value}
        if bill.status is Status.NOT_CONFIGURED or (bill.status is Status.EMPTY and own.value is not None):
            if own.value is None or own.period != period:
                return (_without(metric, now, own, evidence, period),)
            evidence["rests_on"] = "the app's own count, there is no bill yet"
            return (measured(metric, now, own.value / budget, period=period, evidence=evidence),)
        if bill.value is None or bill.period != period:
            return (_without(metric, now, bill, evidence, period),)
        today = own.evidence.get("today_usd") if own.value is not None and own.period == period else None
        evidence["today_usd"] = today
        evidence["rests_on"] = "the bill" + ("" if today is None else ", and the app's own count of today")
        return (measured(metric, now, (bill.value + float(today or 0)) / budget, period=period, evidence=evidence),)

    def describe(self) -> str:
        """See `Derived`."""
        return f"({self.billed} + today's part of {self.own}) / AI_MONTHLY_BUDGET_USD"


@dataclass(frozen=True, slots=True)
class CallsGap:
    """How far the calls that somebody else counted this month are from those counted here, as a share of theirs.

    What is missing there is no gap as far as it was made after their count ends, were the month's calls spread evenly:
    else the first hours of every month would be one.

    Attributes:
        billed: metric of the other side's count, month to date, with `data_complete_until` in its evidence.
        own: metric of the count made here, month to date.
    """

    billed: str
    own: str

    def derive(self, metric: str, known: Known, settings: ScalingSettings, now: datetime) -> tuple[Sample, ...]:
        """See `Derived`."""
        del settings
        billed, own = _only(known, self.billed), _only(known, self.own)
        if billed is None or own is None:
            return ()
        period = f"{now.astimezone(UTC):%Y-%m}"
        until = billed.evidence.get("data_complete_until")
        evidence: dict[str, object] = {self.billed: billed.value, self.own: own.value, "data_complete_until": until}
        for side in (billed, own):
            if side.value is None or side.period != period:
                return (_without(metric, now, side, evidence),)
        theirs, ours = billed.value or 0.0, own.value or 0.0
        if not theirs and ours:
            return (Sample(metric, now, None, Status.ERROR, evidence={**evidence, "error": f"{self.billed} is 0"}),)
        ended = own.at.astimezone(UTC)
        month = ended - ended.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        lag = ended - datetime.fromisoformat(str(until)) if until else timedelta(0)
        unseen = ours * min(max(lag / month, 0.0), 1.0) if month else 0.0
        evidence["made_after_their_count_ends"] = round(unseen)
        apart = max(ours - theirs - unseen, 0.0) if ours > theirs else theirs - ours
        return (measured(metric, now, apart / theirs if theirs else 0.0, evidence=evidence),)

    def describe(self) -> str:
        """See `Derived`."""
        return f"|{self.billed} - {self.own}| / {self.billed}, without what was called after the former's count ends"


@dataclass(frozen=True, slots=True)
class SourceHealth:
    """How long each metric has been without a figure, in periods of its own.

    What was never configured, or never existed here, is not sick: nobody misses it.
    """

    def derive(self, metric: str, known: Known, settings: ScalingSettings, now: datetime) -> tuple[Sample, ...]:
        """See `Derived`; one sample for each metric that is, or was, alive."""
        del settings
        samples = []
        for name in sorted(known):
            alive = [
                each
                for each in known[name].series
                if each.newest.status is not Status.NOT_CONFIGURED
                and (each.last_ok is not None or each.newest.status in SICK)
            ]
            if name == metric or not alive:
                continue
            # What is told apart by dimensions is as healthy as its best one: routes come and go.
            best = min(alive, key=lambda each: now - (each.last_ok or each.first))
            silent = now - (best.last_ok or best.first)
            evidence = {"status": best.newest.status.value, "last_ok": best.last_ok and best.last_ok.isoformat()}
            if best.newest.status in SICK:
                evidence["error"] = best.newest.evidence.get("error") or best.newest.evidence.get("note")
            periods = max(silent / known[name].every, 0.0)
            samples.append(measured(metric, now, periods, dims=f"metric={name}", evidence=evidence))
        return tuple(samples)

    def describe(self) -> str:
        """See `Derived`."""
        return "time since the last good sample of each metric, in its own periods"


def _only(known: Known, name: str) -> Sample | None:
    """The newest sample of a metric that is of everything."""
    series = known[name].series if name in known else ()
    return next((each.newest for each in series if not each.newest.dims), None)


def _without(metric: str, now: datetime, part: Sample, evidence: Mapping[str, object], period: str = "") -> Sample:
    status = part.status if part.status is not Status.OK else Status.STALE
    why = f"{part.metric} is {part.status}" if part.status is not Status.OK else f"{part.metric} is of {part.period}"
    return Sample(metric, now, None, status, "", period, {**evidence, "note": why})
