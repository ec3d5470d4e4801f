"""Compare arms under noise and on foreign text: values of each seed, gains tested over seeds and over sentences."""

from collections.abc import Iterator
from itertools import product
from typing import Any, ClassVar, Literal

import numpy as np

from ..errors import UserError
from ..evaluation.comparison import check_comparable
from ..evaluation.confidence import SCORES
from ..evaluation.results import HEADLINE, Result, alarms_of, by_arm
from ..evaluation.significance import MetricComparison, Statistic, compare_resampled, correct, count_draws
from ..files import Record
from ..training.run_folder import Run
from .detection import Pair, auroc, fpr95, resampled_auroc
from .measure import CLEAN, LENGTH, REVERSED, SHUFFLED, Foreign, Noise, Robustness

CHRF_CHANGE = "chrF++ change"
NOISE = (f"{HEADLINE} change", CHRF_CHANGE, "consistency")
AUROC, MATCHED, FPR95 = FOREIGN = ("AUROC", "AUROC of equal length", "FPR95")
CONTROLS = {"total noise", "fewest pieces"}  # they only show that the measures work, and are not tested
BySeed = dict[int, Robustness]


class Row(Record):
    """Measures of one noise, or of one score on one foreign set: {measure: {arm: {seed: value}}}.

    The score of noise is empty. changed is the share of the sentences that the noise changes. A value that cannot be
    computed is None.
    """

    test: str
    name: str
    score: str = ""
    changed: float | None = None
    values: dict[str, dict[str, dict[int, float | None]]]


class Summary(Record):
    """What runs of several arms measured on the same text; the first arm is the baseline.

    clean is {test set: {arm: {seed: sacreBLEU of the clean text}}}, comparisons {arm: {test set: {measure: gains over
    the first arm}}}, with p-values that are corrected for the number of all of them.
    """

    remedy: ClassVar[str] = "make it again with `encourage-mt robustness`"

    format: Literal[1] = 1
    arms: list[str]
    clean: dict[str, dict[str, dict[int, float]]]
    rows: list[Row]
    comparisons: dict[str, dict[str, dict[str, list[MetricComparison]]]]
    signatures: dict[str, str]
    differences: list[str]

    def gains(self, arm: str) -> list[MetricComparison]:
        """Return all comparisons of an arm."""
        by_test = self.comparisons[arm].values()
        return [gain for by_measure in by_test for gains in by_measure.values() for gain in gains]


def group(runs: list[Run], allow_differences: bool = False) -> tuple[dict[str, dict[int, Run]], list[str]]:
    """Return {arm: {seed: run}} of evaluated runs, in their order, and why they should not be compared.

    These are settings that differ, and alarms. Raises UserError if a seed appears twice in an arm, a run was scored on
    other data, or as `check_comparable` does.
    """
    results = [Result.read(run.folder) for run in runs]
    arms: dict[str, dict[int, Run]] = {}
    for run, result in zip(runs, results, strict=True):
        if result.seed in arms.setdefault(result.arm, {}):
            raise UserError(f"{run.folder}: seed {result.seed} appears twice among the runs of {result.arm}")
        result.check_data(run.prepared())
        arms[result.arm][result.seed] = run
    return arms, [*check_comparable(list(by_arm(results).values()), allow_differences), *alarms_of(results)]


def summarize(arms: dict[str, BySeed], unequal: list[str]) -> Summary:
    """Return what the measurements {arm: {seed: ...}} show. unequal: the differences of the runs.

    Test sets, noise and foreign text that not all runs have measured alike are left out.
    """
    measured = [record for side in arms.values() for record in side.values()]
    tests = [test for test in measured[0].noise if all(CLEAN in record.noise.get(test, {}) for record in measured)]
    baseline, *others = arms
    rows: list[Row] = []
    comparisons: dict[str, dict[str, dict[str, list[MetricComparison]]]] = {arm: {} for arm in others}
    for test in tests:
        names = shared_names([record.noise[test] for record in measured])
        foreign = shared_names([record.foreign.get(test, {}) for record in measured])
        rows += [*noise_rows(test, names, arms), *foreign_rows(test, foreign, arms)]
        for arm in others:
            comparisons[arm][test] = compare_test(test, names, foreign, [arms[baseline], arms[arm]])
    summary = Summary(
        arms=list(arms),
        clean={test: bleu_of_clean(test, arms) for test in tests},
        rows=rows,
        comparisons=comparisons,
        signatures=measured[0].signatures,
        differences=unequal,
    )
    correct([gain for arm in others for gain in summary.gains(arm)])
    return summary


def bleu_of_clean(test: str, arms: dict[str, BySeed]) -> dict[str, dict[int, float]]:
    return {arm: {seed: record.noise[test][CLEAN].bleu for seed, record in side.items()} for arm, side in arms.items()}


