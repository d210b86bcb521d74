"""Coverage of attribute values, and invented ones."""

from __future__ import annotations

import pytest

from ptuning.errors import RecordError
from ptuning.metrics.slot_coverage import content_field, coverage, values_of
from ptuning.records import as_records

KENYA = "name#Kenya*capital#Nairobi*currency#Shilling*domain#.ke"


def scores(text: str, content: str, reference: str = "", others: tuple[str, ...] = ()) -> tuple[float, int]:
    """Return the coverage of a text, and how many values it invents; ``others`` are contents of other rows."""
    rows = as_records([{"content": one, "y": reference or "none"} for one in (content, *others)])
    found = coverage([text, *("" for _ in others)], rows)
    mentioned, invented = found["coverage"], found["invented"]
    return float(mentioned.over[0, 0] / mentioned.under[0, 0]), int(invented.over[0, 0])


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (KENYA, ("Kenya", "Nairobi", "Shilling", ".ke")),
        ("name[Blue Spice], familyFriendly[yes], near[Crowne Plaza Hotel]", ("Blue Spice", "Crowne Plaza Hotel")),
        ("类型#上衣*版型#宽松", ("上衣", "宽松")),
        ("name#Kenya", ("Kenya",)),
        ("Kenya", None),
        ("3 # 4 * 5", None),
        ("", None),
    ],
)
def test_values_of_a_content(text: str, values: tuple[str, ...] | None) -> None:
    assert values_of(text) == values


def test_a_value_counts_if_it_stands_there_as_words_of_its_own() -> None:
    assert scores("Kenya: Nairobi, the Shilling and .ke", KENYA) == (1.0, 0)
    assert scores("kenya has NAIROBI", KENYA) == (0.5, 0)
    assert scores("Kenyan people in Nairobis", KENYA) == (0.0, 1)  # another word is none; it is a name, though
    assert scores("这件上衣很宽松", "类型#上衣*版型#宽松") == (1.0, 0)  # no spaces around words


def test_names_numbers_and_domains_from_nowhere_are_invented() -> None:
    assert scores("Kenya has Mombasa as its capital", KENYA)[1] == 1
    assert scores("Kenya has Port Vila as its capital", KENYA)[1] == 1  # one name
    assert scores("Kenya has 47 counties and uses .de.", KENYA)[1] == 2
    assert scores("Kenya. The Shilling is its money.", KENYA)[1] == 0  # a sentence begins with a capital
    assert scores("Kenya lies in Africa", KENYA, reference="Kenya, in Africa")[1] == 0  # a reference says it
    assert scores("Mombasa is in Kenya", KENYA)[1] == 0  # begins a sentence, and is nobody's value
    assert scores("Mombasa is in Kenya", KENYA, others=("name#X*capital#Mombasa",))[1] == 1
    assert scores("a cheap pub called Aromi", "name[Aromi], eatType[pub]", others=("priceRange[cheap], a[b]",))[1] == 1


@pytest.mark.parametrize(
    ("text", "invented"),
    [
        ("In short, Kenya's capital is Nairobi", 0),
        ("a Nairobi-based bank of the Kenyas' Shilling", 1),  # Kenyas
        ("a Nairobi-based bank in Kenya’s heart", 0),
        ("the Nairobi-Mombasa line", 1),
        ("in Uganda's heart", 1),
    ],
)
def test_what_a_name_is_made_into_is_not_invented(text: str, invented: int) -> None:
    assert scores(text, KENYA)[1] == invented


def test_the_field_with_attributes_is_found_or_asked_for() -> None:
    assert content_field([{"id": "a", "data": KENYA, "y": "b"}]) == "data"
    with pytest.raises(RecordError, match="no field holds them; fields: x"):
        content_field([{"x": "Kenya", "y": "name#Kenya*capital#Nairobi"}])
