"""Command line: ``python -m scaling status | explain | measure | approve | report | … | settings | check | migrate``.

Belongs here: arguments, tables for people, exit codes. Does not: what the commands do.
"""

import argparse
from pathlib import Path

from psycopg import errors as pg_errors
from pydantic_settings import BaseSettings
from rich.console import Console
from rich.table import Table as RichTable

from scaling import console as thresholds
from scaling import contract
from scaling.databases import DatabaseRouter
from scaling.errors import UserError, run_command
from scaling.overrides import configured
from scaling.settings import (
    AlertSettings,
    ArchiveSettings,
    ArchiveSourceSettings,
    AutomationSettings,
    DatabaseSettings,
    ExporterSettings,
    LogSettings,
    ReportServerSettings,
    ScalingSettings,
    SyncSettings,
    TracingSettings,
    WebhookSettings,
    load,
)

GROUPS: dict[str, type[BaseSettings]] = {
    "database": DatabaseSettings,
    "sync": SyncSettings,
    "webhook": WebhookSettings,
    "archive": ArchiveSettings,
    "scaling": ScalingSettings,
    "exporter": ExporterSettings,
    "report server": ReportServerSettings,
    "tracing": TracingSettings,
    "automation": AutomationSettings,
    "alerts": AlertSettings,
    "logs": LogSettings,
}


def check(console: Console, needs: set[str]) -> int:
    """Check the settings, compare the database with the data contract, and say in plain words what is missing.

    Args:
        console: where the report goes.
        needs: pipelines whose settings and tables are checked.

    Returns:
        0 when nothing is missing, 1 otherwise.

    Raises:
        UserError: the database is not named or does not answer.
    """
    broken = 0
    for name in sorted(needs & GROUPS.keys()):
        try:
            complete = load(GROUPS[name])
            if isinstance(complete, ScalingSettings):
                configured(complete)
            console.print(f"settings of {name}: complete")
        except UserError as error:
            broken += 1
            console.print(f"settings of {name}: {error}", soft_wrap=True)
    every_table = contract.contract(load(ArchiveSourceSettings).archive_table)
    tables = [table for table in every_table if needs & set(table.needed_by)]
    with DatabaseRouter.from_settings(load(DatabaseSettings), application_name="contract check") as router:
        for shard in router.shards():
            with shard.transaction() as connection:
                breaches = contract.check(connection, tables)
                in_sync = contract.check_roles(connection) if "sync" in needs else []
            report = RichTable("table", "needed by", "verdict", title=f"Data contract, shard {shard.name}")
            for table in tables:
                sentences = [breach.sentence for breach in breaches if breach.table == table.qualified]
                report.add_row(table.qualified, ", ".join(table.needed_by), "\n".join(sentences) or "kept")
            if in_sync:
                report.add_row("schema sync", "sync", "\n".join(finding.sentence for finding in in_sync))
            console.print(report)
            broken += sum(finding.blocking for finding in [*breaches, *in_sync])
    if broken:
        console.print(f"{broken} thing{'s' if broken > 1 else ''} to mend before the pipelines can run.")
    return 1 if broken else 0


def settings(console: Console) -> int:
    """Print every setting with its default and meaning; the values in force are never printed.

    Args:
        console: where the table goes.

    Returns:
        0.
    """
    table = RichTable("variable", "group", "default", "meaning")
    for group, model in GROUPS.items():
        for name, field in model.model_fields.items():
            default = (
                "required" if field.is_required() else str(field.default if field.default is not None else "unset")
            )
            table.add_row(name.upper(), group, default, field.description or "")
    console.print(table)
    return 0


def migrations(console: Console, *, as_sql: bool) -> int:
    """Bring the pipeline's schemas up to date, or print the SQL that does.

    Args:
        console: where the outcome goes.
        as_sql: print the script, touch no database.

    Returns:
        0.

    Raises:
        UserError: the role may not create schemas.
    """
    from scaling import migrate  # alembic takes 0.5 s to import, and the other commands need none

    if as_sql:
        print(migrate.as_sql())
        return 0
    url = load(DatabaseSettings).database_url.get_secret_value()
    try:
        migrate.upgrade(url)
    except Exception as error:
        if isinstance(error.__cause__, pg_errors.InsufficientPrivilege):
            raise UserError(
                "the role of DATABASE_URL may not create the pipeline's schemas; "
                "GRANT CREATE ON DATABASE … TO that role, or apply the output of: python -m scaling migrate --sql"
            ) from None
        if isinstance(error.__cause__, pg_errors.OperationalError):
            raise UserError("the database of DATABASE_URL does not answer or refuses the login") from None
        raise
    console.print("The schemas sync, archive and scaling are up to date.")
    with DatabaseRouter.from_settings(load(DatabaseSettings), application_name="migrate") as router:
        for shard in router.shards():
            with shard.transaction() as connection:
                for finding in contract.check_roles(connection):
                    console.print(f"note: {finding.sentence}", soft_wrap=True)
    return 0


