"""`ptuning data`, `template show` and `backbones`: show what there is without loading a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from ptuning.backbone import sources
from ptuning.backbone.families import COLUMNS, TESTED, Family, families
from ptuning.cli import terminal
from ptuning.cli.options import BackboneOption, JsonOption
from ptuning.errors import RecordError

if TYPE_CHECKING:
    from ptuning.backbone.tokenizer import TextTokenizer
    from ptuning.files import Json

# The columns of the table of backbones on a terminal; docs/backbones.md has all.
SHOWN_COLUMNS = ("family", "kind", "slots", "answers", "shared prefix")


def data(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Which facts to print.")] = None,
    split: Annotated[str, typer.Option(metavar="train|dev|test", help="Which part.")] = "train",
) -> None:
    """List the shipped facts, or print a part of them as JSONL. NAME:split works wherever a data file does.

    Example: ptuning data capitals --split test
    """
    from ptuning.data.reading import load_records, shipped_facts

    if name is None:
        show_facts(shipped_facts())
        return
    for row in load_records(name if ":" in name else f"{name}:{split}"):
        typer.echo(json.dumps(dict(row), ensure_ascii=False))


def show_facts(known: Mapping[str, Mapping[str, object]]) -> None:
    """Print the shipped facts."""
    terminal.heading("shipped facts; NAME:train, NAME:dev and NAME:test work wherever a data file does")
    # As narrow as it can be: the manual templates are for copying and should not be wrapped at 80 columns.
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("name", "records", "manual template (--manual)", "--about"):
        table.add_column(name)
    for name, entry in known.items():
        rows = cast("Mapping[str, int]", entry["rows"])
        counts = "/".join(str(rows[split]) for split in ("train", "dev", "test"))
        table.add_row(name, counts, escape(str(entry["manual"])), str(entry["about"]))
    terminal.results().print(table)


def show_template(
    template: Annotated[str, typer.Argument(metavar="TEMPLATE")],
    backbone: BackboneOption = None,
    record: Annotated[str | None, typer.Option(metavar="JSON", help='As {"x": "Kenya", "y": "Nairobi"}.')] = None,
    as_json: JsonOption = False,
) -> None:
    """Show each position of a filled template: slot, literal, field or target, with its token.

    Example: ptuning template show "[P:The capital of] [X] [P:is] [Y]" --record '{"x": "Kenya", "y": "Nairobi"}'
    """
    from ptuning.data.reading import read_rows
    from ptuning.template.language import Template

    parsed = Template.parse(template)
    row = {name: name for name in parsed.fields}
    if record is not None:
        rows = read_rows(record.replace("\n", " ").encode(), name="--record")
        if len(rows) != 1:
            raise RecordError('--record takes one JSON object, such as {"x": "Kenya", "y": "Nairobi"}')
        row = dict(rows[0])
    name = backbone if backbone is not None else sources.BACKBONE
    with terminal.loading(name):
        from ptuning.backbone.loading import load_tokenizer
        from ptuning.template.fill import BoundTemplate

        tokenizer, kind = load_tokenizer(name)
    show_positions(BoundTemplate(parsed, tokenizer=tokenizer, kind=kind).describe(row), tokenizer, as_json=as_json)


def show_positions(positions: Sequence[tuple[str, int | None]], tokenizer: TextTokenizer, *, as_json: bool) -> None:
    """Print each position of a filled template."""
    rows = [
        (index, part, token, None if token is None else tokenizer.token(token))
        for index, (part, token) in enumerate(positions)
    ]
    if as_json:
        terminal.print_json(
            [{"position": index, "part": part, "token_id": token, "token": text} for index, part, token, text in rows]
        )
        return
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("position", "part", "id", "token"):
        table.add_column(name)
    for index, part, token, text in rows:
        shown = "random start" if text is None else terminal.quoted(text) + (" (start)" if part == "slot" else "")
        table.add_row(
            str(index),
            escape(part),
            "" if token is None else str(token),
            escape(shown),
            style={"slot": "green", "target": "bold"}.get(part, ""),
        )
    terminal.results().print(table)


def backbones(as_json: JsonOption = False) -> None:
    """List the families of language models, what each supports, and what is tested. No model is loaded.

    Example: ptuning backbones --json
    """
    show_families(families(), as_json=as_json)


def show_families(rows: Sequence[Family], *, as_json: bool) -> None:
    """Print the table of backbones."""
    if as_json:
        listed: list[dict[str, Json]] = [{**row.to_json(), "tested": [*TESTED]} for row in rows]
        terminal.print_json(listed)
        return
    terminal.heading(f"families that the tests run ({', '.join(TESTED)}); any other works, or is refused with a reason")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in SHOWN_COLUMNS:
        table.add_column(name)
    for row in rows:
        table.add_row(*(escape(cell) for name, cell in zip(COLUMNS, row.cells, strict=True) if name in SHOWN_COLUMNS))
    terminal.results().print(table)
