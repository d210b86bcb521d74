"""Reading what the options of a command name: data, tasks, templates, prompts, candidates and the backbone."""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptuning.backbone import sources
from ptuning.cli import terminal
from ptuning.cli.chat import ANY_CHAT, check_system, conversations_of
from ptuning.cli.options import AskedBackbone, TrainInputs, fields_of
from ptuning.cli.templates import notice_line_breaks, pattern_of, template_of, template_pair
from ptuning.errors import BackboneError, ConfigError, FileError, RecordError, closest
from ptuning.template.kinds import kind_of_prompt
from ptuning.template.language import CONVERSATION_FIELD

if TYPE_CHECKING:
    from ptuning.backbone.backbone import Backbone
    from ptuning.backbone.tokenizer import TextTokenizer
    from ptuning.data.checks import Labelled, Report
    from ptuning.data.questions import Questions
    from ptuning.data.reading import RawRows
    from ptuning.data.task_files import TaskFile
    from ptuning.prompt.asked import ToAnswer
    from ptuning.prompt.prompt import Prompt
    from ptuning.records import Records
    from ptuning.template.language import Template
    from ptuning.template.segments import Kind
    from ptuning.training.spec import TrainSpec

# Heavy modules (torch, transformers) are imported inside the functions: --help must not wait for them.


STANDARD_INPUT, COMMAND_LINE = "standard input", "the command line"
Once = Callable[[tuple[str, str], Callable[[], Any]], Any]
TARGET_TAKEN = "target: the column '{}' (--field y=NAME for another)"


def at_once(_: tuple[str, str], read: Callable[[], Any]) -> Any:
    """Read something, whether it was read before or not."""
    return read()


def records_of(source: str, field: Sequence[str] | None, *, prompt: Prompt | None = None) -> Records:
    """Read a data file or shipped facts; with the names of fields that a prompt remembers, but for those asked for."""
    from ptuning.data.reading import load_records
    from ptuning.prompt.asked import remembered
    from ptuning.records import TARGET_FIELD

    with terminal.waiting(f"reading {source}"):
        target = prompt.fields.get(TARGET_FIELD) if prompt is not None else None
        return remembered(load_records(source, fields=fields_of(field), target=target), prompt)


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
    chat: bool = False,
) -> Records | Questions:
    """Read data: a file or shipped facts; with a task a file, ``part`` of a folder, or a part given as ``DIR:PART``.
    Without a task, fields are read as the ``prompt`` remembers them; for a ``chat`` records are conversations.
    """
    if chat or (prompt is not None and prompt.template.has_conversation):
        return conversations_of(source, field, prompt=prompt)
    if task is None:
        return records_of(source, field, prompt=prompt)
    path = _place_of(source, field, task, part=part)
    with terminal.waiting(f"reading {path}"):
        return task.read(path, labelled=labelled)


def _place_of(source: str, field: Sequence[str] | None, task: TaskFile, *, part: str) -> Path:
    """Return the file of a task's data, which may be given as a folder, or as a part of one."""
    if field:
        raise ConfigError("--field goes without a task; the task file says where the fields of a row are")
    from ptuning.data.task_files import find_split

    path, (folder, colon, named) = Path(source), source.rpartition(":")
    if os.path.isdir(path):
        return find_split(path, task, part)
    if colon and not os.path.exists(path) and os.path.isdir(folder):
        return find_split(Path(folder), task, named)
    if not os.path.exists(path):
        there = [entry.name for entry in path.parent.iterdir()] if os.path.isdir(path.parent) else []
        raise FileError(
            f"no such data: {source}.{closest(path.name, there)} With the task {task.name}, data is a file, a folder "
            "such as DIR, or a part of one such as DIR:val"
        )
    return path


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
    once: Once = at_once,
) -> TrainSpec:
    """Read the task, the template and the data of one training, and look at the rows and labels. ``option`` precedes
    names in messages; ``once`` gets a source, its part and what reads it, and may return what was read before.
    """
    from ptuning.training.spec import TrainSpec

    given = asked.inputs
    check_system(given, option=option)
    task = task_of(given.get("task"))
    named = [given.get(name) for name in ("template", "manual", "about", "pattern")]
    named[0] = ANY_CHAT if given.get("chat") else named[0]
    template = template_of(task, *named, option=option)
    method = given.get("method")
    if method is not None:
        template = kind_of_prompt(method).template(_manual_of(given, task, option=option))
    sources = {"train": given["data"], "dev": given.get("dev")}
    parts = read_parts(sources, given.get("field"), task, reads=template.fields, once=once)
    spec = TrainSpec(
        template,
        parts["train"],
        dev=parts.get("dev"),
        config=asked.config,
        labels=given.get("labels"),
        merge=given.get("merge"),
        strict=bool(given.get("strict")),
        task=task,
        calibrate=given.get("calibrate"),
        method=method,
    ).check()
    if spec.checked is not None:
        show_report(spec.checked, once=once)
    return spec


