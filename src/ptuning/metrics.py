"""From answers to the values that a task's scores are computed from: ranks as LAMA counts them, or a task's own
metrics. Knows no method and no table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ptuning.errors import TaskError
from ptuning.names import POSITIVE, TASK_SCORE
from ptuning.records import TARGET_FIELD, Record
from ptuning.statistics import (
    Ratios,
    Values,
    all_right,
    blend,
    exact_match,
    f1_of,
    grouped,
    macro_f1,
    precision_at,
    reciprocal_ranks,
    word_f1,
)


@dataclass(frozen=True)
class Answer:
    """The answer to one record.

    Args:
        text: What is answered.
        hit: Whether that is the record's target.
        rank: One-based rank of the target among the possible answers, 0 if it is none of them; None if they were not
            ranked.
        log_prob: Natural log-probability of the answer, where there is one.
    """

    text: str
    hit: bool
    rank: int | None = None
    log_prob: float | None = None

    @classmethod
    def of_ranked(cls, texts: Sequence[str], right: Collection[str]) -> Answer:
        """Return the answer of a method that ranks texts; a target that is not among them has rank 0."""
        rank = next((at for at, text in enumerate(texts, start=1) if text in right), 0)
        return cls(texts[0] if texts else "", bool(texts) and texts[0] in right, rank)


class Asked(Protocol):
    """What scoring needs of a question: its record with the target, its right answers, what it is grouped by."""

    @property
    def record(self) -> Record: ...  # noqa: D102
    @property
    def right(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def group(self) -> str | None: ...  # noqa: D102


# In the order of tables. RANK_SCORES are what a task has that names no metrics of its own.
RANK_SCORES = ("p_at_1", "p_at_10", "mrr", "exact_match")
SCORES = (TASK_SCORE, *RANK_SCORES, "accuracy", "macro_f1", "f1a", "f1")


def score_values(
    answers: Sequence[Answer], questions: Sequence[Asked] | None = None, metrics: Sequence[str] = ()
) -> dict[str, Values]:
    """Return score -> values of a task.

    Args:
        answers: N answers.
        questions: What was asked; needed for metrics of a task's own.
        metrics: Their names; none for ranks. Without ranks P@1 is exact match.
    """
    if not metrics or questions is None:
        return dict(_rank_values(answers))
    found = {name: _metric(name, questions, answers) for name in metrics}
    groups = _groups(questions)
    if len(set(groups)) < len(groups):
        # Scores over groups stand beside each other, so that a resample of groups is one of all of them.
        size = len(set(groups))
        found = {
            name: values if isinstance(values, Ratios) or len(values) == size else grouped(values, groups)
            for name, values in found.items()
        }
    return {TASK_SCORE: blend(list(found.values())), **found}


def _rank_values(answers: Sequence[Answer]) -> Mapping[str, list[float]]:
    hits = [float(answer.hit) for answer in answers]
    ranks = [answer.rank for answer in answers if answer.rank is not None]
    if len(ranks) < len(answers):
        return {"p_at_1": hits, "exact_match": hits}
    return {
        "p_at_1": precision_at(1, ranks),
        "p_at_10": precision_at(10, ranks),
        "mrr": reciprocal_ranks(ranks),
        "exact_match": hits,
    }


def _metric(name: str, questions: Sequence[Asked], answers: Sequence[Answer]) -> list[float] | Ratios:
    said = [answer.text for answer in answers]
    if name == "accuracy":
        return [float(answer.hit) for answer in answers]
    if name == "macro_f1":
        return grouped(macro_f1(said, _targets(questions)), _groups(questions))
    if name == "f1a":
        return f1_of(POSITIVE, said, _targets(questions), _groups(questions))
    if name == "f1":
        return [word_f1(text, question.right) for text, question in zip(said, questions, strict=True)]
    if name == "exact_match":
        hits = [
            max(float(answer.hit), exact_match(answer.text, question.right))
            for answer, question in zip(answers, questions, strict=True)
        ]
        return all_right(hits, _groups(questions))
    raise TaskError(f"unknown metric '{name}'; known: accuracy, macro_f1, f1a, f1, exact_match")


def _targets(questions: Sequence[Asked]) -> list[str]:
    return [question.record[TARGET_FIELD].strip() for question in questions]


def _groups(questions: Sequence[Asked]) -> list[str]:
    """Return the group of each row; one that has none is one of its own."""
    return [f"row {at}" if row.group is None else f"group {row.group}" for at, row in enumerate(questions)]
