"""When failing workspaces are so many that the whole run counts as failed.

Belongs here: the budget. Does not: why a workspace failed, or whether it needs a human (`health`).

A fleet of thousands has a failing workspace at any time: a run that failed for each would be red always and so say
nothing. Red is kept for what somebody has to look at.
"""

SHARE = 0.05
"""Of the workspaces may fail."""
AT_LEAST = 3
"""In a small fleet one bad workspace is a large share and no incident."""


def is_exceeded(failed: int, workspaces: int) -> bool:
    """Tell whether too many workspaces failed.

    Args:
        failed: how many.
        workspaces: of how many, be it those that exist or those a run served.
    """
    return failed >= AT_LEAST and failed > workspaces * SHARE
