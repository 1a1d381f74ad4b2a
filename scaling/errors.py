"""The one error a user is meant to read.

Belongs here: the error type and the wrapper that turns it into a sentence and an exit code.
Does not: errors that code handles (each room has its own, typed).
"""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A problem the user can fix: one sentence that names the thing and the remedy."""


def run_command(main: Callable[[], int]) -> None:
    """Run a command line and leave the process with its exit code.

    Args:
        main: the command; returns its exit code.

    Raises:
        SystemExit: always; 2 with the sentence on standard error for a `UserError`.
    """
    try:
        code = main()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
