"""Read a recipe: the data, its preparation, the training options, and the arms that are compared."""

import io
import os
import re
from contextlib import redirect_stderr
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from .errors import UserError
from .fields import (
    Checksum,
    Count,
    Files,
    Language,
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
from .files import Record, describe_problem, short_repr
from .loss.options import OPTION_NAMES, OPTIONS, check_option

MAX_BYTES = 1_000_000  # of a recipe file
TOKENIZED_BLEU = "BLEU on tokenized text"
Metric = Literal["sacreBLEU", "chrF++", "TER", "BLEU on tokenized text", "COMET"]
METRICS = get_args(Metric)
STAGES = ("read", "empty", "too_long", "ratio", "held_out", "before_cleaning", "with_text", "kept")
AVERAGE, BEAM, LENPEN = 10, 5, 1.0  # the defaults


def _in_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class Corpus(Record):
    """Files and the addresses to download them from. Keys that are not fields are splits: {split: files}.

    Files are [source, target] or [tab-separated file], or a list of such lists, which are joined. "a.tgz:b/c" is the
    member b/c of the archive a.tgz. Every split except train and valid is a test set.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Files] = Field(init=False)

    urls: list[Url] = []  # folders to download the files from, tried in order
    checksums: dict[RelativePath, Annotated[list[Checksum], BeforeValidator(_in_list)]] = {}  # one of them must match
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
        return self

    @property
    def splits(self) -> dict[str, list[list[str]]]:
        """{split: its lists of files}."""
        return {split: file_lists(files) for split, files in (self.model_extra or {}).items()}

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

    merges: Annotated[int, within(1, 10**6)] | None = None
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
    """One side of a comparison: a criterion with its options, and training options that replace the recipe's."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, OptionValue] = Field(init=False)

    criterion: Annotated[str, matching("[a-z][a-z0-9_]*", "the name of a criterion of fairseq")]
    train: TrainOptions = {}

    @model_validator(mode="after")
    def _check_options(self) -> "Arm":
        foreign = sorted(set(self.options) - OPTION_NAMES - {"criterion"})
        if foreign:
            raise ValueError(f"{short_repr(foreign[0])} is not an option of the criterion (others belong in train:)")
        for name, value in self.options.items():
            if name == "bonus" and ":" in str(value):
                check_trusted_bonus(str(value))
            elif name.replace("-", "_") in OPTIONS:
                check_option(name.replace("-", "_"), value)
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


class Recipe(Record):
    """The content of a recipe.yaml.

    data is a list of alternatives (in the file, a single one needs no list). The first one whose files are all
    available locally is used, otherwise the first one.
    """

    name: Name
    source: Language
    target: Language
    data: Annotated[list[Corpus], BeforeValidator(_in_list), Field(min_length=1, max_length=100)]
    subword: Subword
    train: TrainOptions
    arms: Annotated[dict[Name, Arm], Field(min_length=1, max_length=1000)]
    average: Annotated[int, within(1, 1000)] = AVERAGE  # epoch checkpoints, the last ones, whose mean translates
    beam: Annotated[int, within(1, 1000)] = BEAM
    lenpen: Annotated[float, within(-10, 10)] = LENPEN  # exponent of the length penalty
    tokenizer: Literal["none", "moses"] = "none"
    aggressive_hyphens: bool = False  # Moses option: a-b becomes a @-@ b
    normalize_punctuation: bool = False  # in train and the pairs held out of it, as Moses' scripts do
    straight_apostrophes: bool = False  # in files of valid and tests, the typographic apostrophe becomes '
    lowercase: bool = False  # after tokenizing
    clean: Clean = Clean(max_length=1000)
    joined_dictionary: bool = True  # one dictionary for both sides
    # {split: {stage: pairs}} and {dictionary: {language: types}} to compare with; any number of a list is right
    expected: dict[str, dict[str, Annotated[list[Count], BeforeValidator(_in_list)]]] = {}
    published: Published | None = None  # to show beside the scores
    _file: Path = PrivateAttr(Path("recipe.yaml"))
    _folder: Path = PrivateAttr(Path())

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if self.source == self.target:
            raise ValueError(f"target: must differ from source, both are {self.source}")
        if len({tuple(corpus.tests) for corpus in self.data}) > 1:
            raise ValueError("data: the alternatives have different test sets")
        for name in ("aggressive_hyphens", "normalize_punctuation"):
            if getattr(self, name) and self.tokenizer == "none":
                raise ValueError(f"{name}: needs tokenizer: moses")
        for arm in self.arms:
            _check_length(f"arms.{arm}.train" if self.arms[arm].train else "train", self.arm_train(arm), self.average)
        known: dict[str, tuple] = {split: STAGES for split in ("train", "valid", *self.tests)}
        known["dictionary"] = (self.source, self.target)
        for split, counts in self.expected.items():
            for key in counts if split in known else [None]:
                if key not in known.get(split, ()):
                    raise ValueError(f"expected.{split}{f'.{key}' if key else ''}: unknown key")
        for arm in self.published.scores if self.published else ():
            if arm not in self.arms:
                raise ValueError(f"published.scores.{arm}: is not an arm of the recipe")
        return self

    @property
    def file(self) -> Path:
        """The file the recipe was read from."""
        return self._file

    @property
    def folder(self) -> Path:
        """The folder of files that are not downloaded: the recipe's, or the current one for those of --bitext."""
        return self._folder

    @property
    def tests(self) -> list[str]:
        return self.data[0].tests

    @property
    def remove_bpe(self) -> Literal["@@ ", "sentencepiece"]:
        """The value for fairseq's --remove-bpe."""
        return "@@ " if self.subword.merges else "sentencepiece"

    @property
    def corpus(self) -> str:
        """The name without direction and pipeline."""
        return self.name.removesuffix(".modern").removesuffix(f"_{self.source}_{self.target}")

    @property
    def preparation(self) -> dict[str, Any]:
        """The options that decide the prepared data, as plain values."""
        others = {"name", "train", "average", "beam", "arms", "lenpen", "expected", "published"}
        options = {name: getattr(self, name) for name in type(self).model_fields if name not in others}
        parts = {name: options[name].model_dump(exclude_unset=True) for name in ("subword", "clean")}
        elsewhere = {"urls", "checksums"}  # the manifest has the checksums of the files themselves
        return {**options, **parts, "data": [c.model_dump(exclude=elsewhere, exclude_unset=True) for c in self.data]}

    def arm_train(self, arm: str) -> dict[str, Any]:
        """Return the training options of an arm: the recipe's, replaced where the arm has its own."""
        own = self.arms[arm].train
        lengths = {"max-epoch", "max-update"} if {"max-epoch", "max-update"} & set(own) else set()
        return {**{name: value for name, value in self.train.items() if name not in lengths}, **own}

    def arm_differences(self, arm: str) -> list[str]:
        """Return the training options in which an arm differs from the recipe."""
        return [name for name, value in self.arms[arm].train.items() if value != self.train.get(name)]

    def reversed(self) -> "Recipe":
        """Return the other direction of the same corpus."""
        changes = {"name": f"{self.corpus}_{self.target}_{self.source}", "source": self.target, "target": self.source}
        return self.model_copy(
            update={**changes, "data": [corpus.reversed() for corpus in self.data], "published": None}
        )

    def modern(self) -> "Recipe":
        """Return the same corpus as raw cased text, straight into SentencePiece with NFKC and byte fallback."""
        subword = modern_subword(self.subword.merges or self.subword.vocab_size)
        changes = {"name": f"{self.name}.modern", "subword": subword, "clean": Clean(max_length=250, max_ratio=3)}
        plain = ("aggressive_hyphens", "normalize_punctuation", "straight_apostrophes", "lowercase")
        changes |= dict.fromkeys(plain, False) | {"tokenizer": "none", "joined_dictionary": True}
        return self.model_copy(update={**changes, "expected": {}, "published": None})


def modern_subword(size: int) -> Subword:
    """Return the subword model of `Recipe.modern`. Rare characters become bytes, so that bytes occur in training."""
    options: dict[str, Any] = {"model_type": "bpe", "byte_fallback": True, "character_coverage": 0.9999}
    return Subword(vocab_size=size, **options, normalization_rule_name="nmt_nfkc")


def _check_length(key: str, options: dict[str, Any], average: int) -> None:
    for name in ("max-tokens", "update-freq", "max-epoch", "max-update"):
        value = options.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 10**9:
            raise ValueError(f"{key}.{name}: must be a whole number from 1 to 1,000,000,000, got {short_repr(value)}")
    if "max-tokens" not in options:
        raise ValueError(f"{key}.max-tokens: is missing")
    if len({"max-epoch", "max-update"} & set(options)) != 1:
        raise ValueError(f"{key}: must set either max-epoch or max-update")
    if average > options.get("max-epoch", average):
        raise ValueError(f"average: must be between 1 and max-epoch {options['max-epoch']}, got {average}")


class _Loader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice; YAML's own loader silently takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value}: occurs twice", key.start_mark)
            keys.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict:
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES + 1).decode("utf-8")
        content = yaml.load(text, _Loader) if len(text) <= MAX_BYTES else None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())[:300]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a recipe: it must be a mapping of options, of at most {MAX_BYTES:,} bytes")
    return content


