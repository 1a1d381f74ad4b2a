"""Refresh tokens at rest: encryption, key rotation, the command line."""

import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import psycopg
import pytest
from cryptography.fernet import Fernet

from devstack.google_calendar import Simulator
from devstack.processes import wait_until
from devstack.servers import Database
from scaling.errors import UserError
from sync_pipeline import connections, key_rotation, tick
from sync_pipeline.grants import GrantCipher, UnreadableGrantError, main
from sync_pipeline.services import Services
from tests.sync_pipeline.conftest import KEY, Saas
from tests.sync_pipeline.scenes import connected, kinds

TOKEN = "1//refresh-token-of-a-person"


def key() -> str:
    return Fernet.generate_key().decode()


def test_a_grant_opens_with_the_key_that_made_it() -> None:
    cipher = GrantCipher([key()])
    assert cipher.decrypt(cipher.encrypt(TOKEN)) == TOKEN
    assert cipher.decrypt(cipher.encrypt(TOKEN).decode()) == TOKEN, "a text column gives a str"


def test_a_grant_never_contains_its_token() -> None:
    assert TOKEN.encode() not in GrantCipher([key()]).encrypt(TOKEN)


def test_a_grant_of_an_older_key_opens_and_rotates_to_the_newest() -> None:
    old, new = key(), key()
    grant = GrantCipher([old]).encrypt(TOKEN)
    both = GrantCipher([new, old])
    assert both.decrypt(grant) == TOKEN
    assert GrantCipher([new]).decrypt(both.rotate(grant)) == TOKEN


@pytest.mark.parametrize("damage", [b"", b"not a grant", b"\xff\xfe"])
def test_a_damaged_grant_is_refused_without_showing_it(damage: bytes) -> None:
    with pytest.raises(UnreadableGrantError) as caught:
        GrantCipher([key()]).decrypt(damage)
    assert caught.value.__cause__ is None


def test_a_grant_of_a_lost_key_is_refused() -> None:
    with pytest.raises(UnreadableGrantError):
        GrantCipher([key()]).decrypt(GrantCipher([key()]).encrypt(TOKEN))


def test_no_keys_is_one_clear_sentence() -> None:
    with pytest.raises(UserError, match="new-key"):
        GrantCipher([])


def test_new_key_prints_a_key_that_works() -> None:
    command = [sys.executable, "-m", "sync_pipeline.grants", "new-key"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    GrantCipher([printed]).encrypt(TOKEN)


def test_the_command_line_encrypts_and_rotates_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = key(), key()
    monkeypatch.setenv("GOOGLE_CLIENT_ID", "id")
    monkeypatch.setenv("GOOGLE_CLIENT_SECRET", "secret")

    monkeypatch.setenv("GRANT_ENCRYPTION_KEYS", old)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{TOKEN}\n\n"))
    assert main(["encrypt"]) == 0
    encrypted = capsys.readouterr().out

    monkeypatch.setenv("GRANT_ENCRYPTION_KEYS", f"{new}, {old}")
    monkeypatch.setattr("sys.stdin", io.StringIO(encrypted))
    assert main(["rotate"]) == 0
    assert GrantCipher([new]).decrypt(capsys.readouterr().out.strip()) == TOKEN

    monkeypatch.setattr("sys.stdin", io.StringIO("nonsense\n"))
    with pytest.raises(UserError, match="line 1"):
        main(["rotate"])


CONNECTIONS = 12


@dataclass(frozen=True)
class Store:
    """A database with grants under an old key, and the environment of the command."""

    saas: Saas
    old: str
    new: str

    def fill(self, rows: int = CONNECTIONS) -> None:
        """Connections with one workspace and one refresh token each, encrypted under the old key."""
        workspace = self.saas.workspace()
        with psycopg.connect(self.saas.dsn, autocommit=True) as connection, connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO public.google_connections "
                "(tenant_id, workspace_id, google_account, refresh_token_encrypted) VALUES (%s, %s, %s, %s)",
                [
                    (workspace.tenant_id, workspace.workspace_id, f"user-{n}@example.com", self.grant(n))
                    for n in range(rows)
                ],
            )
            connections.register(connection)

    def grant(self, number: int) -> bytes:
        return GrantCipher([self.old]).encrypt(f"{TOKEN}-{number}")

    def stored(self) -> dict[str, bytes]:
        """Grants by account."""
        rows = self.saas.execute("SELECT google_account, refresh_token_encrypted FROM public.google_connections")
        return {str(account): grant for account, grant in rows if isinstance(grant, bytes)}

    def tokens(self, key: str) -> dict[str, str]:
        """Refresh tokens by account, of those this key alone opens."""
        cipher = GrantCipher([key])
        return {account: cipher.decrypt(grant) for account, grant in self.stored().items() if cipher.is_newest(grant)}


