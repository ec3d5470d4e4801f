"""Parallel text: read, check, fetch. Lines end at \\n alone, so that U+2028 and friends cannot shift the two sides."""

import gzip
import zlib
from pathlib import Path

import pooch

from .errors import UserError


def read_lines(path: Path) -> "list[str]":
    """Lines of a UTF-8 file, plain or .gz, without line ends and without a byte order mark.

    Raises UserError on a file that is missing, empty, not gzip, or not UTF-8 (naming line and byte).
    """
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line_start = raw.rfind(b"\n", 0, error.start) + 1
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: line {line}, byte {error.start - line_start + 1}: not UTF-8") from None
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise UserError(f"{path}: empty file")
    return [line.rstrip("\r") for line in lines]


def read_bitext(source: Path, target: Path) -> "list[tuple[str, str]]":
    """Pairs of lines. Raises UserError if the sides differ in length, or as `read_lines` does."""
    source_lines, target_lines = read_lines(source), read_lines(target)
    if len(source_lines) != len(target_lines):
        raise UserError(
            f"{source} has {len(source_lines)} lines, {target} has {len(target_lines)}: they must pair line by line"
        )
    return list(zip(source_lines, target_lines, strict=True))


def fetch(name: str, raw_dir: "Path | None", cache: Path, url: "str | None", sha256: "str | None") -> Path:
    """The file `name` in `raw_dir`, or else downloaded from below `url` into `cache`, checked against `sha256`.

    Raises UserError if it is nowhere to be had or is not the file the digest tells.
    """
    if raw_dir is not None:
        path = raw_dir / name
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        if sha256 and pooch.file_hash(str(path)) != sha256:
            raise UserError(f"{path}: sha256 differs from that of the published file")
        return path
    if url is None:
        raise UserError(f"{name}: this recipe downloads nothing; give the folder of its files with --raw-dir")
    source = f"{url.rstrip('/')}/{name}"
    try:
        fetched = pooch.retrieve(
            source,
            known_hash=sha256,
            fname=name,
            path=cache,
            downloader=pooch.HTTPDownloader(progressbar=True, timeout=60),
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{source}: {reason}; with the files at hand, use --raw-dir") from None
    return Path(fetched)
