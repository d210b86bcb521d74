"""Conversations on the command line: data in known forms, and what follows from them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ptuning.cli import terminal
from ptuning.cli.options import TrainInputs, fields_of
from ptuning.errors import ConfigError, RecordError
from ptuning.records import TARGET_FIELD

if TYPE_CHECKING:
    from ptuning.data.questions import Questions
    from ptuning.data.reading import RawRows
    from ptuning.prompt.prompt import Prompt

# Heavy modules (torch, transformers) are imported inside the functions: --help must not wait for them.

# What a template may be made of besides; one of them is enough.
GIVEN = ("template", "manual", "task")
NO_TEMPLATE = "give either --template, or --manual to have one made from a manual template, or --task"
# What a chat is learned with until the backbone's chat template is known.
ANY_CHAT = "[C] [Y]"


def completed(asked: TrainInputs) -> TrainInputs:
    """Return the inputs of a training with the template that follows from the form of its data, if none is given: a
    chat for conversations, else a manual template. What was recognised is said.
    """
    given = asked.inputs
    check_chat(given)
    if given.get("chat"):
        return asked
    if any(given.get(name) is not None for name in (*GIVEN, "about", "pattern")):
        return asked
    from ptuning.data.conversations import recognise
    from ptuning.data.reading import load_rows

    if os.path.isdir(given["data"]):  # of a task
        raise ConfigError(NO_TEMPLATE)
    rows = load_rows(given["data"])
    try:
        shape = recognise(rows)
    except RecordError as error:
        raise ConfigError(f"{NO_TEMPLATE}; the data has none of its own ({error})") from error
    has_history = any(row.get("history") for _, row in rows)
    if shape.name == "facts":
        raise ConfigError(NO_TEMPLATE)
    if shape.manual is None or has_history:
        return replace(asked, inputs={**given, "chat": True})
    manual, (*_, answer) = shape.manual, shape.keys
    if shape.name == "alpaca" and any(row.get("input") for _, row in rows):
        if lacking := next((where for where, row in rows if "input" not in row), None):
            raise ConfigError(
                f"{lacking} has no 'input', as other rows have, so that one template does not fit all; write an empty "
                "text there, or add --chat, which reads them as they are"
            )
        manual = manual.replace("\n\n### Response", "\n\n### Input:\n{input}\n\n### Response")
    terminal.say(f"{rows.name}: the form {shape.described}, {len(rows)} records; --chat makes conversations of them")
    fields = [*(given.get("field") or ()), f"{TARGET_FIELD}={answer}"]
    return replace(asked, inputs={**given, "manual": manual, "field": fields})


def conversations_of(source: str, field: Sequence[str] | None, *, prompt: Prompt | None = None) -> Questions:
    """Read conversations, as a prompt remembers their keys but for those asked for, and say in which form they are."""
    from ptuning.data.conversations import read_conversations
    from ptuning.data.reading import load_rows

    with terminal.waiting(f"reading {source}"):
        own = prompt.fields if prompt is not None else {}
        found = read_conversations(load_rows(source), fields={**own, **fields_of(field)})
    terminal.say(found.summary)
    return found.questions


def shown_conversation(rows: RawRows) -> Questions:
    """Return the questions of the first conversation, with their answers or, if it ends with the user, to be asked."""
    from ptuning.data.conversations import read_conversations
    from ptuning.data.reading import RawRows

    first = RawRows(rows[:1], name=rows.name, digest=rows.sha256, format=rows.format)
    try:
        return read_conversations(first).questions
    except RecordError:
        return read_conversations(first, ask=True).questions


def check_chat(given: Mapping[str, Any], *, option: str = "--") -> None:
    """Raise a ConfigError if a chat, whose template is the model's own, is given another one."""
    taken = [name for name in (*GIVEN, "about", "pattern") if given.get(name) is not None] if given.get("chat") else []
    if taken:
        what = f"{option}chat makes the template of the model's chat template"
        raise ConfigError(f"{what}; leave {option}{taken[0]} out")


def check_system(given: Mapping[str, Any], *, option: str = "--") -> None:
    """Raise a ConfigError if there is a system text without a chat."""
    if given.get("system") is not None and not given.get("chat"):
        raise ConfigError(f"{option}system goes with {option}chat; write the words into the template: [P:You are ...]")
    if given.get("system") is not None and not given["system"].strip():
        raise ConfigError(f"{option}system is empty; leave it out for the chat template's own")
