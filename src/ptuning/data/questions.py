"""Rows of a task, ready for templates: fields, choices, right answers, groups. Knows how to read them from a file's
rows, and neither tasks by name nor models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ptuning.data.noun_phrases import other_phrases
from ptuning.data.row_paths import Context, Source, unfold
from ptuning.errors import RecordError, closest
from ptuning.files import Json, sha256
from ptuning.records import TARGET_FIELD, Record, Records, as_records, canonical_json, check_text

# Where a row's label stands unless a task says otherwise.
LABEL = Source(("label",), (), "label")


@dataclass(frozen=True)
class Question:
    """One row of a task.

    Args:
        record: Field -> text. :data:`TARGET_FIELD` holds the label's name, or the text of a right choice; it is missing
            where a row was read without its label.
        choices: The texts to choose among in this row; empty where the task has label words.
        answers: Which of them are right; several may be.
        group: What the row is scored together with: MultiRC's question, ReCoRD's query.
        idx: The row's number as the file has it, for the files that a benchmark's server takes.
    """

    record: Record
    choices: tuple[str, ...] = ()
    answers: tuple[int, ...] = ()
    group: str | None = None
    idx: Json = None

    @property
    def right(self) -> tuple[str, ...]:
        """The texts that are right: choices, or the target; none where the row was read without its label."""
        if self.answers:
            return tuple(self.choices[place] for place in self.answers)
        return (self.record[TARGET_FIELD].strip(),) if TARGET_FIELD in self.record else ()


class Questions(list[Question]):
    """A list of questions that knows where it came from, as :class:`Records` does."""

    def __init__(self, rows: Iterable[Question], *, name: str = "in memory", digest: str | None = None) -> None:
        super().__init__(rows)
        self.name = name
        lines = (f"{canonical_json(row.record)}{list(row.choices)}{list(row.answers)}\n" for row in self)
        self.sha256 = digest or sha256("".join(lines).encode("utf-8"))

    @property
    def records(self) -> Records:
        """The records alone, in order."""
        return Records([row.record for row in self], name=self.name, digest=self.sha256)

    @property
    def has_choices(self) -> bool:
        """Whether rows bring the texts to choose among."""
        return any(row.choices for row in self)


@dataclass(frozen=True)
class ChoiceSource:
    """Where a row's choices stand, and which of them are right.

    Args:
        texts: Sources of texts.
        spans: Source of objects with the ``start`` and ``end`` of characters in ``of``; the character at ``end`` is
            the span's last.
        of: The text that the spans cut from.
        phrases: A text whose noun phrases are choices, too.
        right: Source of what is right: a choice's number (from 0), the text of one or more, or true for the first and
            false for any but the first.
    """

    texts: tuple[Source, ...] = ()
    spans: Source | None = None
    of: Source | None = None
    phrases: Source | None = None
    right: Source = LABEL

    def read(self, context: Context, *, where: str, labelled: bool) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Return the different choices of a row, in order of appearance, and the places of the right ones among them.

        Raises:
            RecordError: If there are fewer than two, or something right is none of them.
        """
        found = [text for source in self.texts for text in source.texts(context, where=where)]
        if self.spans is not None and self.of is not None:
            text = self.of.text(context, where=where)
            found += [_span(text, span, where=where) for span in self.spans.values(context, where=where)]
        if self.phrases is not None:
            found += other_phrases(self.phrases.text(context, where=where), than=found)
        listed = [text.strip() for text in found]
        kept = tuple(dict.fromkeys(text for text in listed if text))
        if len(kept) < 2:
            raise RecordError(f"{where}: {len(kept)} choice(s); a row needs two or more different ones")
        right = self._right(context, listed, where=where) if labelled else set()
        return kept, tuple(place for place, text in enumerate(kept) if text in right)

    def _right(self, context: Context, listed: Sequence[str], *, where: str) -> set[str]:
        """Return the right ones of the choices as the row lists them: empty and double ones count for their numbers."""
        values = self.right.values(context, where=where)
        if len(values) == 1 and isinstance(values[0], bool):
            first = _right_one(0, "0", listed, where=where)
            return {first} if values[0] else {text for text in listed if text != first}
        texts = self.right.texts(context, where=where)
        if not texts:
            raise RecordError(
                f"{where}: '{self.right.written}' names no right choice; read it as unlabelled, or drop it"
            )
        return {_right_one(value, text.strip(), listed, where=where) for value, text in zip(values, texts, strict=True)}


