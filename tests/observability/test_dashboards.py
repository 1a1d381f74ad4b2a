"""Dashboards: every panel is one that Grafana's linter takes, every expression has series in a live Prometheus."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
from prometheus_client import start_http_server
from psycopg import sql

from devstack import prometheus
from devstack.processes import VAR, Supervisor, wait_until
from devstack.prometheus import Prometheus
from devstack.servers import Database, Servers
from observability.dashboards import BOARDS, DIRECTORY, as_json
from scaling import exporter
from scaling.databases import DatabaseRouter, Shard
from scaling.errors import UserError
from scaling.settings import ExporterSettings
from tests.scaling import exported_fleet

SCHEMA = "11.6.16"
"""Of @grafana/schema: the version of Grafana that the builder library is made for."""
TYPESCRIPT = "7.0.2"
Panel = Mapping[str, Any]


def dashboards() -> Mapping[str, Mapping[str, Any]]:
    return {board.uid: json.loads(as_json(board)) for board in BOARDS}


def panels() -> list[tuple[str, Panel]]:
    return [
        (f"{uid}: {panel['title']}", panel)
        for uid, board in dashboards().items()
        for panel in board["panels"]
        if panel["type"] != "row"
    ]


def asked(panel: Panel) -> list[str]:
    """Its PromQL."""
    return [target["expr"] for target in panel["targets"] if "expr" in target]


def test_the_files_are_those_that_are_generated() -> None:
    assert {path.stem: path.read_text() for path in DIRECTORY.glob("*.json")} == {
        board.uid: as_json(board) for board in BOARDS
    }


@pytest.mark.parametrize(("name", "panel"), panels(), ids=[name for name, _ in panels()])
def test_a_panel_is_as_the_linter_of_grafana_wants_it(name: str, panel: Panel) -> None:
    assert panel["title"]
    assert panel["description"]
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"]["uid"] in ("${datasource}", "${postgres}")
    for target in panel["targets"]:
        assert target["datasource"] == panel["datasource"]
        if "expr" not in target:
            continue
        assert target["legendFormat"]
        for _, selector in re.findall(r"\b((?:app|pipeline)_\w+)(\{[^}]*\})?", target["expr"]):
            assert 'job=~"$job"' in selector
            assert 'instance=~"$instance"' in selector
        for counter in re.findall(r"\bpipeline_\w+_(?:total|bucket)\b", target["expr"]):
            assert re.search(rf"(rate|increase)\({counter}\{{", target["expr"])
        for window in re.findall(r"rate\([^\[]*\[([^\]]+)\]", target["expr"]):
            assert window in ("$__rate_interval", "6h")  # runs are few, so their quantiles need hours


@pytest.mark.parametrize("uid", [board.uid for board in BOARDS])
def test_a_dashboard_is_read_only_has_distinct_panels_and_lets_choose_its_sources(uid: str) -> None:
    board = dashboards()[uid]
    assert board["editable"] is False
    assert {"datasource", "job", "instance"} <= {each["name"] for each in board["templating"]["list"]}
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in board["panels"])


CHANGES = """
UPDATE sync.api_calls SET calls = calls + 1 WHERE day = (now() AT TIME ZONE 'UTC')::date;
UPDATE sync.freshness SET changes = changes + 1;
UPDATE sync.webhook_messages SET messages = messages + 1;
UPDATE sync.runs SET events_upserted = events_upserted + 1, waited_seconds = waited_seconds + 0.1
"""


@pytest.fixture
def live(
    running_servers: Servers, database: Database, settings_environment: Callable[..., None], tmp_path: Path
) -> Iterator[Prometheus]:
    """A Prometheus that scrapes the exporter over a fleet on record which goes on working."""
    try:
        prometheus.tool("prometheus")
    except UserError as missing:
        pytest.skip(str(missing))
    settings_environment(database)
    exported_fleet.seed(database.admin_dsn, workspaces=100, tenants=20)
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        admin.execute("ALTER TABLE public.audit_logs RENAME TO audit_logs_before")
        admin.execute(
            "CREATE TABLE public.audit_logs (id uuid, created_at timestamptz NOT NULL) PARTITION BY RANGE (created_at);"
            "CREATE TABLE public.soon PARTITION OF public.audit_logs FOR VALUES FROM ('2099-01-01') TO ('2099-02-01')"
        )
    with (
        exported_fleet.dagster_storage(running_servers.postgres, tmp_path) as (instance, storage),
        DatabaseRouter(Shard("main", database.dsn)) as router,
        Supervisor(tmp_path / "server") as supervisor,
    ):
        exported_fleet.dagster_history(instance)
        dagster = exporter.storage(storage)
        assert dagster is not None
        server, thread = start_http_server(0, "127.0.0.1", exporter.registry(router, dagster, ExporterSettings()))
        configuration = tmp_path / "prometheus.yml"
        configuration.write_text(
            json.dumps(
                {
                    "global": {"scrape_interval": "1s"},
                    "scrape_configs": [
                        {
                            "job_name": "pipeline",
                            "static_configs": [{"targets": [f"127.0.0.1:{server.server_port}"]}],
                        }
                    ],
                }
            )
        )
        try:
            started = prometheus.start(supervisor, configuration)
            wait_until(lambda: bool(started.ask("pipeline_scrape_seconds")), timeout_seconds=30, what="first scrape")
            with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
                for _ in range(3):
                    time.sleep(1.2)
                    for statement in CHANGES.split(";\n"):
                        admin.execute(statement.encode())
            time.sleep(1.5)
            yield started
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
            dagster.close()


def test_every_expression_has_series_in_a_prometheus_that_scrapes_the_exporter(live: Prometheus) -> None:
    empty = {}
    for name, panel in panels():
        for expression in asked(panel):
            filled = expression.replace("$__rate_interval", "1m")
            for variable in ("job", "instance", "class"):
                filled = filled.replace(f'"${variable}"', '".+"')
            if not live.ask(filled):
                empty[name] = expression
    assert empty == {}
    for board in dashboards().values():
        for variable in board["templating"]["list"]:
            found = re.fullmatch(r"label_values\((.+), (\w+)\)", str(variable["query"]))
            if found:
                assert live.ask(f"count by ({found[2]}) ({found[1].replace('$job', '.+')})")


def test_the_tenants_panels_ask_what_an_operator_may_read(database: Database, login: Callable[..., str]) -> None:
    exported_fleet.seed(database.admin_dsn, workspaces=20, tenants=4)
    with psycopg.connect(login("pipeline_operator")) as operator:
        [board] = [board for uid, board in dashboards().items() if uid == "pipeline-tenant"]
        [names] = [each["query"] for each in board["templating"]["list"] if each["name"] == "tenant"]
        tenants = operator.execute(names.encode()).fetchall()
        assert len(tenants) == 4
        queries = [target["rawSql"] for _, panel in panels() for target in panel["targets"] if "rawSql" in target]
        assert len(queries) == 7
        for query in queries:
            # As Grafana fills it in: quoted, with quotes doubled.
            filled = query.replace("${tenant:sqlstring}", sql.Literal(tenants[0][0]).as_string(operator))
            assert operator.execute(filled.encode()).fetchall()
            foreign = query.replace("${tenant:sqlstring}", "''' OR true --'")
            assert operator.execute(foreign.encode()).fetchall() == []


@pytest.fixture(scope="module")
def schema() -> Path:
    """Grafana's own types and a compiler, from npm into var/tools."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not on the PATH")
    folder = VAR / "tools" / f"grafana-schema-{SCHEMA}"
    if not (folder / "node_modules" / ".bin" / "tsc").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true}')
        done = subprocess.run(
            ["npm", "install", "--silent", "--ignore-scripts", f"@grafana/schema@{SCHEMA}", f"typescript@{TYPESCRIPT}"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"npm has no @grafana/schema here: {done.stderr.strip()[:200]}")
    return folder


def compiled(folder: Path, name: str, documents: Mapping[str, Mapping[str, Any]]) -> str:
    """What the compiler says of the documents as Grafana's dashboards; empty: they are."""
    types = "./node_modules/@grafana/schema/dist/esm/raw/dashboard/x/dashboard_types.gen"
    lines = [
        f'import type {{ Dashboard }} from "{types}";',
        # JSON has the values of enums, which TypeScript takes for those of strings only as their literals.
        "type Plain<T> = T extends string ? `${T}` : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;",
    ]
    for number, document in enumerate(documents.values()):
        lines.append(f"export const board{number}: Plain<Dashboard> = {json.dumps(document)};")
    source = folder / f"{name}.ts"
    source.write_text("\n".join(lines))
    done = subprocess.run(
        [
            folder / "node_modules" / ".bin" / "tsc",
            *("--noEmit", "--strict", "--skipLibCheck", "--module", "esnext", "--moduleResolution", "bundler"),
            source.name,
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout + done.stderr if done.returncode else ""


def test_grafanas_own_types_take_every_dashboard(schema: Path) -> None:
    assert compiled(schema, "boards", dashboards())[:4000] == ""


def test_grafanas_own_types_refuse_a_dashboard_that_is_none(schema: Path) -> None:
    [board, *_] = dashboards().values()
    assert "TS2322" in compiled(schema, "broken", {"broken": {**board, "title": 5}})
    assert "TS2353" in compiled(schema, "stale", {"stale": {**board, "style": "dark"}})
