"""Merkle trees over the rows of a part, and the random salts that keep a leaf from giving its row away.

Belongs here: RFC 6962 hashing (https://www.rfc-editor.org/rfc/rfc6962#section-2.1), inclusion proofs, salts and their
removal on erasure. Does not: how a row reads as bytes (`archive_pipeline.digest`), or where salts are kept.

A leaf is SHA-256(0x00 || salt || row), where the salt is 32 hexadecimal digits and the row is the UTF-8 text of
`archive_pipeline.digest`. A node is SHA-256(0x01 || left || right).
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Self

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()
ROWS_A_SEED = 1024
SEED_BYTES = 32
SALT_BYTES = 16
SALT_DIGITS = 2 * SALT_BYTES

# A power of two, so that each chunk is a whole subtree. 3 million leaves take 1.5 s read from an iterator, of which
# 1.4 s is hashing; hashing slices of one buffer in place of objects takes 1.7 s.
LEAVES_A_CHUNK = 2048


def root(leaves: Iterable[bytes]) -> bytes:
    """The Merkle tree hash of leaf hashes, RFC 6962 section 2.1.

    Roots of whole subtrees of one size, in order and the last one possibly smaller, may stand in for their leaves.

    Args:
        leaves: hashes of 32 bytes, in order; an iterator is read piece by piece and never held whole.

    Returns:
        32 bytes; for no leaves the hash of nothing.
    """
    rest = iter(leaves)
    level: list[bytes] = []
    while chunk := list(islice(rest, LEAVES_A_CHUNK)):
        while len(chunk) > 1:
            chunk = _above(chunk)
        level += chunk
    while len(level) > 1:
        level = _above(level)
    return level[0] if level else EMPTY_ROOT


def proof(leaves: Iterable[bytes], index: int) -> tuple[bytes, ...]:
    """What shows that a leaf is in the tree: the hashes beside its way to the root, RFC 6962 section 2.1.1.

    Args:
        leaves: hashes of 32 bytes, in order; an iterator is read piece by piece and never held whole.
        index: of the leaf, 0, 1, 2 …

    Returns:
        The audit path, from the leaf upwards.

    Raises:
        IndexError: there is no such leaf.
    """
    rest = iter(leaves)
    path: list[bytes] | None = None
    level: list[bytes] = []
    while chunk := list(islice(rest, LEAVES_A_CHUNK)):
        within = index - len(level) * LEAVES_A_CHUNK
        if 0 <= within < len(chunk):
            path = _path(chunk, within)
        level.append(root(chunk))
    if path is None:
        raise IndexError(index)
    return (*path, *_path(level, index // LEAVES_A_CHUNK))


def verify_proof(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether a leaf is in the tree of a root, RFC 9162 section 2.1.3.2.

    Args:
        leaf: its hash.
        index: of the leaf, 0, 1, 2 …
        size: leaves of the tree.
        proof: as `proof` gives it.
        root: of the tree.
    """
    if not 0 <= index < size:
        return False
    last, hashed = size - 1, leaf
    for beside in proof:
        if last == 0:
            return False
        if index & 1 or index == last:
            hashed = _node(beside, hashed)
            # The last node of a level of odd size goes up unchanged.
            while not index & 1:
                index, last = index >> 1, last >> 1
        else:
            hashed = _node(hashed, beside)
        index, last = index >> 1, last >> 1
    return last == 0 and hashed == root


def _path(level: list[bytes], index: int) -> list[bytes]:
    path = []
    while len(level) > 1:
        if index ^ 1 < len(level):
            path.append(level[index ^ 1])
        level, index = _above(level), index >> 1
    return path


