"""Whose turn it is: tenants in turn, each with a bounded share of the workers.

Belongs here: the order in which one run takes what is due. Pure bookkeeping, not thread-safe.
Does not: leases, which decide between runs.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from uuid import UUID

from sync_pipeline.workspaces import Workspace


class Rotation:
    """The due workspaces of one run that nobody has taken yet."""

    def __init__(self, workspaces: Iterable[Workspace], *, tenant_limit: int) -> None:
        """Line them up.

        Args:
            workspaces: the tenant whose turn it is first, and of each tenant its workspaces in their order.
            tenant_limit: workspaces of one tenant that may be in work at a time.
        """
        self._waiting: OrderedDict[UUID, deque[Workspace]] = OrderedDict()
        self._in_work: Counter[UUID] = Counter()
        self._tenant_limit = tenant_limit
        for workspace in workspaces:
            self.put_back(workspace)

    def __len__(self) -> int:
        """How many are waiting."""
        return sum(map(len, self._waiting.values()))

    def __bool__(self) -> bool:
        """Whether any is waiting."""
        return bool(self._waiting)

    def take(self, at_most: int) -> list[Workspace]:
        """Take the next ones into work: one of each tenant in turn, none of a tenant that has its share in work.

        Args:
            at_most: how many.

        Returns:
            The workspaces; none when every tenant that waits has its share in work.
        """
        taken: list[Workspace] = []
        at_limit = 0  # tenants passed over since the last one taken; all of them: nothing more to take
        while self._waiting and len(taken) < at_most and at_limit < len(self._waiting):
            tenant, line = next(iter(self._waiting.items()))
            self._waiting.move_to_end(tenant)
            if self._in_work[tenant] >= self._tenant_limit:
                at_limit += 1
                continue
            at_limit = 0
            self._in_work[tenant] += 1
            taken.append(line.popleft())
            if not line:
                del self._waiting[tenant]
        return taken

    def done(self, workspace: Workspace) -> None:
        """Count a workspace that was taken as no longer in work."""
        self._in_work[workspace.tenant_id] -= 1
        if not self._in_work[workspace.tenant_id]:
            del self._in_work[workspace.tenant_id]

    def put_back(self, workspace: Workspace) -> None:
        """Let a workspace wait, behind the others of its tenant."""
        self._waiting.setdefault(workspace.tenant_id, deque()).append(workspace)

    def clear(self) -> None:
        """Let go of all that wait."""
        self._waiting.clear()
