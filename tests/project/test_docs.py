"""The pages of the docs name what exists: files, tests, classes and functions, other pages and their headings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "ptuning"
PAGES = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")])
# Pages that speak of the code: what stands there in backticks as a name is one.
OF_CODE = ("CONTRIBUTING.md", "architecture.md", "decisions.md", "extending.md", "glossary.md", "invariants.md")
# Words in backticks that are names elsewhere: in PyTorch and transformers, in git, in an example of one's own.
ELSEWHERE = {"LSTM", "MLP", "Adam", "AdamW", "DynamicCache"}
# Files that recipes would add.
TO_BE_ADDED = {
    "cli/commands/hello.py", "cli/commands/serve.py", "method/longest_choice.py", "tests/cli/commands/test_hello.py",
    "tests/method/test_longest_choice.py",
}  # fmt: skip
MAX_LINE = 120
# A row of a table, and a line that `make bench` writes.
UNBROKEN = ("|", "Measured on:")

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: Path) -> str:
    """Return a page with empty lines in place of its blocks of code."""
    code = re.compile(r"^ *```.*?^ *```", flags=re.DOTALL | re.MULTILINE)
    return code.sub(lambda found: "\n" * found[0].count("\n"), page.read_text(encoding="utf-8"))


def quoted(page: Path) -> list[str]:
    """Return what a page's prose puts in backticks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


@cache
def source() -> str:
    """Return all code of the project as one text."""
    paths = [path for folder in ("src", "tests", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    return "\n".join(path.read_text(encoding="utf-8") for path in [*paths, ROOT / "pyproject.toml", ROOT / "Makefile"])


@cache
def words() -> set[str]:
    """Return every word of the project's code."""
    return set(re.findall(r"\w+", source()))


@cache
def in_tests() -> set[str]:
    """Return the names of all tests and of their files."""
    files = {path.stem for path in (ROOT / "tests").rglob("*.py")}
    return files | set(re.findall(r"\bdef (\w+)", source()))


@cache
def members() -> dict[str, set[str]]:
    """Return the classes and types of the package and their members: methods, fields, attributes that methods set."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).update(_members(node))
        types = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
        found |= {one.id: set() for one in types if isinstance(one, ast.Name) and one.id not in found}
    return found


def _members(node: ast.ClassDef) -> Iterator[str]:
    for one in ast.walk(node):
        if isinstance(one, ast.FunctionDef):
            yield one.name
        elif isinstance(one, ast.AnnAssign | ast.Assign):
            targets = one.targets if isinstance(one, ast.Assign) else [one.target]
            for target in targets:
                yield target.id if isinstance(target, ast.Name) else getattr(target, "attr", "")


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


@by_page
def test_files_that_a_page_names_exist(page: Path) -> None:
    """A path of Python code is given from the root, or below ``src/ptuning``; a test may be given by its name."""
    for text in quoted(page):
        for path in set(re.findall(r"[\w./*-]+\.py\b", text)) - TO_BE_ADDED:
            places = [ROOT.glob(path), PACKAGE.glob(path), (ROOT / "tests").rglob(path)]
            assert any(any(place) for place in places), f"{page.name} names {path}"
        for path in re.findall(r"(?<![\w/])(?:src|tests|scripts|benchmarks|docs)/[\w./-]+", text):
            assert path in TO_BE_ADDED or (ROOT / path).exists(), f"{page.name} names {path}"


@by_page
def test_tests_that_a_page_names_exist(page: Path) -> None:
    for text in quoted(page):
        for name in re.findall(r"\btest_\w+(?!\w|\.py)", text):
            assert name in in_tests() or any(name in path for path in TO_BE_ADDED), f"{page.name} names {name}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name in OF_CODE], ids=lambda page: page.name)
def test_names_of_code_that_a_page_gives_exist(page: Path) -> None:
    """A class and its member are in the package; any other identifier is at least a word of the code."""
    for text in quoted(page):
        if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*(\(\))?", text):
            continue
        first, *rest = text.removesuffix("()").split(".")
        if first in members() and rest and rest[-1] != "py":
            assert rest[0] in members()[first], f"{page.name} names {text}; {first} has no {rest[0]}"
        elif re.fullmatch(r"[A-Z][a-z]\w*[A-Z]\w*|[A-Z][a-z]+", first) and first not in ELSEWHERE:
            assert first in members(), f"{page.name} names the class {first}"
        else:
            unknown = [part for part in (first, *rest) if part not in words()]
            assert not unknown, f"{page.name} names {text}; the code has no {unknown[0]}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_lines_of_prose_are_short(page: Path) -> None:
    """Nobody reads on in a line of 150 characters. Rows of tables cannot be broken, and links need not be."""
    for number, line in enumerate(prose(page).splitlines(), start=1):
        assert len(line) <= MAX_LINE or "](" in line or line.startswith(UNBROKEN), f"{page.name}, line {number}"
