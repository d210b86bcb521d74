"""A form that a prompt can be exported in: what writes it, and what was written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptuning.exchange.reserved import SlotTokens
from ptuning.exchange.rows import Reader, Source
from ptuning.template.encode import Example
from ptuning.template.language import Template


@dataclass(frozen=True, eq=False)
class Exported:
    """What was written into a folder, and how another program reads it.

    Args:
        tokens: The tokens in the slots' places, if there are such.
        open: Loads what was written, and returns what the other program answers to a row.
        ids: Returns the ids of a row, target included, that the other program is given.
        text: The texts of the slots' tokens, where a template written as text has the ids of the rows.
        why_no_text: Why it has others, if it has.
        max_difference: The largest difference per token that is rounding, if it is not that of the number format.
        usage: Lines of the card: how it is used in the other program.
    """

    tokens: SlotTokens
    open: Callable[[], Reader]
    ids: Callable[[Example], Sequence[int]]
    text: Sequence[str] | None = None
    why_no_text: str | None = None
    usage: Sequence[str] = ()
    max_difference: float | None = None


@dataclass(frozen=True)
class Form:
    """A form: a line about it, what writes it into a folder, and what raises an ExchangeError for a template that it
    cannot hold, before anything is loaded.
    """

    about: str
    write: Callable[[Source, Path], Exported]
    check: Callable[[Template], None] = lambda _: None


def asked_with_ids(model: str) -> list[str]:
    """Return lines of a card: how the example is asked of a server that takes ids as a prompt."""
    read = 'json.load(open("THIS_FOLDER/export.json"))["example"]["input_ids"]'
    return [
        "```",
        f"ids=$(python -c 'import json; print({read})')",
        "curl http://localhost:8000/v1/completions -H 'Content-Type: application/json' \\",
        f"""  -d '{{"model": "{model}", "prompt": '"$ids"', "max_tokens": 8, "temperature": 0}}'""",
        "```",
    ]
