"""Train runs side by side, resume what was interrupted, show how far each one is."""

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from ..data.prepare import data_checksum
from ..environment import USER_DIR, describe_hardware, git_revision, versions
from ..errors import UserError
from ..plugin.fault_tolerance import STOPPED
from ..processes import describe_failure, job_environment, locked, resolve
from ..recipe import Recipe, as_flags
from .launch import Cluster, hydra_config, launch_command
from .run_folder import Run, record_of


def make_run(recipe: Recipe, arm: str, seed: int, data: Path, work_dir: Path, precision: str) -> Run:
    """The run of `arm`: options of the recipe, then those of the arm's criterion. Nothing is written yet."""
    folder = work_dir / f"{arm}.seed{seed}"
    command = ["fairseq-train", str(data / "data-bin"), "--user-dir", str(USER_DIR)]
    command += ["--source-lang", recipe.source, "--target-lang", recipe.target, "--seed", str(seed)]
    command += as_flags({"update-freq": 1, **recipe.train})
    command += ["--eval-bleu", "--eval-bleu-args", '{"beam": 1}', "--eval-bleu-remove-bpe", recipe.remove_bpe]
    command += ["--best-checkpoint-metric", "bleu", "--maximize-best-checkpoint-metric"]
    kept = max(recipe.average, Recipe.average)  # so that another number of them can be averaged later
    command += ["--keep-last-epochs", str(kept), "--save-dir", str(folder / "checkpoints")]
    command += ["--log-format", "json", "--log-interval", "20", "--num-workers", "0"]
    command += ["--required-batch-size-multiple", "1", *as_flags(recipe.arms[arm])]
    line = shlex.join(command)
    return Run(folder, recipe.name, arm, seed, data, line, recipe.average, recipe.beam, recipe.lenpen, precision, {})


def record(run: Run, recipe: Recipe, cluster: Cluster) -> None:
    """Write run.json, with what is started now, and with what, unless the run is done.

    Raises UserError if the folder holds another training.
    """
    start = {
        "command": shlex.join(launch_command(recipe, shlex.split(run.command), cluster, run.folder)),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "processes": cluster.processes,
        "versions": versions(),
        "git_revision": git_revision(),
        "machine": describe_hardware(),
    }
    run.provenance = {"data_sha256": data_checksum(run.data), "starts": [] if run.is_done else [start]}
    run.save()


def train(runs: list[Run], recipe: Recipe, cluster: Cluster, parallel: int) -> None:
    """Train what is not done, `parallel` at a time, each on `cluster`; fairseq resumes from its last checkpoint.

    Raises UserError, after the other trainings have ended, if one fails or another process trains it. On SIGTERM the
    trainings save and stop, and so does this process, with interruption.STOPPED.
    """
    if cluster.node == 0:
        for run in runs:
            record(run, recipe, cluster)
    waiting = [run for run in runs if not run.is_done]
    for run in runs:
        if run.is_done:
            print(f"{run.name}: trained already")
    if not waiting:
        return
    length = recipe.length
    environment = job_environment(min(parallel, len(waiting)) * cluster.gpus)
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "100")  # seconds torchrun gives its workers to save
    whole = progress_bar("all trainings", len(waiting) * length[0], length[1], 0)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))  # by way of the finally below
    active, ended, failures, due = [], 0, [], 0.0
    try:
        while waiting or active:
            while waiting and len(active) < parallel:
                place = min(set(range(1, parallel + 1)) - {training.place for training in active})
                active.append(Training(waiting.pop(0), recipe, cluster, environment, place))
                whole.initial += active[-1].bar.initial
            time.sleep(1)
            shown = sys.stderr.isatty() or time.monotonic() > due  # a log file gets a line a minute
            due = time.monotonic() + 60 if shown else due
            for training in list(active):
                code = training.process.poll()
                training.read()
                if shown or code is not None:
                    training.bar.refresh()
                if code is not None:
                    training.close()
                    active.remove(training)
                    ended += length[0]
                    if code == STOPPED:
                        sys.exit(STOPPED)
                    if code:
                        failures.append(describe_failure("fairseq-train", code, training.run.log))
                    else:
                        (training.run.folder / "train.done").touch()
            whole.n = ended + sum(training.bar.n for training in active)
            if shown:
                whole.refresh()
    finally:
        for training in active:
            training.process.terminate()
        for training in active:
            training.process.wait()
            training.close()
        whole.close()
        signal.signal(signal.SIGTERM, before)
    if failures:
        raise UserError("; ".join(failures))


def progress_bar(name: str, total: int, unit: str, place: int) -> tqdm:
    layout = "{desc}: {n:.{digits}f}/{total} {unit}s |{bar:20}| {elapsed}<{remaining}{postfix}"
    layout = layout.replace("{digits}", "1" if unit == "epoch" else "0")
    return tqdm(total=total, desc=name, unit=unit, bar_format=layout, position=place)


class Training:
    """A running fairseq-train and its progress bar in line `place` of the terminal."""

    def __init__(self, run: Run, recipe: Recipe, cluster: Cluster, environment: dict[str, str], place: int):
        self.run, self.place = run, place
        command = shlex.split(run.command)
        run.folder.mkdir(parents=True, exist_ok=True)
        if cluster.precision == "bf16":
            partial = run.folder / f"train.yaml.{cluster.node}"  # each node writes the same
            partial.write_text(hydra_config(command), encoding="utf-8")
            partial.replace(run.folder / "train.yaml")
        argv = launch_command(recipe, command, cluster, run.folder)
        environment = {**environment, **cluster.devices(place - 1)}
        with locked(run.folder, cluster.node) as lock, open(run.log, "a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                resolve(argv), stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, pass_fds=[lock]
            )
        self.bar = progress_bar(run.name, *recipe.length, place)
        self.lines = open(run.log, encoding="utf-8", errors="replace")
        self.rest = ""
        self.bleu = "-"
        self.read()
        self.bar.initial = self.bar.n  # what an interrupted training had done says nothing of the time left

    def read(self) -> None:
        """Bring the bar, without drawing it, up to the end of the log."""
        *lines, self.rest = (self.rest + self.lines.read()).split("\n")
        for record in filter(None, map(record_of, lines)):
            self.bleu = record.get("valid_bleu", self.bleu)
            # "update" counts epochs, with a fraction; the summary of an epoch names it and its updates otherwise
            names = ("update", "epoch") if self.bar.unit == "epoch" else ("num_updates", "train_num_updates")
            reached = record.get(names[0], record.get(names[1]) if "train_loss" in record else None)
            if reached is not None:
                self.bar.n = min(self.bar.total, max(self.bar.n, float(reached)))
        self.bar.set_postfix_str(f"valid BLEU {self.bleu}", refresh=False)

    def close(self) -> None:
        self.bar.close()
        self.lines.close()
