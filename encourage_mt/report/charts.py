"""Draw the charts of the report, in two colours that colour-blind readers can distinguish, with units on all axes."""

import io
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ..evaluation.comparison import Comparison
from ..evaluation.diagnostics import Analysis, FrequencyRange
from ..evaluation.lengths import Interval, LengthRange
from ..evaluation.results import HEADLINE
from ..evaluation.significance import compared_seeds
from ..training.run_folder import Run, read_log, rows_by_epoch

matplotlib.rcParams["text.parse_math"] = False  # a $ in a name, such as that of an arm, begins no formula
# Okabe and Ito (2008): blue and vermillion
STYLES = ({"color": "#0072B2", "linestyle": "-", "marker": "o"}, {"color": "#D55E00", "linestyle": "--", "marker": "s"})


@dataclass
class Chart:
    """A figure with its title, a caption of a sentence or two, and the name of its files; `width` is in sixths."""

    name: str
    title: str
    caption: str
    figure: Figure
    width: int = 2

    def svg(self) -> str:
        """Return the figure as an SVG element, without XML header, with a title for screen readers."""
        buffer = io.StringIO()
        # with its own salt, a figure always gives the same file, and its ids differ from those of other figures
        with matplotlib.rc_context({"svg.hashsalt": self.name}):
            self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Title": self.title})
        text = buffer.getvalue()
        return text[text.index("<svg") :].replace("<svg", '<svg role="img"', 1)

    def save(self, folder: Path) -> None:
        (folder / f"{self.name}.svg").write_text(self.svg(), encoding="utf-8")
        self.figure.savefig(folder / f"{self.name}.png", dpi=150)


@dataclass
class Side:
    """Baseline or candidate in a chart: its label, how it is drawn, and the analysis of each of its runs."""

    label: str
    style: dict[str, str]
    analyses: list[Analysis]

    def mean(self, name: str) -> np.ndarray:
        """Return the mean over runs of a field such as "margin.share"."""
        return np.mean([attrgetter(name)(analysis) for analysis in self.analyses], axis=0)

    def draw_histogram(self, ax, name: str, label: str = "", width: float = 1.6) -> None:
        """Draw the shares of a field such as "margin", in percent."""
        edges = attrgetter(name)(self.analyses[0]).edges
        line = {"color": self.style["color"], "linestyle": self.style["linestyle"], "linewidth": width}
        ax.stairs(100 * self.mean(f"{name}.share"), edges, label=label or self.label, **line)


def axes(xlabel: str, ylabel: str):
    figure = Figure(figsize=(4.4, 3.1), layout="constrained")
    ax = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


def learning_curves(groups: dict[str, list[Run]]) -> list[Chart]:
    """Draw valid BLEU and nll over updates. groups: {label: runs}; runs without a log are left out."""
    bleu = ("valid_bleu", "valid BLEU (fairseq, beam 1)", "BLEU on valid as fairseq-train logs it")
    nll = ("valid_nll_loss", "valid nll (bits per token)", "Pure likelihood on valid, without smoothing or bonus")
    charts = []
    for key, ylabel, meaning in (bleu, nll):
        figure, ax = axes("updates", ylabel)
        for (label, runs), style in zip(groups.items(), STYLES, strict=True):
            by_epoch = [rows_by_epoch(read_log(run.log), "valid_num_updates", key) for run in runs]
            curves = [list(rows.values()) for rows in by_epoch if rows]
            name = f"{label} ({len(curves)} seed{'s' if len(curves) > 1 else ''})"
            for number, points in enumerate(curves):
                x, y = zip(*points, strict=True)
                ax.plot(x, y, **style, markersize=3, linewidth=1, label=None if number else name)
        if key == "valid_nll_loss":
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.minorticks_off()
        if ax.lines:
            ax.legend()
            caption = f"{meaning}, after each epoch, one line per seed."
            charts.append(Chart(key.removesuffix("_loss"), f"Learning curve: {ylabel}", caption, figure))
    return charts


