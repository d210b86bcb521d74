"""Task files: the description of a task in one TOML file, with its templates, its label words and its rows' fields.

``docs/tasks.md`` explains the keys.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, PrivateAttr, model_validator

from ptuning.data.answer_space import AnswerSpace
from ptuning.data.questions import (
    LABEL,
    ChoiceSource,
    PathText,
    PathTexts,
    Questions,
    Reader,
    RowPath,
    as_tuple,
    with_references,
)
from ptuning.data.reading import SUFFIXES, Row, load_rows
from ptuning.errors import FileError, LabelWordError, RecordError, TaskError, TemplateError, closest
from ptuning.files import FileModel, Json, parse_toml, read_text, validate
from ptuning.metrics import METRICS, TASK_METRICS
from ptuning.metrics.generation import TEXT_METRICS
from ptuning.names import is_folder_name
from ptuning.records import IN_MEMORY, TARGET_FIELD, Record
from ptuning.template.labels import LabelWords, Normalise, Scoring
from ptuning.template.language import Template

if TYPE_CHECKING:
    from importlib.abc import Traversable  # where Python 3.10 has it

SUFFIX = ".toml"
# File names of each part: FewGLUE's and SuperGLUE's, and common others. The part "val" never chooses anything.
SPLIT_FILES: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "dev": ("dev32", "dev"),
    "val": ("val", "validation"),
    "test": ("test",),
}


def _template(value: object) -> Template:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("Input should be text in quotation marks")
    return Template.parse(value)


Texts = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
Pattern = Annotated[Template, PlainValidator(_template)]


class PatternKeys(FileModel, extra="forbid"):
    """A pattern in a task file: a template without slots, and one with slots, by default made of the first."""

    manual: Pattern
    learned: Pattern | None = None


class TaskFile(FileModel, extra="forbid", populate_by_name=False):
    """A task: the keys of its file, checked, and what follows from them. ``text`` is the text of the file."""

    name: str
    version: str = Field(min_length=1)
    source: str = ""
    about: str = ""
    rows: str = ""
    paths: dict[str, PathText] = Field(default_factory=dict, alias="fields")
    values: dict[str, dict[str, str]] = Field(default_factory=dict)
    label: PathText = LABEL
    labels: dict[str, Texts] | None = None
    choices: ChoiceSource | None = None
    group: PathTexts = ()
    idx: dict[str, PathText] | PathText = RowPath(("idx",), (), "idx")
    gather: bool = False
    metrics: Annotated[Texts, AfterValidator(lambda names: tuple(dict.fromkeys(names)))] = ("accuracy",)
    calibrate: bool = False
    normalise: Normalise = "sum"
    files: dict[str, Texts] = Field(default_factory=dict)
    patterns: tuple[PatternKeys, ...] = Field(min_length=1)
    _text: str = PrivateAttr("")

    @classmethod
    def parse(cls, text: str, *, where: str = "the task file") -> TaskFile:
        """Read a task from the text of its file; a TaskError names a malformed key and the remedy."""
        value = parse_toml(text, where=where, error=TaskError)
        try:
            task = validate(cls, value, error=TaskError)
        except (TaskError, TemplateError, LabelWordError) as error:
            raise TaskError(f"{where}: {error}") from error
        task._text = text
        return task

    @model_validator(mode="after")
    def _check(self) -> TaskFile:
        if not is_folder_name(self.name, spaces=True):
            raise TaskError(
                f"'{self.name}' cannot be the name of a task, since it becomes a folder; use letters, digits and "
                "- _ . + ="
            )
        is_closed = self.labels is not None or self.choices is not None
        if self.labels is not None and self.choices is not None:
            raise TaskError("there are both [labels] and [choices]; a task has words for its labels, or choices")
        if self.gather and is_closed:
            raise TaskError("'gather' is for texts with several references; labels and choices have one answer")
        for part, names in self.files.items():
            if part not in SPLIT_FILES:
                raise TaskError(
                    f"unknown key 'files.{part}'.{closest(part, SPLIT_FILES)} Known: {', '.join(SPLIT_FILES)}"
                )
            for name in names:
                if Path(name).suffix.lower() in SUFFIXES:
                    raise TaskError(f"[files] {part} names '{name}'; leave its ending out: '{Path(name).stem}'")
        for number, pattern in enumerate(self.patterns, start=1):
            if pattern.manual.has_slots:
                raise TaskError(f"pattern {number}: the manual template has slots; write them as learned = '...'")
            if pattern.learned is not None and not pattern.learned.has_slots:
                raise TaskError(f"pattern {number}: the learned template has no slots; write words as [P:words]")
        self._check_fields()
        self._check_metrics(is_closed=is_closed)
        return self

    def _check_fields(self) -> None:
        labels = self.label_words.labels if self.label_words is not None else ()
        for label in self.values.get("label", {}).values():
            if labels and label not in labels:
                raise TaskError(
                    f"[values] name the label '{label}', which has no words.{closest(label, labels)} Give it words "
                    "under [labels]"
                )
        if TARGET_FIELD in self.paths:
            raise TaskError(f"the target has the key 'label'; '{TARGET_FIELD}' cannot be the name of a field")
        for name in (*self.paths, *self.closed_fields):
            if name not in self.fields:
                raise TaskError(f"no pattern uses the field '{name}'.{closest(name, self.fields)}")
        reader = self.reader
        answer = reader.label if reader.choices is None else reader.choices.right
        for name, path in reader.fields.items():
            if path.names == answer.names:
                raise TaskError(f"the field '{name}' of a pattern holds the answer; write [Y] for the answer")

    def _check_metrics(self, *, is_closed: bool) -> None:
        known = TASK_METRICS if is_closed else (*TASK_METRICS, *TEXT_METRICS)
        if not self.metrics:
            raise TaskError(f"'metrics' is empty; name one or more of {', '.join(known)}, or leave the key out")
        for name in self.metrics:
            if name not in known:
                closed = " A task with labels or choices writes no texts." if name in TEXT_METRICS else ""
                raise TaskError(f"unknown metric '{name}'.{closest(name, known)}{closed} Known: {', '.join(known)}")
            needed = METRICS[name].needs_label if name in METRICS else None
            if needed is not None and needed not in (self.labels or {}):
                raise TaskError(f"the metric '{name}' needs the label '{needed}', which this task does not have")
        if len({name in TEXT_METRICS for name in self.metrics}) > 1:
            raise TaskError(
                f"'metrics' mix metrics of written texts ({', '.join(TEXT_METRICS)}) with metrics of right and wrong "
                "answers; give those of one kind"
            )

    @property
    def text(self) -> str:
        """The text of the file, which is saved with a prompt."""
        return self._text

    @property
    def manual(self) -> tuple[Template, ...]:
        """The templates without slots."""
        return tuple(pattern.manual for pattern in self.patterns)

    @functools.cached_property
    def learned(self) -> tuple[Template, ...]:
        """The templates with slots; pattern i of both belong together. Slots of a closed task come after the text where
        there are words for that: the text is then read only once.
        """
        templates = []
        for pattern in self.patterns:
            try:
                after = self.labels is not None or self.choices is not None
                made = pattern.learned or Template.from_manual(str(pattern.manual), after=after)
            except TemplateError:
                made = Template.from_manual(str(pattern.manual))
            templates.append(made)
        return tuple(templates)

    @functools.cached_property
    def label_words(self) -> LabelWords | None:
        """The verbalizer of a classification; None if rows bring their choices, or the target is any text."""
        return None if self.labels is None else LabelWords(self.labels)

    @functools.cached_property
    def reader(self) -> Reader:
        """Turns rows into questions."""
        lists: tuple[RowPath, ...] = ()
        if self.rows:
            path = RowPath.parse(self.rows)
            if path.repairs or not path.names[-1].endswith("[]"):
                raise TaskError(f'rows = "{self.rows}" must end with a list, such as "passage.questions[]"')
            ends = [depth for depth, name in enumerate(path.names, start=1) if name.endswith("[]")]
            lists = tuple(RowPath(path.names[:end], (), self.rows) for end in ends)
        choices = self.choices
        if choices is not None and "right" not in choices.model_fields_set:
            choices = choices.model_copy(update={"right": self.label})
        return Reader(
            {name: self.paths.get(name, RowPath((name,), (), name)) for name in self.fields},
            lists=lists,
            label=self.label,
            labels=self.label_words.labels if self.label_words is not None else (),
            values={TARGET_FIELD if name == "label" else name: texts for name, texts in self.values.items()},
            choices=choices,
            group=self.group,
            idx=self.idx if isinstance(self.idx, dict) else {"": self.idx},
        )

    @property
    def answer_space(self) -> AnswerSpace:
        """The answers of its rows: labels, choices or written text."""
        scoring = Scoring(self.normalise, self.calibrate, self.closed_fields)
        return AnswerSpace(self.label_words, self.choices is not None, scoring)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields of a row's record: those that a pattern reads."""
        return tuple(dict.fromkeys(name for template in (*self.manual, *self.learned) for name in template.fields))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names at the top of a row that its fields are read from."""
        return tuple(dict.fromkeys(path.names[0].removesuffix("[]") for path in self.reader.fields.values()))

    @property
    def closed_fields(self) -> tuple[str, ...]:
        """Fields that hold one of a few words, such as "because" and "so"."""
        return tuple(name for name in self.values if name != "label")

    @property
    def text_metrics(self) -> tuple[str, ...]:
        """Its metrics, if they are for texts that are written; else none. The first one chooses."""
        return self.metrics if self.metrics[0] in TEXT_METRICS else ()

    @property
    def answer_metrics(self) -> tuple[str, ...]:
        """Its metrics, if they are for answers, right or wrong; else none. The first one chooses."""
        return () if self.text_metrics else self.metrics

    def to_score(self, rows: Questions) -> Questions:
        """Return rows as texts are scored on them: with all references of an input in one row, if it gathers them."""
        return with_references(rows) if self.gather else rows

    def typed(self, texts: Mapping[str, str], *, where: str) -> Record:
        """Return the record of texts, by field, as a file would have them; ``where`` starts the messages of errors."""
        return {
            name: self.reader.valued(name, path.repaired(texts[name], {"": {}}, where=where), where=where)
            for name, path in self.reader.fields.items()
        }

    def to_json(self) -> dict[str, Json]:
        """Return the task as a prompt's manifest and a run's record hold it."""
        return {"name": self.name, "version": self.version, "file": self.text}

    def read(self, path: str | Path, *, labelled: bool = True) -> Questions:
        """Read a data file in any of the formats of :func:`ptuning.load_records`, with its labels if ``labelled``.

        A FileError if it cannot be read; a RecordError, with file and line, if a row does not fit the task.
        """
        rows = load_rows(path)
        return self.read_named(rows, name=rows.name, digest=rows.sha256, labelled=labelled)

    def read_named(
        self, rows: Iterable[Row], *, name: str, digest: str | None = None, labelled: bool = True
    ) -> Questions:
        """Read rows, each given as (file and line, row); errors as for :meth:`read`."""
        questions = Questions(self.reader.read(rows, labelled=labelled), name=name, digest=digest)
        if not questions:
            raise RecordError(f"{name} holds no rows of the task {self.name}")
        return questions

    def read_rows(self, rows: Iterable[Mapping[str, object]], *, labelled: bool = True) -> Questions:
        """Read rows in memory, each like a line of a data file; errors as for :meth:`read`."""
        named = ((f"row {number}", row) for number, row in enumerate(rows, start=1))
        return self.read_named(named, name=IN_MEMORY, labelled=labelled)


def shipped_tasks() -> list[TaskFile]:
    """Return the tasks that come with the package, by name."""
    return [load_task(name) for name in shipped_names()]


def shipped_names() -> list[str]:
    """Return the names of the tasks that come with the package, in alphabetical order."""
    names = (entry.name.removesuffix(SUFFIX) for entry in _folder().iterdir() if entry.name.endswith(SUFFIX))
    return sorted(names, key=str.lower)


def load_task(name_or_path: str | Path) -> TaskFile:
    """Load a shipped task by its name, or a task file; a FileError if there is neither, a TaskError if it is malformed.

    >>> load_task("RTE").label_words.labels
    ('entailment', 'not_entailment')
    """
    known = {name.lower(): name for name in shipped_names()}
    wanted = str(name_or_path)
    if wanted.lower() in known:
        name = known[wanted.lower()]
        return TaskFile.parse((_folder() / f"{name}{SUFFIX}").read_text(encoding="utf-8"), where=f"the task {name}")
    path = Path(name_or_path)
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name that cannot be a path
        raise FileError(
            f"no task file and no shipped task '{wanted}'.{closest(wanted, known.values())} Shipped: "
            f"{', '.join(known.values())}; a task file ends in {SUFFIX}"
        )
    return TaskFile.parse(read_text(path, error=TaskError), where=str(path))


def find_split(folder: Path, task: TaskFile, split: str) -> Path:
    """Find the file of one part of a task's data, in a folder or in the task's folder inside.

    ``split`` is ``train``, ``dev``, ``val``, ``test``, or the name of a file without its ending. A FileError lists the
    names that were looked for.
    """
    stems = {**SPLIT_FILES, **task.files}.get(split, (split,))
    if not os.path.isdir(folder):
        raise FileError(f"no such data folder: {folder}; give the folder that holds {stems[0]}.jsonl")
    inner = (entry for entry in folder.iterdir() if entry.is_dir() and entry.name.lower() == task.name.lower())
    places = [*inner, folder]
    for place, stem, suffix in itertools.product(places, stems, SUFFIXES):
        if os.path.isfile(place / f"{stem}{suffix}"):
            return place / f"{stem}{suffix}"
    there = sorted(entry.name for place in places for entry in place.iterdir())
    raise FileError(
        f"no '{split}' part of the task {task.name} in {folder}: looked for {' or '.join(stems)} with one of the "
        f"endings {', '.join(SUFFIXES)}, there and in the folder {task.name} inside; there is "
        f"{', '.join(there)[:300] or 'nothing'}. Name another part, or name its file under [files] in the task file"
    )


def _folder() -> Traversable:
    return resources.files("ptuning.data") / "tasks"
