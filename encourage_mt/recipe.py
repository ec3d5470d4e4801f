"""A recipe: the data, its preparation, the options of fairseq-train, and the arms that differ by criterion alone."""

import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import StringConstraints

from .errors import UserError
from .loss.options import OPTION_NAMES

AVERAGE, BEAM, LENPEN = 10, 5, 1.0  # how a model is scored where its recipe does not say
TOKENIZED_BLEU = "BLEU on tokenized text"
METRICS = ("sacreBLEU", "chrF++", "TER", TOKENIZED_BLEU, "COMET")
# names of recipes, splits and arms become names of files; fairseq splits a pair of languages at its hyphen
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*\z", max_length=100)]
Language = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]*\z", max_length=20)]
KINDS = {"name": str, "source": str, "target": str, "average": int, "beam": int, "lenpen": (int, float)}
KINDS.update(
    dict.fromkeys(("subword", "train", "arms"), dict), data=(dict, list), clean=dict, expected=dict, published=dict
)
KINDS["tokenizer"] = str
KINDS.update(
    dict.fromkeys(
        ("lowercase", "aggressive_hyphens", "normalize_punctuation", "straight_apostrophes", "joined_dictionary"), bool
    )
)
DATA_OPTIONS = {"urls", "checksums", "columns", "drop_tags", "valid_every", "held_out"}
MODERN_SUBWORD = {
    "model_type": "bpe",
    "byte_fallback": True,
    "character_coverage": 0.9999,  # rarer characters become bytes, so that the pieces of bytes are trained
    "normalization_rule_name": "nmt_nfkc",
}


@dataclass
class Recipe:
    """The content of an examples/*/recipe.yaml, checked.

    train holds options of fairseq-train without their dashes; arms maps a name to {"criterion": ..., its options}.
    The last `average` epoch checkpoints are averaged, and the mean translates with `beam` and length penalty `lenpen`.

    data lists alternatives (in the file, a single one needs no list): the first whose files are all at hand is taken,
    else the first. Each is {split: files, ...}, with options:
    files     [source, target] or [tab-separated file], or a list of such lists, which are joined. "a.tgz:b/c" is the
              member b/c of the archive a.tgz. Every split but train and valid is a test set
    urls      folders to download the files from, tried in order
    checksums {file: "sha256:..." or "md5:...", or a list of which one has to match}
    columns   [source, target] columns of tab-separated files, counted from 1 (default: [1, 2])
    drop_tags lines of train.tags files that are left out (default: [url, talkid, keywords])
    valid_every, held_out  where train holds the others too: every n-th pair of train is valid; or {split: pairs}, taken
              by hash among the pairs whose sentences stand nowhere else in the corpus

    Preparation:
    tokenizer             none or moses
    aggressive_hyphens    Moses option: a-b becomes a @-@ b
    normalize_punctuation in train and what is held out of it, by Moses' scripts
    straight_apostrophes  in the files of valid and tests, the typographic apostrophe becomes '
    lowercase             after tokenizing
    clean                 {"max_length", "max_ratio", "unit": tokens or pieces (default)}: longer or more unequal pairs
                          are dropped from train, and from what valid_every takes of it
    subword               {"merges": N} for subword-nmt, else options of SentencePiece's trainer
    joined_dictionary     one dictionary for both sides
    expected              {split: {stage: pairs, or a list of such}}, published counts to compare with

    published: {"source": text, "metric": its name, "scores": {arm: [mean, standard deviation]}}, what a paper reports.
    """

    name: str
    source: str
    target: str
    data: list[dict]
    subword: dict
    train: dict
    arms: dict
    average: int = AVERAGE
    beam: int = BEAM
    lenpen: float = LENPEN
    tokenizer: str = "none"
    aggressive_hyphens: bool = False
    normalize_punctuation: bool = False
    straight_apostrophes: bool = False
    lowercase: bool = False
    clean: dict = field(default_factory=lambda: {"max_length": 1000})
    joined_dictionary: bool = True
    expected: dict = field(default_factory=dict)
    published: dict = field(default_factory=dict)
    folder: Path = Path()  # of the recipe file; files that are not downloaded may lie there
    tests: list = field(init=False)

    def __post_init__(self):
        self.tests = _tests(self.data[0])

    @property
    def remove_bpe(self) -> str:
        """The value for fairseq's --remove-bpe."""
        return "@@ " if "merges" in self.subword else "sentencepiece"

    @property
    def corpus(self) -> str:
        """The name without direction and pipeline."""
        return self.name.removesuffix(".modern").removesuffix(f"_{self.source}_{self.target}")

    @property
    def preparation(self) -> dict:
        """All options that decide the prepared data."""
        other = {"name", "train", "average", "beam", "arms", "lenpen", "expected", "published", "folder", "tests"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in other}

    def turned_round(self) -> "Recipe":
        """The other direction of the same corpus."""
        return replace(
            self,
            name=f"{self.corpus}_{self.target}_{self.source}",
            source=self.target,
            target=self.source,
            data=[_turned_round(data) for data in self.data],
            published={},
        )

    def modern(self) -> "Recipe":
        """The same corpus as raw cased text, straight into SentencePiece with NFKC and byte fallback."""
        plain = {f.name: f.default for f in fields(self) if KINDS.get(f.name) is bool} | {"tokenizer": "none"}
        size = self.subword.get("merges") or self.subword.get("vocab_size", 8000)
        return replace(
            self,
            **plain,
            name=f"{self.name}.modern",
            clean={"max_length": 250, "max_ratio": 3},
            subword={"vocab_size": size, **MODERN_SUBWORD},
            expected={},
            published={},
        )

    @property
    def length(self) -> tuple[int, str]:
        """(how many, of what) a training lasts: epochs or, where max-update is set, updates."""
        updates = self.train.get("max-update")
        return (updates, "update") if updates else (self.train["max-epoch"], "epoch")


