"""Average the parameters of the last checkpoints of a run (Vaswani et al. 2017, section 6.1)."""

import os
import re
from pathlib import Path

import torch

from . import safe_checkpoints
from .errors import UserError, first_line

PATTERNS = {"epoch": r"checkpoint(\d+)\.pt", "update": r"checkpoint_\d+_(\d+)\.pt"}


def last_checkpoints(run_dir: Path, count: int, kind: str = "epoch") -> "list[Path]":
    """The `count` newest epoch or update checkpoints in `run_dir`, oldest first; UserError if there are fewer."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such directory")
    numbered = {}
    for path in run_dir.iterdir():
        match = re.fullmatch(PATTERNS[kind], path.name)
        if match:
            numbered[int(match.group(1))] = path
    if len(numbered) < count:
        raise UserError(f"{run_dir}: {len(numbered)} {kind} checkpoints found, {count} asked for")
    return [numbered[number] for number in sorted(numbered)[-count:]]


def newest_checkpoint(run_dir: Path) -> Path:
    """checkpoint_last.pt or else the newest numbered checkpoint in `run_dir`; UserError if there is none."""
    last = run_dir / "checkpoint_last.pt"
    if last.exists():
        return last
    for kind in PATTERNS:
        try:
            return last_checkpoints(run_dir, 1, kind)[0]
        except UserError:
            continue
    raise UserError(f"{run_dir}: no checkpoints there, so this is not the folder of a training")


def average(paths: "list[Path]", output: Path) -> None:
    """Write the mean of the models in `paths` to `output`, complete or not at all.

    Sums in float32 (float64 stays) and holds the sum and one checkpoint at a time. What is not floating point, the
    options and the training state come from the last of `paths`; the optimizer's state is left out, for it does not
    fit the mean. Raises UserError on a file that is missing, damaged, not finite, or of
    another model.
    """
    total = {}
    for path in paths:
        state = model = value = None  # let go of the last checkpoint before the next is read
        state = load_checkpoint(path)
        model = state["model"]
        if total and _shapes(total) != _shapes(model):
            raise UserError(f"{path}: its parameters differ in name or shape from those of {paths[0]}")
        for name, value in model.items():
            if not value.is_floating_point():
                total[name] = value
            elif not value.isfinite().all():
                raise UserError(f"{path}: {name} holds values that are no numbers; the training has diverged")
            elif name in total:
                total[name] += value
            else:
                total[name] = value.to(torch.promote_types(value.dtype, torch.float32), copy=True)
    for name, value in total.items():
        if value.is_floating_point():
            total[name] = (value / len(paths)).to(model[name].dtype)
    state["model"] = total
    state.pop("last_optimizer_state", None)
    partial = output.with_name(output.name + ".tmp")
    try:
        torch.save(state, partial)
        os.replace(partial, output)
    except (OSError, RuntimeError) as error:  # torch.save reports a missing folder as RuntimeError
        partial.unlink(missing_ok=True)
        raise UserError(f"{output}: {' '.join(str(error).split())}") from None


def _shapes(model):
    return {name: value.shape for name, value in model.items()}


def load_checkpoint(path: Path) -> dict:
    """The state in a checkpoint file. Raises UserError if it is missing, damaged, or not to be loaded safely."""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        state = safe_checkpoints.load(path)
        state["model"].items()
    except Exception as error:  # what a damaged pickle raises is without end
        raise UserError(f"{path}: not a checkpoint that can be loaded safely ({first_line(error)})") from None
    return state
