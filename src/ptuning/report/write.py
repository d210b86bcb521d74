"""Write the report of an experiment from its JSON files: an HTML page, the same page in Markdown, its pictures, and its
tables as files for a paper: LaTeX (booktabs), and CSV with the unrounded numbers.
"""

from __future__ import annotations

import csv
import functools
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ptuning.files import make_folder, write_text
from ptuning.names import (
    HTML_FILE,
    MARKDOWN_FILE,
    PAGE_MARKS,
    PICTURES_FOLDER,
    REPORT,
    TABLES_FOLDER,
    check_writable,
    delete,
)
from ptuning.report.page import build_page
from ptuning.report.results_file import Results, ScoreWithSpread, read_results
from ptuning.report.tables import Entry, Fold, Picture, Table

if TYPE_CHECKING:
    from jinja2 import Environment

Format = Literal["latex", "csv"]
ENDINGS: Mapping[Format, str] = {"latex": ".tex", "csv": ".csv"}
# What could be read as markup in Markdown, in or out of a table.
MARKDOWN_SPECIAL = re.compile(r"([\\`*_{}\[\]|~$#])")
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


def write_report(results: Results | str | Path, folder: Path | None = None, *, formats: Sequence[Format] = ()) -> Path:
    """Write ``report.html``, ``report.md`` and ``pictures/`` of results, or of the folder that holds them, into a
    folder, by default theirs, and return the page's path.

    ``tables/`` gets each table in the ``formats``, and in those that it holds already. A FileError if a file is
    missing, damaged or of another format, or nothing can be written.
    """
    results = results if isinstance(results, Results) else read_results(results)
    folder = results.folder if folder is None else folder
    page = build_page(results)
    environment = _environment()
    written = {
        Path(file): environment.get_template(f"{file}.jinja").render(
            page=page, folder=PICTURES_FOLDER, mark=PAGE_MARKS[file]
        )
        for file in (HTML_FILE, MARKDOWN_FILE)
    }
    scan = check_writable(folder, REPORT, overwrite=True)
    there = {path.suffix for path in scan.ours if path.parent == folder / TABLES_FOLDER}
    number = 0
    for section in page.sections:
        for block in section.blocks:
            if isinstance(block, Picture):
                text = f'<?xml version="1.0" encoding="utf-8"?>\n{PAGE_MARKS[".svg"]}\n{block.svg}'
                written[Path(PICTURES_FOLDER, f"{block.name}.svg")] = text
            for table in block.blocks if isinstance(block, Fold) else [block]:
                if isinstance(table, Table):
                    number += 1
                    name = f"{number:02d}-{section.anchor}"
                    for form, ending in ENDINGS.items():
                        if form in formats or ending in there:
                            text = _latex_table(table, name) if form == "latex" else _csv_table(table, section.heading)
                            written[Path(TABLES_FOLDER, f"table-{name}{ending}")] = text
    for part in dict.fromkeys((Path(PICTURES_FOLDER), *(path.parent for path in written))):
        make_folder(folder / part)
    for path, text in written.items():
        write_text(folder / path, text)
    delete(path for path in scan.ours if path.relative_to(folder) not in written)  # of other results
    return folder / HTML_FILE


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("ptuning.report", "pages"),
        autoescape=select_autoescape(["html.jinja"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["markdown"] = _markdown
    return environment


def _markdown(text: str) -> str:
    r"""Escape text so that Markdown shows it as it is, on one line.

    >>> _markdown("[X] | <b>") == r"\[X\] \| &lt;b&gt;"
    True
    """
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return MARKDOWN_SPECIAL.sub(r"\\\1", flat)


def latex(text: str) -> str:
    r"""Return a text as LaTeX that prints it as it is, on one line.

    >>> print(latex("[X] costs 5 % & x_1"))
    {[}X{]} costs 5 \% \& x\_1
    """
    plain = (char for char in text.replace("\n", " ") if char.isprintable() or char in LATEX)
    return "".join(LATEX.get(char, char) for char in plain)


def _latex_table(table: Table, label: str) -> str:
    columns = len(table.columns)
    # A table of texts breaks them; in one of numbers only the headings of rows are long.
    spec = "l" + "r" * (columns - 1) if table.numbers else rf"p{{{0.94 / columns:.2f}\linewidth}}" * columns
    rows = [[_latex_entry(entry, table) for entry in row] for row in table.rows]
    head, *body = [" & ".join(row) + r" \\" for row in [list(map(latex, table.columns)), *rows]]
    return rf"""{PAGE_MARKS[".tex"]}; it needs \usepackage{{booktabs}}
\begin{{table}}
\centering
\caption{{{latex(table.caption)}}}
\label{{tab:{label}}}
\begin{{tabular}}{{{spec}}}
\toprule
{head}
\midrule
{chr(10).join(body)}
\bottomrule
\end{{tabular}}
\end{{table}}
"""


def _latex_entry(entry: Entry, table: Table) -> str:
    text = rf"\textbf{{{latex(entry.text)}}}" if entry.best else latex(entry.text)
    small = [rf"{{\scriptsize {latex(line)}}}" for line in entry.small]
    if not small or not table.numbers:
        return "; ".join([text, *small])
    align, lines = "l" if entry.score is None else "r", r" \\ ".join([text, *small])
    return rf"\begin{{tabular}}[t]{{@{{}}{align}@{{}}}}{lines}\end{{tabular}}"


def _csv_table(table: Table, heading: str) -> str:
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
