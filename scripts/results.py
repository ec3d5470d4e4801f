"""Write the tables of README.md, docs/results.md and docs/robustness.md from the runs in results/.

    python scripts/results.py                  write the tables
    python scripts/results.py --add FOLDER     first copy the results of `encourage-mt run` in FOLDER: scores,
                                               diagnostics (measured if no report has them yet), learning curves,
                                               tuning, comparisons, and
                                               robustness.json if `encourage-mt robustness --output` wrote it there
    ... --into NAME                            copy them to results/NAME instead of the recipe's name, for runs that
                                               were evaluated in another way

A table is written between <!-- KIND: NAME [ARM ...] --> and <!-- end -->. KIND is arms, runs, diagnostics, curve,
tuning, robustness, published (the figures of a paper with ours), measures (of the report of el against ce, with
"words TEST" or "confidence TEST" instead of arms), or gains (of el over ce, with further NAMEs instead of arms); NAME
is the folder in results/, or, for measures and gains, NAME:BASELINE:CANDIDATE for arms other than ce and el; without
ARM all arms are shown, baselines first.
"""

import argparse
import re
import shutil
from pathlib import Path

from encourage_mt.atomic import atomic_write
from encourage_mt.errors import UserError, as_user_error, exit_on_user_error
from encourage_mt.evaluation.comparison import Comparison
from encourage_mt.evaluation.diagnostics import analyse
from encourage_mt.evaluation.results import HEADLINE, Result, Score, by_arm
from encourage_mt.evaluation.significance import measures_table
from encourage_mt.evaluation.tuning import Tuning, mean_by_arm, tuning_table
from encourage_mt.files import read_record, write_record
from encourage_mt.processes import locked
from encourage_mt.recipe import load_recipe
from encourage_mt.report.tables import (
    arms_table,
    curve_table,
    diagnostic_values,
    diagnostics_table,
    gains_table,
    learning_curve,
    published_table,
    runs_table,
)
from encourage_mt.robustness.measure import CLEAN, read_measured
from encourage_mt.robustness.summary import Summary
from encourage_mt.robustness.tables import markdown
from encourage_mt.training.run_folder import Run, open_run, read_log

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
PAGES = (ROOT / "docs" / "results.md", ROOT / "docs" / "robustness.md", ROOT / "README.md")
TABLES = {
    **{"runs": runs_table, "diagnostics": diagnostics_table, "curve": curve_table},
    "tuning": lambda results: tuning_table(
        mean_by_arm([(result.arm, result.tuning) for result in results if result.tuning]),
        results[0].signatures[HEADLINE],
    ),
}
KINDS = "|".join(["arms", "published", "robustness", "measures", "gains", *TABLES])
TABLE = re.compile(rf"<!-- ({KINDS}): ([\w.:]+)((?: [\w.:-]+)*) -->\n.*?<!-- end -->", re.DOTALL)
CURVE = "valid_bleu.svg"


def add(folder: Path, name: str | None) -> None:
    """Copy the runs and comparisons of a work directory to results/NAME, by default the name of their recipe.

    Raises UserError, and copies nothing, if there is no evaluated run, a run is of another recipe or outside the
    project, or a model or a comparison is not of the present scores.
    """
    runs = [open_run(path.parent) for path in sorted(folder.glob("*/scores.json"))]
    if not runs:
        raise UserError(f"{folder}: has no evaluated runs")
    recipe = runs[0].recipe
    for run in runs:
        if not run.recipe or run.recipe != recipe:
            problem = f"is not a run of the recipe {recipe}" if recipe else "has no recipe: it was trained by hand"
            raise UserError(f"{run.folder}: {problem}")
    results = [read_result(run) for run in runs]
    records: dict[str, Result | Comparison | Summary] = {result.name: result for result in results}
    for path in sorted(folder.glob("report-*/comparison.json")):
        comparison = read_record(path, Comparison)
        for compared, score, run_name in scores_of(comparison, results):
            if score is None or compared != score.score:
                raise UserError(f"{path}: is not of the present scores of {run_name}; make the report again")
        records[f"{path.parent.name.removeprefix('report-')}.comparison"] = comparison
    if (folder / "robustness.json").exists():
        summary = read_record(folder / "robustness.json", Summary)
        for run, result in zip(runs, results, strict=True):
            if not is_measured(run, result, summary):
                path = folder / "robustness.json"
                raise UserError(f"{path}: is not of the present scores of {run.name}; make it again")
        records["robustness"] = summary
    target = RESULTS / (name or recipe)
    target.mkdir(parents=True, exist_ok=True)
    for stem, record in records.items():
        write_record(target / f"{stem}.json", record)
    picture = folder / "report-ce-el" / "figures" / CURVE
    if picture.exists() and not name:  # otherwise the trainings, and so their curves, are the same as before
        shutil.copy(picture, ROOT / "docs" / "pictures" / f"{recipe}_{CURVE}")


