"""What a training is asked for, for Python and the command line alike. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypedDict

from typing_extensions import Self

from ptuning.config import TrainConfig
from ptuning.data.checks import Labels, Merge, Report, label_rows, merges
from ptuning.data.questions import Questions, as_questions
from ptuning.data.task_files import TaskFile
from ptuning.records import Rows
from ptuning.template.language import Template


class SpecOptions(TypedDict, total=False):
    """Keyword arguments of :func:`ptuning.train` that become fields of :class:`TrainSpec`."""

    dev: Rows | Questions | None
    config: TrainConfig | None
    labels: Labels | None
    merge: Merge | None
    strict: bool
    task: TaskFile | None
    calibrate: bool | None
    method: str | None


@dataclass(frozen=True)
class TrainSpec:
    """One training: the template, the data and the settings.

    Args:
        template: A pattern such as ``[P:The capital of] [X] [P:is] [Y]``; without slots where the backbone is trained.
        data: Records to learn from, with targets, or questions of a task.
        dev: Records for early stopping and for choosing the best epoch; by default a seeded share of ``data``.
        config: Hyperparameters; by default those of :class:`~ptuning.config.TrainConfig`.
        labels: Label words (verbalizer) for classification, as ``{"good": ["great", "fine"], "bad": "poor"}`` or as
            ``good=great,fine;bad=poor``; labels that are their own words as ``["good", "bad"]`` or ``good;bad``;
            ``auto`` for the targets that the data has. By default the task's.
        merge: Labels to count as others, as ``{"biling": "billing"}`` or ``["biling=billing"]``; ``case`` makes one of
            labels that differ in capitals and spaces only.
        strict: Whether what may be a mistake in the data is an error.
        task: The task that ``data`` belongs to. It is saved with the prompt.
        calibrate: Whether to subtract from each label or choice the score that it gets for an empty record; by default
            as the task says.
        method: What the record calls the method; by default what the template and the settings are called.
        checked: What was found in the data, once it was looked at (:meth:`check`); warnings were given then.
    """

    template: str | Template
    data: Rows | Questions
    dev: Rows | Questions | None = None
    config: TrainConfig | None = None
    labels: Labels | None = None
    merge: Merge | None = None
    strict: bool = False
    task: TaskFile | None = None
    calibrate: bool | None = None
    method: str | None = None
    checked: Report | None = None

    @property
    def settings(self) -> TrainConfig:
        """The hyperparameters, defaults filled in."""
        return self.config or TrainConfig()

    def check(self) -> Self:
        """Return the training with the rows and label words that it is to use, and what was found; itself if that was
        done before. Errors are those of :func:`ptuning.data.checks.label_rows`.
        """
        if self.checked is not None:
            return self
        parts = {"train": as_questions(self.data)}
        if self.dev is not None:
            parts["dev"] = as_questions(self.dev)
        labels = self.labels if self.labels is not None or self.task is None else self.task.label_words
        template = Template.parse(self.template) if isinstance(self.template, str) else self.template
        found = label_rows(parts, labels, fields=template.fields, merge=self.merge, strict=self.strict)
        return replace(
            self,
            data=found.parts["train"],
            dev=found.parts.get("dev"),
            labels=found.words,
            merge=merges(self.merge),
            checked=found.report,
        )


@dataclass(frozen=True)
class _Named:
    name: str


@dataclass(frozen=True)
class FleetPrompt(TrainSpec, _Named):
    """One prompt of a fleet: a name, which becomes its folder, and what :class:`TrainSpec` takes."""
