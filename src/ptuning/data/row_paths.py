"""Where a text stands in a row of a file, and small repairs: ``passage.questions[].question|no_full_stop``. Knows no
tasks and no templates.

A source is names with dots between them; ``[]`` behind a name goes through a list. Repairs follow, each behind a ``|``:
    ``no_full_stop``    without a full stop, question or exclamation mark at the end
    ``lower_first``     with a small first letter, unless the first word is all in capitals, as "I" is
    ``before TEXT``     what stands before TEXT
    ``after TEXT``      what stands after it
    ``without TEXT``    with TEXT taken out
    ``mark SOURCE``     with asterisks around the word whose number (from 0, words at spaces) stands at SOURCE
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ptuning.errors import RecordError, TaskError, closest
from ptuning.files import Json

# Row of a file, and for each list that was gone through (by its source) the element that the row stands for.
Context = Mapping[str, Json]

PLAIN_REPAIRS = ("no_full_stop", "lower_first")
REPAIRS = (*PLAIN_REPAIRS, "before", "after", "without", "mark")


@dataclass(frozen=True)
class Source:
    """Where a text stands.

    Args:
        path: Names, each with ``[]`` behind it if it is a list to go through.
        repairs: (name, argument) of each repair, in order.
        written: As it stands in the task file.

    Raises:
        TaskError: If it is malformed or a repair is unknown.
    """

    path: tuple[str, ...]
    repairs: tuple[tuple[str, str], ...] = ()
    written: str = ""

    @classmethod
    def parse(cls, text: str) -> Source:
        """Parse a source.

        Raises:
            TaskError: If it is malformed.

        Example:
            >>> Source.parse("target.span1_text|no_full_stop").path
            ('target', 'span1_text')
        """
        path, *repairs = text.split("|")
        names = tuple(name.strip() for name in path.split("."))
        if not all(re.fullmatch(r"[^\[\]]+(\[\])?", name) for name in names):
            raise TaskError(f"'{text}' is no place in a row; write names with dots between them, and [] behind a list")
        found = []
        for repair in repairs:
            name, _, argument = repair.strip().partition(" ")
            if name not in REPAIRS:
                raise TaskError(
                    f"'{text}': unknown repair '{name}'.{closest(name, REPAIRS)} Known: {', '.join(REPAIRS)}"
                )
            if (name in PLAIN_REPAIRS) != (argument == ""):
                what = "takes nothing" if argument else "needs something"
                raise TaskError(f"'{text}': the repair '{name}' {what} behind its name")
            if name == "mark":
                cls.parse(argument)
            found.append((name, argument))
        return cls(names, tuple(found), text)

    @property
    def prefix(self) -> str:
        """The path without repairs."""
        return ".".join(self.path)

    def values(self, context: Context, *, where: str) -> list[Json]:
        """Return the values there, unrepaired: one, or any number if the source goes through lists of its own.

        Raises:
            RecordError: If a name on the way is missing, or what it names is no object or no list.
        """
        found: list[Json] = [context[""]]
        for depth, name in enumerate(self.path, start=1):
            prefix = ".".join(self.path[:depth])
            if prefix in context:
                found = [context[prefix]]
                continue
            found = [inner for value in found for inner in _step(value, name, source=self.written, where=where)]
        return found

    def texts(self, context: Context, *, where: str) -> list[str]:
        """Return the texts there, repaired; numbers and booleans as JSON writes them.

        Raises:
            RecordError: If something is missing, or is no text and no number.
        """
        return [
            self.repaired(_text(value, source=self.written, where=where), context, where=where)
            for value in self.values(context, where=where)
        ]

    def text(self, context: Context, *, where: str) -> str:
        """Return the one text there.

        Raises:
            RecordError: If there is not exactly one.
        """
        found = self.texts(context, where=where)
        if len(found) != 1:
            raise RecordError(
                f"{where}: '{self.written}' stands for {len(found)} texts, and a field takes one; list what it goes "
                "through under 'rows'"
            )
        return found[0]

    def repaired(self, text: str, context: Context, *, where: str) -> str:
        """Return a text after the source's repairs.

        Raises:
            RecordError: If one of them does not find what it needs.
        """
        for name, argument in self.repairs:
            if name == "no_full_stop":
                text = re.sub(r"\s*[.?!]+\s*$", "", text)
            elif name == "lower_first":
                first = re.match(r"\w+", text)
                if first is not None and not first[0].isupper():  # "I" and "NASA" stay
                    text = text[0].lower() + text[1:]
            elif name == "without":
                text = text.replace(argument, "")
            elif name == "mark":
                text = _marked(text, Source.parse(argument).text(context, where=where), where=where)
            else:
                before, found, after = text.partition(argument)
                if not found:
                    raise RecordError(
                        f"{where}: there is no '{argument}' in '{text[:80]}', where '{self.written}' needs it"
                    )
                text = before if name == "before" else after
        return text


def unfold(row: Json, lists: Iterable[Source], *, where: str) -> Iterator[Context]:
    """Yield one context per element of the innermost list, in order; the row itself where there are no lists.

    Args:
        row: A row of the file.
        lists: The lists from the outermost inwards, each beginning with the one before it.
        where: What the row is called in messages.

    Raises:
        RecordError: If a list is missing.
    """
    contexts: list[dict[str, Json]] = [{"": row}]
    for source in lists:
        contexts = [
            {**context, source.prefix: value} for context in contexts for value in source.values(context, where=where)
        ]
    yield from contexts


def as_text(value: Json) -> str | None:
    """Return a scalar as the text that a record holds for it; None for ``null``, lists and objects."""
    if isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, bool | int | float) else None


def _step(value: Json, name: str, *, source: str, where: str) -> list[Json]:
    key = name.removesuffix("[]")
    if not isinstance(value, Mapping):
        raise RecordError(f"{where}: '{source}' looks for '{key}' in what is no object")
    if key not in value:
        have = ", ".join(sorted(value)) or "nothing"
        raise RecordError(f"{where}: no '{key}', which '{source}' needs; there is {have}.{closest(key, value)}")
    inner = value[key]
    if not name.endswith("[]"):
        return [inner]
    if not isinstance(inner, list):
        raise RecordError(f"{where}: '{key}' is no list, and '{source}' goes through one; leave out its []")
    return inner


def _text(value: Json, *, source: str, where: str) -> str:
    text = as_text(value)
    if text is None:
        kind = "null" if value is None else "a list" if isinstance(value, list) else "an object"
        raise RecordError(f"{where}: '{source}' is {kind}, and a text, a number or true/false is needed")
    return text


def _marked(text: str, number: str, *, where: str) -> str:
    words = text.split()
    if not number.isdecimal() or int(number) >= len(words):
        raise RecordError(f"{where}: there is no word number {number} to mark among the {len(words)} of '{text[:80]}'")
    words[int(number)] = re.sub(r"\w+(?:['-]\w+)*", r"*\g<0>*", words[int(number)], count=1)
    return " ".join(words)
