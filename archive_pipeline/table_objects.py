"""Every object that belongs to a table, as the catalog shows it, and what differs between two such looks.

Belongs here: reading a table's columns, keys, indexes, policies, grants, triggers, comments, publications, sequences
and dependants into one frozen value that prints as JSON; comparing two of them in sentences.
Does not: making any of it (`table_statements`), judging whether a table can be converted (`conversion_plan`).

A table built with ``LIKE`` has row-level security off, no policies, no triggers, no grants but the default ones and is
in no publication. Nobody notices that by looking; therefore the conversion reads everything before and after, and
rolls back when anything differs that it did not mean to change.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from psycopg import sql
from pydantic import TypeAdapter

from archive_pipeline.snapshot import SourceTable
from scaling.databases import Connection
from scaling.errors import UserError


@dataclass(frozen=True, slots=True)
class ColumnObject:
    """A column. `generated` is s (stored) or v (virtual), `identity` a (always) or d (by default)."""

    name: str
    type: str
    collation: str | None
    not_null: bool
    default: str | None
    generated: str
    identity: str
    storage: str
    compression: str
    statistics: int | None
    options: tuple[str, ...]
    comment: str | None


@dataclass(frozen=True, slots=True)
class SequenceObject:
    """A sequence owned by a column; `identity` when the column is an identity column, else it is a serial one."""

    schema: str
    name: str
    column: str
    identity: bool
    type: str
    start: int
    increment: int
    minimum: int
    maximum: int
    cache: int
    cycle: bool
    comment: str | None
    grants: tuple["Grant", ...]


@dataclass(frozen=True, slots=True)
class Constraint:
    """A constraint; `kind` as in pg_constraint.contype: p, u, f, c, n, x. `columns` are those of the key."""

    name: str
    kind: str
    definition: str
    columns: tuple[str, ...]
    validated: bool
    deferrable: bool
    inheritable: bool
    comment: str | None


@dataclass(frozen=True, slots=True)
class Index:
    """An index; `columns` are the plain columns of its key, an expression is left out."""

    name: str
    definition: str
    columns: tuple[str, ...]
    constraint: bool
    unique: bool
    valid: bool
    clustered: bool
    replica_identity: bool
    tablespace: str | None
    statistics: tuple[tuple[int, int], ...]
    comment: str | None


@dataclass(frozen=True, slots=True)
class Policy:
    """A row-level security policy; a role of None is PUBLIC."""

    name: str
    command: str
    permissive: bool
    roles: tuple[str | None, ...]
    using: str | None
    check: str | None
    comment: str | None


@dataclass(frozen=True, slots=True)
class Trigger:
    """A trigger; `enabled` as in pg_trigger.tgenabled: O, D, R, A."""

    name: str
    definition: str
    enabled: str
    row: bool
    transition_tables: bool
    comment: str | None


@dataclass(frozen=True, slots=True)
class Rule:
    """A rewrite rule on the table itself."""

    name: str
    definition: str
    enabled: str
    comment: str | None


@dataclass(frozen=True, slots=True)
class Grant:
    """One privilege of one role (None is PUBLIC) on the table or on one of its columns."""

    grantee: str | None
    privilege: str
    column: str | None
    grantable: bool


@dataclass(frozen=True, slots=True)
class Publication:
    """A publication that sends the table's changes, and how it came to: by table, by schema, or all tables."""

    name: str
    by: Literal["table", "schema", "all"]
    columns: tuple[str, ...] | None
    filter: str | None
    via_root: bool
    alterable: bool = field(compare=False)
    other_partitioned: int = field(compare=False)


@dataclass(frozen=True, slots=True)
class Statistics:
    """An extended statistics object."""

    schema: str
    name: str
    definition: str
    owner: str
    target: int | None
    comment: str | None


