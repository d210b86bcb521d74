"""A check: what was looked at, how it is, what was found, and what to do about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from ptuning.errors import cut
from ptuning.files import Json

Status = Literal["ok", "warning", "failed"]
# Shows, while a context lasts, what is waited for.
Working = Callable[[str], AbstractContextManager[None]]
SHOWN_CHARACTERS = 500  # of what was found


@dataclass(frozen=True)
class Check:
    """What was found out about one thing. ``found`` and ``remedy`` are one line each; what is not ok has a remedy."""

    group: str
    name: str
    status: Status
    found: str
    remedy: str = ""

    def to_json(self) -> dict[str, Json]:
        """Return the check as ``doctor --json`` prints it."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Group:
    """Makes the checks of a group."""

    name: str

    def ok(self, name: str, found: object) -> Check:
        """Return a check of something that is as it should be."""
        return Check(self.name, name, "ok", _line(found))

    def warning(self, name: str, found: object, remedy: str) -> Check:
        """Return a check of something that works and may not be meant so."""
        return Check(self.name, name, "warning", _line(found), _line(remedy))

    def failed(self, name: str, found: object, remedy: str) -> Check:
        """Return a check of something that does not work."""
        return Check(self.name, name, "failed", _line(found), _line(remedy))


def _line(text: object) -> str:
    return cut(" ".join(str(text).split()), SHOWN_CHARACTERS)
