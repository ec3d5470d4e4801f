"""Train arms with several seeds, keep each run as one JSON file, and compare the arms; used by images and graphs."""

import argparse
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from tqdm import tqdm

from encourage_mt.arguments import Parser, count
from encourage_mt.atomic import atomic_write
from encourage_mt.environment import describe_hardware, versions
from encourage_mt.errors import UserError
from encourage_mt.evaluation.formatting import format_mean, format_p, markdown_table
from encourage_mt.evaluation.significance import MetricComparison, holm
from encourage_mt.files import Record, Scalar, read_record, write_record
from encourage_mt.processes import locked
from encourage_mt.report.charts import Chart, axes

COLORS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7")  # Okabe and Ito (2008)
NOTE = (
    "± is the standard deviation over seeds. A change is against the first arm, over the seeds that both arms have, "
    "with its 95% interval; p in tables is of the paired t-test and corrected for the number of arms (Holm), but not "
    "for the number of measures. Verdicts are not corrected."
)
TUNING_SEED = 0  # the seeds of the experiment start at 1
Options = dict[str, Scalar]  # of EncouragingLoss
Runs = dict[str, dict[int, "Result"]]  # {arm: {seed: result}}, the baseline first


class Result(Record):
    """A finished training: the options of the loss, the fixed settings of the script, {measure: value}, its cost."""

    remedy: ClassVar[str] = "remove it, and the run is trained again"

    format: Literal[1] = 1
    setting: str
    arm: str
    seed: int
    rate: float
    loss: Options
    training: dict[str, Scalar]
    measures: dict[str, float]
    cpu_seconds: float
    machine: str
    versions: dict[str, str]


def parser(description: str, arms: dict[str, Options], settings: tuple[str, ...], folder: str) -> Parser:
    """Return a parser with the options that both scripts have; their data options are added to it."""
    result = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, known, metavar in (("arms", tuple(arms), "ARM"), ("settings", settings, "SETTING")):
        text = f"{name} to train: {', '.join(known)} (default: all)"
        text += f"; {known[0]}, the baseline, is always among them" if name == "arms" else ""
        result.add_argument(f"--{name}", nargs="+", choices=known, default=known, metavar=metavar, help=text)
    text = "number of seeds: N trains seeds 1 to N (default: %(default)s)"
    result.add_argument("--seeds", type=count, default=10, metavar="N", help=text)
    text = "folder that has the files of the data set (default: download them)"
    result.add_argument("--raw-dir", type=Path, metavar="DIR", help=text)
    text = "folder for the runs; finished runs in it are not repeated (default: %(default)s)"
    result.add_argument("--work-dir", type=Path, default=Path(folder), metavar="DIR", help=text)
    text = "only write the report, from the finished runs of these arms, settings and seeds (default: train first)"
    result.add_argument("--report-only", action="store_true", help=text)
    return result


