"""Settings: what is missing or wrong is said in one sentence, by name, never by value."""

from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from hypothesis import given
from hypothesis import strategies as st

from scaling.__main__ import GROUPS
from scaling.errors import UserError
from scaling.settings import ArchiveSettings, DatabaseSettings, SyncSettings, load

GOOD_SYNC = {
    "GOOGLE_CLIENT_ID": "client",
    "GOOGLE_CLIENT_SECRET": "hush-client",
    "GRANT_ENCRYPTION_KEYS": Fernet.generate_key().decode(),
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for model in (DatabaseSettings, SyncSettings, ArchiveSettings):
        for name in model.model_fields:
            monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


def put(environment: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in values.items():
        environment.setenv(name, value)


def test_a_missing_variable_is_named_with_what_it_is_for(environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"DATABASE_URL is not set \(Postgres of the SaaS"):
        load(DatabaseSettings)


def test_every_missing_variable_is_named_at_once(environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as raised:
        load(SyncSettings)
    for name in GOOD_SYNC:
        assert name in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("GRANT_ENCRYPTION_KEYS", "hush-not-a-key", "key 1 is not a Fernet key"),
        ("GRANT_ENCRYPTION_KEYS", " , ", "needs at least one key"),
        ("GOOGLE_API_ENDPOINT", "http://example.com", "must be https"),
        ("GOOGLE_API_ENDPOINT", "http://localhost.example.com", "must be https"),
        ("GOOGLE_API_ENDPOINT", "http://127.0.0.1@example.com", "must be https"),
        ("GOOGLE_API_ENDPOINT", "https://", "must be https"),
        ("SYNC_PARALLELISM", "0", "SYNC_PARALLELISM"),
        ("SYNC_PARALLELISM", "many", "SYNC_PARALLELISM"),
    ],
)
def test_a_wrong_sync_setting_is_named_and_its_value_is_not_shown(
    environment: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    put(environment, **{**GOOD_SYNC, name: value})
    with pytest.raises(UserError, match=sentence) as raised:
        load(SyncSettings)
    assert name in str(raised.value)
    assert "hush" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ARCHIVE_FIRST_MONTH", "2024-13"),
        ("ARCHIVE_FIRST_MONTH", "January"),
        ("ARCHIVE_TIME_ZONE", "Mars/Olympus"),
        ("ARCHIVE_TIME_ZONE", "../../etc/passwd"),
        ("ARCHIVE_TABLE", "audit_logs"),
        ("ARCHIVE_PREFIX", "/leading"),
    ],
)
def test_a_wrong_archive_setting_is_named(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    put(environment, ARCHIVE_BUCKET="bucket", **{name: value})
    with pytest.raises(UserError, match=name):
        load(ArchiveSettings)


def test_several_encryption_keys_keep_their_order(environment: pytest.MonkeyPatch) -> None:
    keys = [Fernet.generate_key().decode() for _ in range(3)]
    put(environment, **{**GOOD_SYNC, "GRANT_ENCRYPTION_KEYS": " , ".join(keys)})
    assert [key.get_secret_value() for key in load(SyncSettings).grant_encryption_keys] == keys


def test_secrets_do_not_show_in_a_repr(environment: pytest.MonkeyPatch) -> None:
    put(environment, DATABASE_URL="postgresql://u:hush@h/d", **GOOD_SYNC)
    shown = repr(load(DatabaseSettings)) + repr(load(SyncSettings))
    assert "hush" not in shown
    assert GOOD_SYNC["GRANT_ENCRYPTION_KEYS"] not in shown


def test_the_readme_explains_every_setting() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    names = {name.upper() for group in GROUPS.values() for name in group.model_fields}
    assert {name for name in names if f"| `{name}` |" not in readme} == set()


@given(st.integers(1, 9999), st.integers(0, 99))
def test_a_month_is_accepted_exactly_when_it_exists(year: int, month: int) -> None:
    text = f"{year:04d}-{month:02d}"
    try:
        ArchiveSettings(archive_bucket="bucket", archive_first_month=text)
        accepted = True
    except ValueError:
        accepted = False
    assert accepted == (1 <= month <= 12)