def _manual_of(given: Mapping[str, Any], task: TaskFile | None, *, option: str) -> Template:
    """Return the manual template that a kind of prompt is made from; a ConfigError without one."""
    if given.get("template") is not None or given.get("chat") or (given.get("manual") is None and task is None):
        raise ConfigError(
            f"{option}method makes its template from a manual one; give {option}manual (or {option}task), and neither "
            f"{option}template nor {option}chat"
        )
    return template_pair(task, given.get("manual"), None, given.get("pattern"))[0]


def read_parts(
    sources: Mapping[str, str | None],
    field: Sequence[str] | None,
    task: TaskFile | None,
    *,
    reads: Sequence[str],
    once: Once = at_once,
) -> dict[str, Records | Questions]:
    """Read the parts train, dev and test that are named. With a task, a folder may bring the part dev; without, the one
    column that the template does not read (``reads``) is the target. A RecordError if a record lacks what it reads.
    """
    from ptuning.data.questions import as_questions
    from ptuning.records import require_fields

    found: dict[str, Records | Questions] = {}
    chat = CONVERSATION_FIELD in reads
    for part, source in sources.items():
        if source is not None:
            read = functools.partial(data_of, source, field, task, part="val" if part == "test" else part, chat=chat)
            found[part] = once((source, part), read)
        elif part == "dev" and task is not None:
            folder = str(sources["train"])
            beside = once((folder, "beside"), functools.partial(dev_part, folder, task))
            found |= {part: beside} if beside is not None else {}
    if task is not None:
        return found
    target = target_column(found["train"], reads)
    if target is not None:
        once((target, "told"), functools.partial(terminal.say, TARGET_TAKEN.format(target)))
        found = {part: with_target(rows, target) for part, rows in found.items()}
    for rows in found.values():
        require_fields(as_questions(rows).records, reads)
    return found


def target_column(rows: Records | Questions, reads: Sequence[str]) -> str | None:
    """Return the one column that a template does not read, if no row has a target; else None."""
    from ptuning.records import TARGET_FIELD, Records

    if not isinstance(rows, Records) or any(TARGET_FIELD in row for row in rows):
        return None
    columns = [name for name in dict.fromkeys(itertools.chain.from_iterable(rows)) if name not in reads]
    return columns[0] if len(columns) == 1 else None


def with_target(rows: Records | Questions, column: str) -> Records | Questions:
    """Return records whose target is in a column."""
    from ptuning.data.reading import with_fields
    from ptuning.records import TARGET_FIELD, Records

    return with_fields(rows, {TARGET_FIELD: column}) if isinstance(rows, Records) else rows


def show_report(found: Report, *, once: Once = at_once) -> None:
    """Print what was found in data: facts, and what may be a mistake as warnings."""
    for line in (*found.facts, *(f"warning: {warning}" for warning in found.warnings)):
        once((line, "told"), functools.partial(terminal.say, line))


