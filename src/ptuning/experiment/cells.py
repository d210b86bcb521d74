"""A task with its test part (`CellJob`), and the result of a cell (task, method, seed)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptuning.backbone.backbone import Backbone
from ptuning.data import checks
from ptuning.data.questions import Question, Questions, as_questions
from ptuning.files import Json, sha256
from ptuning.method.base import Task
from ptuning.method.tuned import bare
from ptuning.metrics import Answer, most_of, primary, score_values
from ptuning.metrics.generation import measure_texts
from ptuning.provenance import described
from ptuning.records import TARGET_FIELD, Record, Records
from ptuning.report.results_file import AnsweredRow, Cell, CellRecord, Status
from ptuning.statistics import Score, Values, rows_of, summary, value_of
from ptuning.template.ambiguity import warn
from ptuning.template.encode import TokenizedTemplate
from ptuning.template.language import Template

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
    by_seed: Mapping[int, Task] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()
    by: str | None = None

    @classmethod
    def of(
        cls,
        name: str,
        parts: Mapping[str, Records | Questions],
        pair: tuple[Template | None, Template],
        *,
        info: Mapping[str, Json],
        vocabulary: Sequence[str] | str | None = None,
        by: str | None = None,
        **task: Any,
    ) -> CellJob:
        """Return the job of a task with the ``parts`` ``train``, ``dev`` and ``test``.

        ``pair`` is the manual template, if any, and the one to learn; ``info`` is added to the task's description.
        ``vocabulary`` is a list of answers, ``objects`` for the targets of the data, or None. ``task`` has further
        arguments of :class:`Task`.
        """
        manual, learned = pair
        train, dev, test = (as_questions(parts[part]) for part in ("train", "dev", "test"))
        objects = tuple(sorted({row.record[TARGET_FIELD].strip() for rows in (train, dev, test) for row in rows}))
        closed = None if vocabulary is None else objects if isinstance(vocabulary, str) else tuple(vocabulary)
        about: dict[str, Json] = {
            "manual": str(manual) if manual is not None else None,
            "template": str(learned),
            "data": {part: described(rows, kept=len(rows)) for part, rows in parts.items()},
        }
        return cls(
            Task(name, train, dev, manual or bare(learned), learned, objects, closed, **task),
            test,
            {**about, **info},
            by=by,
        )

    @property
    def type(self) -> str | None:
        """The type of relation, if the task is one."""
        kind = self.info.get("type")
        return kind if isinstance(kind, str) else None

    def check_known(self, backbone: Backbone) -> None:
        """Warn about targets and fields that the tokenizer does not know; raise the errors of
        :func:`ptuning.data.checks.check_known` before anything runs.
        """
        for template in (self.task.manual, self.task.template):
            bound = TokenizedTemplate(template, tokenizer=backbone.tokenizer, kind=backbone.kind)
            warn(checks.check_known(bound, self.task.answer_space, (self.task.train, self.task.dev, self.test)))

    def values(self, answers: Sequence[Answer], rows: Questions | None = None) -> dict[str, Values]:
        """Return score -> values of the answers to the test part, or to some of its rows."""
        rows = self.test if rows is None else rows
        if self.task.text_metrics:
            return text_values(answers, rows.records, self.task.text_metrics)
        file = self.task.file
        metrics = file.answer_metrics if file is not None else LABEL_METRICS if self.task.words is not None else ()
        values = score_values(answers, rows, metrics)
        # Accuracy is what labels are trained and chosen for; its mean with another metric would be neither.
        return values if self.task.words is None else {name: values[name] for name in metrics}

    def values_by(self, answers: Sequence[Answer]) -> dict[str, dict[str, Values]]:
        """Return value of the field ``by`` -> score -> values of the answers to the test records with that value."""
        if self.by is None:
            return {}
        pairs: dict[str, list[tuple[Answer, Question]]] = {}
        for answer, row in zip(answers, self.test, strict=True):
            pairs.setdefault(row.record[self.by], []).append((answer, row))
        return {
            value: self.values([answer for answer, _ in pairs[value]], Questions([row for _, row in pairs[value]]))
            for value in sorted(pairs)
        }

    def task_of(self, seed: int) -> Task:
        """Return the task with the parts of a seed."""
        return self.by_seed.get(seed, self.task)


def text_values(answers: Sequence[Answer], records: Sequence[Record], metrics: Sequence[str]) -> dict[str, Values]:
    """Return score -> values of generated texts, row by row or as sums."""
    measured = measure_texts([answer.text for answer in answers], records, metrics)
    return {name: scores.values for name, scores in measured.items()}


@dataclass(frozen=True)
class CellResult:
    """The result of a cell, with the values that scores and intervals are computed from.

    ``was_there`` means that it was finished before. ``values`` maps a score to its values, one for each test record or
    group of them. ``seconds`` is the time taken by the start that finished it, ``tried`` the number of settings that
    were compared on the development part. ``hits`` is the share of the test records answered correctly, whatever the
    scores are, and ``dev_score`` that of the development part for the chosen setting; None where nothing was chosen.
    ``folder`` is where its files are, if not in the cell's own place. ``by`` maps values of a field to the values of
    the test records that have them.
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
        """The most important score."""
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


def mean_seconds(results: Iterable[CellResult]) -> dict[str, float]:
    """Return method -> mean seconds of its finished cells."""
    times: dict[str, list[float]] = {}
    for result in results:
        if result.status == "done":
            times.setdefault(result.cell.method, []).append(result.seconds)
    return {method: sum(seconds) / len(seconds) for method, seconds in times.items()}