@dataclass
class Experiment:
    """Every arm with every seed in every setting. The first arm is the baseline.

    train(setting, options, seed, rate, tuning) returns the measures of a run; with `tuning`, those on a held-out part
    of the training set. If there are several `rates`, each arm gets the one with the best headline there.
    """

    title: str
    arguments: argparse.Namespace
    arms: dict[str, Options]
    rates: tuple[float, ...]
    headline: str
    training: dict[str, Scalar]
    train: Callable[[str, Options, int, float, bool], dict[str, float]]
    published: dict[str, dict[str, float]] = field(default_factory=dict)  # {setting: {arm: headline in the paper}}

    def __post_init__(self):
        baseline = next(iter(self.arms))
        self.chosen = {arm: self.arms[arm] for arm in self.arms if arm in (baseline, *self.arguments.arms)}
        self.seeds = range(1, self.arguments.seeds + 1)

    def run(self) -> None:
        """Train what is missing and write the report. Raises UserError if a finished run has other settings."""
        folder = self.arguments.work_dir
        if self.arguments.report_only and not folder.is_dir():
            raise UserError(f"{folder}: no such folder; name the one that has the finished runs with --work-dir")
        with locked(folder):
            if not self.arguments.report_only:
                self.train_missing()
            self.report()

    def train_missing(self) -> None:
        tuned = len(self.rates) if len(self.rates) > 1 else 0
        total = len(self.arguments.settings) * len(self.chosen) * (tuned + len(self.seeds))
        with tqdm(total=total, unit="run", smoothing=0) as bar:
            for setting in self.arguments.settings:
                best = {arm: self.best_rate(setting, arm, bar) for arm in self.chosen}
                for seed in self.seeds:
                    for arm, rate in best.items():
                        self.result(setting, arm, seed, rate, bar)

    def best_rate(self, setting: str, arm: str, bar: tqdm) -> float:
        if len(self.rates) == 1:
            return self.rates[0]
        tried = [self.result(setting, arm, TUNING_SEED, rate, bar) for rate in self.rates]
        return max(tried, key=lambda result: result.measures[self.headline]).rate

    def result(self, setting: str, arm: str, seed: int, rate: float, bar: tqdm) -> Result:
        """Return a run, from its file if it is finished."""
        tuning = seed == TUNING_SEED
        path = self.path(setting, arm, seed, rate)
        bar.set_description(f"{setting} {path.stem}")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            start = time.process_time()
            measures = self.train(setting, self.arms[arm], seed, rate, tuning)
            result = Result(
                setting=setting, arm=arm, seed=seed, rate=rate, loss=self.arms[arm], training=self.training,
                measures=measures, cpu_seconds=round(time.process_time() - start, 1),
                machine=describe_hardware("cpu"), versions=versions(),
            )  # fmt: skip
            write_record(path, result)
        bar.update()
        return self.read(path, arm, seed=seed, rate=rate)

    def path(self, setting: str, arm: str, seed: int, rate: float) -> Path:
        name = f"tuning/{arm}.rate{rate:g}" if seed == TUNING_SEED else f"{arm}.seed{seed}"
        return self.arguments.work_dir / setting / f"{name}.json"

    def read(self, path: Path, arm: str, **numbers: float) -> Result:
        """Return the run in a file. Raises UserError if it is damaged, or of another arm or other settings.

        numbers: the seed and, where it is known, the learning rate that the run must have.
        """
        result = read_record(path, Result)
        setting = path.relative_to(self.arguments.work_dir).parts[0]
        recorded = {"setting": result.setting, "arm": result.arm, **result.training, **result.loss}
        recorded |= {name: getattr(result, name) for name in numbers}
        expected = {"setting": setting, "arm": arm, **self.training, **self.arms[arm], **numbers}
        for name in {**expected, **recorded}:
            if recorded.get(name) != expected.get(name):
                remedy = "use the options of the finished runs, choose another --work-dir, or remove the file"
                raise UserError(f"{path}: {name}: is {recorded.get(name)}, now {expected.get(name)}; {remedy}")
        return result

    def finished(self, setting: str) -> Runs:
        runs = {}
        for arm in self.chosen:
            paths = {seed: self.path(setting, arm, seed, 0) for seed in self.seeds}
            runs[arm] = {seed: self.read(path, arm, seed=seed) for seed, path in paths.items() if path.exists()}
        return {arm: results for arm, results in runs.items() if results}

    def report(self) -> None:
        """Write report.md with tables, verdicts and pictures (SVG and PNG) of all finished runs, and print it."""
        folder = self.arguments.work_dir
        baseline, *others = self.chosen
        finished = {setting: self.finished(setting) for setting in self.arguments.settings}
        finished = {setting: runs for setting, runs in finished.items() if baseline in runs}
        if not finished:
            raise UserError(f"{folder}: has no finished run of {baseline}")
        title = f"{self.headline.capitalize()} in each setting:"
        lines = [f"# {self.title}", "", title, "", self.summary(finished), ""]
        for setting, runs in finished.items():
            lines += [f"## {setting}", "", table(runs, self.published.get(setting, {})), "", costs(runs), ""]
            lines += self.tuning_lines(setting)
            tests = {arm: compare(runs[baseline], runs[arm], self.headline) for arm in others if arm in runs}
            lines += [f"- {test.verdict(baseline, arm)}" for arm, test in tests.items()]
            charts = [changes_chart(setting, self.headline, tests)] if tests else []
            for chart in [*charts, *curve_charts(setting, runs)]:
                chart.save(folder)
                lines += ["", f"![{chart.title}]({chart.name}.svg)", "", chart.caption, ""]
        text = "\n".join([*lines, NOTE, ""])
        with atomic_write(folder / "report.md") as file:
            file.write(text)
        print(text)

    def summary(self, finished: dict[str, Runs]) -> str:
        """Return a table of the headline, two rows for each setting; a cell is empty if an arm has no runs there."""
        rows = []
        for setting, runs in finished.items():
            for row in measure_rows(setting, runs, self.headline):
                cells = dict(zip(runs, row[1:], strict=True))
                rows.append([row[0], *(cells.get(arm, "") for arm in self.chosen)])
        return markdown_table(["", *self.chosen], rows)

    def tuning_lines(self, setting: str) -> list[str]:
        """Return a table of the held-out headline by learning rate, empty where a rate is not yet tried."""
        rows = []
        for arm in self.chosen if len(self.rates) > 1 else ():
            paths = [self.path(setting, arm, TUNING_SEED, rate) for rate in self.rates]
            cells = [f"{self.read(p, arm).measures[self.headline]:.2f}" if p.exists() else "" for p in paths]
            rows += [[arm, *cells]] if any(cells) else []
        title = f"Held-out {self.headline} by learning rate, one seed:"
        return [title, "", markdown_table(["", *(f"{rate:g}" for rate in self.rates)], rows), ""] if rows else []


