"""What a conversion to monthly partitions would do, and what stands in its way, before anything is touched.

Belongs here: the preflight (facts read from the server, blockers with their remedies) and the plan: steps, locks,
estimated times, what is carried over. Does not: changing anything (`conversion`).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

from psycopg import sql
from psycopg.rows import dict_row
from pydantic import TypeAdapter

from archive_pipeline import table_statements as statements
from archive_pipeline.months import Month
from archive_pipeline.snapshot import SourceTable
from archive_pipeline.table_objects import Dependant, TableObjects, capture
from archive_pipeline.table_statements import KEY, Names
from scaling.databases import Connection
from scaling.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

# The pooler's transaction mode loses advisory locks and session settings between two statements.
TRANSACTION_POOLER_PORT = 6543
LONG_TRANSACTION_SECONDS = 60.0
SHOWN_ROWS = 10

# Rough rates of a small server with cold caches; they tell minutes from hours.
SCAN_BYTES_PER_SECOND = 200e6
INDEX_ROWS_PER_SECOND = 600e3
INDEX_BYTES_PER_ROW = 45
SHORT_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Facts:
    """What the preflight asks the server beside the table's objects.

    Attributes:
        port: that was connected to.
        beyond: rows at or after the bound; `infinite`: rows without a finite time; `without_time`: rows with NULL.
        rows: ids of some of these rows, for the terminal of whoever has to correct them; never for logs.
        taken: names the conversion needs that something else has.
        schema_open_to: roles that may enter the partitions' schema and should not.
    """

    version: int
    port: int
    in_recovery: bool
    role: str
    may_act: bool
    sees_all_rows: bool
    schema_exists: bool
    may_use_schema: bool
    may_create_in_schema: bool
    schema_open_to: tuple[str, ...]
    taken: tuple[str, ...]
    rows_estimate: int
    heap_bytes: int
    longest_transaction_seconds: float
    prepared_transactions: int
    beyond: int = 0
    infinite: int = 0
    without_time: int = 0
    rows: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Blocker:
    """Why the table cannot be converted as it is, and what to do about it."""

    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.remedy}"


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the conversion.

    Attributes:
        name: for people.
        lock: that it takes.
        blocks: who waits for it.
        seconds: estimated.
        statements: the SQL, where it is known beforehand.
    """

    name: str
    lock: str
    blocks: str
    seconds: float
    statements: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """A conversion, ready to be read.

    Attributes:
        bound: end of the first partition; months are made from there on.
        before: every object of the table.
        carried: what the partitioned table will have as before, counted.
        blockers: nothing happens while there is one.
        warnings: what changes for those who use the table.
        partitioned: it is converted already, there is nothing to do.
    """

    names: Names
    zone: str
    bound: datetime
    before: TableObjects
    facts: Facts
    steps: tuple[Step, ...]
    carried: tuple[str, ...]
    blockers: tuple[Blocker, ...]
    warnings: tuple[str, ...]
    partitioned: bool

    @property
    def seconds(self) -> float:
        """Estimated, all steps together."""
        return sum(step.seconds for step in self.steps)