def looked_at(
    parts: Mapping[str, Records | Questions],
    labels: str | None,
    merge: Sequence[str] | None,
    task: TaskFile | None,
    *,
    reads: Sequence[str],
    strict: bool,
) -> Labelled:
    """Look at the rows of a comparison and their labels, by default the task's, and say what was found."""
    from ptuning.data.checks import label_rows
    from ptuning.data.questions import as_questions

    known = task.label_words if task is not None else None
    rows = {part: as_questions(one) for part, one in parts.items()}
    found = label_rows(rows, labels, fields=reads, known=known, merge=merge, strict=strict)
    show_report(found.report)
    return found


def labelled(
    prompt: Prompt, rows: Records | Questions, labels: str | None, merge: Sequence[str] | None
) -> tuple[Prompt, Questions]:
    """Return a prompt with the labels that are asked for, or those that it has, and rows to score it on; say what was
    found in them. With ``auto``, rows with labels that look mistyped are left out.
    """
    from ptuning.data.checks import Report, label_rows
    from ptuning.data.questions import as_questions

    is_open, fields = labels is None and not prompt.answer_space.is_closed, prompt.template.fields
    if prompt.task is None:
        target = target_column(rows, fields)
        if target is not None:
            terminal.say(TARGET_TAKEN.format(target))
            rows = with_target(rows, target)
    parts = {"data": as_questions(rows)}
    found = label_rows(parts, labels, fields=fields, known=prompt.label_words, merge=[*prompt.merge, *(merge or ())])
    facts = found.report.facts if labels is not None or (is_open and prompt.backbone is None) else ()
    show_report(Report(facts, found.report.warnings))
    return replace(prompt, label_words=found.words), found.parts["data"]


def with_labels(prompt: Prompt, labels: str | None) -> Prompt:
    """Return a prompt that answers with the labels that are asked for: for a manual one there is no other way to have
    any, and a learned one remembers its own, which is said.
    """
    from ptuning.data.checks import AUTO
    from ptuning.template.labels import LabelWords

    if labels is None:
        return prompt
    own = prompt.label_words
    if labels == AUTO and own is None:
        raise ConfigError(
            "--labels auto finds the labels in targets, and what is to be answered has none; name them, as in "
            '--labels "billing;technical"'
        )
    words = own if labels == AUTO else LabelWords.of(labels)
    if own is not None and words == own:
        terminal.say(f"--labels is not needed: the prompt remembers its labels, {', '.join(own.labels)}")
    elif own is not None:
        terminal.say(f"note: --labels takes the place of the labels that the prompt learned, {', '.join(own.labels)}")
    return replace(prompt, label_words=words)


def prompt_of(source: str, task: TaskFile | None = None, *, without: str | None = None) -> Prompt:
    """Load a prompt, less its part ``without``, or make a manual one of ``manual:TEMPLATE`` or, with a task,
    ``manual:N``. The given task comes before the prompt's own.
    """
    with terminal.waiting("starting"):
        from ptuning.data.questions import place
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


def data_to_write(prompt: Prompt, data: str, field: Sequence[str] | None, *, gather: bool = False) -> Questions:
    """Read records to write texts for, with their targets, if they have any. A RecordError if there are none."""
    from ptuning.data.questions import as_questions

    if prompt.task is not None:
        found = as_questions(data_of(data, field, prompt.task, part="test", prompt=prompt))
    else:
        found = data_to_answer(prompt, None, data, field).questions
        is_chat = prompt.template.has_conversation  # the answer that a conversation ends with is its target
        target = None if is_chat else target_column(found.records, prompt.template.fields)
        if target is not None:
            terminal.say(TARGET_TAKEN.format(target))
            found = as_questions(with_target(found.records, target))
    return gathered_rows(found, prompt.task, asked=gather)


def gathered_rows(rows: Questions, task: TaskFile | None, *, asked: bool) -> Questions:
    """Return rows as texts are scored on them. If that is ``asked`` for, or the task says so, those that differ in
    their target alone are one, and it is said how many there are.
    """
    from ptuning.data.questions import with_references

    if not (asked or (task is not None and task.gather)):
        return rows
    if rows.has_choices:
        raise ConfigError("--gather is for texts that are written, and these rows have choices")
    found = with_references(rows)
    terminal.say(f"{len(rows)} records have {len(found)} different inputs; each is one, with all of its references")
    return found


