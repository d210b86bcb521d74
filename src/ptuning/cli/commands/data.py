"""`ptuning data`, `template show` and `backbones`: show what there is without loading a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.markup import escape

from ptuning.backbone.families import COLUMNS, TESTED, families
from ptuning.cli import terminal
from ptuning.cli.inputs import load_tokenizer, notice_line_breaks, read_template
from ptuning.cli.options import (
    TEMPLATE,
    AskedBackbone,
    JsonOption,
    TemplateFileOption,
    option,
    takes,
    tokenizer_options,
)
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
    split: Annotated[str, typer.Option(metavar="train|dev|test", help="Which part.")] = "train",
) -> None:
    """List the shipped data, or print a part of it as JSONL. NAME:split works wherever a data file does.

    Example: ptuning data capitals --split test
    """
    from ptuning.data.reading import load_rows, shipped_facts

    if name is None:
        _show_facts(shipped_facts())
        return
    for _, row in load_rows(name if ":" in name else f"{name}:{split}"):
        typer.echo(json.dumps(row, ensure_ascii=False))


def _show_facts(known: Mapping[str, Mapping[str, object]]) -> None:
    terminal.heading("shipped facts; NAME:train, NAME:dev and NAME:test work wherever a data file does")
    table = terminal.table("name", "records", "manual template (--manual)", "--about", narrow=True)
    for name, entry in known.items():
        rows = cast("Mapping[str, int]", entry["rows"])
        counts = "/".join(str(rows[split]) for split in ("train", "dev", "test"))
        table.add_row(name, counts, escape(str(entry["manual"])), str(entry["about"]))
    terminal.results().print(table)


@takes(backbone=tokenizer_options)
def show_template(
    template: Annotated[str | None, typer.Argument(metavar="[TEMPLATE]")] = None,
    template_file: TemplateFileOption = None,
    chat: Annotated[bool, option("--chat", panel=TEMPLATE, about="Show the model's own chat template.")] = False,
    system: Annotated[
        str | None, option(metavar="TEXT", panel=TEMPLATE, about="With --chat: the system text that slots start at.")
    ] = None,
    record: Annotated[str | None, typer.Option(metavar="JSON", help='As {"x": "Kenya", "y": "Nairobi"}.')] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="Show the first record of a data file.")] = None,
    as_json: JsonOption = False,
    *,
    backbone: AskedBackbone,
) -> None:
    """Show each position of a filled template: slot, literal, field or target, with its token. With --chat the template
    is the model's own, and a conversation is shown turn by turn.

    Example: ptuning template show "[P:The capital of] [X] [P:is] [Y]" --record '{"x": "Kenya", "y": "Nairobi"}'
    """
    from ptuning.data.reading import as_read, load_rows, raw_rows
    from ptuning.template.language import Template

    if system is not None and (not chat or not system.strip()):
        raise ConfigError("--system is the system text of --chat; leave it out for the chat template's own")
    if (template is not None) + (template_file is not None) + chat != 1:
        raise ConfigError("give either a TEMPLATE, or --template-file, or --chat")
    if record is not None and data is not None:
        raise ConfigError("--record and --data both say what is filled in; leave one out")
    pattern = read_template(template_file) if template_file is not None else template
    parsed = None if pattern is None else Template.parse(pattern)
    rows = load_rows(data) if data is not None else None
    if record is not None:
        rows = raw_rows(record.replace("\n", " ").encode(), name="--record")
        if len(rows) != 1:
            raise RecordError('--record takes one JSON object, such as {"x": "Kenya", "y": "Nairobi"}')
    is_chat = parsed is None or parsed.has_conversation
    asked = _first_conversation(rows) if rows is not None and is_chat else None
    tokenizer, kind = load_tokenizer(backbone)
    notice_line_breaks(pattern, tokenizer)
    from ptuning.template.encode import TokenizedTemplate

    if parsed is None:
        from ptuning.data.conversations import system_text
        from ptuning.template.chat import chat_template

        parsed = chat_template(tokenizer, system_text(asked) if system is None and asked is not None else system)
    row: dict[str, str] = {name: name for name in parsed.fields}
    if rows is not None:
        row = dict(as_read(rows)[0] if asked is None else asked[-1].record)
    bound = TokenizedTemplate(parsed, tokenizer=tokenizer, kind=kind)
    positions = bound.describe(row)
    _show_positions(positions, tokenizer, free="start drawn" if parsed.has_deep else "random start", as_json=as_json)
    if parsed.examples is not None:
        terminal.say("[D:examples] is its word here; training puts worked examples of its data there")
    if is_chat and not as_json:
        learned = sum(part in ("target", "end") for part, _ in positions)
        terminal.line(f"{len(positions)} positions; learned is to write {learned} of them, the target and its end")
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
    texts = [None if token is None else tokenizer.token(token) for _, token in positions]
    rows = [(index, *position, text) for index, (position, text) in enumerate(zip(positions, texts, strict=True))]
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
    """List the families of language models, what each supports, and what is tested. No model is loaded.

    Example: ptuning backbones --json
    """
    rows = families()
    if as_json:
        listed: list[dict[str, Json]] = [{**row.to_json(), "tested": [*TESTED]} for row in rows]
        terminal.print_json(listed)
        return
    terminal.heading(f"families that the tests run ({', '.join(TESTED)}); any other works, or is refused with a reason")
    table = terminal.table(*SHOWN_COLUMNS, narrow=True)
    for row in rows:
        table.add_row(*(escape(cell) for name, cell in zip(COLUMNS, row.cells, strict=True) if name in SHOWN_COLUMNS))
    terminal.results().print(table)
