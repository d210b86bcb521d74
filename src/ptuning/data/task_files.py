"""Task files: what a task asks, in which words, and how its rows are read. Knows no tokenizer and no model.

A task file is TOML of at most 25 lines; docs/tasks.md says what each key means.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ptuning.data.questions import ChoiceSource, Questions, Reader
from ptuning.data.reading import SUFFIXES, raw_rows
from ptuning.data.row_paths import Source
from ptuning.errors import FileError, LabelWordError, RecordError, TaskError, TemplateError, closest
from ptuning.files import Json, read_bytes, sha256
from ptuning.metrics import METRICS, TASK_METRICS
from ptuning.names import is_folder_name
from ptuning.records import TARGET_FIELD, Record
from ptuning.template.labels import LabelWords, Normalise
from ptuning.template.language import Template

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from importlib.abc import Traversable  # where Python 3.10 has it

SUFFIX = ".toml"
KEYS = (
    "name", "version", "source", "about", "rows", "fields", "values", "label", "labels", "choices", "group", "idx",
    "metrics", "calibrate", "normalise", "files", "patterns",
)  # fmt: skip
REQUIRED_KEYS = ("name", "version", "patterns")
CHOICE_KEYS = ("from", "spans", "of", "phrases", "right")
PATTERN_KEYS = ("manual", "learned")
# What the files of a part are called: FewGLUE's and SuperGLUE's names, and common others. "val" never chooses anything.
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
        name: What it is called, and what its folder is called beside other tasks.
        version: Of the task file; raised whenever the same rows come to mean something else.
        source: Where the task comes from.
        about: What is asked, in a sentence.
        manual: Templates without slots.
        learned: Templates with slots; pattern i of both belong together.
        reader: How rows become questions.
        label_words: For classification; None if rows bring their choices, or the target is any text.
        metrics: Names of :data:`ptuning.metrics.TASK_METRICS`, the first the one that chooses.
        calibrate: Whether scores are corrected by those of an empty record unless asked otherwise.
        normalise: How choices and label words of several tokens are scored unless asked otherwise.
        files: Part -> names of files to look for, without their endings.
        text: The file as it was read, so that a prompt can carry its task along.
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
            TaskError: If the file is malformed; says where and what to do.
        """
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise TaskError(f"{where} is not valid TOML: {error}") from error
        try:
            return _task(values, text)
        except (TaskError, TemplateError, LabelWordError) as error:
            raise TaskError(f"{where}: {error}") from error

    @property
    def is_closed(self) -> bool:
        """Whether rows are answered with a label or a choice of theirs, and not with any text."""
        return self.label_words is not None or self.has_choices

    @property
    def has_choices(self) -> bool:
        """Whether rows bring the texts to choose among."""
        return self.reader.choices is not None

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that a row's record has."""
        return tuple(self.reader.fields)

    @property
    def closed_fields(self) -> tuple[str, ...]:
        """Fields that hold one of a few words, such as "because" and "so"."""
        return tuple(name for name in self.reader.values if name != TARGET_FIELD)

    def record_of(self, text: str) -> Record:
        """Return the record of a task with one field, from what stands there in a file.

        Raises:
            RecordError: If rows have more fields, or choices; or as for :meth:`read`.
        """
        if self.has_choices or len(self.fields) != 1:
            what = "choices of their own" if self.has_choices else f"the fields {', '.join(self.fields)}"
            raise RecordError(f"a TEXT is not enough for the task {self.name}, whose rows have {what}; use --data")
        return {self.fields[0]: self.reader.filled(self.fields[0], text, where="the command line")}

    def to_json(self) -> dict[str, Json]:
        """Return what a prompt and a record say of the task."""
        return {"name": self.name, "version": self.version, "file": self.text}

    def read(self, path: str | Path, *, labelled: bool = True) -> Questions:
        """Read a data file.

        Args:
            path: A file in any of the formats of :func:`ptuning.load_records`.
            labelled: Whether rows have labels; if not, none is looked at.

        Raises:
            FileError: If it cannot be read.
            RecordError: If a row is not what the task needs; names file, line and what is missing.
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
        """Read rows, each with what it is called in messages.

        Raises:
            RecordError: As for :meth:`read`.
        """
        found = Questions(self.reader.read(rows, labelled=labelled), name=name, digest=digest)
        if not found:
            raise RecordError(f"{name} holds no rows of the task {self.name}")
        return found

    def read_rows(self, rows: Iterable[Mapping[str, object]], *, labelled: bool = True) -> Questions:
        """Read rows that are in memory, each as a line of a data file would give it.

        Raises:
            RecordError: As for :meth:`read`.
        """
        named = ((f"row {number}", row) for number, row in enumerate(rows, start=1))
        return self.read_named(named, name="in memory", labelled=labelled)

    def as_in_file(self, label: str) -> Json:
        """Return a label as data files write it: ``true`` for the label "true", 1 for one that stands for 1."""
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
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is no UTF-8 text ({error.reason}); save it as UTF-8") from error
    return TaskFile.parse(text, where=str(path))


def find_split(folder: Path, task: TaskFile, split: str) -> Path:
    """Find the file of one part of a task's data.

    Args:
        folder: The folder of the files, or one that holds the task's folder.
        task: The task.
        split: ``train``, ``dev``, ``val``, ``test``, or the name of a file without its ending.

    Raises:
        FileError: If there is none; lists what was looked for.
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
        f"{', '.join(there)[:300] or 'nothing'}. Name another part, or say under [files] in the task file what its "
        "file is called"
    )


