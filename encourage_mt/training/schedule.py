"""Compute, before a training starts, its number of updates and how many of them are warm-up."""

import numpy as np

from ..data.binarize import open_binarized
from ..data.manifest import POSITIONS, PreparedData
from ..environment import quiet_imports
from ..errors import UserError
from .launch import share_batch
from .run_folder import Run


def describe_schedules(runs: list[Run], processes: int) -> list[str]:
    """Return a line for each schedule among `runs`, and warnings where the warm-up is more than a third of it.

    Raises UserError if a sentence of train or valid does not fit the batch of a process, or if the training ends before
    it has the checkpoints that are averaged.
    """
    lines: dict[str, list[str]] = {}
    for run in {run.arm: run for run in runs}.values():  # seeds of an arm have the same
        epoch, whole, warmup = schedule(run, processes)
        if whole < epoch * run.average:
            raise UserError(
                f"average: {run.average} epochs are averaged, but {run.arm} ends after {whole / epoch:.1f} epochs; use "
                f"--set max-update={epoch * run.average} or more, or --set average=N with a smaller N (if the arm has "
                "its own length or average, change it in the arm)"
            )
        text = f"{epoch:,} updates per epoch, {whole:,} in all, {warmup:,} of them in warm-up"
        if 3 * warmup > whole:
            text += (
                "\nwarning: the warm-up is more than a third of the training, so the model may learn little; shorten "
                f"it, for example by --set warmup-updates={max(1, whole // 6)}, or train for longer"
            )
        lines.setdefault(text, []).append(run.arm)
    return [f"{', '.join(dict.fromkeys(arms))}: {text}" for text, arms in lines.items()]


def schedule(run: Run, processes: int) -> tuple[int, int, int]:
    """Return the updates of `run` in an epoch, in all and in warm-up, from the batches that fairseq makes."""
    share = share_batch(run.options, processes)
    batches = -(-count_batches(run, share["max-tokens"], share.get("batch-size")) // processes)
    epoch = -(-batches // share["update-freq"])
    number, unit = run.length
    return epoch, number if unit == "update" else number * epoch, int(run.options.get("warmup-updates", 0))


def count_batches(run: Run, max_tokens: int, batch_size: int | None) -> int:
    """Return the number of batches of train, sorted by length as fairseq sorts them."""
    with quiet_imports():
        from fairseq.data import data_utils

    data = run.prepared()
    prefix = data.data_bin / f"train.{data.source}-{data.target}"
    datasets = [open_binarized(f"{prefix}.{language}") for language in data.languages]
    source, target = (np.array(dataset.sizes, dtype=np.int64) for dataset in datasets)
    lengths = np.maximum(source, target)
    if lengths.max() > max_tokens:
        raise UserError(
            f"max-tokens: a training sentence has {lengths.max():,} pieces, but a batch of one process holds only "
            f"{max_tokens:,} tokens; use fewer --gpus, or a larger --set max-tokens=N"
        )
    check_positions(run, data)
    longest = 1 + max((side.longest for side in data.lengths_in_pieces.get("valid", {}).values()), default=0)
    valid_tokens = int(run.options.get("max-tokens-valid", run.options["max-tokens"]))
    if longest > valid_tokens:
        raise UserError(
            f"max-tokens-valid: a validation sentence has {longest:,} pieces, but a batch holds only {valid_tokens:,} "
            f"tokens; use --set max-tokens-valid={longest}"
        )
    order = np.lexsort((target, source))
    return len(data_utils.batch_by_size(order, None, lengths[order], max_tokens, batch_size))


def check_positions(run: Run, data: PreparedData) -> None:
    """Raise UserError if a sentence of valid has more pieces than a Transformer takes: fairseq would stop there."""
    skips = run.options.get("skip-invalid-size-inputs-valid-test")
    if skips or not str(run.options.get("arch", "")).startswith("transformer"):
        return
    for side, language in (("source", data.source), ("target", data.target)):
        if side == "source" and run.options.get("truncate-source"):
            continue
        lengths = data.lengths_in_pieces.get("valid", {}).get(language)
        positions = int(run.options.get(f"max-{side}-positions", POSITIONS))
        if lengths and lengths.longest >= positions:
            raise UserError(
                f"{data.folder}: a validation sentence has {lengths.longest:,} pieces, but fairseq takes at most "
                f"{positions - 1:,}; remove it from the text of valid, or use --set max-{side}-positions=N"
            )
