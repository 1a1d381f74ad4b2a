"""What the application notices of a conversion: `python -m bench.conversion [--rows 1000000]`.

Belongs here: a durable Postgres with a plain audit_logs, writers that insert into it as the application does, the
conversion beside them, and the comparison of every row. Does not: the other figures of the archive (`bench.archive`).

The writers are processes of their own, so that nothing of this process shows in their latencies. Each inserts one row
a statement and a transaction, as role `authenticated` with a tenant's claims, through policies, trigger, foreign key
and indexes. The same writers without a conversion beside them are the noise floor.
"""

import argparse
import json
import math
import multiprocessing
import resource
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from multiprocessing.synchronize import Event
from typing import Any

import psycopg
from rich.console import Console

from archive_pipeline.conversion import Conversion, Report, convert
from archive_pipeline.snapshot import SourceTable
from devstack import postgres, saas
from devstack.postgres import Postgres
from devstack.processes import VAR, Supervisor
from scaling import migrate
from scaling.databases import Shard

ROWS = 10_000_000
WRITERS = 4
INSERTS_PER_SECOND = 200
NOISE_SECONDS = 20.0
SETTLE_SECONDS = 3.0
DATABASE = "conversion"
TENANTS = 40

console = Console(stderr=True)

# The keys and indexes are made after the rows, in a quarter of the time.
FILL = """
DO $$
DECLARE definition text; definitions text[];
BEGIN
    SELECT array_agg(pg_get_indexdef(indexrelid)) INTO definitions FROM pg_index
    WHERE indrelid = 'audit_logs'::regclass AND NOT indisprimary;
    FOR definition IN SELECT format('DROP INDEX %s', indexrelid::regclass) FROM pg_index
        WHERE indrelid = 'audit_logs'::regclass AND NOT indisprimary
    LOOP EXECUTE definition; END LOOP;
    ALTER TABLE audit_logs DROP CONSTRAINT audit_logs_pkey;
    INSERT INTO audit_logs (id, tenant_id, workspace_id, user_id, action, resource_type, resource_id, details,
                            ip_address, user_agent, created_at)
    SELECT gen_random_uuid(), lpad(to_hex(g % tenants + 1), 32, '0')::uuid, gen_random_uuid(), gen_random_uuid(),
           'document.edited', 'document', 'res_' || g, jsonb_build_object('request_id', g, 'success', true),
           '10.0.0.0'::inet + g % 65536, 'Mozilla/5.0 (X11; Linux x86_64)',
           date_trunc('month', now()) - interval '13 months' + g * interval '13 months' / rows
    FROM generate_series(1, rows) g;
    ALTER TABLE audit_logs ADD PRIMARY KEY (id);
    FOREACH definition IN ARRAY definitions LOOP EXECUTE definition; END LOOP;
END $$
"""

INSERT = """
INSERT INTO audit_logs (id, tenant_id, workspace_id, action, resource_type, resource_id, details)
VALUES (%s, %s, %s, 'document.viewed', 'document', %s, %s)
"""

# Sum of 60 bits of each id's MD5: two sets of ids that differ have different ones.
IDS = "SELECT count(*), coalesce(sum(('x' || substr(md5(id::text), 1, 15))::bit(60)::bigint), 0)::text FROM audit_logs"


@dataclass(frozen=True, slots=True)
class Insert:
    """One statement of a writer; instants by the machine's monotonic clock, the same in every process."""

    began: float
    seconds: float
    sqlstate: str | None


@dataclass(frozen=True, slots=True)
class Written:
    """What the writers did."""

    inserts: Sequence[Insert] = field(repr=False)
    ids: Sequence[str] = field(repr=False)

    @property
    def failed(self) -> list[Insert]:
        """Statements that an application would have seen fail."""
        return [each for each in self.inserts if each.sqlstate is not None]

    def during(self, began: float, ended: float) -> "Written":
        """Those statements that were under way between two instants; the ids stay whole."""
        under_way = [each for each in self.inserts if each.began + each.seconds >= began and each.began <= ended]
        return Written(under_way, self.ids)

    def latencies(self) -> dict[str, float]:
        """In milliseconds."""
        ordered = sorted(1000 * each.seconds for each in self.inserts)
        if not ordered:
            return {}
        return {
            "inserts": len(ordered),
            "p50_ms": round(statistics.median(ordered), 2),
            "p99_ms": round(ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)], 2),
            "p999_ms": round(ordered[min(len(ordered) - 1, math.ceil(0.999 * len(ordered)) - 1)], 2),
            "max_ms": round(ordered[-1], 2),
            "mean_ms": round(statistics.fmean(ordered), 2),
        }


