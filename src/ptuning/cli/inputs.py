"""Reading what the options of a command name: data, tasks, templates, prompts, candidates and the backbone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ptuning.backbone import sources
from ptuning.cli import terminal
from ptuning.cli.options import BackboneChoice, fields_of
from ptuning.errors import BackboneError, ConfigError, RecordError, TemplateError
from ptuning.files import FileModel, read_json, read_json_lines, read_text, validate
from ptuning.names import PREDICTIONS_FILE, PROMPT_FOLDER, RUN_FILE
from ptuning.records import ALIASES, as_records

if TYPE_CHECKING:
    from ptuning.backbone.backbone import Backbone
    from ptuning.backbone.tokenizer import TextTokenizer
    from ptuning.data.checks import Report
    from ptuning.data.questions import Questions
    from ptuning.data.reading import RawRows
    from ptuning.data.task_files import TaskFile
    from ptuning.prompt.inputs import InferenceInputs
    from ptuning.prompt.prompt import Prompt
    from ptuning.records import Records
    from ptuning.template.segments import Kind, Tokenizer

# Heavy modules (torch, transformers) are imported inside the functions: --help must not wait for them.

STANDARD_INPUT, COMMAND_LINE = "the standard input", "the command line"


def task_of(name: str | None) -> TaskFile | None:
    """Load a task, if one is named."""
    from ptuning.data.task_files import load_task

    return None if name is None else load_task(name)


def prompt_of(source: str, task: TaskFile | None = None, *, ablate: str | None = None) -> Prompt:
    """Load a prompt, less its part ``ablate``, or make a manual one of ``manual:TEMPLATE`` or, with a task,
    ``manual:N``. The given task comes before the prompt's own.
    """
    with terminal.waiting("starting"):
        from ptuning.data.questions import place
        from ptuning.prompt.prompt import Prompt
        from ptuning.training.spec import pattern_of

    if source.startswith("manual:"):
        text = source.removeprefix("manual:").lstrip()
        number = place(text.strip() or "1")
        template = text if task is None or number is None else pattern_of(task.manual, task, number)
        prompt = Prompt.manual(template, task=task)
        return prompt if ablate is None else prompt.without(ablate)
    prompt = Prompt.from_pretrained(source)
    prompt = prompt if ablate is None else prompt.without(ablate)
    if task is None:
        return prompt
    if prompt.task is not None and prompt.task.name != task.name:
        raise ConfigError(f"the prompt was made for the task {prompt.task.name}, not for {task.name}; leave --task out")
    return replace(prompt, task=task, label_words=prompt.label_words or task.label_words)


def check_force(prompt: Prompt, *, force: bool) -> None:
    """Raise a ConfigError if a prompt that fits any backbone is forced on one."""
    if force and prompt.backbone is None:
        raise ConfigError("--force is for prompts learned on another backbone; this one fits any, so leave it out")


def data_of(
    source: str, field: Sequence[str] | None, task: TaskFile | None, *, part: str, prompt: Prompt
) -> Records | Questions:
    """Read data for a prompt: a file or shipped facts; with a task a file, ``part`` of a folder, or ``DIR:PART``."""
    from ptuning.data.sources import DataReader

    reader = DataReader(task, fields_of(field), remembered=prompt.fields, chat=prompt.template.has_conversation)
    with terminal.waiting(f"reading {source}"):
        rows = reader.read(source, part=part)
    say_notes(reader.notes)
    return rows


def say_notes(notes: Iterable[str]) -> None:
    """Print notes, each once."""
    for note in dict.fromkeys(notes):
        terminal.say(note)


def show_findings(findings: Report) -> None:
    """Print the findings in data: facts, and possible mistakes as warnings."""
    say_notes([*findings.facts, *(f"warning: {doubt}" for doubt in findings.warnings)])


def labelled(
    prompt: Prompt, rows: Records | Questions, labels: str | None, alias_label: Sequence[str] | None
) -> tuple[Prompt, Questions]:
    """Return a prompt with the labels that are named, or those that it has, and rows to score it on; print what was
    found in them. With ``auto``, rows with labels that look mistyped are left out.
    """
    from ptuning.data.checks import Report, label_rows
    from ptuning.data.sources import DataReader, target_column

    is_open = labels is None and not prompt.answer_space.is_closed
    if alias_label and is_open:
        raise ConfigError("--alias-label is for labels, and the prompt has none; name them with --labels")
    fields, reader = prompt.template.fields, DataReader()
    if prompt.task is None:
        rows = reader.with_target(rows, target_column(rows, fields))
    from ptuning.data.questions import as_questions

    merge = [*prompt.merge, *(alias_label or ())]
    found = label_rows({"data": as_questions(rows)}, labels, fields=fields, known=prompt.label_words, merge=merge)
    facts = found.report.facts if labels is not None or (is_open and prompt.backbone is None) else []
    say_notes(reader.notes)
    show_findings(Report(facts, found.report.warnings))
    return replace(prompt, label_words=found.words), found.parts["data"]


def with_labels(prompt: Prompt, labels: str | None) -> Prompt:
    """Return a prompt that answers with other labels, if they are named."""
    from ptuning.data.checks import AUTO
    from ptuning.template.labels import LabelWords

    own = prompt.label_words
    if labels == AUTO and own is None:
        raise ConfigError(
            "--labels auto finds the labels in targets, and data to answer has none; name them, as in "
            '--labels "billing;technical"'
        )
    if labels is None or labels == AUTO:
        return prompt
    if own is not None and own != LabelWords.of(labels):
        terminal.say(f"note: --labels replaces the labels that the prompt learned, {', '.join(own.labels)}")
    return replace(prompt, label_words=LabelWords.of(labels))


def group_references(rows: Questions, task: TaskFile | None, *, group: bool) -> Questions:
    """Return rows as texts are scored on them: those that differ in their target alone are one if they are to be
    grouped, or the task says so.
    """
    from ptuning.data.questions import with_references

    if not (group or (task is not None and task.gather)):
        return rows
    if rows.has_choices:
        raise ConfigError("--group-references is for generated texts, and these rows have choices")
    grouped = with_references(rows)
    terminal.say(f"{len(rows)} records have {len(grouped)} different inputs; each is one, with all of its references")
    return grouped


def data_to_answer(prompt: Prompt, text: str | None, data: str | None, field: Sequence[str] | None) -> InferenceInputs:
    """Read what to answer: a text, data, or the standard input; by the prompt's task where it has one."""
    from ptuning.prompt.inputs import InferenceInputs, typed_fields

    if (text is None) == (data is None):
        raise ConfigError(
            "give either a TEXT or --data (a file, or - for lines of text, CSV or JSONL on the standard input)"
        )
    if text is None or text == "-":
        rows = _rows_to_answer(prompt, "-" if data is None else data, field)
        inputs = InferenceInputs.of(prompt, rows, fields=fields_of(field))
        if not inputs.questions:
            raise RecordError(f"{rows.name} holds no records to answer")
        return inputs
    if field:
        raise ConfigError("--field renames columns of --data, and a TEXT has none; leave it out")
    fields = typed_fields(prompt)
    if len(fields) != 1:
        raise ConfigError(f"a TEXT fills one field, and the template reads {', '.join(fields) or 'none'}; use --data")
    if not text.strip():
        raise ConfigError("the TEXT is empty, so there is nothing to answer; - reads texts from the standard input")
    return InferenceInputs.typed(prompt, {fields[0]: text}, where=COMMAND_LINE)


