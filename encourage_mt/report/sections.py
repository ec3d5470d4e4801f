"""Define the sections of the report: what each shows, and in which order."""

import difflib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from ..data.manifest import PreparedData
from ..errors import UserError
from ..evaluation import scoring
from ..evaluation.comparison import Comparison, read_translation
from ..evaluation.diagnostics import analyse
from ..evaluation.formatting import Table
from ..evaluation.lengths import bleu_by_length
from ..evaluation.results import HEADLINE
from ..evaluation.selective import SelectiveRun, compare_selective, measure_runs
from ..evaluation.significance import compared_seeds, correct, describe_correction, measures_table
from ..evaluation.words import compare_words
from ..robustness.measure import read_measured
from ..robustness.summary import Summary, summarize
from ..robustness.tables import FOREIGN_NOTE, NOISE_NOTE, foreign_table, noise_table
from ..training.run_folder import Run
from .charts import Chart, diagnostic_charts, learning_curves, length_charts, seed_scores
from .measure_charts import coverage, gains, reliability

logger = logging.getLogger(__name__)

SHOWN = 10  # translations on each side
DIAGNOSTICS_NOTE = (
    "Measured on the validation set with teacher forcing. The paper makes three claims: "
    "with the encouraging loss, well-classified tokens keep shaping the representation, the energy of the target falls "
    "relative to that of other tokens, and the margin grows. If a run was evaluated with a temperature, its logits "
    "are divided by it here too."
)
WHERE_NOTE = (
    "Words: F1 and accuracy of the translations by the training frequency of words, as compare-mt defines them "
    "(Neubig et al. 2019); the number of words in the references is in brackets. Confidence: if confidence "
    "predicts quality, BLEU of the most confident sentences is above that of all; the area is the mean over the shares "
    "kept. Calibration errors are in percent, and their gain is a reduction."
)
CORRECTION_NOTE = "The p-values in brackets are corrected for all comparisons of the page, as above."
SELECTION = "Selecting by confidence", "gain in area above BLEU of all"


@dataclass
class TranslatedSet:
    """One test set: source, references, and the translations of each side, {label: {seed: lines}}."""

    source: list[str]
    references: list[str]
    systems: dict[str, dict[int, list[str]]]


@dataclass
class Material:
    """What the sections are made of. groups: {label: runs}, the baseline first; sets: {test set: its texts}.

    robustness is what `encourage-mt robustness` measured, or None if it has not measured all runs; correction says how
    the p-values of all measures are corrected.
    """

    comparison: Comparison
    groups: dict[str, list[Run]]
    data: PreparedData
    sets: dict[str, TranslatedSet]
    selective: dict[str, list[dict[int, SelectiveRun]]]
    robustness: Summary | None
    correction: str

    @classmethod
    def read(cls, comparison: Comparison, groups: dict[str, list[Run]]) -> "Material":
        """Return the material of a comparison, whose measures are computed and recorded in it."""
        data = next(iter(groups.values()))[0].prepared()
        sets = {}
        for split in comparison.tests:
            source, references = data.read_text(split, data.source), data.read_text(split, data.target)
            systems = {
                label: {run.seed: read_translation(run, split, data, references) for run in runs}
                for label, runs in groups.items()
            }
            sets[split] = TranslatedSet(source, references, systems)
        runs, splits = list(groups.values()), list(comparison.tests)
        selective, robustness = measure_runs(runs, splits), summarize_measured(groups)
        comparison.measures.update(words=compare_words(runs, splits), confidence=compare_selective(selective))
        if robustness:
            comparison.measures["robustness"] = {
                test: list(chain.from_iterable(by_measure.values()))
                for test, by_measure in robustness.comparisons[comparison.candidate].items()
            }
        compared = [each for by_test in comparison.measures.values() for rows in by_test.values() for each in rows]
        correct(compared)
        return cls(comparison, groups, data, sets, selective, robustness, describe_correction(compared))

    def shown_seeds(self) -> list[int]:
        """Return the seed of each side whose translations are shown: the first that both have, or the first of each."""
        seeds = [[run.seed for run in runs] for runs in self.groups.values()]
        shared = [seed for seed in seeds[0] if seed in seeds[1]]
        return [shared[0]] * 2 if shared else [side[0] for side in seeds]


@dataclass
class Section:
    """A part of the page: a title, text, tables and charts. A section without tables and charts is left out."""

    title: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)

    def arrange(self) -> None:
        """Make rows of three charts, and of two where one would be left over; a single chart has the whole row."""
        pairs = {0: 0, 1: 2, 2: 1}[len(self.charts) % 3]  # rows of two
        for chart in self.charts[-2 * pairs :] if pairs else ():
            chart.width = 3 if len(self.charts) > 1 else 6
            chart.figure.set_size_inches(5.4, chart.figure.get_figheight())


def by_label(labels: Iterable[str], sides: Iterable[dict[int, Any]]) -> dict[str, list[Any]]:
    """Return {label: values of the seeds that are compared} of both sides."""
    return {label: list(side.values()) for label, side in zip(labels, compared_seeds(*sides), strict=True)}