@contextmanager
def writing(dsn: str) -> Iterator[list[Written]]:
    """Insert with all writers until the end of the block; what they did is in the list afterwards."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pipes, processes = [], []
    for number in range(WRITERS):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=_write, args=(dsn, number, stop, theirs), daemon=True))
        pipes.append(ours)
        processes[-1].start()
    for pipe in pipes:
        pipe.recv()  # it has inserted its first row
    found: list[Written] = []
    try:
        yield found
    finally:
        stop.set()
        answers = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
    found.append(
        Written(
            [Insert(*insert) for inserts, _ in answers for insert in inserts],
            [identifier for _, ids in answers for identifier in ids],
        )
    )


def _write(dsn: str, number: int, stop: Event, pipe: Pipe) -> None:
    inserts: list[tuple[float, float, str | None]] = []
    ids: list[str] = []
    tenant = uuid.UUID(int=number + 1)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(
            "SELECT set_config('request.jwt.claims', %s, false)", (json.dumps({"tenant_id": str(tenant)}),)
        )
        connection.execute("SET ROLE authenticated")
        due = time.monotonic()
        while not stop.is_set():
            identifier = str(uuid.uuid4())
            row = (identifier, tenant, tenant, identifier[:8], json.dumps({"request_id": identifier}))
            began, sqlstate = time.monotonic(), None
            try:
                connection.execute(INSERT, row, prepare=True)
                ids.append(identifier)
            except psycopg.Error as error:
                sqlstate = error.sqlstate or "lost connection"
                if connection.closed:
                    inserts.append((began, time.monotonic() - began, sqlstate))
                    break
            inserts.append((began, time.monotonic() - began, sqlstate))
            if len(inserts) == 1:
                pipe.send("ready")
            due = max(due + 1 / INSERTS_PER_SECOND, time.monotonic() - 1.0)
            if (pause := due - time.monotonic()) > 0:
                time.sleep(pause)
    pipe.send((inserts, ids))


def _fill(server: Postgres, rows: int) -> None:
    server.drop_database(DATABASE)
    server.create_database(DATABASE)
    saas.create(server, DATABASE)
    migrate.upgrade(saas.pipeline_dsn(server, DATABASE))
    with psycopg.connect(server.dsn(DATABASE), autocommit=True) as admin:
        admin.execute(
            "INSERT INTO tenants (id, name) SELECT lpad(to_hex(g), 32, '0')::uuid, 'T' FROM generate_series(1, %s) g",
            (TENANTS,),
        )
        admin.execute("SET maintenance_work_mem = '256MB'")
        admin.execute("SET session_replication_role = replica")  # every tenant exists; no trigger a row
        admin.execute(FILL.replace("tenants + 1", f"{TENANTS} + 1").replace("rows", str(rows)).encode())
        admin.execute("VACUUM (ANALYZE) audit_logs")
        admin.execute("CHECKPOINT")


def run(rows: int = ROWS) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Convert a table of so many rows beside the writers, and compare.

    Args:
        rows: of the table before.

    Returns:
        The figures, and what they were made of.
    """
    with Supervisor(VAR / "bench" / "conversion") as supervisor:
        server = postgres.start(supervisor, disposable=False)
        try:
            return _measured(server, rows)
        finally:
            server.drop_database(DATABASE)


def measure(rows: int = ROWS) -> list[dict[str, Any]]:
    """The figures as `{name, value, target, ok, how}`.

    Args:
        rows: of the table before.
    """
    return run(rows)[0]


