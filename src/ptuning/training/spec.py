"""What a training is asked for, for Python and the command line alike. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from ptuning.config import TrainConfig

if TYPE_CHECKING:
    from ptuning.data.questions import Questions
    from ptuning.data.task_files import TaskFile
    from ptuning.records import Rows
    from ptuning.template.labels import LabelWords
    from ptuning.template.language import Template


class SpecOptions(TypedDict, total=False):
    """Keyword arguments of :func:`ptuning.train` that become fields of :class:`TrainSpec`."""

    dev: Rows | Questions | None
    config: TrainConfig | None
    labels: LabelWords | Mapping[str, Sequence[str]] | str | None
    task: TaskFile | None
    calibrate: bool | None


@dataclass(frozen=True)
class TrainSpec:
    """One training: the template, the data and the settings.

    Args:
        template: A pattern such as ``[P:The capital of] [X] [P:is] [Y]``; without slots where the backbone is trained.
        data: Records to learn from, with targets, or questions of a task.
        dev: Records for early stopping and for choosing the best epoch; by default a seeded share of ``data``.
        config: Hyperparameters; by default those of :class:`~ptuning.config.TrainConfig`.
        labels: Label words (verbalizer) for classification, as ``{"good": ["great", "fine"], "bad": "poor"}`` or as
            ``good=great,fine;bad=poor``; by default the task's.
        task: The task that ``data`` belongs to. It is saved with the prompt.
        calibrate: Whether to subtract from each label or choice the score that it gets for an empty record; by default
            as the task says.
    """

    template: str | Template
    data: Rows | Questions
    dev: Rows | Questions | None = None
    config: TrainConfig | None = None
    labels: LabelWords | Mapping[str, Sequence[str]] | str | None = None
    task: TaskFile | None = None
    calibrate: bool | None = None

    @property
    def settings(self) -> TrainConfig:
        """The hyperparameters, defaults filled in."""
        return self.config or TrainConfig()


@dataclass(frozen=True)
class _Named:
    name: str


@dataclass(frozen=True)
class FleetPrompt(TrainSpec, _Named):
    """One prompt of a fleet: a name, which becomes its folder, and what :class:`TrainSpec` takes."""
