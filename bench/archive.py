"""The figures of the archive: `python -m bench.archive [--only contenders …]`, which is `make bench-archive`.

Belongs here: the month that is archived, the contenders' rounds, the figures with their targets, the file
var/bench/archive.json and the table. Does not: what runs in a process of its own (`bench.archive_worker`,
`bench.archive_peers`), the backfill (`bench.archive_backfill`), the conversion (`bench.conversion`), the chaos trials.

All contenders read the same month of the same server in the same run, one after the other, round by round, and medians
are compared. The other tools have a virtual environment of their own, var/bench/peers. The server is disposable (no
fsync): nobody writes to it while it is measured, except the archive its few rows. A figure that could not be measured
is absent. With `--only` the figures of the other parts stay as they were measured last.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg

from archive_pipeline.months import Month
from archive_pipeline.query import ask
from archive_pipeline.signing import new_key
from bench.archive_backfill import backfilled
from bench.conversion import run as converted
from bench.fleet import environment
from bench.sync import Figure, Measured, at_least, at_most, show, told, write
from devstack import saas, servers
from devstack.processes import CHECKOUT, VAR, Supervisor
from devstack.servers import Bucket, Database, Servers
from scaling import migrate

RESULTS = Path("var/bench/archive.json")
CHAOS_RESULTS = Path("var/bench/archive_chaos.json")
PEERS_DIRECTORY = VAR / "bench" / "peers"
# The last two pins: without them pip finds no botocore that both boto3 and s3fs' aiobotocore take.
PEERS = (
    "duckdb==1.5.5", "duckdb-extensions==1.5.5", "duckdb-extension-postgres-scanner==1.5.5", "pg-freezer==1.0.8",
    "backparq==0.4.0", "rivet-cli==0.32.2", "pandas==3.1.1", "pyarrow==26.0.1", "psycopg[binary]==3.3.9",
    "sqlalchemy==2.1.9", "aiobotocore==3.10.0", "botocore==1.43.117",
)  # fmt: skip
PEER_NAMES = ("duckdb", "pandas", "rivet", "backparq", "pg-freezer")
CONTENDERS = ("copy", "extract", "month", *PEER_NAMES)
DATABASE = "archive"
TABLE = "audit_logs"
DOUBLE = "audit_logs_double"
TEXT_VIEW = "audit_logs_with_text"
MONTH = Month(2025, 1)
ROWS, LEAST_HEAP = 3_100_000, 1 << 30
ROUNDS = 3
CONVERTED_ROWS = 10_000_000
BACKFILL_MONTHS, BACKFILL_ROWS = 24, 100_000
CHAOS_TRIALS = 200
TENANTS = 1_000

# Tenant k of 1,000 has a share of about 1/k. The indexes are made after the rows, in a fraction of the time.
FILL = """
INSERT INTO {table} (id, tenant_id, workspace_id, user_id, action, resource_type, resource_id, details, ip_address,
                     user_agent, created_at)
SELECT gen_random_uuid(), md5('t' || k)::uuid, md5('w' || k || ':' || (random() * 3)::int)::uuid,
       md5('u' || k || ':' || (random() * 20)::int)::uuid,
       (ARRAY['document.viewed', 'document.viewed', 'document.edited', 'document.shared', 'calendar.connected',
              'user.signed_in', 'user.invited', 'ai.prompted', 'security.mfa_reset'])[1 + floor(random() * 9)::int],
       (ARRAY['document', 'calendar', 'user', 'workspace'])[1 + floor(random() * 4)::int],
       'res_' || substr(md5((random() * 100000)::int::text), 1, 10),
       jsonb_build_object('request_id', md5(i::text), 'duration_ms', round((random() * 900)::numeric, 3),
                          'changed', jsonb_build_array('title', i % 7), 'success', random() > 0.02),
       '10.0.0.0'::inet + (random() * 16000000)::bigint,
       (ARRAY['Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/537.36 Chrome/126.0 Safari/537.36',
              'Mozilla/5.0 (Windows NT 10.0; Win64; x64; rv:128.0) Gecko/20100101 Firefox/128.0',
              'curl/8.9.1', 'okhttp/4.12.0'])[1 + floor(random() * 4)::int],
       '2025-01-01 00:00:00+00'::timestamptz + i * ('31 days'::interval / {rows})
