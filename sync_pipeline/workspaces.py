"""The unit of sync: one workspace of one tenant, and its name as a partition key."""

from dataclasses import dataclass
from typing import Self
from uuid import UUID


@dataclass(frozen=True, slots=True, order=True)
class Workspace:
    """One workspace of one tenant."""

    tenant_id: UUID
    workspace_id: UUID

    @property
    def partition_key(self) -> str:
        """`<tenant_id>:<workspace_id>`."""
        return f"{self.tenant_id}:{self.workspace_id}"

    def named(self) -> dict[str, str]:
        """Its names in a trace."""
        return {
            "tenant.id": str(self.tenant_id),
            "workspace.id": str(self.workspace_id),
            "dagster.partition_key": self.partition_key,
        }

    @classmethod
    def from_partition_key(cls, key: str) -> Self:
        """Parse a partition key, which comes from people and is trusted as little as any input.

        Args:
            key: `<tenant_id>:<workspace_id>`, two uuids in their canonical form.

        Raises:
            ValueError: it is anything else.
        """
        tenant, _, workspace = key.partition(":")
        try:
            parsed = cls(UUID(tenant), UUID(workspace))
        except ValueError:
            parsed = None
        if parsed is None or parsed.partition_key != key:
            raise ValueError(f"{key!r} is not a workspace; its form is <tenant_id>:<workspace_id>, both uuids")
        return parsed
