"""Compare two groups of runs, seed by seed, after checking that they are comparable."""

import statistics
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from tqdm import tqdm

from ..data.bitext import read_lines
from ..data.manifest import PreparedData
from ..errors import UserError
from ..files import Record
from ..training.run_folder import Run
from . import scoring
from .formatting import Table, escape, signature_lines
from .results import HEADLINE, Result, alarms_of, searches
from .significance import MetricComparison, paired_tests, sentences_needed

# of the settings, only these may differ between runs: in fp16 an update whose gradient overflows is not counted
NOT_COMPARED = ("checkpoints_sha256", "updates")


class Comparison(Record):
    """Two groups of runs: {test set: {metric: MetricComparison}}, and settings that should be the same but differ.

    A report adds measures, {kind: {test set: comparisons}}, of the kinds "words", "confidence" and "robustness".

    Kept as comparison.json; everything that follows from the scores is computed again when it is read.
    """

    remedy: ClassVar[str] = "make the report again"

    format: Literal[2] = 2
    baseline: str
    candidate: str
    tests: dict[str, dict[str, MetricComparison]]
    signatures: dict[str, str]
    differences: list[str]
    alarms: list[str] = []  # "RUN: reasons why its scores mean nothing"; there is no verdict then
    measures: dict[str, dict[str, list[MetricComparison]]] = Field(default_factory=dict)

    explanation: ClassVar[str] = (
        "p (bootstrap) and p (randomization) come from sacreBLEU's paired tests over the sentences of one seed's test "
        "set. They say nothing about other seeds. The bootstrap is in effect one-sided: if there is no difference, it "
        "falls below 0.05 about twice as often as the randomization. Gains of TER are reductions. Means "
        "are of the seeds that the gain compares, with their standard deviation; gains have a 95% confidence interval."
    )

    @model_validator(mode="after")
    def _check_headline(self):
        for split, metrics in self.tests.items():
            if HEADLINE not in metrics:
                raise ValueError(f"tests: {split}: has no {HEADLINE}")
        return self

    @classmethod
    def upgrade(cls, content: dict) -> dict:
        """Return a comparison of version 0.1, which differs only in having no `format`."""
        return {"format": 2, **content}

    def table(self, split: str) -> Table:
        """Return the scores of each seed of a test set, both tests over sentences, and the means."""
        header = ["metric", "seed", self.baseline, self.candidate, "gain", "p (bootstrap)", "p (randomization)"]
        rows = [row for result in self.tests[split].values() for row in result.rows()]
        return Table(f"scores_{split}", header, rows)

    def verdicts(self, split: str) -> list[str]:
        """Return a line for each metric of a test set, the headline's first, and one about power.

        If there are alarms, return one line that names them.
        """
        if self.alarms:
            return [f"No verdict: {'; '.join(self.alarms)}. Train these runs again, or leave them out."]
        metrics = sorted(self.tests[split].values(), key=lambda result: result.metric != HEADLINE)
        verdicts = [result.verdict(self.baseline, self.candidate) for result in metrics]
        return [*verdicts, *filter(None, [self.tests[split][HEADLINE].power()])]

    def markdown(self) -> str:
        """Return, for each test set, the scores of each seed, both tests over sentences, means and the verdict."""
        lines = []
        if self.differences:
            lines += [f"**These runs differ in more than the criterion**: {escape('; '.join(self.differences))}.", ""]
        for split in self.tests:
            verdict, *others = map(escape, self.verdicts(split))
            lines += [f"### {split}", "", self.table(split).markdown(), "", f"**{verdict}**", ""]
            lines += [*(f"{line}  " for line in others), ""]
        return "\n".join([*lines, self.explanation, "", *signature_lines(self.signatures)])


def compare(baseline: list[Run], candidate: list[Run], allow_differences: bool = False) -> Comparison:
    """Compare two groups of evaluated runs on their test sets; each group has the seeds of one arm.

    Raises UserError if a run is not evaluated, a seed appears twice on a side, a translation has changed since it was
    scored, or (unless `allow_differences`) the runs differ in more than criterion and seed or two seeds are one model.
    """
    sides = [_by_seed(runs, name) for runs, name in ((baseline, "baseline"), (candidate, "candidate"))]
    shared = {run.folder for run, _ in sides[0].values()} & {run.folder for run, _ in sides[1].values()}
    if shared:
        raise UserError(f"{min(shared)}: is both a baseline and a candidate")
    everything = [result for side in sides for _, result in side.values()]
    unequal = check_comparable([[result for _, result in side.values()] for side in sides], allow_differences)
    data = PreparedData.open(baseline[0].data)
    tests = {split: _compare_scores(sides, split) for split in data.tests}
    jobs = [(split, seed) for split in tests for seed in sorted(set(sides[0]) & set(sides[1]))]
    needed: dict[str, list[int]] = {split: [] for split in tests}
    for split, seed in tqdm(jobs, desc="paired tests", unit="pair", leave=False):
        p_values, sentences = _compare_sentences([side[seed] for side in sides], split, data)
        needed[split].append(sentences)
        for metric, p in p_values.items():
            if metric in tests[split]:
                tests[split][metric].sentence_p[seed] = p
    for split, counts in needed.items():
        tests[split][HEADLINE].sentences_for_sought = round(statistics.mean(counts)) if counts else None
    signatures = {metric: everything[0].signatures[metric] for metrics in tests.values() for metric in metrics}
    names = _names(*(next(iter(side.values())) for side in sides))
    return Comparison(
        baseline=names[0],
        candidate=names[1],
        tests=tests,
        signatures=signatures,
        differences=unequal,
        alarms=alarms_of(everything),
    )


