"""Signers: a local key, a key in KMS, and what verifies."""

import base64
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from archive_pipeline.signing import (
    KmsSigner,
    LocalSigner,
    Signer,
    fingerprint,
    new_key,
    public_from_pem,
    public_pem,
    signer_from,
    verify,
)
from devstack.aws import Aws
from scaling.errors import UserError
from scaling.settings import ArchiveSettings, load

MESSAGE = b"2025-02-01T00:00:00Z\nbucket/key\nhash\nnull"


@pytest.fixture(scope="module")
def pem() -> str:
    return new_key(2048)


@pytest.fixture
def kms(aws: Aws, settings_environment: Callable[..., None]) -> Any:
    settings_environment(
        **aws.environment(), AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", ARCHIVE_BUCKET="archive"
    )
    return boto3.client("kms", region_name="us-east-1")


def a_key(kms: Any, **options: str) -> str:
    answer = kms.create_key(**{"KeyUsage": "SIGN_VERIFY", "KeySpec": "RSA_2048", **options})
    key: str = answer["KeyMetadata"]["KeyId"]
    return key


def settings(monkeypatch: pytest.MonkeyPatch, **variables: str) -> ArchiveSettings:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return load(ArchiveSettings)


def signs(signer: Signer) -> None:
    signature = signer.sign(MESSAGE)
    assert verify(signer.public_key, MESSAGE, signature)
    assert not verify(signer.public_key, MESSAGE + b"x", signature)
    assert not verify(signer.public_key, MESSAGE, signature[:-1] + bytes([signature[-1] ^ 1]))
    assert not verify(LocalSigner(new_key(2048)).public_key, MESSAGE, signature)
    assert signer.fingerprint == fingerprint(signer.public_key)
    # The same link signed twice, after a crash, is the same object.
    assert signer.sign(MESSAGE) == signature


def test_a_local_key_signs_and_only_its_public_key_verifies(pem: str) -> None:
    signs(LocalSigner(pem))


def test_a_kms_key_signs_and_only_its_public_key_verifies(kms: Any) -> None:
    signs(KmsSigner(kms, a_key(kms)))


def test_openssl_accepts_the_signature(pem: str, tmp_path: Path) -> None:
    signer = LocalSigner(pem)
    (tmp_path / "public.pem").write_text(public_pem(signer.public_key))
    (tmp_path / "signature").write_bytes(signer.sign(MESSAGE))
    command = ["openssl", "dgst", "-sha256", "-verify", "public.pem", "-signature", "signature"]
    assert (
        b"Verified OK" in subprocess.run(command, cwd=tmp_path, input=MESSAGE, check=True, capture_output=True).stdout
    )


def test_the_settings_choose_between_a_local_key_a_kms_key_and_none(
    kms: Any, monkeypatch: pytest.MonkeyPatch, pem: str
) -> None:
    assert signer_from(settings(monkeypatch)) is None
    local = signer_from(settings(monkeypatch, ARCHIVE_SIGNING_KEY=pem))
    assert local is not None
    assert (local.source, local.fingerprint) == ("local", LocalSigner(pem).fingerprint)
    monkeypatch.delenv("ARCHIVE_SIGNING_KEY")
    remote = signer_from(settings(monkeypatch, ARCHIVE_SIGNING_KMS_KEY=a_key(kms)))
    assert remote is not None
    assert remote.source == "kms"
    signs(remote)


def test_a_kms_alias_pointed_at_another_key_does_not_change_the_key_of_a_run(kms: Any) -> None:
    first, second = a_key(kms), a_key(kms)
    alias = f"alias/{first}"
    kms.create_alias(AliasName=alias, TargetKeyId=first)
    signer = KmsSigner(kms, alias)
    kms.update_alias(AliasName=alias, TargetKeyId=second)
    signs(signer)


def test_a_key_whose_lines_were_folded_for_an_environment_file_works(pem: str) -> None:
    assert LocalSigner(pem.replace("\n", "\\n")).fingerprint == LocalSigner(pem).fingerprint


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("secret words", "is not a private key in PEM"),
        (lambda: new_key(1024), "at least 2048 bits"),
        (
            lambda: (
                ec.generate_private_key(ec.SECP256R1())
                .private_bytes(
                    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
                )
                .decode()
            ),
            "must be an RSA key",
        ),
    ],
    ids=["no key", "short key", "other key"],
)
def test_a_key_that_cannot_sign_is_refused_and_not_shown(key: Any, sentence: str) -> None:
    text = key if isinstance(key, str) else key()
    with pytest.raises(UserError, match=sentence) as refused:
        LocalSigner(text)
    assert text.splitlines()[0] not in str(refused.value)


def test_a_kms_key_that_cannot_sign_is_refused_with_the_remedy(kms: Any) -> None:
    with pytest.raises(UserError, match="usage SIGN_VERIFY"):
        KmsSigner(kms, a_key(kms, KeyUsage="ENCRYPT_DECRYPT"))
    with pytest.raises(UserError, match=r"kms:GetPublicKey and kms:Sign"):
        KmsSigner(kms, "no-such-key")


def test_a_signature_by_a_short_or_damaged_key_never_verifies(pem: str) -> None:
    signer = LocalSigner(pem)
    assert not verify(signer.public_key[:-2], MESSAGE, signer.sign(MESSAGE))
    assert not verify(b"", MESSAGE, signer.sign(MESSAGE))
    with pytest.raises(UserError, match="is not a public key"):
        public_from_pem("nonsense", "key.pem")
    assert public_from_pem(public_pem(signer.public_key), "key.pem") == signer.public_key
    assert base64.b64encode(signer.public_key) not in pem.encode()