def parser() -> argparse.ArgumentParser:
    """The commands and their arguments."""
    made = argparse.ArgumentParser(prog="python -m scaling", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="every metric: value, threshold, when it will cross, where its rule stands")
    explaining = commands.add_parser("explain", help="all there is to know of one metric, and what to do about it")
    explaining.add_argument("metric", help="its name, as status shows it")
    replaying = commands.add_parser("replay", help="what a rule, or a changed one, would have done on the record")
    replaying.add_argument("metric", help="its name, as status shows it")
    for name, kind in (("threshold", float), ("recovery", float), ("breaches", int), ("of", int)):
        replaying.add_argument(f"--{name}", type=kind, help=f"another {name}, in the metric's unit or in samples")
    measuring = commands.add_parser("measure", help="measure now what is due, or what is named")
    measuring.add_argument("metrics", nargs="*", metavar="metric", help="measured although it is not due")
    for what, meaning in (
        ("approve", "let the action of an episode run; its sensor starts it within half a minute"),
        ("acknowledge", "say that somebody knows of an episode"),
    ):
        deciding = commands.add_parser(what, help=meaning)
        deciding.add_argument("episode", type=int, help="its number, as status shows it")
        deciding.add_argument("--by", required=True, help="who decides, for the record")
    rearming = commands.add_parser("rearm", help="let a rule that waits for a person fire again")
    rearming.add_argument("metric", help="its name, as status shows it")
    rearming.add_argument("--of", default="", help="what it is measured of, like shard=main, as status shows it")
    rearming.add_argument("--by", required=True, help="who decides, for the record")
    commands.add_parser("capabilities", help="what is in force, who switched it and why")
    switching = commands.add_parser("switch", help="switch a capability by hand, from the next run on")
    switching.add_argument("capability", help="its name, as capabilities shows it")
    switching.add_argument("to", choices=["on", "off"])
    switching.add_argument("--by", required=True, help="who decides, for the record")
    switching.add_argument("--reason", required=True, help="why, in a sentence, for the record")
    checking = commands.add_parser("check", help="check the settings, and compare the database with the data contract")
    checking.add_argument("--only", choices=["sync", "archive"], help="the tables of one pipeline (default: all)")
    reporting = commands.add_parser("report", help="one HTML page: is anything wrong, and how is it going")
    reporting.add_argument("--out", type=Path, metavar="FILE", help="in place of SCALING_REPORT_FILE")
    commands.add_parser("settings", help="every setting, its default and meaning")
    migrating = commands.add_parser("migrate", help="create or update the schemas sync, archive, scaling")
    migrating.add_argument("--sql", action="store_true", help="print the SQL and touch no database")
    return made


def main() -> int:
    """Parse the arguments and run one command.

    Returns:
        The exit code.
    """
    given = parser().parse_args()
    console = Console()
    match given.command:
        case "status":
            return thresholds.status(console)
        case "explain":
            return thresholds.explain(console, given.metric)
        case "replay":
            names = ("threshold", "recovery", "breaches", "of")
            changed = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
            return thresholds.replay(console, given.metric, changed)
        case "measure":
            return thresholds.measure_now(console, given.metrics)
        case "approve" | "acknowledge":
            return thresholds.decide(console, given.command, given.episode, given.by)
        case "rearm":
            return thresholds.rearm(console, given.metric, given.of, given.by)
        case "capabilities":
            return thresholds.show_capabilities(console)
        case "switch":
            return thresholds.switch(console, given.capability, on=given.to == "on", by=given.by, reason=given.reason)
        case "report":
            return thresholds.report(console, given.out)
        case "check":
            return check(console, {given.only} if given.only else {"sync", "archive", "scaling"})
        case "settings":
            return settings(console)
        case _:
            return migrations(console, as_sql=given.sql)


if __name__ == "__main__":
    run_command(main)