def _measured(server: Postgres, rows: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    began = time.monotonic()
    _fill(server, rows)
    told(f"{rows:,} rows filled in {time.monotonic() - began:.0f} s")
    dsn = server.dsn(DATABASE)
    with psycopg.connect(dsn, autocommit=True) as admin:
        before = admin.execute(IDS).fetchone()
        size = admin.execute("SELECT pg_table_size('audit_logs')").fetchone()
    with writing(dsn) as alone:
        time.sleep(NOISE_SECONDS)
    told(f"without a conversion: {alone[0].latencies()}")
    steps: list[tuple[str, float]] = []
    with writing(dsn) as beside:
        time.sleep(SETTLE_SECONDS)
        started = time.monotonic()
        report = _convert(server, lambda step: steps.append((step, time.monotonic())))
        ended = time.monotonic()
        time.sleep(SETTLE_SECONDS)
    written = beside[0].during(started, ended)
    longest = max(written.inserts, key=lambda each: each.seconds)
    told(f"beside it, in {ended - started:.1f} s: {written.latencies()}")
    ids = [*alone[0].ids, *beside[0].ids]
    lost = _lost(dsn, before or (0, "0"), ids)
    failed = alone[0].failed + beside[0].failed
    phases = _phases(written, steps, started)
    how = (
        f"{rows:,} rows, {WRITERS} processes that insert {INSERTS_PER_SECOND} single rows a second each as role "
        f"authenticated, durable Postgres, conversion of {ended - started:.1f} s; "
    )
    noise = alone[0].latencies()
    figures = [
        {
            "name": "convert_failed_writes",
            "value": len(failed),
            "target": "= 0",
            "ok": not failed,
            "how": f"{how}inserts that raised an error, of {len(alone[0].inserts) + len(beside[0].inserts):,}",
        },
        {
            "name": "convert_lost_rows",
            "value": sum(lost.values()),
            "target": "= 0",
            "ok": not any(lost.values()),
            "how": f"{how}ids before and {len(ids):,} acknowledged since, against the converted table",
        },
        {
            "name": "convert_max_block_ms",
            "value": round(1000 * longest.seconds, 1),
            "target": "< 100",
            "ok": 1000 * longest.seconds < 100,
            "how": f"{how}longest insert while it ran (in step {_phase(longest, steps)}); the same writers without it: "
            f"p99 {noise['p99_ms']:g} ms, longest {noise['max_ms']:g} ms in {NOISE_SECONDS:.0f} s",
        },
    ]
    return figures, {
        "rows": rows,
        "table_bytes": size[0] if size else None,
        "conversion_seconds": round(ended - started, 2),
        "swap_seconds": round(report.blocked_seconds, 4),
        "swap_attempts": report.attempts,
        "without_conversion": noise,
        "beside_conversion": written.latencies(),
        "by_step": phases,
        "failed": sorted({each.sqlstate or "" for each in failed}),
        "lost": lost,
        "max_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


def _convert(server: Postgres, on_step: Callable[[str], None]) -> Report:
    shard = Shard("main", saas.pipeline_dsn(server, DATABASE), owner_dsn=saas.owner_dsn(server, DATABASE))
    try:
        return convert(
            shard,
            Conversion(SourceTable("public", "audit_logs"), "audit_partitions", "UTC", premade_months=3),
            on_step=lambda step: on_step(str(step)),
        )
    finally:
        shard.close()


def _phase(insert: Insert, steps: Sequence[tuple[str, float]]) -> str:
    """The step that was reached next after the insert began: what it waited for."""
    return next((name for name, at in steps if at >= insert.began), "the end")


def _phases(written: Written, steps: Sequence[tuple[str, float]], started: float) -> dict[str, dict[str, float]]:
    """Latencies by what the conversion was doing; a step's name is told when it is done."""
    found, since = {}, started
    for name, at in steps:
        found[name] = {"seconds": round(at - since, 2), **written.during(since, at).latencies()}
        since = at
    return found


def _lost(dsn: str, before: tuple[Any, ...], ids: Sequence[str]) -> dict[str, int]:
    """Compare every id: those that were there and those whose insert was acknowledged, each exactly once."""
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute("CREATE TEMP TABLE acknowledged (id uuid PRIMARY KEY)")
        with admin.cursor() as cursor, cursor.copy("COPY acknowledged FROM STDIN") as copy:
            for identifier in ids:
                copy.write_row((identifier,))
        admin.execute("ANALYZE acknowledged")
        [(missing,)] = admin.execute(
            "SELECT count(*) FROM acknowledged a WHERE NOT EXISTS (SELECT FROM audit_logs l WHERE l.id = a.id)"
        ).fetchall()
        [(rows, total)] = admin.execute(IDS).fetchall()
        [(added, added_total)] = admin.execute(IDS.replace("audit_logs", "acknowledged").encode()).fetchall()
    difference = rows - added - before[0]
    return {
        "missing": missing + max(-difference, 0),
        "surplus": max(difference, 0),
        "other_ids": int(int(total) != int(added_total) + int(before[1])),
    }


def told(line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the figures and what they were made of; 1 when one misses its target."""
    parser = argparse.ArgumentParser(prog="python -m bench.conversion", description="Measure an online conversion.")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"of the table before (default {ROWS:,})")
    options = parser.parse_args(arguments)
    figures, raw = run(options.rows)
    sys.stdout.write(json.dumps({"figures": figures, "raw": raw}, indent=2) + "\n")
    return 0 if all(figure["ok"] for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
