"""Task files: the description of a task in one TOML file, with its templates, its label words and its rows' fields.

``docs/tasks.md`` explains the keys.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from pydantic import BeforeValidator, Field, PlainValidator

from ptuning.data.answer_space import AnswerSpace
from ptuning.data.questions import LABEL, ChoiceSource, Questions, Reader, RowPath, with_references
from ptuning.data.reading import SUFFIXES, Row, raw_rows
from ptuning.errors import FileError, LabelWordError, RecordError, TaskError, TemplateError, closest
from ptuning.files import FileModel, Json, parse_toml, read_bytes, read_text, sha256, validate
from ptuning.metrics import METRICS, TASK_METRICS
from ptuning.metrics.generation import TEXT_METRICS
from ptuning.names import is_folder_name
from ptuning.records import IN_MEMORY, TARGET_FIELD, Record
from ptuning.template.labels import LabelWords, Normalise, Scoring
from ptuning.template.language import Template

if TYPE_CHECKING:
    from importlib.abc import Traversable  # where Python 3.10 has it

T = TypeVar("T")
SUFFIX = ".toml"
# File names of each part: FewGLUE's and SuperGLUE's, and common others. The part "val" never chooses anything.
SPLIT_FILES: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "dev": ("dev32", "dev"),
    "val": ("val", "validation"),
    "test": ("test",),
}


def _parsed(parse: Callable[[str], T]) -> PlainValidator:
    """Return the validator of a text with a syntax of its own."""

    def read(value: object) -> T:
        if not isinstance(value, str) or not value.strip():
            raise ValueError("Input should be text in quotation marks")
        return parse(value)

    return PlainValidator(read)


def _as_tuple(value: object) -> object:
    """Return a list as a tuple, and one text as a tuple of one."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Pattern = Annotated[Template, _parsed(Template.parse)]
PathText = Annotated[RowPath, _parsed(RowPath.parse)]
PathTexts = Annotated[tuple[PathText, ...], BeforeValidator(_as_tuple)]


class PatternKeys(FileModel, extra="forbid"):
    """A pattern in a task file."""

    manual: Pattern
    learned: Pattern | None = None


class ChoiceKeys(FileModel, extra="forbid"):
    """The table of choices in a task file."""

    texts: PathTexts = Field((), alias="from")
    spans: PathText | None = None
    of: PathText | None = None
    phrases: PathText | None = None
    right: PathText | None = None


class TaskKeys(FileModel, extra="forbid"):
    """The keys of a task file."""

    name: str
    version: str = Field(min_length=1)
    source: str = ""
    about: str = ""
    rows: str = ""
    fields_: dict[str, PathText] = Field(default_factory=dict, alias="fields")
    values: dict[str, dict[str, str]] = Field(default_factory=dict)
    label: PathText = LABEL
    labels: dict[str, Texts] | None = None
    choices: ChoiceKeys | None = None
    group: PathTexts = ()
    idx: dict[str, PathText] | PathText = RowPath(("idx",), (), "idx")
    gather: bool = False
    metrics: Texts = ("accuracy",)
    calibrate: bool = False
    normalise: Normalise = "sum"
    files: dict[str, Texts] = Field(default_factory=dict)
    patterns: tuple[PatternKeys, ...] = Field(min_length=1)