def load_recipe(
    path: Path, source: str | None = None, target: str | None = None, bitext: list[str] | None = None
) -> Recipe:
    """Read and check a recipe. If it has no files, `bitext` names them, and `source` and `target` their languages.

    Raises UserError "FILE: KEY: problem".
    """
    content = _read_yaml(path)
    is_own = isinstance(content.get("data"), dict) and "held_out" in content["data"] and "train" not in content["data"]
    if bitext or source or target:
        if not is_own:
            raise UserError(f"{path}: has its own data; use --bitext, --source and --target with examples/own")
        _insert_bitext(content, source, target, bitext)
    elif is_own:
        raise UserError(f"{path}: needs your own text: name your files, for example --bitext corpus.de corpus.en")
    try:
        recipe = Recipe.model_validate(content, context=bitext)
    except ValidationError as error:
        problem = describe_problem(error)
        if not isinstance(content.get("data"), list):
            problem = re.sub(r"^data\.0", "data", problem)
        raise UserError(f"{path}: {problem}") from None
    recipe._file, recipe._folder = path, Path() if bitext else path.parent
    return recipe


def _insert_bitext(content: dict, source: str | None, target: str | None, bitext: list[str] | None) -> None:
    if not bitext:
        raise UserError("--source and --target can only be used with --bitext")
    if len(bitext) > 2:
        raise UserError(f"--bitext takes two files or one tab-separated file, got {len(bitext)}")
    suffixes = [Path(name.removesuffix(".gz")).suffix[1:] for name in bitext] if len(bitext) == 2 else ["", ""]
    source, target = source or suffixes[0], target or suffixes[1]
    for option, language in (("--source", source), ("--target", target)):
        if not language:
            raise UserError(f"{option}: is missing, and the file has no suffix that names its language, such as .de")
    content.update(source=source, target=target, name=f"{content.get('name')}_{source}_{target}")
    content["data"]["train"] = list(bitext)


def check_train_options(recipe: Recipe) -> None:
    """Ask fairseq's own parser about the options of every arm (this imports fairseq, which takes seconds).

    Raises UserError if an option is unknown or has a value fairseq does not take.
    """
    from .environment import quiet_imports

    messages = io.StringIO()
    with quiet_imports(), redirect_stderr(messages):
        from fairseq import options

        from .plugin import register

        register()
        for arm in recipe.arms:
            values = {**recipe.arm_train(arm), **recipe.arms[arm].options}.items()
            words = [
                f"--{name}" if value is True else f"--{name}={value}" for name, value in values if value is not False
            ]
            try:
                options.parse_args_and_arch(options.get_training_parser(), ["data-bin", *words])
            except (SystemExit, ValueError, TypeError, KeyError, RuntimeError) as error:
                problem = messages.getvalue().strip().rpartition("error: ")[2] or str(error)
                problem = short_repr(problem, 200).strip("'\"")
                raise UserError(f"{recipe.file}: arms.{arm}: fairseq-train refuses it: {problem}") from None
