"""Signing the chain's links: with a local RSA key, or by KMS, which never lets the key out.

Belongs here: the two signers, verifying, fingerprints. Does not: what is signed (`archive_pipeline.chain`).
"""

from typing import Protocol


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
