"""Callbacks of long work: its progress, and the exception with which it stops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """The progress of a run. ``stage`` is ``train``, ``dev``, ``cache`` (the KV cache of the text before the slots), or
    ``epoch`` at its end; ``done`` and ``total`` count its records, the tokens for ``cache``, the epochs for ``epoch``.
    """

    stage: str
    done: int
    total: int
    note: str


OnProgress = Callable[[Progress], None]


class Interrupted(Exception):
    """Training was asked to stop. It has written a checkpoint if there is a folder for it."""
