"""Reading what the options of a command name: data, tasks, templates, prompts, candidates and the backbone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptuning.backbone import sources
from ptuning.cli import terminal
from ptuning.cli.options import AskedBackbone, TrainInputs, fields_of
from ptuning.errors import ConfigError, FileError, RecordError, closest

if TYPE_CHECKING:
    from ptuning.backbone.backbone import Backbone
    from ptuning.backbone.tokenizer import TextTokenizer
    from ptuning.data.questions import Questions
    from ptuning.data.task_files import TaskFile
    from ptuning.prompt.prompt import Prompt
    from ptuning.records import Records
    from ptuning.template.language import Template
    from ptuning.template.segments import Kind
    from ptuning.training.spec import TrainSpec

# Heavy modules (torch, transformers) are imported inside the functions: --help must not wait for them.


def records_of(source: str, field: Sequence[str] | None, *, prompt: Prompt | None = None) -> Records:
    """Read a data file or shipped facts; with the names of fields that a prompt remembers, but for those asked for."""
    from ptuning.data.reading import load_records

    with terminal.waiting(f"reading {source}"):
        return remembered(load_records(source, fields=fields_of(field)), prompt)


def remembered(records: Records, prompt: Prompt | None) -> Records:
    """Return records with the names of fields that a prompt remembers, but for those that were read by other names."""
    from ptuning.data.reading import with_fields

    own = prompt.fields if prompt is not None else {}
    return with_fields(records, {new: old for new, old in own.items() if new not in records.fields})


def task_of(name: str | None) -> TaskFile | None:
    """Load a task, if one is named."""
    if name is None:
        return None
    from ptuning.data.task_files import load_task

    return load_task(name)


def data_of(
    source: str,
    field: Sequence[str] | None,
    task: TaskFile | None,
    *,
    part: str,
    labelled: bool = True,
    prompt: Prompt | None = None,
) -> Records | Questions:
    """Read data: a file or shipped facts; with a task a file, ``part`` of a folder, or a part given as ``DIR:PART``.
    Without a task, fields are read as the ``prompt`` remembers them.
    """
    if task is None:
        return records_of(source, field, prompt=prompt)
    if field:
        raise ConfigError("--field goes without a task; the task file says where the fields of a row are")
    from ptuning.data.task_files import find_split

    path, (folder, colon, named) = Path(source), source.rpartition(":")
    if os.path.isdir(path):
        path = find_split(path, task, part)
    elif colon and not os.path.exists(path) and os.path.isdir(folder):
        path = find_split(Path(folder), task, named)
    elif not os.path.exists(path):
        there = [entry.name for entry in path.parent.iterdir()] if os.path.isdir(path.parent) else []
        raise FileError(
            f"no such data: {source}.{closest(path.name, there)} With the task {task.name}, data is a file, a folder "
            "such as DIR, or a part of one such as DIR:val"
        )
    with terminal.waiting(f"reading {path}"):
        return task.read(path, labelled=labelled)


def dev_part(data: str, task: TaskFile | None) -> Questions | None:
    """Read the development part of a task's data, if ``data`` is a folder that has one."""
    from ptuning.data.task_files import find_split

    if task is None or not os.path.isdir(data):
        return None
    try:
        path = find_split(Path(data), task, "dev")
    except FileError:
        terminal.say(f"{data} has no development part; a share of the training part is set aside")
        return None
    return task.read(path)


def training_spec(
    asked: TrainInputs,
    *,
    option: str = "--",
    once: Callable[[tuple[str, str], Callable[[], Any]], Any] = lambda _, read: read(),
) -> TrainSpec:
    """Read the task, the template and the data of one training. ``option`` precedes names in messages; ``once`` gets a
    source, its part and what reads it, and may return what was read before.
    """
    from ptuning.training.spec import TrainSpec

    given = asked.inputs
    data, dev, field = given["data"], given.get("dev"), given.get("field")
    task = task_of(given.get("task"))
    named = [given.get(name) for name in ("template", "manual", "about", "pattern")]
    template = template_of(task, *named, option=option)
    train_rows = once((data, "train"), lambda: data_of(data, field, task, part="train"))
    if dev is None:
        dev_rows = once((data, "beside"), lambda: dev_part(data, task))
    else:
        dev_rows = once((dev, "dev"), lambda: data_of(dev, field, task, part="dev"))
    return TrainSpec(
        template,
        train_rows,
        dev=dev_rows,
        config=asked.config,
        labels=given.get("labels"),
        task=task,
        calibrate=given.get("calibrate"),
    )


def prompt_of(source: str, task: TaskFile | None = None, *, without: str | None = None) -> Prompt:
    """Load a prompt, less its part ``without``, or make a manual one of ``manual:TEMPLATE`` or, with a task,
    ``manual:N``. The given task comes before the prompt's own.
    """
    with terminal.waiting("starting"):
        from ptuning.data.row_paths import place
        from ptuning.prompt.prompt import Prompt

    is_manual = source.startswith("manual:")
    if is_manual:
        template = source.removeprefix("manual:").lstrip()
        number = place(template.strip() or "1")
        given = template if task is None or number is None else pattern_of(task.manual, task, number)
        found = Prompt.manual(given, task=task)
    else:
        found = Prompt.from_pretrained(source)
    found = found if without is None else found.without(without)
    if task is None or is_manual:
        return found
    if found.task is not None and found.task.name != task.name:
        raise ConfigError(f"the prompt was made for the task {found.task.name}, not for {task.name}; leave --task out")
    return replace(found, task=task, label_words=found.label_words or task.label_words)


