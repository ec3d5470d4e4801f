"""Detect runs whose scores mean nothing: a loss that diverged, BLEU near zero, a warm-up that did not end."""

import math
from itertools import groupby
from typing import Any

import numpy as np

WINDOW = 5  # lines of the log whose median counts, so that a few unusual batches raise no alarm
RISE = 1.0  # bits per token above the best median, which is twice the perplexity
LEAST_BLEU = 1.0
LOSSES = ("loss", "train_loss", "valid_loss")  # of a line of the log, of an epoch, on valid


def loss_alarm(records: list[dict[str, Any]]) -> str:
    """Return what is wrong with the loss at the end of a log, or nothing. records: as `read_log` returns them.

    A loss diverges if the negative log-likelihood of the training batches is far above its best. That of valid does
    not count, because it also rises where a model overfits or becomes too sure.
    """
    last = {name: float(record[name]) for record in records for name in LOSSES if name in record}
    if not all(map(math.isfinite, last.values())):
        return "the loss is not finite"
    nll = [float(record.get("nll_loss", record["loss"])) for record in records if "loss" in record]
    if len(nll) < 2 * WINDOW:
        return ""
    medians = np.median(np.lib.stride_tricks.sliding_window_view(nll, WINDOW), axis=1)
    best, end = float(np.nanmin(medians)), float(medians[-1])
    return f"the loss diverges: {end:.2f} bits per token in training, after {best:.2f}" if end - best > RISE else ""


def final_alarms(records: list[dict[str, Any]], bleu: float) -> list[str]:
    """Return all that is wrong with a training that has ended. bleu: its best sacreBLEU over valid and tests."""
    alarms = [loss_alarm(records)]
    if bleu < LEAST_BLEU:
        alarms.append(f"not trained, sacreBLEU is below {LEAST_BLEU:g}: see the learning curves")
    rates = [float(record[name]) for record in records for name in ("lr", "train_lr") if name in record]
    rates = [rate for rate, _ in groupby(rates)]
    if len(rates) > 1 and rates[-1] > rates[-2]:
        alarms.append("the learning rate is still rising at the end: the training is shorter than its warm-up")
    return [alarm for alarm in alarms if alarm]
