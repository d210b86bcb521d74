"""The table of data by rule. One more entry, and every command that reads data has it as ``NAME:split``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ptuning.data.rules import arithmetic, countries, instructions

RuleRow = Mapping[str, object]


@dataclass(frozen=True)
class Rule:
    """A data set that is made by rule.

    Args:
        title: What it is, in a few words.
        manual: A manual template for it; empty if it is conversations, which are learned with ``--chat``.
        rows: Part (train, dev or test) -> its rows.
        fields: New name -> name in the rows, as ``--field`` has it; ``y`` is the target.
        metrics: Metrics for the texts that comparisons take, if no others are named.
        by: A field that comparisons tell the scores by.
    """

    title: str
    manual: str
    rows: Callable[[str], Sequence[RuleRow]]
    fields: Mapping[str, str] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    by: str | None = None


RULES: Mapping[str, Rule] = {
    "countries": Rule(
        "attributes of a country -> a text that says them",
        "{content} In a sentence: [Y]",
        countries.rows,
        {"y": "summary"},
        metrics=("coverage",),
    ),
    "arithmetic": Rule(
        "a sum, difference or product -> its steps and result",
        "{input}, step by step: [Y]",
        arithmetic.rows,
        {"y": "output"},
        metrics=("last-number",),
        by="digits",
    ),
    "instructions": Rule(
        "conversations: questions about countries, answered in a sentence",
        "",
        instructions.rows,
    ),
}
