"""Is the candidate better? Significance over sentences (sacreBLEU's tests) and over seeds (t-tests)."""

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from sacrebleu.significance import PairedTest
from scipy import stats
from tqdm import tqdm

from ..data.bitext import read_lines
from ..errors import UserError
from ..files import read_json
from ..training.run_folder import Run
from . import scoring

CONFIDENCE = 0.95
POWER = 0.8
MAX_SEEDS = 1000
HEADLINE = "sacreBLEU"


@dataclass
class Seeds:
    """One metric of one set, over seeds. `baseline` and `candidate` map a seed to its score.

    gain is the mean improvement (for TER the mean reduction), interval its 95% confidence interval and p the
    two-sided p-value of `test`, all None where a side has one seed. seeds_needed is the number a side that would show
    a gain of this size with 80% power, None if it is above 1,000 or the spread is unknown.
    """

    metric: str
    baseline: dict[int, float]
    candidate: dict[int, float]
    sentence_p: dict[int, dict[str, float]] = field(default_factory=dict)
    gain: float = 0.0
    interval: tuple[float, float] | None = None
    p: float | None = None
    test: str = ""
    seeds_needed: int | None = None

    def __post_init__(self):
        shared = sorted(set(self.baseline) & set(self.candidate))
        if len(shared) > 1 or (shared and set(self.baseline) == set(self.candidate)):
            gains = [self.improvement(seed) for seed in shared]
            self.gain = statistics.mean(gains)
            self.test = f"paired t-test over {len(shared)} seeds"
            if len(gains) > 1:
                spread = statistics.stdev(gains)
                self._test(stats.ttest_1samp, gains, 0.0, spread=spread)
                self.seeds_needed = seeds_needed(self.gain, spread)
            return
        sides = [[self.sign * score for score in side.values()] for side in (self.candidate, self.baseline)]
        self.gain = statistics.mean(sides[0]) - statistics.mean(sides[1])
        self.test = f"Welch's t-test, {len(sides[0])} against {len(sides[1])} seeds"
        if min(map(len, sides)) > 1:
            spread = math.sqrt(sum(statistics.variance(side) for side in sides))
            self._test(stats.ttest_ind, *sides, spread=spread, equal_var=False)
            self.seeds_needed = seeds_needed(self.gain, spread, groups=2)

    @property
    def sign(self) -> int:
        """-1 where less is better."""
        return -1 if self.metric == "TER" else 1

    def improvement(self, seed: int) -> float:
        """Of a seed that both sides have; positive where the candidate is better."""
        return self.sign * (self.candidate[seed] - self.baseline[seed])

    def _test(self, test, *samples, spread, **options):
        if spread == 0:  # where all gains are equal, t is infinite or undefined
            self.p, self.interval = (0.0 if self.gain else 1.0), (self.gain, self.gain)
            return
        result = test(*samples, **options)
        interval = result.confidence_interval(CONFIDENCE)
        self.p, self.interval = float(result.pvalue), (float(interval.low), float(interval.high))

    def rows(self) -> list[list[str]]:
        """Cells of a table: metric, seed, baseline, candidate, gain, p of both sentence-level tests; the mean last."""
        rows = []
        for seed in sorted(set(self.baseline) | set(self.candidate)):
            pair = [side.get(seed) for side in (self.baseline, self.candidate)]
            figures = ["" if score is None else f"{score:.2f}" for score in pair]
            gain = "" if None in pair else f"{self.improvement(seed):+.2f}"
            p = self.sentence_p.get(seed, {})
            rows.append(
                [self.metric, str(seed), *figures, gain, *(f"{p[n]:.3f}" if n in p else "" for n in ("bs", "ar"))]
            )
        means = [mean(list(side.values())) for side in (self.baseline, self.candidate)]
        rows.append([self.metric, "mean", *means, self.summary(), "", ""])
        return rows

    def summary(self) -> str:
        """The gain with its confidence interval."""
        return f"{self.gain:+.2f}" + (f" [{self.interval[0]:+.2f}, {self.interval[1]:+.2f}]" if self.interval else "")

    def verdict(self, baseline: str, candidate: str) -> str:
        """One line: better, worse, or not enough evidence and what it would take."""
        amount = f"{self.gain:+.2f} {self.metric}" + (" (reduction)" if self.metric == "TER" else "")
        if self.p is None:
            return (
                f"Not enough evidence: {amount} with one seed says nothing of other seeds. Train at least 2, better 5."
            )
        evidence = f"95% interval {self.interval[0]:+.2f} to {self.interval[1]:+.2f}, p = {self.p:.3g}, {self.test}"
        if self.p < 1 - CONFIDENCE:
            return f"{candidate} is {'better' if self.gain > 0 else 'worse'} than {baseline}: {amount} ({evidence})."
        needed = f"about {self.seeds_needed:,}" if self.seeds_needed else f"more than {MAX_SEEDS:,}"
        return (
            f"Not enough evidence that {candidate} and {baseline} differ: {amount} ({evidence}). With this spread, "
            f"{needed} seeds a side would show a gain of this size 4 times in 5."
        )