def seed_scores(comparison: Comparison) -> list[Chart]:
    """Draw sacreBLEU of each seed, with a line from baseline to candidate if both have the seed.

    There is no chart if no side has a second seed, because one seed shows no spread.
    """
    charts = []
    for split, metrics in comparison.tests.items():
        result = metrics[HEADLINE]
        if len(result.baseline) == len(result.candidate) == 1:
            continue
        figure, ax = axes("", HEADLINE)
        for seed in set(result.baseline) & set(result.candidate):
            ax.plot([0, 1], [result.baseline[seed], result.candidate[seed]], color="#999999", linewidth=1, zorder=1)
        sides = result.baseline, result.candidate
        for x, (side, compared, style) in enumerate(zip(sides, compared_seeds(*sides), STYLES, strict=True)):
            ax.scatter([x] * len(side), side.values(), color=style["color"], marker=style["marker"], zorder=2)
            ax.plot([x - 0.12, x + 0.12], [statistics.mean(compared.values())] * 2, color=style["color"], linewidth=3)
        ax.set_xticks([0, 1], [comparison.baseline, comparison.candidate])
        ax.set_xlim(-0.5, 1.5)
        middle = statistics.mean(ax.get_ylim())
        reach = max(1, *(abs(limit - middle) for limit in ax.get_ylim()))  # so that a small gain does not look large
        ax.set_ylim(middle - reach, middle + reach)
        caption = "Each dot is a seed, lines join dots of the same seed, and bars show the mean of the compared seeds."
        charts.append(Chart(f"seeds_{split}", f"sacreBLEU on {split}", caption, figure))
    return charts


def length_charts(split: str, ranges: list[LengthRange]) -> list[Chart]:
    """Draw BLEU and gain by length of the reference, each with its interval over sentences."""
    method = "mean over seeds. Lines are 95% intervals of a bootstrap over the sentences."
    bleu, ax = length_axes(ranges, HEADLINE)
    for shift, style, label in zip((-0.12, 0.12), STYLES, ranges[0].scores, strict=True):
        draw_intervals(ax, [each.scores[label] for each in ranges], style, shift, label)
    ax.set_ylim(bottom=0)
    ax.legend()
    gain, ax = length_axes(ranges, f"gain in {HEADLINE}")
    draw_intervals(ax, [each.gain for each in ranges], STYLES[1])
    ax.axhline(0, color="#666666", linewidth=0.8)
    caption = f"{' minus '.join(reversed(ranges[0].scores))}, {method}"
    return [
        Chart(f"length_{split}", f"BLEU by sentence length, {split}", f"BLEU of each length, {method}", bleu),
        Chart(f"length_gain_{split}", f"Gain by sentence length, {split}", caption, gain),
    ]


def length_axes(ranges: list[LengthRange], ylabel: str):
    figure, ax = axes("tokens in the reference (number of sentences)", ylabel)
    ax.set_xticks(range(len(ranges)), [f"{each.name}\n({each.sentences:,})" for each in ranges], fontsize=8)
    ax.set_xlim(-0.5, len(ranges) - 0.5)
    return figure, ax


def draw_intervals(ax, values: list[Interval], style: dict[str, str], shift: float = 0, label: str = "") -> None:
    """Draw points at 0, 1, ... (plus `shift`), with lines from the lower to the upper end of their intervals."""
    x = np.arange(len(values)) + shift
    middle, low, high = np.array(values).T
    ax.vlines(x, low, high, color=style["color"], linewidth=1.5)
    ax.plot(x, middle, color=style["color"], marker=style["marker"], linestyle="none", label=label or None)


def diagnostic_charts(groups: dict[str, list[Analysis]]) -> list[Chart]:
    """Draw the measurements of diagnostics.py, means over seeds. groups: {label: analyses}."""
    sides = [Side(label, style, side) for (label, side), style in zip(groups.items(), STYLES, strict=True)]
    calibrations = {side.label: [each.calibration.model_dump() for each in side.analyses] for side in sides}
    charts = [energy(sides), margin(sides), probability(sides), calibration(calibrations)]
    if all(analysis.gradient for side in sides for analysis in side.analyses):
        charts.insert(0, representation(sides))
    return charts + [by_frequency(sides, "accuracy", "token accuracy"), by_frequency(sides, "f1", "token F1")]


def representation(sides: list[Side]) -> Chart:
    figure, ax = axes("probability of the target", "share of the gradient (%)")
    for side in sides:
        side.draw_histogram(ax, "gradient")
    ax.legend()
    shares = "; ".join(
        f"{side.label} {100 * side.mean('gradient.well_classified'):.0f}% on "
        f"{100 * side.mean('gradient.well_classified_tokens'):.0f}% of the tokens"
        for side in sides
    )
    caption = (
        "Norm of the training loss's gradient, without R-Drop's divergence, at the decoder's output, by probability of "
        f"the target. Well-classified tokens (p > 0.5) get: {shares}."
    )
    return Chart("representation", "Representation: which tokens shape the decoder's output", caption, figure)