@dataclass(frozen=True, slots=True)
class Dependant:
    """Something else that refers to the table by its identity rather than by its name.

    Attributes:
        kind: of the thing.
        name: for people, qualified.
        definition: SQL that binds it to whatever has the table's name, for kinds where that is possible.
        alterable: whether the present role may run it.
        relation: the view or table that this locks, quoted for SQL, and `relation_owner`.
    """

    kind: Literal["view", "materialized view", "rule", "policy", "function", "row type", "key", "other"]
    name: str
    definition: str | None
    alterable: bool = field(compare=False)
    relation: str | None = field(default=None, compare=False)
    relation_owner: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Referenced:
    """A table that a foreign key refers to; `lockable` when the present role may lock it."""

    schema: str
    name: str
    lockable: bool = field(compare=False)

    @property
    def identifier(self) -> sql.Identifier:
        """Quoted for SQL."""
        return sql.Identifier(self.schema, self.name)


@dataclass(frozen=True, slots=True)
class TableObjects:
    """A table and everything that belongs to it.

    Grants are who may do what; who granted it is not kept. A partitioned table has no storage of its own, so
    `options` are of a plain one.
    """

    schema: str
    name: str
    kind: str
    partition_key: str | None
    owner: str
    persistence: str
    tablespace: str | None
    options: tuple[str, ...]
    comment: str | None
    row_security: bool
    force_row_security: bool
    replica_identity: str
    of_type: str | None
    inherits: tuple[str, ...]
    inherited_by: tuple[str, ...]
    extension: str | None
    columns: tuple[ColumnObject, ...]
    sequences: tuple[SequenceObject, ...]
    constraints: tuple[Constraint, ...]
    indexes: tuple[Index, ...]
    policies: tuple[Policy, ...]
    triggers: tuple[Trigger, ...]
    rules: tuple[Rule, ...]
    grants: tuple[Grant, ...]
    publications: tuple[Publication, ...]
    statistics: tuple[Statistics, ...]
    labels: tuple[str, ...]
    dependants: tuple[Dependant, ...]
    references: tuple[Referenced, ...]
    referenced_by: tuple[str, ...]

    @property
    def table(self) -> SourceTable:
        """Its name."""
        return SourceTable(self.schema, self.name)

    @property
    def primary_key(self) -> Constraint | None:
        """Its primary key."""
        return next((constraint for constraint in self.constraints if constraint.kind == "p"), None)

    def column(self, name: str) -> ColumnObject | None:
        """The column of that name."""
        return next((column for column in self.columns if column.name == name), None)

    def without_constraint(self, name: str) -> "TableObjects":
        """The same without one constraint and its index."""
        return replace(
            self,
            constraints=tuple(constraint for constraint in self.constraints if constraint.name != name),
            indexes=tuple(index for index in self.indexes if not (index.constraint and index.name == name)),
        )


SESSION = (
    "SET LOCAL search_path = ''; SET LOCAL TimeZone = 'UTC'; SET LOCAL DateStyle = 'ISO, YMD'; SET LOCAL jit = off"
)

