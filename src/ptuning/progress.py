"""Callbacks of long work: its progress, and the exception with which it stops."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

# Numbers of a training, in the order of a log's columns.
RATES = ("lr", "deep_lr", "head_lr", "backbone_lr", "lora_lr")
NUMBERS = ("step", "epoch", "loss", *RATES, "tokens_per_second", "train_loss", "dev_loss", "dev_score")


@dataclass(frozen=True)
class Progress:
    """The progress of a run, which callbacks (``report``) get.

    Args:
        stage: ``suite`` before and after each cell of a comparison, ``train`` after each step, ``dev`` while the
            development part is scored, ``epoch`` after that (also before training, as epoch 0), ``cache`` while the KV
            cache of the text before the slots is filled, and ``predict`` while texts are written.
        done, total: Records, for ``cache`` tokens, and for ``epoch`` epochs.
        note: What a person reads.
        name: Which training it is, where there are several: the prompt of a fleet, the cell of a comparison.
        numbers: Of a training: ``step`` (optimizer steps taken) and ``epoch``; after a step its ``loss`` (mean over
            the tokens, or records with labels, of the batch), ``tokens_per_second`` and the learning rates of what is
            trained, each by its setting (:data:`RATES`); after an epoch ``train_loss`` (its mean, not before training),
            ``dev_loss`` and ``dev_score``.
        seconds_left: Of a comparison: how long its other cells will take.
        untimed: How many cells this leaves out, because no cell of their method is finished yet.
    """

    stage: str
    done: int
    total: int
    note: str
    name: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)
    seconds_left: float | None = None
    untimed: int = 0


OnProgress = Callable[[Progress], None]


def named(report: OnProgress | None, name: str) -> OnProgress | None:
    """Return a callback that puts a name before the progress's own, with a slash between them."""
    if report is None:
        return None
    return lambda now: report(replace(now, name=f"{name}/{now.name}" if now.name else name))


def each(*reports: OnProgress) -> OnProgress:
    """Return a callback that calls several."""

    def report(now: Progress) -> None:
        for callback in reports:
            callback(now)

    return report


class Interrupted(Exception):
    """Training was asked to stop. It has written a checkpoint if there is a folder for it."""