def seeds_and_lengths(material: Material) -> Section:
    metric = scoring.metrics(material.data.target, material.data.lowercase)[HEADLINE]
    charts = seed_scores(material.comparison)
    for split, texts in material.sets.items():
        systems = by_label(texts.systems, texts.systems.values())
        charts += length_charts(split, bleu_by_length(texts.references, systems, metric))
    return Section("Seeds and sentence lengths", charts=charts)


def curves(material: Material) -> Section:
    return Section("Learning curves", charts=learning_curves(material.groups))


def diagnostics(material: Material) -> Section:
    try:
        analyses = {label: [analyse(run) for run in runs] for label, runs in material.groups.items()}
    except UserError as error:  # such as a model that is no Transformer, or removed training data
        logger.warning("diagnostics are left out: %s", error)
        return Section("Diagnostics")
    return Section("Diagnostics", DIAGNOSTICS_NOTE, charts=diagnostic_charts(analyses))


def where(material: Material) -> Section:
    """Show words, selective translation and calibration."""
    tables, charts = [], []
    for kind in ("words", "confidence"):
        for split, rows in material.comparison.measures[kind].items():
            tables.append(measures_table(f"{kind}_{split}", rows, *material.groups))
            shown = [row for row in rows if row.metric.startswith("F1" if kind == "words" else "area above")]
            title, xlabel = ("F1 by frequency in train", "gain in F1") if kind == "words" else SELECTION
            charts.append(gains(f"gains_{kind}_{split}", f"{title}, {split}", shown, xlabel))
    for split, sides in material.selective.items():
        runs = by_label(material.groups, sides)
        charts += [coverage(split, runs), *reliability(split, runs)]
    return Section("Where does it help?", f"{WHERE_NOTE} {material.correction}", tables, charts)


def robustness(material: Material) -> Section:
    """Show what `encourage-mt robustness` measured."""
    summary = material.robustness
    if not summary:
        return Section("Noise and out-of-distribution text")
    baseline, candidate = summary.arms
    tables, charts = [], []
    for test, by_measure in summary.comparisons[candidate].items():
        tables += [table for make in (noise_table, foreign_table) if (table := make(summary, test)).rows]
        for measure, compared in by_measure.items():
            name = f"{measure.split()[0].replace('+', '')}_{test}"
            tables.append(measures_table(f"gains_{name}", compared, baseline, candidate))
            charts.append(gains(f"gains_{name}", f"{measure}, {test}", compared, f"gain in {measure}"))
    note = f"{NOISE_NOTE} {FOREIGN_NOTE} {CORRECTION_NOTE}"
    return Section("Noise and out-of-distribution text", note, tables, charts)


def summarize_measured(groups: dict[str, list[Run]]) -> Summary | None:
    """Return what `encourage-mt robustness` measured, or None if it has not measured all runs."""
    measured = {label: {run.seed: read_measured(run) for run in runs} for label, runs in groups.items()}
    known = {label: {seed: record for seed, record in side.items() if record} for label, side in measured.items()}
    return summarize(known, []) if known == measured else None


# in the order of the page; the scores precede them, translations and runs follow
SECTIONS: tuple[Callable[[Material], Section], ...] = (seeds_and_lengths, where, robustness, curves, diagnostics)


def disagree(texts: TranslatedSet, seeds: list[int], lowercase: bool) -> dict[str, list[dict[str, Any]]]:
    """Return the sentences whose chrF++ differs most: {"Worst regressions": sentences, "Best gains": sentences}.

    seeds: that of the baseline and that of the candidate; lowercase: whether translations are in lower case. A sentence
    has line (from 1), source, reference, scores, gain, and for each output its words, each with whether the reference
    lacks it.
    """
    chrf = scoring.metrics("")["chrF++"]
    outputs = {label: side[seed] for (label, side), seed in zip(texts.systems.items(), seeds, strict=True)}
    rows: list[dict[str, Any]] = []
    for index, (source, reference) in enumerate(zip(texts.source, texts.references, strict=True)):
        pair = {label: lines[index] for label, lines in outputs.items()}
        if len(set(pair.values())) == 1:
            continue
        expected = reference.lower() if lowercase else reference
        scores = [chrf.sentence_score(line, [expected]).score for line in pair.values()]
        row = {"line": index + 1, "source": source, "reference": reference, "gain": scores[1] - scores[0]}
        marked = {label: mark_words(line, expected) for label, line in pair.items()}
        rows.append({**row, "scores": scores, "outputs": marked})
    rows.sort(key=lambda row: row["gain"])
    return {
        "Worst regressions": [row for row in rows if row["gain"] < 0][:SHOWN],
        "Best gains": [row for row in reversed(rows) if row["gain"] > 0][:SHOWN],
    }


def mark_words(line: str, reference: str) -> list[tuple[str, bool]]:
    """Return the words of `line`, each with whether it is missing from the words that both share in the same order."""
    words = line.split()
    changes = difflib.SequenceMatcher(None, words, reference.split(), autojunk=False).get_opcodes()
    return [(word, kind != "equal") for kind, start, end, *_ in changes for word in words[start:end]]
