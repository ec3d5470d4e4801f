"""The charts of the report: one axes each, two colours that the colour-blind can tell apart, units on the axes."""

import io
import statistics
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from sacrebleu.metrics import BLEU

from ..training.run_folder import read_log

# Okabe and Ito (2008): blue and vermillion
STYLES = ({"color": "#0072B2", "linestyle": "-", "marker": "o"}, {"color": "#D55E00", "linestyle": "--", "marker": "s"})
LENGTH_EDGES = (1, 6, 11, 16, 21, 31, 41, 61)


@dataclass
class Chart:
    """A figure with its title, what it shows in a sentence or two, and the name of its files."""

    name: str
    title: str
    caption: str
    figure: Figure

    def svg(self) -> str:
        """The figure as an SVG element, without XML header, named for screen readers."""
        buffer = io.StringIO()
        with matplotlib.rc_context(
            {"svg.hashsalt": self.name}
        ):  # the same figure gives the same file, ids unlike others'
            self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Title": self.title})
        text = buffer.getvalue()
        return text[text.index("<svg") :].replace("<svg", '<svg role="img"', 1)

    def save(self, folder: Path) -> None:
        (folder / f"{self.name}.svg").write_text(self.svg(), encoding="utf-8")
        self.figure.savefig(folder / f"{self.name}.png", dpi=150)


def axes(xlabel: str, ylabel: str):
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    ax = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


def bars(ax, values: list[float], offset: float, style: dict, label: str) -> None:
    """One side's bars, beside those of the other: the second side's are hatched."""
    look = {"color": style["color"], "hatch": "" if offset < 0 else "//", "edgecolor": "white"}
    ax.bar(np.arange(len(values)) + offset, values, 0.4, label=label, **look)


def learning_curves(groups: dict[str, list]) -> list[Chart]:
    """Valid BLEU and nll over updates. groups: {label: runs}; runs without a log are left out."""
    charts = []
    for name, key, ylabel, what in (
        ("valid_bleu", "valid_bleu", "valid BLEU (fairseq, beam 1)", "BLEU on valid as fairseq-train logs it"),
        (
            "valid_nll",
            "valid_nll_loss",
            "valid nll (bits per token)",
            "Pure likelihood on valid, without smoothing or bonus",
        ),
    ):
        figure, ax = axes("updates", ylabel)
        for (label, runs), style in zip(groups.items(), STYLES, strict=True):
            curves = [[r for r in read_log(run.log) if key in r] for run in runs]
            curves = [points for points in curves if points]
            for number, points in enumerate(curves):
                x, y = ([float(r[field]) for r in points] for field in ("valid_num_updates", key))
                plural = "s" if len(curves) > 1 else ""
                legend = None if number else f"{label} ({len(curves)} seed{plural})"
                ax.plot(x, y, **style, markersize=3, linewidth=1, label=legend)
        if key == "valid_nll_loss":
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter("{x:g}")
        if ax.lines:
            ax.legend()
            charts.append(
                Chart(name, f"Learning curve: {ylabel}", f"{what}, after each epoch, one line a seed.", figure)
            )
    return charts


def seed_scores(comparison) -> list[Chart]:
    """sacreBLEU of each seed, a line from baseline to candidate where both have it."""
    charts = []
    for split, metrics in comparison.tests.items():
        result = metrics["sacreBLEU"]
        figure, ax = axes("", "sacreBLEU")
        for seed in set(result.baseline) & set(result.candidate):
            ax.plot([0, 1], [result.baseline[seed], result.candidate[seed]], color="#999999", linewidth=1, zorder=1)
        for x, (side, style) in enumerate(zip((result.baseline, result.candidate), STYLES, strict=True)):
            ax.scatter([x] * len(side), side.values(), color=style["color"], marker=style["marker"], zorder=2)
            ax.plot([x - 0.12, x + 0.12], [statistics.mean(side.values())] * 2, color=style["color"], linewidth=3)
        ax.set_xticks([0, 1], [comparison.baseline, comparison.candidate])
        ax.set_xlim(-0.5, 1.5)
        middle = statistics.mean(ax.get_ylim())
        reach = max(1, *(abs(limit - middle) for limit in ax.get_ylim()))  # no small gain drawn as a large one
        ax.set_ylim(middle - reach, middle + reach)
        caption = "A dot is a seed, a line joins the same seed, the bar is the mean."
        charts.append(Chart(f"seeds_{split}", f"sacreBLEU on {split}", caption, figure))
    return charts


