"""The chain of signed links, one for each published manifest, whose newest is pinned in Postgres.

Belongs here: the link, appending one, verifying a link against the one before. Does not: walking the whole archive
(`archive_pipeline.audit`), keys (`archive_pipeline.signing`).

A link's key carries its number and is put with If-None-Match, so two runs that append at once cannot fork the chain:
the bucket gives the number to one, the other takes the next.
"""

from dataclasses import dataclass
from datetime import datetime

from archive_pipeline.manifest import Layout, Published
from archive_pipeline.objects import ArchiveBucket
from archive_pipeline.signing import Signer


@dataclass(frozen=True, slots=True)
class Head:
    """The newest link of a chain, as it is pinned outside the bucket.

    Attributes:
        sequence: 1, 2, 3 …
        key: of the link.
        sha256: of its bytes, hex.
        signature: hex; None where no signing key is configured.
    """

    sequence: int
    key: str
    sha256: str
    signature: str | None


def append(
    bucket: ArchiveBucket,
    layout: Layout,
    signer: Signer | None,
    found: Published,
    *,
    pinned: Head | None,
    now: datetime,
) -> Head:
    """Append the link of a manifest, unless it has one already.

    Args:
        bucket: of the archive.
        layout: where the chain lies.
        signer: None leaves the link unsigned.
        found: the manifest.
        pinned: the newest link known, from which the chain's end is looked for.
        now: by the database's clock.

    Returns:
        The chain's newest link.

    Raises:
        UserError: the bucket or the key does not work, or the chain is broken.
    """
    raise NotImplementedError
