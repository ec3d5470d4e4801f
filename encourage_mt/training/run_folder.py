"""A run is the folder of one training: what it holds, how it was trained, what its log says."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

from ..errors import UserError
from ..files import read_json, write_json
from ..plugin.checkpoints import load_checkpoint, newest_checkpoint
from ..recipe import Recipe


@dataclass
class Run:
    """One training and how to score it. Its folder holds run.json (this), train.log, checkpoints/ and their scores.

    command is that of a training on one process; what starts it on several is derived from it (cluster.py).
    provenance has data_sha256 and, of each start, the command as it ran, versions, git revision and machine.
    """

    folder: Path
    recipe: str
    arm: str
    seed: int
    data: Path
    command: str
    average: int
    beam: int
    lenpen: float
    precision: str
    provenance: dict

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def log(self) -> Path:
        return self.folder / "train.log"

    @property
    def checkpoints(self) -> Path:
        return checkpoint_folder(self.folder)

    @property
    def is_done(self) -> bool:
        return (self.folder / "train.done").exists()

    def save(self) -> None:
        """Write run.json. Raises UserError if the folder holds a training with another command, precision or data."""
        path = self.folder / "run.json"
        if path.exists():
            before = open_run(self.folder)
            shared = ("command", "precision")
            differing = [name for name in shared if getattr(self, name) != getattr(before, name)]
            if self.provenance["data_sha256"] != before.provenance["data_sha256"]:
                differing.append("data")
            if differing:
                what = " and ".join(differing)
                raise UserError(
                    f"{self.folder}: holds a training with another {what} (run.json); choose another --work-dir"
                )
            self.provenance["starts"] = before.provenance.get("starts", []) + self.provenance["starts"]
        record = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "folder"}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {**record, "data": str(self.data)})


def checkpoint_folder(folder: Path) -> Path:
    """checkpoints/ of a run's folder, or the folder itself where fairseq-train was run by hand."""
    nested = folder / "checkpoints"
    return nested if nested.is_dir() else folder


def open_run(folder: Path, **changes) -> Run:
    """The run in `folder`, from its run.json or, where fairseq-train was run by hand, its newest checkpoint.

    `changes` (data, average, beam, lenpen) stand for what was recorded unless they are None. Raises UserError if
    there is neither run.json nor a checkpoint, or the prepared data is gone.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run directory")
    folder = folder.resolve()
    if (folder / "run.json").exists():
        record = read_json(folder / "run.json")
        names = {field.name for field in fields(Run)} - {"folder"}
        if set(record) != names:
            raise UserError(f"{folder / 'run.json'}: written by another version")
        if not Path(record["data"]).is_dir():
            record["data"] = folder.parent / "data"  # the whole work directory was moved
    else:
        options = load_checkpoint(newest_checkpoint(checkpoint_folder(folder)))["cfg"]
        record = {
            "recipe": "",
            "arm": options["criterion"]["_name"],
            "seed": options["common"]["seed"],
            "data": Path(options["task"]["data"]).parent,
            "command": "not recorded",
            "average": Recipe.average,
            "beam": Recipe.beam,
            "lenpen": Recipe.lenpen,
            "precision": precision_of(options),
            "provenance": {},
        }
    record.update({name: value for name, value in changes.items() if value is not None})
    record["data"] = Path(record["data"])
    if not (record["data"] / "manifest.json").exists():
        raise UserError(
            f"{record['data']}: no data of `encourage-mt prepare` there (manifest.json); give its folder with --data"
        )
    if "text" not in read_json(record["data"] / "manifest.json"):
        raise UserError(f"{record['data']}: prepared by another version; remove it and prepare again")
    return Run(folder=folder, **record)


def training_settings(state: dict) -> dict:
    """What a checkpoint's options say of the training but for criterion, seed, paths and logging: flat, for comparison.

    `tokens per update` is the effective batch: max-tokens x update-freq x processes (0 where batches are counted in
    sentences alone); `sentences per update` likewise.
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
    for section in ("optimization", "optimizer", "lr_scheduler"):
        settings.update(_plain(options[section], section))
    elsewhere = {name for section in options if section != "model" for name in (options[section] or {})}
    model = mapping(options["model"]).items()
    settings.update(_plain({k: v for k, v in model if k not in elsewhere | set(options)}, "model"))
    for name in ("update_freq", "no_seed_provided", "tpu", "debug_param_names"):
        settings.pop(name, None)
    return settings


def mapping(options) -> dict:
    """A section of a checkpoint's options; fairseq's command line leaves some as a Namespace."""
    return options if isinstance(options, dict) else vars(options)


def precision_of(options: dict) -> str:
    return next((name for name in ("fp16", "bf16", "amp") if options["common"][name]), "fp32")


def _plain(options, section):
    return {section if name == "_name" else name: value for name, value in options.items()}


def read_log(log: Path) -> list[dict]:
    """The JSON records of a fairseq log, in order; values are the strings fairseq prints. Empty without a log."""
    if not log.exists():
        return []
    return list(filter(None, map(record_of, log.read_text(encoding="utf-8", errors="replace").splitlines())))


def record_of(line: str) -> dict | None:
    """The JSON record at the end of a line of a fairseq log, if there is one."""
    start = line.find("{")
    if start < 0 or not line.endswith("}") or '"epoch"' not in line:
        return None
    try:
        return json.loads(line[start:])
    except json.JSONDecodeError:
        return None