def compare(baseline: dict[int, Result], candidate: dict[int, Result], measure: str) -> MetricComparison:
    """Return the test over the seeds that both arms have, if there are at least two, or Welch's over all seeds."""
    sides = [{seed: run.measures[measure] for seed, run in side.items()} for side in (baseline, candidate)]
    return MetricComparison(measure, *sides)


def table(runs: Runs, published: dict[str, float]) -> str:
    """Return the rows of each measure, and before them a row of the `published` values, {arm: value}."""
    baseline = next(iter(runs))
    first = next(iter(runs[baseline].values()))
    rows = [["seeds", *(str(len(results)) for results in runs.values())]]
    rates = [sorted({run.rate for run in results.values()}) for results in runs.values()]
    rows.append(["learning rate", *(" or ".join(f"{rate:g}" for rate in side) for side in rates)])
    if published:
        rows.append(["in the paper", *(f"{published[arm]:.2f}" if arm in published else "" for arm in runs)])
    for measure in first.measures:
        rows += measure_rows(measure, runs, measure)
    return markdown_table(["", *runs], rows)


def measure_rows(title: str, runs: Runs, measure: str) -> list[list[str]]:
    """Return two rows: mean ± standard deviation of each arm, and its change with interval and p.

    A change is the arm's mean minus that of the first arm. p is corrected for the number of arms (Holm).
    """
    baseline, *others = runs
    means = [format_mean(run.measures[measure] for run in results.values()) for results in runs.values()]
    tests = [compare(runs[baseline], runs[arm], measure) for arm in others]
    corrected = holm([test.p for test in tests])
    changes = [f"{test.format_gain()} p {format_p(p)}" for test, p in zip(tests, corrected, strict=True)]
    return [[title, *means], ["change", "", *(change.removesuffix(" p ") for change in changes)]]


def costs(runs: Runs) -> str:
    results = [result for side in runs.values() for result in side.values()]
    machines = " or ".join(sorted({f"{each.machine}, torch {each.versions['torch']}" for each in results}))
    seconds = statistics.mean(each.cpu_seconds for each in results)
    return f"Trained on: {machines}; {seconds:.0f} seconds of CPU time a run, with all measures."


def changes_chart(setting: str, measure: str, tests: dict[str, MetricComparison]) -> Chart:
    """Draw the change of each arm against the baseline with its 95% interval."""
    figure, ax = axes(f"change in {measure} (points)", "")
    for row, test in enumerate(tests.values()):
        width = [[test.gain - test.interval[0]], [test.interval[1] - test.gain]] if test.interval else None
        ax.errorbar(test.gain, row, xerr=width, fmt="o", color="#0072B2", capsize=3)
    ax.axvline(0, color="#666666", linewidth=0.8)
    ax.set_yticks(range(len(tests)), list(tests))
    ax.set_ylim(len(tests) - 0.5, -0.5)
    name = re.sub(r"\W+", "_", f"{setting}_{measure}")
    caption = "Mean change against the baseline over the seeds that both have, with its 95% interval."
    return Chart(f"{name}_changes", f"{setting}: change in {measure}", caption, figure)


def curve_charts(setting: str, runs: Runs) -> list[Chart]:
    """Draw each group of measures named "NAME eps X" over X, one line for each arm."""
    names = next(iter(next(iter(runs.values())).values())).measures
    groups: dict[str, dict[float, str]] = {}
    for name in names:
        if match := re.fullmatch(r"(.+) eps ([\d.]+)", name):
            groups.setdefault(match[1], {})[float(match[2])] = name
    charts = []
    for group, points in groups.items():
        figure, ax = axes("eps (pixel range 0 to 1)", "accuracy (%)")
        for color, (arm, results) in zip(COLORS, runs.items(), strict=False):
            means = [statistics.mean(run.measures[name] for run in results.values()) for name in points.values()]
            ax.plot(list(points), means, color=color, marker="o", markersize=3, linewidth=1, label=arm)
        ax.set_xscale("log")
        ax.set_xticks(list(points), [f"{eps:g}" for eps in points])
        ax.minorticks_off()
        ax.legend(fontsize=7)
        name = re.sub(r"\W+", "_", f"{setting}_{group}")
        charts.append(Chart(name, f"{setting}: {group}", "Accuracy under the attack, mean over seeds.", figure))
    return charts