def inside(groups: dict[str, list[dict]]) -> list[Chart]:
    """The pictures of analysis.py, means over seeds. groups: {label: analyses}."""
    charts = []

    def chart(name, title, caption, figure, ax):
        ax.legend()
        charts.append(Chart(name, title, caption, figure))

    def mean(analyses, *path):
        found = analyses
        for key in path:
            found = [analysis[key] for analysis in found]
        return np.mean(np.array(found, dtype=float), axis=0)

    def steps(ax, edges, values, style, label):
        ax.stairs(values, edges, color=style["color"], linestyle=style["linestyle"], linewidth=1.6, label=label)

    sides = [(label, analyses, style) for (label, analyses), style in zip(groups.items(), STYLES, strict=True)]

    figure, ax = axes("probability of the target", "share of the gradient (%)")
    for label, analyses, style in sides:
        steps(ax, analyses[0]["gradient"]["edges"], 100 * mean(analyses, "gradient", "share"), style, label)
    well = "; ".join(
        f"{label} {100 * mean(analyses, 'gradient', 'well_classified'):.0f}% on "
        f"{100 * mean(analyses, 'gradient', 'well_classified_tokens'):.0f}% of the tokens"
        for label, analyses, _ in sides
    )
    chart(
        "representation",
        "Representation: who feeds the decoder's output",
        f"Norm of the training loss's gradient at the decoder's output, by probability of the target. Well-classified "
        f"tokens (p > 0.5) get: {well}.",
        figure,
        ax,
    )

    figure, ax = axes("energy, -logit (nats)", "share of tokens (%)")
    for label, analyses, style in sides:
        for what, width in (("target", 1.8), ("others", 0.8)):
            edges = analyses[0]["energy"][what]["edges"]
            values = 100 * mean(analyses, "energy", what, "share")
            name = f"{label}, {'target' if what == 'target' else 'mean of other types'}"
            ax.stairs(values, edges, color=style["color"], linestyle=style["linestyle"], linewidth=width, label=name)
    gaps = "; ".join(f"{label} {mean(analyses, 'energy', 'gap'):.2f} nats" for label, analyses, _ in sides)
    ax.set_xlim(
        *_range(
            [
                (a["energy"][w]["edges"], a["energy"][w]["share"])
                for _, s, _ in sides
                for a in s
                for w in ("target", "others")
            ]
        )
    )
    chart("energy", "Energy of target and other types", f"The gap between the two means: {gaps}.", figure, ax)

    figure, ax = axes("margin to the best wrong type (nats)", "share of tokens (%)")
    for label, analyses, style in sides:
        steps(ax, analyses[0]["margin"]["edges"], 100 * mean(analyses, "margin", "share"), style, label)
    ax.axvline(0, color="#666666", linewidth=0.8)
    means = "; ".join(f"{label} {mean(analyses, 'margin', 'mean'):.2f} nats" for label, analyses, _ in sides)
    ax.set_xlim(*_range([(a["margin"]["edges"], a["margin"]["share"]) for _, s, _ in sides for a in s]))
    chart("margin", "Margin", f"Left of 0 another type is preferred. Mean margin: {means}.", figure, ax)

    figure, ax = axes("probability of the target", "share of tokens (%)")
    for label, analyses, style in sides:
        steps(ax, analyses[0]["probability"]["edges"], 100 * mean(analyses, "probability", "share"), style, label)
    means = "; ".join(f"{label} {mean(analyses, 'probability', 'mean'):.3f}" for label, analyses, _ in sides)
    chart("probability", "Probability of the target", f"Mean: {means}.", figure, ax)

    figure, ax = axes("confidence (probability of the guess)", "accuracy")
    ax.plot([0, 1], [0, 1], color="#666666", linewidth=0.8, label="perfect calibration")
    for label, analyses, style in sides:
        tokens = mean(analyses, "calibration", "tokens")
        confidence, accuracy = (mean(analyses, "calibration", key)[tokens > 0] for key in ("confidence", "accuracy"))
        ax.plot(confidence, accuracy, **style, markersize=4, linewidth=1.4, label=label)
    errors = "; ".join(f"{label} {mean(analyses, 'calibration', 'error'):.3f}" for label, analyses, _ in sides)
    caption = f"Below the diagonal the model is too sure. Expected calibration error (15 bins): {errors}."
    chart("calibration", "Calibration", caption, figure, ax)

    for key, title in (("accuracy", "Accuracy"), ("f1", "F1")):
        figure, ax = axes(
            "occurrences of the target type in train", f"token {title}" if key == "f1" else "token accuracy"
        )
        rows = [row for row in sides[0][1][0]["frequency"] if row["tokens"]]
        for offset, (label, analyses, style) in zip((-0.2, 0.2), sides, strict=True):
            values = [
                statistics.mean(
                    row[key] for analysis in analyses for row in analysis["frequency"] if row["from"] == r["from"]
                )
                for r in rows
            ]
            bars(ax, values, offset, style, label)
        ax.set_xticks(range(len(rows)), [f"{_span(r)}\n({r['tokens']:,})" for r in rows], fontsize=8)
        caption = (
            "Subwords, teacher-forced, by how often the type stands in train; in brackets the tokens of the range."
        )
        chart(f"frequency_{key}", f"{title} of frequent and rare types", caption, figure, ax)
    return charts


