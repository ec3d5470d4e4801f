"""Define the parts of a recipe: its corpus, cleaning, subwords, arms, and the scores of a paper."""

import os
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from .fields import (
    Checksum,
    Files,
    Name,
    OptionValue,
    RelativePath,
    Split,
    TrainOptions,
    Url,
    check_split,
    file_lists,
    matching,
    within,
)
from .files import Record, short_repr
from .loss.options import OPTION_NAMES, OPTIONS, BonusSchedule, CriterionOptions, check_option

TOKENIZED_BLEU = "BLEU on tokenized text"
Metric = Literal["sacreBLEU", "chrF++", "TER", "BLEU on tokenized text", "COMET"]


def in_list(value: Any) -> Any:
    """Return a list as it is, and any other value as a list of one."""
    return value if isinstance(value, list) else [value]


class Corpus(Record):
    """Files and the addresses to download them from. Keys that are not fields are splits: {split: files}.

    Files are [source, target] or [tab-separated file], or a list of such lists, which are joined. "a.tgz:b/c" is the
    member b/c of the archive a.tgz. Every split except train and valid is a test set.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Files] = Field(init=False)

    urls: list[Url] = []  # folders to download the files from, tried in order
    checksums: dict[RelativePath, Annotated[list[Checksum], BeforeValidator(in_list)]] = {}  # one of them must match
    columns: Annotated[list[Annotated[int, within(1, 1000)]], Field(min_length=2, max_length=2)] = [1, 2]  # from 1
    drop_tags: list[str] = ["url", "talkid", "keywords"]  # lines of train.tags files to leave out
    valid_every: Annotated[int, within(2, 10**9)] | None = None  # every n-th pair of train becomes valid
    # {split: pairs} taken from train, by hash, among the pairs whose sentences occur only once in the corpus
    held_out: dict[Split, Annotated[int, within(1, 10**9)]] = {}

    @model_validator(mode="after")
    def _check_splits(self) -> "Corpus":
        names = [*self.splits, *["valid"] * bool(self.valid_every), *self.held_out]
        for name in names:
            check_split(name)
        for required in ("train", "valid"):
            if required not in names:
                raise ValueError(f"has no {required}")
        if len(set(names)) < len(names):
            raise ValueError("names a split twice")
        if not self.tests:
            raise ValueError("has no test set")
        if self.columns[0] == self.columns[1]:
            raise ValueError(f"columns: must differ, both are {self.columns[0]}")
        return self

    @property
    def splits(self) -> dict[str, list[list[str]]]:
        """{split: its lists of files}."""
        return {split: file_lists(files) for split, files in (self.model_extra or {}).items()}

    @property
    def names(self) -> list[str]:
        """The files of all splits, each once."""
        return list(dict.fromkeys(name for lists in self.splits.values() for files in lists for name in files))

    @property
    def tests(self) -> list[str]:
        return [name for name in (*self.splits, *self.held_out) if name not in ("train", "valid")]

    def reversed(self) -> "Corpus":
        """Return the same files with source and target exchanged."""
        splits = {split: [files[::-1] for files in lists] for split, lists in self.splits.items()}
        return self.model_copy(update={**splits, "columns": self.columns[::-1]})


class Clean(Record):
    """Limits on the lengths of a pair; pairs that exceed them are dropped from train and from pairs of valid_every."""

    max_length: Annotated[int, within(1, 10**6)] | None = None
    max_ratio: Annotated[float, within(1, 10**6)] | None = None
    unit: Literal["tokens", "pieces"] = "pieces"


class Subword(Record):
    """Either {merges: N} for subword-nmt, or options of SentencePiece's trainer, with its defaults."""

    merges: Annotated[int, within(1, 10**6)] = 0
    vocab_size: Annotated[int, within(8, 10**6)] = 8000
    model_type: Literal["bpe", "unigram", "char", "word"] = "unigram"
    byte_fallback: bool = False
    character_coverage: Annotated[float, within(0.5, 1)] = 1.0
    normalization_rule_name: Literal["nmt_nfkc", "nmt_nfkc_cf", "nfkc", "nfkc_cf", "identity"] = "nmt_nfkc"
    split_digits: bool = False
    split_by_number: bool = True
    split_by_unicode_script: bool = True
    hard_vocab_limit: bool = True
    max_sentence_length: Annotated[int, within(1, 10**6)] = 4192  # in bytes

    @model_validator(mode="after")
    def _check_kind(self) -> "Subword":
        if self.merges and self.model_fields_set != {"merges"}:
            raise ValueError("merges (of subword-nmt) must be the only option: the others are SentencePiece's")
        if not self.model_fields_set:
            raise ValueError("must set merges (subword-nmt) or vocab_size (SentencePiece)")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The options that are set."""
        return self.model_dump(exclude_unset=True)


def check_trusted_bonus(name: str) -> None:
    """Raise ValueError unless the user trusts the module of bonus MODULE:NAME: a recipe must not choose code to run."""
    if name not in os.environ.get("ENCOURAGE_MT_BONUSES", "").split():
        raise ValueError(
            f"bonus {short_repr(name)} runs code of that module; if you trust it, set the environment variable "
            "ENCOURAGE_MT_BONUSES to this name"
        )


class Arm(Record):
    """One side of a comparison: a criterion with its options, and what replaces the recipe's `train` and `average`."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, OptionValue] = Field(init=False)

    criterion: Annotated[str, matching("[a-z][a-z0-9_]*", "the name of a criterion of fairseq")]
    train: TrainOptions = {}
    average: Annotated[int, within(1, 1000)] | None = None

    @model_validator(mode="after")
    def _check_options(self) -> "Arm":
        foreign = sorted(set(self.options) - OPTION_NAMES - {"criterion"})
        if foreign:
            raise ValueError(f"{short_repr(foreign[0])} is not a criterion option (training options belong in train:)")
        given = {name.replace("-", "_"): value for name, value in self.options.items()}
        for name, value in given.items():
            if name == "bonus" and ":" in str(value):
                check_trusted_bonus(str(value))
            elif name in OPTIONS:
                check_option(name, value)
        for group in (BonusSchedule, CriterionOptions):  # which options fit together
            group(**{each.name: given[each.name] for each in fields(group) if each.name in given})
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The criterion and its options, as options of fairseq-train."""
        return {"criterion": self.criterion, **(self.model_extra or {})}


class Published(Record):
    """The scores a paper reports: {arm: [mean, standard deviation]}."""

    source: str
    metric: Metric
    scores: Annotated[dict[Name, Annotated[list[float], Field(min_length=2, max_length=2)]], Field(min_length=2)]