@dataclass(frozen=True)
class Reader:
    """How rows of a file become questions.

    Args:
        fields: Field -> where it stands.
        lists: The lists whose innermost elements are the rows, from the outermost inwards.
        label: Where the label or target stands; not looked at where there are choices.
        labels: The names of the labels; empty if the target is any text.
        values: Field (or :data:`TARGET_FIELD` for the label) -> value in the file -> text in the record.
        choices: Where choices stand.
        group: Sources that together name the group.
        idx: Name -> where that number stands; the name is empty if there is only one.
    """

    fields: Mapping[str, Source]
    lists: tuple[Source, ...] = ()
    label: Source = LABEL
    labels: tuple[str, ...] = ()
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    choices: ChoiceSource | None = None
    group: tuple[Source, ...] = ()
    idx: Mapping[str, Source] = field(default_factory=dict)

    def read(self, rows: Iterable[tuple[str, Mapping[str, object]]], *, labelled: bool = True) -> Iterator[Question]:
        """Yield the questions of rows, each row with what it is called in messages.

        Raises:
            RecordError: If a row lacks something, or its label is outside of the task.
        """
        for where, row in rows:
            # Plain JSON, whatever the file's format gave: a date or bytes in a column are the text that Python shows.
            text = json.dumps(row, ensure_ascii=False, default=str)
            check_text(text, where=where)
            value = json.loads(text)
            for context in unfold(value, self.lists, where=where):
                yield self._question(context, where=where, labelled=labelled)

    def filled(self, name: str, text: str, *, where: str) -> str:
        """Return what a field of a record holds, from what stands in a row.

        Raises:
            RecordError: If the task knows no such text.
        """
        return self._valued(name, self.fields[name].repaired(text, {"": {}}, where=where), where=where)

    def _question(self, context: Context, *, where: str, labelled: bool) -> Question:
        record = {
            name: self._valued(name, source.text(context, where=where), where=where)
            for name, source in self.fields.items()
        }
        choices: tuple[str, ...] = ()
        answers: tuple[int, ...] = ()
        if self.choices is not None:
            choices, answers = self.choices.read(context, where=where, labelled=labelled)
            if labelled:
                record[TARGET_FIELD] = choices[answers[0]]
        elif labelled:
            record[TARGET_FIELD] = self._label(context, where=where)
        group = [text for source in self.group for text in source.texts(context, where=where)]
        return Question(record, choices, answers, _joined(group), self._idx(context, where=where))

    def _label(self, context: Context, *, where: str) -> str:
        text = self._valued(TARGET_FIELD, self.label.text(context, where=where), where=where)
        if self.labels and text not in self.labels:
            raise RecordError(
                f"{where}: the label '{text}' is outside of the task, which has {', '.join(self.labels)}."
                f"{closest(text, self.labels)} Give the file's values names in [values], or leave the row out"
            )
        return text

    def _valued(self, name: str, text: str, *, where: str) -> str:
        """Return what a value of the file stands for; a label's own name for itself, where no value is written so."""
        known = self.values.get(name)
        if known is None or (text not in known and name == TARGET_FIELD and text in self.labels):
            return text
        if text not in known:
            what = "label" if name == TARGET_FIELD else f"field '{name}'"
            raise RecordError(
                f"{where}: the {what} is '{text}', and the task's [values] know {', '.join(known)}."
                f"{closest(text, known)}"
            )
        return known[text]

    def _idx(self, context: Context, *, where: str) -> Json:
        found: dict[str, Json] = {}
        for name, source in self.idx.items():
            try:
                found[name] = source.values(context, where=where)[0]
            except (RecordError, IndexError):
                return None  # a number is wanted by servers only; one's own files may have none
        return found.get("", found or None)


def as_questions(data: Sequence[Record] | Questions) -> Questions:
    """Return records as questions without choices; questions as they are."""
    if isinstance(data, Questions):
        return data
    records = as_records(data)
    return Questions([Question(record) for record in records], name=records.name, digest=records.sha256)


def _span(text: str, span: Json, *, where: str) -> str:
    start, end = (span.get("start"), span.get("end")) if isinstance(span, Mapping) else (None, None)
    if not (isinstance(start, int) and isinstance(end, int) and 0 <= start <= end < len(text)):
        raise RecordError(f"{where}: the span {json.dumps(span)} is none of a text of {len(text)} characters")
    return text[start : end + 1]


def _right_one(value: Json, text: str, listed: Sequence[str], *, where: str) -> str:
    """Return a right choice by its place, from 0, or by its text; a number is a place, and a text is a text first."""
    if isinstance(value, int) and not isinstance(value, bool):
        at = value
    elif text and text in listed:
        return text
    else:
        at = int(text) if text.isdecimal() else -1
    if not 0 <= at < len(listed) or not listed[at]:
        raise RecordError(
            f"{where}: '{text}' is right, and is none of the {len(listed)} choices {', '.join(listed)[:200]}; it must "
            "be a choice's text, or its number from 0"
        )
    return listed[at]


def _joined(group: Sequence[str]) -> str | None:
    """Return the name of a group; two different ones have different names, whatever stands in them."""
    if any("/" in text for text in group) and len(group) > 1:
        return json.dumps(group, ensure_ascii=False)
    return "/".join(group) if group else None
