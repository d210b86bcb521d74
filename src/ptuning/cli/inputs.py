"""Reading what the options of a command name: data, tasks, templates, prompts, candidates and the backbone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ptuning.backbone import sources
from ptuning.cli import terminal
from ptuning.cli.options import AskedBackbone, fields_of
from ptuning.errors import BackboneError, ConfigError, RecordError, TemplateError
from ptuning.files import read_text

if TYPE_CHECKING:
    from ptuning.backbone.backbone import Backbone
    from ptuning.backbone.tokenizer import TextTokenizer
    from ptuning.data.checks import Labelled, Report
    from ptuning.data.questions import Questions
    from ptuning.data.reading import RawRows
    from ptuning.data.task_files import TaskFile
    from ptuning.prompt.inputs import InferenceInputs
    from ptuning.prompt.prompt import Prompt
    from ptuning.records import Records
    from ptuning.template.language import Template
    from ptuning.template.segments import Kind, Tokenizer

# Heavy modules (torch, transformers) are imported inside the functions: --help must not wait for them.

STANDARD_INPUT, COMMAND_LINE = "standard input", "the command line"


def task_of(name: str | None) -> TaskFile | None:
    """Load a task, if one is named."""
    if name is None:
        return None
    from ptuning.data.task_files import load_task

    return load_task(name)


def data_of(
    source: str, field: Sequence[str] | None, task: TaskFile | None, *, part: str, prompt: Prompt | None = None
) -> Records | Questions:
    """Read data: a file or shipped facts; with a task a file, ``part`` of a folder, or a part given as ``DIR:PART``.
    Without a task, fields are read as the ``prompt`` remembers them; for a chat records are conversations.
    """
    from ptuning.data.sources import DataReader

    fields = prompt.fields if prompt is not None else {}
    is_chat = prompt is not None and prompt.template.has_conversation
    reader = DataReader(task, fields_of(field), remembered=fields, chat=is_chat)
    with terminal.waiting(f"reading {source}"):
        rows = reader.read(source, part=part)
    say_notes(reader.notes)
    return rows


def read_parts(
    sources: Mapping[str, str | None], field: Sequence[str] | None, task: TaskFile | None, *, reads: Sequence[str]
) -> dict[str, Questions]:
    """Read the parts train, dev and test that are named, as :meth:`DataReader.read_parts` does."""
    from ptuning.data.sources import DataReader

    reader = DataReader(task, fields_of(field))
    parts = reader.read_parts(sources, reads=reads)
    say_notes(reader.notes)
    return parts


def say_notes(notes: Sequence[str]) -> None:
    """Print notes, each once."""
    for note in dict.fromkeys(notes):
        terminal.say(note)


def show_findings(findings: Report) -> None:
    """Print the findings in data: facts, and possible mistakes as warnings."""
    say_notes([*findings.facts, *(f"warning: {doubt}" for doubt in findings.warnings)])


def looked_at(
    parts: Mapping[str, Questions],
    labels: str | None,
    merge: Sequence[str] | None,
    task: TaskFile | None,
    *,
    reads: Sequence[str],
    strict: bool,
) -> Labelled:
    """Look at the rows of a comparison and their labels, by default the task's, and say what was found."""
    from ptuning.data.checks import label_rows

    known = task.label_words if task is not None else None
    found = label_rows(parts, labels, fields=reads, known=known, merge=merge, strict=strict)
    show_findings(found.report)
    return found


def labelled(
    prompt: Prompt, rows: Records | Questions, labels: str | None, merge: Sequence[str] | None
) -> tuple[Prompt, Questions]:
    """Return a prompt with the labels that are asked for, or those that it has, and rows to score it on; say what was
    found in them. With ``auto``, rows with labels that look mistyped are left out.
    """
    from ptuning.data.checks import Report, label_rows
    from ptuning.data.questions import as_questions

    if merge and labels is None and not prompt.answer_space.is_closed:
        raise ConfigError("--alias-label is for labels, and the prompt has none; name them with --labels")
    is_open, fields = labels is None and not prompt.answer_space.is_closed, prompt.template.fields
    if prompt.task is None:
        rows = with_target_column(rows, fields)
    parts = {"data": as_questions(rows)}
    found = label_rows(parts, labels, fields=fields, known=prompt.label_words, merge=[*prompt.merge, *(merge or ())])
    facts = found.report.facts if labels is not None or (is_open and prompt.backbone is None) else ()
    show_findings(Report(facts, found.report.warnings))
    return replace(prompt, label_words=found.words), found.parts["data"]