def energy(sides: list[Side]) -> Chart:
    figure, ax = axes("energy, -logit (nats)", "share of tokens (%)")
    for side in sides:
        side.draw_histogram(ax, "energy.target", f"{side.label}, target", width=1.8)
        side.draw_histogram(ax, "energy.others", f"{side.label}, mean of other types", width=0.8)
    ax.set_xlim(*filled_range(sides, "energy.target", "energy.others"))
    ax.legend()
    caption = f"The gap between the two means: {list_means(sides, 'energy.gap', '.2f', ' nats')}."
    return Chart("energy", "Energy of target and other types", caption, figure)


def margin(sides: list[Side]) -> Chart:
    figure, ax = axes("margin to the best wrong type (nats)", "share of tokens (%)")
    for side in sides:
        side.draw_histogram(ax, "margin")
    ax.axvline(0, color="#666666", linewidth=0.8)
    ax.set_xlim(*filled_range(sides, "margin"))
    ax.legend()
    caption = f"Left of 0 another type is preferred. Mean margin: {list_means(sides, 'margin.mean', '.2f', ' nats')}."
    return Chart("margin", "Margin", caption, figure)


def probability(sides: list[Side]) -> Chart:
    figure, ax = axes("probability of the target", "share of tokens (%)")
    for side in sides:
        side.draw_histogram(ax, "probability")
    ax.legend()
    caption = f"Mean: {list_means(sides, 'probability.mean', '.3f')}."
    return Chart("probability", "Probability of the target", caption, figure)


def calibration(sides: dict[str, list[dict[str, Any]]]) -> Chart:
    """Draw the fields of Calibration. sides: {label: those of each run}."""
    figure, ax = axes("confidence (probability of the prediction)", "accuracy")
    ax.plot([0, 1], [0, 1], color="#666666", linewidth=0.8, label="perfect calibration")
    for (label, runs), style in zip(sides.items(), STYLES, strict=True):
        tokens, *values = (np.array([run[name] for run in runs]) for name in ("tokens", "confidence", "accuracy"))
        filled = tokens.any(axis=0)  # a run without tokens in a bin does not count there
        confidence, accuracy = ((tokens * value).sum(axis=0)[filled] / tokens.sum(axis=0)[filled] for value in values)
        ax.plot(confidence, accuracy, **style, markersize=4, linewidth=1.4, label=label)
    ax.legend()
    errors = "; ".join(f"{label} {np.mean([run['error'] for run in runs]):.3f}" for label, runs in sides.items())
    caption = f"Below the diagonal the model is overconfident. Expected calibration error (15 bins): {errors}."
    return Chart("calibration", "Calibration", caption, figure)


def by_frequency(sides: list[Side], field: str, ylabel: str) -> Chart:
    figure, ax = axes("occurrences of the target type in train", ylabel)
    rows = {index: row for index, row in enumerate(sides[0].analyses[0].frequency) if row.tokens}
    for side, offset, hatch in zip(sides, (-0.2, 0.2), ("", "//"), strict=True):
        means = [np.mean([getattr(each.frequency[index], field) or 0 for each in side.analyses]) for index in rows]
        look = {"color": side.style["color"], "hatch": hatch, "edgecolor": "white"}
        ax.bar(np.arange(len(rows)) + offset, means, 0.4, label=side.label, **look)
    ax.set_xticks(range(len(rows)), [f"{name_range(row)}\n({row.tokens:,})" for row in rows.values()], fontsize=8)
    ax.legend()
    caption = "Predictions of subwords, by how often the type occurs in train; number of target tokens in brackets."
    title = f"{'F1' if field == 'f1' else 'Accuracy'} of frequent and rare types"
    return Chart(f"frequency_{field}", title, caption, figure)


def list_means(sides: list[Side], name: str, digits: str, unit: str = "") -> str:
    return "; ".join(f"{side.label} {side.mean(name):{digits}}{unit}" for side in sides)


def filled_range(sides: Iterable[Side], *names: str) -> tuple[float, float]:
    """Return the range of edges that contains nearly all values of all histograms."""
    low, high = [], []
    for histogram in (attrgetter(name)(analysis) for name in names for side in sides for analysis in side.analyses):
        filled = np.flatnonzero(np.array(histogram.share) > 0.0005)
        low.append(histogram.edges[filled[0]])
        high.append(histogram.edges[filled[-1] + 1])
    return min(low), max(high)


def name_range(row: FrequencyRange) -> str:
    if row.below == 1:
        return "0"
    low, high = (f"{edge // 1000}k" if edge and edge >= 1000 else edge for edge in (row.start, row.below))
    return f"{low}+" if high is None else f"{low} to\n<{high}"