def _rows_to_answer(prompt: Prompt, data: str, field: Sequence[str] | None) -> RawRows:
    from ptuning.data.reading import load_rows, raw_rows
    from ptuning.data.sources import DataReader

    task = prompt.task
    if task is not None:
        names: dict[str, Sequence[str]] = {name: (name,) for name in task.columns}
    else:
        given = {**prompt.fields, **fields_of(field)}
        names = {name: (given.get(name, name), name, *ALIASES.get(name, ())) for name in prompt.template.fields}
    if data == "-":
        typed = sys.stdin.buffer.read() if sys.stdin is not None else b""  # None if it is closed
        return raw_rows(typed, name=STANDARD_INPUT, columns=names)
    with terminal.waiting(f"reading {data}"):
        return load_rows(
            data if task is None else DataReader(task, fields_of(field)).find(data, part="test"), columns=names
        )


class _Part(FileModel):
    name: str


class _Parts(FileModel):
    train: _Part


class _Run(FileModel):
    data: _Parts
    fields: dict[str, str] | None = None


def read_candidates(source: str | None, prompt: str, data: str | None, field: Sequence[str] | None) -> list[str] | None:
    """Read candidates, if they are named: a word list, or ``train`` for the targets of the training data, which the
    prompt's ``run.json`` names, or shipped facts as data.
    """
    from ptuning.data.word_lists import read_words

    if source is None:
        return None
    fields = fields_of(field)
    if source == "train" and not os.path.exists(source):
        folders = () if prompt.startswith("manual:") else (Path(prompt), Path(prompt).parent)
        record = next((folder / RUN_FILE for folder in folders if os.path.isfile(folder / RUN_FILE)), None)
        if record is not None:
            run = validate(_Run, read_json(record), str(record), advice="name a file of candidates instead")
            source, fields = run.data.train.name.split(" (without the ")[0], {**(run.fields or {}), **fields}
        elif data is not None and ":" in data and not os.path.exists(data):
            source = data.partition(":")[0] + ":train"
        else:
            raise ConfigError(
                "--candidates train needs the prompt's run.json, or shipped facts as --data; name a file instead"
            )
    return list(read_words(source, fields=fields))


