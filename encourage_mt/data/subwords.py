"""Subword models: SentencePiece, or subword-nmt where the merges of a published pipeline must match."""

import functools
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import sentencepiece
from subword_nmt import apply_bpe, learn_bpe

from ..errors import UserError

SAMPLED_LINES = 4_000_000  # SentencePiece holds all it learns from
CACHED_WORDS = 2**16


def learn(pairs: Iterable[tuple[str, str]], count: int, options: dict, prefix: Path) -> dict:
    """Learn a joint model on both sides of `count` pairs; writes `prefix`.model (SentencePiece) or `prefix`.codes.

    options {"merges": N} is subword-nmt, on all lines; others are SentencePiece's trainer options, on at most
    SAMPLED_LINES lines, every k-th pair. Returns how many lines were learned from. Raises UserError if it fails.
    """
    if "merges" in options:
        lines = (line for pair in pairs for line in pair)
        with open(f"{prefix}.codes", "w", encoding="utf-8", newline="\n") as codes:
            try:
                learn_bpe.learn_bpe(lines, codes, options["merges"])
            except ValueError:  # the maximum over no pairs of characters
                raise UserError("subword model: no word has two characters") from None
        return {"learned_on_lines": 2 * count}
    step = -(-2 * count // SAMPLED_LINES)
    lines = (line for pair in islice(pairs, 0, None, step) for line in pair)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_prefix=str(prefix),
            **{"character_coverage": 1.0, "minloglevel": 2, **options},
        )
    except (RuntimeError, OSError, TypeError) as error:
        raise UserError(f"subword model: {' '.join(str(error).split())}") from None
    return {"learned_on_lines": 2 * -(-count // step)}


class SentencePieceEncoder:
    """text -> pieces joined by spaces."""

    def __init__(self, prefix: Path):
        self._encode = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model").encode

    def __call__(self, line: str) -> str:
        return " ".join(self._encode(line, out_type=str))


class BPEEncoder:
    """tokens -> pieces joined by spaces, as subword-nmt segments them, word by word from a cache."""

    def __init__(self, prefix: Path):
        with open(f"{prefix}.codes", encoding="utf-8", newline="\n") as codes:
            bpe = apply_bpe.BPE(codes)
        self._word = functools.lru_cache(CACHED_WORDS)(lambda word: self._segment(bpe, word))

    def _segment(self, bpe, word):
        bpe.cache.clear()  # it has no bound of its own
        return bpe.segment(word)

    def __call__(self, line: str) -> str:
        return " ".join(map(self._word, line.split()))


def encoder(options: dict, prefix: Path):
    """The encoder of the model that `learn` wrote with these options."""
    return BPEEncoder(prefix) if "merges" in options else SentencePieceEncoder(prefix)


def pieces(prefix: Path) -> Iterator[str]:
    """All pieces of a SentencePiece model that text can be encoded into, without <unk> and its like."""
    model = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    for index in range(model.get_piece_size()):
        if not (model.is_unknown(index) or model.is_control(index)):
            yield model.id_to_piece(index)


def restore_bytes(line: str) -> str:
    """Text from which --remove-bpe sentencepiece has left byte pieces: <0xE2><0x82><0xAC> becomes the euro sign.

    Bytes that are no UTF-8 become U+FFFD.
    """
    return _BYTES.sub(lambda run: bytes.fromhex(re.sub("<0x|>", "", run.group())).decode(errors="replace"), line)


_BYTES = re.compile(r"(?:<0x[0-9A-F]{2}>)+")
