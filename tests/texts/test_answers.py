"""Exact answers: the whole text, and the last number."""

from __future__ import annotations

from decimal import Decimal

import pytest

from ptuning.texts.answers import exact, last_number, number_of


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12 + 7 = 19", 19), ("12-7", 7), ("x = -7", -7), ("1,234.50 and", Decimal("1234.50")), ("3.", 3), ("3.0", 3),
        ("a7", 7), ("10 = 2 * 5\n", 5), ("none", None), ("", None), ("costs £20-25", 25),
    ],
)  # fmt: skip
def test_the_last_number_of_a_text(text: str, number: object) -> None:
    assert number_of(text) == number


def test_the_last_number_is_right_if_it_is_that_of_a_reference() -> None:
    found = last_number(["12 + 7 = 19.", "19 or 20", "none", "4"], [["= 19"], ["19"], ["none"], ["5", "four: 4"]])
    assert found["last-number"].values == [1.0, 0.0, 0.0, 1.0]


def test_exact_match_leaves_capitals_punctuation_and_articles_alone() -> None:
    found = exact(["the Nairobi!", "Nairobi, Kenya", ""], [["Nairobi"], ["Nairobi", "Kenya"], [""]])
    assert found["exact"].values == [1.0, 0.0, 0.0]