def pattern_of(templates: Sequence[Template], task: TaskFile, number: int) -> Template:
    """Return a task's template by its number, from 1."""
    if not 1 <= number <= len(templates):
        raise ConfigError(f"the task {task.name} has the patterns 1 to {len(templates)}, not {number}")
    return templates[number - 1]


def template_of(
    task: TaskFile | None,
    template: str | None,
    manual: str | None,
    about: str | None,
    pattern: int | None,
    *,
    option: str = "--",
) -> Template:
    """Return the template to learn: as given, from a manual one, or a task's; a ConfigError if these clash."""
    from ptuning.template.language import Template

    if (template is not None) + (manual is not None) != 1 and (task is None or template is not None):
        raise ConfigError(
            f"give either {option}template, or {option}manual to have one made from a manual template, or {option}task"
        )
    if about is not None and manual is None:
        raise ConfigError(f"{option}about goes with {option}manual")
    if pattern is not None and (task is None or template is not None or manual is not None):
        raise ConfigError(f"{option}pattern is the number of a task's template; it goes with {option}task alone")
    if template is not None:
        return Template.parse(template)
    if manual is not None:
        return Template.from_manual(manual, about=about)
    assert task is not None
    return pattern_of(task.learned, task, 1 if pattern is None else pattern)


def data_to_answer(
    prompt: Prompt, text: str | None, data: str | None, field: Sequence[str] | None
) -> Records | Questions:
    """Read what to answer: a text, data, or the standard input; by the prompt's task where it has one."""
    from ptuning.data.reading import raw_rows, read_rows
    from ptuning.records import Records

    if (text is None) == (data is None):
        raise ConfigError("give either a TEXT or --data (a file, or - for JSONL on the standard input)")
    if data == "-":
        given = sys.stdin.buffer.read() if sys.stdin is not None else b""  # None if it is closed
        if not given.strip():
            raise RecordError("the standard input holds no records; it needs one JSON object per line")
        if prompt.task is not None:
            return prompt.task.read_named(raw_rows(given, name="standard input"), name="standard input", labelled=False)
        return remembered(read_rows(given, name="standard input", fields=fields_of(field)), prompt)
    if data is not None:
        return data_of(data, field, prompt.task, part="test", labelled=False, prompt=prompt)
    if prompt.task is not None:
        return Records([prompt.task.record_of(text or "")], name="the command line")
    fields = prompt.template.fields
    if len(fields) != 1:
        raise ConfigError(f"a TEXT fills one field, and the template reads {', '.join(fields) or 'none'}; use --data")
    return Records([{fields[0]: text or ""}], name="the command line")


def read_candidates(source: str, prompt: str, data: str | None, field: Sequence[str] | None) -> list[str]:
    """Read candidates: a word list, or ``train`` for the targets of the training part."""
    from ptuning.data.word_lists import read_words

    fields = fields_of(field)
    if source == "train" and not os.path.exists(source):
        source, remembered = _training_part(prompt, data)
        fields = {**remembered, **fields}
    return list(read_words(source, fields=fields))


def _training_part(prompt: str, data: str | None) -> tuple[str, dict[str, str]]:
    """Return the name of the data that a prompt was trained on and its renamed fields, or the training part of shipped
    facts.
    """
    from ptuning.files import Unchecked, read_json

    folders = () if prompt.startswith("manual:") else (Path(prompt), Path(prompt).parent)
    record = next((folder / "run.json" for folder in folders if os.path.isfile(folder / "run.json")), None)
    if record is not None:
        run = Unchecked(read_json(record), f"{record} is not the record of a training", advice="name a file instead")
        name = run.at("data", {}).at("train", {}).at("name").text().split(" (without the ")[0]
        return name, {new: old.text() for new, old in run.at("fields", {}).table().items()}
    if data is not None and ":" in data and not os.path.exists(data):
        return data.partition(":")[0] + ":train", {}
    raise ConfigError("--candidates train needs the prompt's run.json, or shipped facts as --data; name a file instead")


def development_records(prompt: str) -> Records | None:
    """Return the development records of a prompt's run folder, if it is in one: those that its answers are kept of."""
    from ptuning.files import read_json_lines
    from ptuning.names import PREDICTIONS_FILE, PROMPT_FOLDER
    from ptuning.records import as_records

    folder = Path(prompt)
    found = (folder.parent if folder.name == PROMPT_FOLDER else folder) / PREDICTIONS_FILE
    if not os.path.isfile(found):
        return None
    kept = [row["record"] for row in read_json_lines(found) if isinstance(row.get("record"), dict)]
    rows = as_records([row for row in kept if isinstance(row, dict)])
    rows.name = str(found)
    return rows if rows else None


def load(asked: AskedBackbone, *, prompt: Prompt | None = None) -> Backbone:
    """Load the backbone that is asked for, the prompt's own at the revision that it was trained on, or the default."""
    own = prompt.backbone if prompt is not None else None
    name, options = asked.name, asked.options
    if name is None and own is not None:
        name, options = own.name, replace(options, revision=options.revision or own.revision)
    name = sources.BACKBONE if name is None else name
    with terminal.loading(name):
        from ptuning.backbone.loading import load_backbone

        return load_backbone(name, **vars(options))


def load_tokenizer(asked: AskedBackbone) -> tuple[TextTokenizer, Kind]:
    """Load the tokenizer of the backbone that is asked for, or of the default, and its kind."""
    name = sources.BACKBONE if asked.name is None else asked.name
    with terminal.loading(name):
        from ptuning.backbone import loading

        return loading.load_tokenizer(name, asked.options)