@dataclass(frozen=True)
class TaskFile:
    """A task.

    Args:
        name: Its name, which is also the name of its folder next to other tasks.
        version: Version of the task file; raised whenever the same rows get another meaning.
        source: Where the task comes from.
        about: What is asked, in a sentence.
        manual: Templates without slots.
        learned: Templates with slots; pattern i of both belong together.
        reader: Turns rows into questions.
        label_words: The verbalizer of a classification; None if rows bring their choices, or the target is any text.
        metrics: Names of :data:`ptuning.metrics.TASK_METRICS`, or all of
            :data:`ptuning.metrics.generation.TEXT_METRICS` for generated texts. The first one chooses.
        gather: Whether rows that differ in their target alone are one with several references, where texts are scored.
        calibrate: The default of calibration: subtract from each label the score that it gets for an empty record.
        normalise: The default for scores of choices and label words of several tokens: their sum or mean.
        files: Part -> names of files to look for, without their endings.
        text: The text of the file, which is saved with a prompt.
    """

    name: str
    version: str
    source: str
    about: str
    manual: tuple[Template, ...]
    learned: tuple[Template, ...]
    reader: Reader
    label_words: LabelWords | None = None
    metrics: tuple[str, ...] = ("accuracy",)
    gather: bool = False
    calibrate: bool = False
    normalise: Normalise = "sum"
    files: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: SPLIT_FILES)
    text: str = ""

    @classmethod
    def parse(cls, text: str, *, where: str = "the task file") -> TaskFile:
        """Read a task from the text of its file; a TaskError names a malformed key and the remedy."""
        value = parse_toml(text, where=where, error=TaskError).value
        try:
            keys = validate(TaskKeys, value, error=TaskError)
            if not is_folder_name(keys.name, spaces=True):
                raise TaskError(
                    f"'{keys.name}' cannot be the name of a task, since it becomes a folder; use letters, digits and "
                    "- _ . + ="
                )
            words = None if keys.labels is None else LabelWords(keys.labels)
            is_closed = words is not None or keys.choices is not None
            if keys.gather and is_closed:
                raise TaskError(
                    "'gather' is for texts with several references; a row with labels or choices has one answer"
                )
            for part, names in keys.files.items():
                if part not in SPLIT_FILES:
                    raise TaskError(
                        f"unknown key 'files.{part}'.{closest(part, SPLIT_FILES)} Known: {', '.join(SPLIT_FILES)}"
                    )
                for name in names:
                    if Path(name).suffix.lower() in SUFFIXES:
                        raise TaskError(f"[files] {part} names '{name}'; leave its ending out: '{Path(name).stem}'")
            manual, learned = _patterns(keys)
            used = tuple(dict.fromkeys(name for template in (*manual, *learned) for name in template.fields))
            return cls(
                name=keys.name,
                version=keys.version,
                source=keys.source,
                about=keys.about,
                manual=manual,
                learned=learned,
                reader=_reader(keys, words, used),
                label_words=words,
                metrics=_metrics(keys.metrics, words, is_closed=is_closed),
                gather=keys.gather,
                calibrate=keys.calibrate,
                normalise=keys.normalise,
                files={**SPLIT_FILES, **keys.files},
                text=text,
            )
        except (TaskError, TemplateError, LabelWordError) as error:
            raise TaskError(f"{where}: {error}") from error

    @property
    def answer_space(self) -> AnswerSpace:
        """What its rows are answered with."""
        scoring = Scoring(self.normalise, self.calibrate, self.closed_fields)
        return AnswerSpace(self.label_words, self.reader.choices is not None, scoring)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields of a row's record."""
        return tuple(self.reader.fields)

    @property
    def closed_fields(self) -> tuple[str, ...]:
        """Fields that hold one of a few words, such as "because" and "so"."""
        return tuple(name for name in self.reader.values if name != TARGET_FIELD)

    @property
    def text_metrics(self) -> tuple[str, ...]:
        """Its metrics, if they are for texts that are written; else none."""
        return self.metrics if self.metrics[0] in TEXT_METRICS else ()

    @property
    def answer_metrics(self) -> tuple[str, ...]:
        """Its metrics, if they are for answers, right or wrong; else none."""
        return () if self.text_metrics else self.metrics

    def to_score(self, rows: Questions) -> Questions:
        """Return rows as texts are scored on them: with all references of an input in one row, if it gathers them."""
        return with_references(rows) if self.gather else rows

    @property
    def columns(self) -> tuple[str, ...]:
        """Names at the top of a row that its fields are read from."""
        return tuple(dict.fromkeys(path.names[0].removesuffix("[]") for path in self.reader.fields.values()))

    def typed(self, texts: Mapping[str, str], *, where: str) -> Record:
        """Return the record of texts, by field, as a file would have them; ``where`` starts the messages of errors."""
        return {name: self.reader.filled(name, texts[name], where=where) for name in self.fields}

    def to_json(self) -> dict[str, Json]:
        """Return the task as a prompt's manifest and a run's record hold it."""
        return {"name": self.name, "version": self.version, "file": self.text}

    def read(self, path: str | Path, *, labelled: bool = True) -> Questions:
        """Read a data file in any of the formats of :func:`ptuning.load_records`, with its labels if ``labelled``.

        A FileError if it cannot be read; a RecordError, with file and line, if a row does not fit the task.
        """
        path = Path(path)
        if not path.suffix and not os.path.exists(path):
            raise FileError(f"no such data file or folder: {path}")
        if path.suffix.lower() not in SUFFIXES:
            raise FileError(f"cannot tell the format of {path}; a data file ends in one of {', '.join(SUFFIXES)}")
        data = read_bytes(path)
        rows = raw_rows(data, name=str(path))
        return self.read_named(rows, name=str(path), digest=sha256(data), labelled=labelled)

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

    def as_in_file(self, label: str) -> Json:
        """Return a label as data files write it: ``true`` for "true", and the number for a label with a number."""
        written = next((raw for raw, name in self.reader.values.get(TARGET_FIELD, {}).items() if name == label), label)
        if written in ("true", "false"):
            return written == "true"
        return int(written) if written.isdecimal() else written


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
    stems = task.files.get(split, (split,))
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


