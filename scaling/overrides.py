"""The settings file of the thresholds: what it may change of the catalogue, checked key by key.

Belongs here: reading SCALING_CATALOGUE_FILE and applying it. Does not: the defaults (`scaling.catalogue`).

    [audit_logs_bytes]
    threshold = "5 GiB"            # a number in the metric's unit, or bytes with KiB, MiB, GiB, TiB
    [users_total]
    sql = "SELECT count(*) AS value FROM auth.users WHERE last_sign_in_at > now() - interval '30 days'"
    [db_conn_util]
    promql = "sum(pg_stat_activity_count) / 90"
    breaches = 5
    of = 10
    [bandwidth_cost_7d]
    enabled = false
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from scaling.catalogue import Catalogue, Metric, catalogue
from scaling.errors import UserError
from scaling.settings import ArchiveSourceSettings, ScalingSettings, SyncScheduleSettings, load
from scaling.sources.prometheus import PrometheusQuery
from scaling.sources.sql import Across, SqlSource
from scaling.thresholds import Compare, Rearm

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB|TiB)")
_POWERS = {"KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}


def _size(value: float | str) -> float:
    if not isinstance(value, str):
        return float(value)
    found = _SIZE.fullmatch(value.strip())
    if found is None:
        raise ValueError("must be a number, or a size like '5 GiB'")
    return float(found[1]) * 2.0 ** _POWERS[found[2]]


_Figure = Annotated[float | str, AfterValidator(_size)]


class _Override(BaseModel):
    """One table of the file; what it does not name stays as it is."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    enabled: bool = True
    threshold: _Figure | None = None
    compare: str | None = Field(default=None, pattern=r"^(>|>=|<|<=)$")
    recovery: _Figure | None = None
    breaches: int | None = None
    of: int | None = None
    recoveries: int | None = None
    recovery_of: int | None = None
    hold_minutes: float | None = Field(default=None, ge=0)
    min_fired_minutes: float | None = Field(default=None, ge=0)
    no_data_after_hours: float | None = Field(default=None, gt=0)
    rearm: str | None = Field(default=None, pattern=r"^(one_shot|repeat|period)$")
    flap_episodes: int | None = None
    flap_window_hours: float | None = Field(default=None, gt=0)
    every_minutes: float | None = Field(default=None, ge=1)
    owner: str | None = Field(default=None, min_length=1)
    runbook: str | None = Field(default=None, min_length=1)
    sql: str | None = Field(default=None, min_length=1)
    promql: str | None = Field(default=None, min_length=1)
    labels: tuple[str, ...] | None = Field(default=None, strict=False)


_OF_RULE = ("threshold", "recovery", "breaches", "of", "recoveries", "recovery_of", "flap_episodes")
_SPANS = {
    "hold_minutes": ("hold", timedelta(minutes=1)),
    "min_fired_minutes": ("min_fired", timedelta(minutes=1)),
    "no_data_after_hours": ("no_data_after", timedelta(hours=1)),
    "flap_window_hours": ("flap_window", timedelta(hours=1)),
}


def configured(settings: ScalingSettings) -> Catalogue:
    """The catalogue as this installation has it.

    Args:
        settings: name the file, if there is one.

    Raises:
        UserError: the file cannot be read, or says what cannot be; nothing of it is applied then.
    """
    plain = catalogue(load(ArchiveSourceSettings), load(SyncScheduleSettings))
    if settings.scaling_catalogue_file is None:
        return plain
    return overridden(plain, settings.scaling_catalogue_file)


def overridden(plain: Catalogue, path: Path) -> Catalogue:
    """Apply a settings file.

    Args:
        plain: the defaults.
        path: of a TOML file with one table for each metric it changes.

    Raises:
        UserError: one sentence that names the file, the table and the key.
    """
    where = f"SCALING_CATALOGUE_FILE ({path})"
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{where} is no TOML: {error}") from None
    known = [metric.name for metric in plain]
    for name, table in tables.items():
        if name not in known:
            raise UserError(f"{where} names the metric {name!r}, which there is not; known: {', '.join(known)}")
        if not isinstance(table, dict):
            raise UserError(f"{where} has the key {name!r} outside of a table; write [{name}] and its keys below")
    changed = [_changed(metric, tables[metric.name], where) if metric.name in tables else metric for metric in plain]
    return Catalogue(tuple(metric for metric in changed if metric is not None))


def _changed(metric: Metric, table: Mapping[str, Any], where: str) -> Metric | None:
    try:
        wanted = _Override.model_validate(table)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        key = str(problem["loc"][0]) if problem["loc"] else ""
        if problem["type"] == "extra_forbidden":
            raise UserError(
                f"{where} has {key} in [{metric.name}], which is no key; known: {', '.join(_Override.model_fields)}"
            ) from None
        raise UserError(f"{where}, {key} of [{metric.name}]: {problem['msg'].removeprefix('Value error, ')}") from None
    if not wanted.enabled:
        return None
    if wanted.sql and wanted.promql:
        raise UserError(f"{where} has both sql and promql in [{metric.name}]; keep one")
    if wanted.labels and not wanted.promql:
        raise UserError(f"{where} has labels without promql in [{metric.name}]; they tell its series apart")
    try:
        return _applied(metric, wanted)
    except UserError as error:
        raise UserError(f"{where}, [{metric.name}]: {error}") from None


def _applied(metric: Metric, wanted: _Override) -> Metric:
    changes: dict[str, Any] = {
        name: getattr(wanted, name) for name in ("owner", "runbook") if getattr(wanted, name) is not None
    }
    if wanted.every_minutes is not None:
        changes["every"] = timedelta(minutes=wanted.every_minutes)
    if wanted.sql:
        across = metric.source.across if isinstance(metric.source, SqlSource) else Across.SUM
        changes["source"] = SqlSource(wanted.sql, across, parameters=None)
    if wanted.promql:
        changes["source"] = PrometheusQuery(wanted.promql, wanted.labels or ())
    of_rule: dict[str, Any] = {name: getattr(wanted, name) for name in _OF_RULE if getattr(wanted, name) is not None}
    if wanted.compare is not None:
        of_rule["compare"] = Compare(wanted.compare)
    if wanted.rearm is not None:
        of_rule["rearm"] = Rearm(wanted.rearm)
    for key, (name, unit) in _SPANS.items():
        if (span := getattr(wanted, key)) is not None:
            of_rule[name] = span * unit
    if of_rule:
        if metric.rule is None:
            raise UserError(f"{metric.name} has no threshold, so {next(iter(of_rule))} changes nothing")
        changes["rule"] = replace(metric.rule, **of_rule)
    return replace(metric, **changes)