def read_result(run: Run) -> Result:
    """Return the scores of `run` with diagnostics and learning curve, and paths relative to the project's folder."""
    result = Result.read(run.folder)
    tuning = None
    if (run.folder / "tuning.json").exists():
        tuned = read_record(run.folder / "tuning.json", Tuning)
        if tuned.checkpoints_sha256 != result.evaluation.checkpoints_sha256:
            raise UserError(f"{run.folder / 'tuning.json'}: is of other checkpoints than the scores; tune again")
        tuning = tuned.tried
    starts = []
    for start in result.provenance["starts"]:
        command = start["command"].replace(f"{ROOT.resolve()}/", "")
        if "/" in re.sub(r"(runs|encourage_mt)/\S*", "", command):
            raise UserError(
                f"{run.folder}: its command has paths outside the project; results must be of runs in runs/"
            )
        starts.append({**start, "command": command})
    with locked(run.folder):
        diagnostics = diagnostic_values(analyse(run))
    changes = {"diagnostics": diagnostics, "curve": learning_curve(read_log(run.log)), "tuning": tuning}
    return result.model_copy(update={**changes, "provenance": {**result.provenance, "starts": starts}})


def is_measured(run: Run, result: Result, summary: Summary) -> bool:
    """Return whether the values of a run in `summary`, if it has any, were measured with its present scores."""
    expected = {test: arms.get(result.arm, {}).get(result.seed) for test, arms in summary.clean.items()}
    expected = {test: bleu for test, bleu in expected.items() if bleu is not None}
    measured = read_measured(run) if expected else None  # which hashes the model
    noise = measured.noise if measured else {}
    clean = {test: noise[test][CLEAN].bleu for test in expected if CLEAN in noise.get(test, {})}
    return clean == expected


def scores_of(comparison: Comparison, results: list[Result]) -> list[tuple[float, Score | None, str]]:
    """Return (score in the comparison, score of the run if it has one, run's name) of all sets, metrics and seeds."""
    sides = {comparison.baseline: "baseline", comparison.candidate: "candidate"}
    return [
        (getattr(metric, sides[result.arm])[result.seed], result.scores.get(split, {}).get(name), result.name)
        for result in results
        if result.arm in sides
        for split, metrics in comparison.tests.items()
        for name, metric in metrics.items()
        if result.seed in getattr(metric, sides[result.arm])
    ]


def read_results(folder: Path, arm: str = "*") -> list[Result]:
    return [Result.read(path) for path in sorted(folder.glob(f"{arm}.seed*.json"))]


def table(match: re.Match) -> str:
    """Return a marker with its table. Raises UserError if it names something that has no runs."""
    marker = match[0].splitlines()[0]
    with as_user_error(f"{marker}: names something that is not in {RESULTS}"):
        return f"{marker}\n{lines_of(match[1], match[2], match[3].split())}\n<!-- end -->"


def lines_of(kind: str, recipe: str, arms: list[str]) -> str:
    """Return the table of a marker. Raises UserError if an arm it names has no runs."""
    folder = RESULTS / recipe
    if kind == "gains":
        lines = gains_table([results_of(*split_name(name)) for name in (recipe, *arms)])
    elif kind == "robustness":
        lines = markdown(read_record(folder / "robustness.json", Summary))
    elif kind == "measures":
        (measure, test), (name, baseline, candidate) = arms, split_name(recipe)
        comparison = read_record(RESULTS / name / f"{baseline}-{candidate}.comparison.json", Comparison)
        lines = measures_table(kind, comparison.measures[measure][test], baseline, candidate).markdown()
    elif kind == "published":
        lines = published_table(load_recipe(ROOT / "examples" / recipe / "recipe.yaml"), read_results(folder))
    else:
        results, comparisons = read_results(folder), []
        if kind == "arms" or not arms:  # reading them takes seconds
            comparisons = [read_record(path, Comparison) for path in sorted(folder.glob("*.comparison.json"))]
        baselines = list(dict.fromkeys(comparison.baseline for comparison in comparisons))
        arms = arms or list(dict.fromkeys([*baselines, *(result.arm for result in results)]))
        missing = set(arms) - {result.arm for result in results}
        if missing or not arms:
            raise UserError(f"{folder}: no runs of {' '.join(sorted(missing)) or 'any arm'}")
        results = [result for arm in arms for result in results if result.arm == arm]
        if kind == "tuning" and not any(result.tuning for result in results):
            raise UserError(f"{folder}: no run was tuned")
        if kind == "arms":
            lines = arms_table(results, [c for c in comparisons if {c.baseline, c.candidate} <= set(arms)])
        else:
            lines = TABLES[kind](results)
    return lines


def split_name(name: str) -> tuple[str, str, str]:
    """Return (NAME, BASELINE, CANDIDATE)."""
    folder, *arms = name.split(":")
    baseline, candidate = arms or ("ce", "el")
    return folder, baseline, candidate


def results_of(name: str, baseline: str, candidate: str) -> tuple[str, list[Result], list[Result]]:
    """Return (NAME, results of the baseline, those of the candidate), and read no others."""
    groups = by_arm([result for arm in (baseline, candidate) for result in read_results(RESULTS / name, arm)])
    return name, groups[baseline], groups[candidate]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "work directory of encourage-mt run to copy from (default: none)"
    parser.add_argument("--add", type=Path, metavar="FOLDER", help=text)
    parser.add_argument("--into", metavar="NAME", help="folder of results/ to write to (default: the recipe's name)")
    arguments = parser.parse_args()
    with exit_on_user_error("results.py"):
        if arguments.add:
            add(arguments.add, arguments.into)
        elif arguments.into:
            raise UserError("--into must be used with --add")
        pages = {path: TABLE.sub(table, path.read_text(encoding="utf-8")) for path in PAGES}
        for path, text in pages.items():
            with atomic_write(path) as file:
                file.write(text)


if __name__ == "__main__":
    main()
