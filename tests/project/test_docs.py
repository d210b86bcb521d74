"""Links between the pages of the docs resolve."""

import re
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")])


def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    code = re.compile(r"^ *```.*?^ *```", flags=re.DOTALL | re.MULTILINE)
    return code.sub("", page.read_text(encoding="utf-8"))


@cache
def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    names = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in names}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in headings(other), f"{page.name}: {other.name} has no heading {target}"
