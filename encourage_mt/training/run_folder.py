"""Read and write the folder of one training: its options, how to score it, and its log."""

import json
import re
import shlex
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, StringConstraints, with_config
from typing_extensions import NotRequired, TypedDict

from ..data.manifest import DATASET, PreparedData
from ..environment import USER_DIR, Precision
from ..errors import UserError, as_user_error
from ..files import Record, Scalar, read_record, write_record
from ..plugin.checkpoints import load_checkpoint, newest_checkpoint
from ..recipe import AVERAGE, BEAM, LENPEN, Name, render_options

OptionName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*\z")]
WATCHING = {  # options that do not change what is trained
    *("eval-bleu-args", "eval-tokenized-bleu", "log-format", "log-interval", "keep-last-epochs", "max-tokens-valid"),
    *("tensorboard-logdir", "wandb-project"),
}
STRICT = ConfigDict(strict=True, extra="forbid")
ABSURD = 1e12  # no training has as many updates, or seconds
# in a run's folder, opened for writing or replaced
WRITTEN = re.compile(r"\.lock\d*|convert\.log|.*\.generate\.log|.*\.tmp|export|robustness")


@with_config(STRICT)
class Start(TypedDict):
    """One start of a training: the command as it ran, when, and on which machine."""

    command: str
    time: str
    processes: int
    versions: dict[str, str]
    git_revision: str | None
    machine: str
    instruction_set: NotRequired[str]
    compiled_loss: NotRequired[bool]


@with_config(STRICT)
class Provenance(TypedDict):
    """The checksum of the training data and every start; empty where fairseq-train was run by hand."""

    data_sha256: NotRequired[str]
    starts: NotRequired[list[Start]]


class Run(Record):
    """One training and how to score it. Its folder contains run.json (this), train.log, checkpoints/ and their scores.

    options are those of fairseq-train on one process, without dashes and in order; criterion and its own come last.
    Data, plugin and checkpoint folder are not among them, so a work directory may be moved.
    """

    remedy: ClassVar[str] = "score it with the version that trained it, or train again with another --work-dir"

    format: Literal[2] = 2
    folder: Path = Field(exclude=True)
    recipe: str
    arm: Name
    seed: int = Field(ge=0)
    data: Path
    options: dict[OptionName, Scalar]
    average: int = Field(ge=1)
    beam: int = Field(ge=1, lt=2**31)
    lenpen: float
    temperature: float = Field(default=1.0, gt=0)  # the logits are divided by it
    precision: Precision | Literal["amp"]  # amp: fairseq-train by hand
    provenance: Provenance

    @classmethod
    def upgrade(cls, content: dict) -> dict:
        """Return a run.json of version 0.1, which contains a command line, as format 2."""
        if "format" not in content and isinstance(content.get("command"), str):
            content = {"format": 2, **content}
            content["options"] = parse_options(content.pop("command"))
        return content

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def log(self) -> Path:
        return self.folder / "train.log"

    @property
    def is_done(self) -> bool:
        return (self.folder / "train.done").exists()

    @property
    def length(self) -> tuple[int, str]:
        """How long the training lasts: (number, "epoch") or, where max-update is set, (number, "update")."""
        updates = self.options.get("max-update")
        return (int(updates), "update") if updates else (int(self.options["max-epoch"]), "epoch")

    def prepared(self) -> PreparedData:
        """Return the data it was trained on. Raises UserError if it is missing."""
        return PreparedData.open(self.data)

    def command_line(self, **changes: Scalar) -> list[str]:
        """Return the words of the fairseq-train that trains it on one process, with `changes` to the options.

        A value is one word with its option, and our plugin comes last: fairseq imports whatever follows the last
        --user-dir anywhere on the line.
        """
        return ["fairseq-train", *self.arguments(**changes), f"--user-dir={USER_DIR}"]

    def arguments(self, **changes: Scalar) -> list[str]:
        """Return data, checkpoint folder and options, with `changes`, as fairseq-train takes them.

        TensorBoard's folder is one in the run's, whatever path the option has.
        """
        options = {**self.options, **{name.replace("_", "-"): value for name, value in changes.items()}}
        if "tensorboard-logdir" in options:
            options["tensorboard-logdir"] = str(self.folder / Path(str(options["tensorboard-logdir"])).name)
        fixed = [f"--save-dir={self.folder / 'checkpoints'}", f"--dataset-impl={DATASET}"]
        return [str(self.data / "data-bin"), *fixed, *render_options(options)]

    def earlier_starts(self) -> list[Start]:
        """Return the starts in run.json; empty if there is no such file.

        Raises UserError if run.json is of a training with other options, precision or data.
        """
        path = self.folder / "run.json"
        if not path.exists():
            return []
        before = read_record(path, Run, folder=self.folder)
        theirs, ours = before.shown_options(), self.shown_options()
        changed = sorted(name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name))
        changed += ["data"] * (self.provenance["data_sha256"] != before.provenance.get("data_sha256"))
        if changed:
            raise UserError(
                f"{self.folder}: already contains a training with different {', '.join(changed)} (run.json); "
                "choose another --work-dir"
            )
        return before.provenance.get("starts", [])

    def save(self) -> None:
        """Write run.json, with its earlier starts before those of this run. Raises as `earlier_starts` does."""
        provenance = {**self.provenance, "starts": [*self.earlier_starts(), *self.provenance["starts"]]}
        path, record = self.folder / "run.json", self.model_copy(update={"provenance": provenance})
        if not path.exists() or read_record(path, Run, folder=self.folder) != record:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_record(path, record)

    def shown_options(self) -> dict[str, str]:
        """Return precision and the options that decide the parameters as text, as they are on a command line."""
        options = {name: value for name, value in self.options.items() if name not in WATCHING}
        return {name: str(value) for name, value in {**options, "precision": self.precision}.items()}


