"""How long work reports its progress, and how it is asked to stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """What a run is doing, for whoever shows it.

    Args:
        stage: ``train``, ``dev``, ``cache`` for what stands in front of the slots, or ``epoch`` at the end of one.
        done, total: Records read in this stage, tokens for ``cache``, or epochs.
        note: A few words, such as the epoch and the loss so far.
    """

    stage: str
    done: int
    total: int
    note: str


OnProgress = Callable[[Progress], None]


class Interrupted(Exception):
    """Training was asked to stop before its end; a checkpoint was written if there is a folder for it."""