# Everything in one statement: while the swap holds its lock, each round trip to the server would be waited for.
# `pg_get_*` name other objects without their schema when the search path has it; `capture` empties the path.
OBJECTS = """
WITH t AS (
    SELECT c.*, n.nspname
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass(%(name)s)
), depends AS (
    -- Three lookups by index; one condition with OR reads all of pg_depend.
    SELECT d.classid, d.objid, d.refclassid FROM t JOIN pg_depend d ON d.refobjid = t.oid
    WHERE d.refclassid = 'pg_class'::regclass AND d.deptype IN ('n', 'a', 'i')
    UNION
    SELECT d.classid, d.objid, d.refclassid
    FROM t JOIN pg_type y ON y.oid = t.reltype JOIN pg_depend d ON d.refobjid IN (y.oid, y.typarray)
    WHERE d.refclassid = 'pg_type'::regclass AND d.deptype IN ('n', 'a', 'i')
    UNION
    SELECT d.classid, d.objid, d.refclassid
    FROM t JOIN pg_constraint k ON k.conrelid = t.oid JOIN pg_depend d ON d.refobjid = k.oid
    WHERE d.refclassid = 'pg_constraint'::regclass AND d.classid IN ('pg_rewrite'::regclass, 'pg_proc'::regclass)
      AND d.deptype IN ('n', 'a', 'i')
), dependants AS (
    SELECT CASE WHEN d.refclassid = 'pg_constraint'::regclass THEN 'key' WHEN v.relkind = 'v' THEN 'view'
                WHEN v.relkind = 'm' THEN 'materialized view' ELSE 'rule' END AS kind,
           CASE WHEN v.relkind IN ('v', 'm') THEN v.oid::regclass::text
                ELSE format('%%I on %%s', r.rulename, v.oid::regclass) END AS name,
           CASE WHEN d.refclassid = 'pg_constraint'::regclass THEN NULL
                WHEN v.relkind = 'v' THEN format('CREATE OR REPLACE VIEW %%s%%s AS %%s', v.oid::regclass,
                    ' WITH (' || array_to_string(v.reloptions, ', ') || ')', pg_get_viewdef(v.oid))
                WHEN v.relkind = 'm' THEN pg_get_viewdef(v.oid)
                ELSE regexp_replace(pg_get_ruledef(r.oid), '^CREATE RULE', 'CREATE OR REPLACE RULE') END AS definition,
           pg_has_role(v.relowner, 'USAGE') AS alterable, v.oid::regclass::text AS relation,
           pg_get_userbyid(v.relowner) AS relation_owner
    FROM depends d JOIN pg_rewrite r ON r.oid = d.objid JOIN pg_class v ON v.oid = r.ev_class, t
    WHERE d.classid = 'pg_rewrite'::regclass AND r.ev_class <> t.oid
      AND d.refclassid IN ('pg_class'::regclass, 'pg_constraint'::regclass)
    UNION ALL
    SELECT 'policy', format('%%I on %%s', p.polname, p.polrelid::regclass),
           format('ALTER POLICY %%I ON %%s', p.polname, p.polrelid::regclass)
             || coalesce(' USING (' || pg_get_expr(p.polqual, p.polrelid) || ')', '')
             || coalesce(' WITH CHECK (' || pg_get_expr(p.polwithcheck, p.polrelid) || ')', ''),
           pg_has_role(o.relowner, 'USAGE'), o.oid::regclass::text, pg_get_userbyid(o.relowner)
    FROM depends d JOIN pg_policy p ON p.oid = d.objid JOIN pg_class o ON o.oid = p.polrelid, t
    WHERE d.classid = 'pg_policy'::regclass AND p.polrelid <> t.oid AND d.refclassid = 'pg_class'::regclass
    UNION ALL
    SELECT CASE WHEN d.refclassid = 'pg_class'::regclass THEN 'function'
                WHEN d.refclassid = 'pg_constraint'::regclass THEN 'key' ELSE 'row type' END,
           'function ' || f.oid::regprocedure::text,
           CASE WHEN d.refclassid = 'pg_class'::regclass AND f.prokind IN ('f', 'p') THEN pg_get_functiondef(f.oid) END,
           pg_has_role(f.proowner, 'USAGE'), NULL, NULL
    FROM depends d JOIN pg_proc f ON f.oid = d.objid
    WHERE d.classid = 'pg_proc'::regclass
    UNION ALL
    SELECT CASE WHEN d.refclassid = 'pg_type'::regclass THEN 'row type' ELSE 'other' END,
           pg_describe_object(d.classid, d.objid, 0), NULL, false, NULL, NULL
    FROM depends d, t
    WHERE NOT (d.classid = 'pg_rewrite'::regclass AND d.refclassid <> 'pg_type'::regclass)
      AND NOT (d.classid = 'pg_policy'::regclass AND d.refclassid <> 'pg_type'::regclass)
      AND d.classid NOT IN ('pg_proc'::regclass, 'pg_publication_rel'::regclass, 'pg_trigger'::regclass)
      -- A policy's or a view's own mention of a whole row is text that is read again; a column of the type is not.
      AND NOT (d.classid IN ('pg_rewrite'::regclass, 'pg_policy'::regclass) AND d.refclassid = 'pg_type'::regclass)
      AND NOT (d.classid = 'pg_attrdef'::regclass
               AND EXISTS (SELECT FROM pg_attrdef a WHERE a.oid = d.objid AND a.adrelid = t.oid))
      AND NOT (d.classid = 'pg_constraint'::regclass
               AND EXISTS (SELECT FROM pg_constraint k WHERE k.oid = d.objid AND t.oid IN (k.conrelid, k.confrelid)))
      AND NOT (d.classid = 'pg_statistic_ext'::regclass
               AND EXISTS (SELECT FROM pg_statistic_ext s WHERE s.oid = d.objid AND s.stxrelid = t.oid))
      AND NOT (d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass
               AND EXISTS (SELECT FROM pg_class o WHERE o.oid = d.objid
                             AND (o.oid = t.oid OR o.relkind IN ('i', 'I', 'S', 't')
                               OR EXISTS (SELECT FROM pg_inherits h WHERE h.inhrelid = o.oid AND h.inhparent = t.oid))))
      AND NOT (d.classid = 'pg_type'::regclass
               AND EXISTS (SELECT FROM pg_type y WHERE y.oid = d.objid
                             AND (y.typrelid = t.oid OR y.oid = (SELECT b.typarray FROM pg_type b
                                                                WHERE b.oid = t.reltype))))
), published AS (
    SELECT p.*, CASE WHEN r.oid IS NOT NULL THEN 'table' WHEN s.oid IS NOT NULL THEN 'schema' ELSE 'all' END AS by,
           r.prattrs, r.prqual, r.prrelid
    FROM t CROSS JOIN pg_publication p
    LEFT JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = t.oid
    LEFT JOIN pg_publication_namespace s ON s.pnpubid = p.oid AND s.pnnspid = t.relnamespace
    WHERE p.puballtables OR r.oid IS NOT NULL OR s.oid IS NOT NULL
)
SELECT jsonb_build_object(
    'schema', t.nspname, 'name', t.relname, 'kind', t.relkind, 'partition_key', pg_get_partkeydef(t.oid),
    'owner', pg_get_userbyid(t.relowner), 'persistence', t.relpersistence,
    'tablespace', (SELECT spcname FROM pg_tablespace WHERE oid = t.reltablespace),
    'options', coalesce(to_jsonb(t.reloptions), '[]'), 'comment', obj_description(t.oid, 'pg_class'),
    'row_security', t.relrowsecurity, 'force_row_security', t.relforcerowsecurity,
    'replica_identity', t.relreplident,
    'of_type', CASE WHEN t.reloftype <> 0 THEN format_type(t.reloftype, NULL) END,
    'inherits', (SELECT coalesce(jsonb_agg(inhparent::regclass::text ORDER BY inhseqno), '[]')
                 FROM pg_inherits WHERE inhrelid = t.oid),
    'inherited_by', CASE WHEN t.relkind = 'p' THEN '[]' ELSE
                (SELECT coalesce(jsonb_agg(inhrelid::regclass::text ORDER BY 1), '[]')
                 FROM pg_inherits WHERE inhparent = t.oid) END,
    'extension', (SELECT e.extname FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
                  WHERE d.classid = 'pg_class'::regclass AND d.objid = t.oid AND d.deptype = 'e'
                    AND d.refclassid = 'pg_extension'::regclass),
    'columns', (SELECT coalesce(jsonb_agg(jsonb_build_object(
            'name', a.attname, 'type', format_type(a.atttypid, a.atttypmod),
            'collation', (SELECT format('%%I.%%I', n.nspname, l.collname)
                          FROM pg_collation l JOIN pg_namespace n ON n.oid = l.collnamespace
                          WHERE l.oid = a.attcollation AND a.attcollation <> y.typcollation),
            'not_null', a.attnotnull, 'default', pg_get_expr(e.adbin, e.adrelid), 'generated', a.attgenerated,
            'identity', a.attidentity, 'storage', a.attstorage, 'compression', a.attcompression,
            'statistics', nullif(a.attstattarget, -1), 'options', coalesce(to_jsonb(a.attoptions), '[]'),
            'comment', col_description(t.oid, a.attnum)) ORDER BY a.attnum), '[]')
        FROM pg_attribute a JOIN pg_type y ON y.oid = a.atttypid
        LEFT JOIN pg_attrdef e ON e.adrelid = a.attrelid AND e.adnum = a.attnum
        WHERE a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped),
    'sequences', (SELECT coalesce(jsonb_agg(jsonb_build_object(
            'schema', n.nspname, 'name', s.relname, 'column', a.attname, 'identity', d.deptype = 'i',
            'type', format_type(q.seqtypid, NULL), 'start', q.seqstart, 'increment', q.seqincrement,
            'minimum', q.seqmin, 'maximum', q.seqmax, 'cache', q.seqcache, 'cycle', q.seqcycle,
            'comment', obj_description(s.oid, 'pg_class'),
            'grants', (SELECT coalesce(jsonb_agg(jsonb_build_object('grantee', pg_get_userbyid(nullif(g.grantee, 0)),
                           'privilege', g.privilege_type, 'column', NULL, 'grantable', g.is_grantable)
                           ORDER BY g.grantee::regrole::text, g.privilege_type), '[]')
                       FROM aclexplode(coalesce(s.relacl, acldefault('s', s.relowner))) g)) ORDER BY a.attnum), '[]')
        FROM pg_depend d JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S'
        JOIN pg_sequence q ON q.seqrelid = s.oid JOIN pg_namespace n ON n.oid = s.relnamespace
        JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
        WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = t.oid
          AND d.deptype IN ('a', 'i')),
    'constraints', (SELECT coalesce(jsonb_agg(jsonb_build_object(
            'name', k.conname, 'kind', k.contype, 'definition', pg_get_constraintdef(k.oid),
            'columns', (SELECT coalesce(jsonb_agg(a.attname ORDER BY u.place), '[]')
                        FROM unnest(k.conkey) WITH ORDINALITY u(number, place)
                        JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = u.number),
            'validated', k.convalidated, 'deferrable', k.condeferrable, 'inheritable', NOT k.connoinherit
                OR k.contype NOT IN ('c', 'n'),
            'comment', obj_description(k.oid, 'pg_constraint')) ORDER BY k.conname), '[]')
        FROM pg_constraint k WHERE k.conrelid = t.oid AND k.contype IN ('p', 'u', 'f', 'c', 'n', 'x')),
    'indexes', (SELECT coalesce(jsonb_agg(jsonb_build_object(
            'name', c.relname, 'definition', regexp_replace(pg_get_indexdef(i.indexrelid), ' ON ONLY ', ' ON '),
            'columns', (SELECT coalesce(jsonb_agg(a.attname ORDER BY u.place), '[]')
                        FROM unnest(i.indkey) WITH ORDINALITY u(number, place)
                        JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = u.number
                        WHERE u.place <= i.indnkeyatts),
            'constraint', EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.indexrelid AND k.conrelid = t.oid
                                    AND k.contype IN ('p', 'u', 'x')),
            'unique', i.indisunique, 'valid', i.indisvalid AND i.indisready, 'clustered', i.indisclustered,
            'replica_identity', i.indisreplident,
            'tablespace', (SELECT spcname FROM pg_tablespace WHERE oid = c.reltablespace),
            'statistics', (SELECT coalesce(jsonb_agg(jsonb_build_array(a.attnum, a.attstattarget) ORDER BY a.attnum),
                                           '[]')
                           FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attstattarget >= 0),
            'comment', obj_description(c.oid, 'pg_class')) ORDER BY c.relname), '[]')
        FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indrelid = t.oid),
    'policies', (SELECT coalesce(jsonb_agg(jsonb_build_object(
            'name', p.polname, 'permissive', p.polpermissive,
            'command', CASE p.polcmd WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE'
                                     WHEN 'd' THEN 'DELETE' ELSE 'ALL' END,
            'roles', (SELECT jsonb_agg(pg_get_userbyid(nullif(r, 0)) ORDER BY pg_get_userbyid(nullif(r, 0)))
                      FROM unnest(p.polroles) r),
            'using', pg_get_expr(p.polqual, t.oid), 'check', pg_get_expr(p.polwithcheck, t.oid),
            'comment', obj_description(p.oid, 'pg_policy')) ORDER BY p.polname), '[]')
        FROM pg_policy p WHERE p.polrelid = t.oid),
    'triggers', (SELECT coalesce(jsonb_agg(jsonb_build_object(
            'name', g.tgname, 'definition', pg_get_triggerdef(g.oid), 'enabled', g.tgenabled,
            'row', g.tgtype & 1 = 1, 'transition_tables', (g.tgoldtable IS NOT NULL OR g.tgnewtable IS NOT NULL),
            'comment', obj_description(g.oid, 'pg_trigger')) ORDER BY g.tgname), '[]')
        FROM pg_trigger g WHERE g.tgrelid = t.oid AND NOT g.tgisinternal),
    'rules', (SELECT coalesce(jsonb_agg(jsonb_build_object(
            'name', r.rulename, 'definition', pg_get_ruledef(r.oid), 'enabled', r.ev_enabled,
            'comment', obj_description(r.oid, 'pg_rewrite')) ORDER BY r.rulename), '[]')
        FROM pg_rewrite r WHERE r.ev_class = t.oid),
    'grants', (SELECT coalesce(jsonb_agg(jsonb_build_object(
            'grantee', g.grantee, 'privilege', g.privilege_type, 'column', g.attname, 'grantable', g.is_grantable)
            ORDER BY g.grantee, g.attname, g.privilege_type), '[]')
        FROM (SELECT pg_get_userbyid(nullif(x.grantee, 0)) AS grantee, x.privilege_type, NULL::name AS attname,
                     bool_or(x.is_grantable) AS is_grantable
              FROM aclexplode(coalesce(t.relacl, acldefault('r', t.relowner))) x GROUP BY 1, 2
              UNION ALL
              SELECT pg_get_userbyid(nullif(x.grantee, 0)), x.privilege_type, a.attname, bool_or(x.is_grantable)
              FROM pg_attribute a CROSS JOIN LATERAL aclexplode(a.attacl) x
              WHERE a.attrelid = t.oid AND NOT a.attisdropped GROUP BY 1, 2, 3) g),
    'publications', (SELECT coalesce(jsonb_agg(jsonb_build_object(
            'name', p.pubname, 'by', p.by,
            'columns', (SELECT jsonb_agg(a.attname ORDER BY a.attnum) FROM pg_attribute a
                        WHERE a.attrelid = t.oid AND a.attnum = ANY (p.prattrs)),
            'filter', pg_get_expr(p.prqual, p.prrelid), 'via_root', p.pubviaroot,
            'alterable', pg_has_role(p.pubowner, 'USAGE') AND p.by = 'table',
            'other_partitioned', (SELECT count(*) FROM pg_publication_rel r JOIN pg_class c ON c.oid = r.prrelid
                                  WHERE r.prpubid = p.oid AND r.prrelid <> t.oid
                                    AND c.relkind = 'p')) ORDER BY p.pubname), '[]')
        FROM published p),
    'statistics', (SELECT coalesce(jsonb_agg(jsonb_build_object(
            'schema', n.nspname, 'name', s.stxname, 'definition', pg_get_statisticsobjdef(s.oid),
            'owner', pg_get_userbyid(s.stxowner), 'target', nullif(s.stxstattarget, -1),
            'comment', obj_description(s.oid, 'pg_statistic_ext')) ORDER BY n.nspname, s.stxname), '[]')
        FROM pg_statistic_ext s JOIN pg_namespace n ON n.oid = s.stxnamespace WHERE s.stxrelid = t.oid),
    'labels', (SELECT coalesce(jsonb_agg(DISTINCT l.provider), '[]') FROM pg_seclabel l
               WHERE l.objoid = t.oid AND l.classoid = 'pg_class'::regclass),
    'dependants', (SELECT coalesce(jsonb_agg(DISTINCT to_jsonb(d)), '[]') FROM dependants d),
    'references', (SELECT coalesce(jsonb_agg(DISTINCT jsonb_build_object('schema', n.nspname, 'name', c.relname,
            'lockable', has_table_privilege(c.oid, 'UPDATE, DELETE, TRUNCATE'))), '[]')
        FROM pg_constraint k JOIN pg_class c ON c.oid = k.confrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE k.conrelid = t.oid AND k.contype = 'f' AND k.confrelid <> t.oid),
    'referenced_by', (SELECT coalesce(jsonb_agg(format('%%I on %%s', k.conname, k.conrelid::regclass)
                                                ORDER BY k.conname), '[]')
        FROM pg_constraint k WHERE k.confrelid = t.oid AND k.contype = 'f' AND k.conparentid = 0))
FROM t
"""

