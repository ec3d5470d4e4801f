"""Read a recipe: the data, its preparation, the training options, and the arms that are compared."""

import copy
import io
import re
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from .errors import UserError
from .fields import Count, Language, Name, TrainOptions, within
from .files import Record, describe_problem, short_repr
from .loss.options import OPTION_NAMES
from .recipe_parts import Arm, Clean, Corpus, Published, Subword, in_list

MAX_BYTES = 1_000_000  # of a recipe file
STAGES = ("read", "empty", "too_long", "ratio", "held_out", "before_cleaning", "with_text", "kept")
AVERAGE, BEAM, LENPEN = 10, 5, 1.0  # the defaults
COVERAGE = 0.9999  # the share of characters that are pieces in `modern_subword`; rarer ones become bytes
LENGTHS = {"max-epoch", "max-update"}
CRITERION = "label_smoothed_encouraging_loss"
FAIRSEQ_OPTION_NAMES = {"label-smoothing", "report-accuracy", "ignore-prefix-size"}  # of its cross entropy too


class Recipe(Record):
    """The content of a recipe.yaml.

    data is a list of alternatives (in the file, a single one needs no list). The first one whose files are all
    available locally is used, otherwise the first one.
    """

    name: Name
    source: Language
    target: Language
    data: Annotated[list[Corpus], BeforeValidator(in_list), Field(min_length=1, max_length=100)]
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
    # published counts, {split: {stage: pairs}} and {"dictionary": {language: types}}; any number in a list is accepted
    expected: dict[str, dict[str, Annotated[list[Count], BeforeValidator(in_list)]]] = {}
    published: Published | None = None  # to show beside the scores
    _file: Path = PrivateAttr(Path("recipe.yaml"))
    _folder: Path = PrivateAttr(Path())
    _filled: dict | None = PrivateAttr(None)

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
            options, average = self.arm_train(arm), self.arm_average(arm)
            _check_length(f"arms.{arm}.train" if self.arms[arm].train else "train", options)
            if average > options.get("max-epoch", average):
                name = f"arms.{arm}.average" if self.arms[arm].average else "average"
                raise ValueError(f"{name}: must be between 1 and max-epoch {options['max-epoch']}, got {average}")
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
    def filled(self) -> dict | None:
        """The content of a recipe of own text with the keys that were chosen for it; None if it had them all."""
        return self._filled

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
        return {**without_length(self.train, own), **own}

    def arm_average(self, arm: str) -> int:
        """Return how many checkpoints of an arm are averaged: the arm's own number, otherwise the recipe's."""
        return self.arms[arm].average or self.average

    def arm_differences(self, arm: str) -> list[str]:
        """Return the settings, except the criterion, in which an arm differs from the recipe."""
        differing = [name for name, value in self.arms[arm].train.items() if value != self.train.get(name)]
        return [*differing, *["average"] * (self.arm_average(arm) != self.average)]

    def reversed(self) -> "Recipe":
        """Return the other direction of the same corpus."""
        changes = {"name": f"{self.corpus}_{self.target}_{self.source}", "source": self.target, "target": self.source}
        return self.model_copy(
            update={**changes, "data": [corpus.reversed() for corpus in self.data], "published": None}
        )

    def modern(self) -> "Recipe":
        """Return the same corpus as raw cased text, straight into SentencePiece with NFKC and byte fallback."""
        subword = modern_subword(self.subword.merges or self.subword.vocab_size)
        subword = subword.model_copy(update=self.subword.model_dump(include={"hard_vocab_limit"}, exclude_unset=True))
        changes = {"name": f"{self.name}.modern", "subword": subword, "clean": Clean(max_length=250, max_ratio=3)}
        plain = ("aggressive_hyphens", "normalize_punctuation", "straight_apostrophes", "lowercase")
        changes |= dict.fromkeys(plain, False) | {"tokenizer": "none", "joined_dictionary": True}
        return self.model_copy(update={**changes, "expected": {}, "published": None})


def modern_subword(size: int) -> Subword:
    """Return the subword model of `Recipe.modern`. Rare characters become bytes, so that bytes occur in training."""
    options: dict[str, Any] = {"model_type": "bpe", "byte_fallback": True, "character_coverage": COVERAGE}
    return Subword(vocab_size=size, **options, normalization_rule_name="nmt_nfkc")


def without_length(options: dict[str, Any], others: Iterable[str]) -> dict[str, Any]:
    """Return `options` without max-epoch and max-update if `others` has one of them: they exclude each other."""
    replaced = LENGTHS if LENGTHS & set(others) else set()
    return {name: value for name, value in options.items() if name not in replaced}


