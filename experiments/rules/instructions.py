"""``instructions``: questions about the shipped facts, answered in a sentence, in one or two turns.

Twenty wordings ask for the capital, the continent, the currency or the internet domain of a country. The answer always
has the same form, which nothing in the question says: that is what a prompt learns. Divided by country.
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments.rules.countries import ATTRIBUTES, article, attributes_of_countries
from experiments.rules.draws import number, part_of, shuffled

# Attribute -> ways to ask for it. {c} is the country.
WORDINGS: Mapping[str, tuple[str, ...]] = {
    "capital": (
        "What is the capital of {c}?",
        "Which city is the capital of {c}?",
        "Tell me the capital of {c}.",
        "Which city do maps of {c} mark as its capital?",
        "Name the capital city of {c}, please.",
    ),
    "continent": (
        "On which continent is {c}?",
        "Which continent does {c} belong to?",
        "Where in the world is {c}?",
        "Tell me the continent of {c}.",
        "{c} is part of which continent?",
    ),
    "currency": (
        "What is the currency of {c}?",
        "What do people pay with in {c}?",
        "Which money do I need in {c}?",
        "Name the currency of {c}.",
        "I travel to {c}. How do I pay there?",
    ),
    "domain": (
        "What is the internet domain of {c}?",
        "How do web addresses from {c} end?",
        "Which top-level domain does {c} have?",
        "Name the country code of {c} on the internet.",
        "I want a website in {c}. Which ending does it get?",
    ),
}
# Attribute -> the sentence that answers.
ANSWERS: Mapping[str, str] = {
    "capital": "The capital of {c} is {v}.",
    "continent": "{c} lies in {v}.",
    "currency": "In {c}, people pay with the {v}.",
    "domain": "The internet domain of {c} is {v}.",
}
# Conversations of a country.
MOST = {"train": 6, "dev": 2, "test": 2}

Message = dict[str, str]


def rows(split: str) -> list[dict[str, list[Message]]]:
    """Return the conversations of a part, in a drawn order."""
    conversations = [
        (name, at)
        for name, own in attributes_of_countries().items()
        if part_of("country", name) == split
        for at in range(min(MOST[split], 5 * len(own)))
    ]
    return [{"messages": _conversation(name, at)} for name, at in shuffled(conversations, "instructions")]


def _conversation(name: str, at: int) -> list[Message]:
    """Return one or two questions about a country with their answers. No wording is asked twice of a country."""
    own = attributes_of_countries()[name]
    questions = [(key, wording) for key in ATTRIBUTES if key in own for wording in range(len(WORDINGS[key]))]
    drawn = shuffled(questions, "asked", name)
    first = drawn[at]
    others = [question for question in drawn if question[0] != first[0]]
    questions = [first, *others[: number("second", name, at) % 2]]
    said = article(name)
    messages: list[Message] = []
    for key, wording in questions:
        texts = (WORDINGS[key][wording].format(c=said), ANSWERS[key].format(c=said, v=own[key]))
        roles = ("user", "assistant")
        messages += [{"role": role, "content": _begun(text)} for role, text in zip(roles, texts, strict=True)]
    return messages


def _begun(text: str) -> str:
    return text[0].upper() + text[1:]