def seeds_needed(gain: float, spread: float, groups: int = 1) -> int | None:
    """Seeds a side for 80% power of a two-sided t-test at 5% (noncentral t, Cohen 1988); None above 1,000.

    spread: for groups=1 (paired) the standard deviation of the gain over seeds, for groups=2 the square root of the
    sum of both sides' variances.
    """
    if spread == 0:
        return 2 if gain else None
    for count in range(2, MAX_SEEDS + 1):
        freedom = groups * (count - 1)
        limit = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
        shift = abs(gain) / spread * math.sqrt(count)
        if stats.nct.sf(limit, freedom, shift) + stats.nct.cdf(-limit, freedom, shift) >= POWER:
            return count
    return None


@dataclass
class Comparison:
    """Two groups of runs. tests: {test set: {metric: Seeds}}; differences: what they ought to share and do not."""

    baseline: str
    candidate: str
    tests: dict[str, dict[str, Seeds]]
    signatures: dict[str, str]
    differences: list[str]

    explanation = (
        "p (bootstrap) and p (randomization): sacreBLEU's paired tests over the sentences of one seed's test set, "
        "which say nothing of other seeds; the bootstrap's is in effect one-sided and, where there is no difference, "
        "falls below 0.05 about twice as often as the randomization's. Gains of TER are reductions. Means with the "
        "standard deviation over seeds, gains with their 95% confidence interval."
    )

    def markdown(self) -> str:
        """Per test set: scores of each seed with the sentence-level tests, means, verdict; signatures beneath."""
        lines = []
        if self.differences:
            lines += [f"**These runs differ in more than the criterion**: {'; '.join(self.differences)}.", ""]
        for split, metrics in self.tests.items():
            lines += [f"### {split}", ""]
            header = ["metric", "seed", self.baseline, self.candidate, "gain", "p (bootstrap)", "p (randomization)"]
            lines += [markdown(header, [row for result in metrics.values() for row in result.rows()])]
            headline = metrics[HEADLINE].verdict(self.baseline, self.candidate)
            lines += ["", f"**{headline}**", ""]
            lines += [
                f"{r.verdict(self.baseline, self.candidate)}  " for name, r in metrics.items() if name != HEADLINE
            ]
            lines += [""]
        lines += [self.explanation, "", *as_lines(self.signatures)]
        return "\n".join(lines)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def as_lines(signatures: dict[str, str]) -> list[str]:
    """{metric: signature} as lines of Markdown."""
    return [f"{name} signature: `{signature}`  " for name, signature in signatures.items()]


def mean(scores: list[float], digits: int = 2) -> str:
    """Mean ± standard deviation; no deviation for one score."""
    spread = f" ± {statistics.stdev(scores):.{digits}f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.{digits}f}{spread}"


def read_comparison(path: Path) -> Comparison:
    """The content of a comparison.json; gains, intervals and p over seeds are computed from its scores anew.

    Raises UserError if it is missing or is not JSON.
    """
    content = read_json(path)

    def by_seed(values):
        return {int(seed): value for seed, value in values.items()}

    tests = {
        split: {
            metric: Seeds(metric, *(by_seed(kept[name]) for name in ("baseline", "candidate", "sentence_p")))
            for metric, kept in metrics.items()
        }
        for split, metrics in content["tests"].items()
    }
    return Comparison(**{**content, "tests": tests})