def with_target_column(rows: Records | Questions, reads: Sequence[str]) -> Records | Questions:
    """Return rows whose target is the one column that a template does not read, if there is no other target."""
    from ptuning.data.sources import DataReader, target_column

    reader = DataReader()
    rows = reader.with_target(rows, target_column(rows, reads))
    say_notes(reader.notes)
    return rows


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


def prompt_of(source: str, task: TaskFile | None = None, *, ablate: str | None = None) -> Prompt:
    """Load a prompt, less its part ``ablate``, or make a manual one of ``manual:TEMPLATE`` or, with a task,
    ``manual:N``. The given task comes before the prompt's own.
    """
    with terminal.waiting("starting"):
        from ptuning.data.questions import place
        from ptuning.prompt.prompt import Prompt

    is_manual = source.startswith("manual:")
    if is_manual:
        template = source.removeprefix("manual:").lstrip()
        number = place(template.strip() or "1")
        given: str | Template = template
        if task is not None and number is not None:
            from ptuning.training.spec import pattern_of

            given = pattern_of(task.manual, task, number)
        found = Prompt.manual(given, task=task)
    else:
        found = Prompt.from_pretrained(source)
    found = found if ablate is None else found.without(ablate)
    if task is None or is_manual:
        return found
    if found.task is not None and found.task.name != task.name:
        raise ConfigError(f"the prompt was made for the task {found.task.name}, not for {task.name}; leave --task out")
    return replace(found, task=task, label_words=found.label_words or task.label_words)


def data_to_write(prompt: Prompt, data: str, field: Sequence[str] | None, *, group: bool = False) -> Questions:
    """Read records to write texts for, with their targets, if they have any. A RecordError if there are none."""
    from ptuning.data.questions import as_questions

    if prompt.task is not None:
        found = as_questions(data_of(data, field, prompt.task, part="test", prompt=prompt))
    else:
        found = data_to_answer(prompt, None, data, field).questions
        is_chat = prompt.template.has_conversation  # the answer that a conversation ends with is its target
        if not is_chat and "y" not in {name for row in found.records for name in row}:
            found = as_questions(with_target_column(found.records, prompt.template.fields))
    return gathered_rows(found, prompt.task, group=group)


def gathered_rows(rows: Questions, task: TaskFile | None, *, group: bool) -> Questions:
    """Return rows as texts are scored on them. If they are ``group``ed, or the task says so, those that differ in
    their target alone are one, and it is said how many there are.
    """
    from ptuning.data.questions import with_references

    if not (group or (task is not None and task.gather)):
        return rows
    if rows.has_choices:
        raise ConfigError("--group-references is for texts that are written, and these rows have choices")
    found = with_references(rows)
    terminal.say(f"{len(rows)} records have {len(found)} different inputs; each is one, with all of its references")
    return found


def data_to_answer(prompt: Prompt, text: str | None, data: str | None, field: Sequence[str] | None) -> InferenceInputs:
    """Read what to answer: a text, data, or the standard input; by the prompt's task where it has one."""
    from ptuning.prompt.inputs import InferenceInputs, typed_fields

    if (text is None) == (data is None):
        raise ConfigError(
            "give either a TEXT or --data (a file, or - for lines of text, CSV or JSONL on the standard input)"
        )
    if field and text not in (None, "-"):
        raise ConfigError("--field renames columns of --data, and a TEXT has none; leave it out")
    fields = typed_fields(prompt) if text not in (None, "-") else ()
    if len(fields) > 1 or (text not in (None, "-") and not fields):
        raise ConfigError(f"a TEXT fills one field, and the template reads {', '.join(fields) or 'none'}; use --data")
    if text is not None and text != "-":
        if not text.strip():
            raise ConfigError("the TEXT is empty, so there is nothing to answer; - reads texts from the standard input")
        return InferenceInputs.typed(prompt, {fields[0]: text}, where=COMMAND_LINE)
    rows = _rows_to_answer(prompt, "-" if data is None else data, field)
    found = InferenceInputs.of(prompt, rows, fields=fields_of(field))
    if not found.questions:
        what = "records: lines of text, CSV or JSONL" if rows.name == STANDARD_INPUT else "records to answer"
        raise RecordError(f"{'the ' * (rows.name == STANDARD_INPUT)}{rows.name} holds no {what}")
    return found