def _folders(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []


def _folder() -> Traversable:
    return resources.files("ptuning.data") / "tasks"


def _task(values: Mapping[str, object], text: str) -> TaskFile:
    """Build a task from the values of its file, each checked."""
    _known(values, KEYS, what="key")
    missing = [key for key in REQUIRED_KEYS if key not in values]
    if missing:
        raise TaskError(f"the key '{missing[0]}' is missing; a task needs {', '.join(REQUIRED_KEYS)}")
    manual, learned = _patterns(values["patterns"])
    words = _label_words(values.get("labels"))
    if words is not None and "choices" in values:
        raise TaskError(
            "there are both [labels] and [choices]; a task has words for its labels, or choices in its rows"
        )
    mapped = _mappings(values.get("values"))
    for named in mapped.get(TARGET_FIELD, {}).values():
        if words is not None and named not in words.labels:
            raise TaskError(
                f"[values] name the label '{named}', and no word covers it.{closest(named, words.labels)} Give it "
                "words under [labels]"
            )
    used = dict.fromkeys(name for one in (*manual, *learned) for name in one.fields)
    metrics = _metrics(values.get("metrics", ["accuracy"]), words)
    own = {name: Source.parse(place) for name, place in _texts(values.get("fields"), "fields").items()}
    if TARGET_FIELD in own:
        raise TaskError(f"the target has the key 'label'; '{TARGET_FIELD}' is no name for a field")
    for name in (*own, *(name for name in mapped if name != TARGET_FIELD)):
        if name not in used:
            raise TaskError(f"no pattern uses the field '{name}'.{closest(name, used)}")
    label = Source.parse(_text(values, "label", "label"))
    choices = _choices(values["choices"], label) if "choices" in values else None
    answer = label if choices is None else choices.right
    for name in used:
        if own.get(name, Source((name,))).path == answer.path:
            raise TaskError(f"the field '{name}' of a pattern is what is to be answered; [Y] stands for that")
    normalise = _text(values, "normalise", "sum")
    if normalise not in ("sum", "mean"):
        raise TaskError(f'\'normalise\' is "sum" or "mean", not "{normalise}"')
    calibrate = values.get("calibrate", False)
    if not isinstance(calibrate, bool):
        raise TaskError("'calibrate' is true or false")
    files = _files(values.get("files"))
    name = _text(values, "name")
    if not is_folder_name(name, spaces=True):
        raise TaskError(f"'{name}' is no name for a task, since it becomes a folder; use letters, digits and - _ . + =")
    return TaskFile(
        name,
        _text(values, "version"),
        _text(values, "source", ""),
        _text(values, "about", ""),
        manual,
        learned,
        Reader(
            {name: own.get(name, Source((name,), (), name)) for name in used},
            lists=_lists(_text(values, "rows", "")),
            label=label,
            labels=words.labels if words is not None else (),
            values=mapped,
            choices=choices,
            group=tuple(map(Source.parse, _listed(values.get("group", []), "group"))),
            idx=_idx(values.get("idx", "idx")),
        ),
        words,
        metrics,
        calibrate,
        cast("Normalise", normalise),
        {**SPLIT_FILES, **files},
        text,
    )


def _patterns(listed: object) -> tuple[tuple[Template, ...], tuple[Template, ...]]:
    if not isinstance(listed, list) or not listed or not all(isinstance(one, dict) for one in listed):
        raise TaskError("a task needs patterns: [[patterns]], with manual = '...' below it")
    manual, learned = [], []
    for number, one in enumerate(listed, start=1):
        _known(one, PATTERN_KEYS, what=f"key of pattern {number}")
        if "manual" not in one:
            raise TaskError(f"pattern {number} has no manual template; write manual = '...' with a [Y] in it")
        manual.append(Template.parse(_text(one, "manual")))
        if manual[-1].has_slots:
            raise TaskError(f"pattern {number}: the manual template has slots; write them as learned = '...'")
        learned.append(
            Template.parse(_text(one, "learned")) if "learned" in one else Template.from_manual(str(manual[-1]))
        )
        if not learned[-1].has_slots:
            raise TaskError(f"pattern {number}: the learned template has no slots; write words as [P:words]")
    return tuple(manual), tuple(learned)


def _label_words(labels: object) -> LabelWords | None:
    if labels is None:
        return None
    table = _table(labels, "labels")
    return LabelWords({label: tuple(_listed(words, f"labels.{label}")) for label, words in table.items()})


def _choices(value: object, label: Source) -> ChoiceSource:
    table = _table(value, "choices")
    _known(table, CHOICE_KEYS, what="key of [choices]")
    if ("spans" in table) != ("of" in table):
        raise TaskError("[choices]: 'spans' and 'of' go together, the places and the text that they cut from")
    if not {"from", "spans", "phrases"} & set(table):
        raise TaskError('[choices] need from = ["..."], or spans = "..." and of = "..."')

    def one(name: str) -> Source | None:
        return Source.parse(_text(table, name)) if name in table else None

    return ChoiceSource(
        tuple(map(Source.parse, _listed(table.get("from", []), "choices.from"))),
        spans=one("spans"),
        of=one("of"),
        phrases=one("phrases"),
        right=one("right") or label,
    )


def _files(value: object) -> dict[str, tuple[str, ...]]:
    """Return part -> names of its file without their endings."""
    table = _table(value, "files")
    _known(table, tuple(SPLIT_FILES), what="part under [files]")
    files = {part: tuple(_listed(names, f"files.{part}")) for part, names in table.items()}
    for part, names in files.items():
        for name in names:
            if Path(name).suffix.lower() in SUFFIXES:
                raise TaskError(f"[files] {part} names '{name}'; leave its ending out: '{Path(name).stem}'")
    return files


def _metrics(listed: object, words: LabelWords | None) -> tuple[str, ...]:
    names = _listed(listed, "metrics")
    if not names:
        raise TaskError(f"'metrics' is empty; name one or more of {', '.join(TASK_METRICS)}, or leave the key out")
    for name in names:
        if name not in TASK_METRICS:
            raise TaskError(f"unknown metric '{name}'.{closest(name, TASK_METRICS)} Known: {', '.join(TASK_METRICS)}")
        needed = METRICS[name].needs_label
        if needed is not None and (words is None or needed not in words.labels):
            raise TaskError(f"the metric '{name}' needs the label '{needed}', which this task does not have")
    return tuple(names)


def _lists(rows: str) -> tuple[Source, ...]:
    """Return every list on the way to the innermost one."""
    if not rows:
        return ()
    source = Source.parse(rows)
    if source.repairs or not source.path[-1].endswith("[]"):
        raise TaskError(f'rows = "{rows}" must end with a list, such as "passage.questions[]"')
    ends = [depth for depth, name in enumerate(source.path, start=1) if name.endswith("[]")]
    return tuple(Source(source.path[:end], (), rows) for end in ends)


def _mappings(value: object) -> dict[str, dict[str, str]]:
    """Return field -> value -> text; the label's own are those of the target."""
    found = {name: _texts(table, f"values.{name}") for name, table in _table(value, "values").items()}
    return {TARGET_FIELD if name == "label" else name: table for name, table in found.items()}


def _idx(value: object) -> dict[str, Source]:
    if isinstance(value, str):
        return {"": Source.parse(value)}
    return {name: Source.parse(place) for name, place in _texts(value, "idx").items()}


def _known(table: Mapping[str, object], keys: Sequence[str], *, what: str) -> None:
    for key in table:
        if key not in keys:
            raise TaskError(f"unknown {what} '{key}'.{closest(key, keys)} Known: {', '.join(keys)}")


def _table(value: object, key: str) -> dict[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise TaskError(f"'{key}' must be a table, [{key}] with a line for each of its names")
    return value


def _texts(value: object, key: str) -> dict[str, str]:
    table = _table(value, key)
    for name, text in table.items():
        if not isinstance(text, str):
            raise TaskError(f"'{key}.{name}' must be a text in quotation marks")
    return cast("dict[str, str]", table)


def _listed(value: object, key: str) -> list[str]:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
        raise TaskError(f'\'{key}\' must be a list of texts, ["...", "..."]')
    return listed


def _text(values: Mapping[str, object], key: str, default: str | None = None) -> str:
    value = values.get(key, default)
    if not isinstance(value, str) or (default is None and not value.strip()):
        raise TaskError(f"'{key}' must be a text in quotation marks")
    return value
