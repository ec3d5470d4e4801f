"""Parallel text: read and check it, whatever it is wrapped in.

Lines end at \\n alone, so that U+2028 and friends cannot shift the two sides.
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np

from ..errors import UserError


def iterate_lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, plain or .gz, without line ends (\\n or \\r\\n) and without a byte order mark.

    Raises UserError on a file that is missing, empty, not gzip, or not UTF-8 (naming line and byte).
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield text.removesuffix("\n").rstrip("\r")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: line {number}, byte {error.start + 1}: not UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not number:
        raise UserError(f"{path}: empty file")


def read_lines(path: Path) -> list[str]:
    """All lines of a file; see `iterate_lines`."""
    return list(iterate_lines(path))


def iterate_segments(path: Path) -> Iterator[str]:
    """The text of the <seg> elements, one a line, of an .xml file of IWSLT or an .sgm file of WMT; escapes are kept.

    Raises UserError if there is none, or one goes on in a further line.
    """
    empty = True
    for number, line in enumerate(iterate_lines(path), start=1):
        if "<seg id" in line:
            if "</seg>" not in line:
                raise UserError(f"{path}: line {number}: a segment that does not end in its line")
            yield _SEGMENT.sub("", line)
            empty = False
    if empty:
        raise UserError(f"{path}: no <seg id=...> in it")


_SEGMENT = re.compile(r'<seg id="[0-9]*">\s*|\s*</seg>\s*')


def iterate_talks(path: Path, dropped: list[str]) -> Iterator[str]:
    """Lines of a train.tags file of IWSLT but those with one of the `dropped` tags; titles and descriptions stay."""
    drop = re.compile("|".join(f"</?{tag}[ >]" for tag in dropped))
    for line in iterate_lines(path):
        if not drop.search(line):
            yield _KEPT_TAGS.sub("", line).strip()


_KEPT_TAGS = re.compile(r"</?(?:title|description)>")


def iterate_columns(path: Path, columns: list[int]) -> Iterator[tuple[str, str]]:
    """Two columns, counted from 1, of a tab-separated file. Raises UserError naming a line that has fewer."""
    source, target = columns
    for number, line in enumerate(iterate_lines(path), start=1):
        fields = line.split("\t")
        if len(fields) < max(columns):
            raise UserError(f"{path}: line {number}: {len(fields)} of {max(columns)} tab-separated columns")
        yield fields[source - 1], fields[target - 1]


def iterate_pairs(files: list[Path], columns: list[int], dropped_tags: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs of lines of a source and a target file, or of one tab-separated file.

    The name tells what a file is: .xml and .sgm have segments, train.tags.* has talks, others plain lines. Raises
    UserError if the sides differ in length, or as the readers above do.
    """
    if len(files) == 1:
        yield from iterate_columns(files[0], columns)
        return
    missing = object()
    sides = [_iterate(path, dropped_tags) for path in files]
    for pair in zip_longest(*sides, fillvalue=missing):
        if missing in pair:
            lengths = [np.array([len(line) for line in _iterate(path, dropped_tags)]) for path in files]
            raise UserError(
                f"{files[0]} has {len(lengths[0])} lines, {files[1]} has {len(lengths[1])}: they must pair line by "
                f"line; by their lengths, they drift apart at about line {first_misaligned_line(*lengths)}"
            )
        yield pair


def _iterate(path, dropped_tags):
    name = path.name.removesuffix(".gz")
    if name.endswith((".xml", ".sgm")):
        return iterate_segments(path)
    return iterate_talks(path, dropped_tags) if name.startswith("train.tags.") else iterate_lines(path)


def first_misaligned_line(source: np.ndarray, target: np.ndarray) -> int:
    """The line, counted from 1, from which on the two sides pair better shifted by their difference in number.

    source, target: lengths of the lines in characters. Pairs are compared by the logarithm of their length ratio.
    """
    if len(source) > len(target):
        source, target = target, source
    source, target = np.log1p(source), np.log1p(target)
    shift = len(target) - len(source)
    together, apart = np.abs(source - target[: len(source)]), np.abs(source - target[shift:])
    cost = np.concatenate([[0], np.cumsum(together - apart)])
    return int(cost.argmin()) + 1