FACTS = """
SELECT current_setting('server_version_num')::int AS version, %(port)s::int AS port, pg_is_in_recovery() AS in_recovery,
       current_user::text AS role, pg_has_role(c.relowner, 'USAGE') AS may_act,
       NOT row_security_active(c.oid) AS sees_all_rows, p.oid IS NOT NULL AS schema_exists,
       CASE WHEN p.oid IS NULL THEN has_database_privilege(pg_get_userbyid(c.relowner), current_database(), 'CREATE')
            ELSE has_schema_privilege(pg_get_userbyid(c.relowner), p.oid, 'CREATE') END AS may_use_schema,
       has_schema_privilege(pg_get_userbyid(c.relowner), c.relnamespace, 'CREATE') AS may_create_in_schema,
       (SELECT coalesce(array_agg(DISTINCT coalesce(pg_get_userbyid(nullif(g.grantee, 0)), 'PUBLIC')), '{}')
        FROM aclexplode(p.nspacl) g
        WHERE g.grantee NOT IN (p.nspowner, c.relowner)
          AND pg_get_userbyid(g.grantee) IS DISTINCT FROM %(reader)s) AS schema_open_to,
       (SELECT coalesce(array_agg(format('%%I.%%I', n.nspname, x.relname) ORDER BY x.relname), '{}')
        FROM pg_class x JOIN pg_namespace n ON n.oid = x.relnamespace
        WHERE x.relkind NOT IN ('t')
          AND ((n.nspname = %(schema)s AND (x.relname IN (%(table)s, %(legacy)s)
                 OR x.relname IN (SELECT i.relname FROM pg_index k JOIN pg_class i ON i.oid = k.indexrelid
                                  WHERE k.indrelid = c.oid)))
            OR (x.relnamespace = c.relnamespace AND x.relname = %(index)s
                AND NOT EXISTS (SELECT FROM pg_index k WHERE k.indexrelid = x.oid AND k.indrelid = c.oid)))) AS taken,
       greatest(c.reltuples, 0)::bigint AS rows_estimate, pg_table_size(c.oid) AS heap_bytes,
       coalesce((SELECT max(extract(epoch FROM clock_timestamp() - xact_start)) FROM pg_stat_activity
                 WHERE datname = current_database() AND pid <> pg_backend_pid()
                   AND backend_type = 'client backend'), 0)::float AS longest_transaction_seconds,
       (SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database()) AS prepared_transactions
FROM pg_class c LEFT JOIN pg_namespace p ON p.nspname = %(schema)s
WHERE c.oid = %(oid)s::regclass
"""

_FACTS: TypeAdapter[Facts] = TypeAdapter(Facts)


def bound_of(now: datetime, zone: str) -> datetime:
    """The end of the first partition: the start of the month after the next one, four weeks ahead at least.

    While the conversion is under way Postgres refuses rows at or after it.

    Args:
        now: the database's clock.
        zone: whose calendar months the partitions are.
    """
    return Month.containing(now, zone).following.following.start


def preflight(connection: Connection, names: Names, zone: str) -> Plan:
    """Look at the table and at everything that could stop its conversion; nothing is changed.

    The rows are counted once for times that no partition can hold, by the index on `created_at` if there is one.

    Args:
        connection: of the table's owner, autocommit.
        names: of the conversion.
        zone: whose calendar months the partitions are.

    Returns:
        The plan, blockers included.

    Raises:
        UserError: there is no such table.
    """
    with connection.transaction():
        # An ordinary look at the catalog must not queue behind somebody's ACCESS EXCLUSIVE.
        connection.execute("SET LOCAL TimeZone = 'UTC'")
        found = capture(connection, names.table)
        (now,) = connection.execute("SELECT clock_timestamp()").fetchone() or (None,)
        bound = bound_of(now, zone)
        facts = _facts(connection, names)
    before = without_additions(found, names)
    if (
        found.kind == "r"
        and facts.may_act
        and facts.sees_all_rows
        and (key := before.column(KEY))
        and key.type.endswith("time zone")
    ):
        facts = _with_rows(connection, before, facts, bound)
    return plan_of(before, facts, names, zone, bound)


def plan_of(before: TableObjects, facts: Facts, names: Names, zone: str, bound: datetime) -> Plan:
    """Make the plan out of what is known; no I/O.

    Args:
        before: every object of the table, without what an earlier conversion left behind.
        facts: of the server.
        names: of the conversion.
        zone: whose calendar months the partitions are.
        bound: end of the first partition.
    """
    partitioned = before.kind == "p"
    blocked = () if partitioned else tuple(_blockers(before, facts, names))
    return Plan(
        names=names,
        zone=zone,
        bound=bound,
        before=before,
        facts=facts,
        steps=() if partitioned else tuple(_steps(before, facts, names, bound)),
        carried=tuple(_carried(before)),
        blockers=blocked,
        warnings=() if partitioned else tuple(_warnings(before, facts)),
        partitioned=partitioned,
    )


def without_additions(objects: TableObjects, names: Names) -> TableObjects:
    """The table without what a conversion adds on its way.

    Args:
        objects: of the table.
        names: of the conversion.
    """
    return replace(
        objects.without_constraint(names.check),
        indexes=tuple(index for index in objects.indexes if index.name != names.index or index.constraint),
    )


