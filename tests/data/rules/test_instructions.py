"""The conversations of `instructions`: twenty wordings, right answers, and no country in two parts."""

from __future__ import annotations

from ptuning.data.chat.conversations import load_conversations
from ptuning.data.reading import SPLITS
from ptuning.data.rules.countries import article, attributes_of_countries
from ptuning.data.rules.instructions import ANSWERS, WORDINGS, rows
from ptuning.template.turns import read_turns


def test_every_answer_says_the_fact_that_is_asked_for() -> None:
    """Each answer is the sentence of its attribute; all twenty wordings are asked in every part."""
    known = {
        ANSWERS[key].format(c=article(name), v=value).lower(): (key, name)
        for name, own in attributes_of_countries().items()
        for key, value in own.items()
    }
    for split in SPLITS:
        asked = set()
        for one in load_conversations(f"instructions:{split}"):
            key, name = known[one.record["y"].lower()]
            question = read_turns(one.record["messages"])[-1].content.lower()
            wordings = [at for at, text in enumerate(WORDINGS[key]) if text.format(c=article(name)).lower() == question]
            assert wordings, question
            asked.add((key, wordings[0]))
        assert len(asked) == 20


def test_no_country_is_in_two_parts_and_conversations_have_one_or_two_questions() -> None:
    names = {split: set[str]() for split in SPLITS}
    for split in SPLITS:
        found = rows(split)
        assert {len(row["messages"]) for row in found} == {2, 4}
        for row in found:
            text = row["messages"][0]["content"].lower()
            names[split] |= {name for name in attributes_of_countries() if article(name).lower() in text}
        assert len({str(row) for row in found}) == len(found)
    longest = {part: {max(names[part], key=len)} for part in SPLITS}
    assert longest["train"].isdisjoint(longest["test"])
    assert len(rows("train")) > 500
    assert len(rows("test")) > 50
