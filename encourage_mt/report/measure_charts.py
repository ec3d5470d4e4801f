"""Draw charts of where a loss helps: gains with their intervals, BLEU by coverage, calibration of translations."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..evaluation.confidence import SCORES
from ..evaluation.results import HEADLINE
from ..evaluation.selective import COVERAGE, SelectiveRun
from ..evaluation.significance import MetricComparison
from .charts import STYLES, Chart, axes, calibration


def gains(name: str, title: str, compared: Sequence[MetricComparison], xlabel: str) -> Chart:
    """Draw the gain of each measure, a positive one to the right, with both of its intervals.

    The label of a row is what follows the comma in the name of its measure.
    """
    figure, ax = axes(xlabel, "")
    figure.set_figheight(max(3.1, 0.9 + 0.2 * len(compared)))
    rows = np.arange(len(compared))
    for shift, color, label, intervals in (
        (-0.12, STYLES[1]["color"], "95% over sentences", [each.bootstrap_interval for each in compared]),
        (0.2, "#666666", "95% over seeds", [each.interval for each in compared]),
    ):
        kept = [
            (row, each.gain, *limits) for row, each, limits in zip(rows, compared, intervals, strict=True) if limits
        ]
        if kept:
            row, gain, low, high = np.array(kept).T
            reach = np.maximum(0, [gain - low, high - gain])
            ax.errorbar(gain, row + shift, xerr=reach, fmt="o", color=color, markersize=4, capsize=2, label=label)
    ax.axvline(0, color="#666666", linewidth=0.8)
    labels = [each.metric.split(", ", 1)[1] for each in compared]
    ax.set_yticks(rows, labels, fontsize=8)
    ax.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return Chart(name, title, "Right of 0 the second side is better. Mean over seeds.", figure)


def coverage(split: str, sides: dict[str, list[SelectiveRun]]) -> Chart:
    """Draw BLEU of the most confident sentences, by mean log-probability. sides: {label: runs}."""
    figure, ax = axes("sentences kept (%)", HEADLINE)
    score = list(SCORES).index("mean log-probability")
    areas = []
    for (label, runs), style in zip(sides.items(), STYLES, strict=True):
        curves = np.array([run.curves(np.arange(len(run.statistics))[None])[score, 0] for run in runs])
        ax.plot(100 * COVERAGE, curves.mean(axis=0), **style, markersize=3, linewidth=1.4, label=label)
        ax.fill_between(100 * COVERAGE, curves.min(axis=0), curves.max(axis=0), color=style["color"], alpha=0.15)
        gain = curves.mean() - curves[:, -1].mean()
        areas.append(f"{label} {curves.mean():.2f}, {gain:+.2f} against BLEU of all sentences")
    ax.legend()
    caption = (
        f"Sentences in the order of their mean log-probability; mean and range of the seeds. Area: {'; '.join(areas)}."
    )
    return Chart(f"coverage_{split}", f"BLEU of the most confident sentences, {split}", caption, figure)


def reliability(split: str, sides: dict[str, list[SelectiveRun]]) -> list[Chart]:
    """Draw the calibration of generated pieces and of sentences. sides: {label: runs}."""
    charts = []
    for index, (kind, right) in enumerate(
        {"pieces": "correct pieces", "sentences": "correct pieces a sentence"}.items()
    ):
        chart = calibration({label: [run.calibration()[index] for run in runs] for label, runs in sides.items()})
        chart.figure.axes[0].set(xlabel="mean probability of the generated pieces", ylabel=f"share of {right}")
        charts.append(replace(chart, name=f"calibration_{kind}_{split}", title=f"Calibration of {kind}, {split}"))
    return charts