def dependant_blockers(dependants: Sequence[Dependant], table: SourceTable) -> Iterable[Blocker]:
    """What refers to the table in a way that cannot be bound to another one.

    Args:
        dependants: of the table.
        table: named in the sentences.
    """
    for each in dependants:
        if each.kind == "materialized view":
            yield Blocker(
                f"materialized view {each.name} would go on reading the old table only",
                f"keep its definition (pg_get_viewdef), DROP MATERIALIZED VIEW {each.name}, convert, create it again",
            )
        elif each.kind == "row type":
            yield Blocker(
                f"{each.name} uses the row type of {table}, which becomes another type",
                "drop it, convert, create it again",
            )
        elif each.kind == "key":
            yield Blocker(
                f"{each.name} relies on the primary key of {table} (GROUP BY the key), which gets a further column",
                "name every selected column in its GROUP BY",
            )
        elif each.definition is None:
            yield Blocker(
                f"{each.name} depends on {table} in a way that is not carried over",
                "drop it, convert, create it again",
            )
        elif not each.alterable:
            yield Blocker(
                f"{each.kind} {each.name} must be bound to the new table and belongs to another role",
                "let its owner drop it and create it again afterwards, or grant that role to the owner of the table",
            )


def _facts(connection: Connection, names: Names) -> Facts:
    with connection.cursor(row_factory=dict_row) as cursor:
        found = cursor.execute(
            FACTS,
            {
                "oid": names.table.identifier.as_string(None),
                "port": connection.info.port,
                "schema": names.partition_schema,
                "table": names.table.name,
                "legacy": names.legacy.name,
                "index": names.index,
                "reader": names.reader,
            },
        ).fetchone()
    if found is None:
        raise UserError(f"there is no table {names.table} in the database; check ARCHIVE_TABLE")
    return _FACTS.validate_python(found)


def _with_rows(connection: Connection, before: TableObjects, facts: Facts, bound: datetime) -> Facts:
    odd = sql.SQL("({key} IS NULL OR {key} >= {bound}::timestamptz OR {key} = '-infinity')").format(
        key=sql.Identifier(KEY), bound=statements.bound_literal(bound)
    )
    counted = connection.execute(
        sql.SQL(
            "SELECT count(*) FILTER (WHERE isfinite({key})), count(*) FILTER (WHERE NOT isfinite({key})), "
            "count(*) FILTER (WHERE {key} IS NULL) FROM {table} WHERE {odd}"
        ).format(key=sql.Identifier(KEY), table=before.table.identifier, odd=odd)
    ).fetchone()
    beyond, infinite, without_time = counted or (0, 0, 0)
    rows: tuple[str, ...] = ()
    if (beyond or infinite or without_time) and before.primary_key is not None:
        rows = tuple(
            shown
            for (shown,) in connection.execute(
                sql.SQL("SELECT concat_ws(', ', {}) FROM {} WHERE {} LIMIT {}").format(
                    sql.SQL(", ").join(map(sql.Identifier, before.primary_key.columns)),
                    before.table.identifier,
                    odd,
                    SHOWN_ROWS,
                )
            )
        )
    return replace(facts, beyond=beyond, infinite=infinite, without_time=without_time, rows=rows)


