"""Read and check parallel text from plain and gzipped files, columns, <seg> elements and IWSLT's train.tags files.

Lines end at \\n only, so that U+2028 and similar characters cannot shift the two sides against each other.
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import UserError
from .archives import size_limit

MAX_LINE = 1 << 22  # bytes; room for a million characters


def lines_of(file: BinaryIO | BufferedIOBase, name: Path | str) -> Iterator[str]:
    """Yield the lines of an open UTF-8 file as they arrive, without line ends (\\n or \\r\\n) and byte order mark.

    Raises UserError, which calls the file `name`, if a line is not UTF-8 or longer than MAX_LINE bytes.
    """
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
        line = line.removesuffix(b"\n")
        if len(line) > MAX_LINE:
            raise UserError(f"{name}: line {number}: longer than {MAX_LINE:,} bytes")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: line {number}, byte {error.start + 1}: not UTF-8") from None
        yield (text.removeprefix("\ufeff") if number == 1 else text).rstrip("\r")


def iterate_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file, plain or .gz, as `lines_of` does.

    Raises UserError also if the file is missing, empty or not gzip, or if a .gz expands beyond `size_limit`.
    """
    count = 0
    try:
        limit = size_limit(path)
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for line in lines_of(file, path):
                count += 1
                if path.suffix == ".gz" and file.tell() > limit:
                    raise UserError(f"{path}: expands to more than {limit:,} bytes")
                yield line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not count:
        raise UserError(f"{path}: empty file")


def read_lines(path: Path) -> list[str]:
    """Return all lines of a file; see `iterate_lines`."""
    return list(iterate_lines(path))


def iterate_segments(path: Path) -> Iterator[str]:
    """Yield the text of the <seg> elements of an .xml file of IWSLT or an .sgm file of WMT; escapes are kept.

    Raises UserError if there is none, or if one does not end on its line.
    """
    empty = True
    for number, line in enumerate(iterate_lines(path), start=1):
        segments = _SEGMENT.findall(line)
        if len(_SEGMENT_TAG.findall(line)) != 2 * len(segments):
            raise UserError(f"{path}: line {number}: a <seg> must begin and end on one line")
        for segment in segments:
            yield segment.strip()
            empty = False
    if empty:
        raise UserError(f"{path}: has no <seg>")


_SEGMENT = re.compile(r"<seg(?:\s[^<>]*)?>(.*?)</seg\s*>", re.IGNORECASE)
_SEGMENT_TAG = re.compile(r"</?seg\b", re.IGNORECASE)


def iterate_talks(path: Path, dropped_tags: list[str]) -> Iterator[str]:
    """Yield the lines of a train.tags file of IWSLT, except those with one of the tags; titles are kept."""
    drop = re.compile("|".join(f"</?{re.escape(tag)}[ >]" for tag in dropped_tags))
    for line in iterate_lines(path):
        if not (dropped_tags and drop.search(line)):
            yield _KEPT_TAGS.sub("", line).strip()


_KEPT_TAGS = re.compile(r"</?(?:title|description)>")


def iterate_columns(path: Path, columns: list[int]) -> Iterator[tuple[str, str]]:
    """Yield two columns, counted from 1, of a tab-separated file. Raises UserError if a line has fewer."""
    source, target = columns
    for number, line in enumerate(iterate_lines(path), start=1):
        fields = line.split("\t")
        if len(fields) < max(columns):
            raise UserError(f"{path}: line {number}: has {len(fields)} tab-separated columns, needs {max(columns)}")
        yield fields[source - 1], fields[target - 1]


def iterate_pairs(files: list[Path], columns: list[int], dropped_tags: list[str]) -> Iterator[tuple[str, str]]:
    """Yield pairs of lines of a source and a target file, or of one tab-separated file.

    The name decides how a file is read: .xml and .sgm contain segments, train.tags.* talks, and others plain lines.
    Raises UserError if the sides differ in length, or as the readers above do.
    """
    if len(files) == 1:
        yield from iterate_columns(files[0], columns)
        return
    missing = object()
    sides = [_iterate(path, dropped_tags) for path in files]
    for pair in zip_longest(*sides, fillvalue=missing):
        if missing in pair:
            lengths = [np.array([len(line) for line in _iterate(path, dropped_tags)]) for path in files]
            line = first_misaligned_line(*lengths)
            raise UserError(
                f"{files[0]} has {len(lengths[0])} lines, {files[1]} has {len(lengths[1])}, but they must pair line by "
                f"line; judging by the lengths, they are misaligned from about line {line} on"
            )
        yield pair


def _iterate(path, dropped_tags):
    name = path.name.removesuffix(".gz")
    if name.endswith((".xml", ".sgm")):
        return iterate_segments(path)
    return iterate_talks(path, dropped_tags) if name.startswith("train.tags.") else iterate_lines(path)


def first_misaligned_line(source: np.ndarray, target: np.ndarray) -> int:
    """Estimate the line, counted from 1, after which the sides pair better if the longer one is shifted.

    source, target: lengths of the lines in characters. Pairs are compared by the logarithm of their length ratio, and
    the shift is the difference in the number of lines.
    """
    if len(source) > len(target):
        source, target = target, source
    source, target = np.log1p(source), np.log1p(target)
    shift = len(target) - len(source)
    together, apart = np.abs(source - target[: len(source)]), np.abs(source - target[shift:])
    cost = np.concatenate([[0], np.cumsum(together - apart)])
    return int(cost.argmin()) + 1