def _check_length(key: str, options: dict[str, Any]) -> None:
    for name in ("max-tokens", "batch-size", "update-freq", "max-epoch", "max-update"):
        value = options.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 10**9:
            raise ValueError(f"{key}.{name}: must be a whole number from 1 to 1,000,000,000, got {short_repr(value)}")
    if "max-tokens" not in options:
        raise ValueError(f"{key}.max-tokens: is missing")
    if len(LENGTHS & set(options)) != 1:
        raise ValueError(f"{key}: must set either max-epoch or max-update")


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
    path: Path,
    source: str | None = None,
    target: str | None = None,
    bitext: list[str] | None = None,
    chosen: dict[str, Any] | None = None,
    settings: Sequence[str] = (),
    new_arms: Sequence[str] = (),
) -> Recipe:
    """Read and check a recipe. If it has no files, `bitext` names them, and `source` and `target` their languages.

    `chosen` (see data/sizing.py) has the keys that a recipe for own text may leave out. `settings` and `new_arms` are
    the values of --set and --add-arm. Raises UserError "FILE: KEY: problem".
    """
    content = _read_yaml(path)
    is_own = isinstance(content.get("data"), dict) and "held_out" in content["data"] and "train" not in content["data"]
    filled = _fill(content, chosen) if is_own and chosen else None
    content = copy.deepcopy(filled or content)
    if bitext or source or target:
        if not is_own:
            raise UserError(f"{path}: has its own data; use --bitext, --source and --target with examples/own")
        _insert_bitext(content, source, target, bitext)
    elif is_own:
        raise UserError(f"{path}: needs your own text: name your files, for example --bitext corpus.de corpus.en")
    recipe = _validate(content, str(path), bitext)
    if settings or new_arms:
        change(content, settings, new_arms)
        recipe = _validate(content, f"{path}, changed by --set or --add-arm", bitext)
    recipe._file, recipe._folder, recipe._filled = path, Path() if bitext else path.parent, filled
    return recipe


def _fill(content: dict, chosen: dict[str, Any]) -> dict | None:
    """Return the content of a recipe of own text with the keys of `chosen` that it lacks; None if it lacks none."""
    data = {**content["data"], "held_out": content["data"]["held_out"] or chosen["held_out"]}
    missing = {key: value for key, value in chosen.items() if key != "held_out" and key not in content}
    return {**content, "data": data, **missing} if missing or data != content["data"] else None


def _validate(content: dict, name: str, bitext: list[str] | None) -> Recipe:
    try:
        return Recipe.model_validate(content, context=bitext)
    except ValidationError as error:
        problem = describe_problem(error)
        if not isinstance(content.get("data"), list):
            problem = re.sub(r"^data\.0", "data", problem)
        raise UserError(f"{name}: {problem}") from None


def change(content: dict, settings: Sequence[str], new_arms: Sequence[str]) -> None:
    """Change the content of a valid recipe: `settings` are NAME=VALUE, `new_arms` NAME=ARM,NAME=VALUE,...

    A setting of the criterion changes every arm whose criterion has it. Training options that an arm has itself stay.
    Raises UserError for text of another form, and for arms that are missing or there already.
    """
    arms = content["arms"]
    if settings:
        content.pop("published", None)  # it is about other options
    assignments = [(text, *_assignment("--set", text)) for text in settings]
    if LENGTHS <= {name for _, name, _ in assignments}:
        raise UserError("--set: max-epoch and max-update replace each other; set only one of them")
    for text, name, value in assignments:
        if name in OPTION_NAMES:
            criterion = "label_smoothed_" if name in FAIRSEQ_OPTION_NAMES else CRITERION  # how its name begins
            having = [arm for arm in arms.values() if arm["criterion"].startswith(criterion)]
            if not having:
                raise UserError(f"--set {text}: no arm has a criterion with this option")
            for arm in having:
                arm[name] = value
        elif name in ("average", "beam", "lenpen"):
            content[name] = value
        else:
            content["train"] = {**without_length(content["train"], [name]), name: value}
    for text in new_arms:
        arm, equals, rest = text.partition("=")
        base, *changes = re.split(r",(?![^(\[]*[)\]])", rest)  # not at a comma in brackets
        if not equals or not changes:
            raise UserError(
                f"--add-arm {short_repr(text)}: must be NAME=ARM,OPTION=VALUE,... as in el_025=el,log-end=0.25"
            )
        if base not in arms or arm in arms:
            problem = f"has {arm} already" if arm in arms else f"has no arm {base}"
            raise UserError(f"--add-arm {text}: the recipe {problem}; its arms: {', '.join(arms)}")
        arms[arm] = copy.deepcopy(arms[base])
        for name, value in (_assignment("--add-arm", each) for each in changes):
            is_own = name in OPTION_NAMES | {"criterion", "average"}
            options = arms[arm] if is_own else arms[arm].setdefault("train", {})
            options[name] = value


def _assignment(option: str, text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    try:
        parsed = yaml.safe_load(value) if equals else None
    except (yaml.YAMLError, ValueError):
        raise UserError(f"{option} {short_repr(text)}: the value is not YAML") from None
    if isinstance(parsed, str):
        with suppress(ValueError):
            parsed = float(parsed)  # 1e-3, which YAML 1.1 takes for text
    return name.removeprefix("--"), parsed


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
    if source == target:
        raise UserError(f"--bitext: both languages are {source}; name two with --source and --target")
    content.update(source=source, target=target)
    if "name" in content:
        content["name"] = f"{content['name']}_{source}_{target}"
    content["data"]["train"] = list(bitext)


def render_options(options: dict[str, Any]) -> list[str]:
    """Return options as command-line words: {"max-epoch": 3, "share-all-embeddings": True, ...}; False is left out."""
    given = {name: value for name, value in options.items() if value is not False}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


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
            words = ["data-bin", *render_options({**recipe.arm_train(arm), **recipe.arms[arm].options})]
            try:
                options.parse_args_and_arch(options.get_training_parser(), words)
            except (SystemExit, SyntaxError, ValueError, TypeError, KeyError, RuntimeError) as error:
                problem = messages.getvalue().strip().rpartition("error: ")[2] or str(error)
                problem = short_repr(problem, 200).strip("'\"")
                raise UserError(f"{recipe.file}: arms.{arm}: fairseq-train refuses it: {problem}") from None
