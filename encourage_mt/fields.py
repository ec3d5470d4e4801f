"""Define the types of values in recipes and records: names, paths, counts, options of fairseq-train."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationInfo

from .files import Scalar, is_safe_relative_path, short_repr

# options of fairseq-train that the program sets itself, or that write elsewhere, load code or drop checkpoints
RESERVED_OPTIONS = re.compile(
    "data|seed|task|criterion|bonus|user-dir|source-lang|target-lang|bpe|tokenizer|scoring|help|profile|cpu|tpu|amp|fp16|bf16"
    "|save-.*|restore-.*|reset-.*|keep-.*|no-save.*|no-epoch-checkpoints|no-last-checkpoints|finetune-from-model"
    "|log-.*|azureml-.*|aim-.*|eval-.*|.*best-checkpoint-.*|disable-validation|continue-once|max-sentences.*"
    "|num-workers|required-batch-size-multiple|.*-subset|combine-.*|memory-efficient-.*|distributed-.*|device-id"
    "|use-bmuf|suppress-crashes|num-shards|shard-id|dataset-impl|model-parallel-size|cpu-offload|.*-asynchronously"
    "|nprocs-per-node|load-checkpoint-.*|pipeline-.*|.*-path|.*-sharded-state|checkpoint-.*|.*-overrides|use-plasma-view"
)
# fairseq evaluates some values as Python code, so only words, numbers and tuples of numbers pass
OPTION_VALUE = re.compile(r"[\w.][\w.:+-]*|(\()?(\[)?[\d.][\d., eE+-]*(?(2)\])(?(1)\))", re.ASCII)
RESERVED_SPLITS = ("average", "run", "scores", "analysis", "dict", "dictionary")  # names of other files and keys


def matching(pattern: str, meaning: str) -> BeforeValidator:
    """Return a check that a value is text that matches `pattern` completely; `meaning` describes it in words."""

    def check(value: Any) -> Any:
        if not isinstance(value, str) or len(value) > 200 or not re.fullmatch(pattern, value):
            hint = " (without quotes, YAML reads it as something else)" if isinstance(value, bool | int | float) else ""
            raise ValueError(f"must be {meaning}, got {short_repr(value)}{hint}")
        return value

    return BeforeValidator(check)


def within(low: float, high: float) -> Any:
    """Return a check that a number is between `low` and `high`, both included."""
    return Field(ge=low, le=high)


def file_lists(files: list) -> list[list[str]]:
    """Return the files of a split as a list of [source, target] or [tab-separated file]."""
    return files if isinstance(files[0], list) else [files]


def check_split(name: Any) -> Any:
    """Refuse an invalid name of a split. It must not have a dot, so that SPLIT.LANG and SPLIT.tok.LANG differ."""
    if not isinstance(name, str) or not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]{0,99}", name) or name in RESERVED_SPLITS:
        raise ValueError(f"{short_repr(name)} cannot be the name of a split (letters, digits, _ and -)")
    return name


def _check_option(name: str) -> str:
    if RESERVED_OPTIONS.fullmatch(name):
        raise ValueError("cannot be set in a recipe: the program sets it, or it is not safe")
    return name


def _check_option_value(value: Any) -> Any:
    if isinstance(value, str) and (len(value) > 200 or not OPTION_VALUE.fullmatch(value)):
        raise ValueError(f"must be a word, a number or a tuple of numbers, got {short_repr(value)}")
    return value


def _check_path(value: Any) -> Any:
    parts = value.split(":") if isinstance(value, str) else []
    if len(parts) not in (1, 2) or not all(map(is_safe_relative_path, parts)):
        raise ValueError(f"must be FILE or ARCHIVE:MEMBER, relative and without .., got {short_repr(value)}")
    return value


def _check_files(value: Any, info: ValidationInfo) -> Any:
    own = info.context or []  # files named on the command line may be anywhere
    for files in file_lists(value) if isinstance(value, list) and value else [value]:
        if not isinstance(files, list) or len(files) not in (1, 2):
            raise ValueError(f"must be [source file, target file] or [tab-separated file], got {short_repr(files)}")
        if len(files) == 2 and files[0] == files[1]:
            raise ValueError(f"must be different files for source and target, got {short_repr(files)}")
        for name in files:
            if name not in own:
                _check_path(name)
    return value


# names become names of files
Name = Annotated[
    str, matching("[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", "letters, digits and . _ - (first a letter or digit)")
]
Split = Annotated[str, BeforeValidator(check_split)]
# fairseq splits a pair of languages at its hyphen
Language = Annotated[str, matching("[A-Za-z][A-Za-z0-9_]{0,19}", "a language code without hyphen, such as de or zh_CN")]
Count = Annotated[int, within(0, 10**12)]
RelativePath = Annotated[str, BeforeValidator(_check_path)]
Files = Annotated[list[Any], BeforeValidator(_check_files)]
SHA256 = Annotated[str, matching("[0-9a-f]{64}", "a sha256 of 64 hexadecimal digits")]
Checksum = Annotated[
    str, matching("sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}|bytes:[0-9]{1,15}", "sha256:..., md5:... or bytes:...")
]
Url = Annotated[str, matching("https?://[!-~]+", "an address that begins with https:// or http://")]
OptionValue = Annotated[Scalar, BeforeValidator(_check_option_value)]
TrainOptions = dict[
    Annotated[str, BeforeValidator(_check_option), matching("[a-z][a-z0-9-]*", "an option without dashes")], OptionValue
]
