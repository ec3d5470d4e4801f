"""Train runs side by side, resume what was interrupted, show how far each one is."""

import shlex
import subprocess
import time
from pathlib import Path

from tqdm import tqdm

from .commands import USER_DIR, failure, resolve, threads_per_job
from .errors import UserError
from .recipe import Recipe, as_flags
from .runs import Run, record_of


def make_run(recipe: Recipe, arm: str, seed: int, data: Path, work_dir: Path, fp16: bool) -> Run:
    """The run of `arm`: options of the recipe, then those of the arm's criterion. Recorded in its folder.

    Raises UserError if the folder holds a run with another command.
    """
    folder = work_dir / f"{arm}.seed{seed}"
    command = ["fairseq-train", str(data / "data-bin"), "--user-dir", str(USER_DIR)]
    command += ["--source-lang", recipe.source, "--target-lang", recipe.target, "--seed", str(seed)]
    command += as_flags(recipe.train)
    command += ["--eval-bleu", "--eval-bleu-args", '{"beam": 1}', "--eval-bleu-remove-bpe", recipe.remove_bpe]
    command += ["--best-checkpoint-metric", "bleu", "--maximize-best-checkpoint-metric"]
    command += ["--keep-last-epochs", str(recipe.average), "--save-dir", str(folder / "checkpoints")]
    command += ["--log-format", "json", "--log-interval", "20", "--num-workers", "0"]
    command += ["--required-batch-size-multiple", "1", *(["--fp16"] if fp16 else [])]
    command += as_flags(recipe.arms[arm])
    line = shlex.join(command)
    run = Run(folder, recipe.name, arm, seed, data, line, recipe.average, recipe.beam, recipe.lenpen)
    run.save()
    return run


def train(runs: "list[Run]", parallel: int, length: "tuple[int, str]") -> None:
    """Train what is not done, `parallel` at a time, to `length` (Recipe.length); fairseq resumes from its checkpoint.

    Raises UserError, after the other trainings have ended, if one fails.
    """
    waiting = [run for run in runs if not run.is_done]
    for run in runs:
        if run.is_done:
            print(f"{run.name}: trained already")
    if not waiting:
        return
    environment = threads_per_job(min(parallel, len(waiting)))
    whole = progress_bar("all trainings", len(waiting) * length[0], length[1], 0)
    active, ended, failures = [], 0, []
    try:
        while waiting or active:
            while waiting and len(active) < parallel:
                place = min(set(range(1, parallel + 1)) - {training.place for training in active})
                active.append(Training(waiting.pop(0), length, environment, place))
                whole.initial += active[-1].bar.initial
            time.sleep(1)
            for training in list(active):
                code = training.process.poll()
                training.show()
                if code is not None:
                    training.close()
                    active.remove(training)
                    ended += length[0]
                    if code:
                        failures.append(failure("fairseq-train", code, training.run.log))
                    else:
                        (training.run.folder / "train.done").touch()
            whole.n = ended + sum(training.bar.n for training in active)
            whole.refresh()
    finally:
        for training in active:
            training.process.terminate()
            training.close()
        whole.close()
    if failures:
        raise UserError("; ".join(failures))


def progress_bar(name: str, total: int, unit: str, place: int) -> tqdm:
    layout = "{desc}: {n:.{digits}f}/{total} {unit}s |{bar:20}| {elapsed}<{remaining}{postfix}"
    layout = layout.replace("{digits}", "1" if unit == "epoch" else "0")
    return tqdm(total=total, desc=name, unit=unit, bar_format=layout, position=place)


class Training:
    """A running fairseq-train and its progress bar in line `place` of the terminal."""

    def __init__(self, run: Run, length: "tuple[int, str]", environment: "dict[str, str]", place: int):
        self.run, self.place = run, place
        with open(run.log, "a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                resolve(shlex.split(run.command)), stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
            )
        self.bar = progress_bar(run.name, *length, place)
        self.lines = open(run.log, encoding="utf-8", errors="replace")
        self.rest = ""
        self.bleu = "-"
        self.show()
        self.bar.initial = self.bar.n  # what an interrupted training had done says nothing of the time left

    def show(self) -> None:
        """Bring the bar up to the end of the log."""
        *lines, self.rest = (self.rest + self.lines.read()).split("\n")
        for record in filter(None, map(record_of, lines)):
            self.bleu = record.get("valid_bleu", self.bleu)
            # "update" counts epochs, with a fraction; the summary of an epoch names it and its updates otherwise
            names = ("update", "epoch") if self.bar.unit == "epoch" else ("num_updates", "train_num_updates")
            reached = record.get(names[0], record.get(names[1]) if "train_loss" in record else None)
            if reached is not None:
                self.bar.n = min(self.bar.total, max(self.bar.n, float(reached)))
        self.bar.set_postfix_str(f"valid BLEU {self.bleu}")

    def close(self) -> None:
        self.bar.close()
        self.lines.close()
