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
    found = {}
    sections = [(section.heading, section.anchor, table) for section in page.sections for table in _of(section.blocks)]
    for number, (heading, anchor, table) in enumerate(sections, start=1):
        name = f"table-{number:02d}-{anchor}"
        for form in formats:
            ending, write = FORMATS[form]
            found[f"{name}{ending}"] = write(table, heading, f"{number:02d}-{anchor}")
    return found


def _of(blocks: Sequence[Block]) -> Iterator[Table]:
    for block in blocks:
        if isinstance(block, Table):
            yield block
        elif isinstance(block, Fold):
            yield from _of(block.blocks)


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
    small = [rf"{{\scriptsize {latex(one)}}}" for one in entry.small]
    if not small:
        return text
    if not table.numbers:
        return "; ".join([text, *small])
    lines = r" \\ ".join([text, *small])
    return rf"\begin{{tabular}}[t]{{@{{}}{'l' if entry.score is None else 'r'}@{{}}}}{lines}\end{{tabular}}"


def _csv_table(table: Table, heading: str, _: str) -> str:
    """Write a table with a column for each number of a score: fractions, not percentages."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = list(zip(*table.rows, strict=True)) if table.rows else [()] * len(table.columns)
    parts = [_parts(name or "name", entries) for name, entries in zip(table.columns, columns, strict=True)]
    writer.writerow([PAGE_MARKS[".csv"].rstrip(","), *(name for part in parts for name in part)])
    for row in table.rows:
        writer.writerow([heading, *(read(one) for one, part in zip(row, parts, strict=True) for read in part.values())])
    return out.getvalue()


def _parts(name: str, entries: Sequence[Entry]) -> dict[str, Callable[[Entry], str | float | int | None]]:
    """Return the CSV columns of a column: name -> what an entry has there."""
    if not any(entry.score for entry in entries):
        parts: dict[str, Callable[[Entry], str | float | int | None]] = {name: lambda entry: _plain(entry.text)}
        if any(entry.small for entry in entries):
            parts[f"{name}, more"] = lambda entry: _plain("; ".join(entry.small))
        return parts
    fields = ["value", "low", "high", "n"]
    if any(isinstance(entry.score, ScoreWithSpread) and entry.score.std is not None for entry in entries):
        fields += ["std", "lowest", "seeds"]
    return {name if field == "value" else f"{name} {field}": _field(field) for field in fields}


def _field(name: str) -> Callable[[Entry], str | float | int | None]:
    return lambda entry: getattr(entry.score, name, None)


def _plain(text: str) -> str:
    return re.sub(r"^–$", "", text.translate(PLAIN))


# Ending and writer of each format.
FORMATS: Mapping[Format, tuple[str, Callable[[Table, str, str], str]]] = {
    "latex": (".tex", _latex_table),
    "csv": (".csv", _csv_table),
}
