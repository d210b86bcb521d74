"""Data by rule: the same rows on every machine, parts that share nothing, and texts that say what they should."""

from __future__ import annotations

import functools
import re
from collections import Counter
from pathlib import Path

import pytest
from experiments.invented import invented
from experiments.rules import arithmetic, countries, instructions
from experiments.rules.__main__ import RULES, write

from ptuning.data.conversations import load_conversations
from ptuning.data.reading import SPLITS, load_records
from ptuning.files import sha256
from ptuning.metrics.slot_coverage import coverage
from ptuning.records import references_of
from ptuning.statistics import value_of
from ptuning.template.messages import read_messages

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


def test_no_country_is_in_two_parts_and_each_has_several_contents() -> None:
    found = {split: [str(row["content"]).split("*")[0] for row in countries.rows(split)] for split in SPLITS}
    assert not set(found["train"]) & set(found["dev"])
    assert not set(found["train"]) & set(found["test"])
    assert not set(found["dev"]) & set(found["test"])
    assert found["train"].count("name#Kenya") + found["test"].count("name#Kenya") + found["dev"].count("name#Kenya") > 3
    assert sum(len(set(names)) for names in found.values()) > 240


def test_every_text_says_its_content_and_where_it_is_scored_every_pattern_is_right() -> None:
    for split in SPLITS:
        for row in countries.rows(split):
            values = [part.partition("#")[2] for part in str(row["content"]).split("*")]
            said = row["summary"] if isinstance(row["summary"], list) else [row["summary"]]
            assert len(set(said)) == (1 if split == "train" else len(countries.PATTERNS))
            assert all(value in text for value in values for text in said)
            assert 2 <= len(values) <= 5


def test_a_text_does_not_follow_from_its_content() -> None:
    """Texts of one content differ in pattern and order from country to country."""
    begins = {str(row["summary"])[:12].split()[0] for row in countries.rows("train")}
    assert {"In", "With", "This", "There"} <= begins


def test_an_article_stands_where_people_say_it() -> None:
    assert countries.texts("Gambia", [("capital", "Banjul")])[0].count("the Gambia") + countries.texts(
        "Gambia", [("capital", "Banjul")]
    )[0].count("The Gambia")
    assert not any("the Kenya" in text for text in countries.texts("Kenya", [("capital", "Nairobi")]))


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


def test_no_pair_of_operands_is_in_two_parts() -> None:
    found = {
        split: {(row["digits"][1], *sorted(row["input"].split(" ")[::2])) for row in sums(split)} for split in SPLITS
    }
    assert not found["train"] & found["dev"]
    assert not found["train"] & found["test"]
    assert not found["dev"] & found["test"]
    cells = {row["digits"] for row in sums("test")}
    assert cells == {row["digits"] for row in sums("train")} == {f"{a}{s}{b}" for s, a, b in arithmetic.CELLS}


def test_every_cell_of_digits_has_a_hundred_test_rows_where_there_are_so_many_pairs() -> None:
    """Of two one-digit numbers there are 81 pairs at most: half of them are asked, the others are learned from."""
    found = {split: Counter(row["digits"] for row in sums(split)) for split in SPLITS}
    counts, every = found["test"], sum(found.values(), Counter())
    few = {"1+1": 81, "1*1": 81, "1-1": 45}
    assert all(count >= 100 for digits, count in counts.items() if digits not in few)
    for digits, pairs in few.items():
        assert every[digits] == pairs
        assert counts[digits] >= 0.4 * pairs


def test_every_text_of_countries_says_all_and_invents_nothing(folder: Path) -> None:
    records = load_records(folder / "countries" / "test.jsonl", fields={"y": "summary"})[::4]
    for pattern in (0, 11):
        texts = [references_of(record)[pattern] for record in records]
        assert value_of(coverage(texts, records)) == 1.0
        assert value_of(invented(texts, records)) == 0.0


def test_conversations_ask_in_twenty_wordings_and_answer_with_the_fact(folder: Path) -> None:
    known = {
        instructions.ANSWERS[key].format(c=countries.article(name), v=value).lower(): (key, name)
        for name, own in countries.attributes_of_countries().items()
        for key, value in own.items()
    }
    names: dict[str, set[str]] = {split: set() for split in SPLITS}
    for split in SPLITS:
        asked = set()
        for question in load_conversations(folder / "instructions" / f"{split}.jsonl"):
            key, name = known[question.record["y"].lower()]
            text = read_messages(question.record["messages"])[-1].content.lower()
            wordings = [wording.format(c=countries.article(name)).lower() for wording in instructions.WORDINGS[key]]
            asked.add((key, wordings.index(text)))
            names[split].add(name)
        assert len(asked) == 20
        assert {len(row["messages"]) for row in instructions.rows(split)} == {2, 4}
    assert not names["train"] & names["dev"]
    assert not (names["train"] | names["dev"]) & names["test"]
