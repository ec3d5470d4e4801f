"""Write the report: one HTML page that needs no other files, charts as PNG and SVG, tables as Markdown and JSON."""

import difflib
import os
import shlex
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from ..errors import UserError
from ..evaluation import scoring
from ..evaluation.comparison import Comparison, read_translation
from ..evaluation.diagnostics import analyse
from ..evaluation.formatting import escape
from ..evaluation.results import Result
from ..files import atomic_write
from ..processes import locked
from ..training.run_folder import Run, render_options
from .charts import Chart, bleu_by_length, diagnostic_charts, learning_curves, seed_scores

DISAGREEMENTS = 10
FILE_LIST = ".encourage-mt-report"  # in a report's folder: the files it consists of, one a line
DIAGNOSTICS_NOTE = (
    "Measured on valid, where the model gets the true beginning of each sentence. The paper makes three claims: "
    "with the encouraging loss, well-classified tokens keep shaping the representation, the energy of the target falls "
    "relative to that of other types, and the margin grows."
)


def write_report(comparison: Comparison, baseline: list[Run], candidate: list[Run], output: Path) -> None:
    """Write report.html, report.md, comparison.json and figures/ into the folder `output`, complete or not at all.

    It replaces an earlier report there. Raises UserError if `output` contains anything else.
    """
    output = output.resolve()
    check_output(output)
    groups = {comparison.baseline: baseline, comparison.candidate: candidate}
    with ExitStack() as locks:
        for run in (*baseline, *candidate):
            locks.enter_context(locked(run.folder))
        analyses = {label: [analyse(run) for run in runs] for label, runs in groups.items()}
        charts, disagreements = compare_translations(comparison, groups)
        sections = [
            ("Seeds and sentence lengths", "", [*seed_scores(comparison), *charts]),
            ("Learning curves", "", learning_curves(groups)),
            ("Diagnostics", DIAGNOSTICS_NOTE, diagnostic_charts(analyses)),
        ]
        results = [Result.read(run.folder) for run in (*baseline, *candidate)]
    data = baseline[0].prepared()
    facts = (
        f"{results[0].recipe or data.folder}, {data.source} to {data.target}; "
        f"{' and '.join(f'{len(side)} {label}' for label, side in groups.items())} runs."
    )
    page = Environment(
        loader=PackageLoader("encourage_mt.report", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("page.html.j2")
    html = page.render(
        comparison=comparison,
        facts=facts,
        sections=sections,
        disagreements=disagreements,
        seed=shown_pair(baseline, candidate)[0],
        results=results,
        options=[(result.name, shlex.join(render_options(result.options))) for result in results],
    )
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    (partial / "figures").mkdir(parents=True)
    try:
        (partial / "report.html").write_text(html, encoding="utf-8")
        (partial / "report.md").write_text(report_markdown(comparison, facts, sections), encoding="utf-8")
        comparison.write(partial / "comparison.json")
        for chart in (chart for _, _, charts in sections for chart in charts):
            chart.save(partial / "figures")
        files = sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file())
        with atomic_write(partial / FILE_LIST) as file:
            file.writelines(f"{name}\n" for name in files)
        check_output(output)
        shutil.rmtree(output, ignore_errors=True)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_output(output: Path) -> None:
    """Raise UserError if the folder `output` has a file that is not listed as part of an earlier report there."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output}: is not a folder; choose another --output")
    listed = output / FILE_LIST
    ours = {FILE_LIST, *(listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else ())}
    for path in sorted(output.rglob("*")):
        if not path.is_dir() and path.relative_to(output).as_posix() not in ours:
            name = path.relative_to(output)
            raise UserError(
                f"{output}: contains {name}, which is not part of a report of this version; remove it or use another "
                "--output"
            )


def compare_translations(comparison: Comparison, groups: dict[str, list[Run]]) -> tuple[list[Chart], dict[str, list]]:
    """Return a chart of BLEU by sentence length, and {test set: `disagree` of one seed}, for all test sets."""
    data = next(iter(groups.values()))[0].prepared()
    bleu = scoring.metrics(data.target, data.lowercase)["sacreBLEU"]
    _, pair = shown_pair(*groups.values())
    charts, disagreements = [], {}
    for split in comparison.tests:
        source, references = data.read_text(split, data.source), data.read_text(split, data.target)
        systems = {
            label: {run.folder: read_translation(run, split, data, references) for run in runs}
            for label, runs in groups.items()
        }
        charts.append(bleu_by_length(split, {k: list(v.values()) for k, v in systems.items()}, references, bleu))
        shown = {label: systems[label][run.folder] for label, run in zip(groups, pair, strict=True)}
        disagreements[split] = disagree(source, references, shown)
    return charts, disagreements


def report_markdown(comparison: Comparison, facts: str, sections: list[tuple[str, str, list[Chart]]]) -> str:
    lines = [f"# {escape(comparison.candidate)} against {escape(comparison.baseline)}", "", escape(facts), ""]
    lines += [comparison.markdown(), ""]
    for heading, note, charts in sections:
        lines += [f"## {heading}", "", note, ""]
        for chart in charts:
            title, caption = escape(chart.title), escape(chart.caption)
            lines += [f"### {title}", "", caption, "", f"![{title}](figures/{chart.name}.svg)", ""]
    return "\n".join(lines)


def shown_pair(baseline: list[Run], candidate: list[Run]) -> tuple[str, list[Run]]:
    """Return the seed, and the runs, whose translations are shown: the first that both have, or the first of each."""
    seeds = [{run.seed: run for run in side} for side in (baseline, candidate)]
    for seed in seeds[0]:
        if seed in seeds[1]:
            return str(seed), [side[seed] for side in seeds]
    return f"{baseline[0].seed} and {candidate[0].seed}", [baseline[0], candidate[0]]


def disagree(sources: list[str], references: list[str], outputs: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Return the sentences whose chrF++ differs most between two systems: the worst regressions, then the best gains.

    outputs: {label: translations} of baseline and candidate. A row has line (from 1), source, reference, scores, gain,
    and for each output its words, each with whether the reference lacks it.
    """
    chrf = scoring.metrics("")["chrF++"]
    rows: list[dict[str, Any]] = []
    for index, (source, reference) in enumerate(zip(sources, references, strict=True)):
        pair = {label: lines[index] for label, lines in outputs.items()}
        if len(set(pair.values())) == 1:
            continue
        scores = [chrf.sentence_score(line, [reference]).score for line in pair.values()]
        row = {"line": index + 1, "source": source, "reference": reference, "gain": scores[1] - scores[0]}
        marked = {label: mark_words(line, reference) for label, line in pair.items()}
        rows.append({**row, "scores": scores, "outputs": marked})
    rows.sort(key=lambda row: row["gain"])
    worse = [row for row in rows if row["gain"] < 0][:DISAGREEMENTS]
    better = [row for row in rows if row["gain"] > 0][: -DISAGREEMENTS - 1 : -1]
    return worse + better


def mark_words(line: str, reference: str) -> list[tuple[str, bool]]:
    """Return the words of `line`, each with whether it is missing from the words that both share in the same order."""
    words = line.split()
    shared: set[int] = set()
    for block in difflib.SequenceMatcher(None, words, reference.split(), autojunk=False).get_matching_blocks():
        shared.update(range(block.a, block.a + block.size))
    return [(word, index not in shared) for index, word in enumerate(words)]
