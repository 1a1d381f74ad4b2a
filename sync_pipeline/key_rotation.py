"""Encrypt what is stored anew with the newest key, so that an older one can be thrown away.

Belongs here: walking in batches over `google_connections.refresh_token_encrypted` and
`sync.connection_state.access_token_encrypted`. Does not: the cipher (`sync_pipeline.grants`, whose command line this
is a part of: `python -m sync_pipeline.grants rotate-stored`).

Every row is a compare-and-swap of its own: a user who reconnects meanwhile wins. A batch is one transaction in which
`grant_fingerprint` follows its grant, so access tokens stay usable and a refused grant is not mistaken for a new one.
A process that dies on the way leaves whole batches; the next one goes on with what is left.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import LiteralString, Self
from uuid import UUID

import psycopg
from psycopg import sql
from rich.console import Console
from rich.progress import Progress

from scaling import settings
from scaling.databases import Connection, DatabaseRouter, Shard
from scaling.errors import UserError
from sync_pipeline.grants import GrantCipher, UnreadableGrantError

BATCH = 500
ROUNDS = 5
"""A row that changed under our hands is read again so often; a SaaS that keeps writing is not chased forever."""
EXAMPLES = 20

FRAGMENTS: dict[str, sql.Composable] = {
    "of_old": sql.SQL("sha256(convert_to(swapped.old::text, 'UTF8'))"),
    "of_new": sql.SQL("sha256(convert_to(swapped.new::text, 'UTF8'))"),
}

# The column is bytea or text, whichever the SaaS chose; the parameters take its type.
SWAP_GRANTS: LiteralString = """
WITH given AS (
    SELECT * FROM unnest(%(ids)s::uuid[], %(old)s::{type}[], %(new)s::{type}[]) AS given (id, old, new)
), swapped AS (
    UPDATE public.google_connections g SET refresh_token_encrypted = given.new
    FROM given WHERE g.id = given.id AND g.refresh_token_encrypted = given.old
    RETURNING g.id, g.tenant_id, g.workspace_id, given.old, given.new
), followed AS (
    UPDATE sync.connection_state s SET grant_fingerprint = {of_new}
    FROM swapped
    WHERE (s.tenant_id, s.workspace_id, s.connection_id) = (swapped.tenant_id, swapped.workspace_id, swapped.id)
      AND s.grant_fingerprint = {of_old}
)
SELECT id FROM swapped
"""

SWAP_ACCESS_TOKENS: LiteralString = """
UPDATE sync.connection_state s SET access_token_encrypted = given.new
FROM unnest(%(ids)s::uuid[], %(old)s::bytea[], %(new)s::bytea[]) AS given (id, old, new)
WHERE s.connection_id = given.id AND s.access_token_encrypted = given.old
RETURNING given.id
"""


@dataclass(frozen=True, slots=True)
class Rotated:
    """What became of the stored ciphertexts of one kind."""

    rotated: int = 0
    already_newest: int = 0
    unreadable: int = 0
    unreadable_examples: tuple[UUID, ...] = ()
    """Ids of some of the rows no key opens."""
    changing: int = 0
    """Rows that changed each time they were about to be written; run it again."""

    def __add__(self, other: Self) -> "Rotated":
        return Rotated(
            self.rotated + other.rotated,
            self.already_newest + other.already_newest,
            self.unreadable + other.unreadable,
            (self.unreadable_examples + other.unreadable_examples)[:EXAMPLES],
            self.changing + other.changing,
        )


def count(shard: Shard) -> int:
    """Count the ciphertexts a rotation looks at.

    Args:
        shard: whose.

    Raises:
        UserError: the role may not do this, with the statement that lets it.
    """
    with shard.transaction() as connection:
        _may_rotate(connection, to_write=False)
        row = connection.execute(
            "SELECT (SELECT count(*) FROM public.google_connections WHERE refresh_token_encrypted IS NOT NULL)"
            " + (SELECT count(*) FROM sync.connection_state WHERE access_token_encrypted IS NOT NULL)"
        ).fetchone()
    return int(row[0]) if row else 0


def rotate_stored(
    shard: Shard, cipher: GrantCipher, *, dry_run: bool, looked_at: Callable[[int], object]
) -> tuple[Rotated, Rotated]:
    """Encrypt every stored grant and access token with the newest key.

    Args:
        shard: whose.
        cipher: with every key that may be in use.
        dry_run: only say what would be done.
        looked_at: is told of progress, in rows.

    Returns:
        What became of the grants and of the access tokens.

    Raises:
        UserError: the role may not do this, with the statement that lets it.
    """
    with shard.transaction() as connection:
        kind = _may_rotate(connection, to_write=not dry_run)
    grants = _walk(
        shard,
        cipher,
        sql.SQL(
            "SELECT id, refresh_token_encrypted FROM public.google_connections "
            "WHERE refresh_token_encrypted IS NOT NULL AND (%(after)s::uuid IS NULL OR id > %(after)s) "
            "AND (%(only)s::uuid[] IS NULL OR id = ANY(%(only)s)) ORDER BY id LIMIT %(limit)s"
        ),
        sql.SQL(SWAP_GRANTS).format(type=sql.SQL(kind), **FRAGMENTS),
        dry_run=dry_run,
        looked_at=looked_at,
    )
    access_tokens = _walk(
        shard,
        cipher,
        # A connection's id is a key of the SaaS's table, so it names one row here too.
        sql.SQL(
            "SELECT connection_id, access_token_encrypted FROM sync.connection_state "
            "WHERE access_token_encrypted IS NOT NULL AND (%(after)s::uuid IS NULL OR connection_id > %(after)s) "
            "AND (%(only)s::uuid[] IS NULL OR connection_id = ANY(%(only)s)) ORDER BY connection_id LIMIT %(limit)s"
        ),
        sql.SQL(SWAP_ACCESS_TOKENS),
        dry_run=dry_run,
        looked_at=looked_at,
    )
    return grants, access_tokens


def command(keys: Sequence[str], *, dry_run: bool) -> int:
    """Rotate everything stored in every database, with a progress bar on a terminal, and say how it went.

    Args:
        keys: newest first.
        dry_run: only say what would be done.

    Returns:
        0 when the newest key opens everything (or would), 1 when it does not.

    Raises:
        UserError: a setting is missing, or the role may not do this.
    """
    cipher = GrantCipher(keys)
    grants, access_tokens = Rotated(), Rotated()
    with (
        DatabaseRouter.from_settings(
            settings.load(settings.DatabaseSettings), application_name="key rotation"
        ) as router,
        Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress,
    ):
        task = progress.add_task("grants and access tokens", total=sum(count(shard) for shard in router.shards()))
        for shard in router.shards():
            done = rotate_stored(shard, cipher, dry_run=dry_run, looked_at=lambda rows: progress.advance(task, rows))
            grants, access_tokens = grants + done[0], access_tokens + done[1]
    for line in _report(grants, access_tokens, dry_run=dry_run):
        print(line)
    return 1 if grants.unreadable or grants.changing or access_tokens.changing else 0


def _report(grants: Rotated, access_tokens: Rotated, *, dry_run: bool) -> Iterator[str]:
    for name, total in (("grants", grants), ("access tokens", access_tokens)):
        yield (
            f"{name}: {total.rotated} {'to rotate' if dry_run else 'rotated'}, "
            f"{total.already_newest} under the newest key already, {total.unreadable} that no key opens"
            + (f", {total.changing} changing right now" if total.changing else "")
        )
    if access_tokens.unreadable:
        yield "An access token that no key opens does no harm: Google is asked for another one."
    if grants.unreadable:
        ids = ", ".join(map(str, grants.unreadable_examples))
        yield f"Grants that no key opens need a missing key or a reconnect; ids (at most {EXAMPLES}): {ids}"
    if grants.changing or access_tokens.changing:
        yield "Run it again for the rows that were changing."
    elif not grants.unreadable and not dry_run:
        yield "The newest key opens every grant; the older keys can be removed."


def _walk(
    shard: Shard,
    cipher: GrantCipher,
    read: sql.SQL,
    swap: sql.SQL | sql.Composed,
    *,
    dry_run: bool,
    looked_at: Callable[[int], object],
) -> Rotated:
    total = Rotated()
    after: UUID | None = None
    while True:
        with shard.transaction() as connection:
            rows = connection.execute(read, {"after": after, "only": None, "limit": BATCH}).fetchall()
            done, missed = _rotate(connection, cipher, swap, rows, dry_run=dry_run)
        if not rows:
            return total
        total += done
        for _ in range(ROUNDS):
            if not missed:
                break
            with shard.transaction() as connection:
                again = connection.execute(read, {"after": None, "only": missed, "limit": BATCH}).fetchall()
                done, missed = _rotate(connection, cipher, swap, again, dry_run=dry_run)
            total += done
        total += Rotated(changing=len(missed))
        after = rows[-1][0]
        looked_at(len(rows))


def _rotate(
    connection: Connection,
    cipher: GrantCipher,
    swap: sql.SQL | sql.Composed,
    rows: Sequence[tuple[UUID, bytes | str]],
    *,
    dry_run: bool,
) -> tuple[Rotated, list[UUID]]:
    """Rotate the rows read; also return the ids of those that had changed when they were to be written."""
    new: dict[UUID, tuple[bytes | str, bytes | str]] = {}
    unreadable = []
    for row_id, old in rows:
        if cipher.is_newest(old):
            continue
        try:
            rotated = cipher.rotate(old)
        except UnreadableGrantError:
            unreadable.append(row_id)
            continue
        new[row_id] = (old, rotated if isinstance(old, bytes) else rotated.decode())
    swapped = set(new)
    if new and not dry_run:
        pairs = {"ids": list(new), "old": [old for old, _ in new.values()], "new": [made for _, made in new.values()]}
        swapped = {row_id for (row_id,) in connection.execute(swap, pairs)}
    done = Rotated(
        rotated=len(swapped),
        already_newest=len(rows) - len(new) - len(unreadable),
        unreadable=len(unreadable),
        unreadable_examples=tuple(unreadable[:EXAMPLES]),
    )
    return done, [row_id for row_id in new if row_id not in swapped]


def _may_rotate(connection: Connection, *, to_write: bool) -> LiteralString:
    """Check the role's rights; return the type of the grants' column."""
    try:
        row = connection.execute(
            """
            SELECT current_user::text,
                has_column_privilege('public.google_connections', 'refresh_token_encrypted', 'UPDATE'),
                has_column_privilege('sync.connection_state', 'access_token_encrypted', 'UPDATE'),
                row_security_active('public.google_connections') OR row_security_active('sync.connection_state'),
                (SELECT format_type(atttypid, NULL) FROM pg_attribute
                 WHERE attrelid = 'public.google_connections'::regclass AND attname = 'refresh_token_encrypted')
            """
        ).fetchone()
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn, psycopg.errors.InvalidSchemaName):
        raise UserError("there are no grants to rotate in this database; see: python -m scaling check") from None
    except psycopg.errors.InsufficientPrivilege:
        raise UserError("the role of DATABASE_URL may not read the grants; see: python -m scaling check") from None
    if row is None:
        raise AssertionError("SELECT without FROM returns a row")
    role, may_write_grants, may_write_state, filtered, kind = row
    # Only in this order: a role that sees a part of the rows would report the part as everything.
    if filtered:
        raise UserError(
            f"row-level security hides rows from role {role}, so some would keep the old key; "
            f"ALTER ROLE {role} BYPASSRLS"
        )
    if to_write and not may_write_grants:
        raise UserError(
            f"role {role} may not write the grants; "
            f"GRANT UPDATE (refresh_token_encrypted) ON public.google_connections TO {role}"
        )
    if to_write and not may_write_state:
        raise UserError(f"role {role} may not write sync.connection_state; GRANT pipeline_worker TO {role}")
    return "bytea" if kind == "bytea" else "text"
