"""From raw bitext to data that fairseq trains on: tokenize, clean, learn joint subwords on train, encode, binarize.

Text streams through in chunks and lies on disk between the steps: the memory needed does not grow with the corpus, but
for 32 bytes of hashes and lengths a pair and what learning the subword model takes.
"""

import errno
import hashlib
import json
import re
import shutil
from array import array
from collections import Counter
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..environment import DOWNLOADS, cores, versions
from ..errors import UserError
from ..files import file_hash
from ..processes import locked, program_path, run_quietly
from ..recipe import Clean, Recipe
from . import subwords
from .bitext import iterate_pairs
from .sources import Sources
from .stages import EncodeStage, TextStage, hash64, ordered_map


def prepare(
    recipe: Recipe,
    work_dir: Path,
    raw_dir: Path | None = None,
    download_dir: Path = DOWNLOADS,
    workers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """The prepared data of `recipe` in `work_dir`/data, made there unless it is there already.

    It holds text/SPLIT.LANG (valid and tests as published, what is scored against), tokenized/SPLIT.LANG (the same as
    tokens, if the recipe tokenizes), subword.*, data-bin (test sets in the order of the recipe are test, test1, ...)
    and manifest.json. Written aside and renamed, so it is whole or absent. Files come from `raw_dir`, or are downloaded
    into `download_dir`; `workers` processes (default: one a core) share the work, with the same result. Raises
    UserError on bad input, and if the folder holds data of other options, unless told to overwrite them.
    """
    final = work_dir / "data"
    program_path("fairseq-preprocess")  # told now, not after the work
    sources = Sources(recipe, raw_dir, download_dir)
    if final.exists() and not overwrite:
        _check_same(final, recipe, sources)
        print(f"data: {final} is prepared already")
        return final
    with locked(work_dir):
        manifest = _prepare(recipe, sources, work_dir, workers or cores())
    print(f"{summary(manifest)}\ndata: {final}")
    return final


def _prepare(recipe, sources, work_dir, workers):
    final, partial = work_dir / "data", work_dir / "data.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        manifest = _Preparation(recipe, sources, partial, workers).run(work_dir / "preprocess.log")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"no space left on the disk for {work_dir}; nothing half-written is kept") from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _check_same(final, recipe, sources):
    manifest = json.loads((final / "manifest.json").read_text(encoding="utf-8"))
    if "text" not in manifest:
        raise UserError(f"{final}: prepared by another version; --overwrite it or choose another --work-dir")
    other = manifest["options"]
    differing = sorted(name for name, value in recipe.preparation.items() if other.get(name) != value)
    remedy = "choose another --work-dir, or --overwrite it"
    if differing:
        raise UserError(f"{final}: prepared with other options ({', '.join(differing)}); {remedy}")
    for name, known in manifest["sources"].items():
        path = sources.find_local(name)
        if path and file_hash(path) != known["sha256"]:
            raise UserError(f"{final}: prepared from another {name}; {remedy}")


class _Preparation:
    """One run of all steps in `folder`; `counts` is {split: {stage: pairs}}."""

    def __init__(self, recipe, sources, folder, workers):
        self.recipe, self.sources, self.folder, self.workers = recipe, sources, folder, workers
        self.languages = (recipe.source, recipe.target)
        self.splits = ["train", "valid", *recipe.tests]
        self.counts = {split: Counter() for split in self.splits}
        self.lengths, self.hashes = {}, {}

    def run(self, log: Path) -> dict:
        """Make everything and write the manifest, which is returned."""
        self._open_sources()
        for split in [split for split in self.splits if split in self.available]:
            self._write_text(split)
        for split in self.splits:
            if not self.counts[split]["with_text"]:
                raise UserError(f"{split}: no pair has text on both sides")
        prefix = self.folder / "subword"
        count = self.counts["train"]["before_cleaning"]
        print(f"subword model: learning on {count:,} pairs")
        learned = subwords.learn(self._read("tokenized", "train"), count, self.recipe.subword.options, prefix)
        pieces: Counter[str] = Counter()
        for split in self.splits:
            pieces += self._encode(split, prefix)
        binarized = self._binarize(pieces, prefix, log)
        duplicates, leakage = self._repetitions()
        manifest = {
            "options": self.recipe.preparation,
            "sources": self.sources.used,
            "pairs": {split: counts["kept"] for split, counts in self.counts.items()},
            "counts": self.counts,
            "text": {
                "source": self.recipe.source,
                "target": self.recipe.target,
                "tests": self.recipe.tests,
                "lines": {split: self.counts[split]["kept"] for split in self.splits[1:]},
                "tokenizer": self.recipe.tokenizer,
                "lowercase": self.recipe.lowercase,
                "remove_bpe": self.recipe.remove_bpe,
                "byte_fallback": self.recipe.subword.byte_fallback,
            },
            "subword": learned,
            **binarized,
            "lengths_in_pieces": self.lengths,
            "duplicates": duplicates,
            "leakage": leakage,
            "versions": versions(),
        }
        manifest["warnings"] = self._warnings(manifest)
        for folder in ("raw", "pieces", "tokenized" if self.recipe.tokenizer == "none" else "none"):
            shutil.rmtree(self.folder / folder, ignore_errors=True)
        for language in self.languages:
            (self.folder / "tokenized" / f"train.{language}").unlink(missing_ok=True)
        content = json.dumps(manifest, indent=1, ensure_ascii=False)
        (self.folder / "manifest.json").write_text(content, encoding="utf-8")
        return manifest

    # --- raw pairs

    def _open_sources(self):
        """Set `available`: {split: () -> its pairs}, and `held_out`: {place in train: split}."""
        corpus = self.sources.choose()
        self.valid_every = corpus.valid_every
        self.held_out = {}
        files = corpus.splits
        names = [name for lists in files.values() for pair in lists for name in pair]
        paths = self.sources.collect(names, self.folder / "raw")
        columns, tags = corpus.columns, corpus.drop_tags
        self.available = {
            split: lambda lists=lists: (
                pair for names in lists for pair in iterate_pairs([paths[name] for name in names], columns, tags)
            )
            for split, lists in files.items()
        }
        if corpus.held_out:
            self.held_out = hold_out(self._bar(self.available["train"](), "choosing valid and test"), corpus.held_out)

    def _bar(self, items, what, total=None):
        return tqdm(items, desc=what, unit=" pairs", unit_scale=True, total=total, mininterval=1, leave=False)

    # --- text

    def _write_text(self, split):
        """tokenized/SPLIT.LANG, and text/SPLIT.LANG of what is not train, of `split` and what is held out of it."""
        stage, counts = TextStage(self.recipe, is_train=split == "train"), self.counts[split]
        by_tokens = self.recipe.clean.unit == "tokens"
        place = passed = 0
        with ExitStack() as files:
            raw, tokenized = _Writer(self, files, "text"), _Writer(self, files, "tokenized")
            pairs = self._bar(self.available[split](), f"text of {split}")
            for chunk, rows in ordered_map(stage, pairs, self.workers):
                for pair, (fault, *tokens) in zip(chunk, rows, strict=True):
                    place += 1
                    counts["read"] += 1
                    if fault:
                        counts[fault] += 1
                        continue
                    passed += 1
                    goes_to = split
                    if split == "train":
                        if self.valid_every and passed % self.valid_every == 0:
                            goes_to = "valid"
                        goes_to = self.held_out.get(place - 1, goes_to)
                    if goes_to != split:
                        counts["held_out"] += 1
                        self.counts[goes_to]["read"] += 1
                    if goes_to != "train":
                        raw.write(goes_to, pair)
                    tokenized.write(goes_to, tokens)
                    self.counts[goes_to]["before_cleaning"] += 1
                    self.counts[goes_to]["with_text"] += bool(tokens[0].strip() and tokens[1].strip())
        if by_tokens and not passed:
            raise UserError(f"{split}: no pair is left of {counts['read']:,} after cleaning ({_faults(counts)})")

    def _read(self, kind, split):
        """Pairs of lines written before."""
        with ExitStack() as files:
            sides = [files.enter_context(_open(self._path(kind, split, language))) for language in self.languages]
            for source, target in zip(*sides, strict=True):
                yield source.removesuffix("\n"), target.removesuffix("\n")

    def _path(self, kind, split, language):
        return self.folder / kind / f"{split}.{language}"

    # --- subwords

    def _encode(self, split, prefix):
        """pieces/SPLIT.LANG, cleaned where that goes by pieces; returns the Counter of pieces if that is needed."""
        recipe, counts = self.recipe, self.counts[split]
        clean = None
        if split == "train" or (split == "valid" and self.valid_every):
            clean = recipe.clean if recipe.clean.unit == "pieces" else Clean()
        needs_counts = split == "train" and recipe.subword.byte_fallback
        stage = EncodeStage(recipe.subword.options, prefix, clean, needs_counts)
        pieces, kept = Counter(), bytearray()
        lengths, hashes = (array("I"), array("I")), (array("Q"), array("Q"), array("Q"))
        pairs = self._bar(self._read("tokenized", split), f"encoding {split}", counts["before_cleaning"])
        (self.folder / "pieces").mkdir(exist_ok=True)
        with ExitStack() as files:
            out = [files.enter_context(_open(self._path("pieces", split, lang), "w")) for lang in self.languages]
            for _, chunk in ordered_map(stage, pairs, self.workers):
                kept += chunk.kept
                counts.update(chunk.dropped)
                pieces.update(chunk.pieces)
                for file, text in zip(out, chunk.text, strict=True):
                    file.write(text)
                for values, more in zip(lengths + hashes, chunk.lengths + chunk.hashes, strict=True):
                    values.extend(more)
        counts["kept"] = sum(kept)
        if not counts["kept"]:
            raise UserError(f"{split}: no pair is left of {counts['read']:,} after cleaning ({_faults(counts)})")
        if split != "train" and not all(kept):
            for kind in ("text", "tokenized"):
                for language in self.languages:
                    _filter(self._path(kind, split, language), kept)
        self.lengths[split] = {
            language: {"mean": round(sum(values) / len(values), 2), "longest": max(values)}
            for language, values in zip(self.languages, lengths, strict=True)
        }
        self.hashes[split] = [np.frombuffer(values, dtype=np.uint64) for values in hashes]
        return pieces

    def _binarize(self, pieces, prefix, log):
        """data-bin; returns its share of unknown pieces, the sizes of the dictionaries, and checksums."""
        recipe, data_bin = self.recipe, self.folder / "data-bin"
        prefixes = {split: str(self.folder / "pieces" / split) for split in self.splits}
        command = ["fairseq-preprocess", "--source-lang", recipe.source, "--target-lang", recipe.target]
        command += ["--trainpref", prefixes["train"], "--validpref", prefixes["valid"]]
        command += ["--testpref", ",".join(prefixes[test] for test in recipe.tests)]
        command += ["--destdir", str(data_bin), "--workers", str(self.workers)]
        if recipe.joined_dictionary:
            command += ["--joined-dictionary"]
        if pieces:  # every byte has to be in the dictionary, whether train needs it or not
            dictionary = self.folder / "pieces" / "dict.txt"
            ordered = sorted(subwords.pieces(prefix), key=lambda piece: (-pieces[piece], piece))
            with open(dictionary, "w", encoding="utf-8", newline="\n") as out:
                out.writelines(f"{piece} {pieces[piece]}\n" for piece in ordered)
            command += ["--srcdict", str(dictionary)]
            if not recipe.joined_dictionary:
                command += ["--tgtdict", str(dictionary)]
        print("fairseq-preprocess: binarizing")
        run_quietly(command, log)
        told = log.read_text(encoding="utf-8", errors="replace")
        unknown = {split: {} for split in self.splits}
        for language, path, share in re.findall(r"\[(\w+)\] (\S.*): \d+ sents, \d+ tokens, ([\d.e-]+)% replaced", told):
            unknown[Path(path).name.removesuffix(f".{language}")][language] = float(share)
        sizes = dict(re.findall(r"\[(\w+)\] Dictionary: (\d+) types", told))
        binarized = [path for path in sorted(data_bin.iterdir()) if path.suffix != ".log"]
        return {
            "percent_unknown": unknown,
            "dictionary": {language: int(size) for language, size in sizes.items()},
            "checksums": {path.name: file_hash(path) for path in binarized},
        }

    # --- what the data is like

    def _repetitions(self):
        """Pairs of train that repeat another; sentences and pairs that valid or a test shares with train."""
        train = [np.unique(hashes) for hashes in self.hashes["train"]]
        duplicates = len(self.hashes["train"][2]) - len(train[2])
        leakage = {
            split: {
                f"{what}_in_train": int(np.isin(hashes, known).sum())
                for what, hashes, known in zip(("sources", "targets", "pairs"), self.hashes[split], train, strict=True)
            }
            for split in self.splits[1:]
        }
        return {"train_pairs": duplicates}, leakage

    def _warnings(self, manifest):
        counts = {**manifest["counts"], "dictionary": manifest["dictionary"]}
        warnings = []
        for what, stages in self.recipe.expected.items():
            for stage, published in stages.items():
                if counts[what][stage] not in published:
                    told = " or ".join(f"{number:,}" for number in published)
                    warnings.append(f"{what}, {stage}: {counts[what][stage]:,}, published {told}")
        for split, leaked in manifest["leakage"].items():
            if leaked["pairs_in_train"]:
                warnings.append(f"{split}: {leaked['pairs_in_train']:,} of its pairs are in train too")
        for split in self.splits:
            longest = max(side["longest"] for side in self.lengths[split].values())
            if longest > 1022:
                warnings.append(f"{split}: a sentence of {longest:,} pieces; fairseq's Transformers take up to 1,022")
        return warnings


class _Writer:
    """Writes pairs to KIND/SPLIT.LANG, opening the files when they are needed."""

    def __init__(self, preparation, files, kind):
        self.preparation, self.files, self.kind, self.sides = preparation, files, kind, {}
        (preparation.folder / kind).mkdir(exist_ok=True)

    def write(self, split, pair):
        if split not in self.sides:
            self.sides[split] = [
                self.files.enter_context(_open(self.preparation._path(self.kind, split, language), "w"))
                for language in self.preparation.languages
            ]
        for file, line in zip(self.sides[split], pair, strict=True):
            file.write(line + "\n")


def _open(path, mode="r"):
    return open(path, mode, encoding="utf-8", newline="\n")


def _filter(path, kept):
    """Keep those lines of a file for which `kept` is true."""
    with _open(path) as file:
        lines = [line for line, keep in zip(file, kept, strict=True) if keep]
    with _open(path, "w") as file:
        file.writelines(lines)


def _faults(counts):
    return (
        ", ".join(f"{name} {counts[name]:,}" for name in ("empty", "too_long", "ratio") if counts[name]) or "none read"
    )


def hold_out(pairs, sizes: dict[str, int]) -> dict[int, str]:
    """{place: split}: as many pairs for each split as `sizes` says, the same whenever the pairs are the same.

    Taken are pairs whose source and whose target each stand once in the whole corpus (case and white space aside), so
    that no sentence of one split stands in another, in the order of a hash of the pair, so that a corpus that grows
    keeps most of them and both directions have the same. Raises UserError if there are too few.
    """
    sources, targets = array("Q"), array("Q")
    for source, target in pairs:
        source, target = (" ".join(side.split()).casefold() for side in (source, target))
        sources.append(hash64(source) if source else 0)
        targets.append(hash64(target) if target else 0)
    sides = [np.frombuffer(side, dtype=np.uint64) for side in (sources, targets)]
    order = sides[0] + sides[1]  # the same for both directions
    once = np.ones(len(order), dtype=bool)
    for side in sides:
        _, inverse, number = np.unique(side, return_inverse=True, return_counts=True)
        once &= (number[inverse] == 1) & (side != 0)
    candidates = np.flatnonzero(once)
    if len(candidates) <= sum(sizes.values()):
        raise UserError(
            f"held_out: {sum(sizes.values()):,} pairs are asked for, but of {len(order):,} only {len(candidates):,} "
            "have sentences that stand nowhere else, and some must be left to train on; ask for fewer in the recipe"
        )
    ordered = iter(candidates[np.argsort(order[candidates], kind="stable")].tolist())
    return {place: split for split, size in sizes.items() for place in islice(ordered, size)}


def hash_text(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def data_checksum(data: Path) -> str:
    """One sha256 for the binarized data, to tell whether two runs saw the same."""
    return hash_text(json.loads((data / "manifest.json").read_text(encoding="utf-8"))["checksums"])


def summary(manifest: dict) -> str:
    """A few lines for people: pairs of each split, what was dropped, unknown pieces, repetitions, warnings."""
    lines = []
    for split, counts in manifest["counts"].items():
        dropped = _faults(counts)
        told = f"{split}: {counts['kept']:,} pairs" + (f" (dropped: {dropped})" if dropped != "none read" else "")
        shares = manifest["percent_unknown"][split]
        told += "; unknown pieces " + ", ".join(f"{language} {share:g}%" for language, share in shares.items())
        if split == "train":
            told += f"; {manifest['duplicates']['train_pairs']:,} repeat another pair"
        else:
            leaked = manifest["leakage"][split]
            told += f"; in train too: {leaked['pairs_in_train']:,} pairs, {leaked['sources_in_train']:,} sources, "
            told += f"{leaked['targets_in_train']:,} targets"
        lines.append(told)
    sizes = ", ".join(f"{language} {size:,}" for language, size in manifest["dictionary"].items())
    lines.append(f"dictionary: {sizes} types")
    lines += [f"warning: {warning}" for warning in manifest["warnings"]]
    return "\n".join(lines)
