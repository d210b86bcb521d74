"""Links between the pages of the docs resolve, and their lines are short."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")])
MAX_LINE = 120
# A row of a table, and a line that `make bench` writes.
UNBROKEN = ("|", "Measured on:")

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: Path) -> str:
    """Return a page with empty lines in place of its blocks of code."""
    code = re.compile(r"^ *```.*?^ *```", flags=re.DOTALL | re.MULTILINE)
    return code.sub(lambda found: "\n" * found[0].count("\n"), page.read_text(encoding="utf-8"))


@cache
def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@by_page
def test_links_between_pages_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in headings(other), f"{page.name} links to {target}; {other.name} has no such heading"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_lines_of_prose_are_short(page: Path) -> None:
    """Nobody reads on in a line of 150 characters. Rows of tables cannot be broken, and links need not be."""
    for number, line in enumerate(prose(page).splitlines(), start=1):
        assert len(line) <= MAX_LINE or "](" in line or line.startswith(UNBROKEN), f"{page.name}, line {number}"
