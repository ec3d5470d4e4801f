"""From raw bitext to fairseq's binarized data: check, learn joint subwords on train, encode, binarize."""

import hashlib
import json
import shutil
from pathlib import Path

import pooch
import sentencepiece

from . import grammar
from .bitext import fetch, read_bitext
from .commands import cores, run_quietly
from .errors import UserError
from .recipe import Recipe


def prepare(recipe: Recipe, work_dir: Path, raw_dir: "Path | None" = None) -> Path:
    """The prepared data of `recipe` in `work_dir`/data, made there unless it is there already.

    It holds text/SPLIT.LANG (what is scored against), subword.model, data-bin (joint dictionary; test sets in the
    order of the recipe are test, test1, ...) and manifest.json. Written aside and renamed, so it is whole or absent.
    Raises UserError on bad input, and if the folder holds data of other options.
    """
    final = work_dir / "data"
    options = {key: getattr(recipe, key) for key in ("source", "target", "data", "subword")}
    if final.exists():
        manifest = json.loads((final / "manifest.json").read_text(encoding="utf-8"))
        if "text" not in manifest:
            raise UserError(f"{final}: prepared by another version; remove it or choose another --work-dir")
        if manifest["options"] != options:
            raise UserError(f"{final}: prepared with other options; remove it or choose another --work-dir")
        for name, digest in manifest["sources"].items():
            at_hand = raw_dir / name if raw_dir and "generate" not in recipe.data else None
            if at_hand and at_hand.is_file() and pooch.file_hash(str(at_hand)) != digest:
                raise UserError(f"{final}: prepared from another {name}; remove it or choose another --work-dir")
        print(f"data: {final} is prepared already")
        return final
    partial = work_dir / "data.partial"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "text").mkdir(parents=True)
    try:
        counts = _prepare(recipe, work_dir, raw_dir, partial, options)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial)
        raise
    print(f"data: {', '.join(f'{split} {count:,}' for split, count in counts.items())} pairs in {final}")
    return final


def _prepare(recipe, work_dir, raw_dir, folder, options):
    """Fill `folder`; returns the number of pairs of each split."""
    splits, sources = _raw_pairs(recipe, work_dir, raw_dir)
    dropped = len(splits["train"])
    splits["train"] = [pair for pair in splits["train"] if pair[0].strip() and pair[1].strip()]
    dropped -= len(splits["train"])
    if not splits["train"]:
        raise UserError("train: no pair has text on both sides")
    _write(splits, recipe, folder / "text")
    encode = _learn_subwords(splits["train"], recipe.subword, folder / "subword")
    encoded = {split: [(encode(a), encode(b)) for a, b in pairs] for split, pairs in splits.items()}
    (folder / "pieces").mkdir()
    _write(encoded, recipe, folder / "pieces")

    prefix = {split: str(folder / "pieces" / split) for split in splits}
    run_quietly(
        ["fairseq-preprocess", "--source-lang", recipe.source, "--target-lang", recipe.target]
        + ["--trainpref", prefix["train"], "--validpref", prefix["valid"]]
        + ["--testpref", ",".join(prefix[test] for test in recipe.tests)]
        + ["--destdir", str(folder / "data-bin"), "--joined-dictionary", "--workers", str(cores())],
        work_dir / "preprocess.log",
    )
    counts = {split: len(pairs) for split, pairs in splits.items()}
    binarized = [path for path in sorted((folder / "data-bin").iterdir()) if path.suffix != ".log"]
    manifest = {
        "options": options,
        "sources": sources,
        "pairs": counts,
        "text": {
            "source": recipe.source,
            "target": recipe.target,
            "tests": recipe.tests,
            "lines": {split: counts[split] for split in ("valid", *recipe.tests)},
            "tokenizer": "none",
            "lowercase": False,
            "remove_bpe": recipe.remove_bpe,
        },
        "train pairs dropped for an empty side": dropped,
        "checksums": {path.name: pooch.file_hash(str(path)) for path in binarized},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
    return counts


def data_checksum(data: Path) -> str:
    """One sha256 for the binarized data, to tell whether two runs saw the same."""
    checksums = json.loads((data / "manifest.json").read_text(encoding="utf-8"))["checksums"]
    return hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()


def _raw_pairs(recipe, work_dir, raw_dir):
    if "generate" in recipe.data:
        sizes = dict(recipe.data["generate"])
        return grammar.generate(sizes.pop("seed"), sizes), {"grammar": recipe.data["generate"]}
    splits, sources = {}, {}
    for split in ["train", "valid", *recipe.tests]:
        paths = []
        for name in recipe.data[split]:
            digest = recipe.data.get("sha256", {}).get(name)
            path = fetch(name, raw_dir, work_dir / "raw", recipe.data.get("url"), digest)
            sources[name] = pooch.file_hash(str(path))
            paths.append(path)
        splits[split] = read_bitext(*paths)
    return splits, sources


def _write(splits, recipe, folder):
    for split, pairs in splits.items():
        for side, language in enumerate((recipe.source, recipe.target)):
            with open(folder / f"{split}.{language}", "w", encoding="utf-8", newline="\n") as out:
                out.writelines(pair[side] + "\n" for pair in pairs)


def _learn_subwords(pairs, options, prefix):
    """Train a joint SentencePiece model on both sides of `pairs`; returns text -> pieces joined by spaces."""
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for pair in pairs for line in pair),
            model_prefix=str(prefix),
            **{"character_coverage": 1.0, "minloglevel": 2, **options},
        )
    except (RuntimeError, OSError, TypeError) as error:
        raise UserError(f"subword model: {' '.join(str(error).split())}") from None
    model = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    return lambda text: " ".join(model.encode(text, out_type=str))
