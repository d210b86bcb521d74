"""Kinds of learned prompts by the names of the field: each makes a template of a manual one, and has settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ptuning.errors import ConfigError, closest
from ptuning.template.language import EXAMPLES, Literal, Piece, Slots, Template, TextSlots

# Slots of the kinds that have a number of them, as their papers' defaults for short inputs are.
PROMPT_SLOTS, PREFIX_SLOTS, DEEP_SLOTS = 20, 10, 20


@dataclass(frozen=True)
class PromptKind:
    """A kind of learned prompt: its name, what it is, its template, and the settings in which it differs."""

    name: str
    describe: str
    template: Callable[[Template], Template]
    settings: Mapping[str, Any] = field(default_factory=dict)


def in_front(manual: Template, piece: Slots | TextSlots) -> Template:
    """Return a manual template with slots in front of it.

    >>> str(in_front(Template.parse("[X] is [Y]"), Slots(3, deep=True)))
    '[D*3] [X] is [Y]'
    """
    for index, one in enumerate(manual.pieces):
        if isinstance(one, Slots | TextSlots):
            raise manual.error("a manual template has no slots; give this one as --template", index)
    pieces: list[Piece] = [piece]
    first = manual.pieces[0]
    if isinstance(first, Literal):
        return Template((*pieces, Literal(" " + first.text.removeprefix(" ")), *manual.pieces[1:]))
    return Template((*pieces, Literal(" "), *manual.pieces))


def _hybrid(manual: Template) -> Template:
    return in_front_of_learned(Template.from_manual(manual=str(manual)))


def in_front_of_learned(learned: Template) -> Template:
    """Return a learned template with examples as deep slots in front; random slots at its own front are left out, since
    the examples are there.
    """
    pieces = list(learned.pieces)
    if isinstance(pieces[0], Slots):
        pieces = pieces[1:]
    if isinstance(pieces[0], Literal):
        pieces[:1] = [Literal(pieces[0].text.removeprefix(" "))] if pieces[0].text != " " else []
    return Template((TextSlots(EXAMPLES, deep=True), Literal(" "), *pieces))


# Sources: Lester et al. (2021), arXiv:2104.08691; Li and Liang (2021), arXiv:2101.00190; Liu et al. (2022),
# arXiv:2110.07602; Lu et al. (2025), arXiv:2507.04221. All start at text (docs/deep.md): from random vectors they learn
# nothing in few steps.
KINDS: Mapping[str, PromptKind] = {
    one.name: one
    for one in (
        PromptKind(
            "prompt-tuning",
            f"{PROMPT_SLOTS} free slots of the input in front of the manual prompt",
            lambda manual: in_front(manual, Slots(PROMPT_SLOTS)),
            {"encoder": "none", "start": "vocabulary"},
        ),
        PromptKind(
            "prefix-tuning",
            f"{PREFIX_SLOTS} deep slots in front of the manual prompt, which a network makes",
            lambda manual: in_front(manual, Slots(PREFIX_SLOTS, deep=True)),
            {"encoder": "none", "deep_encoder": "mlp"},
        ),
        PromptKind(
            "p-tuning-v2",
            f"{DEEP_SLOTS} free deep slots in front of the manual prompt",
            lambda manual: in_front(manual, Slots(DEEP_SLOTS, deep=True)),
            {"encoder": "none"},
        ),
        PromptKind(
            "context-tuning",
            "examples of the training part as deep slots in front of the manual prompt",
            lambda manual: in_front(manual, TextSlots(EXAMPLES, deep=True)),
            {"encoder": "none"},
        ),
        PromptKind("hybrid", "examples of the training part as deep slots in front of the learned prompt", _hybrid),
    )
}


def kind_of_prompt(name: str) -> PromptKind:
    """Return a kind by its name; a ConfigError names the closest and all."""
    if name not in KINDS:
        raise ConfigError(
            f"there is no method '{name}' that learns a prompt.{closest(name, KINDS)} Known: p-tuning, "
            f"{', '.join(KINDS)}"
        )
    return KINDS[name]
