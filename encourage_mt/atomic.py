"""Write a file or a folder completely or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a new file beside `path` for writing and rename it to `path` at the end, after fsync.

    If the block raises, `path` stays as it was and nothing is left beside it. Text is UTF-8 with \\n line ends.
    """
    partial = path.with_name(path.name + ".tmp")
    partial.unlink(missing_ok=True)  # of a process that was killed, or a link to somewhere else
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(partial, mode.replace("w", "x"), **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        _name_file(error, path)
        raise


def _name_file(error: BaseException, path: Path) -> None:
    """Add the name of the file to the error of a write, such as on a full disk, which has none."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Make `path` an empty folder, also if a killed process left one there, and remove it at the end."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """Yield a folder beside `output` that does not exist yet, and rename it to `output` at the end.

    An earlier `output` is removed after that. If the block raises, `output` stays as it was and nothing is left beside
    it. Two processes must not do this for the same `output` at the same time.
    """
    partial, old = (output.with_name(f".{output.name}.{suffix}") for suffix in ("tmp", "old"))
    for left in (partial, old):  # of a process that was killed, or a link to somewhere else
        _remove(left)
    try:
        yield partial
        if output.exists():
            output.rename(old)  # a kill while it is deleted must not leave half of it
        partial.rename(output)
    except OSError as error:
        _name_file(error, output)
        raise
    finally:
        for left in (partial, old):
            _remove(left)


def _remove(path: Path) -> None:
    """Remove a folder, or a link but not what it leads to."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)
