"""Write the report: one HTML page that needs no other files, with charts and tables as files beside it."""

import shlex
from contextlib import ExitStack
from pathlib import Path

from jinja2 import Environment, PackageLoader

from ..atomic import atomic_folder, atomic_write
from ..errors import UserError
from ..evaluation.comparison import Comparison, compare
from ..evaluation.formatting import Table, escape
from ..evaluation.results import Result, searches
from ..files import write_record
from ..processes import locked
from ..recipe import render_options
from ..training.run_folder import Run
from .sections import SECTIONS, Material, Section, disagree
from .tables import criterion_options, describe_options, describe_setting, name_sides

FILE_LIST = ".encourage-mt-report"  # in a report's folder: the files it consists of, one a line


def write_report(
    baseline: list[Run], candidate: list[Run], output: Path, allow_differences: bool = False
) -> Comparison:
    """Compare two groups of runs as `compare` does, write the report into the folder `output`, return the comparison.

    Writes report.html, report.md, comparison.json, figures/ with the charts as SVG and PNG, and tables/ with the tables
    as LaTeX and CSV, or nothing. An earlier report there is replaced. Raises UserError if `output` contains anything
    else, and as `compare` does.
    """
    output = output.resolve()
    check_output(output)
    with ExitStack() as locks:  # everything is of the same scores
        for path in dict.fromkeys(run.folder for run in (*baseline, *candidate)):
            locks.enter_context(locked(path))
        comparison = compare(baseline, candidate, allow_differences)
        material = Material.read(comparison, {comparison.baseline: baseline, comparison.candidate: candidate})
        sections = [section for section in (make(material) for make in SECTIONS) if section.charts or section.tables]
        results = {label: [Result.read(run.folder) for run in runs] for label, runs in material.groups.items()}
    title = name_sides({label: side[0] for label, side in results.items()})
    setting = describe_report(material, results)
    seeds = material.shown_seeds()
    scores = {split: comparison.table(split) for split in comparison.tests}
    everything = [result for side in results.values() for result in side]
    for section in sections:
        section.arrange()
    last = Section("The runs", tables=[runs(everything)])
    page = Environment(
        loader=PackageLoader("encourage_mt.report", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("page.html.j2")
    html = page.render(
        title=title,
        setting=setting,
        comparison=comparison,
        scores=scores,
        sections=sections,
        runs=last,
        translations={split: disagree(texts, seeds, material.data.lowercase) for split, texts in material.sets.items()},
        seed=" and ".join(map(str, dict.fromkeys(seeds))),
        results=everything,
        options=[(result.name, shlex.join(render_options(result.options))) for result in everything],
    )
    with atomic_folder(output) as partial:
        for folder in ("figures", "tables"):
            (partial / folder).mkdir(parents=True)
        (partial / "report.html").write_text(html, encoding="utf-8")
        (partial / "report.md").write_text(markdown(title, setting, comparison, [*sections, last]), encoding="utf-8")
        write_record(partial / "comparison.json", comparison)
        for table in (*scores.values(), *(table for section in [*sections, last] for table in section.tables)):
            table.save(partial / "tables")
        for chart in (chart for section in sections for chart in section.charts):
            chart.save(partial / "figures")
        files = sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file())
        with atomic_write(partial / FILE_LIST) as file:
            file.writelines(f"{name}\n" for name in files)
        check_output(output)
    return comparison


def check_output(output: Path) -> None:
    """Raise UserError if the folder `output` has a file that is not listed as part of an earlier report there."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output}: is not a folder; choose another --output")
    listed = output / FILE_LIST
    ours = {FILE_LIST, *(listed.read_text(encoding="utf-8", errors="replace").splitlines() if listed.is_file() else ())}
    for path in sorted(output.rglob("*")):
        if not path.is_dir() and path.relative_to(output).as_posix() not in ours:
            name = path.relative_to(output)
            raise UserError(
                f"{output}: contains {name}, which is not part of a report of this version; remove it or use another "
                "--output"
            )


def describe_report(material: Material, results: dict[str, list[Result]]) -> list[tuple[str, str]]:
    """Return what was compared, (name, text): both arms, then data, model, training, search and hardware."""
    data, everything = material.data, [result for side in results.values() for result in side]
    lines = []
    for label, side in results.items():
        seeds = f"seed{'s' if len(side) > 1 else ''} {', '.join(str(result.seed) for result in side)}"
        search = f"; {' or '.join(searches(side))}" if len(searches(everything)) > 1 else ""
        lines.append((label, f"{describe_options(criterion_options(side[0]))}; {seeds}{search}"))
    pairs = ", ".join(f"{split} {count:,}" for split, count in data.lines.items())
    vocabulary = " and ".join(f"{size:,}" for size in dict.fromkeys(data.dictionary.values())) or "unknown"
    name = f"{everything[0].recipe or data.folder}, {data.source} to {data.target}"
    setting = {**describe_setting(everything), "data": f"{name}; pairs: {pairs}; vocabulary {vocabulary}"}
    return [*lines, *setting.items()]


def runs(results: list[Result]) -> Table:
    """Return a row for each run: the machine that evaluated it, how it was trained and searched."""
    rows = []
    for result in results:
        search = [
            str(getattr(result.evaluation, name)) for name in ("average", "beam", "lenpen", "temperature", "engine")
        ]
        training = [str(result.training.get(name, "")) for name in ("updates", "tokens per update")]
        rows.append([result.name, *search, *training, result.machine])
    search_names = ["checkpoints averaged", "beam", "length penalty", "temperature", "engine"]
    header = ["run", *search_names, "updates", "tokens per update", "evaluated on"]
    return Table("runs", header, rows)


def markdown(title: str, setting: list[tuple[str, str]], comparison: Comparison, sections: list[Section]) -> str:
    """Return the report in Markdown; it shows the files in figures/."""
    lines = [f"# {escape(title)}", "", *(f"- {escape(f'{name}: {text}')}" for name, text in setting), ""]
    lines += [comparison.markdown(), ""]
    for section in sections:
        lines += [f"## {section.title}", "", *([section.text, ""] if section.text else [])]
        for table in section.tables:
            lines += [table.markdown(), ""]
        for chart in section.charts:
            heading, caption = escape(chart.title), escape(chart.caption)
            lines += [f"### {heading}", "", caption, "", f"![{heading}](figures/{chart.name}.svg)", ""]
    return "\n".join(lines)
