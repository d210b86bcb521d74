"""Cells of a comparison: a task with its test part, a method, a seed; and what came of one. Runs nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ptuning.data.questions import Questions
from ptuning.files import Json, sha256
from ptuning.method.base import Task
from ptuning.metrics import Answer, primary
from ptuning.records import Records
from ptuning.statistics import Score, Values, rows_of, summary, value_of

CELLS_FOLDER = "cells"


@dataclass(frozen=True)
class Job:
    """A task with its test part, which no method sees.

    Args:
        task: The task.
        test: What is reported on.
        info: What the results say about it.
        type: Its type, over which means are made as well.
        by_seed: The task with the training and development parts of a seed, where each seed draws its own.
        unlabelled: Rows without labels that are answered, too.
    """

    task: Task
    test: Questions
    info: Mapping[str, Json]
    type: str | None = None
    by_seed: Mapping[int, Task] = dataclasses.field(default_factory=dict)
    unlabelled: Questions | None = None

    @property
    def metrics(self) -> Sequence[str]:
        """Names of the task's own metrics; none where answers are scored by their ranks."""
        return self.task.file.metrics if self.task.file is not None else ()

    def task_of(self, seed: int) -> Task:
        """Return the task as a seed sees it."""
        return self.by_seed.get(seed, self.task)


@dataclass(frozen=True)
class Cell:
    """One method on one task with one seed."""

    task: str
    method: str
    seed: int

    @property
    def folder(self) -> str:
        """Where it lies below the folder of the suite."""
        return f"{CELLS_FOLDER}/{self.task}/{self.method}/seed-{self.seed}"


@dataclass(frozen=True)
class CellResult:
    """What came of a cell.

    Args:
        cell: Which one.
        status: ``done``, ``failed`` or ``waiting``.
        values: Score -> what it is computed from, a row per test record, or per group of them.
        seconds: Time taken by the start that finished it.
        tried: How many settings were compared on the development part.
        error: Why it failed.
        was_there: Whether it was finished before.
        hits: Share of the test records answered rightly, whatever the scores are.
        dev_score: The same on the development part, of the setting that it chose; None where nothing was chosen.
        warnings: What went on in training that a reader should know.
    """

    cell: Cell
    status: str
    values: Mapping[str, Values] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    tried: int = 1
    error: str | None = None
    was_there: bool = False
    hits: float | None = None
    dev_score: float | None = None
    warnings: Sequence[str] = ()

    @property
    def n(self) -> int:
        """Number of test records, or of groups of them that are scored together."""
        return rows_of(next(iter(self.values.values()), ()))

    @property
    def primary(self) -> str:
        """The score to show where there is room for one."""
        return primary(self.values)

    def score(self, name: str) -> Score:
        """Return one score with its interval over the test records."""
        return summary([self.values[name]])

    def to_json(self) -> dict[str, Json]:
        """Return the cell as it stands in ``results.json``."""
        return {
            **dataclasses.asdict(self.cell),
            "status": self.status,
            "scores": {name: value_of(values) for name, values in self.values.items()},
            "n": self.n,
            "seconds": self.seconds,
            "tried": self.tried,
            "run": self.cell.folder,
            "error": self.error,
        }


def digest(data: Questions) -> str:
    """Hash rows and not their file: the same facts in another file make the same cell."""
    if any(row.choices or row.group for row in data):
        return sha256(f"{Questions(data).sha256}{[row.group for row in data]}".encode())
    return Records([row.record for row in data]).sha256


def answer_rows(test: Questions, answers: Sequence[Answer]) -> list[dict[str, Json]]:
    """Return the lines of a cell's predictions."""
    rows: list[dict[str, Json]] = []
    for row, answer in zip(test, answers, strict=True):
        about: dict[str, Json] = {"idx": row.idx, "group": row.group, "choices": list(row.choices) or None}
        rows.append(
            {
                "record": dict(row.record),
                **{name: value for name, value in about.items() if value is not None},
                "target": row.right[0] if row.right else None,
                "prediction": answer.text,
                "rank": answer.rank,
                "hit": answer.hit,
                "log_prob": answer.log_prob,
            }
        )
    return rows