def bleu_by_length(split: str, groups: dict[str, list[list[str]]], references: list[str], bleu: BLEU) -> Chart:
    """Corpus BLEU of the sentences whose reference has so many words. groups: {label: hypotheses of each seed}."""
    lengths = np.array([len(reference.split()) for reference in references])
    bins = list(zip(LENGTH_EDGES, (*LENGTH_EDGES[1:], np.inf), strict=True))
    bins = [(low, high) for low, high in bins if ((lengths >= low) & (lengths < high)).any()]
    figure, ax = axes("words in the reference", "sacreBLEU")
    for offset, (label, systems), style in zip((-0.2, 0.2), groups.items(), STYLES, strict=True):
        values = []
        for low, high in bins:
            chosen = [i for i, n in enumerate(lengths) if low <= n < high]
            kept = [references[i] for i in chosen]
            values.append(statistics.mean(bleu.corpus_score([h[i] for i in chosen], [kept]).score for h in systems))
        bars(ax, values, offset, style, label)
    counts = [int(((lengths >= low) & (lengths < high)).sum()) for low, high in bins]
    names = [f"{low}+" if high == np.inf else f"{low}-{high - 1}" for low, high in bins]
    ax.set_xticks(
        range(len(bins)), [f"{name}\n({count:,})" for name, count in zip(names, counts, strict=True)], fontsize=8
    )
    ax.legend()
    caption = f"BLEU of the sentences of each length in {split}, mean over seeds; in brackets the sentences."
    return Chart(f"length_{split}", f"BLEU by sentence length, {split}", caption, figure)


def _range(histograms):
    """The span of the edges outside of which there is next to nothing, for all histograms."""
    low, high = [], []
    for edges, share in histograms:
        filled = np.nonzero(np.array(share) > 0.0005)[0]
        low.append(edges[filled[0]])
        high.append(edges[filled[-1] + 1])
    return min(low), max(high)


def _span(row):
    short = {1_000: "1k", 10_000: "10k", 100_000: "100k"}
    low, high = (short.get(row[key], row[key]) for key in ("from", "below"))
    if row["below"] == 1:
        return "0"
    return f"{low}+" if high is None else f"{low} to\n<{high}"