def parse_options(command: str) -> dict[str, Scalar]:
    """Return the options in a command line of version 0.1, without the paths. Raises UserError if it is not one."""
    options: dict[str, Scalar] = {}
    try:
        words = shlex.split(command)[2:]
    except ValueError:
        words = [command]
    while words:
        name = words.pop(0)
        if not name.startswith("--"):
            raise UserError(f"not a command of fairseq-train: {command[:100]!r}")
        has_value = words and not words[0].startswith("--")
        options[name[2:]] = words.pop(0) if has_value else True
    return {name: value for name, value in options.items() if name not in ("user-dir", "save-dir")}


def checkpoint_folder(folder: Path) -> Path:
    """Return checkpoints/ of a run's folder, or the folder itself where fairseq-train was run by hand."""
    nested = folder / "checkpoints"
    return nested if nested.is_dir() else folder


def open_run(folder: Path, **changes) -> Run:
    """Return the run in `folder`, from its run.json or, where fairseq-train was run by hand, its newest checkpoint.

    `changes` (data, average, beam, lenpen, temperature) replace what was recorded unless they are None. Raises
    UserError if there is neither run.json nor a checkpoint, the prepared data is gone, or a link would lead what we
    write elsewhere.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run directory")
    folder = folder.resolve()
    for path in (*folder.iterdir(), *folder.glob("robustness/*")):
        if path.is_symlink() and WRITTEN.fullmatch(path.name):
            raise UserError(f"{path}: is a link, and evaluation would write through it; remove it")
    changes = {name: value for name, value in changes.items() if value is not None}
    if (folder / "run.json").exists():
        run = read_record(folder / "run.json", Run, folder=folder)
        if not run.data.is_dir():
            changes.setdefault("data", folder.parent / "data")  # the whole work directory was moved
    else:
        run = run_by_hand(folder)
    run = run.model_copy(update=changes)
    if not run.data.is_dir():
        raise UserError(
            f"{folder}: its data {run.data} does not exist; move the prepared data there, or name its folder with "
            "--data"
        )
    run.prepared()
    return run


def run_by_hand(folder: Path) -> Run:
    """Return the run of a fairseq-train that was started without this program, from its newest checkpoint."""
    path = newest_checkpoint(checkpoint_folder(folder))
    state = load_checkpoint(path)
    with as_user_error(f"{path}: its training options cannot be read"):
        options = state["cfg"]
        return Run(
            folder=folder,
            recipe="",
            arm=options["criterion"]["_name"],
            seed=options["common"]["seed"],
            data=(training_cwd(path.parent, options["checkpoint"]["save_dir"]) / options["task"]["data"]).parent,
            options={"criterion": options["criterion"]["_name"]},
            average=AVERAGE,
            beam=BEAM,
            lenpen=LENPEN,
            precision=precision_of(options),
            provenance={},
        )


def training_cwd(checkpoints: Path, save_dir: str) -> Path:
    """Return the folder in which a training by hand was started, to which the paths of its options are relative.

    It follows from a relative --save-dir and where the checkpoints are. Otherwise it is the current folder.
    """
    parts = Path(save_dir).parts
    start = len(checkpoints.parts) - len(parts)
    is_inside = start > 0 and checkpoints.parts[start:] == parts
    return Path(*checkpoints.parts[:start]) if is_inside else Path.cwd()


def training_settings(state: dict) -> dict:
    """Return a checkpoint's training options except criterion, seed, paths and logging; flat, for comparison.

    `tokens per update` is the effective batch: max-tokens x update-freq x processes (0 where only sentences are
    counted); `sentences per update` likewise. Raises KeyError, TypeError or the like if an option is missing.
    """
    options = state["cfg"]
    world = options["distributed_training"]["distributed_world_size"]
    frequency = options["optimization"]["update_freq"]
    steps = frequency[0] if len(set(frequency)) == 1 else frequency
    batch = {}
    for name, per in (("tokens", "max_tokens"), ("sentences", "batch_size")):
        value = options["dataset"][per] or 0
        batch[f"{name} per update"] = value * steps * world if isinstance(steps, int) else [value, steps, world]
    settings = {**batch, "updates": state["optimizer_history"][-1]["num_updates"]}
    settings["precision"] = precision_of(options)
    sections = {name: section for name, section in options.items() if isinstance(section, dict) and name != "model"}
    elsewhere = {name for section in sections.values() for name in section} | set(options)
    for section in ("optimization", "optimizer", "lr_scheduler"):
        values = mapping(options[section])
        if section not in sections:  # a Namespace has the options of all sections
            values = {name: value for name, value in values.items() if name == "_name" or name not in elsewhere}
        settings.update({section if name == "_name" else name: value for name, value in values.items()})
    model = flat_options(options["model"])
    settings.update({name: value for name, value in model.items() if name not in elsewhere})
    settings.setdefault("arch", model.get("_name"))
    for name in ("update_freq", "no_seed_provided", "tpu", "debug_param_names"):
        settings.pop(name, None)
    return settings


def mapping(options) -> dict:
    """Return a section of a checkpoint's options as a dict; fairseq's command line leaves some as a Namespace."""
    return options if isinstance(options, dict) else vars(options)


def flat_options(section) -> dict:
    """Return the options of a checkpoint's model with the names of fairseq-train; fairseq-hydra-train nests some."""
    options = mapping(section)
    parts = {part: nested for part, nested in options.items() if isinstance(nested, dict)}
    nested = {f"{part}_{name}": value for part, options in parts.items() for name, value in options.items()}
    # the nested options win: beside them are flat ones that keep their defaults
    return {name: value for name, value in {**options, **nested}.items() if name not in parts}


