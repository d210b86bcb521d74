"""Questions: the rows of a task, ready for templates, with their fields, choices, right answers and groups; and paths
to texts in a row with small repairs, such as ``passage.questions[].question|no_full_stop``.

A path is names with dots between them; ``[]`` after a name goes through a list. Repairs follow, each after a ``|``:
    ``no_full_stop``    without a full stop, question or exclamation mark at the end
    ``lower_first``     with a small first letter, unless the first word is all in capitals, as "I" is
    ``before TEXT``     the part before TEXT
    ``after TEXT``      the part after TEXT
    ``without TEXT``    with TEXT taken out
    ``mark PATH``       with asterisks around the word whose number (from 0, words at spaces) is at PATH
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from ptuning.data.noun_phrases import other_phrases
from ptuning.data.reading import Row
from ptuning.errors import RecordError, TaskError, closest
from ptuning.files import FileModel, Json, sha256
from ptuning.records import (
    IN_MEMORY,
    TARGET_FIELD,
    Record,
    Records,
    References,
    Rows,
    as_records,
    canonical_json,
    check_text,
    gathered,
    references_of,
    scalar,
)

# The row of the file (under ""), and for each list on the way (under its path) the element that is read.
Context = Mapping[str, Json]

PLAIN_REPAIRS = ("no_full_stop", "lower_first")
REPAIRS = (*PLAIN_REPAIRS, "before", "after", "without", "mark")
MAX_DIGITS = 18  # of a place in a list


@dataclass(frozen=True)
class RowPath:
    """The path to a text in a row: names (a list has ``[]`` after it), (name, argument) of repairs, and as written."""

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
                f"'{text}' is not a path into a row; write names with dots between them, and [] after a list"
            )
        parsed = []
        for repair in repairs:
            name, _, argument = repair.strip().partition(" ")
            if name not in REPAIRS:
                raise TaskError(
                    f"'{text}': unknown repair '{name}'.{closest(name, REPAIRS)} Known: {', '.join(REPAIRS)}"
                )
            if (name in PLAIN_REPAIRS) != (argument == ""):
                needs = "takes nothing" if argument else "needs something"
                raise TaskError(f"'{text}': the repair '{name}' {needs} after its name")
            if name == "mark":
                cls.parse(argument)
            parsed.append((name, argument))
        return cls(names, tuple(parsed), text)

    @property
    def prefix(self) -> str:
        """The path as text, without repairs."""
        return ".".join(self.names)

    def values(self, context: Context, *, where: str) -> list[Json]:
        """Return the values at the path, without repairs: one, or any number if it goes through lists of its own."""
        level: list[Json] = [context[""]]
        for depth, name in enumerate(self.names, start=1):
            prefix = ".".join(self.names[:depth])
            if prefix in context:
                level = [context[prefix]]
                continue
            key, inner = name.removesuffix("[]"), []
            for value in level:
                if not isinstance(value, Mapping):
                    raise RecordError(
                        f"{where}: '{self.written}' looks for '{key}' in {_kind(value)}, which is not an object"
                    )
                if key not in value:
                    known = ", ".join(sorted(value)) or "nothing"
                    raise RecordError(
                        f"{where}: no '{key}', which '{self.written}' needs; there is {known}.{closest(key, value)}"
                    )
                items = value[key] if name.endswith("[]") else [value[key]]
                if not isinstance(items, list):
                    raise RecordError(
                        f"{where}: '{key}' is not a list, and '{self.written}' goes through one; leave out its []"
                    )
                inner += items
            level = inner
        return level

    def texts(self, context: Context, *, where: str) -> list[str]:
        """Return the texts at the path, repaired; numbers and booleans as JSON writes them."""
        texts = []
        for value in self.values(context, where=where):
            if not isinstance(value, str | bool | int | float):
                raise RecordError(
                    f"{where}: '{self.written}' is {_kind(value)}, and text, a number or true/false is needed"
                )
            text = value if isinstance(value, str) else json.dumps(value)
            texts.append(self.repaired(text, context, where=where))
        return texts

    def text(self, context: Context, *, where: str) -> str:
        """Return the one text at the path; raise a RecordError if there is not exactly one."""
        texts = self.texts(context, where=where)
        if len(texts) != 1:
            raise RecordError(
                f"{where}: '{self.written}' leads to {len(texts)} texts, and a field takes one; name the list that it "
                "goes through under 'rows'"
            )
        return texts[0]

    def repaired(self, text: str, context: Context, *, where: str) -> str:
        """Apply the repairs to a text; raise a RecordError if one does not find the text or number that it needs."""
        for name, argument in self.repairs:
            if name == "no_full_stop":
                # From the end: a regular expression would try each of many dots or spaces as the first.
                shown = text.rstrip()
                bare = shown.rstrip(".?!")
                text = text if bare == shown else bare.rstrip()
            elif name == "lower_first":
                first = re.match(r"\w+", text)
                if first is not None and not first[0].isupper():  # "I" and "NASA" stay
                    text = text[0].lower() + text[1:]
            elif name == "without":
                text = text.replace(argument, "")
            elif name == "mark":
                words, number = text.split(), RowPath.parse(argument).text(context, where=where)
                at = place(number)
                if at is None or at >= len(words):
                    raise RecordError(
                        f"{where}: no word number {number[:80]} to mark among the {len(words)} of '{text[:80]}'"
                    )
                words[at] = re.sub(r"\w+(?:['-]\w+)*", r"*\g<0>*", words[at], count=1)
                text = " ".join(words)
            else:
                before, separator, after = text.partition(argument)
                if not separator:
                    raise RecordError(
                        f"{where}: there is no '{argument}' in '{text[:80]}', where '{self.written}' needs it"
                    )
                text = before if name == "before" else after
        return text


def place(text: str) -> int | None:
    """Return the place in a list that a text of digits names, from 0; None for anything else, or too many digits."""
    return int(text) if text.isdecimal() and len(text) <= MAX_DIGITS else None


def _kind(value: Json) -> str:
    if isinstance(value, Mapping | list):
        return "a list" if isinstance(value, list) else "an object"
    return json.dumps(value, ensure_ascii=False)[:80]


def unfold(row: Json, lists: Iterable[RowPath], *, where: str) -> list[Context]:
    """Return one context per element of the innermost list, in order; one for the row if there are no lists.

    ``lists`` has the paths from the outermost list inwards, each beginning with the one before it.
    """
    contexts: list[Context] = [{"": row}]
    for path in lists:
        contexts = [
            {**context, path.prefix: value} for context in contexts for value in path.values(context, where=where)
        ]
    return contexts


def _parsed_path(value: object) -> RowPath:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("Input should be text in quotation marks")
    return RowPath.parse(value)


def as_tuple(value: object) -> object:
    """Return a list as a tuple, and one text as a tuple of one."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


