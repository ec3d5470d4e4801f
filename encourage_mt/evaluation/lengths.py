"""Compare translations of short and long sentences: BLEU by the length of the reference, with intervals."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sacrebleu.metrics.bleu import BLEU

EDGES = (1, 6, 11, 16, 21, 31, 41, 61)
MIN_SENTENCES = 20  # a range with fewer is joined to the next shorter one
SAMPLES = 500

Interval = tuple[float, float, float]  # value, and both ends of its 95% interval


@dataclass
class LengthRange:
    """BLEU of the sentences in a range of lengths: of each side, and the gain of the second."""

    name: str
    sentences: int
    scores: dict[str, Interval]
    gain: Interval


def bleu_by_length(
    references: list[str], systems: dict[str, list[list[str]]], metric: BLEU, samples: int = SAMPLES
) -> list[LengthRange]:
    """Return the BLEU of baseline and candidate for each range of lengths, in tokens of the reference.

    systems: {label: translations of each seed}. A score is the mean over seeds; its interval comes from `samples`
    bootstrap samples of the sentences (Koehn 2004), which are the same for all systems.
    """
    counts = {label: np.array([count(side, references, metric) for side in seeds]) for label, seeds in systems.items()}
    lengths = np.array([len(metric.tokenizer(reference).split()) for reference in references])
    rng = np.random.default_rng(1)
    ranges = []
    for name, chosen in group(lengths).items():
        size = len(chosen)
        weights = np.vstack([np.ones(size), rng.multinomial(size, np.full(size, 1 / size), samples)])
        scores = {
            label: np.array([statistics.mean(score(row, metric) for row in rows) for rows in sums.swapaxes(0, 1)])
            for label, sums in ((label, weights @ side[:, chosen]) for label, side in counts.items())
        }
        baseline, candidate = scores.values()
        each = {label: interval(values) for label, values in scores.items()}
        ranges.append(LengthRange(name, size, each, interval(candidate - baseline)))
    return ranges


def group(lengths: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """Return {"6-10": indices, ...} for the ranges of lengths that occur; small ones are joined."""
    lengths = np.asarray(lengths)
    ranges: list[tuple[int, int | None, np.ndarray]] = []
    for low, high in zip(EDGES, (*EDGES[1:], None), strict=True):
        chosen = np.flatnonzero((lengths >= low) & (lengths < (high or np.inf)))
        if not len(chosen):
            continue
        if ranges and min(len(chosen), len(ranges[-1][2])) < MIN_SENTENCES:
            low, _, shorter = ranges.pop()
            chosen = np.concatenate([shorter, chosen])
        ranges.append((low, high, chosen))
    return {f"{low}-{high - 1}" if high else f"{low}+": chosen for low, high, chosen in ranges}


def count(hypotheses: list[str], references: list[str], metric: BLEU) -> list[list[int]]:
    """Return what BLEU is computed from, for each sentence: n-gram matches, n-grams, both lengths."""
    scores = [metric.corpus_score([line], [[other]]) for line, other in zip(hypotheses, references, strict=True)]
    return [[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores]


def score(counts: np.ndarray, metric: BLEU) -> float:
    """Return the BLEU of sentences from the sum of their counts."""
    *ngrams, length, reference_length = map(int, counts)
    half = len(ngrams) // 2
    return BLEU.compute_bleu(
        ngrams[:half], ngrams[half:], length, reference_length, metric.smooth_method, metric.smooth_value
    ).score


def interval(values: np.ndarray) -> Interval:
    """Return the first value, which is that of the whole set, and the 95% interval of the others."""
    low, high = np.percentile(values[1:], (2.5, 97.5))
    return float(values[0]), float(low), float(high)
