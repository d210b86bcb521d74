"""``countries``: attributes of a country to a text that says them, from the shipped facts; divided by country.

A content is written as in ADGEN (``name#Kenya*capital#Nairobi``). A text follows one of twelve sentence patterns with a
drawn order of the attributes, so that no text follows from its content. In the parts dev and test, ``summary`` is the
list of what all patterns make of the content: any of them is right.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from experiments.rules.draws import number, part_of, shuffled

# Attribute -> the shipped facts that have it. A country may lack one.
ATTRIBUTES = {"capital": "capitals", "continent": "continents", "currency": "currencies", "domain": "domains"}
# Contents of a country: every choice of its attributes, or so many drawn ones where they are scored.
MOST = {"train": 15, "dev": 5, "test": 5}
# Names of countries that are said with an article.
ARTICLE = frozenset({"Bahamas", "Comoros", "Gambia", "Maldives", "Netherlands", "Philippines", "Seychelles"})
ARTICLE_STARTS, ARTICLE_ENDS = ("United ",), (" Islands", " Republic", " Territory", " Territories", " Emirates")

Attributes = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Pattern:
    """A sentence pattern: what stands before and after the clauses, the clause of each attribute, and what joins them,
    ``last`` before the last one. ``{c}`` is the country, ``{v}`` a value. The first clause may be ``opening``.
    """

    clauses: Mapping[str, str]
    before: str = "{c} "
    after: str = "."
    join: str = ", "
    last: str = " and "
    opening: Mapping[str, str] | None = None

    def text(self, name: str, attributes: Attributes) -> str:
        """Return the text that says these attributes, in their order."""
        country = article(name)
        made = [
            (self.opening if self.opening is not None and not at else self.clauses)[key].format(v=value, c=country)
            for at, (key, value) in enumerate(attributes)
        ]
        listed = self.last.join([self.join.join(made[:-1]), made[-1]] if len(made) > 1 else made)
        text = f"{self.before.format(c=country)}{listed}{self.after.format(c=country)}"
        return text[0].upper() + text[1:]


def _clauses(capital: str, continent: str, currency: str, domain: str) -> dict[str, str]:
    return {"capital": capital, "continent": continent, "currency": currency, "domain": domain}


_DOES = _clauses("has {v} as its capital", "lies in {v}", "pays with the {v}", "uses the internet domain {v}")
_WHOSE = _clauses(
    "whose capital is {v}", "whose continent is {v}", "whose currency is the {v}", "whose internet domain is {v}"
)
_ITS = _clauses("its capital is {v}", "its continent is {v}", "its currency is the {v}", "its internet domain is {v}")
_SENTENCES = {key: text[0].upper() + text[1:] for key, text in _ITS.items()}
_OF = _clauses(
    "the capital of {c} is {v}",
    "the continent of {c} is {v}",
    "the currency of {c} is the {v}",
    "the internet domain of {c} is {v}",
)
_IS_ITS = _clauses("{v} is its capital", "{v} is its continent", "the {v} is its currency", "{v} is its domain")
_IS_OF = _clauses(
    "{v} is the capital of {c}",
    "{v} is the continent of {c}",
    "the {v} is the currency of {c}",
    "{v} is the domain of {c}",
)
_WITH = _clauses("{v} as its capital", "{v} as its continent", "the {v} as its currency", "{v} as its internet domain")
_THE = _clauses("the capital is {v}", "the continent is {v}", "the currency is the {v}", "the internet domain is {v}")
_THERE = _clauses("see the capital {v}", "are in {v}", "pay with the {v}", "read websites that end in {v}")
PATTERNS = (
    Pattern(_DOES),
    Pattern(_DOES, before="The country {c} ", last=", and it "),
    Pattern(_DOES, before="{c} is a country that ", join=", that ", last=" and that "),
    Pattern(_WHOSE, before="{c} is a country "),
    Pattern(_WHOSE, before="There is a country called {c}, ", last=", and "),
    Pattern(_SENTENCES, before="", join=". ", last=". ", opening=_OF),
    Pattern(_IS_ITS, before="", opening=_IS_OF),
    Pattern(_WITH, before="{c} is a country with "),
    Pattern(_WITH, before="With ", after=", this country is {c}."),
    Pattern(_THE, before="In {c}, ", last=", and "),
    Pattern(_THERE, before="In {c}, travellers "),
    Pattern(_ITS, before="This is what we know of {c}: ", join="; ", last="; "),
)


def rows(split: str) -> list[dict[str, str | list[str]]]:
    """Return the rows of a part, in a drawn order."""
    contents = [
        (name, chosen) for name, own in attributes_of_countries().items() for chosen in _contents(name, own, split)
    ]
    return [_row(name, chosen, split) for name, chosen in shuffled(contents, "order")]


def texts(name: str, attributes: Attributes) -> list[str]:
    """Return what every pattern makes of a content, each with an order of its own; the first is a drawn one."""
    every = [
        pattern.text(name, shuffled(attributes, "said", name, len(attributes), at))
        for at, pattern in enumerate(PATTERNS)
    ]
    first = number("pattern", name, *attributes) % len(every)
    return every[first:] + every[:first]


@functools.cache
def attributes_of_countries() -> dict[str, dict[str, str]]:
    """Return country -> its attributes, as far as the shipped facts have them."""
    attributes: dict[str, dict[str, str]] = {}
    for attribute, facts in ATTRIBUTES.items():
        folder = resources.files("ptuning.data") / "facts" / facts
        for part in ("train", "dev", "test"):
            for line in (folder / f"{part}.jsonl").read_text(encoding="utf-8").split("\n"):
                if line:
                    row = json.loads(line)
                    attributes.setdefault(row["x"], {})[attribute] = row["y"]
    return attributes


def _contents(name: str, own: Mapping[str, str], split: str) -> list[tuple[tuple[str, str], ...]]:
    """Return the contents of a country: choices of its attributes, each in a drawn order."""
    if part_of("country", name) != split:
        return []
    every = [chosen for size in range(1, len(own) + 1) for chosen in itertools.combinations(sorted(own.items()), size)]
    drawn = shuffled(every, "contents", name)[: MOST[split]]
    return [tuple(shuffled(chosen, "content", name, len(chosen))) for chosen in drawn]


def _row(name: str, attributes: Attributes, split: str) -> dict[str, str | list[str]]:
    content = "*".join(f"{key}#{value}" for key, value in (("name", name), *attributes))
    said = texts(name, attributes)
    return {"content": content, "summary": said[0] if split == "train" else said}


def article(name: str) -> str:
    """Return a country's name as it is said in a sentence, some with an article."""
    has_article = name in ARTICLE or name.startswith(ARTICLE_STARTS) or name.endswith(ARTICLE_ENDS)
    return f"the {name}" if has_article else name
