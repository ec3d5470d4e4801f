"""What is the user's to mend: told in one line, exit code 2."""

import sys
from contextlib import contextmanager


class UserError(Exception):
    """Bad input or a missing piece; the message names the file or option and the remedy."""


def first_line(error: Exception) -> str:
    """What an exception says, without the pages some add; its type if it says nothing."""
    return str(error).strip().split("\n")[0] or type(error).__name__


@contextmanager
def exit_on_user_error(program: str):
    """Print a UserError or OSError of the block as one line and exit with code 2; Ctrl-C exits with 130."""
    try:
        yield
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{program}: interrupted; run it again to go on", file=sys.stderr)
        sys.exit(130)
