"""Compare translations by the training frequency of words: unseen, rare and frequent words, names and numbers.

The definitions are those of the word accuracy of compare-mt (Neubig et al. 2019):
- a word of a translation is matched if it is also in the reference of the sentence; repetitions count at most as often
  as in the reference; its frequency is that in the target side of the training set, case-sensitive;
- accuracy is the share of the reference's words that are matched (recall), F1 the harmonic mean of that and precision.
Words are the Moses tokens of tokenized data, otherwise the tokens of sacreBLEU's tokenizer for the language.
"All words" is the micro-average, "mean of frequencies" the macro-average: the mean over the ranges with words.
A number is a word with a digit. A name is a capitalised word of two characters or more, not at the start of a sentence,
that train never has in lower case, except I'm, I've and the like; in German, which capitalises nouns, this includes
most nouns. As in compare-mt, a matched word is a name if it is one in the reference, wherever the translation has it.
"""

import logging
import os
from collections import Counter
from contextlib import suppress
from functools import partial
from html import unescape
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from tqdm import tqdm

from ..data.binarize import open_binarized
from ..data.manifest import PreparedData
from ..data.subwords import join_pieces, restore_bytes
from ..environment import quiet_imports
from ..errors import as_user_error
from ..files import Record, read_record, write_record
from ..training.run_folder import Run
from .comparison import read_translation
from .scoring import metrics
from .significance import MetricComparison, Statistic, compare_resampled, count_draws

logger = logging.getLogger(__name__)
FREQUENCIES = (0, 1, 5, 10, 100, 1000)
NAME, NUMBER = range(len(FREQUENCIES), len(FREQUENCIES) + 2)
RANGES = [str(low) if low + 1 == high else f"{low}-{high - 1}" for low, high in pairwise(FREQUENCIES)]
ROWS = [*(f"{name} times in train" for name in [*RANGES, f"{FREQUENCIES[-1]}+"]), "all words", "names", "numbers"]
MACRO = "mean of frequencies"
SENTENCE_END = frozenset(".!?:…\"“„«'")


class WordCounts(Record):
    """The content of words.json: how often each word occurs in the target side of train, and in which data."""

    remedy: ClassVar[str] = "remove it"

    format: Literal[2] = 2
    data_sha256: str = ""  # files of earlier versions have none, so their words are counted again
    counts: dict[str, int]


def compare_words(sides: list[list[Run]], splits: list[str]) -> dict[str, list[MetricComparison]]:
    """Return F1 and accuracy, in percent, of each of ROWS and of their macro-average, for each test set.

    sides: the runs of baseline and candidate. Empty if the words of train cannot be counted. Raises UserError if a
    translation is missing.
    """
    data = sides[0][0].prepared()
    train = count_words(data)
    if not train:
        return {}
    compared = {}
    for split in splits:
        lines = data.read_text(split, data.target)
        tokens = data.read_text(split, data.target, "tokenized") if data.is_tokenized else lines
        references = words_of(tokens, data)
        statistics: list[dict[int, Statistic]] = [{}, {}]
        for side, runs in zip(statistics, sides, strict=True):
            for run in runs:
                name = f"{split}.tok" if data.is_tokenized else split
                hypotheses = words_of(read_translation(run, name, data, lines), data)
                table = match_words(hypotheses, references, train)
                side[run.seed] = partial(word_statistic, table)
        totals = table[:, :, 1].sum(axis=0)
        sizes = [*totals[: len(FREQUENCIES)], totals[: len(FREQUENCIES)].sum(), *totals[len(FREQUENCIES) :]]
        rows = [*(f"{row} ({size:,.0f})" for row, size in zip(ROWS, sizes, strict=True)), MACRO]
        names = [f"{score}, {row}" for score in ("F1", "accuracy") for row in rows]
        compared[split] = compare_resampled(names, statistics, len(references))
    return compared


def words_of(lines: list[str], data: PreparedData) -> list[list[str]]:
    """Return the words of each line: tokens of tokenized data, otherwise raw text through sacreBLEU's tokenizer."""
    scorer = metrics(data.target)["sacreBLEU"]
    split = str if data.is_tokenized else scorer.tokenizer
    if data.lowercase:
        lines = [line.lower() for line in lines]
    return [split(line).split() for line in lines]


