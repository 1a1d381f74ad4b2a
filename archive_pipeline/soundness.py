"""Whether a month in the bucket is the very one that was verified, as far as it can be asked without reading it.

Belongs here: a request for each object by version and checksum, and the manifest's signed link. Does not: reading the
objects, or walking the whole archive (`archive_pipeline.audit`).
"""

from collections.abc import Iterator, Mapping

from archive_pipeline import chain
from archive_pipeline import manifest as manifests
from archive_pipeline.chain import Linked
from archive_pipeline.manifest import Published
from archive_pipeline.publication import Target

NO_KEYS: Mapping[str, bytes] = {}


class Soundness:
    """The bucket, asked for one problem at a time; the chain is read from its end, once, as far as needed.

    Args:
        target: where the archive lies, and who signs it.
        shard: the rows come from.
        keys: public keys (SPKI, DER) that signed links, by fingerprint.
    """

    def __init__(self, target: Target, shard: str, keys: Mapping[str, bytes] = NO_KEYS) -> None:
        self._target = target
        self._shard = shard
        signer = target.signer
        self._keys = {**keys, **({signer.fingerprint: signer.public_key} if signer is not None else {})}
        self._read: list[Linked] = []
        self._rest: Iterator[Linked] | None = None

    def problem(self, key: str, sha256: str) -> str:
        """What is wrong with a month; empty when nothing is.

        Args:
            key: of its manifest.
            sha256: of the manifest, hex, as it was recorded.

        Raises:
            UserError: the bucket cannot be read.
        """
        bucket = self._target.bucket
        try:
            found = manifests.load(bucket, key)
        except FileNotFoundError:
            return f"s3://{bucket.name}/{key} is missing"
        if found.sha256 != sha256:
            return f"s3://{bucket.name}/{key} is not the manifest that was recorded"
        return self.missing_object(found) or self.missing_link(found)

    def missing_object(self, found: Published) -> str:
        """Which object of a manifest is not the one that was verified; empty when all are.

        Args:
            found: the manifest.

        Raises:
            UserError: the bucket cannot be read.
        """
        bucket = self._target.bucket
        for part in found.manifest.parts:
            where = f"s3://{bucket.name}/{part.key}"
            current = bucket.head(part.key)
            if current is None:
                return f"{where} is missing"
            # Whoever reads the key gets the newest version, whatever is locked beneath it.
            if part.version_id is not None and current.version_id != part.version_id:
                return f"{where} has another version in front of the one that was verified"
            known = current.size == part.size and current.sha256 == part.sha256
            # A server that keeps no checksum has to be read from.
            if not known and not bucket.holds(part.key, part.size, part.sha256, part.version_id):
                return f"{where} holds other bytes than were verified"
        return ""

    def missing_link(self, found: Published) -> str:
        """What is wrong with a manifest's link in the chain; empty when nothing is.

        Args:
            found: the manifest.

        Raises:
            UserError: the bucket cannot be read, or the chain is damaged.
        """
        bucket, signer = self._target.bucket, self._target.signer
        link = next((link for link in self._links() if link.lists(found)), None)
        if link is None:
            return f"s3://{bucket.name}/{found.key} has no link in the chain"
        where = f"s3://{bucket.name}/{link.link.key}"
        fingerprint = link.link.key_fingerprint
        if fingerprint is None:
            return f"{where} is not signed, though a signing key is configured" if signer is not None else ""
        if fingerprint not in self._keys or not link.signed_by(self._keys[fingerprint]):
            return f"the signature of {where} is not by a key of this archive"
        return ""

    def _links(self) -> Iterator[Linked]:
        yield from self._read
        if self._rest is None:
            self._rest = chain.walk(self._target.bucket, self._target.layout, self._shard)
        for link in self._rest:
            self._read.append(link)
            yield link