def data_to_answer(prompt: Prompt, text: str | None, data: str | None, field: Sequence[str] | None) -> ToAnswer:
    """Read what to answer: a text, data, or the standard input; by the prompt's task where it has one."""
    from ptuning.prompt.asked import ToAnswer, typed_fields

    if (text is None) == (data is None):
        raise ConfigError(
            "give either a TEXT or --data (a file, or - for lines of text, CSV or JSONL on the standard input)"
        )
    fields = typed_fields(prompt) if text not in (None, "-") else ()
    if len(fields) > 1 or (text not in (None, "-") and not fields):
        raise ConfigError(f"a TEXT fills one field, and the template reads {', '.join(fields) or 'none'}; use --data")
    if text is not None and text != "-":
        if not text.strip():
            raise ConfigError("the TEXT is empty, so there is nothing to answer; - reads texts from the standard input")
        return ToAnswer.typed(prompt, {fields[0]: text}, where=COMMAND_LINE)
    rows = _rows_to_answer(prompt, "-" if data is None else data, field)
    found = ToAnswer.of(prompt, rows, fields=fields_of(field))
    if not found.questions:
        what = "records: lines of text, CSV or JSONL" if rows.name == STANDARD_INPUT else "records to answer"
        raise RecordError(f"{'the ' * (rows.name == STANDARD_INPUT)}{rows.name} holds no {what}")
    return found


def _rows_to_answer(prompt: Prompt, data: str, field: Sequence[str] | None) -> RawRows:
    from ptuning.data.reading import load_rows, raw_rows
    from ptuning.records import ALIASES

    task = prompt.task
    if task is not None:
        asked: dict[str, Sequence[str]] = {name: (name,) for name in task.columns}
    else:
        given = {**prompt.fields, **fields_of(field)}
        asked = {name: (given.get(name, name), name, *ALIASES.get(name, ())) for name in prompt.template.fields}
    if data == "-":
        typed = sys.stdin.buffer.read() if sys.stdin is not None else b""  # None if it is closed
        return raw_rows(typed, name=STANDARD_INPUT, asked=asked)
    place = data if task is None else _place_of(data, field, task, part="test")
    with terminal.waiting(f"reading {place}"):
        return load_rows(place, asked=asked)


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


def load(asked: AskedBackbone, *, prompt: Prompt | None = None, spread: bool = False) -> Backbone:
    """Load the backbone that is asked for, the prompt's own at the revision that it was trained on, or the default.
    Only a command whose processes all do the same may ``spread`` it over them.
    """
    if asked.options.shard in ("tp", "layers") and not spread:
        raise ConfigError(
            f"--shard {asked.options.shard} is for train and fleet, in which all processes run the same passes; use "
            "--shard map here (one process), or --quantize"
        )
    own = prompt.backbone if prompt is not None else None
    name, options = asked.name, asked.options
    if name is None and own is not None:
        name, options = own.name, replace(options, revision=options.revision or own.revision)
    name = sources.BACKBONE if name is None else name
    with terminal.loading(name):
        from ptuning.backbone.loading import load_backbone

        try:
            found = load_backbone(name, **vars(options))
        except sources.NoBackboneError as error:
            if asked.name is not None or own is None:
                raise
            raise BackboneError(
                f"{error} (the prompt was learned on this backbone; if it lies elsewhere now, say where: --backbone)"
            ) from error
    if prompt is not None and own is None:
        notice_line_breaks(str(prompt.template), found.tokenizer)
    return found


def load_tokenizer(asked: AskedBackbone) -> tuple[TextTokenizer, Kind]:
    """Load the tokenizer of the backbone that is asked for, or of the default, and its kind."""
    name = sources.BACKBONE if asked.name is None else asked.name
    with terminal.loading(name):
        from ptuning.backbone import loading

        return loading.load_tokenizer(name, asked.options)