def _blockers(before: TableObjects, facts: Facts, names: Names) -> Iterable[Blocker]:
    yield from _server_blockers(before, facts, names)
    yield from _row_blockers(before, facts, names)
    if before.kind != "r":
        yield Blocker(f"{before.table} is not a table", "name the table of the audit logs in ARCHIVE_TABLE")
    if before.persistence != "p":
        yield Blocker(f"{before.table} is unlogged or temporary", f"ALTER TABLE {before.table} SET LOGGED")
    if before.of_type:
        yield Blocker(f"{before.table} is a table of type {before.of_type}", f"ALTER TABLE {before.table} NOT OF")
    for other in (*before.inherits, *before.inherited_by):
        yield Blocker(f"{before.table} and {other} inherit from each other", "ALTER TABLE … NO INHERIT first")
    if before.extension:
        yield Blocker(f"{before.table} belongs to extension {before.extension}", "ALTER EXTENSION … DROP TABLE first")
    if before.labels:
        yield Blocker(
            f"{before.table} has security labels of {', '.join(before.labels)}", "remove them, convert, set them again"
        )
    if before.primary_key is None:
        yield Blocker(
            f"{before.table} has no primary key", f"ALTER TABLE {before.table} ADD PRIMARY KEY over the row's id"
        )
    elif before.primary_key.deferrable:
        yield Blocker("the primary key is DEFERRABLE", "make it NOT DEFERRABLE")
    elif "INCLUDE" in before.primary_key.definition:
        yield Blocker("the primary key has INCLUDE columns", "make it without")
    yield from _constraint_blockers(before)
    for trigger in before.triggers:
        if trigger.row and trigger.transition_tables:
            yield Blocker(
                f"trigger {trigger.name} is FOR EACH ROW with transition tables, which partitioned tables do not have",
                "make it FOR EACH STATEMENT, or without REFERENCING",
            )
    for publication in before.publications:
        if publication.via_root or (publication.alterable and not publication.other_partitioned):
            continue
        yield Blocker(
            f"publication {publication.name} would send changes under the names of the partitions",
            f"its owner: ALTER PUBLICATION {publication.name} SET (publish_via_partition_root = true)",
        )
    for publication in before.publications:
        if publication.by == "table" and publication.via_root and not publication.alterable:
            yield Blocker(
                f"publication {publication.name} belongs to another role and has to be given the new table",
                f"its owner: ALTER PUBLICATION {publication.name} DROP TABLE, convert, ADD TABLE",
            )
    for inbound in before.referenced_by:
        yield Blocker(
            f"foreign key {inbound} refers to {before.table}, whose key gets a further column",
            f"drop it; keep {KEY} beside the id in the other table if it is needed, and refer to both",
        )
    yield from dependant_blockers(before.dependants, before.table)


def _server_blockers(before: TableObjects, facts: Facts, names: Names) -> Iterable[Blocker]:
    if facts.port == TRANSACTION_POOLER_PORT:
        yield Blocker(
            "DATABASE_OWNER_URL goes through a pooler in transaction mode (port 6543)",
            "use the direct connection or the pooler's session mode, port 5432",
        )
    if facts.in_recovery:
        yield Blocker("the server is a standby", "name the primary in DATABASE_OWNER_URL")
    if not facts.may_act:
        yield Blocker(
            f"{facts.role} does not own {before.table}, {before.owner} does",
            f"log in as {before.owner} in DATABASE_OWNER_URL, or GRANT {before.owner} TO {facts.role}",
        )
    if not facts.sees_all_rows:
        yield Blocker(
            f"row-level security of {before.table} is forced and hides rows from {facts.role}",
            f"ALTER ROLE {facts.role} BYPASSRLS",
        )
    if names.partition_schema == before.schema:
        yield Blocker(
            f"ARCHIVE_PARTITION_SCHEMA is {before.schema}, where everybody could read the partitions past the policies",
            "name a schema of its own",
        )
    elif facts.schema_open_to:
        yield Blocker(
            f"schema {names.partition_schema} is open to {', '.join(facts.schema_open_to)}, who could read the "
            "partitions past the table's policies",
            f"REVOKE ALL ON SCHEMA {names.partition_schema} FROM {', '.join(facts.schema_open_to)}",
        )
    if not facts.may_use_schema:
        target = f"SCHEMA {names.partition_schema}" if facts.schema_exists else "DATABASE"
        yield Blocker(
            f"{before.owner} may not create tables in schema {names.partition_schema}",
            f"GRANT CREATE ON {target} TO {before.owner}",
        )
    if not facts.may_create_in_schema:
        yield Blocker(
            f"{before.owner} may not create a table in schema {before.schema}",
            f"GRANT CREATE ON SCHEMA {before.schema} TO {before.owner}",
        )
    for name in facts.taken:
        yield Blocker(f"{name} exists, and the conversion needs the name", "rename it or drop it")


