"""Task files: the description of a task in one TOML file, with its templates, its label words and its rows' fields.

``docs/tasks.md`` explains the keys; :mod:`ptuning.data.task_parsing` checks them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from ptuning.data.answer_space import AnswerSpace
from ptuning.data.questions import Questions, Reader
from ptuning.data.reading import SUFFIXES, raw_rows
from ptuning.data.task_parsing import (
    SPLIT_FILES,
    check_keys,
    read_files,
    read_label_words,
    read_metrics,
    read_name,
    read_patterns,
    read_reader,
)
from ptuning.errors import FileError, LabelWordError, RecordError, TaskError, TemplateError, closest
from ptuning.files import Json, parse_toml, read_bytes, read_text, sha256
from ptuning.records import TARGET_FIELD, Record
from ptuning.template.labels import LabelWords, Normalise, Scoring
from ptuning.template.language import Template

if TYPE_CHECKING:
    from importlib.abc import Traversable  # where Python 3.10 has it

SUFFIX = ".toml"


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
        metrics: Names of :data:`ptuning.metrics.TASK_METRICS`; the first one chooses.
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
    calibrate: bool = False
    normalise: Normalise = "sum"
    files: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: SPLIT_FILES)
    text: str = ""

    @classmethod
    def parse(cls, text: str, *, where: str = "the task file") -> TaskFile:
        """Read a task from the text of its file.

        Raises:
            TaskError: If the file is malformed; it names the key and the remedy.
        """
        task = replace(parse_toml(text, where=where, error=TaskError), where="")
        try:
            check_keys(task)
            manual, learned = read_patterns(task)
            words = read_label_words(task)
            return cls(
                name=read_name(task),
                version=task.at("version").text(blank=False),
                source=task.at("source", "").text(),
                about=task.at("about", "").text(),
                manual=manual,
                learned=learned,
                reader=read_reader(task, words, used=[name for one in (*manual, *learned) for name in one.fields]),
                label_words=words,
                metrics=read_metrics(task, words),
                calibrate=task.at("calibrate", False).flag(),
                normalise=task.at("normalise", "sum").one_of(("sum", "mean")),
                files=read_files(task),
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

    def record_of(self, text: str) -> Record:
        """Return the record of a task with one field, from the text that a file would have there.

        Raises:
            RecordError: If rows have more fields, or choices; or as for :meth:`read`.
        """
        has_choices = self.answer_space.has_choices
        if has_choices or len(self.fields) != 1:
            what = "choices of their own" if has_choices else f"the fields {', '.join(self.fields)}"
            raise RecordError(f"a TEXT is not enough for the task {self.name}, whose rows have {what}; use --data")
        return {self.fields[0]: self.reader.filled(self.fields[0], text, where="the command line")}

    def to_json(self) -> dict[str, Json]:
        """Return the task as a prompt's manifest and a run's record hold it."""
        return {"name": self.name, "version": self.version, "file": self.text}

    def read(self, path: str | Path, *, labelled: bool = True) -> Questions:
        """Read a data file.

        Args:
            path: A file in any of the formats of :func:`ptuning.load_records`.
            labelled: Whether to read labels.

        Raises:
            FileError: If it cannot be read.
            RecordError: If a row does not fit the task; it names file, line and what is missing.
        """
        path = Path(path)
        if not path.suffix and not path.exists():
            raise FileError(f"no such data file or folder: {path}")
        if path.suffix.lower() not in SUFFIXES:
            raise FileError(f"cannot tell the format of {path}; a data file ends in one of {', '.join(SUFFIXES)}")
        data = read_bytes(path)
        rows = raw_rows(data, name=str(path))
        return self.read_named(rows, name=str(path), digest=sha256(data), labelled=labelled)

    def read_named(
        self,
        rows: Iterable[tuple[str, Mapping[str, object]]],
        *,
        name: str,
        digest: str | None = None,
        labelled: bool = True,
    ) -> Questions:
        """Read rows, each given as (file and line, row).

        Raises:
            RecordError: As for :meth:`read`.
        """
        found = Questions(self.reader.read(rows, labelled=labelled), name=name, digest=digest)
        if not found:
            raise RecordError(f"{name} holds no rows of the task {self.name}")
        return found

    def read_rows(self, rows: Iterable[Mapping[str, object]], *, labelled: bool = True) -> Questions:
        """Read rows in memory, each like a line of a data file.

        Raises:
            RecordError: As for :meth:`read`.
        """
        named = ((f"row {number}", row) for number, row in enumerate(rows, start=1))
        return self.read_named(named, name="in memory", labelled=labelled)

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
    """Load a shipped task by its name, or a task file.

    Raises:
        FileError: If there is neither.
        TaskError: If the file is malformed.

    Example:
        >>> load_task("RTE").label_words.labels
        ('entailment', 'not_entailment')
    """
    known = {name.lower(): name for name in shipped_names()}
    wanted = str(name_or_path)
    if wanted.lower() in known:
        name = known[wanted.lower()]
        return TaskFile.parse((_folder() / f"{name}{SUFFIX}").read_text(encoding="utf-8"), where=f"the task {name}")
    path = Path(name_or_path)
    if not path.is_file():
        raise FileError(
            f"no task file and no shipped task '{wanted}'.{closest(wanted, known.values())} Shipped: "
            f"{', '.join(known.values())}; a task file ends in {SUFFIX}"
        )
    return TaskFile.parse(read_text(path, error=TaskError), where=str(path))


def find_split(folder: Path, task: TaskFile, split: str) -> Path:
    """Find the file of one part of a task's data.

    Args:
        folder: The folder of the files, or the one above it.
        task: The task.
        split: ``train``, ``dev``, ``val``, ``test``, or the name of a file without its ending.

    Raises:
        FileError: If there is none; it lists the names that were looked for.
    """
    stems = task.files.get(split, (split,))
    inner = [entry for entry in _folders(folder) if entry.name.lower() == task.name.lower()]
    for place in [*inner, folder]:
        for stem in stems:
            for suffix in SUFFIXES:
                if (place / f"{stem}{suffix}").is_file():
                    return place / f"{stem}{suffix}"
    if not folder.is_dir():
        raise FileError(f"no such data folder: {folder}; give the folder that holds {stems[0]}.jsonl")
    there = sorted(entry.name for place in [*inner, folder] for entry in place.iterdir())
    raise FileError(
        f"no '{split}' part of the task {task.name} in {folder}: looked for {' or '.join(stems)} with one of the "
        f"endings {', '.join(SUFFIXES)}, there and in the folder {task.name} inside; there is "
        f"{', '.join(there)[:300] or 'nothing'}. Name another part, or name its file under [files] in the task file"
    )


def _folders(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []


def _folder() -> Traversable:
    return resources.files("ptuning.data") / "tasks"