def compare(baseline: list[Run], candidate: list[Run], allow_differences: bool = False) -> Comparison:
    """Compare two groups of evaluated runs, each a number of seeds of one arm, on their test sets.

    Raises UserError if a run is not evaluated, a seed stands twice on a side, a translation is not the one that was
    scored, or (unless `allow_differences`) the runs differ in anything but criterion and seed.
    """
    sides = [{}, {}]
    for side, runs in zip(sides, (baseline, candidate), strict=True):
        for run in runs:
            result = results_of(run)
            if result["seed"] in side:
                raise UserError(f"{run.folder}: seed {result['seed']} stands twice on one side")
            if any(run.folder == other.folder for other, _ in sides[0].values()):
                raise UserError(f"{run.folder}: stands on both sides")
            side[result["seed"]] = (run, result)
    everything = [result for side in sides for _, result in side.values()]
    found = differences(everything)
    for side in sides:
        results = [result for _, result in side.values()]
        found += [f for f in differences(results, ("criterion",)) if f not in found]
    if found and not allow_differences:
        raise UserError(
            f"not comparable, the runs differ in {'; '.join(found)} (--allow-differences compares them all the same)"
        )
    names = [next(iter(side.values()))[1]["arm"] for side in sides]
    firsts = [next(iter(side.values()))[0] for side in sides]
    for naming in (lambda run: run.name, lambda run: str(run.folder)):
        if names[0] == names[1]:
            names = [naming(run) for run in firsts]
    text = read_json(baseline[0].data / "manifest.json")["text"]
    tests, signatures = {}, {}
    for split in text["tests"]:
        tests[split] = {}
        scored = [result["scores"].get(split, {}) for result in everything]
        for metric in [metric for metric in scored[0] if all(metric in scores for scores in scored)]:
            scores = [{s: r["scores"][split][metric]["score"] for s, (_, r) in side.items()} for side in sides]
            tests[split][metric] = Seeds(metric, *scores)
            signatures[metric] = scored[0][metric]["signature"]
        if HEADLINE not in tests[split]:
            raise UserError(f"not every run has a {HEADLINE} of {split}")
    jobs = [(split, seed) for split in tests for seed in sorted(set(sides[0]) & set(sides[1]))]
    for split, seed in tqdm(jobs, desc="paired tests", unit="pair", leave=False):
        pair = [side[seed] for side in sides]
        for test, by_metric in paired_tests(pair, split, text).items():
            for metric, p in by_metric.items():
                tests[split][metric].sentence_p.setdefault(seed, {})[test] = p
    return Comparison(*names, tests, signatures, found)


def results_of(run: Run) -> dict:
    """The scores.json of `run`, and all its signatures as "signatures".

    Raises UserError if it is missing or holds a score that is no number.
    """
    path = run.folder / "scores.json"
    if not path.exists():
        raise UserError(f"{run.folder}: not scored yet; bash scripts/evaluate.sh {run.folder}")
    result = read_json(path)
    if not {"seed", "arm", "scores", "evaluation", "training", "criterion"} <= set(result):
        raise UserError(f"{path}: written by another version; remove it and evaluate again")
    result["signatures"] = {}
    for split, scores in result["scores"].items():
        for metric, entry in scores.items():
            result["signatures"][f"{metric} signature"] = entry["signature"]
            if not isinstance(entry["score"], (int, float)) or not math.isfinite(entry["score"]):
                raise UserError(f"{path}: {metric} of {split} is {entry['score']}, not a number")
    return result


def differences(results: list[dict], keys=("evaluation", "training", "signatures")) -> list[str]:
    """What `results` (scores.json) do not share, as "name: value | value", each value once, in order."""
    found = []
    for key in keys:
        for name in dict.fromkeys(name for result in results for name in result[key]):
            # in fp16 an update whose gradient overflows is not counted; the length that was set is compared
            if name in ("checkpoints_sha256", "updates"):
                continue
            values = []
            for result in results:
                if result[key].get(name) not in values:
                    values.append(result[key].get(name))
            if len(values) > 1:
                found.append(f"{name}: {' | '.join(str(value)[:80] for value in values)}")
    return found


def paired_tests(pair: list[tuple[Run, dict]], split: str, text: dict) -> dict[str, dict[str, float]]:
    """{"bs" (bootstrap) or "ar" (approximate randomization): {metric: p}} of sacreBLEU's own paired tests.

    They count chance differences above the observed one and not those equal to it, which where few sentences differ is
    most: two equal translations would get p = 0.0001. So p is 1 for equal scores, and never below 2^(1-k) where k
    sentences differ, the least that exchanging their translations at random can give.
    """
    references = read_lines(pair[0][0].data / "text" / f"{split}.{text['target']}")
    systems = []
    for run, _ in pair:
        path = run.folder / f"{split}.{text['target']}"
        hypotheses = read_lines(path)
        try:
            scoring.check(hypotheses, references)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        systems.append((str(run.folder), hypotheses))
    metrics = scoring.metrics(text["target"], text["lowercase"])
    differing = sum(a != b for a, b in zip(systems[0][1], systems[1][1], strict=True))
    found = {}
    for test in ("bs", "ar"):
        _, table = PairedTest(systems, metrics, [references], test_type=test)()
        columns = [column for name, column in table.items() if name != "System"]
        found[test] = {}
        for metric, column in zip(metrics, columns, strict=True):
            for (run, result), entry in zip(pair, column, strict=True):
                if not np.isclose(entry.score, result["scores"][split][metric]["score"], atol=1e-6):
                    raise UserError(f"{run.folder}: the translation of {split} is not the one that was scored")
            if np.isclose(*(entry.score for entry in column), atol=1e-6):
                found[test][metric] = 1.0
            else:
                found[test][metric] = max(float(column[1].p_value), 0.5 ** (differing - 1))
    return found
