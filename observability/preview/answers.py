"""What each panel of a dashboard asks, asked as Grafana asks it, answered as data frames.

Belongs here: variables filled in, ranges and instants, frames as Grafana's two data sources make them. Does not:
drawing (`app.tsx`), the page around it (`page.py`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import httpx
import psycopg
from psycopg import sql

from scaling.errors import UserError

Frame = Mapping[str, Any]
Document = Mapping[str, Any]
POINTS = 720
"""Of a range; Grafana takes one a pixel of the panel's width."""


@dataclass(frozen=True, slots=True)
class Span:
    """What is shown.

    Attributes:
        start: first second, since 1970.
        end: last second, since 1970.
        scrape_seconds: how often Prometheus scrapes, as Grafana's data source is told it.
    """

    start: int
    end: int
    scrape_seconds: int

    @property
    def step(self) -> int:
        """Seconds between points, whole scrapes."""
        return max(1, (self.end - self.start) // POINTS // self.scrape_seconds) * self.scrape_seconds

    @property
    def rate_interval(self) -> int:
        """Grafana's $__rate_interval, in seconds."""
        return max(self.step + self.scrape_seconds, 4 * self.scrape_seconds)

    @property
    def moments(self) -> Sequence[int]:
        """Of all points; like Grafana's, they are multiples of the step."""
        return range(self.start // self.step * self.step, self.end + 1, self.step)


class Sources:
    """The data sources that the panels ask."""

    def __init__(
        self, prometheus: str, span: Span, postgres: psycopg.Connection[Any] | None, tenant: str | None
    ) -> None:
        """Name them.

        Args:
            prometheus: URL.
            span: what is shown.
            postgres: of a login that may read every tenant; None: panels of Postgres stay empty.
            tenant: whose figures are shown; None takes the first.
        """
        self._http = httpx.Client(base_url=prometheus, timeout=60)
        self._span = span
        self._postgres = postgres
        self._tenant = tenant

    def close(self) -> None:
        """Let go of Prometheus."""
        self._http.close()

    def page(self, document: Document, note: str) -> Mapping[str, Any]:
        """Ask everything that one dashboard asks.

        Args:
            document: its JSON.
            note: about where the data is from.

        Returns:
            What `app.tsx` draws.

        Raises:
            UserError: a data source refuses a question, or does not answer.
        """
        variables = {each["name"]: each for each in document["templating"]["list"]}
        values = {name: each["allValue"] for name, each in variables.items() if each.get("includeAll")}
        tenant = self._chosen_tenant(variables["tenant"]["query"]) if "tenant" in variables else None
        chosen = [(variables[name]["label"], "All") for name in values]
        return {
            "dashboard": {name: document[name] for name in ("title", "description", "panels")},
            "chosen": chosen + ([(variables["tenant"]["label"], tenant)] if tenant else []),
            "answers": {
                panel["id"]: self._answers(panel, values, tenant)
                for panel in document["panels"]
                if panel["type"] != "row"
            },
            "from": self._span.start * 1000,
            "to": self._span.end * 1000,
            "note": note,
        }

    def _chosen_tenant(self, query: str) -> str | None:
        if self._tenant is None and self._postgres is not None:
            row = self._postgres.execute(query.encode()).fetchone()
            self._tenant = row[0] if row else None
        return self._tenant

    def _answers(self, panel: Document, values: Mapping[str, str], tenant: str | None) -> Sequence[Frame]:
        frames: list[Frame] = []
        several = len(panel["targets"]) > 1
        for target in panel["targets"]:
            if "rawSql" in target:
                frames += self._table(target, tenant)
                continue
            expression = self._filled(target["expr"], values)
            if target.get("range"):
                found = self._ask(
                    "query_range",
                    expression,
                    start=self._span.moments[0],
                    end=self._span.moments[-1],
                    step=self._span.step,
                )
                frames += [self._series(target, each, each["values"], self._span.moments) for each in found]
                continue
            found = self._ask("query", expression, time=self._span.end)
            if target.get("format") == "table":
                frames += _columns(target, found, several=several)
            else:
                frames += [self._series(target, each, [each["value"]], [self._span.end]) for each in found]
        return frames

    def _filled(self, expression: str, values: Mapping[str, str]) -> str:
        filled = expression.replace("$__rate_interval", f"{self._span.rate_interval}s")
        for name, value in values.items():
            filled = filled.replace(f"${name}", value)
        return filled

    def _ask(self, what: str, expression: str, **moments: int) -> Sequence[Mapping[str, Any]]:
        try:
            answer = self._http.get(f"/api/v1/{what}", params={"query": expression, **moments}).json()
        except (httpx.HTTPError, ValueError) as error:
            raise UserError(f"Prometheus at {self._http.base_url} does not answer: {type(error).__name__}") from None
        if answer["status"] != "success":
            raise UserError(f"Prometheus refuses {expression!r}: {answer['error']}")
        return list(answer["data"]["result"])

    @staticmethod
    def _series(
        target: Document, found: Mapping[str, Any], points: Sequence[tuple[float, str]], at: Sequence[int]
    ) -> Frame:
        """One series; moments without a value are null, so lines have gaps where figures were missing."""
        known = {int(moment): _number(value) for moment, value in points}
        labels = found["metric"]
        legend = re.sub(r"{{\s*(\w+)\s*}}", lambda name: labels.get(name[1], ""), target["legendFormat"])
        return {
            "refId": target["refId"],
            "fields": [
                {"name": "Time", "type": "time", "values": [moment * 1000 for moment in at]},
                {
                    "name": "Value",
                    "type": "number",
                    "labels": labels,
                    "config": {"displayNameFromDS": legend},
                    "values": [known.get(moment) for moment in at],
                },
            ],
        }

    def _table(self, target: Document, tenant: str | None) -> Sequence[Frame]:
        if self._postgres is None or tenant is None:
            return []
        query = target["rawSql"].replace("${tenant:sqlstring}", sql.Literal(tenant).as_string(self._postgres))
        cursor = self._postgres.execute(query.encode())
        rows = cursor.fetchall()
        if target["format"] == "time_series":
            return _by_metric(target, rows)
        fields = []
        for position, column in enumerate(cursor.description or ()):
            values = [row[position] for row in rows]
            fields.append({"name": column.name, "type": _type(values), "values": [_cell(value) for value in values]})
        return [{"refId": target["refId"], "fields": fields}]


def _columns(target: Document, found: Sequence[Mapping[str, Any]], *, several: bool) -> Sequence[Frame]:
    """An instant as a table: the moment, a column a label, the value."""
    if not found:
        return []
    labels = sorted({label for each in found for label in each["metric"]})
    return [
        {
            "refId": target["refId"],
            "fields": [
                {"name": "Time", "type": "time", "values": [each["value"][0] * 1000 for each in found]},
                *(
                    {"name": label, "type": "string", "values": [each["metric"].get(label, "") for each in found]}
                    for label in labels
                ),
                {
                    "name": f"Value #{target['refId']}" if several else "Value",
                    "type": "number",
                    "values": [_number(each["value"][1]) for each in found],
                },
            ],
        }
    ]


def _by_metric(target: Document, rows: Sequence[tuple[datetime, str, float]]) -> Sequence[Frame]:
    """Rows of time, metric and value as one frame, a column a metric."""
    known = {(at, metric): value for at, metric, value in rows}
    moments = sorted({at for at, _, _ in rows})
    return [
        {
            "refId": target["refId"],
            "fields": [
                {"name": "Time", "type": "time", "values": [_cell(at) for at in moments]},
                *(
                    {"name": metric, "type": "number", "values": [known.get((at, metric)) for at in moments]}
                    for metric in sorted({metric for _, metric, _ in rows})
                ),
            ],
        }
    ]


def _number(text: str) -> float | None:
    """As JSON can say it; Grafana draws nothing for the others either."""
    value = float(text)
    return value if abs(value) < float("inf") else None


def _cell(value: object) -> object:
    if isinstance(value, datetime):
        return value.timestamp() * 1000
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC).timestamp() * 1000
    if isinstance(value, Decimal):
        return float(value)
    return value if isinstance(value, int | float | None) else str(value)


def _type(values: Sequence[object]) -> str:
    there = [value for value in values if value is not None]
    if there and all(isinstance(value, date) for value in there):
        return "time"
    return "number" if there and all(isinstance(value, int | float | Decimal) for value in there) else "string"