@pytest.fixture
def store(
    saas: Saas, database: Database, settings_environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> Store:
    old, new = key(), key()
    settings_environment(
        database, GOOGLE_CLIENT_ID="id", GOOGLE_CLIENT_SECRET="secret", GRANT_ENCRYPTION_KEYS=f"{new},{old}"
    )
    saas.execute("GRANT UPDATE (refresh_token_encrypted) ON public.google_connections TO pipeline")
    return Store(saas, old, new)


ALL_TOKENS = {f"user-{n}@example.com": f"{TOKEN}-{n}" for n in range(CONNECTIONS)}


def test_rotating_stored_grants_leaves_the_newest_key_as_the_only_one_needed(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    store.fill()
    assert main(["rotate-stored"]) == 0
    assert "grants: 12 rotated, 0 under the newest key already, 0 that no key opens" in capsys.readouterr().out
    assert store.tokens(store.new) == ALL_TOKENS

    before = store.stored()
    assert main(["rotate-stored"]) == 0
    assert "grants: 0 rotated, 12 under the newest key already" in capsys.readouterr().out
    assert store.stored() == before, "rotating twice writes nothing"


def test_a_dry_run_counts_and_writes_nothing(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.fill()
    store.saas.execute("REVOKE UPDATE (refresh_token_encrypted) ON public.google_connections FROM pipeline")
    before = store.stored()
    assert main(["rotate-stored", "--dry-run"]) == 0, "it needs no right to write"
    assert "grants: 12 to rotate" in capsys.readouterr().out
    assert store.stored() == before


def test_a_column_of_text_is_rotated_like_one_of_bytes(store: Store) -> None:
    store.fill()
    store.saas.execute(
        "ALTER TABLE public.google_connections ALTER refresh_token_encrypted TYPE text "
        "USING convert_from(refresh_token_encrypted, 'UTF8')"
    )
    assert main(["rotate-stored"]) == 0
    grants = store.saas.execute("SELECT refresh_token_encrypted FROM public.google_connections")
    assert {GrantCipher([store.new]).decrypt(str(grant)) for (grant,) in grants} == set(ALL_TOKENS.values())


def test_grants_no_key_opens_are_counted_by_id_and_fail_the_command(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    store.fill()
    lost = GrantCipher([key()]).encrypt(TOKEN)
    store.saas.execute(
        "UPDATE public.google_connections SET refresh_token_encrypted = %s WHERE google_account = 'user-3@example.com'",
        lost,
    )
    (row_id,) = store.saas.one("SELECT id FROM public.google_connections WHERE google_account = 'user-3@example.com'")
    assert main(["rotate-stored"]) == 1
    told = "".join(capsys.readouterr())
    assert "grants: 11 rotated, 0 under the newest key already, 1 that no key opens" in told
    assert str(row_id) in told
    assert "can be removed" not in told
    assert store.stored()["user-3@example.com"] == lost, "what cannot be read is left alone"
    for secret in (lost.decode(), TOKEN, "user-3@", store.old, store.new):
        assert secret not in told


def test_a_grant_that_is_replaced_while_it_is_rotated_stays_replaced(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.fill()
    reconnected = GrantCipher([store.old]).encrypt("1//of-the-reconnect")
    rotate, races = GrantCipher.rotate, iter([True])

    def racing(cipher: GrantCipher, grant: bytes | str) -> bytes:
        if next(races, False):  # after the batch was read, before it is written
            store.saas.execute(
                "UPDATE public.google_connections SET refresh_token_encrypted = %s "
                "WHERE google_account = 'user-0@example.com'",
                reconnected,
            )
        return rotate(cipher, grant)

    monkeypatch.setattr(GrantCipher, "rotate", racing)
    assert main(["rotate-stored"]) == 0
    assert store.tokens(store.new) == {**ALL_TOKENS, "user-0@example.com": "1//of-the-reconnect"}


def test_a_row_that_never_holds_still_is_given_up_and_said(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store.fill(1)
    rotate = GrantCipher.rotate

    def racing(cipher: GrantCipher, grant: bytes | str) -> bytes:
        store.saas.execute("UPDATE public.google_connections SET refresh_token_encrypted = %s", store.grant(0))
        return rotate(cipher, grant)

    monkeypatch.setattr(GrantCipher, "rotate", racing)
    assert main(["rotate-stored"]) == 1
    assert "0 rotated, 0 under the newest key already, 0 that no key opens, 1 changing" in capsys.readouterr().out


def test_a_role_without_the_right_gets_the_statement_that_gives_it(store: Store) -> None:
    store.fill()
    store.saas.execute("REVOKE UPDATE (refresh_token_encrypted) ON public.google_connections FROM pipeline")
    before = store.stored()
    with pytest.raises(
        UserError, match=r"GRANT UPDATE \(refresh_token_encrypted\) ON public\.google_connections TO pipeline"
    ):
        main(["rotate-stored"])
    assert store.stored() == before


def test_a_role_that_sees_a_part_of_the_grants_does_not_pass_it_off_as_all(
    store: Store, database: Database, login: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.fill()
    monkeypatch.setenv("DATABASE_URL", login("pipeline_worker"))
    with pytest.raises(UserError, match="row-level security hides rows"):
        main(["rotate-stored", "--dry-run"])


def test_a_database_without_the_tables_is_one_sentence(store: Store) -> None:
    store.saas.execute("DROP TABLE public.google_connections CASCADE")
    with pytest.raises(UserError, match="python -m scaling check"):
        main(["rotate-stored"])


def test_a_rotation_killed_on_the_way_leaves_whole_batches_and_the_next_one_ends_it(store: Store) -> None:
    rows = 2 * key_rotation.BATCH + 7
    store.fill(rows)
    command = [sys.executable, "-m", "sync_pipeline.grants", "rotate-stored"]
    with psycopg.connect(store.saas.dsn) as blocking:
        # The last row of the second batch: its swap waits for this transaction, so the kill meets it half done.
        blocking.execute(
            "SELECT FROM public.google_connections WHERE id = "
            "(SELECT id FROM public.google_connections ORDER BY id OFFSET %s LIMIT 1) FOR UPDATE",
            [2 * key_rotation.BATCH - 1],
        )
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(
            lambda: (
                store.saas.one(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                    "AND application_name = 'key rotation' AND wait_event_type = 'Lock'"
                )
                == (1,)
            ),
            timeout_seconds=30,
            what="the second batch waits",
        )
        process.kill()
        process.wait()
    assert len(store.tokens(store.new)) == key_rotation.BATCH
    assert len(store.tokens(store.old)) == rows - key_rotation.BATCH, "no row is lost or half written"

    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{rows - key_rotation.BATCH} rotated, {key_rotation.BATCH} under the newest key already" in done.stdout
    assert done.stderr == "", "no progress bar where nobody watches"
    assert store.tokens(store.new) == {f"user-{n}@example.com": f"{TOKEN}-{n}" for n in range(rows)}


def test_rotated_access_tokens_stay_in_use_and_refused_grants_are_not_tried_again(
    google: Simulator, saas: Saas, services: Services, store: Store
) -> None:
    both = replace(services, cipher=GrantCipher([KEY]))
    for name in ("ann", "bob"):
        connected(google, saas, name)
    tick.run_tick(both, run_id="before")
    google.revoke("bob@example.com")
    tick.run_tick(both, run_id="refuses")
    google.reset_counts()

    newest = key()
    ((grants, access_tokens),) = [
        key_rotation.rotate_stored(shard, GrantCipher([newest, KEY]), dry_run=False, looked_at=lambda rows: None)
        for shard in services.router.shards()
    ]
    assert (grants.rotated, access_tokens.rotated) == (2, 1)

    result = tick.run_tick(replace(services, cipher=GrantCipher([newest])), run_id="after")
    assert kinds(result) == [], "the old key is gone and nobody noticed"
    assert google.counts().count("oauth.token") == 0, "ann's access token is used on, bob is not asked for again"
    assert google.counts().count(user="bob@example.com") == 0
    assert google.counts().count("events.list", user="ann@example.com") == 1
