"""Data classes of a comparison: a job (a task with its test part) and the result of a cell (task, method, seed)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptuning.config import NOT_VARIED, TrainConfig
from ptuning.data.questions import Question, Questions
from ptuning.errors import FileError
from ptuning.files import Json, read_json, sha256
from ptuning.method.base import Task
from ptuning.metrics import Answer, most_of, primary, score_values
from ptuning.metrics.generation import measure_texts
from ptuning.names import RUN_FILE, STARTED_FILE
from ptuning.records import Record, Records
from ptuning.report.results_file import AnsweredRow, Cell, CellRecord, Status
from ptuning.statistics import Score, Values, rows_of, summary, value_of

# The metrics of a task with labels and no task file.
LABEL_METRICS = ("accuracy", "macro_f1")


@dataclass(frozen=True)
class CellJob:
    """A task with its ``test`` part, which no method sees.

    ``info`` is the task's entry in ``task_info`` of ``results.json``. Scores are averaged over each ``type`` as well.
    ``by_seed`` has the tasks with the parts that a seed draws. ``notes`` are printed before it runs. Test records are
    also scored by each value of the field ``by``.
    """

    task: Task
    test: Questions
    info: Mapping[str, Json]
    type: str | None = None
    by_seed: Mapping[int, Task] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()
    by: str | None = None

    @property
    def metrics(self) -> Sequence[str]:
        """Names of the task's own metrics; none if answers are scored by their ranks."""
        if self.task.file is not None:
            return self.task.file.answer_metrics
        return LABEL_METRICS if self.task.words is not None else ()

    def values(self, answers: Sequence[Answer]) -> dict[str, Values]:
        """Return score -> values of the answers to the test part."""
        return self._values(answers, self.test)

    def values_by(self, answers: Sequence[Answer]) -> dict[str, dict[str, Values]]:
        """Return value of the field ``by`` -> score -> values of the answers to the test records with that value."""
        if self.by is None:
            return {}
        pairs: dict[str, list[tuple[Answer, Question]]] = {}
        for answer, row in zip(answers, self.test, strict=True):
            pairs.setdefault(row.record[self.by], []).append((answer, row))
        return {
            value: self._values([answer for answer, _ in pairs[value]], Questions([row for _, row in pairs[value]]))
            for value in sorted(pairs)
        }

    def _values(self, answers: Sequence[Answer], rows: Questions) -> dict[str, Values]:
        if self.task.text_metrics:
            return text_values(answers, rows.records, self.task.text_metrics)
        found = score_values(answers, rows, self.metrics)
        # Accuracy is what labels are trained and chosen for; its mean with another metric would be neither.
        return found if self.task.words is None else {name: found[name] for name in self.metrics}

    def task_of(self, seed: int) -> Task:
        """Return the task with the parts of a seed."""
        return self.by_seed.get(seed, self.task)


def text_values(answers: Sequence[Answer], records: Sequence[Record], metrics: Sequence[str]) -> dict[str, Values]:
    """Return score -> values of written texts, row by row or as sums."""
    found = measure_texts([answer.text for answer in answers], records, metrics)
    return {name: one.values for name, one in found.items()}


@dataclass(frozen=True)
class CellResult:
    """The result of a cell, with the values that scores and intervals are computed from.

    ``status`` is ``done``, ``failed`` or ``waiting``; ``was_there`` says that it was finished before. ``values`` maps a
    score to its values, one for each test record or group of them. ``seconds`` is the time taken by the start that
    finished it, ``tried`` how many settings were compared on the development part. ``hits`` is the share of the test
    records answered correctly, whatever the scores are, and ``dev_score`` that of the development part for the chosen
    setting; None where nothing was chosen. ``folder`` is where its files are, if not in the cell's own place.
    ``by`` maps values of a field to the values of the test records that have them.
    """

    cell: Cell
    status: Status
    values: Mapping[str, Values] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    tried: int = 1
    error: str | None = None
    was_there: bool = False
    hits: float | None = None
    dev_score: float | None = None
    warnings: Sequence[str] = ()
    folder: str | None = None
    by: Mapping[str, Mapping[str, Values]] = dataclasses.field(default_factory=dict)

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
        return summary([self.values[name]], most=most_of(name))

    @property
    def record(self) -> CellRecord:
        """The result as ``results.json`` holds it."""
        return CellRecord(
            **vars(self.cell),
            status=self.status,
            scores={name: value_of(values) for name, values in self.values.items()},
            n=self.n,
            seconds=self.seconds,
            tried=self.tried,
            run=self.folder or self.cell.folder,
            error=self.error,
        )


@dataclass(frozen=True)
class CellEstimate:
    """A cell before a run, with the seconds it took or will take; None if no cell of its method is finished yet."""

    cell: Cell
    is_finished: bool
    seconds: float | None


def digest(data: Questions) -> str:
    """Hash rows and not their file: the same facts in another file make the same cell."""
    if any(row.choices or row.group for row in data):
        return sha256(f"{Questions(data).sha256}{[row.group for row in data]}".encode())
    return Records([row.record for row in data]).sha256


def answered_rows(questions: Questions, answers: Sequence[Answer]) -> list[AnsweredRow]:
    """Return the questions of a test part with their answers, for ``predictions.jsonl``."""
    return [
        AnsweredRow(row.record, row.right[0] if row.right else None, answer, row.idx, row.group, row.choices)
        for row, answer in zip(questions, answers, strict=True)
    ]


def how_to_have_both(now: Mapping[str, Json], saved: Mapping[str, Json]) -> str:
    """Return how results with both settings come into one report, if nothing else differs."""
    changed = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    varied = set(TrainConfig.model_fields) - set(NOT_VARIED)
    if not varied.issuperset(changed):
        return ""
    options = " ".join(f"--vary {name}={now.get(name)}" for name in changed)
    return f". To have both in one report, leave the settings as they were and add {options}"


def saved_identity(folder: Path) -> Mapping[str, Json] | None:
    """Return the identity of a finished or started cell; None if there is none that can be read."""
    for name in (RUN_FILE, STARTED_FILE):
        try:
            saved = read_json(folder / name).get("identity")
        except FileError:
            continue
        if isinstance(saved, Mapping):
            return saved
    return None


def mean_seconds(taken: Mapping[Cell, float]) -> dict[str, float]:
    """Return method -> mean seconds of its cells."""
    times: dict[str, list[float]] = {}
    for cell, seconds in taken.items():
        times.setdefault(cell.method, []).append(seconds)
    return {method: sum(listed) / len(listed) for method, listed in times.items()}