def _row_blockers(before: TableObjects, facts: Facts, names: Names) -> Iterable[Blocker]:
    key = before.column(KEY)
    if key is None or key.type != "timestamp with time zone":
        yield Blocker(
            f"{before.table} has no column {KEY} of type timestamptz ({key.type if key else 'there is none'})",
            f"add one, or change its type: ALTER TABLE {before.table} ALTER {KEY} TYPE timestamptz USING …",
        )
        return
    if key.generated:
        yield Blocker(f"{KEY} is a generated column, which cannot be a partition key", "DROP EXPRESSION")
    where = statements.text(sql.SQL("SELECT * FROM {} WHERE ").format(before.table.identifier)) + KEY
    if facts.without_time:
        yield Blocker(
            f"{facts.without_time:,} rows have no {KEY}, and no partition takes them",
            f"give them one; they are: {where} IS NULL",
        )
    if not key.not_null:
        yield Blocker(f"{KEY} may be NULL", f"ALTER TABLE {before.table} ALTER {KEY} SET NOT NULL")
    if facts.infinite:
        yield Blocker(
            f"{facts.infinite:,} rows have an infinite {KEY}, which is in no month",
            f"give them a finite one; they are: {where} IN ('infinity', '-infinity')",
        )
    if facts.beyond:
        yield Blocker(
            f"{facts.beyond:,} rows lie at or after the bound, in the future",
            f"correct their {KEY}, or wait; they are: {where} > now() + interval '1 month'",
        )
    del names


def _constraint_blockers(before: TableObjects) -> Iterable[Blocker]:
    for constraint in before.constraints:
        named = f"constraint {constraint.name}"
        if not constraint.validated:
            yield Blocker(f"{named} is not validated", f"ALTER TABLE {before.table} VALIDATE CONSTRAINT, or drop it")
        if not constraint.inheritable:
            yield Blocker(f"{named} is NO INHERIT, which partitioned tables do not have", "make it without")
        if constraint.kind == "x":
            yield Blocker(f"{named} excludes across all rows, which partitions cannot", "drop it")
        if constraint.kind == "u" and KEY not in constraint.columns:
            yield Blocker(
                f"{named} is unique without {KEY}, which partitions cannot check", f"drop it, or add {KEY} to it"
            )
    for index in before.indexes:
        if not index.valid:
            yield Blocker(f"index {index.name} is invalid", "REINDEX INDEX CONCURRENTLY, or drop it")
        if index.unique and not index.constraint and KEY not in index.columns:
            yield Blocker(
                f"index {index.name} is unique without {KEY}, which partitions cannot check",
                f"drop it, or add {KEY} to it",
            )


def _steps(before: TableObjects, facts: Facts, names: Names, bound: datetime) -> Iterable[Step]:
    scan = facts.heap_bytes / SCAN_BYTES_PER_SECOND
    until = f"{statements.bound_literal(bound)}"
    bound_anew = {each.relation for each in before.dependants if each.relation and each.definition}
    referenced = ", ".join([*(f"{each.schema}.{each.name}" for each in before.references), *sorted(bound_anew)])
    yield Step(
        f"private schema {names.partition_schema}, entered by nobody but {names.reader or before.owner}",
        "none",
        "nobody",
        SHORT_SECONDS,
    )
    key = statements.key_columns(before)
    if before.primary_key is None or before.primary_key.columns != key:
        yield Step(
            f"unique index over {', '.join(key)}, about {_size(facts.rows_estimate * INDEX_BYTES_PER_ROW)}",
            "SHARE UPDATE EXCLUSIVE",
            "other DDL; waits for open transactions",
            scan + facts.rows_estimate / INDEX_ROWS_PER_SECOND,
            (statements.build_index(names.index, before.table, key),),
        )
    yield Step(
        f"CHECK that rows lie before {until}; from here on others are refused",
        "ACCESS EXCLUSIVE",
        "everybody, some milliseconds",
        SHORT_SECONDS,
        (statements.add_check(names, bound),),
    )
    yield Step(
        "validate the CHECK, so that the swap scans nothing",
        "SHARE UPDATE EXCLUSIVE",
        "other DDL",
        scan,
        (statements.validate_check(names),),
    )
    yield Step(
        f"the swap: {names.legacy} becomes the first partition of a new {before.table}; rolled back unless everything "
        "is as before",
        f"ACCESS EXCLUSIVE{f', also on {referenced}' if referenced else ''}",
        "everybody, some tens of milliseconds; tried again when the lock is not to be had at once",
        SHORT_SECONDS,
        tuple(statements.swap(before, names, bound)),
    )
    yield Step(f"months from {until} on", "SHARE UPDATE EXCLUSIVE", "other DDL", SHORT_SECONDS)
    yield Step("statistics of the partitioned table", "SHARE UPDATE EXCLUSIVE", "other DDL", min(scan, 30.0))