def _tests(data):
    names = [*data, *data.get("held_out", {})]
    return [name for name in names if name not in {"train", "valid", *DATA_OPTIONS}]


def _turned_round(data):
    turned = {}
    for key, value in data.items():
        is_files = key not in DATA_OPTIONS
        turned[key] = [files[::-1] for files in file_lists(value)] if is_files else value
    return turned | {"columns": data.get("columns", [1, 2])[::-1]}


def file_lists(files) -> list[list[str]]:
    """A split's files as a list of [source, target] or [tab-separated file]; a single one needs no list around it."""
    return [files] if isinstance(files[0], str) else files


def split_files(data: dict) -> dict[str, list[list[str]]]:
    """{split: its lists of files} of one alternative of a recipe's data."""
    return {split: file_lists(files) for split, files in data.items() if split not in DATA_OPTIONS}


def load_recipe(
    path: Path, source: str | None = None, target: str | None = None, bitext: list[str] | None = None
) -> Recipe:
    """Read and check a recipe; source, target and the files of train may be given here where it names none.

    Raises UserError naming the file and what is wrong.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a recipe is a mapping of options")
    if bitext or source or target:
        _insert_own(path, content, source, target, bitext)
    required = {"name", "source", "target", "data", "subword", "train", "arms"}
    allowed = {f.name for f in fields(Recipe) if f.init and f.name != "folder"}
    for what, names in (("unknown", set(content) - allowed), ("missing", required - set(content))):
        if names == {"source", "target"} and what == "missing":
            raise UserError(f"{path}: is for your own text: name your files with --bitext corpus.de corpus.en")
        if names:
            raise UserError(f"{path}: {what} {', '.join(sorted(names))}")
    for name, value in content.items():
        _check_kind(path, name, value)
    content["data"] = content["data"] if isinstance(content["data"], list) else [content["data"]]
    for data in content["data"]:
        _check_data(path, data)
    if len({tuple(_tests(data)) for data in content["data"]}) > 1:
        raise UserError(f"{path}: the alternatives of data have different test sets")
    recipe = Recipe(**content, folder=path.parent)
    _check_preparation(path, recipe)
    if not recipe.tests:
        raise UserError(f"{path}: data has no test set")
    if len({"max-epoch", "max-update"} & set(recipe.train)) != 1:
        raise UserError(f"{path}: train must set max-epoch or max-update, one of the two")
    if not 1 <= recipe.average <= recipe.train.get("max-epoch", recipe.average):
        raise UserError(f"{path}: average must be between 1 and max-epoch {recipe.train.get('max-epoch')}")
    for arm, options in recipe.arms.items():
        if not isinstance(options, dict):
            raise UserError(f"{path}: arm {arm} names no criterion")
        foreign = set(options) - OPTION_NAMES - {"criterion"}
        if "criterion" not in options or foreign:
            what = f"sets {', '.join(sorted(foreign))}" if foreign else "names no criterion"
            raise UserError(f"{path}: arm {arm} {what}; arms differ by criterion and its options alone")
    _check_published(path, recipe)
    return recipe


def _insert_own(path, content, source, target, bitext):
    if not (isinstance(content.get("data"), dict) and "held_out" in content["data"]):
        raise UserError(
            f"{path}: has data of its own; --bitext, --source and --target go with examples/own/recipe.yaml"
        )
    if not bitext:
        raise UserError("--source and --target go with --bitext")
    if len(bitext) > 2:
        raise UserError(f"--bitext takes two files or one tab-separated file, got {len(bitext)}")
    suffixes = [Path(name.removesuffix(".gz")).suffix[1:] for name in bitext] if len(bitext) == 2 else ["", ""]
    source, target = source or suffixes[0], target or suffixes[1]
    for language in (source, target):
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", language):  # fairseq splits src-tgt at the hyphen
            raise UserError(f"--source and --target must be language codes such as de, got {language!r}")
    if source == target:
        raise UserError(f"--source and --target are both {source}")
    content.update(source=source, target=target, name=f"{content['name']}_{source}_{target}")
    content["data"]["train"] = list(bitext)


def _check_kind(path, name, value):
    if not isinstance(value, KINDS[name]) or value in ({}, []) or (KINDS[name] is int and isinstance(value, bool)):
        kinds = {dict: "a mapping", str: "text", bool: "true or false", (dict, list): "a mapping"}
        kind = kinds.get(KINDS[name], "a number")
        raise UserError(f"{path}: {name} must be {kind} (in quotes where YAML reads otherwise), got {value!r}")


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_data(path, data):
    if not isinstance(data, dict):
        raise UserError(f"{path}: data must be a mapping, got {data!r}")
    splits = [name for name in data if name not in DATA_OPTIONS]
    for split in splits:
        files = data[split]
        lists = files if isinstance(files, list) and files and isinstance(files[0], list) else [files]
        for names in lists:
            good = isinstance(names, list) and len(names) in (1, 2) and all(isinstance(n, str) for n in names)
            if not good:
                raise UserError(f"{path}: {split} must be [source file, target file], got {names!r}")
    splits += ["valid"] * ("valid_every" in data) + list(data.get("held_out", {}))
    for split in ("train", "valid"):
        if split not in splits:
            raise UserError(f"{path}: data has no {split}")
    if len(set(splits)) < len(splits):
        raise UserError(f"{path}: a split is named twice in data")
    _check_data_options(path, data)


def _check_data_options(path, data):
    every, held_out = data.get("valid_every", 2), data.get("held_out", {"valid": 1})
    columns = data.get("columns", [1, 2])
    if not _is_count(every) or every < 2:
        raise UserError(f"{path}: valid_every must be a number from 2 on, got {every!r}")
    if not isinstance(held_out, dict) or not held_out or not all(map(_is_count, held_out.values())):
        raise UserError(f"{path}: held_out must be a mapping of splits to numbers of pairs, got {held_out!r}")
    if not isinstance(columns, list) or len(columns) != 2 or not all(map(_is_count, columns)):
        raise UserError(f"{path}: columns must be [source column, target column], counted from 1, got {columns!r}")
    for option in ("urls", "drop_tags"):
        value = data.get(option, ["x"])
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise UserError(f"{path}: {option} must be a list, got {value!r}")
    for name, known in data.get("checksums", {}).items():
        for checksum in known if isinstance(known, list) else [known]:
            if not re.fullmatch(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", str(checksum)):
                raise UserError(f"{path}: checksum of {name} must be sha256:... or md5:..., got {checksum!r}")


def _check_preparation(path, recipe):
    if recipe.tokenizer not in ("none", "moses"):
        raise UserError(f"{path}: tokenizer must be none or moses, got {recipe.tokenizer!r}")
    if recipe.tokenizer == "none":
        for name in ("aggressive_hyphens", "normalize_punctuation"):
            if getattr(recipe, name):
                raise UserError(f"{path}: {name} goes with tokenizer: moses")
    clean = recipe.clean
    unknown = set(clean) - {"max_length", "max_ratio", "unit"}
    if unknown or not _is_count(clean.get("max_length", 1)):
        raise UserError(f"{path}: clean takes max_length (a number from 1 on), max_ratio and unit, got {clean!r}")
    ratio = clean.get("max_ratio", 1)
    if not isinstance(ratio, (int, float)) or ratio < 1:
        raise UserError(f"{path}: max_ratio must be a number from 1 on, got {ratio!r}")
    if clean.get("unit", "pieces") not in ("tokens", "pieces"):
        raise UserError(f"{path}: unit of clean must be tokens or pieces, got {clean['unit']!r}")
    if "merges" in recipe.subword and (set(recipe.subword) != {"merges"} or not _is_count(recipe.subword["merges"])):
        raise UserError(f"{path}: subword with merges takes their number alone, got {recipe.subword!r}")


def _check_published(path, recipe):
    published = recipe.published
    if not published:
        return
    scores = published.get("scores")
    good = (
        set(published) == {"source", "metric", "scores"}
        and isinstance(published["source"], str)
        and published["metric"] in METRICS
        and isinstance(scores, dict)
        and len(scores) > 1
        and set(scores) <= set(recipe.arms)
        and all(isinstance(pair, list) and len(pair) == 2 for pair in scores.values())
        and all(isinstance(figure, (int, float)) for pair in scores.values() for figure in pair)
    )
    if not good:
        raise UserError(
            f"{path}: published takes source (text), metric ({', '.join(METRICS)}) and scores of two arms or more "
            f"({{arm: [mean, deviation]}}), got {published!r}"
        )


def as_flags(options: dict) -> list[str]:
    """{"max-epoch": 3, "share-all-embeddings": True, "adam-betas": "(0.9, 0.98)"} as command-line words."""
    words = []
    for name, value in options.items():
        if value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words
