"""Read and write JSON files and records, whose fields are all checked; hash files."""

import hashlib
import json
import math
import re
import reprlib
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from .atomic import atomic_write
from .errors import UserError


class Record(BaseModel):
    """Base of the records kept in files. Types are strict; unknown keys and numbers that are not finite are refused.

    A record with a field `format` is refused if the file has another number, or none.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)
    remedy: ClassVar[str] = "make it again with this version"  # what to do about a file of another format

    @classmethod
    def upgrade(cls, content: dict) -> dict:
        """Return the content of a file in the present format; records that can read an older format override this."""
        return content


AnyRecord = TypeVar("AnyRecord", bound=Record)


def _check_scalar(value: Any) -> Any:
    if not isinstance(value, (bool, int, float, str)) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"must be text, a finite number, true or false, got {short_repr(value)}")
    return value


Scalar = Annotated[bool | int | float | str, BeforeValidator(_check_scalar)]  # the value of an option


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises UserError if it is missing, is not UTF-8 or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, atomically; numpy values become plain numbers and lists."""
    text = json.dumps(content, indent=1, ensure_ascii=False, default=lambda value: value.tolist())
    with atomic_write(path) as file:
        file.write(text + "\n")


def read_record(path: Path, model: type[AnyRecord], **fields: Any) -> AnyRecord:
    """Return the record in a JSON file, with `fields` that are not in the file (such as its folder).

    Raises UserError "FILE: KEY: problem" if the file is missing or damaged, or if another version wrote it.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object, got {short_repr(content)}")
    content = model.upgrade(content)
    if "format" in model.model_fields:
        expected = model.model_fields["format"].default
        if content.get("format") != expected or isinstance(content["format"], bool):
            written = short_repr(content.get("format"))
            raise UserError(f"{path}: format: must be {expected}, got {written} (another version); {model.remedy}")
    for name in fields:
        if name in content:
            raise UserError(f"{path}: {name}: unknown key")
    try:
        # as JSON, so that a path may be a string and a tuple a list although types are strict
        return model.model_validate_json(json.dumps({**content, **fields}, default=str))
    except ValidationError as error:
        raise UserError(f"{path}: {describe_problem(error)}") from None
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply") from None


def write_record(path: Path, record: Record) -> None:
    """Write a record as JSON, atomically."""
    write_json(path, record.model_dump(mode="json"))


PLAIN_WORDS = {"dictionary": "a mapping", "integer": "a whole number", "boolean": "true or false", "string": "text"}


def describe_problem(error: ValidationError) -> str:
    """Return the first problem pydantic found, as one line "KEY: problem"."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part)[:100] for part in first["loc"] if part != "[key]")
    kind, text = first["type"], first["msg"]
    if kind == "extra_forbidden":
        text = "unknown key"
    elif kind == "missing":
        text = "is missing"
    elif kind in ("value_error", "assertion_error"):
        text = str(first["ctx"]["error"])
    elif kind in ("too_short", "too_long"):
        limits = first["ctx"]
        text = f"must have at {'least' if kind == 'too_short' else 'most'} "
        text += f"{limits.get('min_length', limits.get('max_length'))} entries, has {limits['actual_length']}"
    else:
        text = text.replace("Input should be", "must be", 1)
        for word, plain_word in PLAIN_WORDS.items():
            text = text.replace(f"a valid {word}", plain_word)
        text = f"{text}, got {short_repr(first['input'])}"
    return _one_line(f"{key}: {text}" if key else text)


def short_repr(value: Any, limit: int = 60) -> str:
    """Return a value as at most `limit` printable characters on one line, however large it is."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, limit, limit
    try:
        text = _one_line(short.repr(value))
    except ValueError:  # an integer of too many digits
        return "a number too long to show"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _one_line(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))


def file_hash(path: Path, algorithm: str = "sha256") -> str:
    """Return the hexadecimal digest of a file's content."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_safe_relative_path(name: str) -> bool:
    """Return whether `name` is a relative path of a file that stays below the folder it is joined to.

    Absolute paths, "..", backslashes (separators on Windows), control characters and empty paths are not.
    """
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or not path.parts or re.search(r"[\x00-\x1f\x7f\\]", name))
