"""Measure how well a confidence score separates in-distribution from out-of-distribution sentences.

- AUROC: the probability that a random in-distribution sentence has a higher score than a random out-of-distribution
  one; ties count one half (Hendrycks and Gimpel 2017). It is the Mann-Whitney U statistic divided by the number of
  pairs.
- AUROC of equal length: the same over pairs with equally long sources, so that a score that depends only on the length
  gets 0.5.
- FPR95: the share of out-of-distribution sentences that reach the score that 95% of the in-distribution ones reach
  (Liu et al. 2020).
"""

import numpy as np

from ..evaluation.significance import LARGEST_BLOCK, Statistic, count_draws

Pair = tuple[np.ndarray, np.ndarray]  # of the sentences inside and of those outside


def auroc(confidence: Pair, lengths: Pair | None = None, weights: Pair | None = None) -> np.ndarray:
    """Return the AUROC of confidences [n] inside and [m] outside: one for each row of `weights`.

    lengths, [n] and [m]: compare only pairs with equal ones. weights, [rows, n] and [rows, m]: how often each sentence
    counts, by default once in a single row. An AUROC without pairs is NaN.
    """
    size = len(confidence[0])
    values, strata = np.concatenate(confidence), np.concatenate(lengths or [np.zeros(len(side)) for side in confidence])
    order = np.lexsort((values, strata))
    values, strata = values[order], strata[order]
    starts = np.flatnonzero(np.concatenate([[True], (np.diff(values) != 0) | (np.diff(strata) != 0)]))
    weight = np.concatenate(weights, axis=1) if weights else np.ones((1, len(values)))
    weight = weight[:, order]
    inside, outside = (np.add.reduceat(weight * side, starts, axis=1) for side in (order < size, order >= size))
    strata = strata[starts]  # from here on, one column for each pair of length and confidence
    below = np.cumsum(outside, axis=1) - outside
    below -= below[:, np.searchsorted(strata, strata)]
    last = np.searchsorted(strata, strata, side="right") - 1
    pairs = (inside * (below + outside)[:, last]).sum(axis=1)
    wins = (inside * (below + outside / 2)).sum(axis=1)
    return np.divide(wins, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def fpr95(confidence: Pair) -> float:
    """Return the share of the sentences outside that reach the confidence which 95% of those inside reach."""
    threshold = np.sort(confidence[0])[len(confidence[0]) // 20]
    return float(np.mean(confidence[1] >= threshold))


def resampled_auroc(pairs: list[Pair], lengths: Pair, paired: bool) -> Statistic:
    """Return the statistic of the AUROC of equal length, in percent, of each pair of confidences.

    paired: each sentence outside is made from the sentence inside with the same index, so both are drawn together.
    Otherwise the sentences outside are drawn separately; the seed depends only on the sentences drawn inside, so the
    draws are the same for all runs.
    """
    size = len(lengths[1])

    def statistic(drawn: np.ndarray) -> np.ndarray:
        is_whole = len(drawn) == 1
        rng = np.random.default_rng(int(drawn.sum()))
        rows = max(1, LARGEST_BLOCK // sum(map(len, lengths)))  # a foreign text may be much larger than the test set
        parts = []
        for start in range(0, len(drawn), rows):
            inside = outside = drawn[start : start + rows]
            if not paired:
                outside = np.arange(size)[None] if is_whole else rng.integers(size, size=(len(inside), size))
            weights = count_draws(inside), count_draws(outside)
            parts.append(np.stack([auroc(pair, lengths, weights) for pair in pairs], axis=1))
        return 100 * np.concatenate(parts)

    return statistic
