"""The SQL that turns a plain table into a partitioned one with the same belongings, and back.

Belongs here: building statements out of `TableObjects`, and what the result must look like; pure.
Does not: running them or taking locks (`conversion`), judging whether they can succeed (`conversion_plan`).

The whole swap is known before any lock is taken, so it can be read beforehand and travels to the server in one piece:
the table is blocked for the statements themselves, not for the network between them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import groupby
from typing import LiteralString

from psycopg import sql

from archive_pipeline.snapshot import SourceTable
from archive_pipeline.table_objects import Constraint, Grant, SequenceObject, TableObjects

KEY = "created_at"
IDENTIFIER_BYTES = 63

ENABLED = {"D": "DISABLE", "R": "ENABLE REPLICA", "A": "ENABLE ALWAYS"}
RELATION, SEQUENCE = "TABLE", "SEQUENCE"

# What ALTER DEFAULT PRIVILEGES gave on a table or sequence made a moment ago is taken away again: the grants that
# follow are those of the original, no more.
REVOKE_EVERYTHING = """DO $archive$
DECLARE found text;
BEGIN
    FOR found IN
        SELECT DISTINCT CASE WHEN g.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(g.grantee)) END
        FROM pg_class c CROSS JOIN LATERAL (
            SELECT grantee FROM aclexplode(coalesce(c.relacl, acldefault({kind}, c.relowner)))
            UNION ALL
            SELECT x.grantee FROM pg_attribute a CROSS JOIN LATERAL aclexplode(a.attacl) x
            WHERE a.attrelid = c.oid) g
        WHERE c.oid = {name}::regclass
    LOOP
        EXECUTE format('REVOKE ALL ON {what} %s FROM %s CASCADE', {name}, found);
    END LOOP;
