"""Signing the chain's links: with a local RSA key, or by KMS, which never lets the key out.

Belongs here: the two signers, verifying, fingerprints, making a key. Does not: what is signed
(`archive_pipeline.chain`), which keys were in use when (`archive.signing_keys`).

Both sign with RSASSA-PKCS1-v1_5 over SHA-256, as CloudTrail does; a signature can be checked with any tool::

    openssl dgst -sha256 -verify public.pem -signature signature.bin message.txt
"""

import hashlib
from typing import Any, Literal, Protocol

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from scaling.errors import UserError
from scaling.settings import ArchiveSettings

# CloudTrail's name for RSASSA-PKCS1-v1_5 over SHA-256.
ALGORITHM = "SHA256withRSA"
KMS_ALGORITHM = "RSASSA_PKCS1_V1_5_SHA_256"
RSA_BITS = 3072
LEAST_RSA_BITS = 2048
ATTEMPTS = 8


class Signer(Protocol):
    """Somebody who signs; RSASSA-PKCS1-v1_5 over SHA-256, as CloudTrail does."""

    @property
    def source(self) -> str:
        """``kms`` or ``local``."""
        ...

    @property
    def public_key(self) -> bytes:
        """SPKI, DER."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the public key, hex."""
        ...

    def sign(self, message: bytes) -> bytes:
        """Sign a message.

        Args:
            message: of any length.

        Raises:
            UserError: the key cannot sign.
        """
        ...


class LocalSigner:
    """Signs with a private key that this process holds.

    Args:
        pem: RSA private key of at least 2,048 bits, PKCS#8 or PKCS#1, without a passphrase. Line ends may be written
            as a backslash and an n, which is how they survive in an environment file.

    Raises:
        UserError: it is something else.
    """

    source: Literal["local"] = "local"

    def __init__(self, pem: str) -> None:
        try:
            key = serialization.load_pem_private_key(pem.replace("\\n", "\n").encode(), None)
        except (ValueError, TypeError):
            raise UserError(
                "ARCHIVE_SIGNING_KEY is not a private key in PEM without a passphrase; make one with: "
                "python -m archive_pipeline.audit new-key"
            ) from None
        if not isinstance(key, rsa.RSAPrivateKey) or key.key_size < LEAST_RSA_BITS:
            raise UserError(
                f"ARCHIVE_SIGNING_KEY must be an RSA key of at least {LEAST_RSA_BITS} bits; make one with: "
                "python -m archive_pipeline.audit new-key"
            )
        self._key = key
        self.public_key = key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self.fingerprint = fingerprint(self.public_key)

    def __repr__(self) -> str:
        return f"LocalSigner({self.fingerprint[:16]})"

    def sign(self, message: bytes) -> bytes:
        """Sign a message.

        Args:
            message: of any length.
        """
        return self._key.sign(message, padding.PKCS1v15(), hashes.SHA256())


class KmsSigner:
    """Signs with a key that never leaves KMS.

    Args:
        client: boto3 client of KMS.
        key: id, alias or ARN of an asymmetric key, RSA of at least 2,048 bits, for signing.

    Raises:
        UserError: there is no such key, it is of another kind, or KMS does not answer.
    """

    source: Literal["kms"] = "kms"

    def __init__(self, client: Any, key: str) -> None:  # noqa: ANN401 - boto3 makes its clients at run time
        self._client = client
        self._name = key
        answer = self._ask("GetPublicKey", lambda: client.get_public_key(KeyId=key))
        if answer["KeyUsage"] != "SIGN_VERIFY" or KMS_ALGORITHM not in answer.get("SigningAlgorithms", ()):
            raise UserError(
                f"KMS key {key} cannot sign with {KMS_ALGORITHM}; ARCHIVE_SIGNING_KMS_KEY needs a key of usage "
                "SIGN_VERIFY and spec RSA_2048, RSA_3072 or RSA_4096"
            )
        # The ARN: an alias that is pointed at another key must not change what this run signs with.
        self._key = answer["KeyId"]
        self.public_key: bytes = answer["PublicKey"]
        self.fingerprint = fingerprint(self.public_key)

    def __repr__(self) -> str:
        return f"KmsSigner({self.fingerprint[:16]})"

    def sign(self, message: bytes) -> bytes:
        """Sign a message.

        Args:
            message: at most 4,096 bytes, KMS's limit; a link's has less than 1,500.

        Raises:
            UserError: KMS refuses, or does not answer.
        """
        answer = self._ask(
            "Sign",
            lambda: self._client.sign(
                KeyId=self._key,
                Message=message,
                MessageType="RAW",
                SigningAlgorithm=KMS_ALGORITHM,
            ),
        )
        signature: bytes = answer["Signature"]
        return signature

    def _ask(self, action: str, call: Any) -> Any:  # noqa: ANN401 - answers of boto3
        try:
            return call()
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            raise UserError(
                f"KMS refuses {action} with key {self._name} ({code}); the credentials need kms:GetPublicKey and "
                "kms:Sign on it, and it must exist and be enabled"
            ) from None
        except BotoCoreError as error:
            raise UserError(
                f"KMS does not answer {action} with key {self._name} ({type(error).__name__}); try again"
            ) from None


def signer_from(settings: ArchiveSettings) -> Signer | None:
    """Make the configured signer.

    Args:
        settings: with a local key, a KMS key or neither.

    Returns:
        None when no key is configured: links are then chained but not signed.

    Raises:
        UserError: the key cannot be used.
    """
    if settings.archive_signing_kms_key is not None:
        key = settings.archive_signing_kms_key
        client = boto3.Session().client(
            "kms",
            region_name=key.split(":")[3] if key.startswith("arn:") else settings.aws_region,
            config=Config(
                retries={"mode": "standard", "total_max_attempts": ATTEMPTS}, connect_timeout=10, read_timeout=60
            ),
        )
        return KmsSigner(client, key)
    if settings.archive_signing_key is not None:
        return LocalSigner(settings.archive_signing_key.get_secret_value())
    return None


def verify(public_key_der: bytes, message: bytes, signature: bytes) -> bool:
    """Whether a signature is of this message by this key.

    Args:
        public_key_der: SPKI, DER.
        message: that was signed.
        signature: RSASSA-PKCS1-v1_5 over SHA-256.
    """
    try:
        key = serialization.load_der_public_key(public_key_der)
    except ValueError:
        return False
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size < LEAST_RSA_BITS:
        return False
    try:
        key.verify(signature, message, padding.PKCS1v15(), hashes.SHA256())
    except InvalidSignature:
        return False
    return True


def fingerprint(public_key_der: bytes) -> str:
    """Name a key: SHA-256 of its SPKI, hex.

    Args:
        public_key_der: SPKI, DER.
    """
    return hashlib.sha256(public_key_der).hexdigest()


def new_key(bits: int = RSA_BITS) -> str:
    """Make a private key for `LocalSigner`.

    Args:
        bits: of the modulus.

    Returns:
        PKCS#8, PEM.
    """
    key = rsa.generate_private_key(public_exponent=65537, key_size=bits)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def public_pem(public_key_der: bytes) -> str:
    """Write a public key as PEM, which openssl reads.

    Args:
        public_key_der: SPKI, DER.
    """
    key = serialization.load_der_public_key(public_key_der)
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def public_from_pem(pem: str, where: str) -> bytes:
    """Read a public key from PEM.

    Args:
        pem: SPKI or PKCS#1.
        where: it was found, for the error.

    Returns:
        SPKI, DER.

    Raises:
        UserError: it is something else.
    """
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except ValueError:
        raise UserError(f"{where} is not a public key in PEM") from None
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