def _patterns(keys: TaskKeys) -> tuple[tuple[Template, ...], tuple[Template, ...]]:
    """Return the manual templates, which must have no slots, and the learned ones, which must have some."""
    manual, learned = [], []
    for number, pattern in enumerate(keys.patterns, start=1):
        if pattern.manual.has_slots:
            raise TaskError(f"pattern {number}: the manual template has slots; write them as learned = '...'")
        is_closed = keys.labels is not None or keys.choices is not None
        template = pattern.learned or _made_of(pattern.manual, after=is_closed)
        if not template.has_slots:
            raise TaskError(f"pattern {number}: the learned template has no slots; write words as [P:words]")
        manual.append(pattern.manual)
        learned.append(template)
    return tuple(manual), tuple(learned)


def _made_of(manual: Template, *, after: bool) -> Template:
    """Return the template to learn; ``after`` the text, where there are words for that: it is then read only once."""
    try:
        return Template.from_manual(str(manual), after=after)
    except TemplateError:
        return Template.from_manual(str(manual))


def _reader(keys: TaskKeys, words: LabelWords | None, used: Sequence[str]) -> Reader:
    values = {TARGET_FIELD if name == "label" else name: texts for name, texts in keys.values.items()}
    for label in values.get(TARGET_FIELD, {}).values():
        if words is not None and label not in words.labels:
            raise TaskError(
                f"[values] name the label '{label}', which has no words.{closest(label, words.labels)} Give it words "
                "under [labels]"
            )
    if TARGET_FIELD in keys.fields_:
        raise TaskError(f"the target has the key 'label'; '{TARGET_FIELD}' cannot be the name of a field")
    for name in (*keys.fields_, *(name for name in values if name != TARGET_FIELD)):
        if name not in used:
            raise TaskError(f"no pattern uses the field '{name}'.{closest(name, used)}")
    if words is not None and keys.choices is not None:
        raise TaskError(
            "there are both [labels] and [choices]; a task has words for its labels, or choices in its rows"
        )
    choices = _choices(keys.choices, keys.label) if keys.choices is not None else None
    answer = keys.label if choices is None else choices.right
    fields = {name: keys.fields_.get(name, RowPath((name,), (), name)) for name in used}
    for name, path in fields.items():
        if path.names == answer.names:
            raise TaskError(f"the field '{name}' of a pattern holds the answer; write [Y] for the answer")
    return Reader(
        fields,
        lists=_lists(keys.rows),
        label=keys.label,
        labels=words.labels if words is not None else (),
        values=values,
        choices=choices,
        group=keys.group,
        idx=keys.idx if isinstance(keys.idx, dict) else {"": keys.idx},
    )


def _choices(keys: ChoiceKeys, label: RowPath) -> ChoiceSource:
    if (keys.spans is None) != (keys.of is None):
        raise TaskError("[choices]: 'spans' and 'of' go together, the places and the text that they cut from")
    if not (keys.texts or keys.spans or keys.phrases):
        raise TaskError('[choices] need from = ["..."], or spans = "..." and of = "..."')
    return ChoiceSource(keys.texts, spans=keys.spans, of=keys.of, phrases=keys.phrases, right=keys.right or label)


def _metrics(names: tuple[str, ...], words: LabelWords | None, *, is_closed: bool) -> tuple[str, ...]:
    known = TASK_METRICS if is_closed else (*TASK_METRICS, *TEXT_METRICS)
    if not names:
        raise TaskError(f"'metrics' is empty; name one or more of {', '.join(known)}, or leave the key out")
    for name in names:
        if name not in known:
            closed = " A task with labels or choices writes no texts." if name in TEXT_METRICS else ""
            raise TaskError(f"unknown metric '{name}'.{closest(name, known)}{closed} Known: {', '.join(known)}")
        needed = METRICS[name].needs_label if name in METRICS else None
        if needed is not None and (words is None or needed not in words.labels):
            raise TaskError(f"the metric '{name}' needs the label '{needed}', which this task does not have")
    of_texts = {name in TEXT_METRICS for name in names}
    if len(of_texts) > 1:
        raise TaskError(
            f"'metrics' mix metrics of written texts ({', '.join(TEXT_METRICS)}) with metrics of right and wrong "
            "answers; give those of one kind"
        )
    return tuple(dict.fromkeys(names))


def _lists(rows: str) -> tuple[RowPath, ...]:
    if not rows:
        return ()
    path = RowPath.parse(rows)
    if path.repairs or not path.names[-1].endswith("[]"):
        raise TaskError(f'rows = "{rows}" must end with a list, such as "passage.questions[]"')
    ends = [depth for depth, name in enumerate(path.names, start=1) if name.endswith("[]")]
    return tuple(RowPath(path.names[:end], (), rows) for end in ends)
