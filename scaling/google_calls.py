"""What counts as a call to Google Calendar, what calls are held against, and how the age of changes is counted.

Belongs here: the words and bounds that `sync_pipeline` writes and everybody reads. Does not: any reading or writing.
"""

TOKEN_REFRESH = "oauth.refresh"  # noqa: S105  # a method's name
"""Goes to another API, and counts against no quota of Calendar."""
POLLS_PER_HOUR = 30
"""Of polling every two minutes, 720 a day: what calls are held against."""
AGES = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400, 2**31 - 1)
""""At most this many seconds old": the buckets of `sync.freshness`; the last has no bound."""
