"""Invented values: names, numbers and values of other rows that neither the attributes nor a reference have."""

import pytest
from experiments.invented import invented

from ptuning.records import as_records

KENYA = "name#Kenya*capital#Nairobi*currency#Shilling*domain#.ke"


def count(text: str, content: str, reference: str = "", others: tuple[str, ...] = ()) -> int:
    """Return the number of values that a text invents; ``others`` are contents of other rows."""
    rows = as_records([{"content": row, "y": reference or "none"} for row in (content, *others)])
    return int(invented([text, *("" for _ in others)], rows).over[0, 0])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Kenyan people in Nairobis", 1),  # a name in another form
        ("Kenya has Mombasa as its capital", 1),
        ("Kenya has Port Vila as its capital", 1),  # one name
        ("Kenya has 47 counties and uses .de.", 2),
        ("Kenya. The Shilling is its money.", 0),  # a sentence begins with a capital
        ("Mombasa is in Kenya", 0),  # begins a sentence, and is no other row's value
        ("In short, Kenya's capital is Nairobi", 0),
        ("a Nairobi-based bank of the Kenyas' Shilling", 1),  # Kenyas
        ("a Nairobi-based bank in Kenya’s heart", 0),
        ("the Nairobi-Mombasa line", 1),
        ("in Uganda's heart", 1),
    ],
)
def test_names_numbers_and_domains_from_nowhere_are_invented(text: str, number: int) -> None:
    assert count(text, KENYA) == number


def test_references_and_other_rows() -> None:
    assert count("Kenya lies in Africa", KENYA, reference="Kenya, in Africa") == 0
    assert count("Mombasa is in Kenya", KENYA, others=("name#X*capital#Mombasa",)) == 1
    assert count("a cheap pub called Aromi", "name[Aromi], eatType[pub]", others=("priceRange[cheap], a[b]",)) == 1