def _carried(before: TableObjects) -> Iterable[str]:
    def listed(what: str, found: Sequence[object]) -> Iterable[str]:
        if found:
            names = [str(getattr(each, "name", each)) for each in found]
            yield f"{what}: {len(found)} ({', '.join(sorted(names))})"

    yield f"owner {before.owner}"
    yield f"row-level security {'on' if before.row_security else 'off'}{', forced' * before.force_row_security}"
    yield from listed("policies", before.policies)
    grantees = Counter(grant.grantee or "PUBLIC" for grant in before.grants if grant.grantee != before.owner)
    yield from listed("grants to", [f"{role} {number}" for role, number in grantees.items()])
    yield from listed("columns", before.columns)
    yield from listed("sequences", before.sequences)
    yield from listed("indexes", before.indexes)
    yield from listed("constraints", before.constraints)
    yield from listed("triggers", before.triggers)
    yield from listed("rules", before.rules)
    yield from listed("statistics objects", before.statistics)
    yield from listed("publications", before.publications)
    yield from listed("bound to the new table", [each for each in before.dependants if each.definition])
    identity = {"d": "default", "f": "full", "n": "nothing", "i": "an index"}
    yield f"replica identity {identity.get(before.replica_identity, before.replica_identity)}"
    comments = [before.comment, *(column.comment for column in before.columns)]
    yield f"comments: {sum(comment is not None for comment in comments)} on the table and its columns"


def _warnings(before: TableObjects, facts: Facts) -> Iterable[str]:
    key = before.primary_key
    if key is not None and KEY not in key.columns:
        was = ", ".join(key.columns)
        yield (
            f"({was}) alone is unique no more, ({was}, {KEY}) is: INSERT … ON CONFLICT ({was}) fails afterwards, so "
            "look for it in the application"
        )
    if facts.longest_transaction_seconds > LONG_TRANSACTION_SECONDS:
        yield (
            f"a transaction has been open for {facts.longest_transaction_seconds:,.0f} s: the index waits for it, and "
            "the swap is tried again and again while it holds a lock on the table"
        )
    if facts.prepared_transactions:
        yield f"{facts.prepared_transactions} prepared transactions are open and may hold locks on the table"
    for each in before.references:
        if not each.lockable:
            yield f"{facts.role} may not lock {each.schema}.{each.name} beforehand; the swap takes the lock on its way"
    if any(trigger.row and "BEFORE" in trigger.definition for trigger in before.triggers):
        yield f"a BEFORE trigger must not move a row to another month by changing {KEY} (Postgres refuses it then)"
    for publication in before.publications:
        if not publication.via_root:
            yield (
                f"publication {publication.name} gets publish_via_partition_root = true, so that subscribers see "
                f"{before.table} as before"
            )
    if any(index.clustered for index in before.indexes) or before.options:
        yield "CLUSTER and storage parameters stay with the old table, new months have the defaults"


def rendered(plan: Plan) -> "RenderableType":
    """The plan for a terminal; it shows ids of rows in the way, so it is not for logs.

    Args:
        plan: of `preflight`.
    """
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    facts = plan.facts
    if plan.partitioned:
        return f"{plan.names.table} is partitioned already: {plan.before.partition_key}; there is nothing to do"
    steps = Table("", "step", "lock", "blocks", "about", title=f"{plan.names.table} to monthly partitions")
    for number, step in enumerate(plan.steps, start=1):
        steps.add_row(str(number), *map(escape, (step.name, step.lock, step.blocks, _duration(step.seconds))))
    duration = f"about {_duration(plan.seconds)}"
    parts: list[RenderableType] = [
        steps,
        f"{facts.rows_estimate:,} rows, {_size(facts.heap_bytes)}; months of {plan.zone}; {duration} in all",
        "",
        "[bold]carried over[/bold]",
        *(f"  {escape(line)}" for line in plan.carried),
    ]
    if plan.warnings:
        parts += ["", "[bold yellow]to know[/bold yellow]", *(f"  {escape(line)}" for line in plan.warnings)]
    if plan.blockers:
        parts += ["", "[bold red]in the way, nothing will be changed[/bold red]"]
        parts += [f"  {escape(str(blocker))}" for blocker in plan.blockers]
    if facts.rows:
        parts.append(f"  keys of rows in the way: {escape('; '.join(facts.rows))}")
    return Group(*parts)


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "< 1 s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
