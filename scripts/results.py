"""Keep docs/results.md in step with the scores in docs/results/.

    python scripts/results.py                  write the tables of docs/results.md anew
    python scripts/results.py --add RUN ...    first take over the scores.json of evaluated runs

A table stands between <!-- scores: RECIPE --> and <!-- end -->; it has the runs of docs/results/RECIPE/*.json.
"""

import argparse
import json
import re
from pathlib import Path

from encourage_mt.comparison import results_of
from encourage_mt.errors import UserError, exit_on_user_error
from encourage_mt.evaluation import table
from encourage_mt.runs import open_run, write_json

DOCS = Path(__file__).parent.parent / "docs"


def add(folder: Path) -> None:
    """Copy the scores of a run, with the project's folder left out of its paths."""
    run = open_run(folder)
    text = json.dumps(results_of(run), ensure_ascii=False).replace(f"{DOCS.parent.resolve()}/", "")
    if "/" in re.sub(r"(runs|encourage_mt)/\S*", "", json.loads(text)["command"]):
        raise UserError(f"{folder}: its command has paths outside the project; results are of runs in runs/")
    target = DOCS / "results" / run.recipe / f"{run.name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, json.loads(text))


def page(text: str) -> str:
    """`text` with its tables made from the JSONs. Raises UserError if a table has no runs."""

    def scores(match):
        results = [json.loads(path.read_text()) for path in sorted((DOCS / "results" / match[1]).glob("*.json"))]
        if not results:
            raise UserError(f"docs/results/{match[1]}: no runs")
        return f"<!-- scores: {match[1]} -->\n{table(results)}\n<!-- end -->"

    return re.sub(r"<!-- scores: (\w+) -->\n.*?<!-- end -->", scores, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", type=Path, nargs="+", metavar="RUN", default=[], help="runs to take over")
    arguments = parser.parse_args()
    with exit_on_user_error("results.py"):
        for folder in arguments.add:
            add(folder)
        path = DOCS / "results.md"
        path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
