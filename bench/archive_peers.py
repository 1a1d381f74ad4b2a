"""One export by another tool: run with the peers' own Python, a job as JSON on stdin, the answer as a line of JSON.

Belongs here: how each tool is asked for the same month, as its documentation says, and how its answer is counted.
Does not: anything of this project, which is not installed there; medians and figures (`bench.archive`).

None of them may delete: their login may only read. A tool that fails, or whose Parquet does not hold every row, ends
with a sentence and has no figure.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

BIN = Path(sys.executable).parent
POLL_SECONDS = 0.05
TIMEOUT_SECONDS = 900
CHUNK_ROWS = 100_000
# The types that Athena reads, as the archive stores them.
TEXTS = ("id", "tenant_id", "workspace_id", "user_id", "details", "ip_address")
PLAIN = ("action", "resource_type", "resource_id", "user_agent")

Job = Mapping[str, Any]
Found = dict[str, Any]


def duckdb(job: Job) -> Found:
    """DuckDB's Postgres extension: COPY to one Parquet file, with the archive's output types."""
    import duckdb
    from duckdb_extensions import import_extension  # type: ignore[import-not-found]

    import_extension("postgres_scanner")
    connection = duckdb.connect()
    connection.execute("LOAD postgres_scanner")
    connection.execute("SET TimeZone = 'UTC'")
    columns = ", ".join([*(f"{name}::VARCHAR AS {name}" for name in TEXTS), *PLAIN])
    file = Path(job["directory"]) / "duckdb.parquet"
    began = time.perf_counter()
    connection.execute(f"ATTACH '{job['dsn']}' AS pg (TYPE postgres, READ_ONLY)")
    connection.execute(
        f"COPY (SELECT {columns}, epoch_us(created_at) AS created_at_us, make_timestamp_ms(epoch_ms(created_at)) AS "
        f"created_at FROM pg.{job['schema']}.{job['table']} WHERE created_at >= '{job['start']}' "
        f"AND created_at < '{job['end']}') TO '{file}' (FORMAT parquet, COMPRESSION zstd)"
    )
    return {"seconds": time.perf_counter() - began, "rss_mb": peak_mb("self")}


def pandas(job: Job) -> Found:
    """What one writes first: read_sql in chunks, to_parquet for each; Postgres casts what pandas cannot store."""
    import pandas
    import sqlalchemy

    engine = sqlalchemy.create_engine(job["dsn"].replace("postgresql://", "postgresql+psycopg://", 1))
    columns = ", ".join([*(f"{name}::text AS {name}" for name in TEXTS), *PLAIN, "created_at"])
    query = sqlalchemy.text(
        f"SELECT {columns} FROM {job['schema']}.{job['table']} WHERE created_at >= '{job['start']}' "
        f"AND created_at < '{job['end']}'"
    )
    began = time.perf_counter()
    with engine.connect().execution_options(stream_results=True) as connection:
        for number, frame in enumerate(pandas.read_sql(query, connection, chunksize=CHUNK_ROWS)):
            frame.to_parquet(Path(job["directory"]) / f"{number:05}.parquet", compression="zstd", index=False)
    return {"seconds": time.perf_counter() - began, "rss_mb": peak_mb("self")}


def pg_freezer(job: Job) -> Found:
    """`pg-freezer replay` of the month: exports, uploads, reads the rows back to count them.

    It would delete them then, which its login may not; a dry run would not even upload.
    """
    config = {
        "database": {"dsn": job["dsn"], "statement_timeout": "3600s"},
        "storage": {
            "protocol": "s3",
            "endpoint_url": os.environ["AWS_ENDPOINT_URL_S3"],
            "bucket": job["bucket"],
            "access_key": os.environ["AWS_ACCESS_KEY_ID"],
            "secret_key": os.environ["AWS_SECRET_ACCESS_KEY"],
            "path_style": True,
        },
        "tables": [
            {"name": job["table"], "schema": job["schema"], "timestamp_column": "created_at", "partition_by": "monthly"}
        ],
        "global": {"max_table_concurrency": 1},
    }
    # `run` leaves out the newest month of a table; `replay` does the same to exactly this one.
    arguments = ["replay", "--table", job["table"], "--from", job["start"][:10], "--to", job["end"][:10]]
    return command([BIN / "pg-freezer", *arguments, "--config", written(job, config)], job)


def backparq(job: Job) -> Found:
    """`backparq archive` in offload mode, delete off, of a view in which jsonb is text: it cannot export the table.

    It makes a struct of each object and fails at the first array of a text and a number: "Expected bytes, got a 'int'".
    """
    dsn = urlsplit(job["dsn"])
    config = {
        "database": {
            "host": dsn.hostname,
            "port": dsn.port,
            "name": dsn.path.lstrip("/"),
            "user": dsn.username,
            "password": unquote(dsn.password or ""),
        },
        "s3": {
            "bucket": job["bucket"],
            "region": os.environ["AWS_REGION"],
            "access_key_id": os.environ["AWS_ACCESS_KEY_ID"],
            "secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"],
            "endpoint_url": os.environ["AWS_ENDPOINT_URL_S3"],
            "use_ssl": False,
            "addressing_style": "path",
        },
        "archive": {
            "mode": "offload",
            "cutoff": job["end"][:10],
            "perform_delete": False,
            "base_dir": job["directory"],
            "tables": [f"{job['schema']}.{job['text_view']}"],
        },
    }
    return command([BIN / "backparq", "-v", "archive", "--config", written(job, config)], job)


def rivet(job: Job) -> Found:
    """`rivet run`, one full export; it refuses inet, so the query casts it."""
    columns = "id, tenant_id, workspace_id, user_id, details, host(ip_address) AS ip_address, " + ", ".join(PLAIN)
    config = {
        "source": {"type": "postgres", "url_env": "PEER_DSN", "environment": "local"},
        "exports": [
            {
                "name": "month",
                "query": f"SELECT {columns}, created_at FROM {job['schema']}.{job['table']} "
                f"WHERE created_at >= '{job['start']}' AND created_at < '{job['end']}'",
                "mode": "full",
                "format": "parquet",
                "compression": "zstd",
                "destination": {
                    "type": "s3",
                    "bucket": job["bucket"],
                    "prefix": "month/",
                    "region": os.environ["AWS_REGION"],
                    "endpoint": os.environ["AWS_ENDPOINT_URL_S3"],
                    "access_key_env": "AWS_ACCESS_KEY_ID",
                    "secret_key_env": "AWS_SECRET_ACCESS_KEY",
                },
            }
        ],
    }
    return command([BIN / "rivet", "run", "--config", written(job, config)], job)


PEERS: Mapping[str, Callable[[Job], Found]] = {
    "duckdb": duckdb,
    "pandas": pandas,
    "pg-freezer": pg_freezer,
    "backparq": backparq,
    "rivet": rivet,
}


def written(job: Job, config: Mapping[str, Any]) -> Path:
    """A configuration as a file of its own; JSON is YAML."""
    path = Path(job["directory"]) / "peer.yaml"
    path.touch(mode=0o600)
    path.write_text(json.dumps(config))
    return path


def command(arguments: list[Any], job: Job) -> Found:
    """Run a command line tool; its time is that of the whole process."""
    environment = {**os.environ, "PEER_DSN": job["dsn"]}
    output = Path(job["directory"]) / "peer.log"
    began, peak = time.perf_counter(), 0.0
    with output.open("wb") as log:
        process = subprocess.Popen(
            [str(each) for each in arguments],
            cwd=job["directory"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            while process.poll() is None:
                peak = max(peak, peak_mb(str(process.pid)))
                time.sleep(POLL_SECONDS)
                if time.perf_counter() - began > TIMEOUT_SECONDS:
                    raise SystemExit(f"it did not end within {TIMEOUT_SECONDS} s")
        finally:
            process.kill()
            process.wait()
    seconds = time.perf_counter() - began
    said = output.read_text(errors="replace").strip().splitlines()
    if process.returncode:
        errors = [line.strip() for line in said if "error" in line.lower()] or said[-3:]
        raise SystemExit(f"it ended with {process.returncode}: {' / '.join(errors)[:500]}")
    return {"seconds": seconds, "rss_mb": peak, "said": " / ".join(said)[-700:]}


def peak_mb(process: str) -> float:
    """Peak memory of a process so far, 0 when it is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    return max((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM:")), default=0.0)


def counted(job: Job) -> Found:
    """Rows and bytes of every Parquet file that the tool left, here or in the bucket, by the files' own footers."""
    import pyarrow.fs
    import pyarrow.parquet

    endpoint = urlsplit(os.environ["AWS_ENDPOINT_URL_S3"])
    places: list[tuple[Any, str]] = [(pyarrow.fs.LocalFileSystem(), job["directory"])]
    places.append(
        (
            pyarrow.fs.S3FileSystem(
                access_key=os.environ["AWS_ACCESS_KEY_ID"],
                secret_key=os.environ["AWS_SECRET_ACCESS_KEY"],
                endpoint_override=endpoint.netloc,
                scheme=endpoint.scheme,
                region=os.environ["AWS_REGION"],
            ),
            job["bucket"],
        )
    )
    for files, root in places:
        found = files.get_file_info(pyarrow.fs.FileSelector(root, recursive=True))
        parquet = [each for each in found if each.is_file and each.path.endswith(".parquet") and each.size]
        if parquet:
            rows = sum(pyarrow.parquet.read_metadata(each.path, filesystem=files).num_rows for each in parquet)
            return {"rows": rows, "bytes": sum(each.size for each in parquet), "files": len(parquet)}
    return {"rows": 0, "bytes": 0, "files": 0}


def main() -> int:
    """Run the tool named on the command line."""
    job = json.load(sys.stdin)
    found = PEERS[sys.argv[1]](job)
    found |= counted(job)
    if found["rows"] != job["rows"]:
        raise SystemExit(f"it exported {found['rows']} of {job['rows']} rows: {found.get('said', '')}")
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
