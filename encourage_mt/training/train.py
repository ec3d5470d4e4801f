"""Train runs side by side, resume interrupted ones, and show the progress of each."""

import logging
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from ..environment import Precision, describe_hardware, git_revision, versions
from ..errors import UserError
from ..files import atomic_write
from ..plugin.worker import SAVED, STOPPED
from ..processes import describe_failure, job_environment, locked, not_through_a_link, program_path, start
from ..recipe import AVERAGE, Recipe
from .alarms import loss_alarm
from .launch import Cluster, hydra_config, launch_command
from .run_folder import Run, checkpoint_folder, record_of

logger = logging.getLogger(__name__)


def make_run(recipe: Recipe, arm: str, seed: int, data: Path, work_dir: Path, precision: Precision) -> Run:
    """Return the run of `arm`: the recipe's options, ours, and those of the arm's criterion. Nothing is written."""
    options = {
        "source-lang": recipe.source,
        "target-lang": recipe.target,
        "seed": seed,
        "update-freq": 1,
        **recipe.arm_train(arm),
        "eval-bleu": True,
        "eval-bleu-args": '{"beam": 1, "max_len_a": 1.2, "max_len_b": 10}',  # an untrained model would never stop
        "eval-bleu-remove-bpe": recipe.remove_bpe,
        # otherwise sacreBLEU would tokenize Moses' tokens and XML escapes again
        **({"eval-tokenized-bleu": True} if recipe.tokenizer == "moses" else {}),
        "best-checkpoint-metric": "bleu",
        "maximize-best-checkpoint-metric": True,
        # at least AVERAGE, so that another number of them can be averaged later
        "keep-last-epochs": max(recipe.arm_average(arm), AVERAGE),
        "log-format": "json",
        "log-interval": 20,
        "num-workers": 0,
        "required-batch-size-multiple": 1,
        **recipe.arms[arm].options,
    }
    return Run(
        folder=work_dir / f"{arm}.seed{seed}",
        recipe=recipe.name,
        arm=arm,
        seed=seed,
        data=data,
        options=options,
        average=recipe.arm_average(arm),
        beam=recipe.beam,
        lenpen=recipe.lenpen,
        precision=precision,
        provenance={},
    )


def with_provenance(run: Run, cluster: Cluster, threads: str) -> Run:
    """Return the run with its data's checksum and, unless it is done, the command that starts it and the machine.

    The command names the number of threads of each process, because another number rounds differently, as another
    instruction set and the loss without compiled code do.
    """
    import torch

    from ..loss.functional import missing_backend

    now = {
        "command": f"OMP_NUM_THREADS={threads} {shlex.join(launch_command(run, cluster))}",
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "processes": cluster.processes,
        "versions": versions(),
        "git_revision": git_revision(),
        "machine": describe_hardware(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),  # of torch's kernels and of the compiled loss
        "compiled_loss": not missing_backend("native", "cpu"),
    }
    provenance = {"data_sha256": run.prepared().checksum, "starts": [] if run.is_done else [now]}
    return run.model_copy(update={"provenance": provenance})


def train(runs: list[Run], cluster: Cluster, parallel: int) -> None:
    """Train the runs that are not done, `parallel` at a time, each on `cluster`; interrupted ones resume.

    Raises UserError before any training if a run's folder has links or contains a training with other options, and
    after all other trainings if one failed or another process has its folder. On SIGTERM the trainings save and stop,
    and this process exits with STOPPED.
    """
    waiting = [run for run in runs if not run.is_done]
    for run in waiting:
        for path in (run.folder, *run.folder.glob("*"), *run.folder.glob("checkpoints/*")):
            if path.is_symlink():
                raise UserError(f"{path}: is a link, and training would write through it; remove it")
    environment = job_environment(parallel * cluster.gpus)  # fixed, because rounding depends on the threads
    if cluster.node == 0:
        recorded = [with_provenance(run, cluster, environment["OMP_NUM_THREADS"]) for run in runs]
        for run in recorded:  # all folders are checked before anything is written
            run.earlier_starts()
        for run in recorded:
            if run.is_done:
                run.save()
    for run in runs:
        if run.is_done:
            logger.info("%s: trained already", run.name)
    if not waiting:
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))  # the trainings are stopped on the way out
    trainings = Trainings(waiting, cluster, parallel, environment)
    try:
        while trainings.waiting or trainings.active:
            trainings.step()
    except SystemExit:
        logger.warning("Stopping: each training saves a checkpoint first.")
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # they are saving
        saved = trainings.stop()
        signal.signal(signal.SIGTERM, before)
        if saved:
            logger.warning("Stopped and saved: %s. Run the same command again to continue.", ", ".join(saved))
    if trainings.failures:
        raise UserError("; ".join(trainings.failures))


