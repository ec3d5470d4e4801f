"""Format numbers and tables for people."""

import csv
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate


@dataclass
class Table:
    """Rows of text below a header, and the name of the files that contain them."""

    name: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        return markdown_table(self.header, self.rows)

    def latex(self) -> str:
        """Return a tabular that needs the package booktabs."""
        aligned = ["left", *["right"] * (len(self.header) - 1)]
        text = tabulate(self.rows, self.header, tablefmt="latex_booktabs", disable_numparse=True, colalign=aligned)
        return text.replace("±", r"$\pm$") + "\n"

    def save(self, folder: Path) -> None:
        """Write NAME.tex and NAME.csv into `folder`."""
        (folder / f"{self.name}.tex").write_text(self.latex(), encoding="utf-8")
        with open(folder / f"{self.name}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([self.header, *self.rows])


def format_mean(scores: Iterable[float], digits: int = 2) -> str:
    """Return mean ± standard deviation, or the score itself if there is only one."""
    scores = list(scores)
    spread = f" ± {statistics.stdev(scores):.{digits}f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.{digits}f}{spread}"


def format_p(p: float | None) -> str:
    """Return a p-value with three digits. A p of 0 is never shown, because no test of a sample can prove it."""
    if p is None:
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


MARKUP = re.compile(r"[\\`*~|]|<(?=[A-Za-z/!?])|\](?=\()|&(?=[A-Za-z#])")


def escape(text: str) -> str:
    """Return Markdown that shows `text` literally, on one line and within one cell of a table."""
    return MARKUP.sub(r"\\\g<0>", " ".join(text.split()))


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown whose columns are aligned when read as plain text."""
    header, *rows = ([escape(cell) for cell in row] for row in (header, *rows))
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def signature_lines(signatures: dict[str, str]) -> list[str]:
    """Return {metric: signature} as lines of Markdown."""
    return [f"{name} signature: `{signature}`  " for name, signature in signatures.items()]