def development_records(prompt: str) -> Records | None:
    """Return the development records of a prompt's run folder, if it is in one: those that its answers are kept of."""
    folder = Path(prompt)
    path = (folder.parent if folder.name == PROMPT_FOLDER else folder) / PREDICTIONS_FILE
    if not os.path.isfile(path):
        return None
    records = [row.get("record") for row in read_json_lines(path)]
    rows = as_records([record for record in records if isinstance(record, dict)])
    rows.name = str(path)
    return rows if rows else None


def load(choice: BackboneChoice, *, prompt: Prompt | None = None, spread: bool = False) -> Backbone:
    """Load the backbone that was named, the prompt's own at the revision that it was trained on, or the default.
    Only a command whose processes all do the same may ``spread`` it over them.
    """
    name, options = choice.name, choice.options
    if options.shard in ("tp", "layers") and not spread:
        raise ConfigError(
            f"shard={options.shard} is for train and fleet, in which all processes run the same passes; use "
            "--model-arg shard=map here (one process), or quantize"
        )
    own = prompt.backbone if prompt is not None else None
    if name is None and own is not None:
        name, options = own.name, replace(options, revision=options.revision or own.revision)
    name = sources.BACKBONE if name is None else name
    with terminal.loading(name):
        from ptuning.backbone.loading import load_backbone

        try:
            backbone = load_backbone(name, **vars(options))
        except sources.NoBackboneError as error:
            if choice.name is not None or own is None:
                raise
            raise BackboneError(
                f"{error} (the prompt was learned on it; name where it is now with --backbone)"
            ) from error
    if prompt is not None and own is None:
        notice_line_breaks(str(prompt.template), backbone.tokenizer)
    return backbone


def load_tokenizer(choice: BackboneChoice) -> tuple[TextTokenizer, Kind]:
    """Load the tokenizer of the backbone that was named, or of the default, and its kind."""
    name = sources.BACKBONE if choice.name is None else choice.name
    with terminal.loading(name):
        from ptuning.backbone import loading

        return loading.load_tokenizer(name, choice.options)


def text_or_file(given: str | None) -> str | None:
    """Return a template as it was given, or, of ``@FILE``, the one in the file, without line breaks at its end."""
    if given is None or not given.startswith("@"):
        return given
    from ptuning.template.language import Template

    text = read_text(Path(given[1:]), error=TemplateError).replace("\r\n", "\n").rstrip("\n")
    try:
        Template.parse(text)
    except TemplateError as error:
        raise TemplateError(f"{given[1:]}: {error}") from error
    return text


def notice_line_breaks(pattern: str | None, tokenizer: Tokenizer) -> None:
    """Warn about a template with a backslash and an n, as a shell passes them on, where a line break may be meant."""
    if pattern is not None and "\\n" in pattern and tokenizer.line_end_id is not None:
        terminal.say(
            "warning: the template has a backslash and an n, not a line break; for line breaks write in bash or zsh\n"
            f"  {as_shell_text(pattern)}\nor read the template from a file (@FILE)"
        )


def as_shell_text(pattern: str) -> str:
    r"""Return a template as bash and zsh read it with its line breaks, where a backslash and an n stand for one.

    >>> print(as_shell_text(r"It's\n[Y]"))
    $'It\'s\n[Y]'
    """
    escaped = pattern.replace("\\", "\\\\").replace("\\\\n", "\\n").replace("\n", "\\n").replace("'", "\\'")
    return f"$'{escaped}'"
