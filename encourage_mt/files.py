"""Read and write files so that nobody ever sees half of one."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import UserError


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file beside `path` for writing and rename it to `path` at the end, after fsync.

    If the block raises, `path` stays as it was and nothing is left beside it. Text is UTF-8 with \\n line ends.
    """
    partial = path.with_name(path.name + ".tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(partial, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises UserError if it is missing, is not UTF-8 or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, atomically; numpy values become plain numbers and lists."""
    text = json.dumps(content, indent=1, ensure_ascii=False, default=lambda value: value.tolist())
    with atomic_write(path) as file:
        file.write(text + "\n")