_OBJECTS: TypeAdapter[TableObjects] = TypeAdapter(TableObjects)


def capture(connection: Connection, table: SourceTable) -> TableObjects:
    """Read everything that belongs to a table.

    Args:
        connection: of any role; in a transaction, the settings it makes hold until the end of that.
        table: a plain or a partitioned one.

    Returns:
        The objects, in an order that does not depend on the server's.

    Raises:
        UserError: there is no such table.
    """
    with connection.transaction():
        connection.execute(SESSION)
        return read(connection, table)


def read(connection: Connection, table: SourceTable) -> TableObjects:
    """The same in one round trip, in a transaction that was given `SESSION`.

    Args:
        connection: of any role.
        table: a plain or a partitioned one.

    Returns:
        The objects.

    Raises:
        UserError: there is no such table.
    """
    # Prepared: planning takes longer than running it, and the swap asks twice.
    row = connection.execute(OBJECTS, {"name": table.identifier.as_string(None)}, prepare=True).fetchone()
    if row is None:
        raise UserError(f"there is no table {table} in the database; check ARCHIVE_TABLE")
    return from_json(row[0])


def as_json(objects: TableObjects) -> object:
    """The objects as what the json module writes.

    Args:
        objects: of one table.
    """
    return _OBJECTS.dump_python(objects, mode="json")


