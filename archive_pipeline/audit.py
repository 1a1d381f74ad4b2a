"""``python -m archive_pipeline.audit``: is the archive what was published, and proofs of single rows.

Belongs here: the command line and how a report reads. Does not: the audit itself (`archive_pipeline.evidence`), proofs
(`archive_pipeline.proofs`).
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from archive_pipeline import chain, proofs, signing
from archive_pipeline.evidence import (
    AuditReport,
    Finding,
    Key,
    Kind,
    MonthAudit,
    audit,
    audit_chain,
    audit_shard,
    key_of,
    pin,
    remembered,
)
from archive_pipeline.manifest import Layout
from archive_pipeline.months import Month
from archive_pipeline.objects import ArchiveBucket
from archive_pipeline.signing import signer_from
from archive_pipeline.snapshot import SourceTable
from scaling.databases import DatabaseRouter
from scaling.errors import UserError, run_command
from scaling.settings import ArchiveSettings, DatabaseSettings, load

__all__ = ["AuditReport", "Finding", "Kind", "MonthAudit", "audit", "audit_shard", "main"]

COMMANDS = ("verify", "prove", "check-proof", "new-key", "public-keys", "pin")


class _Archive:
    """The configured archive."""

    def __init__(self) -> None:
        self.settings = load(ArchiveSettings)
        self.bucket = ArchiveBucket.from_settings(self.settings)
        self.layout = Layout(self.settings.archive_prefix)
        self.table = SourceTable.parse(self.settings.archive_table)

    def shards(self) -> list[str]:
        """Shards that have a chain in the bucket."""
        prefix = self.layout.chain("").removesuffix("/")
        keys = self.bucket.keys(prefix)
        return sorted({key.removeprefix(prefix).partition("/")[0] for key in keys})

    def keys(self, files: Sequence[str]) -> dict[str, Key]:
        """The configured key and those given on the command line."""
        named = (Path(file) for file in files)
        given = [signing.public_from_pem(_text(path), str(path)) for path in named]
        return {signing.fingerprint(key): Key(key) for key in given} | key_of(signer_from(self.settings))


def _verify(options: argparse.Namespace) -> int:
    archive = _Archive()
    with _progress(quiet=options.json) as on_progress:
        if options.offline:
            keys = archive.keys(options.public_key) or None
            reports = [
                audit(
                    archive.bucket,
                    archive.layout,
                    archive.table,
                    shard,
                    None,
                    keys,
                    deep=options.deep,
                    on_progress=on_progress,
                )
                for shard in archive.shards() or ["main"]
            ]
        else:
            with _databases() as router:
                reports = [
                    audit_shard(
                        shard,
                        archive.bucket,
                        archive.layout,
                        archive.table,
                        deep=options.deep,
                        on_progress=on_progress,
                    )
                    for shard in router.shards()
                ]
    if options.json:
        print(json.dumps([report.to_json() for report in reports], indent=2, default=str))
    else:
        for report in reports:
            _show(report)
    return 0 if all(report.sound for report in reports) else 1


def _prove(options: argparse.Namespace) -> int:
    archive = _Archive()
    month = Month.parse(options.month, archive.settings.archive_time_zone) if options.month else None
    keys = archive.keys(options.public_key)
    shards = archive.shards()
    if not options.offline:
        with _databases() as router:
            shards = [shard.name for shard in router.shards()]
            for shard in router.shards():
                keys = {**keys, **remembered(shard, archive.table).keys}
    failed: UserError | None = None
    with _progress(quiet=False) as on_progress:
        for shard_name in shards:
            try:
                body = proofs.prove(
                    archive.bucket,
                    archive.layout,
                    archive.table,
                    shard_name,
                    options.id,
                    keys,
                    month=month,
                    on_progress=on_progress,
                )
                break
            except UserError as error:
                failed = error
        else:
            raise failed or UserError("nothing is archived yet; materialize audit_log_archive first")
    if options.output:
        Path(options.output).write_bytes(body)
        print(
            f"{options.output}: check it anywhere with: python -m archive_pipeline.audit check-proof {options.output}"
        )
    else:
        sys.stdout.write(body.decode())
    return 0


def _check_proof(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    key = signing.public_from_pem(_text(Path(options.public_key)), options.public_key) if options.public_key else None
    try:
        body = Path(options.file).read_bytes()
    except OSError as error:
        raise UserError(f"{options.file} cannot be read ({error.strerror})") from None
    checked = proofs.check(body, key)
    if checked.problem:
        print(f"{options.file} proves nothing: {checked.problem}")
        return 1
    table = Table("column", "value")
    for name, value in (checked.row or {}).items():
        table.add_row(_escaped(name), "[dim]NULL[/]" if value is None else _escaped(value))
    Console().print(table)
    print(f"This row was archived from {checked.table} in month {checked.month}.")
    print(f"Signed on {checked.linked_at:%Y-%m-%d %H:%M:%S} UTC with key {checked.key_fingerprint}.")
    if key is None:
        print("Compare the key with one you know from elsewhere (audit public-keys), or name it with --public-key.")
    return 0


def _new_key(_: argparse.Namespace) -> int:
    pem = signing.new_key()
    sys.stdout.write(pem)
    sys.stderr.write(
        f"for ARCHIVE_SIGNING_KEY, fingerprint {signing.LocalSigner(pem).fingerprint}; keep it from whoever can write "
        "to the bucket, or use a key in KMS (ARCHIVE_SIGNING_KMS_KEY)\n"
    )
    return 0


def _public_keys(_: argparse.Namespace) -> int:
    archive = _Archive()
    keys = archive.keys(())
    with _databases() as router:
        for shard in router.shards():
            keys = {**keys, **remembered(shard, archive.table).keys}
    for fingerprint, key in keys.items():
        since, until = key.first_used_at, key.last_used_at
        used = f"signed from {since:%Y-%m-%d} to {until:%Y-%m-%d}" if since and until else "has signed nothing yet"
        print(f"# {fingerprint} {used}")
        sys.stdout.write(signing.public_pem(key.public_key))
    return 0


def _pin(options: argparse.Namespace) -> int:
    archive = _Archive()
    code = 0
    with _databases() as router:
        for shard in router.shards():
            known = remembered(shard, archive.table)
            keys = {**archive.keys(options.public_key), **known.keys}
            expected = None if options.force else known.pinned
            report = audit_chain(archive.bucket, archive.layout, archive.table, shard.name, expected, keys)
            if not report.sound:
                _show(report)
                print("Nothing was pinned.")
                code = 1
                continue
            if report.end is None:
                print(f"{shard.name}: there is no chain yet, nothing was pinned")
                continue
            links = [linked.link for linked in chain.walk(archive.bucket, archive.layout, shard.name)]
            pin(shard, archive.table, report.end, links, keys)
            print(f"{shard.name}: link number {report.end.sequence} is pinned, {report.end.sha256}")
    return code


def _show(report: AuditReport) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("month", "gen", "kind", "rows", "parts", "MiB", "linked (UTC)", "key", "")
    for month in report.months:
        table.add_row(
            month.month,
            str(month.generation),
            month.kind,
            f"{month.rows:,}",
            str(month.parts),
            f"{month.bytes / 2**20:,.1f}",
            f"{month.linked_at:%Y-%m-%d %H:%M}" if month.linked_at else "",
            month.key_fingerprint[:8] if month.key_fingerprint else "none",
            f"[red]{month.findings} finding{'s' if month.findings > 1 else ''}[/]"
            if month.findings
            else "[green]ok[/]",
        )
    Console().print(table)
    for finding in report.findings:
        print(f"{finding.month}  {finding.kind}: {finding.key} {finding.text}")
        print(f"    {finding.remedy}")
    for note in report.notes:
        print(f"note: {note}")
    read = "every row read" if report.deep else "rows not read (--deep reads them)"
    what = f"{report.table} in s3://{report.bucket}, database {report.shard}: {len(report.months)} month(s), "
    print(f"{what}{report.links} link(s), {read}: {'sound' if report.sound else f'{len(report.findings)} finding(s)'}")


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=_escaped(what[-60:]))

        yield show


@contextmanager
def _databases() -> Iterator[DatabaseRouter]:
    with DatabaseRouter.from_settings(load(DatabaseSettings), application_name="archive_audit") as router:
        yield router


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path} cannot be read; name a public key in PEM") from None


def _escaped(value: str) -> str:
    from rich.markup import escape

    return escape(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m archive_pipeline.audit",
        description="Walk the chain of signed links and name everything that is not as it was published; "
        "exit code 1 when there is something. Without a command: verify.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    verify = commands.add_parser("verify", help="audit the whole archive")
    verify.add_argument("--deep", action="store_true", help="read every part: SHA-256, digest and Merkle root again")
    verify.add_argument("--offline", action="store_true", help="do not ask Postgres; a cut-off end goes unnoticed")
    verify.add_argument("--json", action="store_true", help="the report as JSON")
    verify.set_defaults(run=_verify)
    prove = commands.add_parser("prove", help="write a file that proves one row to anybody")
    prove.add_argument("id", help="of the row")
    prove.add_argument("--month", metavar="YYYY-MM", help="of the row; otherwise it is looked for in all months")
    prove.add_argument(
        "--output", metavar="FILE", help="standard output unless given; the file holds the row's content"
    )
    prove.add_argument("--offline", action="store_true", help="do not ask Postgres for public keys")
    prove.set_defaults(run=_prove)
    check = commands.add_parser("check-proof", help="check such a file; needs neither the bucket nor Postgres")
    check.add_argument("file")
    check.add_argument("--public-key", metavar="FILE", help="PEM; the only key that is believed")
    check.set_defaults(run=_check_proof)
    new_key = commands.add_parser("new-key", help="make a private key for ARCHIVE_SIGNING_KEY")
    new_key.set_defaults(run=_new_key)
    public_keys = commands.add_parser("public-keys", help="print the public keys that signed, for auditors to keep")
    public_keys.set_defaults(run=_public_keys)
    pinning = commands.add_parser("pin", help="pin the chain's end anew, after Postgres was lost or restored")
    pinning.add_argument("--force", action="store_true", help="though Postgres pins another end than the bucket has")
    pinning.set_defaults(run=_pin)
    for command in (verify, prove, pinning):
        command.add_argument(
            "--public-key", metavar="FILE", action="append", default=[], help="PEM of a further key that signed"
        )
    return parser


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes them from the process.

    Returns:
        The exit code: 0 sound, 1 findings.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in (*COMMANDS, "-h", "--help"):
        given = ["verify", *given]
    options = _parser().parse_args(given)
    code: int = options.run(options)
    return code


if __name__ == "__main__":
    run_command(main)
