"""Make the tables of noise and out-of-distribution (OOD) text: values of each arm, then the tests of their gains."""

from ..evaluation.formatting import Table, escape, format_mean, signature_lines
from ..evaluation.results import HEADLINE
from ..evaluation.significance import compared_seeds, describe_correction, measures_table
from .summary import Row, Summary

NOISE_NOTE = (
    "Change: score of the translation of the noisy text minus that of the clean text. Consistency: chrF++ of the "
    "translation of the noisy text against that of the clean text. chrF++ and consistency are means over sentences. An "
    "attack changes one character of each sentence; the worst attack is the lowest value of each sentence. Total noise "
    "is a sanity check: BLEU must be close to 0."
)
FOREIGN_NOTE = (
    "Out-of-distribution (OOD) text, in percent. AUROC: probability that a sentence of the test set has a higher score "
    "than one of the OOD text; 50 is chance. Of equal length: only between sources of equal length, so that length "
    "alone gets 50. FPR95: share of OOD sentences that reach the score that 95% of the test set reach. Source length "
    "and fewest pieces (of the translation) are controls that ignore the probabilities."
)


def markdown(summary: Summary) -> str:
    """Return the values of each test set, then the gains of each arm over the first, with their tests."""
    lines = []
    if summary.differences:
        lines += [f"**These runs should not be compared**: {escape('; '.join(summary.differences))}.", ""]
    for test in summary.clean:
        clean = zip(summary.clean[test], compared_seeds(*summary.clean[test].values()), strict=True)
        scores = ", ".join(f"{arm} {format_mean(side.values())}" for arm, side in clean)
        lines += [f"### {test}", "", escape(f"{HEADLINE} of the clean text of {test}: {scores}."), ""]
        for table, note in ((noise_table(summary, test), NOISE_NOTE), (foreign_table(summary, test), FOREIGN_NOTE)):
            lines += [table.markdown(), "", note, ""] if table.rows else []
    if len(summary.arms) > 1:
        everything = [gain for arm in summary.comparisons for gain in summary.gains(arm)]
        lines += ["### Comparisons", "", describe_correction(everything), ""]
    for arm, by_test in summary.comparisons.items():
        for test, by_measure in by_test.items():
            for measure, gains in by_measure.items():
                table = measures_table(f"{arm}_{test}_{measure}", gains, summary.arms[0], arm)
                lines += [escape(f"{arm} against {summary.arms[0]}, {test}, {measure}:"), "", table.markdown(), ""]
    return "\n".join([*lines, *signature_lines(summary.signatures)])


def noise_table(summary: Summary, test: str) -> Table:
    rows = [row for row in summary.rows if row.test == test and not row.score]
    first = [[row.name, "" if row.changed is None else f"{row.changed:.0%}"] for row in rows]
    return values_table(f"noise_{test}", ["noise", "sentences changed"], first, rows)


def foreign_table(summary: Summary, test: str) -> Table:
    rows = [row for row in summary.rows if row.test == test and row.score]
    return values_table(f"foreign_{test}", ["OOD text", "score"], [[row.name, row.score] for row in rows], rows)


def values_table(name: str, header: list[str], first: list[list[str]], rows: list[Row]) -> Table:
    """Return the `first` cells of each row, then mean ± deviation of each measure and arm.

    Of two arms, only the seeds count that their gains compare.
    """
    measures = rows[0].values if rows else {}
    header = header + [f"{measure}, {arm}" for measure, arms in measures.items() for arm in arms]
    lines = []
    for cells, row in zip(first, rows, strict=True):
        compared = [side for arms in row.values.values() for side in compared_seeds(*arms.values())]
        sides = [list(side.values()) for side in compared]
        lines.append([*cells, *(format_known(side) for side in sides)])
    return Table(name, header, lines)


def format_known(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return format_mean(known) if len(known) == len(values) else "-"
