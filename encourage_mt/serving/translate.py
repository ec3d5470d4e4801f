"""Translate raw text with an exported model: prepare and split each line, search with CTranslate2, restore text."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..data.bitext import lines_of
from ..data.stages import chunks
from ..data.subwords import encoder, join_pieces, restore_bytes
from ..data.tokenization import detokenize
from ..errors import UserError
from ..evaluation.converted_model import MAX_PIECES, Translation, load_model, translate_pieces
from .model import Model

logger = logging.getLogger(__name__)

UNSPACED_END = tuple("。！？")  # no space follows them in Chinese and Japanese
END_OF_SENTENCE = (*".!?…", *UNSPACED_END)


class Hypothesis(NamedTuple):
    """A translation and its score, as fairseq-generate prints it: log2 p / (pieces + 1) ** length penalty."""

    text: str
    score: float


class Translator:
    """Translates raw text with the model that `encourage-mt export` wrote into a folder.

    device: cpu, cuda or auto (a GPU if there is one). threads: of the CPU, see `load_model`. Raises UserError if
    CTranslate2 is not installed, the folder is not a complete export, or there is no such device.
    """

    def __init__(self, model: str | Path, device: str = "auto", threads: int | None = None):
        self.model = Model.open(Path(model))
        self._steps = self.model.preparation.steps(self.model.source)
        self._encode = encoder(self.model.subword, self.model.folder / "subword")
        self.engine = load_model(self.model.folder, device, threads)
        self._has_split = False

    def translate(self, lines: Iterable[str], beam: int | None = None) -> list[str]:
        """Return the translation of each line. `beam` is the model's own by default."""
        return [best.text for best, *_ in self.hypotheses(lines, beam)]

    def hypotheses(self, lines: Iterable[str], beam: int | None = None, nbest: int = 1) -> list[list[Hypothesis]]:
        """Return the `nbest` best translations of each line, best first; those of a line without text are empty.

        A line of more than MAX_PIECES pieces is translated in parts; its score is the mean of theirs. Raises UserError
        if `nbest` exceeds `beam`.
        """
        if isinstance(lines, str):
            raise TypeError("lines must be a list of lines, got one text")
        beam = self.model.beam if beam is None else beam
        if nbest > beam:
            raise UserError(f"--nbest {nbest}: must be at most the beam size, {beam}")
        parts = [self._split(self.pieces(line)) for line in lines]
        pieces = [part for line in parts for part in line]
        results = translate_pieces(self.engine, pieces, beam, self.model.lenpen, nbest)
        return [self._combine([next(results) for _ in line], nbest) for line in parts]

    def prepare(self, line: str) -> str:
        """Return a line as it is before it is split into pieces."""
        line = line.encode(errors="replace").decode()  # half of a surrogate pair is not a character
        for step in self._steps:
            line = step(line)
        return line

    def pieces(self, line: str) -> list[str]:
        return self._encode(self.prepare(line)).split()  # as fairseq-preprocess does

    def _split(self, pieces: list[str]) -> list[list[str]]:
        """Return the parts of a line, each of at most MAX_PIECES pieces; none if it has no pieces."""
        if len(pieces) > MAX_PIECES and not self._has_split:
            logger.warning("lines of more than %d pieces are translated in parts", MAX_PIECES)
            self._has_split = True
        parts, start = [], 0
        while start < len(pieces):
            parts.append(self._first_part(pieces[start : start + MAX_PIECES + 1]))
            start += len(parts[-1])
        return parts

    def _first_part(self, pieces: list[str]) -> list[str]:
        """Return `pieces`, or if they are too many their longest beginning of whole sentences, or of words."""
        if len(pieces) <= MAX_PIECES:
            return pieces
        is_sentencepiece = self.model.remove_bpe == "sentencepiece"
        places = range(MAX_PIECES // 2, MAX_PIECES + 1)
        ends = [
            i for i in places if (pieces[i].startswith("▁") if is_sentencepiece else not pieces[i - 1].endswith("@@"))
        ]
        sentences = [i for i in places if pieces[i - 1].endswith(END_OF_SENTENCE if i in ends else UNSPACED_END)]
        return pieces[: (sentences or ends or [MAX_PIECES])[-1]]

    def _combine(self, parts: list[list[Translation]], nbest: int) -> list[Hypothesis]:
        """Return the hypotheses of a line from those of its parts."""
        if not parts:
            return [Hypothesis("", 0.0)] * nbest
        return [
            Hypothesis(
                " ".join(self.text(part.pieces) for part in ranked), sum(part.score for part in ranked) / len(ranked)
            )
            for ranked in zip(*parts, strict=True)
        ]

    def text(self, pieces: list[str]) -> str:
        return restore_text(join_pieces(pieces, self.model.remove_bpe), self.model)


def restore_text(line: str, model: Model) -> str:
    """Return a translation, whose pieces were joined, as plain text."""
    line = restore_bytes(line) if model.byte_fallback else line
    return detokenize([line], model.target)[0] if model.preparation.tokenizer != "none" else line


def translate_stream(
    translator: Translator,
    source: BinaryIO,
    output: BinaryIO,
    lines: int,
    beam: int | None = None,
    nbest: int = 1,
    scores: bool = False,
) -> None:
    """Translate `source` line by line into `output`, in order; memory does not grow with the number of lines.

    Writes `nbest` lines for each line of `source`, even an empty one; with `scores`, each is SCORE tab TEXT. `lines` is
    the number of lines translated together. Raises UserError if the text is not UTF-8 or a line is too long, without
    writing any of the lines that are translated with it.
    """
    translator.hypotheses([], beam, nbest)  # refuses wrong options before the first line
    for chunk in chunks(((line,) for line in lines_of(source, "standard input")), lines):
        for hypotheses in translator.hypotheses((line for (line,) in chunk), beam, nbest):
            for text, score in hypotheses:
                output.write((f"{score:.4f}\t{text}\n" if scores else f"{text}\n").encode())
        output.flush()
