"""Prepare data for fairseq: tokenize, clean, learn subwords on train, encode, binarize, and write a manifest.

Text is processed in chunks and kept on disk between the steps: memory does not grow with the corpus, except for
about 115 bytes of hashes and lengths per pair and for learning the subword model.
"""

import functools
import re
import shutil
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..atomic import atomic_folder
from ..environment import DOWNLOADS, cores, versions
from ..errors import UserError
from ..files import file_hash, read_json
from ..processes import locked, program_path
from ..recipe import Clean, Recipe
from . import subwords
from .binarize import binarize
from .bitext import iterate_pairs
from .manifest import Lengths, PreparedData, count_repetitions, describe_dropped, find_warnings
from .sources import Sources
from .stages import EncodeStage, TextStage, hash64, ordered_map, visible

LONGEST = 1000  # characters of a side that may be held out; fairseq's models take up to 1,023 subwords
CONTENT = {"data-bin", "manifest.json", "subword.codes", "subword.model", "subword.vocab", "text", "tokenized"}
WORD_COUNTS = r"words\.(\d+\.)?json(\.tmp)?"  # by evaluation/words.py, also unfinished


def prepare(
    recipe: Recipe,
    work_dir: Path,
    raw_dir: Path | None = None,
    download_dir: Path = DOWNLOADS,
    workers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Return the folder `work_dir`/data with the prepared data of `recipe`, after making it if it does not exist.

    It contains text/SPLIT.LANG (valid and tests as published, the references of all scores), tokenized/SPLIT.LANG (the
    same as tokens, if the recipe tokenizes), subword.*, data-bin and manifest.json. It is written elsewhere and
    renamed, so it is complete or absent. Files come from `raw_dir`, or are downloaded into `download_dir`. `workers`
    processes (default: one per core) share the work; the result is the same for any number.

    Raises UserError for bad input, and if the folder contains other data, unless `overwrite` is set.
    """
    final = work_dir / "data"
    program_path("fairseq-preprocess")  # raises an error now rather than after the work
    sources = Sources(recipe, raw_dir, download_dir)
    if overwrite or not _is_prepared(final, recipe, sources):
        with locked(work_dir):
            if overwrite or not _is_prepared(final, recipe, sources):  # another process may have made it meanwhile
                _check_ours(final)
                _check_unused(final)
                with atomic_folder(final) as partial:
                    partial.mkdir()
                    preparation = _Preparation(recipe, sources, partial, workers or cores())
                    data = preparation.run(work_dir / "preprocess.log")
                print(f"{data.describe()}\ndata: {final}")
                return final
    print(f"data: {final} is prepared already")
    return final


def check_prepared(recipe: Recipe, work_dir: Path, raw_dir: Path | None, download_dir: Path) -> None:
    """Raise UserError unless `work_dir` has the prepared data of `recipe`."""
    if not _is_prepared(work_dir / "data", recipe, Sources(recipe, raw_dir, download_dir)):
        raise UserError(
            f"{work_dir / 'data'}: does not exist; run `encourage-mt prepare` once before training on several machines"
        )


def _is_prepared(final: Path, recipe: Recipe, sources: Sources) -> bool:
    """Return whether `final` has the data of `recipe`. Raises UserError if it has data of other options or files."""
    if not final.exists():
        return False
    data = PreparedData.open(final)
    options = recipe.preparation
    differing = sorted(name for name, value in options.items() if data.options.get(name) != value)
    remedy = "use the same files and options as before, choose another --work-dir, or replace the data with --overwrite"
    if differing:
        raise UserError(f"{data.folder}: prepared with other options ({', '.join(differing)}); {remedy}")
    corpus = sources.choose()
    if sources.is_local(corpus):
        for name in corpus.names:
            if not {name, *name.split(":", 1)} & set(data.sources):
                raise UserError(f"{data.folder}: not prepared from {name}; {remedy}")
    for name, known in data.sources.items():
        path = sources.find_local(name)
        if path and file_hash(path) != known.sha256:
            raise UserError(f"{data.folder}: prepared from another {name}; {remedy}")
    return True


def _check_ours(final: Path) -> None:
    """Refuse to overwrite a link, or a folder that contains anything except prepared data."""
    if final.is_symlink():
        raise UserError(f"{final}: is a link, which cannot be replaced; remove it, or choose another --work-dir")
    if final.exists():
        names = {path.name for path in final.iterdir()} - CONTENT
        foreign = sorted(name for name in names if not re.fullmatch(WORD_COUNTS, name))
        try:
            manifest = read_json(final / "manifest.json")
        except UserError:  # missing or damaged
            manifest = None
        if foreign or not (isinstance(manifest, dict) and {"checksums", "options"} <= set(manifest)):
            problem = f"it has {foreign[0]}" if foreign else "it has no manifest.json of a preparation"
            raise UserError(
                f"{final}: not made by `encourage-mt prepare` ({problem}); remove it, or choose another --work-dir"
            )


def _check_unused(final: Path) -> None:
    """Refuse to replace data that a run was trained on: to resume or score it, the same data is needed."""
    try:
        checksum = PreparedData.open(final).checksum
    except UserError:  # missing or damaged, and of no use to a run
        return
    for path in sorted(final.parent.glob("*/run.json")):
        if checksum in path.read_text(encoding="utf-8", errors="replace"):
            name = path.parent.name
            raise UserError(f"{final}: {name} was trained on it; choose another --work-dir, or remove {path.parent}")


class _Preparation:
    """One run of all steps in `folder`; `counts` is {split: {stage: pairs}}."""

    def __init__(self, recipe: Recipe, sources: Sources, folder: Path, workers: int):
        self.recipe, self.sources, self.folder, self.workers = recipe, sources, folder, workers
        self.corpus = sources.choose()
        self.splits = ["train", "valid", *recipe.tests]
        self.counts: dict[str, Counter[str]] = {split: Counter() for split in self.splits}
        self.lengths: dict[str, dict[str, Lengths]] = {}
        self.hashes: dict[str, list[np.ndarray]] = {}

    def run(self, log: Path) -> PreparedData:
        """Make everything in the folder, write its manifest and return it."""
        self._write_texts()
        for split in self.splits:
            if not self.counts[split]["with_text"]:
                raise UserError(f"{split}: no pair has text on both sides")
        learned_on = self._learn_subwords()
        piece_counts: Counter[str] = Counter()
        for split in self.splits:
            piece_counts += self._encode(split)
        binarized = binarize(self.recipe, self.folder, piece_counts, self.workers, log)
        data = self._manifest(learned_on, binarized)
        for name in ("raw", "pieces", *["tokenized"] * (not data.is_tokenized)):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for language in data.languages:
            self._path("tokenized", "train", language).unlink(missing_ok=True)
        data.write()
        return data

    def _manifest(self, learned_on: int, binarized: dict[str, Any]) -> PreparedData:
        recipe = self.recipe
        duplicates, leakage = count_repetitions(self.hashes)
        return PreparedData(
            folder=self.folder,
            source=recipe.source,
            target=recipe.target,
            tests=recipe.tests,
            tokenizer=recipe.tokenizer,
            lowercase=recipe.lowercase,
            remove_bpe=recipe.remove_bpe,
            byte_fallback=recipe.subword.byte_fallback,
            options=recipe.preparation,
            sources=self.sources.used,
            counts={split: dict(counts) for split, counts in self.counts.items()},
            learned_on_lines=learned_on,
            **binarized,
            lengths_in_pieces=self.lengths,
            duplicate_train_pairs=duplicates,
            leakage=leakage,
            versions=versions(),
            warnings=find_warnings(recipe.expected, self.counts, binarized["dictionary"], leakage, self.lengths),
        )

    # --- text

    def _write_texts(self) -> None:
        """Write the text of all splits, from their files or held out of train."""
        paths = self.sources.collect(self.corpus.names, self.folder / "raw")

        def pairs(split: str) -> Iterator[tuple[str, str]]:
            for files in self.corpus.splits[split]:
                yield from iterate_pairs([paths[name] for name in files], self.corpus.columns, self.corpus.drop_tags)

        held_out: dict[int, str] = {}
        if self.corpus.held_out:
            held_out = hold_out(self._bar(pairs("train"), "choosing valid and test"), self.corpus.held_out)
        for split in self.splits:
            if split in self.corpus.splits:
                self._write_text(split, self._bar(pairs(split), f"text of {split}"), held_out)

    def _bar(self, items, description, total=None):
        options = {"unit": " pairs", "unit_scale": True, "mininterval": 1, "leave": False}
        return tqdm(items, desc=description, total=total, **options)

    def _write_text(self, split, pairs, held_out):
        """Write tokenized/SPLIT.LANG, and text/SPLIT.LANG except for train, of `split` and the pairs held out of it."""
        stage, counts = TextStage(self.recipe, is_train=split == "train"), self.counts[split]
        every = self.corpus.valid_every if split == "train" else None
        passed = 0  # pairs that were not dropped
        with ExitStack() as files:

            @functools.cache
            def opened(kind, destination):
                (self.folder / kind).mkdir(exist_ok=True)
                paths = [self._path(kind, destination, lang) for lang in (self.recipe.source, self.recipe.target)]
                return [files.enter_context(_open(path, "w")) for path in paths]

            def write(kind, destination, pair):
                for file, line in zip(opened(kind, destination), pair, strict=True):
                    file.write(line + "\n")

            for chunk, rows in ordered_map(stage, pairs, self.workers):
                for pair, (reason, *tokens) in zip(chunk, rows, strict=True):
                    position = counts["read"]
                    counts["read"] += 1
                    if reason and position not in held_out:
                        counts[reason] += 1
                        continue
                    passed += 1
                    destination = "valid" if every and passed % every == 0 else split
                    if split == "train":
                        destination = held_out.get(position, destination)
                    if destination != split:
                        counts["held_out"] += 1
                        self.counts[destination]["read"] += 1
                    if destination != "train":
                        write("text", destination, pair)
                    write("tokenized", destination, tokens)
                    self.counts[destination]["before_cleaning"] += 1
                    self.counts[destination]["with_text"] += bool(tokens[0].strip() and tokens[1].strip())
        if self.recipe.clean.unit == "tokens" and not passed:
            raise self._nothing_left(split)

    def _nothing_left(self, split):
        counts = self.counts[split]
        reasons = describe_dropped(counts) or "none read"
        return UserError(f"{split}: no pair is left of {counts['read']:,} after cleaning ({reasons})")

    def _read_tokenized(self, split):
        """Yield the pairs of tokenized/SPLIT.LANG."""
        with ExitStack() as files:
            paths = [self._path("tokenized", split, language) for language in (self.recipe.source, self.recipe.target)]
            for source, target in zip(*(files.enter_context(_open(path)) for path in paths), strict=True):
                yield source.removesuffix("\n"), target.removesuffix("\n")

    def _path(self, kind, split, language):
        return self.folder / kind / f"{split}.{language}"

    # --- subwords

    def _learn_subwords(self):
        """Learn the subword model on train; return the number of lines it was learned from."""
        count, options = self.counts["train"]["before_cleaning"], self.recipe.subword.options
        print(f"subword model: learning on {count:,} pairs")
        return subwords.learn(self._read_tokenized("train"), count, options, self.folder / "subword")

    def _encode(self, split):
        """Write pieces/SPLIT.LANG, cleaned if the limits are in pieces; return the counts of pieces if needed."""
        recipe, counts = self.recipe, self.counts[split]
        languages = (recipe.source, recipe.target)
        clean = None
        if split == "train" or (split == "valid" and self.corpus.valid_every):
            clean = recipe.clean if recipe.clean.unit == "pieces" else Clean()
        needs_counts = split == "train" and recipe.subword.byte_fallback
        stage = EncodeStage(recipe.subword.options, self.folder / "subword", clean, needs_counts)
        piece_counts, kept = Counter(), bytearray()
        lengths, hashes = (array("I"), array("I")), (array("Q"), array("Q"), array("Q"))
        pairs = self._bar(self._read_tokenized(split), f"encoding {split}", counts["before_cleaning"])
        (self.folder / "pieces").mkdir(exist_ok=True)
        with ExitStack() as files:
            out = [files.enter_context(_open(self._path("pieces", split, language), "w")) for language in languages]
            for _, chunk in ordered_map(stage, pairs, self.workers):
                kept += chunk.kept
                counts.update(chunk.dropped)
                piece_counts.update(chunk.pieces)
                for file, text in zip(out, chunk.text, strict=True):
                    file.write(text)
                for values, more in zip(lengths + hashes, chunk.lengths + chunk.hashes, strict=True):
                    values.extend(more)
        counts["kept"] = sum(kept)
        if not counts["kept"]:
            raise self._nothing_left(split)
        if split != "train" and not all(kept):
            for kind in ("text", "tokenized"):
                for language in languages:
                    _filter(self._path(kind, split, language), kept)
        self.lengths[split] = {
            language: Lengths(mean=round(sum(values) / len(values), 2), longest=max(values))
            for language, values in zip(languages, lengths, strict=True)
        }
        self.hashes[split] = [np.frombuffer(values, dtype=np.uint64) for values in hashes]
        return piece_counts


def _open(path, mode="r"):
    return open(path, mode, encoding="utf-8", newline="\n")


def _filter(path, kept):
    """Keep only the lines of a file for which `kept` is true."""
    with _open(path) as file:
        lines = [line for line, keep in zip(file, kept, strict=True) if keep]
    with _open(path, "w") as file:
        file.writelines(lines)


def hold_out(pairs: Iterable[tuple[str, str]], sizes: dict[str, int]) -> dict[int, str]:
    """Return {position: split} with `sizes`[split] pairs for each split, the same whenever the pairs are the same.

    Only pairs whose source and whose target both occur once in the whole corpus (in NFKC; case, white space and
    invisible characters aside) and have at most LONGEST characters are taken, so that no sentence is in two splits or
    too long for a model. They are taken in the order of a hash of the pair, so that a corpus that grows keeps most of
    them, and both directions have the same. Raises UserError if there are too few.
    """
    sources, targets = array("Q"), array("Q")
    for source, target in pairs:
        for hashes, sentence in ((sources, source), (targets, target)):
            text = visible(sentence).casefold()
            hashes.append(hash64(text) if 0 < len(text) <= LONGEST else 0)
    sides = [np.frombuffer(side, dtype=np.uint64) for side in (sources, targets)]
    order = sides[0] + sides[1]  # the same for both directions
    once = np.ones(len(order), dtype=bool)
    for side in sides:
        _, inverse, number = np.unique(side, return_inverse=True, return_counts=True)
        once &= (number[inverse] == 1) & (side != 0)
    candidates = np.flatnonzero(once)
    if len(candidates) <= sum(sizes.values()):
        raise UserError(
            f"held_out: the recipe asks for {sum(sizes.values()):,} pairs, but only {len(candidates):,} of "
            f"{len(order):,} have sentences that occur once, and some must be left to train on; set data.held_out "
            "to fewer in a copy of the recipe"
        )
    ordered = iter(candidates[np.argsort(order[candidates], kind="stable")].tolist())
    return {position: split for split, size in sizes.items() for position in islice(ordered, size)}
