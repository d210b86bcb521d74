"""Kinds of learned prompts by the names of the field: each makes a template of a manual one, and has settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ptuning.errors import ConfigError, closest
from ptuning.template.language import EXAMPLES, Literal, Slots, Template, TextSlots

# Slots of the kinds that have a number of them, as their papers' defaults for short inputs are.
PROMPT_SLOTS, PREFIX_SLOTS, DEEP_SLOTS = 20, 10, 20


@dataclass(frozen=True)
class PromptKind:
    """A kind of learned prompt: its name, what it is, the slots before its template, and the settings in which it
    differs. The template is a manual one, or (``learns_words``) one whose words are slots already.
    """

    name: str
    describe: str
    front: Slots | TextSlots
    settings: Mapping[str, Any] = field(default_factory=dict)
    learns_words: bool = False

    def template(self, manual: Template, learned: Template | None = None) -> Template:
        """Return the template made of a manual one, or of a given learned one if the kind learns words. A TemplateError
        if the manual one has slots.
        """
        manual.check_manual()
        if not self.learns_words:
            return in_front(manual, self.front)
        pieces = (learned or Template.from_manual(str(manual))).pieces
        # Random slots at its front are left out, since the examples are there.
        return in_front(Template(pieces[1:] if isinstance(pieces[0], Slots) else pieces), self.front)


def in_front(template: Template, slots: Slots | TextSlots) -> Template:
    """Return a template with slots before it.

    >>> str(in_front(Template.parse("[X] is [Y]"), Slots(3, deep=True)))
    '[D*3] [X] is [Y]'
    """
    first, *rest = template.pieces
    if isinstance(first, Literal):
        return Template((slots, Literal(" " + first.text.removeprefix(" ")), *rest))
    return Template((slots, Literal(" "), first, *rest))


# Sources: Lester et al. (2021), arXiv:2104.08691; Li and Liang (2021), arXiv:2101.00190; Liu et al. (2022),
# arXiv:2110.07602; Lu et al. (2025), arXiv:2507.04221. All start at text (docs/deep.md): from random vectors they learn
# nothing in few steps.
KINDS: Mapping[str, PromptKind] = {
    kind.name: kind
    for kind in (
        PromptKind(
            "prompt-tuning",
            f"{PROMPT_SLOTS} free slots of the input before the manual prompt",
            Slots(PROMPT_SLOTS),
            {"encoder": "none", "start": "vocabulary"},
        ),
        PromptKind(
            "prefix-tuning",
            f"{PREFIX_SLOTS} deep slots before the manual prompt, which a network makes",
            Slots(PREFIX_SLOTS, deep=True),
            {"encoder": "none", "deep_encoder": "mlp"},
        ),
        PromptKind(
            "p-tuning-v2",
            f"{DEEP_SLOTS} free deep slots before the manual prompt",
            Slots(DEEP_SLOTS, deep=True),
            {"encoder": "none"},
        ),
        PromptKind(
            "context-tuning",
            "examples of the training part as deep slots before the manual prompt",
            TextSlots(EXAMPLES, deep=True),
            {"encoder": "none"},
        ),
        PromptKind(
            "hybrid",
            "examples of the training part as deep slots before the learned prompt",
            TextSlots(EXAMPLES, deep=True),
            learns_words=True,
        ),
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
