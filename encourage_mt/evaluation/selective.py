"""Measure how well confidence predicts the quality of translations: selective translation, and calibration.

Selective translation keeps the most confident sentences and leaves the others to people or another system. Its
risk-coverage curve (Geifman and El-Yaniv 2017) is BLEU of the kept sentences over the share that is kept, here in steps
of 5%. The area is the mean of the curve. It is high if the model is good, or if confidence ranks sentences well; the
area above BLEU of all sentences, which is 0 on average for a random ranking, shows the ranking alone. If most sentences
share their confidence with others, and only a part of a group with equal confidence is kept, each sentence of the group
counts with the share that is kept.

The calibration error (Guo et al. 2017, equation 3, 15 bins) of pieces compares the probability of generated pieces with
the share that is correct as `confidence` defines it (Wang et al. 2020); that of sentences compares a sentence's mean
probability with its share of correct pieces, each sentence with weight 1.
"""

import numpy as np
from tqdm import tqdm

from ..training.run_folder import Run
from .comparison import read_translation
from .confidence import SCORES, Confidence, SetConfidence, measure_confidence
from .diagnostics import bin_by_confidence, calibrate
from .lengths import bleu, count
from .results import HEADLINE
from .scoring import metrics
from .significance import MetricComparison, Statistic, compare_resampled, count_draws

COVERAGE = np.arange(1, 21) / 20
AREAS = [f"area, {name}" for name in SCORES] + [f"area above all, {name}" for name in SCORES]
CALIBRATIONS = ["calibration error of pieces", "calibration error of sentences"]


class SelectiveRun:
    """One run and test set: BLEU statistics of its sentences, its confidence in each, and whether it was right."""

    def __init__(self, statistics: np.ndarray, confidence: SetConfidence):
        self.statistics = statistics.astype(np.float32)  # whole numbers, exact
        self.orders = []  # for each score: sentences, most confident first, and where each confidence starts
        for values in confidence.scores.values():
            doubt = -np.array(values)
            order = np.argsort(doubt, kind="stable")
            self.orders.append((order, np.unique(doubt[order], return_index=True)[1]))
        pieces = zip(confidence.probability, confidence.correct, strict=True)
        self.pieces = [(np.array(probability), np.array(correct)) for probability, correct in pieces]
        self.sentences = [(p.mean(keepdims=True), c.mean(keepdims=True)) if len(p) else (p, c) for p, c in self.pieces]

    def curves(self, drawn: np.ndarray) -> np.ndarray:
        """Return BLEU by COVERAGE for each of SCORES and sample of sentences: [scores, samples, coverages]."""
        kept = -(-np.arange(1, len(COVERAGE) + 1) * drawn.shape[1] // len(COVERAGE))  # rounded up
        ends, coverages = np.unique(kept, return_inverse=True)
        curves = []
        for order, starts in self.orders:
            if 2 * len(starts) < len(order):  # a few ties hardly change BLEU, and would cost five times the time
                curves.append(bleu(self._sums_with_ties(drawn, kept, order, starts)))
                continue
            rank = np.empty_like(order)
            rank[order] = np.arange(len(order))
            chosen = self.statistics[order[np.sort(rank[drawn], axis=1)]]
            curves.append(bleu(np.add.reduceat(chosen, [0, *ends[:-1]], axis=1).cumsum(axis=1)[:, coverages]))
        return np.array(curves)

    def _sums_with_ties(self, drawn, kept, order, starts) -> np.ndarray:
        """Return the summed statistics of the `kept` most confident sentences of each sample: [samples, kept, 10]."""
        counts = count_draws(drawn).T[order, :, None].astype(np.float32)
        columns = np.pad(self.statistics, ((0, 0), (0, 1)), constant_values=1)[order, None]  # the last counts sentences
        sums = np.add.reduceat(counts * columns, starts).cumsum(axis=0)
        sums = np.concatenate([np.zeros_like(sums[:1]), sums])  # [confidences, samples, 11]
        lowest = np.array([np.searchsorted(sizes, kept) for sizes in sums[:, :, -1].T])  # confidence that is kept
        sample = np.arange(len(drawn))[:, None]
        above, group = sums[lowest - 1, sample], sums[lowest, sample] - sums[lowest - 1, sample]
        return (above + group * ((kept - above[..., -1]) / group[..., -1])[..., None])[..., :-1]

    def areas(self, drawn: np.ndarray) -> np.ndarray:
        """Return each of AREAS, in BLEU: [samples, rows]."""
        curves = self.curves(drawn)
        areas = curves.mean(axis=2)
        return np.concatenate([areas, areas - curves[:, :, -1]]).T

    def calibration(self) -> list[dict]:
        """Return `diagnostics.calibrate` of pieces and of sentences."""
        return [calibrate(*map(np.concatenate, zip(*pairs, strict=True))) for pairs in (self.pieces, self.sentences)]

    def calibration_errors(self) -> Statistic:
        """Return the statistic of CALIBRATIONS, in percent."""
        tables = [np.stack([bin_by_confidence(*pair) for pair in pairs]) for pairs in (self.pieces, self.sentences)]

        def errors(drawn):
            sums = [np.tensordot(count_draws(drawn), table, axes=1) for table in tables]
            return np.stack([100 * np.abs(s[:, 1] - s[:, 2]).sum(axis=1) / s[:, 0].sum(axis=1) for s in sums], axis=1)

        return errors


def measure_runs(sides: list[list[Run]], splits: list[str]) -> dict[str, list[dict[int, SelectiveRun]]]:
    """Return {test set: [{seed: SelectiveRun} of baseline and of candidate]}; the models' passes take a while."""
    data = sides[0][0].prepared()
    scorer = metrics(data.target, data.lowercase)[HEADLINE]
    measured: dict[str, list[dict[int, SelectiveRun]]] = {split: [{}, {}] for split in splits}
    for side, runs in enumerate(sides):
        for run in tqdm(runs, desc="confidence", unit="run", leave=False):
            confidence: Confidence = measure_confidence(run)
            for split in splits:
                references = data.read_text(split, data.target)
                lines = read_translation(run, split, data, references)
                statistics = np.array(count(lines, references, scorer), dtype=float)
                measured[split][side][run.seed] = SelectiveRun(statistics, confidence.sets[split])
    return measured


def compare_selective(measured: dict[str, list[dict[int, SelectiveRun]]]) -> dict[str, list[MetricComparison]]:
    """Return AREAS and CALIBRATIONS of each test set, from `measure_runs`."""
    compared = {}
    for split, sides in measured.items():
        sentences = len(next(iter(sides[0].values())).statistics)
        areas: list[dict[int, Statistic]] = [{seed: run.areas for seed, run in side.items()} for side in sides]
        errors = [{seed: run.calibration_errors() for seed, run in side.items()} for side in sides]
        compared[split] = compare_resampled(AREAS, areas, sentences)
        compared[split] += compare_resampled(CALIBRATIONS, errors, sentences, lower_is_better=True)
    return compared
