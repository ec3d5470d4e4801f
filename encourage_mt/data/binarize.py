"""Binarize encoded text with fairseq-preprocess."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from ..environment import quiet_imports
from ..errors import UserError, as_user_error
from ..files import file_hash
from ..processes import run_quietly
from ..recipe import Recipe
from . import subwords
from .manifest import DATASET


def binarize(recipe: Recipe, folder: Path, piece_counts: Counter[str], workers: int, log: Path) -> dict[str, Any]:
    """Make `folder`/data-bin from `folder`/pieces; the test sets become test, test1, ... in the order of the recipe.

    With `piece_counts`, the dictionary has every piece of the subword model, so every byte, even if train lacks it.
    Returns percent_unknown, dictionary and checksums, as `PreparedData` has them. Raises UserError, naming `log`, if
    fairseq-preprocess fails.
    """
    text, data_bin = folder / "pieces", folder / "data-bin"
    tests = ",".join(str(text / test) for test in recipe.tests)
    command = ["fairseq-preprocess", f"--source-lang={recipe.source}", f"--target-lang={recipe.target}"]
    command += [f"--trainpref={text / 'train'}", f"--validpref={text / 'valid'}", f"--testpref={tests}"]
    command += [f"--destdir={data_bin}", f"--workers={workers}"]
    if recipe.joined_dictionary:
        command += ["--joined-dictionary"]
    if piece_counts:
        dictionary = text / "dict.txt"
        _write_dictionary(dictionary, folder / "subword", piece_counts)
        command += [f"--srcdict={dictionary}"]
        if not recipe.joined_dictionary:
            command += [f"--tgtdict={dictionary}"]
    print(f"fairseq-preprocess: binarizing (log: {log})")
    run_quietly(command, log)
    log_text = log.read_text(encoding="utf-8", errors="replace")
    unknown: dict[str, dict[str, float]] = {split: {} for split in ("train", "valid", *recipe.tests)}
    for language, path, percentage in re.findall(
        r"\[(\w+)\] (\S.*): \d+ sents, \d+ tokens, ([\d.e-]+)% replaced", log_text
    ):
        unknown[Path(path).name.removesuffix(f".{language}")][language] = float(percentage)
    sizes = dict(re.findall(r"\[(\w+)\] Dictionary: (\d+) types", log_text))
    files = [path for path in sorted(data_bin.iterdir()) if path.suffix != ".log"]
    return {
        "percent_unknown": unknown,
        "dictionary": {language: int(size) for language, size in sizes.items()},
        "checksums": {path.name: file_hash(path) for path in files},
    }


def open_binarized(prefix: str, dictionary=None):
    """Return fairseq's dataset of one side of a set, data-bin/SPLIT.SRC-TGT.LANG without suffix.

    Raises UserError if it is missing or damaged.
    """
    with quiet_imports(), as_user_error(f"{prefix}.*: fairseq cannot read it"):
        from fairseq.data import data_utils, indexed_dataset

        # if fairseq had to guess, it could take a text file and start a shell
        if indexed_dataset.infer_dataset_impl(prefix) != DATASET:
            raise UserError(f"{prefix}.*: fairseq cannot read it: it is missing, or not in the format {DATASET}")
        return data_utils.load_indexed_dataset(prefix, dictionary, DATASET)


def _write_dictionary(path: Path, prefix: Path, piece_counts: Counter[str]) -> None:
    ordered = sorted(subwords.pieces(prefix), key=lambda piece: (-piece_counts[piece], piece))
    with open(path, "w", encoding="utf-8", newline="\n") as out:
        out.writelines(f"{piece} {piece_counts[piece]}\n" for piece in ordered)
