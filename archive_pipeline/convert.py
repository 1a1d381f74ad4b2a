"""`python -m archive_pipeline.convert`: the conversion of the audit logs to monthly partitions, for people.

Belongs here: the command line. Does not: the conversion (`conversion`) and its plan (`conversion_plan`).
"""

import argparse
from collections.abc import Sequence

from rich.console import Console

from archive_pipeline import conversion
from archive_pipeline.conversion import Conversion, Outcome, Report, conversion_state
from archive_pipeline.conversion_plan import rendered
from scaling.databases import DatabaseRouter, Shard
from scaling.errors import UserError, run_command
from scaling.settings import ArchiveSourceSettings, DatabaseSettings, load

MILLISECONDS = 1000


def _plan(shard: Shard, wanted: Conversion, options: argparse.Namespace, console: Console) -> int:
    planned = conversion.plan(shard, wanted)
    console.print(rendered(planned))
    if options.sql:
        for step in planned.steps:
            for statement in step.statements:
                console.print(f"{statement};", markup=False, highlight=False, soft_wrap=True)
    if planned.blockers:
        return 1
    if not planned.partitioned:
        console.print("nothing was changed; to convert: python -m archive_pipeline.convert apply --yes")
    return 0


def _apply(shard: Shard, wanted: Conversion, options: argparse.Namespace, console: Console) -> int:
    if not options.yes:
        code = _plan(shard, wanted, options, console)
        if code == 0 and not conversion.plan(shard, wanted).partitioned:
            raise UserError(f"{wanted.table} was not converted; read the plan and repeat the command with --yes")
        return code
    with console.status(f"converting {wanted.table}"):
        report = conversion.convert(shard, wanted, on_step=lambda step: console.print(f"  {step.value}"))
    _summary(console, wanted, report)
    return 0


def _rollback(shard: Shard, wanted: Conversion, options: argparse.Namespace, console: Console) -> int:
    if not options.yes:
        raise UserError(
            f"{wanted.table} was not touched; everybody waits while a rollback copies the rows of the premade months; "
            "repeat the command with --yes"
        )
    with console.status(f"rolling the conversion of {wanted.table} back"):
        report = conversion.rollback(shard, wanted, on_step=lambda step: console.print(f"  {step.value}"))
    _summary(console, wanted, report)
    return 0


def _status(shard: Shard, wanted: Conversion, options: argparse.Namespace, console: Console) -> int:
    del options
    state = conversion_state(shard, wanted.table)
    console.print(f"{wanted.table} is {'partitioned' if state.partitioned else 'a plain table'}")
    if state.running:
        console.print("a run is at work on it")
    for leftover in state.leftovers:
        console.print(f"  {leftover}", markup=False)
    if state.finding is None:
        return 0
    console.print(state.finding, style="red", markup=False, soft_wrap=True)
    return 1


def _summary(console: Console, wanted: Conversion, report: Report) -> None:
    made = f"; {len(report.made)} month(s) made ahead" if report.made else ""
    if report.outcome is Outcome.UNCHANGED:
        console.print(f"{wanted.table} was left as it is{made}")
        return
    console.print(
        f"{wanted.table} {report.outcome.value} in {report.seconds:.1f} s; others waited for "
        f"{report.blocked_seconds * MILLISECONDS:.0f} ms at most (attempt {report.attempts}){made}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes them from the process.

    Returns:
        The exit code: 1 when the plan or the status has something somebody should act on.
    """
    parser = argparse.ArgumentParser(
        prog="python -m archive_pipeline.convert",
        description="Turn the live table of audit logs into monthly partitions, online.",
    )
    commands = parser.add_subparsers(dest="command")
    described = {
        "plan": "show what would be done and what is in the way; changes nothing (the default)",
        "apply": "convert; a converted table is left as it is and gets its months ahead",
        "rollback": "give the plain table back with all its rows, or remove what an aborted conversion left",
        "status": "tell where the conversion stands; exit code 1 when an aborted one left something behind",
    }
    for name, text in described.items():
        command = commands.add_parser(name, help=text, description=text)
        if name in ("plan", "apply"):
            command.add_argument("--sql", action="store_true", help="print the statements, too")
        if name in ("apply", "rollback"):
            command.add_argument("--yes", action="store_true", help="really do it")
    parser.set_defaults(command="plan", sql=False, yes=False)
    options = parser.parse_args(arguments)
    wanted = Conversion.from_settings(load(ArchiveSourceSettings))
    console = Console()
    run = {"plan": _plan, "apply": _apply, "rollback": _rollback, "status": _status}[options.command]
    with DatabaseRouter.from_settings(load(DatabaseSettings), application_name="convert") as router:
        return max(run(shard, wanted, options, console) for shard in router.shards())


if __name__ == "__main__":
    run_command(main)
