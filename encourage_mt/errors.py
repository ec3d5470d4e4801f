"""Errors the user can fix: printed as one line, exit code 2."""

import os
import signal
import sys
from contextlib import contextmanager


class UserError(Exception):
    """Bad input or something that is missing; the message names the file or option and the remedy."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


@contextmanager
def exit_on_user_error(program: str):
    """Print a UserError or OSError of the block as one line and exit with code 2; Ctrl-C exits with 130.

    If the reader of the output has closed it, the program ends without a word and with code 141, like other tools.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it again at the end
        sys.exit(128 + signal.SIGPIPE)
    except (UserError, OSError) as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{program}: interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(130)