END $archive$"""


@dataclass(frozen=True, slots=True)
class Names:
    """What the conversion of one table is called on its way.

    Attributes:
        table: that is converted.
        partition_schema: private schema of the partitions.
        reader: role that may read the partitions themselves; None when the owner is the only one.
    """

    table: SourceTable
    partition_schema: str
    reader: str | None = None

    @property
    def legacy(self) -> SourceTable:
        """The plain table once it is a partition."""
        return SourceTable(self.partition_schema, _shortened(self.table.name, "_legacy"))

    @property
    def check(self) -> str:
        """The CHECK that makes the ATTACH free of a scan."""
        return _shortened(self.table.name, "_archive_bound")

    @property
    def index(self) -> str:
        """The unique index that becomes the primary key."""
        return _shortened(self.table.name, "_archive_key")

    @property
    def rollback_schema(self) -> str:
        """Where the partitioned table stands while the plain one takes its place back; gone at the end."""
        return _shortened(self.partition_schema, "_rollback")


def key_columns(objects: TableObjects) -> tuple[str, ...]:
    """The primary key a partitioned table can have: the present one and the partition key.

    Args:
        objects: of the plain table; without a primary key it is the partition key alone.
    """
    columns = objects.primary_key.columns if objects.primary_key else ()
    return columns if KEY in columns else (*columns, KEY)


def bound_literal(bound: datetime) -> str:
    """An instant as Postgres reads it in any session's time zone.

    Args:
        bound: timezone-aware.
    """
    return f"{bound.astimezone(UTC):%Y-%m-%d %H:%M:%S}+00"


def text(statement: sql.Composable) -> str:
    """One statement as text.

    Args:
        statement: without parameters.
    """
    return statement.as_string(None)


def script(statements: Sequence[str]) -> str:
    """Several statements for one round trip.

    Args:
        statements: without parameters.
    """
    return ";\n".join(statements)


def add_check(names: Names, bound: datetime) -> str:
    """Refuse new rows at or after the bound; old rows are not looked at yet."""
    return text(
        sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} CHECK ({} < {}::timestamptz) NOT VALID").format(
            names.table.identifier, sql.Identifier(names.check), sql.Identifier(KEY), bound_literal(bound)
        )
    )


def validate_check(names: Names) -> str:
    """Look at the old rows."""
    return text(
        sql.SQL("ALTER TABLE {} VALIDATE CONSTRAINT {}").format(names.table.identifier, sql.Identifier(names.check))
    )


def drop_check(names: Names) -> str:
    """Take the CHECK back."""
    return text(
        sql.SQL("ALTER TABLE {} DROP CONSTRAINT IF EXISTS {}").format(
            names.table.identifier, sql.Identifier(names.check)
        )
    )


def build_index(name: str, table: SourceTable, columns: Sequence[str]) -> str:
    """Build a unique index beside the writers."""
    return text(
        sql.SQL("CREATE UNIQUE INDEX CONCURRENTLY {} ON {} ({})").format(
            sql.Identifier(name), table.identifier, _identifiers(columns)
        )
    )


def drop_index(schema: str, name: str) -> str:
    """Drop an index beside the writers; an invalid one, too."""
    return text(sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(sql.Identifier(schema, name)))


def lock_dependants(objects: TableObjects) -> list[str]:
    """Lock views and tables that will be bound to another table, each by itself.

    Who reads a view locks it and then the table: one who came between would wait for the table, and the swap for the
    view. LOCK on a view would lock every table it shows as well; giving it to its own owner locks and changes nothing.

    Args:
        objects: of the table.
    """
    found = {each.relation: each.relation_owner for each in objects.dependants if each.definition and each.alterable}
    return [
        text(sql.SQL("ALTER TABLE {} OWNER TO {}").format(_raw(relation), sql.Identifier(owner)))
        for relation, owner in sorted(found.items(), key=str)
        if relation is not None and owner is not None
    ]


def swap(before: TableObjects, names: Names, bound: datetime) -> list[str]:
    """Put a partitioned table in the place of the plain one, which becomes its first partition.

    Args:
        before: the plain table, without what the conversion itself has added so far.
        names: of the conversion.
        bound: end of the first partition; the CHECK for it is validated.
    """
    return [text(statement) for statement in _swap(before, names, bound)]


def unswap(
    now: TableObjects,
    plain: TableObjects,
    names: Names,
    *,
    indexes: Sequence[tuple[str, str]],
    constraints: Sequence[tuple[str, str]],
    statistics: Sequence[tuple[str, str]],
) -> list[str]:
    """Put the plain table back in the place of the partitioned one, with the rows of all partitions.

    Args:
        now: the partitioned table.
        plain: as it was before the conversion.
        names: of the conversion.
        indexes: name on the plain table, name on the partitioned one, of indexes that are each other's counterpart.
        constraints: the same of foreign keys.
        statistics: schema and name of the plain table's statistics objects.
    """
    return [
        text(statement)
        for statement in _unswap(now, plain, names, indexes=indexes, constraints=constraints, statistics=statistics)
    ]


def partitioned(before: TableObjects) -> TableObjects:
    """What the swap must lead to: everything as before but what a partitioned table cannot have.

    Args:
        before: the plain table.
    """
    return replace(
        _with_key(before, key_columns(before)),
        kind="p",
        partition_key=f"RANGE ({KEY})",
        options=(),
        indexes=tuple(replace(index, clustered=False) for index in _with_key(before, key_columns(before)).indexes),
        publications=tuple(
            replace(publication, via_root=True) if publication.by == "table" else publication
            for publication in before.publications
        ),
    )


def unpartitioned(now: TableObjects, plain: TableObjects) -> TableObjects:
    """What the rollback must lead to: everything as it is now, with the old primary key and storage.

    Args:
        now: the partitioned table.
        plain: as it was before the conversion.
    """
    key = plain.primary_key.columns if plain.primary_key else ()
    by_leaf = {each.name for each in plain.publications if each.by == "table" and not each.via_root}
    clustered = {index.name for index in plain.indexes if index.clustered}
    rolled = _with_key(now, key)
    return replace(
        rolled,
        kind="r",
        partition_key=None,
        options=plain.options,
        indexes=tuple(
            replace(index, clustered=index.name in clustered and not index.constraint) for index in rolled.indexes
        ),
        publications=tuple(
            replace(each, via_root=False) if each.name in by_leaf and not each.other_partitioned else each
            for each in now.publications
        ),
    )


def comparable(objects: TableObjects) -> TableObjects:
    """The same with the primary key told by its columns alone, however Postgres prints it.

    Args:
        objects: of one table.
    """
    return _with_key(objects, objects.primary_key.columns if objects.primary_key else ())


def _with_key(objects: TableObjects, columns: tuple[str, ...]) -> TableObjects:
    key = objects.primary_key
    if key is None:
        return objects
    return replace(
        objects,
        constraints=tuple(
            replace(each, columns=columns, definition="PRIMARY KEY " + ", ".join(columns)) if each is key else each
            for each in objects.constraints
        ),
        indexes=tuple(
            replace(each, columns=columns, definition="PRIMARY KEY " + ", ".join(columns))
            if each.constraint and each.name == key.name
            else each
            for each in objects.indexes
        ),
    )


def _swap(before: TableObjects, names: Names, bound: datetime) -> Iterator[sql.Composable]:
    table, legacy = names.table.identifier, names.legacy.identifier
    schema = sql.Identifier(names.partition_schema)
    yield from _release_sequences(before, names.table)
    for publication in before.publications:
        if publication.by == "table":
            name = sql.Identifier(publication.name)
            if not publication.via_root:
                yield sql.SQL("ALTER PUBLICATION {} SET (publish_via_partition_root = true)").format(name)
            yield sql.SQL("ALTER PUBLICATION {} DROP TABLE {}").format(name, table)
    for trigger in before.triggers:
        yield sql.SQL("DROP TRIGGER {} ON {}").format(sql.Identifier(trigger.name), table)
    for policy in before.policies:
        yield sql.SQL("DROP POLICY {} ON {}").format(sql.Identifier(policy.name), table)
    for rule in before.rules:
        yield sql.SQL("DROP RULE {} ON {}").format(sql.Identifier(rule.name), table)
    for each in before.statistics:
        yield sql.SQL("ALTER STATISTICS {} SET SCHEMA {}").format(sql.Identifier(each.schema, each.name), schema)
    key = before.primary_key
    if key is not None and key.columns != key_columns(before):
        yield _replace_key(table, key, names.index)
        yield from _replica_identity(before, table)
    yield sql.SQL("ALTER TABLE {} NO FORCE ROW LEVEL SECURITY, ENABLE ROW LEVEL SECURITY").format(table)
    yield sql.SQL("ALTER TABLE {} SET SCHEMA {}").format(table, schema)
    moved = sql.Identifier(names.partition_schema, names.table.name)
    yield sql.SQL("ALTER TABLE {} RENAME TO {}").format(moved, sql.Identifier(names.legacy.name))
    yield from _only_owner(names.legacy, before.owner, names.reader)

    yield sql.SQL(
        "CREATE TABLE {} (LIKE {} INCLUDING DEFAULTS INCLUDING GENERATED INCLUDING STORAGE INCLUDING COMPRESSION "
        "INCLUDING COMMENTS) PARTITION BY RANGE ({}){}"
    ).format(table, legacy, sql.Identifier(KEY), _tablespace(before.tablespace))
    yield from _keep_sequences(before, names.table)
    for constraint in sorted(before.constraints, key=lambda each: "cpuf".find(each.kind)):
        if constraint is key:
            yield sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} PRIMARY KEY ({})").format(
                table, sql.Identifier(key.name), _identifiers(key_columns(before))
            )
        elif constraint.kind in "cuf":
            yield sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} {}").format(
                table, sql.Identifier(constraint.name), _raw(constraint.definition)
            )
    for index in before.indexes:
        if not index.constraint:
            yield _raw(index.definition)
        if index.tablespace:
            yield sql.SQL("ALTER INDEX {} SET TABLESPACE {}").format(
                sql.Identifier(before.schema, index.name), sql.Identifier(index.tablespace)
            )
    yield from _belongings(before, names.table, fresh=True)
    yield sql.SQL("ALTER TABLE {} ATTACH PARTITION {} FOR VALUES FROM (MINVALUE) TO ({})").format(
        table, legacy, bound_literal(bound)
    )
    yield sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}").format(legacy, sql.Identifier(names.check))
    yield from _bindings(before, table)


def _unswap(
    now: TableObjects,
    plain: TableObjects,
    names: Names,
    *,
    indexes: Sequence[tuple[str, str]],
    constraints: Sequence[tuple[str, str]],
    statistics: Sequence[tuple[str, str]],
) -> Iterator[sql.Composable]:
    table, legacy = names.table.identifier, names.legacy.identifier
    schema, aside = sql.Identifier(names.table.schema), sql.Identifier(names.rollback_schema)
    yield from _release_sequences(now, names.table, drop_identity=False)
    for publication in now.publications:
        if publication.by == "table":
            yield sql.SQL("ALTER PUBLICATION {} DROP TABLE {}").format(sql.Identifier(publication.name), table)
    yield sql.SQL("ALTER TABLE {} DETACH PARTITION {}").format(table, legacy)
    columns = _identifiers([column.name for column in now.columns if not column.generated])
    # Rows of the premade months. Functions of constraints and indexes may need the search path they know.
    yield sql.SQL("SET LOCAL search_path TO DEFAULT")
    yield sql.SQL("INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM {}").format(
        legacy, columns, columns, table
    )
    yield sql.SQL("SET LOCAL search_path = ''")
    for each in [*((one.schema, one.name) for one in now.statistics), *statistics]:
        yield sql.SQL("DROP STATISTICS {}").format(sql.Identifier(*each))
    yield sql.SQL("CREATE SCHEMA {}").format(aside)
    yield sql.SQL("ALTER TABLE {} SET SCHEMA {}").format(table, aside)
    yield sql.SQL("ALTER TABLE {} SET SCHEMA {}").format(legacy, schema)
    moved = sql.Identifier(names.table.schema, names.legacy.name)
    yield sql.SQL("ALTER TABLE {} RENAME TO {}").format(moved, sql.Identifier(names.table.name))
    for was, becomes in indexes:
        if was != becomes:
            yield sql.SQL("ALTER INDEX {} RENAME TO {}").format(
                sql.Identifier(names.table.schema, was), sql.Identifier(becomes)
            )
    for was, becomes in constraints:
        if was != becomes:
            yield sql.SQL("ALTER TABLE {} RENAME CONSTRAINT {} TO {}").format(
                table, sql.Identifier(was), sql.Identifier(becomes)
            )
    key = now.primary_key
    if key is not None and plain.primary_key is not None and key.columns != plain.primary_key.columns:
        yield _replace_key(table, key, names.index)
    yield from _keep_sequences(now, names.table)
    yield from _belongings(now, names.table, fresh=False)
    yield from _bindings(now, table)
    yield sql.SQL("DROP TABLE {}").format(sql.Identifier(names.rollback_schema, names.table.name))
    yield sql.SQL("DROP SCHEMA {}").format(aside)
    wanted = {each.name: each.via_root for each in unpartitioned(now, plain).publications}
    for publication in now.publications:
        if publication.via_root and not wanted[publication.name]:
            yield sql.SQL("ALTER PUBLICATION {} SET (publish_via_partition_root = false)").format(
                sql.Identifier(publication.name)
            )


def _replace_key(table: sql.Identifier, key: Constraint, index: str) -> sql.Composable:
    # The index takes the constraint's name.
    return sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}, ADD CONSTRAINT {} PRIMARY KEY USING INDEX {}").format(
        table, sql.Identifier(key.name), sql.Identifier(key.name), sql.Identifier(index)
    )


def _only_owner(table: SourceTable, owner: str, reader: str | None) -> Iterator[sql.Composable]:
    yield from _grant(table, (Grant(owner, "ALL", None, False),), RELATION)
    if reader is not None and reader != owner:
        yield sql.SQL("GRANT SELECT ON {} TO {}").format(table.identifier, sql.Identifier(reader))


def _release_sequences(
    objects: TableObjects, table: SourceTable, *, drop_identity: bool = True
) -> Iterator[sql.Composable]:
    for number, sequence in enumerate(objects.sequences):
        name = sql.Identifier(sequence.schema, sequence.name)
        if not sequence.identity:
            # It would move with the table, and keep a dropped partition alive (2BP01).
            yield sql.SQL("ALTER SEQUENCE {} OWNED BY NONE").format(name)
            continue
        # SHARE ROW EXCLUSIVE: nobody can take a number after the last one was read.
        yield sql.SQL("ALTER SEQUENCE {} INCREMENT BY {}").format(name, sequence.increment)
        yield sql.SQL("SELECT set_config({}, last_value || ' ' || is_called, true) FROM {}").format(
            _parameter(number), name
        )
        if drop_identity:
            # From 17 on a partition must not have an identity of its own; on all versions the parent's is used.
            yield sql.SQL("ALTER TABLE {} ALTER COLUMN {} DROP IDENTITY").format(
                table.identifier, sql.Identifier(sequence.column)
            )


def _keep_sequences(objects: TableObjects, table: SourceTable) -> Iterator[sql.Composable]:
    for number, sequence in enumerate(objects.sequences):
        name = sql.Identifier(sequence.schema, sequence.name)
        if not sequence.identity:
            yield sql.SQL("ALTER SEQUENCE {} OWNED BY {}").format(
                name, sql.Identifier(table.schema, table.name, sequence.column)
            )
            continue
        yield sql.SQL("ALTER TABLE {} ALTER COLUMN {} ADD GENERATED {} AS IDENTITY ({})").format(
            table.identifier, sql.Identifier(sequence.column), _generated(objects, sequence), _options(sequence)
        )
        kept = sql.SQL("current_setting({})").format(_parameter(number))
        yield sql.SQL("SELECT setval({}, split_part({}, ' ', 1)::bigint, split_part({}, ' ', 2)::boolean)").format(
            name.as_string(None), kept, kept
        )
        yield from _grant(SourceTable(sequence.schema, sequence.name), sequence.grants, SEQUENCE)
        if sequence.comment is not None:
            yield sql.SQL("COMMENT ON SEQUENCE {} IS {}").format(name, sequence.comment)


def _generated(objects: TableObjects, sequence: SequenceObject) -> sql.SQL:
    column = objects.column(sequence.column)
    return sql.SQL("ALWAYS" if column is not None and column.identity == "a" else "BY DEFAULT")


def _options(sequence: SequenceObject) -> sql.Composable:
    return sql.SQL("SEQUENCE NAME {} START WITH {} INCREMENT BY {} MINVALUE {} MAXVALUE {} CACHE {} {} CYCLE").format(
        sql.Identifier(sequence.schema, sequence.name),
        sequence.start,
        sequence.increment,
        sequence.minimum,
        sequence.maximum,
        sequence.cache,
        sql.SQL("" if sequence.cycle else "NO"),
    )


def _belongings(objects: TableObjects, named: SourceTable, *, fresh: bool) -> Iterator[sql.Composable]:
    """What hangs on a table that has its columns, constraints and indexes; a `fresh` one has no comments to remove."""
    table = named.identifier

    def comment(on: sql.Composable, said: str | None) -> Iterator[sql.Composable]:
        if said is not None or not fresh:
            yield sql.SQL("COMMENT ON {} IS {}").format(on, said)

    yield from comment(sql.SQL("TABLE {}").format(table), objects.comment)
    for column in objects.columns:
        name = sql.Identifier(column.name)
        yield from comment(
            sql.SQL("COLUMN {}").format(sql.Identifier(named.schema, named.name, column.name)), column.comment
        )
        if column.statistics is not None:
            yield sql.SQL("ALTER TABLE {} ALTER COLUMN {} SET STATISTICS {}").format(table, name, column.statistics)
        if column.options:
            yield sql.SQL("ALTER TABLE {} ALTER COLUMN {} SET ({})").format(
                table, name, sql.SQL(", ").join(map(_raw, column.options))
            )
    for constraint in objects.constraints:
        yield from comment(
            sql.SQL("CONSTRAINT {} ON {}").format(sql.Identifier(constraint.name), table), constraint.comment
        )
    for index in objects.indexes:
        name = sql.Identifier(named.schema, index.name)
        yield from comment(sql.SQL("INDEX {}").format(name), index.comment)
        for number, target in index.statistics:
            yield sql.SQL("ALTER INDEX {} ALTER COLUMN {} SET STATISTICS {}").format(name, number, target)
    for each in objects.statistics:
        name = sql.Identifier(each.schema, each.name)
        yield _raw(each.definition)
        if each.target is not None:
            yield sql.SQL("ALTER STATISTICS {} SET STATISTICS {}").format(name, each.target)
        yield from comment(sql.SQL("STATISTICS {}").format(name), each.comment)
        if each.owner != objects.owner:
            yield sql.SQL("ALTER STATISTICS {} OWNER TO {}").format(name, sql.Identifier(each.owner))
    yield from _grant(named, objects.grants, RELATION)
    yield sql.SQL("ALTER TABLE {} {} ROW LEVEL SECURITY, {} ROW LEVEL SECURITY").format(
        table,
        sql.SQL("ENABLE" if objects.row_security else "DISABLE"),
        sql.SQL("FORCE" if objects.force_row_security else "NO FORCE"),
    )
    for policy in objects.policies:
        yield sql.SQL("CREATE POLICY {} ON {} AS {} FOR {} TO {}{}{}").format(
            sql.Identifier(policy.name),
            table,
            sql.SQL("PERMISSIVE" if policy.permissive else "RESTRICTIVE"),
            _raw(policy.command),
            sql.SQL(", ").join(map(_role, policy.roles)),
            sql.SQL(" USING ({})").format(_raw(policy.using)) if policy.using else sql.SQL(""),
            sql.SQL(" WITH CHECK ({})").format(_raw(policy.check)) if policy.check else sql.SQL(""),
        )
        yield from comment(sql.SQL("POLICY {} ON {}").format(sql.Identifier(policy.name), table), policy.comment)
    for trigger in objects.triggers:
        name = sql.Identifier(trigger.name)
        yield _raw(trigger.definition)
        if trigger.enabled in ENABLED:
            yield sql.SQL("ALTER TABLE {} {} TRIGGER {}").format(table, _raw(ENABLED[trigger.enabled]), name)
        yield from comment(sql.SQL("TRIGGER {} ON {}").format(name, table), trigger.comment)
    for rule in objects.rules:
        name = sql.Identifier(rule.name)
        yield _raw(rule.definition)
        if rule.enabled in ENABLED:
            yield sql.SQL("ALTER TABLE {} {} RULE {}").format(table, _raw(ENABLED[rule.enabled]), name)
        yield from comment(sql.SQL("RULE {} ON {}").format(name, table), rule.comment)
    yield from _replica_identity(objects, table)


def _replica_identity(objects: TableObjects, table: sql.Identifier) -> Iterator[sql.Composable]:
    match objects.replica_identity:
        case "f":
            yield sql.SQL("ALTER TABLE {} REPLICA IDENTITY FULL").format(table)
        case "n":
            yield sql.SQL("ALTER TABLE {} REPLICA IDENTITY NOTHING").format(table)
        case "i":
            for index in objects.indexes:
                if index.replica_identity:
                    yield sql.SQL("ALTER TABLE {} REPLICA IDENTITY USING INDEX {}").format(
                        table, sql.Identifier(index.name)
                    )


def _bindings(objects: TableObjects, table: sql.Identifier) -> Iterator[sql.Composable]:
    """What refers to the table by identity, bound to the one that has the name now."""
    for publication in objects.publications:
        if publication.by == "table":
            columns = sql.SQL(" ({})").format(_identifiers(publication.columns)) if publication.columns else sql.SQL("")
            only = sql.SQL(" WHERE ({})").format(_raw(publication.filter)) if publication.filter else sql.SQL("")
            yield sql.SQL("ALTER PUBLICATION {} ADD TABLE {}{}{}").format(
                sql.Identifier(publication.name), table, columns, only
            )
    for dependant in objects.dependants:
        if dependant.definition is not None:
            yield _raw(dependant.definition.rstrip().removesuffix(";"))
    # PostgREST keeps what it knows of the tables until it is told; nobody else listens.
    yield sql.SQL("NOTIFY pgrst, 'reload schema'")


def _grant(table: SourceTable, grants: Sequence[Grant], what: LiteralString) -> Iterator[sql.Composable]:
    name = table.identifier
    yield sql.SQL(REVOKE_EVERYTHING.replace("{what}", what)).format(
        kind="s" if what == SEQUENCE else "r", name=name.as_string(None)
    )
    ordered = sorted(grants, key=lambda each: (each.grantee or "", each.grantable))
    for (grantee, grantable), group in groupby(ordered, key=lambda each: (each.grantee, each.grantable)):
        privileges = sql.SQL(", ").join(
            _raw(each.privilege)
            if each.column is None
            else sql.SQL("{} ({})").format(_raw(each.privilege), sql.Identifier(each.column))
            for each in group
        )
        yield sql.SQL("GRANT {} ON {} {} TO {}{}").format(
            privileges, sql.SQL(what), name, _role(grantee), sql.SQL(" WITH GRANT OPTION" if grantable else "")
        )


def _role(role: str | None) -> sql.Composable:
    return sql.SQL("PUBLIC") if role is None else sql.Identifier(role)


def _tablespace(name: str | None) -> sql.Composable:
    return sql.SQL(" TABLESPACE {}").format(sql.Identifier(name)) if name else sql.SQL("")


def _parameter(number: int) -> str:
    return f"archive.sequence_{number}"


def _identifiers(names: Sequence[str]) -> sql.Composable:
    return sql.SQL(", ").join(map(sql.Identifier, names))


def _raw(printed: str) -> sql.SQL:
    """SQL that Postgres itself printed."""
    return sql.SQL(printed)


def _shortened(name: str, suffix: str) -> str:
    """A name that Postgres does not cut off."""
    encoded = name.encode()[: IDENTIFIER_BYTES - len(suffix)]
    return encoded.decode(errors="ignore") + suffix