def _above(level: list[bytes]) -> list[bytes]:
    sha256 = hashlib.sha256
    pairs = iter(level)
    above = [sha256(b"\x01" + left + right).digest() for left, right in zip(pairs, pairs, strict=False)]
    return above + level[-1:] if len(level) % 2 else above


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


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

    def salts(self, first: int, rows: int) -> Iterator[bytes]:
        """The salts of neighbouring rows, as ASCII.

        Args:
            first: row number.
            rows: how many.
        """
        for row in range(first, first + rows):
            at = row % ROWS_A_SEED
            if at == 0 or row == first:
                block = _salts(self.seed(row))
            yield block[at * SALT_DIGITS : (at + 1) * SALT_DIGITS]

    def seed(self, row: int) -> bytes:
        """The seed of a row.

        Args:
            row: 0, 1, 2 … in the order of the file.
        """
        start = row // ROWS_A_SEED * SEED_BYTES
        return self.seeds[start : start + SEED_BYTES]

    def salt(self, row: int) -> str:
        """The salt of a row: the next 16 bytes of SHAKE-128(seed) for each row of the seed, as 32 hexadecimal digits.

        Args:
            row: 0, 1, 2 … in the order of the file.
        """
        return _salt(self.seed(row), row)


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


@dataclass(frozen=True, slots=True)
class Punctured:
    """The salts of a part that an erasure replaced, without those of the erased rows.

    It keeps the part's old root provable: every row that is left still has its salt, and of an erased row the leaf hash
    remains, which without its salt says nothing about the row. Seeds of 1,024 rows none of which was erased are kept;
    of the others, whose seed would give the erased salts away, each remaining row's salt is.

    Attributes:
        root: of the part as it was published.
        rows: of the part as it was published.
        blocks: one for each 1,024 rows: their seed (32 bytes), or a bit for each row that says whether it is erased
            and then for each row its leaf hash (32 bytes, erased) or its salt (16 bytes).
    """

    root: bytes
    rows: int
    blocks: tuple[bytes, ...]

    @classmethod
    def of(cls, root: bytes, seeds: Seeds, erased: Mapping[int, bytes]) -> Self:
        """Take the salts of erased rows out.

        Args:
            root: of the part.
            seeds: of the part.
            erased: leaf hashes by row number, 0, 1, 2 … in the order of the file.
        """
        size = SEED_BYTES
        whole = tuple(seeds.seeds[at : at + size] for at in range(0, len(seeds.seeds), size))
        return cls(root, seeds.rows, whole).without(erased)

    def without(self, erased: Mapping[int, bytes]) -> Self:
        """Take the salts of further rows out.

        Args:
            erased: leaf hashes by row number of the part as it was published.

        Raises:
            IndexError: there is no such row.
        """
        wanted: dict[int, dict[int, bytes]] = {}
        for row, hashed in erased.items():
            if not 0 <= row < self.rows:
                raise IndexError(row)
            wanted.setdefault(row // ROWS_A_SEED, {})[row] = hashed
        blocks = list(self.blocks)
        for block, rows in wanted.items():
            blocks[block] = self._puncture(block, rows)
        return type(self)(self.root, self.rows, tuple(blocks))

    def salt(self, row: int) -> str | None:
        """The salt of a row: 32 hexadecimal digits; None for an erased one.

        Args:
            row: its number in the part as it was published.
        """
        block = row // ROWS_A_SEED
        if len(self.blocks[block]) == SEED_BYTES:
            return _salt(self.blocks[block], row)
        return _salt_of(self._entries(block)[row % ROWS_A_SEED])

    @property
    def erased(self) -> dict[int, bytes]:
        """Leaf hashes of the erased rows by row number."""
        return {
            block * ROWS_A_SEED + number: entry
            for block, body in enumerate(self.blocks)
            if len(body) != SEED_BYTES
            for number, entry in enumerate(self._entries(block))
            if len(entry) == HASH_BYTES
        }

    def leaves(self, rows: Iterable[str]) -> Iterator[bytes]:
        """The leaf hashes of the part as it was published.

        Args:
            rows: texts of the rows that are left, in order.

        Raises:
            ValueError: there are fewer or more rows than are left.
        """
        left = iter(rows)
        try:
            for block, body in enumerate(self.blocks):
                first = block * ROWS_A_SEED
                if len(body) == SEED_BYTES:
                    for row in range(first, first + self._size(block)):
                        yield leaf(_salt(body, row), next(left))
                    continue
                for entry in self._entries(block):
                    salt = _salt_of(entry)
                    yield entry if salt is None else leaf(salt, next(left))
        except StopIteration:
            raise ValueError("there are fewer rows than salts") from None
        if next(left, None) is not None:
            raise ValueError("there are more rows than salts")

    def to_bytes(self) -> bytes:
        """The root, the rows (8 bytes, big-endian) and the blocks, each after a byte: 0 for a seed, 1 otherwise."""
        blocks = b"".join((b"\x00" if len(body) == SEED_BYTES else b"\x01") + body for body in self.blocks)
        return self.root + self.rows.to_bytes(8, "big") + blocks

    def _size(self, block: int) -> int:
        return min(ROWS_A_SEED, self.rows - block * ROWS_A_SEED)

    def _entries(self, block: int) -> list[bytes]:
        """Salt (16 bytes) or leaf hash (32 bytes) of each row of a block."""
        size, body = self._size(block), self.blocks[block]
        if len(body) == SEED_BYTES:
            first = block * ROWS_A_SEED
            return [bytes.fromhex(_salt(body, row)) for row in range(first, first + size)]
        bits, at, entries = int.from_bytes(body[: -(-size // 8)], "little"), -(-size // 8), []
        for number in range(size):
            width = HASH_BYTES if bits >> number & 1 else SALT_BYTES
            entries.append(body[at : at + width])
            at += width
        return entries

    def _puncture(self, block: int, rows: Mapping[int, bytes]) -> bytes:
        entries = self._entries(block)
        for row, hashed in rows.items():
            entries[row % ROWS_A_SEED] = hashed
        bits = sum(1 << number for number, entry in enumerate(entries) if len(entry) == HASH_BYTES)
        return bits.to_bytes(-(-len(entries) // 8), "little") + b"".join(entries)


def punctured_to_bytes(parts: Sequence[Punctured]) -> bytes:
    """The object with the leaf hashes of erased rows: every replaced part of the month, one after the other.

    Args:
        parts: of this erasure and of those before it, whose rows it may have erased too.
    """
    return b"".join(part.to_bytes() for part in parts)


def punctured_from_bytes(body: bytes) -> list[Punctured]:
    """Read the object with the leaf hashes of erased rows back.

    Args:
        body: as `punctured_to_bytes` wrote it.

    Raises:
        ValueError: it is something else.
    """
    parts, at = [], 0

    def take(size: int) -> bytes:
        nonlocal at
        taken = body[at : at + size]
        if len(taken) != size:
            raise ValueError("the leaf hashes of erased rows are cut off")
        at += size
        return taken

    while at < len(body):
        tree, rows = take(HASH_BYTES), int.from_bytes(take(8), "big")
        blocks = []
        for first in range(0, rows, ROWS_A_SEED):
            kind, size = take(1), min(ROWS_A_SEED, rows - first)
            if kind == b"\x00":
                blocks.append(take(SEED_BYTES))
            elif kind == b"\x01":
                bits = take(-(-size // 8))
                marks = int.from_bytes(bits, "little")
                erased = marks.bit_count()
                if not erased or marks.bit_length() > size:
                    raise ValueError("the leaf hashes of erased rows are damaged")
                blocks.append(bits + take(erased * HASH_BYTES + (size - erased) * SALT_BYTES))
            else:
                raise ValueError("the leaf hashes of erased rows are damaged")
        parts.append(Punctured(tree, rows, tuple(blocks)))
    return parts


@lru_cache(maxsize=16)
def _salts(seed: bytes) -> bytes:
    """The salts of a seed's 1,024 rows, one after the other; one call for all of them costs 25 µs."""
    return hashlib.shake_128(seed).hexdigest(ROWS_A_SEED * SALT_BYTES).encode()


def _salt(seed: bytes, row: int) -> str:
    at = row % ROWS_A_SEED * SALT_DIGITS
    return _salts(seed)[at : at + SALT_DIGITS].decode()


def _salt_of(entry: bytes) -> str | None:
    return entry.hex() if len(entry) == SALT_BYTES else None
