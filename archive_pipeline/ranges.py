"""The archive's parts as files that DuckDB reads by ranges, each byte counted.

Belongs here: the file system that DuckDB is given. Does not: what is read of it, or SQL.

DuckDB's own S3 reader is an extension that is downloaded on first use, which a closed network does not allow. This
file system serves the parts and nothing else, in the very versions that were verified. DuckDB asks for a part's
footer, the bloom filters it needs and the column chunks that can hold an answer, and exactly those ranges are fetched.
"""

import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from fsspec import AbstractFileSystem

from archive_pipeline.manifest import Part
from archive_pipeline.objects import ArchiveBucket

SCHEME = "archive"
# Footers and bloom filters are read again by every statement, and a part's last bytes hold both.
KEPT_READ_BYTES = 256 << 10
KEPT_BYTES = 64 << 20
WRITTEN_ONCE = datetime(2000, 1, 1, tzinfo=UTC)


class PartsFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """The parts of an archive, read only.

    Args:
        bucket: they lie in.
        parts: the only files there are.

    Attributes:
        bytes_read: fetched from the bucket so far.
        requests: made for them.
        failure: the first error of a read; DuckDB passes on no more of it than a traceback as text.
    """

    protocol = SCHEME
    cachable = False

    def __init__(self, bucket: ArchiveBucket, parts: Iterable[Part]) -> None:
        super().__init__()
        self._bucket = bucket
        self._parts: Mapping[str, Part] = {part.key: part for part in parts}
        self._kept: defaultdict[str, list[tuple[int, bytes]]] = defaultdict(list)
        self._kept_bytes = 0
        self._lock = threading.Lock()
        self.bytes_read = 0
        self.requests = 0
        self.failure: Exception | None = None

    def info(self, path: str, **_: object) -> dict[str, Any]:
        """Size of a part, from its manifest.

        Args:
            path: with or without the scheme.

        Raises:
            FileNotFoundError: no manifest lists it.
        """
        part = self._part(path)
        return {"name": part.key, "size": part.size, "type": "file"}

    def exists(self, path: str, **_: object) -> bool:
        """Whether a manifest lists it.

        Args:
            path: with or without the scheme.
        """
        return self._strip_protocol(path) in self._parts

    def glob(self, path: str, **_: object) -> list[str]:
        """The part itself; keys are no patterns.

        Args:
            path: with or without the scheme.
        """
        return [self._part(path).key]

    def modified(self, path: str) -> datetime:  # noqa: ARG002 - a part never changes
        """The same instant for every part: DuckDB keeps footers while it does not change.

        Args:
            path: of the part.
        """
        return WRITTEN_ONCE

    def _open(self, path: str, mode: str = "rb", **_: object) -> "PartFile":
        if mode != "rb":
            raise PermissionError(path)
        return PartFile(self, self._part(path))

    def _part(self, path: str) -> Part:
        key = self._strip_protocol(path)
        if key not in self._parts:
            raise FileNotFoundError(path)
        return self._parts[key]

    def fetch(self, part: Part, start: int, length: int) -> bytes:
        """Read a range of a part.

        Args:
            part: the part.
            start: first byte.
            length: how many.

        Raises:
            UserError: the bucket cannot be read.
            FileNotFoundError: the part is gone.
        """
        with self._lock:
            for begin, held in self._kept[part.key]:
                if begin <= start and start + length <= begin + len(held):
                    return held[start - begin : start - begin + length]
        try:
            found = self._bucket.read_range(part.key, start, length, part.version_id)
        except Exception as error:
            with self._lock:
                self.failure = self.failure or error
            raise
        with self._lock:
            self.bytes_read += len(found)
            self.requests += 1
            if length <= KEPT_READ_BYTES and self._kept_bytes + length <= KEPT_BYTES:
                self._kept[part.key].append((start, found))
                self._kept_bytes += length
        return found


class PartFile:
    """An open part.

    DuckDB's threads share one handle, and each sets the position and then reads in two calls: with one position for
    all, a thread read another's range, and a bloom filter taken from there left out the row group of the answer.
    So every thread has a position of its own. (`threading.local` would forget it: these threads are not Python's.)

    Args:
        files: the file system.
        part: the part.
    """

    def __init__(self, files: PartsFileSystem, part: Part) -> None:
        self._files = files
        self._part = part
        self._positions: dict[int, int] = {}

    def seek(self, offset: int, whence: int = 0) -> int:
        """Set this thread's position.

        Args:
            offset: bytes.
            whence: 0 from the start, 1 from the position, 2 from the end.
        """
        base = (0, self.tell(), self._part.size)[whence]
        self._positions[threading.get_ident()] = base + offset
        return base + offset

    def tell(self) -> int:
        """This thread's position."""
        return self._positions.get(threading.get_ident(), 0)

    def read(self, length: int = -1) -> bytes:
        """Read from this thread's position on.

        Args:
            length: bytes; negative is the rest.

        Raises:
            UserError: the bucket cannot be read.
            FileNotFoundError: the part is gone.
        """
        start = self.tell()
        rest = max(self._part.size - start, 0)
        length = rest if length < 0 else min(length, rest)
        found = self._files.fetch(self._part, start, length) if length else b""
        self._positions[threading.get_ident()] = start + len(found)
        return found

    def close(self) -> None:
        """Nothing is held open."""
