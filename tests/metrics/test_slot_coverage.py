"""Coverage of attribute values."""

import pytest

from ptuning.errors import RecordError
from ptuning.metrics.slot_coverage import content_field, coverage, values_of
from ptuning.statistics import value_of

KENYA = "name#Kenya*capital#Nairobi*currency#Shilling*domain#.ke"


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


@pytest.mark.parametrize(
    ("text", "content", "share"),
    [
        ("Kenya: Nairobi, the Shilling and .ke", KENYA, 1.0),
        ("kenya has NAIROBI", KENYA, 0.5),
        ("Kenyan people in Nairobis", KENYA, 0.0),  # another word is none
        ("这件上衣很宽松", "类型#上衣*版型#宽松", 1.0),  # no spaces around words
    ],
)
def test_a_value_counts_where_it_is_whole_words(text: str, content: str, share: float) -> None:
    assert value_of(coverage([text], [{"content": content}])) == share


def test_the_field_with_attributes_is_found() -> None:
    assert content_field([{"id": "a", "data": KENYA, "y": "b"}]) == "data"
    with pytest.raises(RecordError, match="fields: x"):
        content_field([{"x": "Kenya", "y": "name#Kenya*capital#Nairobi"}])
