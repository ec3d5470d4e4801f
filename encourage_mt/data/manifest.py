"""Read and write the manifest of prepared data: how it was made, its counts, and how to read its text."""

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, JsonValue, computed_field, model_validator
from tabulate import tabulate

from ..errors import UserError
from ..fields import SHA256, Count, Language, Name, Split
from ..files import Record, read_record, write_record
from .bitext import read_lines

DATASET = "mmap"  # fairseq's format of data-bin
POSITIONS = 1024  # fairseq's default for Transformers: pieces and the end of the sentence


class SourceFile(Record):
    """A file the data was made from: where it was, and its digest; `checked` says against which checksum."""

    sha256: SHA256
    path: str = ""
    bytes: Count = 0
    checked: str = ""


class Lengths(Record):
    """Mean and longest length of one side, in pieces."""

    mean: float
    longest: Count


class Leakage(Record):
    """How many sentences and pairs of a split are also in train."""

    sources_in_train: Count
    targets_in_train: Count
    pairs_in_train: Count


class PreparedData(Record):
    """The content of a folder's manifest.json, and the folder.

    options are the recipe's that decide the data; counts is {split: {stage: pairs}}, where stage "kept" counts the
    pairs of the binarized data; checksums is {file of data-bin: sha256}; dictionary is {language: number of types}.
    """

    remedy: ClassVar[str] = "prepare the data again with --overwrite, or choose another --work-dir"

    format: Literal[2] = 2
    folder: Path = Field(exclude=True)
    source: Language
    target: Language
    tests: list[Split] = Field(min_length=1)
    tokenizer: Literal["none", "moses"]
    lowercase: bool
    remove_bpe: Literal["@@ ", "sentencepiece"]
    byte_fallback: bool
    options: dict[str, JsonValue]
    sources: dict[str, SourceFile]
    counts: dict[Split, dict[str, Count]]
    learned_on_lines: Count
    percent_unknown: dict[Split, dict[Language, float]]
    dictionary: dict[Language, Count]
    checksums: dict[Name, SHA256]
    lengths_in_pieces: dict[Split, dict[Language, Lengths]]
    duplicate_train_pairs: Count
    leakage: dict[Split, Leakage]
    versions: dict[str, str]
    warnings: list[str]

    @classmethod
    def open(cls, folder: Path) -> "PreparedData":
        """Return the data prepared in `folder`. Raises UserError if its manifest is missing, damaged, or too new."""
        path = folder / "manifest.json"
        if not path.exists():
            raise UserError(f"{folder}: not a folder that `encourage-mt prepare` made (it has no manifest.json)")
        return read_record(path, cls, folder=folder)

    def write(self) -> None:
        """Write manifest.json into the folder."""
        write_record(self.folder / "manifest.json", self)

    @classmethod
    def upgrade(cls, content: dict) -> dict:
        """Return a manifest of version 0.1 as format 2 has it, and without what follows from other fields."""
        content = {key: value for key, value in content.items() if key != "subsets"}
        match content:
            case {"text": dict() as text, "subword": dict() as subword, "duplicates": dict() as duplicates, **rest} if (
                "format" not in content
            ):
                rest.pop("pairs", None)
                text = {key: value for key, value in text.items() if key != "lines"}
                moved = {f"duplicate_{key}": value for key, value in duplicates.items()}
                if isinstance(rest.get("options"), dict) and isinstance(rest["options"].get("data"), list):
                    rest["options"] = {**rest["options"], "data": list(map(_drop_addresses, rest["options"]["data"]))}
                return {"format": 2, **rest, **text, **subword, **moved}
        return content

    @model_validator(mode="after")
    def _check_splits(self) -> "PreparedData":
        for split in ("train", "valid", *self.tests):
            if not self.counts.get(split, {}).get("kept"):
                raise ValueError(f"counts: {split}: has no pairs that were kept")
        return self

    @property
    def data_bin(self) -> Path:
        """The binarized data."""
        return self.folder / "data-bin"

    @property
    def languages(self) -> tuple[str, str]:
        return self.source, self.target

    @property
    def lines(self) -> dict[str, int]:
        """{split: number of pairs} of the binarized data."""
        return {split: self.counts[split]["kept"] for split in ("train", "valid", *self.tests)}

    @computed_field  # type: ignore[prop-decorator]  # mypy does not know that pydantic takes a property
    @property
    def subsets(self) -> dict[str, str]:
        """{split: name of its binarized subset}: valid, and the test sets as test, test1, ...; kept in the file."""
        return {"valid": "valid", **{split: f"test{number or ''}" for number, split in enumerate(self.tests)}}

    @property
    def is_tokenized(self) -> bool:
        return self.tokenizer != "none"

    @property
    def checksum(self) -> str:
        """One sha256 of the binarized data, to tell whether two runs saw the same."""
        return hash_text(self.checksums)

    @property
    def subword_options(self) -> dict[str, Any]:
        """The recipe's options of the subword model. Raises UserError if the manifest has none."""
        options = self.options.get("subword")
        if not isinstance(options, dict):
            raise UserError(f"{self.folder / 'manifest.json'}: options: subword: must be a mapping; {self.remedy}")
        return options

    def read_text(self, split: str, language: str, kind: Literal["text", "tokenized"] = "text") -> list[str]:
        """Return the lines of valid or a test set as published, which translations are scored against, or as tokens.

        Only data that `is_tokenized` has tokens. Raises UserError if the number of lines is not that of the manifest.
        """
        path = self.folder / kind / f"{split}.{language}"
        lines = read_lines(path)
        if len(lines) != self.lines[split]:
            raise UserError(f"{path}: has {len(lines)} lines, the manifest {self.lines[split]}; {self.remedy}")
        return lines

    def describe(self) -> str:
        """Return a table for people (splits, their names in data-bin, pairs dropped and leaked), and the warnings."""
        rows = []
        for split, subset in {"train": "train", **self.subsets}.items():
            counts, shares, leaked = self.counts[split], self.percent_unknown.get(split, {}), self.leakage.get(split)
            unknown = ", ".join(f"{language} {share:g}%" for language, share in shares.items())
            names = ("pairs", "sources", "targets")
            shared = ", ".join(f"{getattr(leaked, f'{name}_in_train'):,} {name}" for name in names if leaked)
            rows.append([split, subset, f"{counts['kept']:,}", describe_dropped(counts), unknown, shared])
        header = ["split", "in data-bin", "pairs", "dropped", "unknown pieces", "in train too"]
        sizes = ", ".join(f"{language} {size:,}" for language, size in self.dictionary.items())
        lines = [tabulate(rows, header, tablefmt="github", disable_numparse=True)]
        lines += [f"train: {self.duplicate_train_pairs:,} pairs repeat another", f"dictionary: {sizes} types"]
        lines += [f"sha256 of the binarized data: {self.checksum}"]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def _drop_addresses(corpus: Any) -> Any:
    """Return one of a recipe's `data` without the keys that are no longer options of the preparation."""
    is_corpus = isinstance(corpus, dict)
    return {k: v for k, v in corpus.items() if k not in ("urls", "checksums")} if is_corpus else corpus