class Trainings:
    """The trainings of `train`, waiting and running, with a progress bar over all of them."""

    def __init__(self, runs: list[Run], cluster: Cluster, parallel: int, environment: dict[str, str]):
        self.waiting, self.cluster, self.parallel = list(runs), cluster, parallel
        self.active: list[Training] = []
        self.failures: list[str] = []
        self.ended = 0.0  # trainings that ended; one that failed counts for the share it did
        self.next_line = 0.0  # when a log file gets its next line
        self.environment = {
            # seconds torchrun lets its workers save, at most; the checkpoint of a large model can take minutes. Before
            # torch 2.12 it is 30 seconds
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
            "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGQUIT",  # not the SIGHUP that nohup ignores
            **environment,
        }
        self.bar = progress_bar("all trainings", len(runs), "training", 0)

    def step(self) -> None:
        """Start trainings up to the number allowed at a time, wait a second, and handle those that ended."""
        while self.waiting and len(self.active) < self.parallel:
            run = self.waiting.pop(0)
            if run.is_done:  # by another process, meanwhile
                self.ended += 1
                continue
            slot = min(set(range(1, self.parallel + 1)) - {training.slot for training in self.active})
            try:
                self.active.append(Training(run, self.cluster, self.environment, slot))
            except UserError as error:  # such as another process that trains it
                self.failures.append(str(error))
            else:
                self.bar.initial += self.active[-1].share
        time.sleep(1)
        shown = sys.stderr.isatty() or time.monotonic() > self.next_line  # a log file gets a line a minute
        self.next_line = time.monotonic() + 60 if shown else self.next_line
        for training in list(self.active):
            code = training.process.poll()
            training.read()
            if shown or code is not None:
                training.bar.refresh()
            if code is not None:
                self.end(training, code)
        self.bar.n = self.ended + sum(training.share for training in self.active)
        if shown:
            self.bar.refresh()

    def end(self, training: "Training", code: int) -> None:
        """Record how a training ended. Exits with STOPPED if somebody sent it SIGTERM."""
        if code == STOPPED or (code and training.stopped_saved()):
            sys.exit(STOPPED)
        training.close()
        self.active.remove(training)
        self.ended += training.share if code else 1
        if code:
            self.failures.append(describe_failure("fairseq-train", code, training.log))
        elif self.cluster.node:
            return  # node 0 decides whether the training is done
        elif not list(checkpoint_folder(training.run.folder).glob("checkpoint*.pt")):
            # such as with a learning rate that fairseq takes for the end of the training
            self.failures.append(f"{training.run.name}: fairseq-train ended without a checkpoint ({training.log})")
        else:
            (training.run.folder / "train.done").touch()

    def stop(self) -> list[str]:
        """Stop all trainings and return the names of the ones that saved a checkpoint before they ended."""
        for training in self.active:
            training.process.terminate()
        saved = []
        for training in self.active:
            training.process.wait()
            training.close()
            code = training.process.returncode
            if training.stopped_saved():
                saved.append(training.run.name)
            elif code:
                logger.warning("Not saved: %s", describe_failure("fairseq-train", code, training.log))
        self.bar.close()
        return saved


def progress_bar(name: str, total: int, unit: str, slot: int) -> tqdm:
    layout = "{desc}: {n:.{digits}f}/{total} {unit}s |{bar:20}| {elapsed}<{remaining}{postfix}"
    layout = layout.replace("{digits}", "0" if unit == "update" else "1")
    return tqdm(total=total, desc=name, unit=unit, bar_format=layout, position=slot)


class Training:
    """A running fairseq-train, and its progress bar in line `slot` of the terminal."""

    def __init__(self, run: Run, cluster: Cluster, environment: dict[str, str], slot: int):
        self.run, self.slot = run, slot
        # each machine that shares the folder writes its own; node 0's is run.log
        self.log = run.log.with_name(f"train{cluster.node or ''}.log")
        self.before = self.log.stat().st_size if self.log.exists() else 0  # bytes of earlier starts
        words = launch_command(run, cluster)
        program_path("fairseq-train")
        watching = {"WANDB_NAME": run.name, "WANDB_DIR": str(run.folder)}  # for --wandb-project
        environment = {**watching, **environment, **cluster.devices(slot - 1)}
        with (
            locked(run.folder, cluster.node) as lock,
            open(self.log, "a", encoding="utf-8", opener=not_through_a_link) as log,
        ):
            if cluster.node == 0:
                with_provenance(run, cluster, environment["OMP_NUM_THREADS"]).save()
            if cluster.precision == "bf16":
                with atomic_write(cluster.hydra_file(run.folder)) as file:
                    file.write(hydra_config(run))
            self.process = start(words, stdout=log, stderr=subprocess.STDOUT, env=environment, pass_fds=[lock])
        self.bar = progress_bar(run.name, *run.length, slot)
        self.lines = open(self.log, encoding="utf-8", errors="replace")
        self.rest = ""
        self.bleu, self.note = "-", ""
        self.records: list[dict] = []
        self.alarm = ""
        self.read()
        self.bar.initial = self.bar.n  # earlier progress says nothing about the time left

    @property
    def share(self) -> float:
        """The share of the training that is done."""
        return self.bar.n / self.bar.total

    def read(self) -> None:
        """Update the bar, without drawing it, to the end of the log."""
        *lines, self.rest = (self.rest + self.lines.read()).split("\n")
        for line in lines:
            record = record_of(line)
            if record is None:
                self.note = ", validating" if "| begin validation on" in line else self.note
                continue
            self.note = ""  # a validation ends with its record
            self.records.append(record)
            self.bleu = record.get("valid_bleu", self.bleu)
            # "update" is the epoch with a fraction; an epoch's summary has "epoch" and "train_num_updates" instead
            names = ("update", "epoch") if self.bar.unit == "epoch" else ("num_updates", "train_num_updates")
            reached = record.get(names[0], record.get(names[1]) if "train_loss" in record else None)
            if reached is not None:
                self.bar.n = min(self.bar.total, max(self.bar.n, float(reached)))
        if lines:
            self.alarm = loss_alarm(self.records)
        alarm = f", ALARM: {self.alarm}" if self.alarm else ""
        self.bar.set_postfix_str(f"valid BLEU {self.bleu}{self.note}{alarm}", refresh=False)

    def stopped_saved(self) -> bool:
        """Return whether the log has the plugin's line that it saved; torchrun hides the exit code of workers."""
        return SAVED in self.log.read_bytes()[self.before :].decode(errors="replace")

    def close(self) -> None:
        self.bar.close()
        self.lines.close()