def check_comparable(groups: list[list[Result]], allow_differences: bool) -> list[str]:
    """Return one line for each difference that should not exist.

    These are settings that differ between any results, criteria or searches that differ within a group, and models that
    occur twice in a group. Raises UserError that names them, unless `allow_differences`.
    """
    everything = [result for results in groups for result in results]
    unequal = differences(everything)
    updates = [number for result in everything if isinstance(number := result.training.get("updates"), int)]
    stops_early = all("patience" in result.options for result in everything)
    if updates and not stops_early and max(updates) > 1.05 * min(updates):  # more than overflows in fp16 explain
        unequal.append(f"updates: {min(updates):,} to {max(updates):,}")
    for results in groups:
        unequal += [line for line in differences(results, ("criterion",)) if line not in unequal]
        if len(found := searches(results)) > 1:
            unequal.append(f"search of {results[0].arm}: {' or '.join(found)}")
        unequal += same_models(results)
    if unequal and not allow_differences:
        raise UserError(
            f"not comparable because the runs differ in {'; '.join(unequal)} (--allow-differences compares them anyway)"
        )
    return unequal


def _by_seed(runs, side):
    """Return {seed: (run, its result)} of one side."""
    by_seed = {}
    for run in runs:
        result = Result.read(run.folder)
        if result.seed in by_seed:
            raise UserError(f"{run.folder}: seed {result.seed} appears twice among the {side} runs")
        result.check_data(run.prepared())
        by_seed[result.seed] = (run, result)
    return by_seed


def _names(baseline, candidate):
    """Return the names of both sides: their arms or, if they are equal, the names or folders of their first runs."""
    for name in (lambda run, result: result.arm, lambda run, result: run.name, lambda run, result: str(run.folder)):
        names = [name(*side) for side in (baseline, candidate)]
        if names[0] != names[1]:
            break
    return names


def _compare_scores(sides, split):
    """Return {metric: MetricComparison} of the metrics that all runs have for a test set."""
    scores = [{seed: result.scores.get(split, {}) for seed, (_, result) in side.items()} for side in sides]
    metrics = [set(of_run) for side in scores for of_run in side.values()]
    if not all(HEADLINE in names for names in metrics):
        raise UserError(f"not every run has a {HEADLINE} of {split}; run `encourage-mt evaluate` on all of them")
    shared = [metric for metric in next(iter(scores[0].values())) if all(metric in names for names in metrics)]
    return {
        metric: MetricComparison(
            metric, *({seed: entry[metric].score for seed, entry in side.items()} for side in scores)
        )
        for metric in shared
    }


def _compare_sentences(pair, split, data):
    """Return {metric: {"bs": p, "ar": p}} and `sentences_needed` of two runs of one seed.

    Raises UserError if their translations are not those that were scored.
    """
    references = data.read_text(split, data.target)
    systems = [read_translation(run, split, data, references) for run, _ in pair]
    p_values = {}
    for metric, (*scores, p) in paired_tests(*systems, references, data.target, data.lowercase).items():
        for (run, result), score in zip(pair, scores, strict=True):
            recorded = result.scores[split].get(metric)
            if recorded is not None and not np.isclose(score, recorded.score, atol=1e-6):
                raise UserError(
                    f"{run.folder}: the translation of {split} has changed since it was scored; "
                    f"run `encourage-mt evaluate {run.folder}`"
                )
        p_values[metric] = p
    bleu = scoring.metrics(data.target, data.lowercase)[HEADLINE]
    return p_values, sentences_needed(systems, references, bleu)


def read_translation(run: Run, split: str, data: PreparedData, references: list[str]) -> list[str]:
    """Return the detokenized translation of a set. Raises UserError if it cannot be scored against `references`."""
    path = run.folder / f"{split}.{data.target}"
    lines = read_lines(path)
    try:
        scoring.check(lines, references)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return lines


def differences(results: list[Result], parts=("evaluation", "training", "signatures")) -> list[str]:
    """Return the settings in which results differ, as "name: value or value", each value once, in order."""
    differing = []
    for part in parts:
        settings = [_settings(result, part) for result in results]
        for name in dict.fromkeys(name for side in settings for name in side if name not in NOT_COMPARED):
            values = []
            for side in settings:
                if side.get(name) not in values:
                    values.append(side.get(name))
            if len(values) > 1:
                differing.append(f"{name}: {' or '.join(str(value)[:80] for value in values)}")
    return differing


def _settings(result: Result, part: str) -> dict[str, Any]:
    if part == "signatures":
        return {f"{metric} signature": signature for metric, signature in result.signatures.items()}
    return result.evaluation.model_dump() if part == "evaluation" else getattr(result, part)


def same_models(results: list[Result]) -> list[str]:
    """Return a line for each two results, of different seeds, whose averaged parameters are the same."""
    first: dict[str | None, Result] = {}
    repeated = []
    for result in results:
        before = first.setdefault(result.weights_sha256, result)
        if result.weights_sha256 and before is not result:
            repeated.append(f"seed: {before.name} and {result.name} are the same model")
    return repeated