PathText = Annotated[RowPath, PlainValidator(_parsed_path)]
PathTexts = Annotated[tuple[PathText, ...], BeforeValidator(as_tuple)]
# The path to a row's label, unless a task names another.
LABEL = RowPath(("label",), (), "label")


@dataclass(frozen=True)
class Question:
    """One row of a task.

    ``record`` maps fields to texts; :data:`TARGET_FIELD` holds the label or a right choice, unless the row was read
    without. ``answers`` are the places of the right ones among the row's ``choices``, if it has any. Rows of a
    ``group`` are scored together: MultiRC's question, ReCoRD's query. ``idx`` is the row's number in the file, for the
    files that a benchmark's server takes. ``where`` is the place it was read from, as ``mail.csv, line 41``.
    """

    record: Record
    choices: tuple[str, ...] = ()
    answers: tuple[int, ...] = ()
    group: str | None = None
    idx: Json = None
    where: str = field(default="", compare=False, repr=False)

    @property
    def right(self) -> tuple[str, ...]:
        """The right texts: choices, or the target; none if the row was read without its label."""
        if self.answers:
            return tuple(self.choices[place] for place in self.answers)
        return tuple(text.strip() for text in references_of(self.record))


class Questions(list[Question]):
    """A list of questions with the name and the SHA-256 of the data, and renamed ``fields``, like :class:`Records`."""

    def __init__(
        self,
        rows: Iterable[Question],
        *,
        name: str = IN_MEMORY,
        digest: str | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(rows)
        self.name = name
        self.fields = dict(fields or {})
        lines = (f"{canonical_json(row.record)}{list(row.choices)}{list(row.answers)}\n" for row in self)
        self.sha256 = digest or sha256("".join(lines).encode("utf-8"))

    @property
    def records(self) -> Records:
        """The records alone, in order."""
        rows, places = [row.record for row in self], [row.where for row in self]
        known = places if all(places) else ()
        return Records(rows, name=self.name, digest=self.sha256, places=known, fields=self.fields)

    @property
    def has_choices(self) -> bool:
        """Whether rows bring the texts to choose among."""
        return any(row.choices for row in self)


class ChoiceSource(FileModel, extra="forbid", populate_by_name=False):
    """Paths to a row's choices, and to the right ones among them: the table ``[choices]`` of a task file.

    Choices are the ``texts``; the ``spans`` of the text ``of``, objects with the ``start`` and ``end`` of characters
    (the one at ``end`` is the last); and the noun phrases of the text at ``phrases``. ``right`` is a choice's number
    (from 0), the text of one or more, or true for the first and false for any but the first.
    """

    texts: PathTexts = Field((), alias="from")
    spans: PathText | None = None
    of: PathText | None = None
    phrases: PathText | None = None
    right: PathText = LABEL

    @model_validator(mode="after")
    def _has_choices(self) -> ChoiceSource:
        if (self.spans is None) != (self.of is None):
            raise TaskError("[choices]: 'spans' and 'of' go together, the places and the text that they cut from")
        if not (self.texts or self.spans or self.phrases):
            raise TaskError('[choices] need from = ["..."], or spans = "..." and of = "..."')
        return self

    def read(self, context: Context, *, where: str, labelled: bool) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Return the different choices of a row, in order of appearance, and the places of the right ones among them.

        Raises a RecordError if there are fewer than two choices, or a right answer is not among them.
        """
        texts = [text for path in self.texts for text in path.texts(context, where=where)]
        if self.spans is not None and self.of is not None:
            text = self.of.text(context, where=where)
            texts += [_span(text, span, where=where) for span in self.spans.values(context, where=where)]
        if self.phrases is not None:
            texts += other_phrases(self.phrases.text(context, where=where), than=texts)
        listed = [text.strip() for text in texts]
        kept = tuple(dict.fromkeys(filter(None, listed)))
        if len(kept) < 2:
            raise RecordError(f"{where}: {len(kept)} choice(s); a row needs two or more different ones")
        right = self._right(context, listed, where=where) if labelled else set()
        return kept, tuple(place for place, text in enumerate(kept) if text in right)

    def _right(self, context: Context, listed: Sequence[str], *, where: str) -> set[str]:
        """Return the right choices. Numbers count the choices as the row lists them, with empty and double ones."""

        def chosen(value: Json, text: str) -> str:
            is_number = isinstance(value, int) and not isinstance(value, bool)
            if text and text in listed and not is_number:
                return text  # digits are a number only if they are no choice
            number = value if is_number else place(text)
            if not isinstance(number, int) or not 0 <= number < len(listed) or not listed[number]:
                raise RecordError(
                    f"{where}: the right answer '{text[:80]}' is not one of the {len(listed)} choices "
                    f"{', '.join(listed)[:200]}; it must be a choice's text, or its number from 0"
                )
            return listed[number]

        values = self.right.values(context, where=where)
        if len(values) == 1 and isinstance(values[0], bool):
            first = chosen(0, "0")
            return {first} if values[0] else {text for text in listed if text != first}
        texts = self.right.texts(context, where=where)
        if not texts:
            raise RecordError(
                f"{where}: '{self.right.written}' names no right choice; read it as unlabelled, or drop it"
            )
        return {chosen(value, text.strip()) for value, text in zip(values, texts, strict=True)}


def _span(text: str, span: Json, *, where: str) -> str:
    start, end = (span.get("start"), span.get("end")) if isinstance(span, Mapping) else (None, None)
    if not (isinstance(start, int) and isinstance(end, int) and 0 <= start <= end < len(text)):
        raise RecordError(f"{where}: the span {json.dumps(span)} is not in a text of {len(text)} characters")
    return text[start : end + 1]


@dataclass(frozen=True)
class Reader:
    """Turns the rows of a file into questions.

    Args:
        fields: Field -> its path.
        lists: Paths of the lists whose innermost elements are the rows, from the outermost inwards.
        label: Path of the label or target; unused if there are choices.
        labels: The names of the labels; empty if the target is any text.
        values: Field (or :data:`TARGET_FIELD` for the label) -> value in the file -> text in the record.
        choices: Paths of the choices.
        group: Paths that together name the group.
        idx: Name -> path of that number; the name is empty if there is only one.
    """

    fields: Mapping[str, RowPath]
    lists: tuple[RowPath, ...] = ()
    label: RowPath = LABEL
    labels: tuple[str, ...] = ()
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    choices: ChoiceSource | None = None
    group: tuple[RowPath, ...] = ()
    idx: Mapping[str, RowPath] = field(default_factory=dict)

    def read(self, rows: Iterable[Row], *, labelled: bool = True) -> Iterator[Question]:
        """Yield the questions of rows, given as (file and line, row); raise a RecordError at one that does not fit."""
        for where, row in rows:
            for context in unfold(_plain(row, where=where), self.lists, where=where):
                yield self._question(context, where=where, labelled=labelled)

    def _question(self, context: Context, *, where: str, labelled: bool) -> Question:
        record = {
            name: self.valued(name, path.text(context, where=where), where=where) for name, path in self.fields.items()
        }
        choices: tuple[str, ...] = ()
        answers: tuple[int, ...] = ()
        if self.choices is not None:
            choices, answers = self.choices.read(context, where=where, labelled=labelled)
        if labelled:
            record[TARGET_FIELD] = choices[answers[0]] if answers else self._label(context, where=where)
        group = [text for path in self.group for text in path.texts(context, where=where)]
        # Different groups have different names, whatever characters are in them.
        is_plain = len(group) < 2 or not any("/" in text for text in group)
        name = "/".join(group) if is_plain else json.dumps(group, ensure_ascii=False)
        numbers: dict[str, Json] = {}
        with contextlib.suppress(RecordError, IndexError):  # only the files for a benchmark's server need them
            numbers = {name: path.values(context, where=where)[0] for name, path in self.idx.items()}
        return Question(record, choices, answers, name if group else None, numbers.get("", numbers or None), where)

    def _label(self, context: Context, *, where: str) -> str:
        if self.label.names[-1].endswith("[]") and not self.labels:
            texts = [text.strip() for text in self.label.texts(context, where=where)]
            references = list(dict.fromkeys(filter(None, texts)))
            return References(references) if len(references) > 1 else "".join(references)
        text = self.valued(TARGET_FIELD, self.label.text(context, where=where).strip(), where=where)
        if self.labels and text not in self.labels:
            raise RecordError(
                f"{where}: the label '{text}' is outside of the task, which has {', '.join(self.labels)}."
                f"{closest(text, self.labels)} Give the file's values names in [values], or leave the row out"
            )
        return text

    def valued(self, name: str, text: str, *, where: str) -> str:
        """Return the text for a value of the file. The name of a label needs no entry in ``values``."""
        known = self.values.get(name)
        if known is None or (text not in known and name == TARGET_FIELD and text in self.labels):
            return text
        if text not in known:
            named = "label" if name == TARGET_FIELD else f"field '{name}'"
            raise RecordError(
                f"{where}: the {named} is '{text}', and the task's [values] have {', '.join(known)}."
                f"{closest(text, known)}"
            )
        return known[text]


def _plain(row: object, *, where: str) -> Json:
    """Return a row as plain JSON, whatever the file's format gave. NaN is null, as pandas means it; a date or bytes
    become the text that Python shows.
    """

    def own(value: object) -> object:
        return str(value) if (known := scalar(value)) is None else known

    try:
        text = json.dumps(row, ensure_ascii=False, default=own)
        plain: Json = json.loads(text, parse_constant={"Infinity": math.inf, "-Infinity": -math.inf}.get)
    except (TypeError, ValueError, RecursionError) as error:
        raise RecordError(f"{where}: the row cannot be read as JSON ({error})") from error
    check_text(text, where=where)
    return plain


def as_questions(data: Rows | Questions) -> Questions:
    """Return records (:func:`~ptuning.records.as_records`) as questions without choices, and questions unchanged."""
    if isinstance(data, Questions):
        return data
    records = as_records(data)
    rows = [Question(record, where=records.place(number)) for number, record in enumerate(records, start=1)]
    return Questions(rows, name=records.name, digest=records.sha256, fields=records.fields)


def with_references(rows: Questions) -> Questions:
    """Return rows of which those that differ in their target alone are one, with all of their references."""
    return as_questions(gathered(rows.records))
