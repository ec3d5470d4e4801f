"""A recipe: the data, the subword model, the options of fairseq-train, and the arms that differ by criterion alone."""

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import yaml

from .errors import UserError

CRITERION_OPTIONS = {
    "label-smoothing",
    "bonus",
    "log-end",
    "bonus-exponent",
    "bonus-weight",
    "smoothing-convention",
    "loss-backend",
    "fuse-projection",
    "report-accuracy",
    "ignore-prefix-size",
}
KINDS = {"name": str, "source": str, "target": str, "average": int, "beam": int, "lenpen": (int, float)}
KINDS.update(dict.fromkeys(("data", "subword", "train", "arms"), dict))


@dataclass
class Recipe:
    """The content of an examples/*/recipe.yaml, checked.

    data is either {"generate": {"seed": int, split: pairs, ...}}, the bundled corpus, or {split: [source file,
    target file], ...} with, if the files can be downloaded, "url" (their folder) and "sha256" {file: digest}. Every
    split but train and valid is a test set. train holds options of fairseq-train without their dashes. arms maps a
    name to {"criterion": ..., its options}. The last `average` epoch checkpoints are averaged, and the mean translates
    with `beam` and the length penalty `lenpen`.
    """

    name: str
    source: str
    target: str
    data: dict
    subword: dict
    train: dict
    arms: dict
    average: int = 10
    beam: int = 5
    lenpen: float = 1.0
    tests: list = field(init=False)

    def __post_init__(self):
        splits = self.data.get("generate", self.data)
        self.tests = [name for name in splits if name not in ("train", "valid", "url", "sha256", "seed")]

    @property
    def length(self) -> "tuple[int, str]":
        """(how many, of what) a training lasts: epochs or, where max-update is set, updates."""
        updates = self.train.get("max-update")
        return (updates, "update") if updates else (self.train["max-epoch"], "epoch")

    @property
    def remove_bpe(self) -> str:
        """What undoes the subwords: the value of fairseq's --remove-bpe."""
        return "sentencepiece"


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe. Raises UserError naming the file and what is wrong."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a recipe is a mapping of options")
    allowed = {f.name for f in fields(Recipe) if f.init}
    required = {f.name for f in fields(Recipe) if f.init and f.default is MISSING}
    for what, names in (("unknown", set(content) - allowed), ("missing", required - set(content))):
        if names:
            raise UserError(f"{path}: {what} {', '.join(sorted(names))}")
    for name, value in content.items():
        if not isinstance(value, KINDS[name]) or value == {}:
            kind = "a mapping" if KINDS[name] is dict else "text" if KINDS[name] is str else "a number"
            raise UserError(f"{path}: {name} must be {kind} (in quotes where YAML reads otherwise), got {value!r}")
    splits = content["data"].get("generate", content["data"])
    if not isinstance(splits, dict) or ("generate" in content["data"] and "seed" not in splits):
        raise UserError(f"{path}: generate must be a mapping with a seed and the number of pairs of each split")
    recipe = Recipe(**content)
    for split in ("train", "valid"):
        if split not in splits:
            raise UserError(f"{path}: data has no {split}")
    for split in ["train", "valid", *recipe.tests]:
        files = splits[split]
        if splits is recipe.data and not (isinstance(files, list) and len(files) == 2):
            raise UserError(f"{path}: {split} must be [source file, target file], got {files!r}")
    if not recipe.tests:
        raise UserError(f"{path}: data has no test set")
    if len({"max-epoch", "max-update"} & set(recipe.train)) != 1:
        raise UserError(f"{path}: train must set max-epoch or max-update, one of the two")
    if not 1 <= recipe.average <= recipe.train.get("max-epoch", recipe.average):
        raise UserError(f"{path}: average must be between 1 and max-epoch {recipe.train.get('max-epoch')}")
    for arm, options in recipe.arms.items():
        if not isinstance(options, dict):
            raise UserError(f"{path}: arm {arm} names no criterion")
        foreign = set(options) - CRITERION_OPTIONS - {"criterion"}
        if "criterion" not in options or foreign:
            what = f"sets {', '.join(sorted(foreign))}" if foreign else "names no criterion"
            raise UserError(f"{path}: arm {arm} {what}; arms differ by criterion and its options alone")
    return recipe


def as_flags(options: dict) -> "list[str]":
    """{"max-epoch": 3, "share-all-embeddings": True, "adam-betas": "(0.9, 0.98)"} as command-line words."""
    words = []
    for name, value in options.items():
        if value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words
