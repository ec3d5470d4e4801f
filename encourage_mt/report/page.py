"""The report: one HTML page that needs nothing else, the figures as PNG and SVG, the tables as Markdown and JSON."""

import difflib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, PackageLoader

from ..data.bitext import read_lines
from ..errors import UserError
from ..evaluation import scoring
from ..evaluation.comparison import Comparison, results_of
from ..evaluation.diagnostics import analyse
from ..files import read_json
from ..training.run_folder import Run
from .charts import bleu_by_length, inside, learning_curves, seed_scores

DISAGREEMENTS = 10
FILES = {"report.html", "report.md", "comparison.json", "figures"}
INSIDE = (
    "Teacher-forced on valid: the model is given the true beginning of each sentence. The paper's three claims are "
    "that the encouraging loss lets well-classified tokens go on shaping the representation, lowers the energy of the "
    "target against that of other types, and widens the margin."
)


def write_report(comparison: Comparison, baseline: list[Run], candidate: list[Run], output: Path) -> None:
    """Write report.html, report.md, comparison.json and figures/ into the folder `output`, whole or not at all.

    An earlier report there is replaced. Raises UserError if `output` holds anything else.
    """
    output = output.resolve()
    others = {path.name for path in output.iterdir()} - FILES if output.exists() else ()
    if others:
        raise UserError(f"{output}: holds other files ({min(others)}); choose another --output")
    groups = {comparison.baseline: baseline, comparison.candidate: candidate}
    analyses = {label: [analyse(run) for run in runs] for label, runs in groups.items()}
    data = baseline[0].data
    text = read_json(data / "manifest.json")["text"]
    bleu = scoring.metrics(text["target"], text["lowercase"])["sacreBLEU"]
    lengths, disagreements = [], {}
    seed, pair = seed_pair(baseline, candidate)
    for split in comparison.tests:
        source, references = (read_lines(data / "text" / f"{split}.{text[side]}") for side in ("source", "target"))
        systems = {
            label: [read_lines(run.folder / f"{split}.{text['target']}") for run in runs]
            for label, runs in groups.items()
        }
        lengths.append(bleu_by_length(split, systems, references, bleu))
        shown = {
            label: systems[label][runs.index(run)] for (label, runs), run in zip(groups.items(), pair, strict=True)
        }
        disagreements[split] = disagree(source, references, shown)
    sections = [
        ("Seeds and sentence lengths", "", [*seed_scores(comparison), *lengths]),
        ("Learning curves", "", learning_curves(groups)),
        ("Inside the models", INSIDE, inside(analyses)),
    ]
    runs = [results_of(run) for side in groups.values() for run in side]
    facts = (
        f"{runs[0]['recipe'] or data}, {text['source']} to {text['target']}; "
        f"{' and '.join(f'{len(side)} {label}' for label, side in groups.items())} runs."
    )
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "figures").mkdir(parents=True)
    page = Environment(
        loader=PackageLoader("encourage_mt.report", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    html = page.get_template("page.html.j2").render(
        comparison=comparison, facts=facts, sections=sections, disagreements=disagreements, seed=seed, runs=runs
    )
    (partial / "report.html").write_text(html, encoding="utf-8")
    markdown = [f"# {comparison.candidate} against {comparison.baseline}", "", facts, "", comparison.markdown(), ""]
    for heading, note, charts in sections:
        markdown += [f"## {heading}", "", note, ""]
        for chart in charts:
            chart.save(partial / "figures")
            markdown += [f"### {chart.title}", "", chart.caption, "", f"![{chart.title}](figures/{chart.name}.svg)", ""]
    (partial / "report.md").write_text("\n".join(markdown), encoding="utf-8")
    (partial / "comparison.json").write_text(json.dumps(asdict(comparison), indent=1, ensure_ascii=False) + "\n")
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)


def seed_pair(baseline: list[Run], candidate: list[Run]) -> tuple[str, list[Run]]:
    """The runs whose translations are shown: the first seed both have, else the first run of each."""
    seeds = [{run.seed: run for run in side} for side in (baseline, candidate)]
    for seed in seeds[0]:
        if seed in seeds[1]:
            return str(seed), [side[seed] for side in seeds]
    return f"{baseline[0].seed} and {candidate[0].seed}", [baseline[0], candidate[0]]


def disagree(sources: list[str], references: list[str], outputs: dict[str, list[str]]) -> list[dict]:
    """The sentences whose chrF++ differs most between two systems: the worst regressions, then the best gains.

    outputs: {label: hypotheses} of baseline and candidate. A row has line (from 1), source, reference, scores, gain,
    and of each output its words with whether the reference lacks them.
    """
    chrf = scoring.metrics("")["chrF++"]
    rows = []
    for index, (source, reference) in enumerate(zip(sources, references, strict=True)):
        pair = {label: lines[index] for label, lines in outputs.items()}
        if len(set(pair.values())) == 1:
            continue
        scores = [chrf.sentence_score(line, [reference]).score for line in pair.values()]
        row = {
            "line": index + 1,
            "source": source,
            "reference": reference,
            "scores": scores,
            "gain": scores[1] - scores[0],
        }
        rows.append({**row, "outputs": {label: marked(line, reference) for label, line in pair.items()}})
    rows.sort(key=lambda row: row["gain"])
    worse = [row for row in rows if row["gain"] < 0][:DISAGREEMENTS]
    better = [row for row in rows if row["gain"] > 0][: -DISAGREEMENTS - 1 : -1]
    return worse + better


def marked(line: str, reference: str) -> list[tuple[str, bool]]:
    """Words of `line`, each with whether it stands outside what `line` and `reference` share in order."""
    words = line.split()
    shared = set()
    for block in difflib.SequenceMatcher(None, words, reference.split(), autojunk=False).get_matching_blocks():
        shared.update(range(block.a, block.a + block.size))
    return [(word, index not in shared) for index, word in enumerate(words)]
