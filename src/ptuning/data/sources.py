"""Reading data by its source: a file, shipped facts, a part of a task's folder, conversations, or rows in memory."""

import itertools
import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ptuning.data.conversations import read_conversations, recognise
from ptuning.data.questions import Questions, as_questions
from ptuning.data.reading import RawRows, as_read, load_records, load_rows, with_fields
from ptuning.data.task_files import TaskFile, find_split
from ptuning.errors import ConfigError, FileError, RecordError, closest
from ptuning.records import IN_MEMORY, TARGET_FIELD, Records, Rows, as_records, require_fields, rows_of
from ptuning.template.language import CONVERSATION_FIELD

Source: TypeAlias = str | Path | Rows | Questions
NO_TEMPLATE = "give a template, or a manual template to have one made from it, or a task"


@dataclass
class DataReader:
    """Reads the data of one training, evaluation or comparison.

    Args:
        task: The task that says how rows are read.
        fields: New name -> name in the data; not with a task.
        remembered: As ``fields``, but for those that a row does not have under that name (a prompt's).
        chat: Whether rows are conversations.
        cache: Data that was read before, shared by several readers.

    Attributes:
        notes: Lines that a user should know about the data that was read.
    """

    task: TaskFile | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    remembered: Mapping[str, str] = field(default_factory=dict)
    chat: bool = False
    cache: MutableMapping[object, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def read(self, source: Source, *, part: str, labelled: bool = True) -> Records | Questions:
        """Return records, or the questions of a task or of conversations. ``part`` is what a task's folder is read for;
        another one may be named, as in ``DIR:val``.
        """
        if isinstance(source, Questions):
            return source
        if not isinstance(source, str | Path):
            return self._in_memory(source)
        key = (str(source), part, labelled, self.chat, self.task and self.task.name, *sorted(self.fields.items()))
        if key not in self.cache:
            self.cache[key] = self._load(str(source), part=part, labelled=labelled)
        rows: Records | Questions
        rows, notes = self.cache[key]
        self.notes += notes
        return rows

    def _load(self, source: str, *, part: str, labelled: bool) -> tuple[Records | Questions, Sequence[str]]:
        if self.chat:
            found = read_conversations(load_rows(source), fields={**self.remembered, **self.fields})
            return found.questions, [found.summary]
        if self.task is not None:
            return self.task.read(self.find(source, part=part), labelled=labelled), []
        records = load_records(source, fields=self.fields, target=self.remembered.get(TARGET_FIELD))
        missing = {new: old for new, old in self.remembered.items() if new not in records.fields}
        return with_fields(records, missing), []

    def _in_memory(self, source: Rows) -> Records | Questions:
        if self.chat:
            return read_conversations(in_memory(source), fields=self.fields).questions
        return as_read(in_memory(source), fields=self.fields) if self.fields else as_records(source)

    def find(self, source: str, *, part: str) -> Path:
        """Return the file of a task's data: the source itself, ``part`` of a folder, or ``DIR:PART``."""
        assert self.task is not None
        if self.fields:
            raise ConfigError("renamed fields (field) go without a task: its file says where the fields of a row are")
        path, (folder, colon, named) = Path(source), source.rpartition(":")
        if os.path.isdir(path):
            return find_split(path, self.task, part)
        if colon and not os.path.exists(path) and os.path.isdir(folder):
            return find_split(Path(folder), self.task, named)
        if not os.path.exists(path):
            there = [entry.name for entry in path.parent.iterdir()] if os.path.isdir(path.parent) else []
            raise FileError(
                f"no such data: {source}.{closest(path.name, there)} With the task {self.task.name}, data is a file, "
                "a folder such as DIR, or a part of one such as DIR:val"
            )
        return path

    def read_parts(self, sources: Mapping[str, Source | None], *, reads: Sequence[str]) -> dict[str, Questions]:
        """Read the parts train, dev and test that are named. With a task, a folder may bring the part dev; without, the
        one column that the template does not read (``reads``) is the target. A RecordError if a record lacks a field.
        """
        self.chat = self.chat or CONVERSATION_FIELD in reads
        parts: dict[str, Records | Questions] = {}
        for part, source in sources.items():
            if source is not None:
                parts[part] = self.read(source, part="val" if part == "test" else part)
            elif part == "dev" and self.task is not None and _is_folder(sources["train"]):
                try:
                    parts[part] = self.read(f"{sources['train']}:dev", part=part)
                except FileError:
                    self.notes.append(f"{sources['train']} has no development part; a share of the training part is it")
        if self.task is None:
            target = target_column(parts["train"], reads)
            parts = {part: self.with_target(rows, target) for part, rows in parts.items()}
        questions = {part: as_questions(rows) for part, rows in parts.items()}
        if self.task is None:
            for rows in questions.values():
                require_fields(rows.records, reads)
        return questions

    def with_target(self, rows: Records | Questions, column: str | None) -> Records | Questions:
        """Return records whose target is in a column, if one is given; and note it."""
        if column is None or isinstance(rows, Questions):
            return rows
        note = f"target: the column '{column}' ({TARGET_FIELD}=NAME for another)"
        if note not in self.notes:
            self.notes.append(note)
        return with_fields(rows, {TARGET_FIELD: column})


def _is_folder(source: object) -> bool:
    return isinstance(source, str | Path) and os.path.isdir(source)


def in_memory(rows: Rows) -> RawRows:
    """Return rows of Python as those of a file."""
    numbered = enumerate(rows_of(rows), start=1)
    return RawRows(((f"record {at}", row) for at, row in numbered), name=IN_MEMORY, digest="", format="jsonl")


def target_column(rows: Records | Questions, reads: Sequence[str]) -> str | None:
    """Return the one column that a template does not read, if no row has a target; else None."""
    if not isinstance(rows, Records) or any(TARGET_FIELD in row for row in rows):
        return None
    columns = [name for name in dict.fromkeys(itertools.chain.from_iterable(rows)) if name not in reads]
    return columns[0] if len(columns) == 1 else None


@dataclass(frozen=True)
class KnownForm:
    """A template that follows from the form of data: a manual one with the renamed ``fields`` it needs, or a chat."""

    manual: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


def template_of_data(source: Source) -> KnownForm:
    """Return what the form of data makes its template, if none is given. A ConfigError if its form is not known."""
    if _is_folder(source) or isinstance(source, Questions):  # of a task
        raise ConfigError(NO_TEMPLATE)
    rows = load_rows(source) if isinstance(source, str | Path) else in_memory(source)
    try:
        shape = recognise(rows)
    except RecordError as error:
        raise ConfigError(f"{NO_TEMPLATE}; the data has none of its own ({error})") from error
    if shape.name == "facts":
        raise ConfigError(NO_TEMPLATE)
    if shape.manual is None or any(row.get("history") for _, row in rows):
        return KnownForm()
    manual, (*_, answer) = shape.manual, shape.keys
    if shape.name == "alpaca" and any(row.get("input") for _, row in rows):
        if lacking := next((where for where, row in rows if "input" not in row), None):
            raise ConfigError(
                f"{lacking} has no 'input', as other rows have, so that one template does not fit all; write an empty "
                "text there, or read the rows as conversations (chat)"
            )
        manual = manual.replace("\n\n### Response", "\n\n### Input:\n{input}\n\n### Response")
    note = f"{rows.name}: the form {shape.described}, {len(rows)} records; chat makes conversations of them"
    return KnownForm(manual, {TARGET_FIELD: answer}, note)