def count_words(data: PreparedData) -> Counter[str]:
    """Return how often each word occurs in the target side of train; kept in the data's folder, as words.json.

    If that file is of other data, the words are counted again. Empty, with a warning, if the binarized training data
    was removed or fairseq is not installed. Counts what the model was trained on: cleaned, and with <unk> for what the
    subword model cannot write.
    """
    path = data.folder / "words.json"
    if path.exists():
        record = read_record(path, WordCounts)
        if record.data_sha256 == data.checksum:
            return Counter(record.counts)
    prefix = str(data.data_bin / f"train.{data.source}-{data.target}.{data.target}")
    if not (Path(f"{prefix}.idx").exists() and find_spec("fairseq")):
        logger.warning("words by frequency in train are left out: they need fairseq and the files %s.*", prefix)
        return Counter()
    counts: Counter[str] = Counter()
    with quiet_imports(), as_user_error(f"{prefix}.idx: fairseq cannot read it"):
        from fairseq.data import Dictionary

        dictionary = Dictionary.load(str(data.data_bin / f"dict.{data.target}.txt"))
        dataset = open_binarized(prefix, dictionary)
        symbols = np.array(dictionary.symbols, dtype=object)
        for start in tqdm(range(0, len(dataset), 1000), desc="words of train", unit="k lines", leave=False):
            rows = [dataset[index].numpy()[:-1] for index in range(start, min(start + 1000, len(dataset)))]
            lines = [join_pieces(list(symbols[row]), data.remove_bpe) for row in rows]
            lines = list(map(restore_bytes, lines)) if data.byte_fallback else lines
            for words in words_of(lines, data):
                counts.update(words)
    own = path.with_name(f"words.{os.getpid()}.json")  # another process may count them at the same time
    with suppress(OSError):  # data of another user, or on a disk that is full or read only
        write_record(own, WordCounts(data_sha256=data.checksum, counts=counts))
        own.replace(path)
    return counts


def match_words(translations: list[list[str]], references: list[list[str]], train: Counter[str]) -> np.ndarray:
    """Return the words of each sentence by group: [sentences, groups, 3], matched, in reference, in translation.

    The groups are those of FREQUENCIES, NAME and NUMBER; a name or number is also in the group of its frequency.
    """
    table = np.zeros((len(references), NUMBER + 1, 3))
    for sentence, pair in enumerate(zip(references, translations, strict=True)):
        wanted, given = (group_words(words, train) for words in pair)
        reference, translation = map(Counter, pair)
        unmatched = translation - reference
        for key in wanted | given:
            group, word = key
            matched = min(wanted[key], translation[word])
            table[sentence, group] += matched, wanted[key], matched + min(given[key], unmatched[word])
    return table


def group_words(words: list[str], train: Counter[str]) -> Counter[tuple[int, str]]:
    """Return how often a sentence has each (group, word)."""
    counts: Counter[tuple[int, str]] = Counter()
    before = "."
    for word in words:
        frequency = train.get(word, 0)
        counts[sum(frequency >= low for low in FREQUENCIES) - 1, word] += 1
        plain = unescape(word) or word  # Moses writes [ as &#91; and " as &quot;
        if any(character.isdigit() for character in plain):
            counts[NUMBER, word] += 1
        elif is_name(plain) and not ends_sentence(before) and word.lower() not in train:
            counts[NAME, word] += 1
        before = plain
    return counts


def ends_sentence(word: str) -> bool:
    """Return whether a sentence or quotation may start after a word; not after Mr. and l', as Moses writes them."""
    return word[-1] in SENTENCE_END and not (word[-1] in ".'" and word[:-1].isalpha())


def is_name(word: str) -> bool:
    return len(word) > 1 and word[0].isupper() and not word.startswith(("I'", "I’"))


def word_statistic(table: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Return F1 of each of ROWS and their macro-average, then accuracy, in percent: [samples, 2 x rows].

    table: of `match_words`; drawn: the sentences of each sample. A score is NaN if the reference has no such word.
    """
    sums = np.tensordot(count_draws(drawn), table, axes=1)  # [samples, groups, 3]
    by_frequency = sums[:, : len(FREQUENCIES)]
    rows = np.concatenate([by_frequency, by_frequency.sum(axis=1, keepdims=True), sums[:, len(FREQUENCIES) :]], axis=1)
    matched, wanted, given = np.moveaxis(rows, 2, 0)
    wanted = np.where(wanted > 0, wanted, np.nan)
    scores = []
    for score in (200 * matched / (wanted + given), 100 * matched / wanted):
        scores += [score, np.nanmean(score[:, : len(FREQUENCIES)], axis=1, keepdims=True)]
    return np.concatenate(scores, axis=1)
