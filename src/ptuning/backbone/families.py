"""The families of backbones and what each supports, as found by the tests."""

import dataclasses
import json
from dataclasses import dataclass
from importlib import resources

from ptuning.files import Json

# What the tests try with every family (tests/backbone/test_families.py).
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
    """A family of language models: its class in transformers, and what the tests found that it supports."""

    family: str
    head: str
    kind: str
    listed: bool  # the package has code for it; the others work because loading finds out what they need
    slots: str
    answers: str
    shared_prefix: bool
    own_width: bool  # slots have a different width than the layers (ELECTRA)
    pads: str
    note: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """Its row of the table, under :data:`COLUMNS`."""
        shared = "yes" if self.shared_prefix else "no"
        return (self.family, self.head, self.kind, self.slots, self.answers, shared, self.pads, self.note)

    def to_json(self) -> dict[str, Json]:
        """Return the row as the package's data file holds it."""
        return dataclasses.asdict(self)


def families() -> list[Family]:
    """Return the families that the tests run, in the order of the table."""
    text = (resources.files("ptuning.backbone") / "families.json").read_text(encoding="utf-8")
    return [Family(**row) for row in json.loads(text)]
