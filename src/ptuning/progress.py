"""Callbacks of long work: its progress, and the exception with which it stops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """The progress of a run, for a progress bar.

    Args:
        stage: ``train``, ``dev``, ``cache`` (the KV cache of the text before the slots), or ``epoch`` at its end.
        done, total: Records of this stage; tokens for ``cache``; epochs for ``epoch``.
        note: A few words, such as the epoch and the loss.
    """

    stage: str
    done: int
    total: int
    note: str


OnProgress = Callable[[Progress], None]


class Interrupted(Exception):
    """Training was asked to stop. It has written a checkpoint if there is a folder for it."""
