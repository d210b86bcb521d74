"""The tables of a report as files for a paper: LaTeX (booktabs), and CSV with the unrounded numbers."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

from ptuning.names import PAGE_MARKS
from ptuning.report.blocks import Block, Entry, Fold, Page, Table
from ptuning.report.results_file import ScoreWithSpread

Format = Literal["latex", "csv"]

# Square brackets, too: after the end of a row, LaTeX would read one as an argument.
LATEX: Mapping[str, str] = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "[": "{[}",
    "]": "{]}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\N{NO-BREAK SPACE}": "~",
    "\N{MINUS SIGN}": "$-$",
    "\N{EN DASH}": "--",
    "\N{HORIZONTAL ELLIPSIS}": r"\dots{}",
    "\N{BLACK STAR}": "bold print",
    "\N{LEFT DOUBLE QUOTATION MARK}": "``",
    "\N{RIGHT DOUBLE QUOTATION MARK}": "''",
}
PLAIN = str.maketrans({"\N{NO-BREAK SPACE}": " ", "\N{MINUS SIGN}": "-"})


def table_files(page: Page, formats: Iterable[Format]) -> dict[str, str]:
    """Return the file name and the text of every table of a page, folded ones too, in the page's numbers."""
    files = {}
    tables = [(section, table) for section in page.sections for table in _tables(section.blocks)]
    for number, (section, table) in enumerate(tables, start=1):
        name = f"{number:02d}-{section.anchor}"
        for form in formats:
            ending, write = FORMATS[form]
            files[f"table-{name}{ending}"] = write(table, section.heading, name)
    return files


def _tables(blocks: Sequence[Block]) -> Iterator[Table]:
    for block in blocks:
        if isinstance(block, Table):
            yield block
        elif isinstance(block, Fold):
            yield from _tables(block.blocks)


def latex(text: str) -> str:
    r"""Return a text as LaTeX that prints it as it is, on one line.

    >>> print(latex("[X] costs 5 % & x_1"))
    {[}X{]} costs 5 \% \& x\_1
    """
    plain = (char for char in text.replace("\n", " ") if char.isprintable() or char in LATEX)
    return "".join(LATEX.get(char, char) for char in plain)


def _latex_table(table: Table, _: str, label: str) -> str:
    columns = len(table.columns)
    # A table of texts breaks them; in one of numbers only the headings of rows are long.
    spec = "l" + "r" * (columns - 1) if table.numbers else rf"p{{{0.94 / columns:.2f}\linewidth}}" * columns
    rows = [[latex(name) for name in table.columns], *([_latex_entry(one, table) for one in row] for row in table.rows)]
    head, *body = [f"{' & '.join(row)} \\\\" for row in rows]
    return "\n".join(
        [
            f"{PAGE_MARKS['.tex']}; it needs \\usepackage{{booktabs}}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex(table.caption)}}}",
            rf"\label{{tab:{label}}}",
            rf"\begin{{tabular}}{{{spec}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _latex_entry(entry: Entry, table: Table) -> str:
    text = rf"\textbf{{{latex(entry.text)}}}" if entry.best else latex(entry.text)
    small = [rf"{{\scriptsize {latex(line)}}}" for line in entry.small]
    if not small or not table.numbers:
        return "; ".join([text, *small])
    align = "l" if entry.score is None else "r"
    lines = r" \\ ".join([text, *small])
    return rf"\begin{{tabular}}[t]{{@{{}}{align}@{{}}}}{lines}\end{{tabular}}"


def _csv_table(table: Table, heading: str, _: str) -> str:
    """Write a table with a column for each number of a score: fractions, not percentages."""
    columns: dict[str, list[object]] = {PAGE_MARKS[".csv"].rstrip(","): [heading for _ in table.rows]}
    for at, name in enumerate(table.columns):
        entries = [row[at] for row in table.rows]
        scores = [entry.score for entry in entries]
        if not any(scores):
            columns[name or "name"] = [re.sub("^–$", "", entry.text.translate(PLAIN)) for entry in entries]
            if any(entry.small for entry in entries):
                columns[f"{name or 'name'}, more"] = ["; ".join(entry.small).translate(PLAIN) for entry in entries]
            continue
        spread = any(isinstance(score, ScoreWithSpread) and score.std is not None for score in scores)
        for field in ("value", "low", "high", "n", *(("std", "lowest", "seeds") if spread else ())):
            column = name if field == "value" else f"{name} {field}"
            columns[column] = [getattr(score, field, None) for score in scores]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return out.getvalue()


# Ending and writer of each format.
FORMATS: Mapping[Format, tuple[str, Callable[[Table, str, str], str]]] = {
    "latex": (".tex", _latex_table),
    "csv": (".csv", _csv_table),
}
