"""Test whether two systems differ: t-tests over seeds, sacreBLEU's paired tests over sentences."""

import math
import statistics
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.significance import PairedTest
from scipy import stats
from tqdm import tqdm

from . import scoring
from .formatting import Table, format_mean, format_p
from .lengths import bleu, count
from .results import HEADLINE, FiniteScore

CONFIDENCE = 0.95
POWER = 0.8
MAX_SEEDS = 1000
SOUGHT = 0.4  # BLEU: about the gain that the paper reports on IWSLT
# Samples of the bootstrap over sentences: all, and at once. The smallest p, 0.0002, stays below 0.05 after Holm's
# correction for up to 250 measures.
SAMPLES, BLOCK = 10_000, 500
LARGEST_BLOCK = 5_000_000  # sentences that are drawn at once: 40 MB
ERROR_SAMPLES = 1000
Statistic = Callable[[np.ndarray], np.ndarray]  # from sentences that were drawn [samples, sentences], [samples, rows]


@dataclass
class MetricComparison:
    """One metric of one test set, over seeds. `baseline` and `candidate` map a seed to its score.

    sentence_p is {seed: {"bs" or "ar": p}} of `paired_tests`. The rest is computed from the scores: gain is the mean
    improvement (for TER the mean reduction), interval its 95% confidence interval and p the two-sided p-value of
    `test`, both None if a side has only one seed. seeds_needed is the number of seeds per side that would show a gain
    of this size with 80% power, seeds_for_sought, of sacreBLEU alone, those for a gain of SOUGHT; None if it is above
    1,000 or the spread is unknown. sentences_for_sought is the mean of `sentences_needed` over the seeds of both sides.

    `compare_resampled` adds bootstrap_interval and bootstrap_p over sentences, `correct` the p-values after Holm.
    """

    metric: str
    baseline: dict[int, FiniteScore]
    candidate: dict[int, FiniteScore]
    sentence_p: dict[int, dict[str, float]] = field(default_factory=dict)
    gain: float = 0.0
    interval: tuple[float, float] | None = None
    p: float | None = None
    test: str = ""
    seeds_needed: int | None = None
    seeds_for_sought: int | None = None
    sentences_for_sought: int | None = None
    lower_is_better: bool = False
    bootstrap_interval: tuple[float, float] | None = None
    bootstrap_p: float | None = None
    holm_p: float | None = None
    bootstrap_holm_p: float | None = None

    def __post_init__(self):
        if not (self.baseline and self.candidate):
            raise ValueError(f"{self.metric} needs a score on both sides")
        self.interval = self.p = self.seeds_needed = self.seeds_for_sought = None
        self.lower_is_better |= self.metric == "TER"
        shared = paired_seeds(self.baseline, self.candidate)
        if shared:
            gains = [self.improvement(seed) for seed in shared]
            self.gain = statistics.mean(gains)
            self.test = f"paired t-test over {len(shared)} seeds"
            if len(gains) > 1:
                spread = statistics.stdev(gains)
                self._test(stats.ttest_1samp, gains, 0.0, spread=spread)
                self._need_seeds(spread)
            return
        sides = [[self.sign * score for score in side.values()] for side in (self.candidate, self.baseline)]
        self.gain = statistics.mean(sides[0]) - statistics.mean(sides[1])
        self.test = f"Welch's t-test, {len(sides[0])} against {len(sides[1])} seeds"
        if min(map(len, sides)) > 1:
            spread = math.sqrt(sum(statistics.variance(side) for side in sides))
            self._test(stats.ttest_ind, *sides, spread=spread, equal_var=False)
            self._need_seeds(spread, groups=2)

    @property
    def has_spread(self) -> bool:
        """Whether the gains show how much seeds vary: there are several, and they are not all equal."""
        return self.interval is not None and self.interval[0] < self.interval[1]

    @property
    def sign(self) -> int:
        """-1 if a lower score is better, otherwise 1."""
        return -1 if self.lower_is_better else 1

    def improvement(self, seed: int) -> float:
        """Return the gain of a seed that both sides have; positive if the candidate is better."""
        return self.sign * (self.candidate[seed] - self.baseline[seed])

    def _test(self, test, *samples, spread, **options):
        if np.isclose(spread, 0):  # a measure of few words often has the same gain in every seed, which is no proof
            if self.bootstrap_p is None and np.isclose(self.gain, 0):
                self.p, self.interval = 1.0, (0.0, 0.0)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # scipy's, if the scores of one side are equal
            result = test(*samples, **options)
        interval = result.confidence_interval(CONFIDENCE)
        self.p, self.interval = float(result.pvalue), (float(interval.low), float(interval.high))

    def _need_seeds(self, spread, groups=1):
        self.seeds_needed = seeds_needed(self.gain, spread, groups)
        if self.metric == HEADLINE:
            self.seeds_for_sought = seeds_needed(SOUGHT, spread, groups)

    def rows(self) -> list[list[str]]:
        """Return rows of a table: metric, seed, baseline, candidate, gain, p of both tests over sentences; the mean.

        The mean is that of the seeds that are compared. A single seed has no row of the mean.
        """
        rows = []
        seeds = sorted(set(self.baseline) | set(self.candidate))
        for seed in seeds:
            pair = [side.get(seed) for side in (self.baseline, self.candidate)]
            scores = ["" if score is None else f"{score:.2f}" for score in pair]
            gain = "" if None in pair else f"{self.improvement(seed):+.2f}"
            p = self.sentence_p.get(seed, {})
            rows.append([self.metric, str(seed), *scores, gain, format_p(p.get("bs")), format_p(p.get("ar"))])
        if len(seeds) > 1:
            means = [format_mean(side.values()) for side in compared_seeds(self.baseline, self.candidate)]
            rows.append([self.metric, "mean", *means, self.format_gain(), "", ""])
        return rows

    def format_gain(self) -> str:
        """Return the gain with its confidence interval."""
        return f"{self.gain:+.2f}" + (f" [{self.interval[0]:+.2f}, {self.interval[1]:+.2f}]" if self.interval else "")

    def verdict(self, baseline: str, candidate: str) -> str:
        """Return one line: better, worse, or not enough evidence and how many seeds would be enough."""
        amount = f"{self.gain:+.2f} {self.metric}" + (" (reduction)" if self.metric == "TER" else "")
        if self.p is None or self.interval is None or not self.has_spread:
            return (
                f"Not enough evidence: {amount}, but one seed, or seeds with the same gain, do not show how much seeds "
                "vary. Train at least 2 seeds per side, or better 5."
            )
        p = f"p {'' if self.p < 0.001 else '= '}{format_p(self.p)}"
        evidence = f"95% interval {self.interval[0]:+.2f} to {self.interval[1]:+.2f}, {p}, {self.test}"
        if self.p < 1 - CONFIDENCE:
            return f"{candidate} is {'better' if self.gain > 0 else 'worse'} than {baseline}: {amount} ({evidence})."
        return (
            f"Not enough evidence that {candidate} and {baseline} differ: {amount} ({evidence}). With this spread, "
            f"{format_seeds(self.seeds_needed)} per side would detect a gain of this size with 80% power."
        )

    def power(self) -> str:
        """Return one line: how many seeds and sentences show a gain of SOUGHT BLEU; empty if neither is known."""
        ways = []
        if self.has_spread:
            ways.append(f"{format_seeds(self.seeds_for_sought)} per side (with this spread)")
        if self.sentences_for_sought:
            ways.append(f"about {self.sentences_for_sought:,} test sentences (between two models of one seed)")
        return f"Detecting a gain of {SOUGHT} {self.metric} with 80% power needs {'; '.join(ways)}." if ways else ""


