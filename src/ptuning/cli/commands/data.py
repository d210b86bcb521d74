"""`ptuning data`, `template show` and `backbones`: show what there is without loading a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.markup import escape

from ptuning.backbone.families import COLUMNS, TESTED, families
from ptuning.cli import options, terminal
from ptuning.cli.inputs import load_tokenizer, notice_line_breaks, text_or_file
from ptuning.cli.options import DATA, TEMPLATE, JsonOption, option
from ptuning.errors import ConfigError, RecordError
from ptuning.records import TARGET_FIELD

if TYPE_CHECKING:
    from ptuning.backbone.tokenizer import TextTokenizer
    from ptuning.data.questions import Questions
    from ptuning.data.reading import RawRows
    from ptuning.files import Json

# The columns of the table of backbones on a terminal; docs/backbones.md has all.
SHOWN_COLUMNS = ("family", "kind", "slots", "answers", "shared prefix")


def data(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Which data to print.")] = None,
    split: Annotated[str, option("Which part.", DATA, metavar="train|dev|test")] = "train",
) -> None:
    """List the shipped data, or print a part of it as JSONL. NAME:split works wherever a data file does.

    Example: ptuning data capitals --split test
    """
    from ptuning.data.reading import load_rows, shipped_facts

    if name is not None:
        for _, row in load_rows(name if ":" in name else f"{name}:{split}"):
            typer.echo(json.dumps(row, ensure_ascii=False))
        return
    terminal.heading("shipped facts; NAME:train, NAME:dev and NAME:test work wherever a data file does")
    table = terminal.table("name", "records", "manual template (--manual)", "about")
    for title, entry in shipped_facts().items():
        rows = cast("Mapping[str, int]", entry["rows"])
        counts = "/".join(str(rows[part]) for part in ("train", "dev", "test"))
        table.add_row(title, counts, escape(str(entry["manual"])), str(entry["about"]))
    terminal.results().print(table)


def show_template(
    template: Annotated[str | None, typer.Argument(metavar="[TEMPLATE|@FILE]")] = None,
    chat: Annotated[bool, option("Show the model's own chat template.", TEMPLATE, "--chat")] = False,
    system: Annotated[
        str | None, option("With --chat: the system text that slots start at.", TEMPLATE, metavar="TEXT")
    ] = None,
    record: Annotated[str | None, option('As {"x": "Kenya", "y": "Nairobi"}.', DATA, metavar="JSON")] = None,
    data: Annotated[str | None, option("Show the first record of a data file.", DATA, metavar="FILE")] = None,
    as_json: JsonOption = False,
    backbone: options.BackboneOption = None,
    model_arg: options.ModelArgOption = None,
) -> None:
    """Show each position of a filled template: slot, literal, field or target, with its token. With --chat the template
    is the model's own, and a conversation is shown turn by turn.

    Example: ptuning template show "[P:The capital of] [X] [P:is] [Y]" --record '{"x": "Kenya", "y": "Nairobi"}'
    """
    from ptuning.data.reading import as_read, load_rows, raw_rows
    from ptuning.template.language import Template

    if system is not None and (not chat or not system.strip()):
        raise ConfigError("--system is the system text of --chat; leave it out for the chat template's own")
    if (template is not None) == chat:
        raise ConfigError("give either a TEMPLATE or --chat")
    if record is not None and data is not None:
        raise ConfigError("--record and --data are both a record to fill in; leave one out")
    pattern = text_or_file(template)
    parsed = None if pattern is None else Template.parse(pattern)
    rows = load_rows(data) if data is not None else None
    if record is not None:
        rows = raw_rows(record.replace("\n", " ").encode(), name="--record")
        if len(rows) != 1:
            raise RecordError('--record takes one JSON object, such as {"x": "Kenya", "y": "Nairobi"}')
    is_chat = parsed is None or parsed.has_conversation
    conversation = _first_conversation(rows) if rows is not None and is_chat else None
    tokenizer, kind = load_tokenizer(options.tokenizer_of(backbone, model_arg))
    notice_line_breaks(pattern, tokenizer)
    from ptuning.data.conversations import system_text
    from ptuning.template.chat import chat_template
    from ptuning.template.encode import TokenizedTemplate

    if parsed is None:
        if system is None and conversation is not None:
            system = system_text(conversation)
        parsed = chat_template(tokenizer, system)
    row: dict[str, str] = {name: name for name in parsed.fields}
    if rows is not None:
        row = dict(as_read(rows)[0] if conversation is None else conversation[-1].record)
    bound = TokenizedTemplate(parsed, tokenizer=tokenizer, kind=kind)
    positions = bound.describe(row)
    _show_positions(positions, tokenizer, free="start drawn" if parsed.has_deep else "random start", as_json=as_json)
    if parsed.examples is not None:
        terminal.say("[D:examples] is its word here; training puts worked examples of its data there")
    if is_chat and not as_json:
        learned = sum(part in ("target", "end") for part, _ in positions)
        terminal.line(f"{len(positions)} positions, {learned} of them the target and its end, which are learned")
    target = row.get(TARGET_FIELD, "")
    if target.strip() and not bound.examples([row])[0].known:
        terminal.say(f"warning: the target '{target}' is unknown to this tokenizer, so it is never a hit")


def _first_conversation(rows: RawRows) -> Questions:
    """Return the questions of the first conversation, with their answers unless it ends with the user."""
    from ptuning.data.conversations import read_conversations
    from ptuning.data.reading import RawRows

    first = RawRows(rows[:1], name=rows.name, digest=rows.sha256, format=rows.format)
    try:
        return read_conversations(first).questions
    except RecordError:
        return read_conversations(first, ask=True).questions


def _show_positions(
    positions: Sequence[tuple[str, int | None]], tokenizer: TextTokenizer, *, free: str, as_json: bool
) -> None:
    rows = [
        (index, part, token, None if token is None else tokenizer.token(token))
        for index, (part, token) in enumerate(positions)
    ]
    if as_json:
        terminal.print_json([dict(zip(("position", "part", "token_id", "token"), row, strict=True)) for row in rows])
        return
    table = terminal.table("position", "part", "id", "token")
    for index, part, token, text in rows:
        shown = free if text is None else terminal.quoted(text) + (" (start)" if part == "slot" else "")
        style = {"slot": "green", "target": "bold", "end": "bold"}.get(part, "")
        table.add_row(str(index), escape(part), "" if token is None else str(token), escape(shown), style=style)
    terminal.results().print(table)


def backbones(as_json: JsonOption = False) -> None:
    """List the families of language models, what each supports, and what is tested.

    Example: ptuning backbones --json
    """
    rows = families()
    if as_json:
        listed: list[dict[str, Json]] = [{**row.to_json(), "tested": [*TESTED]} for row in rows]
        terminal.print_json(listed)
        return
    terminal.heading(f"families that the tests run ({', '.join(TESTED)}); any other works, or is refused with a reason")
    table = terminal.table(*SHOWN_COLUMNS)
    for row in rows:
        table.add_row(*(escape(cell) for name, cell in zip(COLUMNS, row.cells, strict=True) if name in SHOWN_COLUMNS))
    terminal.results().print(table)
