"""Read and write scores.json: the scores of a run, and the options, data and versions that led to them."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, JsonValue, model_validator

from ..data.manifest import PreparedData
from ..environment import Engine
from ..errors import UserError
from ..fields import Count
from ..files import Record, Scalar, read_record, write_record
from ..training.run_folder import Provenance, parse_options

HEADLINE = "sacreBLEU"
Positive = Annotated[int, Field(ge=1)]
FiniteScore = Annotated[float, Field(ge=-1e6, le=1e6)]


class Score(Record):
    """One metric of one test set. length_ratio is tokens of the translation / tokens of the reference (BLEU alone)."""

    score: FiniteScore
    signature: str
    length_ratio: float | None = None


class Evaluation(Record):
    """How a run was scored: the averaged checkpoints ({file name: sha256}), the data, search, the COMET model."""

    average: Positive
    beam: Positive
    lenpen: float
    temperature: float = Field(default=1.0, gt=0)
    engine: Engine = "fairseq"  # results of version 0.1 do not name it
    comet: str | None
    data_sha256: str
    checkpoints_sha256: dict[str, str]

    @property
    def search(self) -> str:
        """The settings of the search in words."""
        return describe_search(self.beam, self.lenpen, self.temperature)


def describe_search(beam: int, lenpen: float, temperature: float) -> str:
    """Return the settings of a search in words; a temperature of 1 is left out."""
    return f"beam {beam}, length penalty {lenpen}{'' if temperature == 1 else f', temperature {temperature}'}"


class TriedSearch(Record):
    """The settings of a search, and the sacreBLEU on valid that it gives."""

    beam: Positive
    lenpen: float
    temperature: float
    bleu: FiniteScore


class CurvePoint(Record):
    """Valid BLEU (greedy, one checkpoint) and nll (bits per token) after an epoch."""

    epoch: float
    updates: float
    bleu: float
    nll: float


class Result(Record):
    """The content of scores.json.

    options and provenance are those of the run, criterion and training the settings that its checkpoint records.
    scores is {split: {metric: Score}}. translations_sha256 is {file name: sha256} of the translations beside it and
    weights_sha256 the digest of the averaged parameters; scores of version 0.1 have neither. parameters is their
    number. alarms are the reasons why the scores mean nothing (training/alarms.py). Scores of earlier versions have
    neither of these two. Only results in results/ have diagnostics ({name: value} of analysis.json), curve (of
    learning) and tuning (the searches of tuning.json).
    """

    remedy: ClassVar[str] = "remove it and run `encourage-mt evaluate` again"

    format: Literal[2] = 2
    name: str
    recipe: str
    arm: str
    seed: Count
    options: dict[str, Scalar]
    criterion: dict[str, JsonValue]
    evaluation: Evaluation
    scores: dict[str, dict[str, Score]]
    training: dict[str, JsonValue]
    target_tokens_per_second: float | None = None
    train_seconds: float | None = None
    machine: str
    versions: dict[str, str]
    provenance: Provenance
    translations_sha256: dict[str, str] = {}
    weights_sha256: str | None = None
    diagnostics: dict[str, float] | None = None
    curve: list[CurvePoint] | None = None
    tuning: list[TriedSearch] | None = None
    parameters: Count | None = None
    alarms: list[str] = []

    @model_validator(mode="after")
    def _check_sets(self):
        for split, scores in self.scores.items():
            if HEADLINE not in scores:
                raise ValueError(f"scores: {split}: has no {HEADLINE}")
        return self

    @classmethod
    def read(cls, path: Path) -> "Result":
        """Return the scores in a file or in a run's folder. Raises UserError if they are missing or damaged."""
        if path.is_dir():
            if not (path / "scores.json").exists():
                raise UserError(f"{path}: has no scores yet; run `encourage-mt evaluate {path}`")
            path = path / "scores.json"
        return read_record(path, cls)

    def write(self, folder: Path) -> None:
        """Write the scores as scores.json into a folder."""
        write_record(folder / "scores.json", self)

    def check_data(self, data: PreparedData) -> None:
        """Raise UserError if the data is not what the run was scored on."""
        if self.evaluation.data_sha256 != data.checksum:
            raise UserError(f"{data.folder}: not the data that {self.name} was scored on, its checksum differs")

    @classmethod
    def upgrade(cls, content: dict) -> dict:
        """Return scores of version 0.1 as format 2 has them."""
        if "format" in content or not isinstance(content.get("command"), str):
            return content
        content = {name: value for name, value in content.items() if name not in ("command", "signatures")} | {
            "format": 2,
            "options": parse_options(content["command"]),
        }
        if "inside" in content:
            content["diagnostics"] = content.pop("inside")
        return content

    @property
    def signatures(self) -> dict[str, str]:
        """The signatures of all sets: {metric: signature}."""
        return {metric: score.signature for scores in self.scores.values() for metric, score in scores.items()}


def alarms_of(results: list[Result]) -> list[str]:
    """Return one line for each result that has alarms."""
    return [f"{result.name}: {', and '.join(result.alarms)}" for result in results if result.alarms]


def searches(results: list[Result]) -> list[str]:
    """Return the settings of the search of the results, each once."""
    return list(dict.fromkeys(result.evaluation.search for result in results))


def by_arm(results: list[Result]) -> dict[str, list[Result]]:
    """Return {arm: its results}, in order of appearance."""
    arms: dict[str, list[Result]] = {}
    for result in results:
        arms.setdefault(result.arm, []).append(result)
    return arms
