"""Data by rule: the same rows on every machine, parts that share nothing, and texts that say what they should."""

from __future__ import annotations

import functools
import re
from collections import Counter

import pytest

from ptuning.data.reading import SPLITS, load_records, load_rows
from ptuning.data.rules import arithmetic, countries
from ptuning.data.rules.table import RULES
from ptuning.errors import FileError
from ptuning.records import references_of

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


@pytest.mark.parametrize("source", DIGESTS)
def test_the_rows_are_always_the_same(source: str) -> None:
    assert load_rows(source).sha256[:16] == DIGESTS[source]


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.fields])
def test_every_part_is_data_with_targets_under_their_usual_name(name: str) -> None:
    for split in SPLITS:
        raw, records = load_rows(f"{name}:{split}"), load_records(f"{name}:{split}")
        target = RULES[name].fields["y"]
        assert [references_of(one) for one in records] == [
            tuple(one) if isinstance(one, list) else (one,) for one in (row[target] for _, row in raw)
        ]
        assert target not in records[0]  # no copy of an answer is left
        assert records.place(3) == f"{name}:{split}, row 3"
    named = load_records(f"{name}:dev", fields={"y": target, "z": next(iter(raw[0][1]))})
    assert {"y", "z"} <= set(named[0])


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


def test_an_unknown_part_or_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(FileError, match="Did you mean 'countries'"):
        load_rows("country:train")
    with pytest.raises(FileError, match="train, dev, test, not 'val'"):
        load_rows("arithmetic:val")