def precision_of(options: dict) -> Any:
    """Return the precision that a checkpoint's options set."""
    return next((name for name in ("fp16", "bf16", "amp") if options["common"][name]), "fp32")


def read_log(log: Path) -> list[dict]:
    """Return the records of a fairseq log in order, as `record_of` returns them. Empty without a log."""
    if not log.exists():
        return []
    return list(filter(None, map(record_of, log.read_text(encoding="utf-8", errors="replace").splitlines())))


def record_of(line: str) -> dict | None:
    """Return the JSON record at the end of a line of a fairseq log, None if there is none.

    Values are the strings fairseq prints, or numbers; what `float` does not read is left out.
    """
    start = line.find("{")
    if start < 0 or not line.endswith("}") or '"epoch"' not in line:
        return None
    try:
        record = json.loads(line[start:])
    except (ValueError, RecursionError):
        return None
    return {name: value for name, value in record.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def rows_by_epoch(records: list[dict], *names: str) -> dict[float, list[float]]:
    """Return {epoch: values of `names`} of the records that have all of them, unless one is not finite or absurd.

    An epoch appears twice in a log if its checkpoint was lost; the last record counts.
    """
    names = ("epoch", *names)
    rows = [[float(record[name]) for name in names] for record in records if record.keys() >= set(names)]
    return {epoch: values for epoch, *values in rows if all(abs(value) < ABSURD for value in (epoch, *values))}
