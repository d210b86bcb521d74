"""The keys of a task file: each function checks some of them and returns what they describe.

Their errors do not name the file; :meth:`ptuning.data.task_files.TaskFile.parse` adds its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ptuning.data.questions import ChoiceSource, Reader
from ptuning.data.reading import SUFFIXES
from ptuning.data.row_paths import RowPath
from ptuning.errors import TaskError, closest
from ptuning.files import Unchecked
from ptuning.metrics import METRICS, TASK_METRICS
from ptuning.names import is_folder_name
from ptuning.records import TARGET_FIELD
from ptuning.template.labels import LabelWords
from ptuning.template.language import Template

KEYS = (
    "name", "version", "source", "about", "rows", "fields", "values", "label", "labels", "choices", "group", "idx",
    "metrics", "calibrate", "normalise", "files", "patterns",
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


def check_keys(task: Unchecked) -> None:
    """Check that every key is known and none is missing.

    Raises:
        TaskError: If not.
    """
    known = task.table(known=KEYS)
    missing = [key for key in REQUIRED_KEYS if key not in known]
    if missing:
        raise TaskError(f"the key '{missing[0]}' is missing; a task needs {', '.join(REQUIRED_KEYS)}")


def read_name(task: Unchecked) -> str:
    """Return the task's name, which becomes the name of a folder.

    Raises:
        TaskError: If it cannot be one.
    """
    name = task.at("name").text(blank=False)
    if not is_folder_name(name, spaces=True):
        raise TaskError(
            f"'{name}' cannot be the name of a task, since it becomes a folder; use letters, digits and - _ . + ="
        )
    return name


def read_patterns(task: Unchecked) -> tuple[tuple[Template, ...], tuple[Template, ...]]:
    """Return the manual templates, and the learned ones with slots.

    Raises:
        TaskError: If there are none, or a template has slots where it should have none, or the other way round.
        TemplateError: If a template is malformed.
    """
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
        learned.append(given or Template.from_manual(str(manual[-1])))
        if not learned[-1].has_slots:
            raise TaskError(f"pattern {number}: the learned template has no slots; write words as [P:words]")
    return tuple(manual), tuple(learned)


def read_label_words(task: Unchecked) -> LabelWords | None:
    """Return the label words (the verbalizer); None if there is no table ``[labels]``.

    Raises:
        TaskError: If it holds something other than words.
        LabelWordError: If a label has no words of its own.
    """
    return task.optional("labels", lambda one: LabelWords({name: _texts(words) for name, words in one.table().items()}))


def read_reader(task: Unchecked, words: LabelWords | None, used: Iterable[str]) -> Reader:
    """Return the reader of the task's rows.

    Args:
        task: The task file.
        words: Its label words.
        used: The fields that its patterns use.

    Raises:
        TaskError: If the keys do not go together, or a field is not used or is the answer.
    """
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


def read_metrics(task: Unchecked, words: LabelWords | None) -> tuple[str, ...]:
    """Return the names of the task's metrics.

    Raises:
        TaskError: If there are none, or one is unknown or does not fit the labels.
    """
    names = _texts(task.at("metrics", ["accuracy"]))
    if not names:
        raise TaskError(f"'metrics' is empty; name one or more of {', '.join(TASK_METRICS)}, or leave the key out")
    for name in names:
        if name not in TASK_METRICS:
            raise TaskError(f"unknown metric '{name}'.{closest(name, TASK_METRICS)} Known: {', '.join(TASK_METRICS)}")
        needed = METRICS[name].needs_label
        if needed is not None and (words is None or needed not in words.labels):
            raise TaskError(f"the metric '{name}' needs the label '{needed}', which this task does not have")
    return names


def read_files(task: Unchecked) -> dict[str, tuple[str, ...]]:
    """Return part -> names of its files without their endings.

    Raises:
        TaskError: If a part is unknown, or a name has an ending.
    """
    files = {part: _texts(names) for part, names in task.at("files", {}).table(known=tuple(SPLIT_FILES)).items()}
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
    """Return the paths of all lists on the way to the innermost one."""
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


def _texts(found: Unchecked) -> tuple[str, ...]:
    """Return a list of texts; one text alone is a list of one."""
    return (found.value,) if isinstance(found.value, str) else tuple(found.texts())
