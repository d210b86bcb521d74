"""Write the report of an experiment from its JSON files: an HTML page, the same page in Markdown, and its pictures."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
from ptuning.report.blocks import Picture
from ptuning.report.exports import FORMATS, Format, table_files
from ptuning.report.results_file import Results, read_results
from ptuning.report.sections import build_page

if TYPE_CHECKING:
    from jinja2 import Environment

# What could be read as markup in Markdown, in or out of a table.
MARKDOWN_SPECIAL = re.compile(r"([\\`*_{}\[\]|~$#])")


def write_report(folder: str | Path, *, formats: Sequence[Format] = ()) -> Path:
    """Write ``report.html``, ``report.md`` and ``pictures/`` from a benchmark's JSON files, and return the page's path.

    ``tables/`` gets each table in the ``formats``, ``latex`` or ``csv``, and in those that it holds already. A
    FileError if a file is missing, damaged or of another format, or nothing can be written.
    """
    return write_pages(read_results(folder), Path(folder), formats=formats)


def write_pages(results: Results, folder: Path, *, formats: Sequence[Format] = ()) -> Path:
    """Write the report of results into a folder as :func:`write_report` does."""
    page = build_page(results)
    environment = _environment()
    rendered = {
        file: environment.get_template(f"{file}.jinja").render(page=page, folder=PICTURES_FOLDER, mark=PAGE_MARKS[file])
        for file in (HTML_FILE, MARKDOWN_FILE)
    }
    blocks = [block for section in page.sections for block in section.blocks]
    drawn = {block.name: block.svg for block in blocks if isinstance(block, Picture)}
    found = check_writable(folder, REPORT, overwrite=True)
    written = {
        Path(PICTURES_FOLDER, f"{name}.svg"): f'<?xml version="1.0" encoding="utf-8"?>\n{PAGE_MARKS[".svg"]}\n{svg}'
        for name, svg in drawn.items()
    }
    there = {path.suffix for path in found.ours if path.parent == folder / TABLES_FOLDER}
    wanted = [name for name, (ending, _) in FORMATS.items() if name in formats or ending in there]
    written |= {Path(TABLES_FOLDER, name): text for name, text in table_files(page, wanted).items()}
    written |= {Path(file): text for file, text in rendered.items()}
    for part in dict.fromkeys((Path(PICTURES_FOLDER), *(path.parent for path in written))):
        make_folder(folder / part)
    for path, text in written.items():
        write_text(folder / path, text)
    delete(path for path in found.ours if path.relative_to(folder) not in written)  # of other results
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