def _rows_to_answer(prompt: Prompt, data: str, field: Sequence[str] | None) -> RawRows:
    from ptuning.data.reading import load_rows, raw_rows
    from ptuning.records import ALIASES

    task = prompt.task
    if task is not None:
        columns: dict[str, Sequence[str]] = {name: (name,) for name in task.columns}
    else:
        given = {**prompt.fields, **fields_of(field)}
        columns = {name: (given.get(name, name), name, *ALIASES.get(name, ())) for name in prompt.template.fields}
    if data == "-":
        typed = sys.stdin.buffer.read() if sys.stdin is not None else b""  # None if it is closed
        return raw_rows(typed, name=STANDARD_INPUT, columns=columns)
    from ptuning.data.sources import DataReader

    with terminal.waiting(f"reading {data}"):
        place = data if task is None else DataReader(task, fields_of(field)).find(data, part="test")
        return load_rows(place, columns=columns)


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
            f"shard={asked.options.shard} is for train and fleet, in which all processes run the same passes; use "
            "--model-arg shard=map here (one process), or quantize"
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


def read_template(path: Path) -> str:
    """Return the template in a file: its text as it is, without line breaks at its end."""
    from ptuning.template.language import Template

    text = read_text(path, error=TemplateError).replace("\r\n", "\n").rstrip("\n")
    try:
        Template.parse(text)
    except TemplateError as error:
        raise TemplateError(f"{path}: {error}") from error
    return text


def text_or_file(given: str | None) -> str | None:
    """Return a template as it was given, or, of ``@FILE``, the one in the file."""
    return read_template(Path(given[1:])) if given is not None and given.startswith("@") else given


def template_and_manual(
    template: str | None, manual: str | None, path: Path | None, *, learns_words: bool = True, both: bool = False
) -> tuple[str | None, str | None]:
    """Return --template and --manual, which may be in a file: as the latter if it has no slots, unless it can be
    learned with as it is. A ConfigError if there are several, or several of one where ``both`` may be given.
    """
    if path is None:
        return template, manual
    if not both and (template is not None or manual is not None):
        raise ConfigError("--template-file brings the template; leave --template and --manual out")
    from ptuning.template.language import Template

    text = read_template(path)
    if learns_words and not Template.parse(text).has_slots:
        if manual is not None:
            raise ConfigError(f"{path} (--template-file) has no slots: it is a manual template, and so is --manual")
        return template, text
    if template is not None:
        raise ConfigError(f"{path} (--template-file) has slots: it is the template to learn, and so is --template")
    return text, manual


def notice_line_breaks(pattern: str | None, tokenizer: Tokenizer, *, say: Callable[[str], None] = terminal.say) -> None:
    """Warn about a template with a backslash and an n, as a shell passes them on, where a line break may be meant."""
    if pattern is None or "\\n" not in pattern or tokenizer.line_end_id is None:
        return
    say(
        "warning: the template has a backslash and an n, and not a line break, which this tokenizer knows; if you mean "
        f"line breaks, write in bash or zsh\n  {as_shell_text(pattern)}\nor put the template into a file, with line "
        "breaks as they are (@FILE)"
    )


def as_shell_text(pattern: str) -> str:
    r"""Return a template as bash and zsh read it with its line breaks, where a backslash and an n stand for one.

    >>> print(as_shell_text(r"It's\n[Y]"))
    $'It\'s\n[Y]'
    """
    escaped = pattern.replace("\\", "\\\\").replace("\\\\n", "\\n").replace("\n", "\\n").replace("'", "\\'")
    return f"$'{escaped}'"
