"""Merkle trees over the rows of a part, and the random salts that keep a leaf from giving its row away.

Belongs here: RFC 6962 hashing (https://www.rfc-editor.org/rfc/rfc6962#section-2.1), inclusion proofs, salts and their
removal on erasure. Does not: how a row reads as bytes (`archive_pipeline.digest`), or where salts are kept.

A leaf is SHA-256(0x00 || salt || row), where the salt is 32 hexadecimal digits and the row is the UTF-8 text of
`archive_pipeline.digest`. A node is SHA-256(0x01 || left || right).
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()
ROWS_A_SEED = 1024
SEED_BYTES = 32


def root(leaves: Iterable[bytes]) -> bytes:
    """The Merkle tree hash of leaf hashes, RFC 6962 section 2.1.

    Args:
        leaves: hashes of 32 bytes, in order.

    Returns:
        32 bytes; for no leaves the hash of nothing.
    """
    level = list(leaves)
    if not level:
        return EMPTY_ROOT
    sha256 = hashlib.sha256
    while len(level) > 1:
        odd = [level.pop()] if len(level) % 2 else []
        pairs = iter(level)
        level = [sha256(b"\x01" + left + right).digest() for left, right in zip(pairs, pairs, strict=True)] + odd
    return level[0]


@dataclass(frozen=True, slots=True)
class Seeds:
    """What the salts of one part are derived from, one random seed for each 1,024 rows.

    Attributes:
        rows: of the part.
        seeds: one after the other, 32 bytes each.
    """

    rows: int
    seeds: bytes

    @classmethod
    def fresh(cls, rows: int, random: Callable[[int], bytes] = os.urandom) -> Self:
        """Make seeds for a part.

        Args:
            rows: of the part.
            random: gives that many random bytes.
        """
        return cls(rows, random(-(-rows // ROWS_A_SEED) * SEED_BYTES))

    def seed(self, row: int) -> bytes:
        """The seed of a row.

        Args:
            row: 0, 1, 2 … in the order of the file.
        """
        start = row // ROWS_A_SEED * SEED_BYTES
        return self.seeds[start : start + SEED_BYTES]

    def salt(self, row: int) -> str:
        """The salt of a row: 32 hexadecimal digits of SHA-256(seed in hexadecimal || ``:`` || row number).

        Args:
            row: 0, 1, 2 … in the order of the file.
        """
        return hashlib.sha256(f"{self.seed(row).hex()}:{row}".encode()).hexdigest()[:32]


def leaf(salt: str, row: str) -> bytes:
    """The leaf hash of a row.

    Args:
        salt: 32 hexadecimal digits.
        row: text of the row, see `archive_pipeline.digest`.
    """
    return hashlib.sha256(b"\x00" + salt.encode() + row.encode()).digest()


def salts_to_bytes(parts: Sequence[Seeds]) -> bytes:
    """The object with the salts of a manifest's parts: for each part its rows (8 bytes, big-endian) and its seeds.

    Args:
        parts: in the manifest's order.
    """
    return b"".join(part.rows.to_bytes(8, "big") + part.seeds for part in parts)


def salts_from_bytes(body: bytes) -> list[Seeds]:
    """Read the object with the salts back.

    Args:
        body: as `salts_to_bytes` wrote it.

    Raises:
        ValueError: it is something else.
    """
    parts, at = [], 0
    while at < len(body):
        rows = int.from_bytes(body[at : at + 8], "big")
        size = -(-rows // ROWS_A_SEED) * SEED_BYTES
        seeds = body[at + 8 : at + 8 + size]
        if len(seeds) != size:
            raise ValueError("the salts are cut off")
        parts.append(Seeds(rows, seeds))
        at += 8 + size
    return parts
