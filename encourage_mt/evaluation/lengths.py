"""Compare translations of short and long sentences: BLEU by the length of the reference, with intervals."""

from dataclasses import dataclass

import numpy as np
from sacrebleu.metrics.bleu import BLEU

EDGES = (1, 6, 11, 16, 21, 31, 41, 61)
MIN_SENTENCES = 20  # a range with fewer is joined to its neighbour
SAMPLES = 500

Interval = tuple[float, float, float]  # value, and both ends of its 95% interval


@dataclass
class LengthRange:
    """BLEU of the sentences in a range of lengths: of each side, and the gain of the second."""

    name: str
    sentences: int
    scores: dict[str, Interval]
    gain: Interval


def bleu_by_length(references: list[str], systems: dict[str, list[list[str]]], metric: BLEU) -> list[LengthRange]:
    """Return the BLEU of baseline and candidate for each range of lengths, in tokens of the reference.

    systems: {label: translations of each seed}. A score is the mean over seeds; its interval comes from SAMPLES
    bootstrap samples of the sentences (Koehn 2004), which are the same for all systems.
    """
    counts = {label: np.array([count(side, references, metric) for side in seeds]) for label, seeds in systems.items()}
    lengths = np.array([len(metric.tokenizer(reference).split()) for reference in references])
    rng = np.random.default_rng(1)
    ranges = []
    for name, chosen in group(lengths).items():
        size = len(chosen)
        weights = np.vstack([np.ones(size), rng.multinomial(size, np.full(size, 1 / size), SAMPLES)])
        scores = {label: bleu(weights @ side[:, chosen]).mean(axis=0) for label, side in counts.items()}
        baseline, candidate = scores.values()
        each = {label: interval(values) for label, values in scores.items()}
        ranges.append(LengthRange(name, size, each, interval(candidate - baseline)))
    return ranges


def group(lengths: np.ndarray) -> dict[str, np.ndarray]:
    """Return {"6-10": indices, ...} for the ranges of lengths that occur; small ones are joined."""
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


def bleu(sums: np.ndarray) -> np.ndarray:
    """Return BLEU from sums of `count`, [..., 10], as sacreBLEU does: smoothed, and 0 without a match or a 4-gram."""
    matched, totals, translated, wanted = sums[..., :4], sums[..., 4:8], sums[..., 8], sums[..., 9]
    is_defined = matched.any(axis=-1) & totals.all(axis=-1)
    zeros = np.cumsum(matched == 0, axis=-1)
    precision = np.where(matched == 0, 0.5**zeros, matched) / np.maximum(totals, 1)
    penalty = np.minimum(0, 1 - wanted / np.maximum(translated, 1))
    return np.where(is_defined, 100 * np.exp(np.log(precision).mean(axis=-1) + penalty), 0)


def interval(values: np.ndarray) -> Interval:
    """Return the first value, which is that of the whole set, and the 95% interval of the others."""
    low, high = np.percentile(values[1:], (2.5, 97.5))
    return float(values[0]), float(low), float(high)
