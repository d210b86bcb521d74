"""Task files: the description of a task in one TOML file, with its templates, its label words and its rows' fields.

``docs/tasks.md`` explains the keys.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from ptuning.data.answer_space import AnswerSpace
from ptuning.data.questions import ChoiceSource, Questions, Reader, RowPath, with_references
from ptuning.data.reading import SUFFIXES, Row, raw_rows
from ptuning.errors import FileError, LabelWordError, RecordError, TaskError, TemplateError, closest
from ptuning.files import Json, Unchecked, parse_toml, read_bytes, read_text, sha256
from ptuning.metrics import METRICS, TASK_METRICS
from ptuning.metrics.generation import TEXT_METRICS
from ptuning.names import is_folder_name
from ptuning.records import IN_MEMORY, TARGET_FIELD, Record
from ptuning.template.labels import LabelWords, Normalise, Scoring
from ptuning.template.language import Template

if TYPE_CHECKING:
    from importlib.abc import Traversable  # where Python 3.10 has it

SUFFIX = ".toml"
KEYS = (
    "name", "version", "source", "about", "rows", "fields", "values", "label", "labels", "choices", "group", "idx",
    "gather", "metrics", "calibrate", "normalise", "files", "patterns",
)  # fmt: skip
REQUIRED_KEYS = ("name", "version", "patterns")
CHOICE_KEYS = ("from", "spans", "of", "phrases", "right")
PATTERN_KEYS = ("manual", "learned")
# File names of each part: FewGLUE's and SuperGLUE's, and common others. The part "val" never chooses anything.
SPLIT_FILES: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "dev": ("dev32", "dev"),
    "val": ("val", "validation"),
    "test": ("test",),
}


@dataclass(frozen=True)
class TaskFile:
    """A task.

    Args:
        name: Its name, which is also the name of its folder beside other tasks.
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
        task = replace(parse_toml(text, where=where, error=TaskError), where="")
        try:
            missing = [key for key in REQUIRED_KEYS if key not in task.table(known=KEYS)]
            if missing:
                raise TaskError(f"the key '{missing[0]}' is missing; a task needs {', '.join(REQUIRED_KEYS)}")
            manual, learned = _patterns(task)
            words = task.optional("labels", lambda one: LabelWords(_named_texts(one)))
            is_closed = words is not None or task.at("choices").value is not None
            return cls(
                name=_name(task),
                version=task.at("version").text(blank=False),
                source=task.at("source", "").text(),
                about=task.at("about", "").text(),
                manual=manual,
                learned=learned,
                reader=_reader(task, words, used=[name for one in (*manual, *learned) for name in one.fields]),
                label_words=words,
                metrics=_metrics(task, words, is_closed=is_closed),
                gather=_gather(task, is_closed=is_closed),
                calibrate=task.at("calibrate", False).flag(),
                normalise=task.at("normalise", "sum").one_of(("sum", "mean")),
                files=_files(task),
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
        found = Questions(self.reader.read(rows, labelled=labelled), name=name, digest=digest)
        if not found:
            raise RecordError(f"{name} holds no rows of the task {self.name}")
        return found

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


def _name(task: Unchecked) -> str:
    name = task.at("name").text(blank=False)
    if not is_folder_name(name, spaces=True):
        raise TaskError(
            f"'{name}' cannot be the name of a task, since it becomes a folder; use letters, digits and - _ . + ="
        )
    return name


def _patterns(task: Unchecked) -> tuple[tuple[Template, ...], tuple[Template, ...]]:
    """Return the manual templates, which must have no slots, and the learned ones, which must have some."""
    listed = task.at("patterns")
    if not isinstance(listed.value, list) or not all(isinstance(one, dict) for one in listed.value) or not listed.value:
        raise TaskError("a task needs patterns: [[patterns]], with manual = '...' below it")
    manual, learned = [], []
    for number, pattern in enumerate(listed.items(), start=1):
        if "manual" not in pattern.table(known=PATTERN_KEYS):
            raise TaskError(f"pattern {number} has no manual template; write manual = '...' with a [Y] in it")
        manual.append(Template.parse(pattern.at("manual").text(blank=False)))
        if manual[-1].has_slots:
            raise TaskError(f"pattern {number}: the manual template has slots; write them as learned = '...'")
        given = pattern.optional("learned", lambda one: Template.parse(one.text(blank=False)))
        learned.append(given or _made_of(manual[-1], behind="labels" in task.table() or "choices" in task.table()))
        if not learned[-1].has_slots:
            raise TaskError(f"pattern {number}: the learned template has no slots; write words as [P:words]")
    return tuple(manual), tuple(learned)


def _made_of(manual: Template, *, behind: bool) -> Template:
    """Return the template to learn; ``behind`` the text, where there are words for that: it is then read only once."""
    try:
        return Template.from_manual(str(manual), behind=behind)
    except TemplateError:
        return Template.from_manual(str(manual))


def _reader(task: Unchecked, words: LabelWords | None, used: Iterable[str]) -> Reader:
    used = tuple(dict.fromkeys(used))
    values = _values(task, words)
    own = _paths(task.at("fields", {}))
    if TARGET_FIELD in own:
        raise TaskError(f"the target has the key 'label'; '{TARGET_FIELD}' cannot be the name of a field")
    for name in (*own, *(name for name in values if name != TARGET_FIELD)):
        if name not in used:
            raise TaskError(f"no pattern uses the field '{name}'.{closest(name, used)}")
    label = RowPath.parse(task.at("label", "label").text())
    choices = _choices(task, label)
    if words is not None and choices is not None:
        raise TaskError(
            "there are both [labels] and [choices]; a task has words for its labels, or choices in its rows"
        )
    answer = label if choices is None else choices.right
    fields = {name: own.get(name, RowPath((name,), (), name)) for name in used}
    for name, path in fields.items():
        if path.names == answer.names:
            raise TaskError(f"the field '{name}' of a pattern holds the answer; write [Y] for the answer")
    idx = task.at("idx", "idx")
    return Reader(
        fields,
        lists=_lists(task.at("rows", "").text()),
        label=label,
        labels=words.labels if words is not None else (),
        values=values,
        choices=choices,
        group=tuple(map(RowPath.parse, _texts(task.at("group", [])))),
        idx={"": RowPath.parse(idx.value)} if isinstance(idx.value, str) else _paths(idx),
    )


def _metrics(task: Unchecked, words: LabelWords | None, *, is_closed: bool) -> tuple[str, ...]:
    names = _texts(task.at("metrics", ["accuracy"]))
    known = TASK_METRICS if is_closed else (*TASK_METRICS, *TEXT_METRICS)
    if not names:
        raise TaskError(f"'metrics' is empty; name one or more of {', '.join(known)}, or leave the key out")
    for name in names:
        if name not in known:
            closed = " A task with labels or choices writes no texts." if name in TEXT_METRICS else ""
            raise TaskError(f"unknown metric '{name}'.{closest(name, known)}{closed} Known: {', '.join(known)}")
    of_texts = [name in TEXT_METRICS for name in names]
    if any(of_texts):
        if not all(of_texts):
            text, answer = names[of_texts.index(True)], names[of_texts.index(False)]
            raise TaskError(
                f"'metrics' name {text}, which is for texts, and {answer}, which is for right and wrong answers; "
                f"give those of one kind. For texts: {', '.join(TEXT_METRICS)}"
            )
        return tuple(dict.fromkeys(names))
    for name in names:
        needed = METRICS[name].needs_label
        if needed is not None and (words is None or needed not in words.labels):
            raise TaskError(f"the metric '{name}' needs the label '{needed}', which this task does not have")
    return names


def _gather(task: Unchecked, *, is_closed: bool) -> bool:
    found = task.at("gather", False).flag()
    if found and is_closed:
        raise TaskError("'gather' is for texts with several references; a row with labels or choices has one answer")
    return found


def _files(task: Unchecked) -> dict[str, tuple[str, ...]]:
    files = _named_texts(task.at("files", {}), known=tuple(SPLIT_FILES))
    for part, names in files.items():
        for name in names:
            if Path(name).suffix.lower() in SUFFIXES:
                raise TaskError(f"[files] {part} names '{name}'; leave its ending out: '{Path(name).stem}'")
    return {**SPLIT_FILES, **files}


def _values(task: Unchecked, words: LabelWords | None) -> dict[str, dict[str, str]]:
    """Return field -> value in the file -> text. Those of the label are the target's."""
    found = {
        TARGET_FIELD if name == "label" else name: {value: text.text() for value, text in one.table().items()}
        for name, one in task.at("values", {}).table().items()
    }
    for named in found.get(TARGET_FIELD, {}).values():
        if words is not None and named not in words.labels:
            raise TaskError(
                f"[values] name the label '{named}', which has no words.{closest(named, words.labels)} Give it words "
                "under [labels]"
            )
    return found


def _choices(task: Unchecked, label: RowPath) -> ChoiceSource | None:
    choices = task.at("choices")
    if choices.value is None:
        return None
    table = choices.table(known=CHOICE_KEYS)
    if ("spans" in table) != ("of" in table):
        raise TaskError("[choices]: 'spans' and 'of' go together, the places and the text that they cut from")
    if not {"from", "spans", "phrases"} & set(table):
        raise TaskError('[choices] need from = ["..."], or spans = "..." and of = "..."')
    one = {name: choices.optional(name, _path) for name in ("spans", "of", "phrases", "right")}
    texts = tuple(map(RowPath.parse, _texts(choices.at("from", []))))
    return ChoiceSource(texts, spans=one["spans"], of=one["of"], phrases=one["phrases"], right=one["right"] or label)


def _lists(rows: str) -> tuple[RowPath, ...]:
    if not rows:
        return ()
    path = RowPath.parse(rows)
    if path.repairs or not path.names[-1].endswith("[]"):
        raise TaskError(f'rows = "{rows}" must end with a list, such as "passage.questions[]"')
    ends = [depth for depth, name in enumerate(path.names, start=1) if name.endswith("[]")]
    return tuple(RowPath(path.names[:end], (), rows) for end in ends)


def _paths(table: Unchecked) -> dict[str, RowPath]:
    return {name: _path(one) for name, one in table.table().items()}


def _path(found: Unchecked) -> RowPath:
    return RowPath.parse(found.text(blank=False))


def _named_texts(table: Unchecked, *, known: Sequence[str] | None = None) -> dict[str, tuple[str, ...]]:
    return {name: _texts(one) for name, one in table.table(known=known).items()}


def _texts(found: Unchecked) -> tuple[str, ...]:
    """Return a list of texts; one text alone is a list of one."""
    return (found.value,) if isinstance(found.value, str) else tuple(found.texts())
