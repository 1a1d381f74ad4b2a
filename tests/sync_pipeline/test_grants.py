"""Refresh tokens at rest: encryption, key rotation, the command line."""

import io
import subprocess
import sys

import pytest
from cryptography.fernet import Fernet

from scaling.errors import UserError
from sync_pipeline.grants import GrantCipher, UnreadableGrantError, main

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