FROM (SELECT i, floor(1001 ^ random())::int AS k FROM generate_series(0, {rows} - 1) i) x
"""
RESET = "TRUNCATE archive.months, archive.uploads, archive.chain_heads, archive.signing_keys CASCADE"


@dataclass(frozen=True, slots=True)
class Options:
    """How large a run is."""

    rows: int = ROWS
    rounds: int = ROUNDS
    names: Sequence[str] = CONTENDERS


@dataclass(slots=True)
class Lab:
    """The servers with the month on them."""

    servers: Servers
    database: Database
    rows: int
    heap_bytes: int
    key: str = field(repr=False)

    def environment(self, bucket: Bucket, table: str = TABLE) -> dict[str, str]:
        """What the archive reads its settings from."""
        return {
            **self.database.environment(),
            **bucket.environment(),
            "ARCHIVE_TABLE": f"public.{table}",
            "ARCHIVE_FIRST_MONTH": MONTH.name,
            "ARCHIVE_SIGNING_KEY": self.key,
            "ARCHIVE_GRACE_SECONDS": "0",
        }

    def admin(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement as superuser."""
        with psycopg.connect(self.database.admin_dsn, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []


@contextmanager
def lab(rows: int, *, double: bool) -> Iterator[Lab]:
    """Start Postgres and S3 and make the month, and another table with one of twice the rows."""
    directory = VAR / "bench" / "archive"
    shutil.rmtree(directory, ignore_errors=True)
    with Supervisor(directory) as supervisor:
        both = servers.start(supervisor, disposable=True)
        admin_dsn = both.postgres.create_database(DATABASE)
        saas.create(both.postgres, DATABASE)
        pipeline_dsn = saas.pipeline_dsn(both.postgres, DATABASE)
        migrate.upgrade(pipeline_dsn)
        database = Database(DATABASE, admin_dsn, pipeline_dsn, saas.owner_dsn(both.postgres, DATABASE))
        made = Lab(both, database, rows, 0, new_key())
        made.admin(
            f"INSERT INTO tenants (id, name) SELECT md5('t' || k)::uuid, 'T' FROM generate_series(1, {TENANTS + 1}) k"
        )
        made.admin(
            f"CREATE VIEW public.{TEXT_VIEW} AS SELECT id, tenant_id, workspace_id, user_id, action, resource_type, "
            f"resource_id, details::text AS details, ip_address, user_agent, created_at FROM public.{TABLE}; "
            f"GRANT SELECT ON public.{TEXT_VIEW} TO pipeline"
        )
        if double:
            made.admin(
                f"CREATE TABLE public.{DOUBLE} (LIKE public.{TABLE}); GRANT SELECT ON public.{DOUBLE} TO pipeline"
            )
        for table, wanted in ((TABLE, rows), *([(DOUBLE, 2 * rows)] if double else [])):
            began = time.perf_counter()
            fill(made, table, wanted)
            [(size,)] = made.admin(f"SELECT pg_relation_size('public.{table}')")
            told(f"{table}: {wanted:,} rows, heap {size / 2**30:.2f} GiB, made in {time.perf_counter() - began:.0f} s")
            if rows >= ROWS and size < LEAST_HEAP:
                raise AssertionError(f"the month's heap is only {size:,} bytes")
            if table == TABLE:
                made.heap_bytes = size
        yield made
    shutil.rmtree(directory, ignore_errors=True)


def fill(made: Lab, table: str, rows: int) -> None:
    """Fill a table; the key and indexes that it has are made last."""
    with psycopg.connect(made.database.admin_dsn, autocommit=True) as admin:
        admin.execute("SET session_replication_role = replica")  # every tenant exists; no trigger a row
        admin.execute("SET maintenance_work_mem = '512MB'")
        admin.execute("SET synchronous_commit = off")
        constraints = admin.execute(
            "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = %s::regclass "
            "AND contype = 'p'",
            (f"public.{table}",),
        ).fetchall()
        indexes = admin.execute(
            "SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index "
            "WHERE indrelid = %s::regclass AND NOT indisprimary",
            (f"public.{table}",),
        ).fetchall()
        for name, _ in indexes:
            admin.execute(f"DROP INDEX {name}".encode())
        for name, _ in constraints:
            admin.execute(f"ALTER TABLE {table} DROP CONSTRAINT {name}".encode())
        admin.execute(FILL.format(table=table, rows=rows).encode())
        for name, definition in constraints:
            admin.execute(f"ALTER TABLE {table} ADD CONSTRAINT {name} {definition}".encode())
        for _, definition in indexes:
            admin.execute(definition.encode())
        admin.execute(f"VACUUM (ANALYZE, FREEZE) {table}".encode())
        admin.execute("CHECKPOINT")


@contextmanager
def fresh_bucket(made: Lab) -> Iterator[Bucket]:
    """A bucket of its own, and an archive that knows of no month."""
    made.admin(RESET)
    name = f"bench-{uuid.uuid4().hex[:12]}"
    made.servers.s3.create_bucket(name)
    try:
        yield Bucket(name, made.servers.s3)
    finally:
        made.servers.s3.remove_bucket(name)


def raw_copy(made: Lab) -> dict[str, Any]:
    """The limit a single reader meets: COPY in binary to nowhere."""
    received = 0
    began = time.perf_counter()
    with psycopg.connect(made.database.dsn) as connection, connection.cursor() as cursor:
        query = (
            f"COPY (SELECT * FROM public.{TABLE} WHERE created_at >= '{MONTH.start}' AND created_at < '{MONTH.end}') "
            "TO STDOUT (FORMAT binary)"
        )
        with cursor.copy(query.encode()) as copy:
            for block in copy:
                received += len(block)
    return {"seconds": time.perf_counter() - began, "bytes": received, "rows": made.rows}


def ours(made: Lab, bucket: Bucket, mode: str, table: str = TABLE) -> dict[str, Any]:
    """A process of the archive's own; its time with process start is `process_seconds`."""
    began = time.perf_counter()
    said = subprocess.run(
        [sys.executable, "-m", "bench.archive_worker", mode, MONTH.name],
        cwd=CHECKOUT,
        env={**inherited(), **made.environment(bucket, table)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    return answer(said, time.perf_counter() - began)


def peer(made: Lab, bucket: Bucket, name: str) -> dict[str, Any]:
    """A process of another tool, with the same login as the archive's: it may only read."""
    with tempfile.TemporaryDirectory(dir=VAR / "bench", prefix="peer-") as directory:
        job = {
            "dsn": made.database.dsn,
            "schema": "public",
            "table": TABLE,
            "text_view": TEXT_VIEW,
            "start": f"{MONTH.start:%Y-%m-%d %H:%M:%S+00}",
            "end": f"{MONTH.end:%Y-%m-%d %H:%M:%S+00}",
            "bucket": bucket.name,
            "directory": directory,
            "rows": made.rows,
        }
        began = time.perf_counter()
        said = subprocess.run(
            [PEERS_DIRECTORY / "bin" / "python", CHECKOUT / "bench" / "archive_peers.py", name],
            cwd=directory,
            env={**inherited(), **bucket.environment(), "HOME": directory},
            input=json.dumps(job),
            capture_output=True,
            text=True,
            check=False,
        )
        return answer(said, time.perf_counter() - began)


def answer(said: "subprocess.CompletedProcess[str]", seconds: float) -> dict[str, Any]:
    """A process's line of JSON; `error` alone when it failed."""
    if said.returncode:
        return {"error": " / ".join(said.stderr.strip().splitlines()[-2:])[:600] or f"exit code {said.returncode}"}
    found: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    return {**found, "process_seconds": round(seconds, 2)}


def inherited() -> dict[str, str]:
    return {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR") if name in os.environ}


def install_peers() -> None:
    """Make the other tools' virtual environment once; again when their versions change."""
    wanted = "\n".join(PEERS) + "\n"
    mark = PEERS_DIRECTORY / "installed"
    if mark.exists() and mark.read_text() == wanted:
        return
    told("installing the other tools into var/bench/peers (two minutes the first time)")
    shutil.rmtree(PEERS_DIRECTORY, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", PEERS_DIRECTORY], check=True)
    pip = [str(PEERS_DIRECTORY / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *PEERS], check=True)
    mark.write_text(wanted)


def contenders(options: Options) -> Measured:
    """Everyone exports the same month, round by round."""
    install_peers()
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in options.names}
    growth: list[dict[str, Any]] = []
    tenants: dict[str, Any] = {}
    with lab(options.rows, double="month" in options.names) as made:
        for number in range(options.rounds):
            for name in options.names:
                if any("error" in each for each in rounds[name]):
                    continue  # it would fail again
                with fresh_bucket(made) as bucket:
                    found = run_one(made, bucket, name)
                    rounds[name].append(found)
                    told(f"round {number + 1}/{options.rounds}, {name}: {brief(found)}")
                    if name == "month" and number == 0 and "error" not in found:
                        tenants = tenant_queries(made, bucket)
            if "month" in options.names:
                with fresh_bucket(made) as bucket:
                    growth.append(ours(made, bucket, "month", DOUBLE))
                    told(f"round {number + 1}/{options.rounds}, month of twice the rows: {brief(growth[-1])}")
        heap = made.heap_bytes
    return Measured(
        figures_of(rounds, growth, tenants, options, heap),
        {
            "rows": options.rows,
            "heap_bytes": heap,
            "rounds": rounds,
            "double": growth,
            "tenant_queries": tenants,
            "absent": {name: each["error"] for name, found in rounds.items() for each in found if "error" in each},
            "peers": PEERS,
        },
    )


def run_one(made: Lab, bucket: Bucket, name: str) -> dict[str, Any]:
    if name == "copy":
        return raw_copy(made)
    if name in ("extract", "month"):
        return ours(made, bucket, name)
    return peer(made, bucket, name)


def brief(found: Mapping[str, Any]) -> str:
    if "error" in found:
        return f"failed: {found['error']}"
    memory = f", {found['rss_mb']:.0f} MB" if "rss_mb" in found else ""
    steps = f", {found['steps']}" if "steps" in found else ""
    return f"{found['seconds']:.2f} s, {found['bytes'] / 1e6:.1f} MB{memory}{steps}"


def tenant_queries(made: Lab, bucket: Bucket) -> dict[str, Any]:
    """Ask for all rows of the tenant with the median number of rows, and of the largest; bytes are those of S3."""
    counts = made.admin(f"SELECT tenant_id::text, count(*) FROM public.{TABLE} GROUP BY 1 ORDER BY 2, 1")
    found: dict[str, Any] = {"tenants": len(counts)}
    with environment(made.environment(bucket)):
        for name, (tenant, rows) in {"median": counts[len(counts) // 2], "largest": counts[-1]}.items():
            statement = f"SELECT * FROM {TABLE} WHERE tenant_id = '{tenant}'"
            answered = ask(statement, first=MONTH.name, last=MONTH.name, engine="duckdb")
            if len(answered.frame) != rows:
                raise AssertionError(f"the query found {len(answered.frame)} of {rows} rows")
            found[name] = {
                "rows": rows,
                "bytes_read": answered.bytes_scanned,
                "month_bytes": answered.archive_bytes,
                "share": answered.bytes_scanned / answered.archive_bytes,
                "rows_share": rows / made.rows,
                "seconds": round(answered.seconds, 2),
            }
    told(f"tenants: {found}")
    return found


def figures_of(
    rounds: Mapping[str, Sequence[Mapping[str, Any]]],
    growth: Sequence[Mapping[str, Any]],
    tenants: Mapping[str, Any],
    options: Options,
    heap: int,
) -> list[Figure]:
    """What could be measured."""
    enough = {
        name: found
        for name, found in rounds.items()
        if len(found) == options.rounds and not any("error" in each for each in found)
    }
    what = (
        f"month of {options.rows:,} rows, heap {heap / 2**30:.2f} GiB, medians of {options.rounds} alternating rounds "
        "on one Postgres 18"
    )

    def median(name: str, key: str = "seconds") -> float:
        return float(statistics.median(each[key] for each in enough[name]))

    found: list[Figure] = []
    if {"extract", "duckdb"} <= enough.keys():
        found.append(
            at_most(
                "extract_vs_duckdb",
                median("extract") / median("duckdb"),
                1.0,
                f"{what}; rows into sorted, clustered Parquet on local disk without digest and verification "
                f"{median('extract'):.1f} s ({size('extract', median)}) / COPY of DuckDB's extension with the same "
                f"output types {median('duckdb'):.1f} s ({size('duckdb', median)})",
            )
        )
    if {"month", "copy"} <= enough.keys():
        found.append(
            at_most(
                "verified_vs_copy",
                median("month") / median("copy"),
                2.0,
                f"archive_month: verified, uploaded, read back, signed {median('month'):.1f} s / COPY binary to "
                f"nowhere on one connection {median('copy'):.1f} s; same rounds",
            )
        )
    for name, figure, limit in (
        ("pg-freezer", "vs_pg_freezer", 5),
        ("backparq", "vs_backparq", None),
        ("rivet", "vs_rivet", None),
        ("pandas", "vs_pandas", None),
    ):
        if {"month", name} <= enough.keys():
            ratio = median(name) / median("month")
            how = (
                f"{name}'s export {median(name):.1f} s, {median(name, 'rss_mb'):.0f} MB of memory, "
                f"{size(name, median)} / the whole verified month {median('month'):.1f} s; same rounds"
            )
            found.append(
                at_least(figure, ratio, limit, how) if limit else Figure(figure, round(ratio, 3), None, True, how)
            )
    if {"month", "duckdb"} <= enough.keys():
        found.append(
            at_most(
                "size_vs_duckdb",
                median("month", "bytes") / median("duckdb", "bytes"),
                1.0,
                f"the month's parts {size('month', median)} / DuckDB's zstd file {size('duckdb', median)}",
            )
        )
    doubles = [each for each in growth if "error" not in each]
    if "month" in enough:
        highest = max(each["rss_mb"] for each in enough["month"])
        found.append(
            at_most("rss_mb", highest, 400, f"peak of the archiving process, the highest of {options.rounds} rounds")
        )
        if len(doubles) == options.rounds:
            twice = statistics.median(each["rss_mb"] for each in doubles)
            found.append(
                at_most(
                    "rss_growth",
                    twice / median("month", "rss_mb"),
                    1.1,
                    f"{twice:.0f} MB for {2 * options.rows:,} rows / {median('month', 'rss_mb'):.0f} MB for "
                    f"{options.rows:,}, medians of {options.rounds}",
                )
            )
    if tenants:
        middle, largest = tenants["median"], tenants["largest"]
        found.append(
            at_most(
                "tenant_bytes_share",
                middle["share"],
                0.05,
                f"SELECT * of the tenant with the median of {middle['rows']:,} rows among {tenants['tenants']:,}: "
                f"bytes of the GETs from S3, footers included, {middle['bytes_read'] / 1e6:.2f} MB / the month's "
                f"{middle['month_bytes'] / 1e6:.1f} MB; the largest tenant, {largest['rows_share']:.1%} of the rows, "
                f"reads {largest['share']:.1%}",
            )
        )
    return found


def size(name: str, median: Callable[[str, str], float]) -> str:
    return f"{median(name, 'bytes') / 1e6:.0f} MB"


def backfill(options: Options) -> Measured:
    """Past months through a real webserver and daemon."""
    rows = BACKFILL_ROWS if options.rows >= ROWS else max(1, options.rows // 30)
    figure, raw = backfilled(BACKFILL_MONTHS, rows)
    return Measured([Figure(**figure)], raw)


def conversion(options: Options) -> Measured:
    """A plain table becomes a partitioned one beside four writers."""
    figures, raw = converted(CONVERTED_ROWS if options.rows >= ROWS else options.rows)
    known = set(Figure.__dataclass_fields__)
    return Measured([Figure(**{name: one[name] for name in known}) for one in figures], raw)


def chaos(options: Options) -> Measured:
    """Killed workers, faults of S3, restarted servers."""
    trials = CHAOS_TRIALS if options.rows >= ROWS else 10
    subprocess.run(
        [sys.executable, "-m", "tests.archive_pipeline.chaos", "--trials", str(trials)], cwd=CHECKOUT, check=False
    )
    found = json.loads(CHAOS_RESULTS.read_text())
    return Measured([Figure(**figure) for figure in found.pop("figures")], found)


PARTS: Mapping[str, Callable[[Options], Measured]] = {
    "contenders": contenders,
    "backfill": backfill,
    "conversion": conversion,
    "chaos": chaos,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the parts asked for; 1 when a figure misses its target or a part failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.archive", description="Measure the archive.")
    names = [*PARTS, *CONTENDERS]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=list(PARTS), metavar="NAME", help=f"parts or contenders: {names}"
    )
    parser.add_argument("--rows", type=int, default=ROWS, help="of the month; fewer make everything else small too")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figures go")
    given = parser.parse_args(arguments)
    chosen = [name for name in CONTENDERS if name in given.only]
    parts = [name for name in PARTS if name in given.only or (name == "contenders" and chosen)]
    options = Options(given.rows, given.rounds, chosen or CONTENDERS)
    if parts == list(PARTS):
        given.results.unlink(missing_ok=True)
    figures: list[dict[str, Any]] = []
    failed = False
    began_all = time.perf_counter()
    for part in parts:
        began = time.perf_counter()
        told(f"[bold]{part}[/]")
        try:
            measured = PARTS[part](options)
        except Exception as error:  # noqa: BLE001 - the other parts are measured nevertheless
            told(f"[bold red]{part} failed:[/] {type(error).__name__}: {error}")
            failed = True
            continue
        figures = write(part, measured, time.perf_counter() - began, results=given.results)
    told(f"{time.perf_counter() - began_all:.0f} s, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
    show(figures, title="Archive")
    return 1 if failed or not all(one["ok"] for one in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