def from_json(value: object) -> TableObjects:
    """Read what `as_json` gave.

    Args:
        value: of ``archive.conversions``.
    """
    found = _OBJECTS.validate_python(value)
    return replace(
        found,
        dependants=tuple(sorted(found.dependants, key=lambda each: (each.kind, each.name))),
        references=tuple(sorted(found.references, key=lambda each: (each.schema, each.name))),
        grants=tuple(sorted(found.grants, key=_grant_key)),
        sequences=tuple(
            replace(sequence, grants=tuple(sorted(sequence.grants, key=_grant_key))) for sequence in found.sequences
        ),
    )


def differences(before: TableObjects, after: TableObjects) -> list[str]:
    """Name everything that differs, one sentence each.

    Args:
        before: what should be.
        after: what is.

    Returns:
        The sentences; nothing when they are equal.
    """
    found: list[str] = []
    for one in fields(TableObjects):
        wanted, is_now = getattr(before, one.name), getattr(after, one.name)
        if wanted == is_now:
            continue
        word = one.name.replace("_", " ")
        if isinstance(wanted, tuple):
            found += _differing(word, wanted, is_now)
        else:
            found.append(f"{word} was {_shown(wanted)}, is {_shown(is_now)}")
    return found


def _differing(word: str, before: Sequence[Any], after: Sequence[Any]) -> Iterable[str]:
    wanted, is_now = {_label(word, each): each for each in before}, {_label(word, each): each for each in after}
    for label, each in wanted.items():
        if label not in is_now:
            yield f"{label} is gone"
        elif each != is_now[label]:
            for one in fields(each) if hasattr(each, "__dataclass_fields__") else ():
                was, become = getattr(each, one.name), getattr(is_now[label], one.name)
                if was != become and one.compare:
                    yield f"{label}: {one.name.replace('_', ' ')} was {_shown(was)}, is {_shown(become)}"
    yield from (f"{label} is new" for label in is_now if label not in wanted)
    if wanted == is_now:
        yield f"the order of {word} was {', '.join(wanted)}, is {', '.join(is_now)}"


SINGULAR = {
    "columns": "column", "sequences": "sequence", "constraints": "constraint", "indexes": "index",
    "policies": "policy", "triggers": "trigger", "rules": "rule", "publications": "publication",
    "statistics": "statistics object", "dependants": "", "references": "referenced table", "options": "option",
    "labels": "label",
}  # fmt: skip


def _label(word: str, each: object) -> str:
    if isinstance(each, Grant):
        what = f"{each.privilege} ({each.column})" if each.column else each.privilege
        return f"grant of {what} to {each.grantee or 'PUBLIC'}"
    if isinstance(each, Dependant):
        return f"{each.kind} {each.name}"
    if isinstance(each, SequenceObject | Statistics | Referenced):
        return f"{SINGULAR[word]} {each.schema}.{each.name}"
    return f"{SINGULAR.get(word, word)} {getattr(each, 'name', each)}"


def _shown(value: object) -> str:
    return "nothing" if value in (None, "", ()) else str(value)


def _grant_key(grant: Grant) -> tuple[str, str, str]:
    return (grant.grantee or "", grant.column or "", grant.privilege)