def format_seeds(count: int | None) -> str:
    return f"about {count:,} seeds" if count else f"more than {MAX_SEEDS:,} seeds"


def paired_seeds(*sides: dict[int, Any]) -> list[int]:
    """Return the seeds of a paired test, which both sides have; none if that is only one and a side has others."""
    shared = sorted(set(sides[0]) & set(sides[1]))
    return shared if len(shared) > 1 or set(sides[0]) == set(sides[1]) else []


def compared_seeds(*sides: dict[int, Any]) -> list[dict[int, Any]]:
    """Return each side, {seed: value}, with the seeds of `paired_seeds` only, or with all if it has none.

    If there are not two sides, all seeds stay.
    """
    paired = paired_seeds(*sides) if len(sides) == 2 else []
    return [{seed: side[seed] for seed in paired or side} for side in sides]


def compare_resampled(
    names: Sequence[str], sides: Sequence[dict[int, Statistic]], sentences: int, lower_is_better: bool = False
) -> list[MetricComparison]:
    """Compare measures of a test set that are computed from its sentences; those that are not defined are left out.

    sides: {seed: statistic} of baseline and candidate; `names` are the rows of the statistics. Over sentences we draw
    SAMPLES test sets with replacement, the same for all runs (Koehn 2004). The interval has 95% of the mean gains, over
    the seeds that the test over seeds compares; p is twice the share of samples on the rarer side of no gain. A sample
    in which a measure is not defined, such as one without a rare word, is left out of the interval, but counts on both
    sides for p: a word that a third of the samples lack proves nothing.
    """
    scores = [{seed: statistic(np.arange(sentences)[None])[0] for seed, statistic in side.items()} for side in sides]
    averaged = compared_seeds(*sides)
    rng = np.random.default_rng(12345)
    sampled = []
    block = max(1, min(BLOCK, LARGEST_BLOCK // sentences))
    for start in tqdm(range(0, SAMPLES, block), desc="bootstrap over sentences", leave=False):
        drawn = rng.integers(sentences, size=(min(block, SAMPLES - start), sentences))
        means = [np.mean([statistic(drawn) for statistic in side.values()], axis=0) for side in averaged]
        sampled.append(means[1] - means[0])
    compared = []
    for row, name in enumerate(names):
        first, second = ({seed: float(score[row]) for seed, score in side.items()} for side in scores)
        if not np.isfinite([*first.values(), *second.values()]).all():
            continue
        values = np.concatenate(sampled)[:, row] * (-1 if lower_is_better else 1)
        gains = values[np.isfinite(values)]
        low, high = np.quantile(gains, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
        rarer = min(int((gains <= 0).sum()), int((gains >= 0).sum())) + len(values) - len(gains)
        p = min(1.0, 2 * (rarer + 1) / (len(values) + 1))
        over_sentences: dict[str, Any] = {"bootstrap_interval": (float(low), float(high)), "bootstrap_p": p}
        compared.append(MetricComparison(name, first, second, lower_is_better=lower_is_better, **over_sentences))
    return compared


def count_draws(drawn: np.ndarray) -> np.ndarray:
    """Return how often each sentence was drawn, [samples, sentences]."""
    samples, sentences = drawn.shape
    positions = drawn + sentences * np.arange(samples)[:, None]
    return np.bincount(positions.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(float)


def correct(comparisons: Sequence[MetricComparison]) -> None:
    """Set the p-values after Holm's correction for all of `comparisons`: over seeds, and over sentences."""
    for result, p, bootstrap_p in zip(
        comparisons, holm([c.p for c in comparisons]), holm([c.bootstrap_p for c in comparisons]), strict=True
    ):
        result.holm_p, result.bootstrap_holm_p = p, bootstrap_p


def describe_correction(comparisons: Sequence[MetricComparison]) -> str:
    """Return how many measures are compared, how many of them chance alone would show, and how p is corrected."""
    count, over_seeds = len(comparisons), sum(each.p is not None for each in comparisons)
    exception = f", except p over seeds, for the {over_seeds} that have one" if 0 < over_seeds < count else ""
    least = 2 / (SAMPLES + 1) * sum(each.bootstrap_p is not None for each in comparisons)
    limit = f" With so many comparisons, none over sentences can be below {least:.3f}: choose fewer."
    return (
        f"In all, there are {count} comparisons: if nothing differed, about {count / 20:.0f} of them would have "
        f"p < 0.05. The p-values in brackets are corrected for all {count} (Holm 1979){exception}; only they are "
        "evidence. p over sentences comes from a paired bootstrap and says nothing about other seeds."
        f"{limit if least >= 1 - CONFIDENCE else ''}"
    )


def measures_table(name: str, comparisons: Sequence[MetricComparison], baseline: str, candidate: str) -> Table:
    """Return a row for each measure: both sides, the gain, its intervals and p-values, those after Holm in brackets."""

    def interval(limits):
        return f"{limits[0]:+.2f} to {limits[1]:+.2f}" if limits else ""

    def p_values(p, corrected):
        return f"{format_p(p)} ({format_p(corrected)})" if p is not None else ""

    rows = [
        [
            result.metric,
            *(format_mean(side.values()) for side in compared_seeds(result.baseline, result.candidate)),
            f"{result.gain:+.2f}",
            *map(interval, (result.interval, result.bootstrap_interval)),
            p_values(result.p, result.holm_p),
            p_values(result.bootstrap_p, result.bootstrap_holm_p),
        ]
        for result in comparisons
    ]
    header = ["measure", baseline, candidate, "gain", "95% over seeds", "95% over sentences", "p over seeds (Holm)"]
    return Table(name, [*header, "p over sentences (Holm)"], rows)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p-values corrected for their number (Holm 1979), in the same order; None stays and is not counted.

    The k-th smallest of n is multiplied by n - k + 1, and none is below a smaller one. The chance of at least one
    corrected p below 0.05, if nothing differs, is at most 5%, however the tests depend on each other.
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, index) in enumerate(order):
        corrected[index] = least = max(least, min(1.0, p * (len(order) - rank)))
    return corrected


def seeds_needed(gain: float, spread: float, groups: int = 1) -> int | None:
    """Return the seeds per side for 80% power of a two-sided t-test at 5% (noncentral t, Cohen 1988); None above 1,000.

    spread: for groups=1 (paired) the standard deviation of the gain over seeds, for groups=2 the square root of the
    sum of both sides' variances.
    """
    if spread == 0:
        return 2 if gain else None

    def is_enough(count: int) -> bool:
        freedom = groups * (count - 1)
        limit = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
        shift = abs(gain) / spread * math.sqrt(count)
        other_side = np.nan_to_num(stats.nct.cdf(-limit, freedom, shift))  # scipy gives NaN where it is nearly 0
        return bool(stats.nct.sf(limit, freedom, shift) + other_side >= POWER)

    counts = range(2, MAX_SEEDS + 1)
    first = bisect_left(counts, True, key=is_enough)  # power grows with the number of seeds
    return counts[first] if first < len(counts) else None


def sentences_needed(systems: list[list[str]], references: list[str], metric: BLEU) -> int:
    """Return the sentences for 80% power to show a gain of SOUGHT BLEU between two models, by a two-sided test at 5%.

    The variance of the gain comes from ERROR_SAMPLES bootstrap samples of these sentences, and falls with their number.
    """
    first, second = (np.array(count(system, references, metric)) for system in systems)
    size = len(references)
    drawn = np.random.default_rng(1).multinomial(size, np.full(size, 1 / size), ERROR_SAMPLES)
    error = np.std(bleu(drawn @ second) - bleu(drawn @ first))
    both = stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER)
    return math.ceil(size * (both * error / SOUGHT) ** 2)


def paired_tests(
    baseline: list[str], candidate: list[str], references: list[str], language: str, lowercase: bool
) -> dict[str, tuple[float, float, dict[str, float]]]:
    """Return {metric: (baseline's score, candidate's score, {"bs": p, "ar": p})} of sacreBLEU's own paired tests.

    "bs" is the bootstrap, "ar" approximate randomization. They count chance differences above the observed one but not
    those equal to it, which are most of them if few sentences differ: two equal translations would get p = 0.0001.
    So p is 1 for equal scores, and at least 2^(1-k) if the metric's statistics of k sentences differ, the smallest
    value that exchanging their translations at random can give.
    """
    metrics = scoring.metrics(language, lowercase)
    systems: list[tuple[str, Sequence[str]]] = [("baseline", baseline), ("candidate", candidate)]
    tested: dict[str, tuple[float, float, dict[str, float]]] = {}
    for metric, scorer in metrics.items():
        rows = [scorer._extract_corpus_statistics(lines, [references]) for lines in (baseline, candidate)]
        scorer._extract_corpus_statistics = lambda lines, _, rows=rows: rows[lines is candidate]  # both tests need them
        least = 0.5 ** (sum(a != b for a, b in zip(*rows, strict=True)) - 1)
        for test in ("bs", "ar"):
            # one metric at a time, because sacreBLEU's table has one column for all metrics of a kind
            table: dict[str, Any] = PairedTest(systems, {metric: scorer}, [references], test_type=test)()[1]
            ((first, second),) = (column for name, column in table.items() if name != "System")
            p = 1.0 if np.isclose(first.score, second.score, atol=1e-6) else max(float(second.p_value), least)
            tested.setdefault(metric, (first.score, second.score, {}))[2][test] = p
    return tested
