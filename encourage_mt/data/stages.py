"""Tokenize, clean and encode chunks of pairs in several processes, keeping their order."""

import gc
import multiprocessing
import os
import re
import unicodedata
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from ..files import Record
from ..processes import set_up_worker
from ..recipe import Clean, Recipe
from . import subwords
from .tokenization import PunctuationNormalizer, Tokenizer

CHUNK, CHUNK_CHARACTERS = 1000, 1 << 20  # a chunk ends when it has that many pairs, or characters
WAITING = 4  # chunks per worker that are held in memory at a time
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
# soft hyphens, zero-width characters and marks of direction, which subword models drop or a reader does not see
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")


def chunks(pairs: Iterable[tuple[str, ...]], limit: int | None = None) -> Iterator[list[tuple[str, ...]]]:
    """Yield lists of at most `limit` (default: CHUNK) pairs, or other tuples of texts, bounded in characters too."""
    chunk, size, limit = [], 0, limit or CHUNK
    for pair in pairs:
        chunk.append(pair)
        size += sum(map(len, pair))
        if len(chunk) >= limit or size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def ordered_map(stage: Callable, pairs: Iterable[tuple[str, str]], workers: int) -> Iterator[tuple[list, object]]:
    """Yield (chunk, stage(chunk)) for all chunks of `pairs`, in order, computed by `workers` processes.

    `stage` is picklable; each worker has its own copy, with its own caches. Only a few chunks are in memory at a time.
    Raises UserError if a worker dies (out of memory).
    """
    parts = chunks(pairs)
    first = list(islice(parts, 2))
    parts = chain(first, parts)
    if workers == 1 or len(first) < 2:
        for chunk in parts:
            yield chunk, stage(chunk)
        return
    context = multiprocessing.get_context("fork")  # a spawned worker would import everything again
    pool = ProcessPoolExecutor(workers, context, _start_worker, (stage, os.getpid()))
    results = ((chunk, pool.submit(_apply, chunk)) for chunk in parts)
    try:
        waiting = deque(islice(results, WAITING * workers))
        while waiting:
            chunk, result = waiting.popleft()
            waiting.extend(islice(results, 1))
            yield chunk, result.result()
    except BrokenProcessPool:
        raise UserError("a worker process was killed, probably out of memory; try --workers 1") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(stage, parent):
    global _stage
    set_up_worker(parent)
    gc.freeze()  # imported objects are never collected: the collector must not touch, and so copy, their pages
    _stage = stage


def _apply(chunk):
    return _stage(chunk)


def drop_reason(source_length: int, target_length: int, clean: Clean) -> str:
    """Return why a pair of these lengths is dropped, as by Moses' clean-corpus-n.perl: "empty", "too_long", "ratio".

    Returns "" for a pair that is kept.
    """
    shorter, longer = sorted((source_length, target_length))
    if not shorter:
        return "empty"
    if longer > (clean.max_length or longer):
        return "too_long"
    return "ratio" if longer / shorter > (clean.max_ratio or longer) else ""


class Preparation(Record):
    """How a line of raw text is prepared before it is split into pieces: options of a recipe."""

    tokenizer: Literal["none", "moses"]
    aggressive_hyphens: bool
    straight_apostrophes: bool
    normalize_punctuation: bool
    lowercase: bool

    @classmethod
    def of(cls, options: dict[str, Any], like_train: bool) -> "Preparation":
        """Return how a recipe with these options prepared text; like_train: that of train, or held out of it."""
        values = {name: options.get(name, False) for name in cls.model_fields}
        return cls(**{**values, "straight_apostrophes" if like_train else "normalize_punctuation": False})

    def steps(self, language: str) -> list[Callable[[str], str]]:
        """Return the functions that prepare a line in `language`, to be applied one after the other."""
        steps: list[Callable[[str], str]] = []
        if self.straight_apostrophes:
            steps.append(lambda line: line.replace("’", "'"))
        if self.normalize_punctuation:
            steps.append(PunctuationNormalizer(language))
        if self.tokenizer == "moses":
            steps.append(Tokenizer(language, self.aggressive_hyphens))
        else:
            steps.append(lambda line: CONTROL.sub(" ", line))
        if self.lowercase:
            steps.append(str.lower)
        return steps


@dataclass
class TextStage:
    """Turns [(source, target)] into [(drop reason, source, target)]: normalized, tokenized, lowercased.

    The drop reason is "" unless the recipe cleans by tokens. is_train: the text is train, or held out of it; otherwise
    it is a valid or test set with its own files.
    """

    recipe: Recipe
    is_train: bool

    @cached_property
    def sides(self):
        preparation = Preparation.of(self.recipe.preparation, self.is_train)
        return [preparation.steps(language) for language in (self.recipe.source, self.recipe.target)]

    def __call__(self, pairs):
        columns = []
        for steps, lines in zip(self.sides, zip(*pairs, strict=True), strict=True):
            for step in steps:
                lines = map(step, lines)
            columns.append(lines)
        prepared = zip(*columns, strict=True)
        if not (self.is_train and self.recipe.clean.unit == "tokens"):
            return [("", *pair) for pair in prepared]
        return [(drop_reason(*(len(side.split()) for side in pair), self.recipe.clean), *pair) for pair in prepared]


@dataclass
class Encoded:
    """A chunk in pieces: the text of the pairs that are kept, and values for each of them."""

    kept: bytearray  # 1 or 0 for each pair of the chunk
    dropped: Counter  # {drop reason: pairs}
    text: tuple[str, str]  # lines of source and target
    lengths: tuple[array, array]  # in pieces
    hashes: tuple[array, array, array]  # 64 bits of source, target and pair before encoding
    pieces: Counter  # empty unless they are counted


@dataclass
class EncodeStage:
    """Turns [(source, target)] into Encoded, cleaned by the number of pieces unless `clean` is None."""

    options: dict
    prefix: Path
    clean: Clean | None
    count_pieces: bool

    @cached_property
    def encode(self):
        return subwords.encoder(self.options, self.prefix)

    def __call__(self, pairs):
        kept, dropped, pieces = bytearray(), Counter(), Counter()
        text, lengths, hashes = ([], []), (array("I"), array("I")), (array("Q"), array("Q"), array("Q"))
        for pair in pairs:
            encoded = [self.encode(side) for side in pair]
            length = [side.count(" ") + 1 if side else 0 for side in encoded]
            reason = drop_reason(*length, self.clean) if self.clean is not None else ""
            kept.append(not reason)
            if reason:
                dropped[reason] += 1
                continue
            for side in (0, 1):
                text[side].append(encoded[side])
                lengths[side].append(length[side])
                hashes[side].append(hash64(visible(pair[side])))
            hashes[2].append((hashes[0][-1] * _ODD + hashes[1][-1]) % 2**64)
        if self.count_pieces:
            for side in text:
                pieces.update(piece for line in side for piece in line.split(" "))
        return Encoded(kept, dropped, tuple("".join(f"{x}\n" for x in side) for side in text), lengths, hashes, pieces)


_ODD = 0x9E3779B97F4A7C15


def visible(text: str) -> str:
    """Return `text` in NFKC without invisible characters, each run of white space as one space: to find equal ones."""
    return " ".join(unicodedata.normalize("NFKC", INVISIBLE.sub("", text)).split())


def hash64(text: str) -> int:
    """Return a hash that is the same in every process and on every machine, unlike hash()."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