def count_repetitions(hashes: dict[str, list[np.ndarray]]) -> tuple[int, dict[str, Leakage]]:
    """Return (number of pairs of train that repeat an earlier one, {split: Leakage} of the other splits).

    hashes is {split: [hashes of sources, hashes of targets, hashes of pairs]}.
    """
    train = [np.unique(side) for side in hashes["train"]]
    shared = {
        split: [int(np.isin(side, known).sum()) for side, known in zip(sides, train, strict=True)]
        for split, sides in hashes.items()
        if split != "train"
    }
    names = ("sources_in_train", "targets_in_train", "pairs_in_train")
    leakage = {split: Leakage(**dict(zip(names, numbers, strict=True))) for split, numbers in shared.items()}
    return len(hashes["train"][2]) - len(train[2]), leakage


def find_warnings(expected, counts, dictionary, leakage, lengths) -> list[str]:
    """Return what a user should know: counts that differ from published ones, leakage, sentences that are too long."""
    warnings = []
    for split, stages in expected.items():
        for stage, published in stages.items():
            number = {**counts, "dictionary": dictionary}[split][stage]
            if number not in published:
                warnings.append(f"{split}, {stage}: {number:,}, published {' or '.join(f'{n:,}' for n in published)}")
    for split, shared in leakage.items():
        if shared.pairs_in_train:
            warnings.append(f"{split}: {shared.pairs_in_train:,} of its pairs are in train too")
    for split, sides in lengths.items():
        source, target = (side.longest for side in sides.values())
        if max(source, target) >= POSITIONS:
            scoring = "needs --engine ctranslate2" if source < POSITIONS else "is not possible"
            remedy = {"train": "", "valid": "; training needs a shorter one"}.get(split, f"; scoring {scoring}")
            warnings.append(
                f"{split}: a sentence of {max(source, target):,} pieces; fairseq's Transformers take up to "
                f"{POSITIONS - 1:,}{remedy}"
            )
    return warnings


def describe_dropped(counts: dict[str, int]) -> str:
    """Return why pairs were dropped, and how many: "too_long 12, ratio 3"; empty if none were."""
    return ", ".join(f"{name} {counts[name]:,}" for name in ("empty", "too_long", "ratio") if counts.get(name))


def hash_text(value: Any) -> str:
    """Return the sha256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
