"""Errors the user can fix: printed as one line, exit code 2."""

import errno
import io
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
def as_user_error(message: str):
    """Raise UserError "MESSAGE (problem)" for whatever a library raises in the block because of a damaged file.

    UserError and OSError pass through unchanged; an OSError names its file itself.
    """
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        raise UserError(f"{message} ({first_line(error)})") from None


@contextmanager
def exit_on_user_error(program: str):
    """Print a UserError or OSError of the block as one line and exit with code 2; Ctrl-C exits with 130.

    If the reader of the output has closed it, the program ends silently with code 141, like other tools.
    Standard streams that were closed before the start are empty.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # in this order, each gets its own descriptor again, and no other file does
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # such as ± where the terminal has only ASCII
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        sys.exit(128 + signal.SIGPIPE)
    except (UserError, OSError) as error:
        is_full = getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT)
        remedy = "; free some space, then run the same command" if is_full else ""
        print(f"{program}: error: {' '.join(str(error).split())}{remedy}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # such as a full disk
            _discard_output()
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{program}: interrupted; run the same command again", file=sys.stderr)
        sys.exit(130)


def _discard_output() -> None:
    """Redirect standard output to nowhere, because Python flushes it once more at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
