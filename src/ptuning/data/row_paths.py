"""Paths to texts in a row of a data file, with small repairs: ``passage.questions[].question|no_full_stop``.

A path is names with dots between them; ``[]`` behind a name goes through a list. Repairs follow, each behind a ``|``:
    ``no_full_stop``    without a full stop, question or exclamation mark at the end
    ``lower_first``     with a small first letter, unless the first word is all in capitals, as "I" is
    ``before TEXT``     the part before TEXT
    ``after TEXT``      the part after TEXT
    ``without TEXT``    with TEXT taken out
    ``mark PATH``       with asterisks around the word whose number (from 0, words at spaces) is at PATH
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ptuning.errors import RecordError, TaskError, closest
from ptuning.files import Json

# The row of the file (under ""), and for each list on the way (under its path) the element that is read.
Context = Mapping[str, Json]

PLAIN_REPAIRS = ("no_full_stop", "lower_first")
REPAIRS = (*PLAIN_REPAIRS, "before", "after", "without", "mark")
MOST_DIGITS = 18  # of a place in a list


@dataclass(frozen=True)
class RowPath:
    """The path to a text in a row: names (a list has ``[]`` behind it), (name, argument) of repairs, and as written."""

    names: tuple[str, ...]
    repairs: tuple[tuple[str, str], ...] = ()
    written: str = ""

    @classmethod
    def parse(cls, text: str) -> RowPath:
        """Parse a path with its repairs; raises a TaskError if it is malformed, or a repair is unknown.

        >>> RowPath.parse("target.span1_text|no_full_stop").names
        ('target', 'span1_text')
        """
        path, *repairs = text.split("|")
        names = tuple(name.strip() for name in path.split("."))
        if not all(re.fullmatch(r"[^\[\]]+(\[\])?", name) for name in names):
            raise TaskError(
                f"'{text}' is not a path into a row; write names with dots between them, and [] behind a list"
            )
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
        """The path as text, without repairs."""
        return ".".join(self.names)

    def values(self, context: Context, *, where: str) -> list[Json]:
        """Return the values at the path, without repairs: one, or any number if it goes through lists of its own."""
        found: list[Json] = [context[""]]
        for depth, name in enumerate(self.names, start=1):
            prefix = ".".join(self.names[:depth])
            if prefix in context:
                found = [context[prefix]]
                continue
            found = [inner for value in found for inner in _step(value, name, path=self.written, where=where)]
        return found

    def texts(self, context: Context, *, where: str) -> list[str]:
        """Return the texts at the path, repaired; numbers and booleans as JSON writes them."""
        return [
            self.repaired(_text(value, path=self.written, where=where), context, where=where)
            for value in self.values(context, where=where)
        ]

    def text(self, context: Context, *, where: str) -> str:
        """Return the one text at the path; raise a RecordError if there is not exactly one."""
        found = self.texts(context, where=where)
        if len(found) != 1:
            raise RecordError(
                f"{where}: '{self.written}' leads to {len(found)} texts, and a field takes one; list what it goes "
                "through under 'rows'"
            )
        return found[0]

    def repaired(self, text: str, context: Context, *, where: str) -> str:
        """Apply the repairs to a text; raise a RecordError if one does not find the text or number that it needs."""
        for name, argument in self.repairs:
            if name == "no_full_stop":
                text = _without_full_stop(text)
            elif name == "lower_first":
                first = re.match(r"\w+", text)
                if first is not None and not first[0].isupper():  # "I" and "NASA" stay
                    text = text[0].lower() + text[1:]
            elif name == "without":
                text = text.replace(argument, "")
            elif name == "mark":
                text = _marked(text, RowPath.parse(argument).text(context, where=where), where=where)
            else:
                before, found, after = text.partition(argument)
                if not found:
                    raise RecordError(
                        f"{where}: there is no '{argument}' in '{text[:80]}', where '{self.written}' needs it"
                    )
                text = before if name == "before" else after
        return text


def unfold(row: Json, lists: Iterable[RowPath], *, where: str) -> Iterator[Context]:
    """Yield one context per element of the innermost list, in order; one for the row if there are no lists.

    ``lists`` has the paths from the outermost list inwards, each beginning with the one before it.
    """
    contexts: list[dict[str, Json]] = [{"": row}]
    for path in lists:
        contexts = [
            {**context, path.prefix: value} for context in contexts for value in path.values(context, where=where)
        ]
    yield from contexts


def _step(value: Json, name: str, *, path: str, where: str) -> list[Json]:
    key = name.removesuffix("[]")
    if not isinstance(value, Mapping):
        raise RecordError(f"{where}: '{path}' looks for '{key}' in {_kind(value)}, which is not an object")
    if key not in value:
        have = ", ".join(sorted(value)) or "nothing"
        raise RecordError(f"{where}: no '{key}', which '{path}' needs; there is {have}.{closest(key, value)}")
    inner = value[key]
    if not name.endswith("[]"):
        return [inner]
    if not isinstance(inner, list):
        raise RecordError(f"{where}: '{key}' is not a list, and '{path}' goes through one; leave out its []")
    return inner


def _text(value: Json, *, path: str, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise RecordError(f"{where}: '{path}' is {_kind(value)}, and text, a number or true/false is needed")


def _kind(value: Json) -> str:
    if isinstance(value, Mapping | list):
        return "a list" if isinstance(value, list) else "an object"
    return json.dumps(value, ensure_ascii=False)[:80]


def _without_full_stop(text: str) -> str:
    """Return a text without the marks at its end and the spaces around them; one without marks as it is."""
    shown = text.rstrip()  # from the end: a regular expression would try each of many dots or spaces as the first
    bare = shown.rstrip(".?!")
    return text if bare == shown else bare.rstrip()


def _marked(text: str, number: str, *, where: str) -> str:
    words, at = text.split(), place(number)
    if at is None or at >= len(words):
        raise RecordError(
            f"{where}: there is no word number {number[:80]} to mark among the {len(words)} of '{text[:80]}'"
        )
    words[at] = re.sub(r"\w+(?:['-]\w+)*", r"*\g<0>*", words[at], count=1)
    return " ".join(words)


def place(text: str) -> int | None:
    """Return the place in a list that a text of digits names, from 0; None for anything else, or too many digits."""
    return int(text) if text.isdecimal() and len(text) <= MOST_DIGITS else None
