"""Data by rule: the same rows on every machine, parts that share nothing, and texts that say what they should."""

import functools
import re
from pathlib import Path

import pytest
from experiments.invented import invented
from experiments.rules import arithmetic, countries
from experiments.rules.__main__ import RULES, write

from ptuning.data.reading import SPLITS, load_records
from ptuning.files import sha256
from ptuning.metrics.slot_coverage import coverage
from ptuning.records import references_of
from ptuning.statistics import value_of

# What the rows are, so that figures of one version are those of the next.
DIGESTS = {
    "countries:train": "d33a011635e3b1f3",
    "countries:test": "9bff3e000195bfe0",
    "arithmetic:train": "73c2104a465e424a",
    "arithmetic:test": "505083750e5579d6",
    "instructions:train": "128241ce55afe108",
    "instructions:test": "821c8a23d9d067fc",
}


@functools.cache
def sums(split: str) -> list[dict[str, str]]:
    """The rows of a part of arithmetic, made once."""
    return arithmetic.rows(split)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of all rules."""
    base = tmp_path_factory.mktemp("rules")
    for name in RULES:
        write(name, base / name)
    return base


def test_the_rows_are_always_the_same(folder: Path) -> None:
    for source, digest in DIGESTS.items():
        name, split = source.split(":")
        assert sha256((folder / name / f"{split}.jsonl").read_bytes())[:16] == digest


def test_no_country_or_pair_of_operands_is_in_two_parts() -> None:
    countries_of = {split: [str(row["content"]).split("*")[0] for row in countries.rows(split)] for split in SPLITS}
    operands = {
        split: [(row["digits"][1], *sorted(row["input"].split(" ")[::2])) for row in sums(split)] for split in SPLITS
    }
    for parts in (countries_of, operands):
        assert sum(len(set(part)) for part in parts.values()) == len({key for part in parts.values() for key in part})
    assert sum(part.count("name#Kenya") for part in countries_of.values()) > 3
    cells = {row["digits"] for row in sums("test")}
    assert cells == {row["digits"] for row in sums("train")} == {f"{a}{s}{b}" for s, a, b in arithmetic.CELLS}


def test_every_text_says_its_content_and_where_it_is_scored_every_pattern_is_right() -> None:
    for split in SPLITS:
        for row in countries.rows(split):
            values = [part.partition("#")[2] for part in str(row["content"]).split("*")]
            said = row["summary"] if isinstance(row["summary"], list) else [row["summary"]]
            assert len(set(said)) == (1 if split == "train" else len(countries.PATTERNS))
            assert all(value in text for value in values for text in said)
            assert 2 <= len(values) <= 5


def test_every_step_of_arithmetic_is_right() -> None:
    for split in SPLITS:
        for row in sums(split):
            assert row["output"].startswith(f"{row['input']} = ")
            steps = row["output"].split(" = ")
            assert steps[-1] == row["answer"]
            assert {eval(step) for step in steps} == {int(row["answer"])}
            left, sign, right = row["input"].split(" ")
            assert row["digits"] == f"{len(left)}{sign}{len(right)}"
            assert int(row["answer"]) >= 0
    assert re.fullmatch(r"\d+ \* \(\d0 \+ \d\)", arithmetic._steps("*", 12, 34)[0])


def test_every_text_of_countries_says_all_and_invents_nothing(folder: Path) -> None:
    records = load_records(folder / "countries" / "test.jsonl", fields={"y": "summary"})[::4]
    for pattern in (0, 11):
        texts = [references_of(record)[pattern] for record in records]
        assert value_of(coverage(texts, records)) == 1.0
        assert value_of(invented(texts, records)) == 0.0
