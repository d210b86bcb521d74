"""Noun phrases: candidates for what a pronoun refers to."""

from ptuning.data.noun_phrases import noun_phrases, other_phrases


def test_names_stand_together_and_articles_take_what_follows() -> None:
    text = "Mr. Moncrieff visited Chester in the luxurious New York apartment, because he liked his son."
    assert noun_phrases(text) == ["Mr. Moncrieff", "Chester", "the luxurious New York", "his son"]


def test_verbs_and_function_words_end_a_phrase() -> None:
    assert noun_phrases("The path to the lake was blocked, so we could not use it.") == ["The path", "the lake"]
    assert noun_phrases("The council refused the demonstrators a permit.") == [
        "The council",
        "the demonstrators",
        "a permit",
    ]


def test_a_phrase_stands_once_and_a_mark_is_no_part_of_it() -> None:
    assert noun_phrases("Bob saw Bob, and *Bob* left.") == ["Bob"]
    assert noun_phrases("they were there") == []


def test_other_phrases_share_no_word_and_are_single_words_where_there_is_none() -> None:
    assert other_phrases("The pony threw the boy.", than=["Pony"]) == ["the boy"]
    assert other_phrases("Sam saw ducks near the lake.", than=["Sam", "the lake"]) == ["saw", "ducks", "near"]