def shared_names(sets: list[dict[str, Any]]) -> list[str]:
    """Return the names, except CLEAN, that all runs have with the same source; none if the source of CLEAN differs."""
    sources = [{name: (each.source_sha256, each.sentences) for name, each in of_run.items()} for of_run in sets]
    shared = [name for name in sources[0] if all(of_run.get(name) == sources[0][name] for of_run in sources)]
    return [name for name in shared if name != CLEAN] if CLEAN in shared else []


def noise_changes(record: dict[str, Noise], names: list[str]) -> dict[str, tuple[float, np.ndarray, np.ndarray]]:
    """Return {noise: (BLEU change of the set, chrF++ changes by sentence, consistency by sentence)}, as in NOISE.

    The attacks are summed up by sentence, as their mean and the lowest value of each measure.
    """
    clean, changes = record[CLEAN], {}
    for name in names:
        noisy = record[name]
        changes[name] = noisy.bleu - clean.bleu, np.subtract(noisy.chrf, clean.chrf), np.array(noisy.consistency)
    attacks = [changes.pop(name) for name in names if name.startswith("attack ")]
    if attacks:
        bleu, chrf, consistency = map(np.array, zip(*attacks, strict=True))
        changes[f"attack, mean of {len(attacks)}"] = bleu.mean(), chrf.mean(axis=0), consistency.mean(axis=0)
        changes[f"attack, worst of {len(attacks)}"] = np.nan, chrf.min(axis=0), consistency.min(axis=0)
    return changes


def noise_rows(test: str, names: list[str], arms: dict[str, BySeed]) -> Iterator[Row]:
    """Yield a row for each noise."""
    changes = {
        arm: {seed: noise_changes(record.noise[test], names) for seed, record in side.items()}
        for arm, side in arms.items()
    }
    first = next(iter(next(iter(arms.values())).values())).noise[test]
    for name in next(iter(next(iter(changes.values())).values())):
        values = {
            measure: {arm: {seed: finite(c[name][index]) for seed, c in side.items()} for arm, side in changes.items()}
            for index, measure in enumerate(NOISE)
        }
        yield Row(test=test, name=name, changed=first[name].changed if name in first else None, values=values)


def foreign_rows(test: str, names: list[str], arms: dict[str, BySeed]) -> Iterator[Row]:
    """Yield a row for each foreign set and score, in percent."""
    for name, score in product(names, (*SCORES, LENGTH)):
        values: dict[str, dict[str, dict[int, float | None]]] = {m: {arm: {} for arm in arms} for m in FOREIGN}
        for arm, side in arms.items():
            for seed, record in side.items():
                pair, lengths = (inside_outside(record.foreign[test], name, each) for each in (score, LENGTH))
                found = auroc(pair), auroc(pair, lengths), np.array(fpr95(pair))
                for measure, value in zip(FOREIGN, found, strict=True):
                    values[measure][arm][seed] = finite(100 * value)
        yield Row(test=test, name=name, score=score, values=values)


def inside_outside(record: dict[str, Foreign], name: str, score: str) -> Pair:
    return np.array(record[CLEAN].scores[score]), np.array(record[name].scores[score])


def finite(values: Any) -> float | None:
    mean = float(np.mean(values))
    return round(mean, 4) if np.isfinite(mean) else None


def compare_test(
    test: str, noise: list[str], foreign: list[str], sides: list[BySeed]
) -> dict[str, list[MetricComparison]]:
    """Return {measure: gains} of a candidate on a test set: chrF++ changes, AUROC of equal length of each score."""
    size = len(next(iter(sides[0].values())).noise[test][CLEAN].chrf)
    changes = [{seed: noise_changes(record.noise[test], noise) for seed, record in side.items()} for side in sides]
    names = [name for name in next(iter(changes[0].values())) if name not in CONTROLS]
    gains: dict[str, list[MetricComparison]] = {CHRF_CHANGE: [], MATCHED: []}
    if names:
        means = [{seed: resampled_means([c[n][1] for n in names]) for seed, c in side.items()} for side in changes]
        gains[CHRF_CHANGE] = compare_resampled([f"{CHRF_CHANGE}, {name}" for name in names], means, size)
    scores = [score for score in SCORES if score not in CONTROLS]
    for name in foreign:
        separations = [
            {
                seed: resampled_auroc(
                    [inside_outside(record.foreign[test], name, score) for score in scores],
                    inside_outside(record.foreign[test], name, LENGTH),
                    paired=name in (SHUFFLED, REVERSED),
                )
                for seed, record in side.items()
            }
            for side in sides
        ]
        gains[MATCHED] += compare_resampled([f"{MATCHED}, {name}, {score}" for score in scores], separations, size)
    return {measure: compared for measure, compared in gains.items() if compared}


def resampled_means(columns: list[np.ndarray]) -> Statistic:
    """Return the statistic of the means of columns with a value for each sentence."""
    values = np.stack(columns, axis=1)
    return lambda drawn: count_draws(drawn) @ values / len(values)
