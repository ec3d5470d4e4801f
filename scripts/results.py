"""Keep the tables of docs/results.md and README.md in step with the runs in results/.

    python scripts/results.py                  write the tables anew
    python scripts/results.py --add FOLDER     first take over what `encourage-mt run` left in FOLDER: the scores of its
                                               runs, what was seen inside them, its comparisons, the learning curve
    ... --into NAME                            into results/NAME in place of the recipe's name, where the same runs
                                               were evaluated otherwise

A table stands between <!-- KIND: NAME [ARM ...] --> and <!-- end -->. KIND is arms, runs, inside, curve, or
published, the figures of a paper beside ours; NAME their folder in results/; without ARM all arms are shown,
baselines first.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

from encourage_mt.errors import UserError, exit_on_user_error
from encourage_mt.evaluation.comparison import read_comparison, results_of
from encourage_mt.files import file_hash, read_json, write_json
from encourage_mt.recipe import load_recipe
from encourage_mt.report.tables import (
    arms_table,
    curve,
    curve_table,
    inside_figures,
    inside_table,
    published_table,
    runs_table,
)
from encourage_mt.training.run_folder import open_run, read_log

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
PAGES = (ROOT / "docs" / "results.md", ROOT / "README.md")
TABLE = re.compile(r"<!-- (arms|runs|inside|curve|published): ([\w.]+)((?: [\w.-]+)*) -->\n.*?<!-- end -->", re.DOTALL)
CURVE = "valid_bleu.svg"


def add(folder: Path, name: str | None) -> None:
    """Take over the runs and comparisons of a work directory, with the project's folder left out of their paths.

    They go into results/NAME, without a name into that of their recipe.

    Raises UserError, and takes nothing, if there is no evaluated run, a run is of another recipe or outside the
    project, or what was seen inside it or a comparison is of other checkpoints than the scores.
    """
    runs = [open_run(path.parent) for path in sorted(folder.glob("*/scores.json"))]
    if not runs:
        raise UserError(f"{folder}: no evaluated runs")
    recipe, contents = runs[0].recipe, {}
    for run in runs:
        if not run.recipe or run.recipe != recipe:
            raise UserError(f"{run.folder}: not a run of the recipe {recipe or 'that has a name'}")
        result = results_of(run)
        analysis = run.folder / "analysis.json"
        if analysis.exists():
            found = read_json(analysis)
            if found["source"]["checkpoint_sha256"] != file_hash(run.folder / "average.pt"):
                raise UserError(f"{analysis}: of another average than the scores; make the report again")
            result["inside"] = inside_figures(found)
        result["curve"] = curve(read_log(run.log))
        contents[run.name] = result
    results = list(contents.values())
    for path in sorted(folder.glob("report-*/comparison.json")):
        for score, result, run in scores_of(read_comparison(path), results):
            if score != result:
                raise UserError(f"{path}: not of the present scores of {run}; make the report again")
        contents[f"{path.parent.name.removeprefix('report-')}.comparison"] = read_json(path)
    text = json.dumps(contents, ensure_ascii=False).replace(f"{ROOT.resolve()}/", "")
    contents = json.loads(text)
    for stem, content in contents.items():
        if "/" in re.sub(r"(runs|encourage_mt)/\S*", "", content.get("command", "")):
            raise UserError(f"{folder / stem}: its command has paths outside the project; results are of runs in runs/")
    target = RESULTS / (name or recipe)
    target.mkdir(parents=True, exist_ok=True)
    for stem, content in contents.items():
        write_json(target / f"{stem}.json", content)
    picture = folder / "report-ce-el" / "figures" / CURVE
    if picture.exists() and not name:  # the trainings, and so their curves, are the same
        shutil.copy(picture, ROOT / "docs" / "pictures" / f"{recipe.split('_')[0]}_{CURVE}")


def scores_of(comparison, results) -> list[tuple[float, float, str]]:
    """(score in the comparison, score of the run, name of the run) of all sets, metrics and seeds that both have."""
    sides = {comparison.baseline: "baseline", comparison.candidate: "candidate"}
    return [
        (getattr(seeds, sides[result["arm"]])[result["seed"]], result["scores"][split][metric]["score"], result["name"])
        for result in results
        if result["arm"] in sides
        for split, metrics in comparison.tests.items()
        for metric, seeds in metrics.items()
        if result["seed"] in getattr(seeds, sides[result["arm"]])
    ]


def table(match: re.Match) -> str:
    """The table of one place. Raises UserError if an arm it names has no runs."""
    kind, recipe, arms = match[1], match[2], match[3].split()
    folder = RESULTS / recipe
    results = [read_json(path) for path in sorted(folder.glob("*.seed*.json"))]
    comparisons = [read_comparison(path) for path in sorted(folder.glob("*.comparison.json"))]
    if kind == "published":
        lines = published_table(load_recipe(ROOT / "examples" / recipe / "recipe.yaml"), results)
    else:
        baselines = list(dict.fromkeys(comparison.baseline for comparison in comparisons))
        arms = arms or list(dict.fromkeys([*baselines, *(result["arm"] for result in results)]))
        missing = set(arms) - {result["arm"] for result in results}
        if missing or not arms:
            raise UserError(f"{folder}: no runs of {' '.join(sorted(missing)) or 'any arm'}")
        results = [result for arm in arms for result in results if result["arm"] == arm]
        if kind == "arms":
            lines = arms_table(results, [c for c in comparisons if {c.baseline, c.candidate} <= set(arms)])
        else:
            lines = {"runs": runs_table, "inside": inside_table, "curve": curve_table}[kind](results)
    return f"<!-- {kind}: {recipe}{match[3]} -->\n{lines}\n<!-- end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", type=Path, metavar="FOLDER", help="work directory of encourage-mt run (default: none)")
    parser.add_argument(
        "--into", metavar="NAME", help="folder of docs/results to write to (default: the recipe's name)"
    )
    arguments = parser.parse_args()
    with exit_on_user_error("results.py"):
        if arguments.add:
            add(arguments.add, arguments.into)
        elif arguments.into:
            raise UserError("--into goes with --add")
        pages = {path: TABLE.sub(table, path.read_text(encoding="utf-8")) for path in PAGES}
        for path, text in pages.items():
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
