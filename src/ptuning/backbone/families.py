"""The families of backbones and what each supports, as the tests found it. Loads no model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from ptuning.files import Json

# What a family is tried with (tests/test_families.py), for each row of the table.
TESTED = (
    "identity",
    "alone or in company",
    "saved is what was trained",
    "frozen is frozen",
    "gathered logits",
    "written answers",
    "candidates",
    "shared prefix",
)
COLUMNS = ("family", "class", "kind", "slots", "answers", "shared prefix", "pads", "note")


@dataclass(frozen=True)
class Family:
    """A family of language models.

    Args:
        family: What it is called.
        head: The class in transformers.
        kind: ``causal``, ``masked``, ``permuted`` or ``encoder-decoder``.
        listed: Whether something was done for it; the others work because they are asked what they need.
        slots: Where slots may stand.
        answers: Whether it writes answers or fills masks.
        shared_prefix: Whether what the rows of a batch begin with runs once.
        own_width: Whether slots have another width than the layers (ELECTRA).
        pads: On which side of a row pads may stand; nobody needs to care.
        note: What is special about it.
    """

    family: str
    head: str
    kind: str
    listed: bool
    slots: str
    answers: str
    shared_prefix: bool
    own_width: bool
    pads: str
    note: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """What stands under :data:`COLUMNS`."""
        shared = "yes" if self.shared_prefix else "no"
        return (self.family, self.head, self.kind, self.slots, self.answers, shared, self.pads, self.note)

    def to_json(self) -> dict[str, Json]:
        """Return the row as it stands in the package's data file."""
        return dataclasses.asdict(self)


def families() -> list[Family]:
    """Return the families that the tests run, in the order of the table."""
    text = (resources.files("ptuning.backbone") / "families.json").read_text(encoding="utf-8")
    return [Family(**row) for row in json.loads(text)]


def as_markdown(rows: Sequence[Family]) -> str:
    """Return the table of docs/backbones.md."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    lines += [(name, f"`{head}`", *rest) for name, head, *rest in (row.cells for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
