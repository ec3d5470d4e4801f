"""Train the arms of a recipe side by side, resume what was interrupted, show how far each one is."""

import json
import shlex
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from .commands import USER_DIR, failure, resolve, threads_per_job
from .errors import UserError
from .recipe import Recipe, as_flags


@dataclass
class Run:
    """One training: an arm of a recipe with a seed. Its folder holds train.log, command.txt and checkpoints/."""

    arm: str
    folder: Path
    command: "list[str]"

    @property
    def log(self) -> Path:
        return self.folder / "train.log"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def is_done(self) -> bool:
        return (self.folder / "train.done").exists()


def make_run(recipe: Recipe, arm: str, seed: int, data: Path, work_dir: Path, fp16: bool) -> Run:
    """The run of `arm`: options of the recipe, then those of the arm's criterion.

    Raises UserError if the folder holds a run with another command.
    """
    folder = work_dir / f"{arm}.seed{seed}"
    command = ["fairseq-train", str(data / "data-bin"), "--user-dir", str(USER_DIR)]
    command += ["--source-lang", recipe.source, "--target-lang", recipe.target, "--seed", str(seed)]
    command += as_flags(recipe.train)
    command += ["--eval-bleu", "--eval-bleu-args", '{"beam": 1}', "--eval-bleu-remove-bpe", "sentencepiece"]
    command += ["--best-checkpoint-metric", "bleu", "--maximize-best-checkpoint-metric"]
    command += ["--keep-last-epochs", str(recipe.average), "--save-dir", str(folder / "checkpoints")]
    command += ["--log-format", "json", "--log-interval", "20", "--num-workers", "0"]
    command += ["--required-batch-size-multiple", "1", *(["--fp16"] if fp16 else [])]
    command += as_flags(recipe.arms[arm])
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "command.txt"
    line = shlex.join(command)
    if not record.exists():
        record.write_text(line + "\n", encoding="utf-8")
    elif record.read_text(encoding="utf-8") != line + "\n":
        raise UserError(f"{folder}: holds a training with another command (command.txt); choose another --work-dir")
    return Run(arm, folder, command)


def train(runs: "list[Run]", jobs: int, max_epoch: int) -> None:
    """Train what is not done, `jobs` at a time; fairseq resumes from checkpoint_last.pt.

    Raises UserError, after the other trainings have ended, if one fails.
    """
    waiting = [run for run in runs if not run.is_done]
    for run in runs:
        if run.is_done:
            print(f"{run.folder.name}: trained already")
    environment = threads_per_job(min(jobs, len(waiting) or 1))
    bars = {
        run.folder: tqdm(
            total=max_epoch,
            desc=run.folder.name,
            unit="epoch",
            bar_format="{desc}: {n:.1f}/{total} epochs |{bar:20}| {elapsed}<{remaining}{postfix}",
            mininterval=1,
        )
        for run in waiting
    }
    active, failures = {}, []
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.pop(0)
                with open(run.log, "a", encoding="utf-8") as log:
                    active[run.folder] = (
                        run,
                        subprocess.Popen(
                            resolve(run.command), stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
                        ),
                    )
            time.sleep(1)
            for folder, (run, process) in list(active.items()):
                show(bars[folder], read_log(run.log))
                if process.poll() is not None:
                    del active[folder]
                    if process.returncode:
                        failures.append(failure("fairseq-train", process.returncode, run.log))
                    else:
                        (folder / "train.done").touch()
    finally:
        for _, process in active.values():
            process.terminate()
        for bar in bars.values():
            bar.close()
    if failures:
        raise UserError("; ".join(failures))


def read_log(log: Path) -> "list[dict]":
    """The JSON records of a fairseq log, in order; values are the strings fairseq prints."""
    records = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        start = line.find("{")
        if start >= 0 and line.endswith("}") and '"epoch"' in line:
            try:
                records.append(json.loads(line[start:]))
            except json.JSONDecodeError:
                continue
    return records


def show(bar: tqdm, records: "list[dict]") -> None:
    position = [float(record["update"]) for record in records if "update" in record]
    finished = [int(record["epoch"]) for record in records if "train_loss" in record]
    bleu = [record["valid_bleu"] for record in records if "valid_bleu" in record]
    bar.n = min(bar.total, max(position[-1:] + finished[-1:], default=0))
    bar.set_postfix_str(f"valid BLEU {bleu[-1]}" if bleu else "valid BLEU -", refresh=True)


def summary(run: Run) -> dict:
    """{"target_tokens_per_second": mean over epochs, "train_seconds": time in updates, "epochs", "updates"}."""
    epochs = [record for record in read_log(run.log) if "train_loss" in record]
    rates = [float(record["train_wps"]) for record in epochs]
    return {
        "target_tokens_per_second": round(sum(rates) / len(rates), 1),
        "train_seconds": sum(float(record["train_train_wall"]) for record in epochs),
        "epochs": int(epochs[-1]["epoch"]),
        "updates": int(epochs[-1]["train_num_updates"]),
    }
