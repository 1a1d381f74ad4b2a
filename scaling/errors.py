"""The one error a user is meant to read.

Belongs here: the error type and the wrapper that turns it into a sentence and an exit code.
Does not: errors that code handles (each room has its own, typed).
"""

import logging
import sys
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


class UserError(Exception):
    """A problem the user can fix: one sentence that names the thing and the remedy."""


def run_command(main: Callable[[], int]) -> None:
    """Run a command line and leave the process with its exit code.

    Args:
        main: the command; returns its exit code.

    Raises:
        SystemExit: always; 2 with the sentence on standard error for a `UserError`.
    """
    from scaling import logs  # which reads settings, whose errors are of this module

    began = time.monotonic()
    as_json = False
    try:
        as_json = logs.configure()
        code = main()
    except UserError as error:
        if as_json:
            logger.error("%s", error, extra=logs.event(logs.Event.COMMAND_FAILED))
        else:
            sys.stderr.write(f"error: {error}\n")
        code = 2
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if not as_json:
            raise
        name = type(error).__name__
        logger.exception("ended by an error nobody foresaw: %s", name, extra=logs.event(logs.Event.COMMAND_CRASHED))
        code = 1
    if as_json:
        seconds = round(time.monotonic() - began, 3)
        ended = logs.event(logs.Event.COMMAND_ENDED, exit_code=code, seconds=seconds)
        logger.info("ended with exit code %d after %.1f s", code, seconds, extra=ended)
    sys.exit(code)
