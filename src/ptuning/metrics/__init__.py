"""The table of metrics. With one more entry in :data:`METRICS`, task files, ``eval``, tables and reports have it."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ptuning.errors import TaskError
from ptuning.records import TARGET_FIELD, Record
from ptuning.statistics import Ratios, Values, blend, grouped


@dataclass(frozen=True)
class Answer:
    """The answer to one record, and whether it is the target (``hit``).

    ``rank`` is the one-based rank of the target among the possible answers, 0 if it is not among them, None if they
    were not ranked. ``log_prob`` is its natural log-probability, where there is one. ``known`` is false if
    the tokenizer does not tell the target from unknown text or a wrong answer: the row scores nothing then.
    """

    text: str
    hit: bool
    rank: int | None = None
    log_prob: float | None = None
    known: bool = True

    @classmethod
    def of_ranked(cls, texts: Sequence[str], right: Collection[str]) -> Answer:
        """Return the answer of a method that ranks texts; a target that is not among them has rank 0."""
        rank = next((at for at, text in enumerate(texts, start=1) if text in right), 0)
        return cls(texts[0] if texts else "", bool(texts) and texts[0] in right, rank)


# Maximum number of labels in a table or a picture. The others are counted together.
MAX_LABELS, OTHERS = 12, "(others)"


@dataclass(frozen=True)
class LabelScore:
    """Scores of a label: precision, recall and F1, each 0 where there is nothing to count, and
    ``n``, the number of rows whose target it is. Source: scikit-learn, ``precision_recall_fscore_support``.
    """

    precision: float
    recall: float
    f1: float
    n: int


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix: ``counts[i][j]`` rows whose target is ``labels[i]`` were answered with ``labels[j]``."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, labels: Sequence[str], targets: Sequence[str], answers: Sequence[str]) -> Confusion:
        """Count pairs of targets and answers, which are labels; other answers are left out."""
        pairs = Counter(zip(targets, answers, strict=True))
        return cls(tuple(labels), tuple(tuple(pairs[target, answer] for answer in labels) for target in labels))

    @property
    def scores(self) -> dict[str, LabelScore]:
        """Precision, recall and F1 of each label."""
        scores = {}
        for at, label in enumerate(self.labels):
            hits, given, right = self.counts[at][at], sum(row[at] for row in self.counts), sum(self.counts[at])
            shares = (hits / given if given else 0.0, hits / right if right else 0.0)
            scores[label] = LabelScore(*shares, 2 * hits / (given + right) if given + right else 0.0, right)
        return scores

    def shortened(self, most: int = MAX_LABELS, *, others: str = OTHERS) -> Confusion:
        """Return the matrix of the ``most`` frequent targets, in their order, with all others as one label."""
        if len(self.labels) <= most:
            return self
        by_size = sorted(range(len(self.labels)), key=lambda at: -sum(self.counts[at]))
        groups = [*([at] for at in sorted(by_size[:most])), by_size[most:]]
        counts = [
            [sum(self.counts[row][at] for row in rows for at in columns) for columns in groups] for rows in groups
        ]
        return Confusion((*(self.labels[at] for (at,) in groups[:-1]), others), tuple(map(tuple, counts)))


class Scored(Protocol):
    """The part of a question that scoring reads: its record with the target, its right answers, and its group."""

    @property
    def record(self) -> Record: ...  # noqa: D102
    @property
    def right(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def group(self) -> str | None: ...  # noqa: D102


@dataclass(frozen=True)
class Metric:
    """A way to score answers. Values lie in [0, 1], and higher is better.

    Args:
        name: Its name in task files and ``results.json``; ``shown_as`` in tables.
        compute: N answers and their N questions -> a value per row or group, or sums over them. Without questions, the
            right answers are known from hits and ranks only.
        by_default: Whether tasks that name no metrics have it, as LAMA's relations do.
        needs_ranks: Whether the target's rank of every answer must be known.
        needs_label: A label that the task must have.
        primary: Whether it may be the most important score. The first such in the table counts.
    """

    name: str
    shown_as: str
    compute: Callable[[Sequence[Answer], Sequence[Scored]], Sequence[float] | Ratios]
    in_task_files: bool = True
    by_default: bool = False
    needs_ranks: bool = False
    needs_label: str | None = None
    primary: bool = False


def _hits(answers: Sequence[Answer], _: Sequence[Scored]) -> list[float]:
    return [float(answer.hit) for answer in answers]


def _precision_at_10(answers: Sequence[Answer], _: Sequence[Scored]) -> list[float]:
    """Return P@10 per row; rank 0 was not ranked. Source: Petroni et al. (2019), LAMA, section 4."""
    return [float(0 < (answer.rank or 0) <= 10) for answer in answers]


def _reciprocal_ranks(answers: Sequence[Answer], _: Sequence[Scored]) -> list[float]:
    """Return 1 / rank per row, 0 for rank 0; their mean is the MRR."""
    return [1.0 / answer.rank if answer.rank else 0.0 for answer in answers]


def _macro_f1(answers: Sequence[Answer], questions: Sequence[Scored]) -> Ratios:
    """Return F1 per label that is predicted or right. Source: Wang et al. (2019), SuperGLUE, section 3 (CB)."""
    texts, targets = _texts(answers), _targets(questions)
    return grouped(f1_counts(texts, targets, sorted({*texts, *targets})), _groups(questions))


def _f1a(answers: Sequence[Answer], questions: Sequence[Scored]) -> Ratios:
    """Return F1 of the positive label over all rows. Source: Khashabi et al. (2018), MultiRC, section 4.1."""
    return grouped(f1_counts(_texts(answers), _targets(questions), [POSITIVE]), _groups(questions))


def _word_f1s(answers: Sequence[Answer], questions: Sequence[Scored]) -> list[float]:
    return [word_f1(answer.text, _right(answer, row)) for answer, row in zip(answers, questions, strict=True)]


def _exact_matches(answers: Sequence[Answer], questions: Sequence[Scored]) -> list[float]:
    """Return 1.0 for each group, in order of appearance, that holds no miss, as MultiRC has it."""
    if not questions:
        return _hits(answers, questions)
    groups: dict[str, float] = {}
    for answer, row, group in zip(answers, questions, _groups(questions), strict=True):
        value = max(float(answer.hit), exact_match(answer.text, _right(answer, row)))
        groups[group] = min(value, groups.get(group, 1.0))
    return list(groups.values())


def f1_counts(predictions: Sequence[str], targets: Sequence[str], labels: Sequence[str]) -> Ratios:
    """Return 2 x true positives over predicted plus right, per row and label."""
    import numpy as np

    predicted, right = (
        np.array([[text == label for label in labels] for text in texts], np.float64).reshape(len(texts), len(labels))
        for texts in (predictions, targets)
    )
    return Ratios(2 * predicted * right, predicted + right)


def normalised(text: str) -> str:
    """Return a text in lower case without punctuation, articles and extra spaces.

    Source: Rajpurkar et al. (2016), SQuAD, section 6.1.

    >>> normalised("The  U.S. Senate,")
    'us senate'
    """
    bare = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def word_f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the F1 of the words against the closest right answer. Source: Zhang et al. (2018), ReCoRD, section 5.1.
    An empty text is no answer, not even to a question whose answer is an article.
    """
    words, best = normalised(prediction).split(), 0.0
    for answer in answers if prediction.strip() else ():
        right = normalised(answer).split()
        common = sum((Counter(words) & Counter(right)).values())
        best = max(best, 2 * common / (len(words) + len(right)) if common else float(not words and not right))
    return best


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 for a right answer, both :func:`normalised`. Source: Zhang et al. (2018), ReCoRD, section 5.1.
    An empty text is no answer.
    """
    return float(bool(prediction.strip()) and normalised(prediction) in map(normalised, answers))


def _texts(answers: Sequence[Answer]) -> list[str]:
    return [answer.text if answer.known else "" for answer in answers]


def _right(answer: Answer, question: Scored) -> Sequence[str]:
    return question.right if answer.known else ()


def _targets(questions: Sequence[Scored]) -> list[str]:
    return [row.record[TARGET_FIELD].strip() for row in questions]


def _groups(questions: Sequence[Scored]) -> list[str]:
    return [f"row {at}" if row.group is None else f"group {row.group}" for at, row in enumerate(questions)]


# Share of answers that are right, chosen from a closed set, and generated.
ACCURACY, EXACT_MATCH = "accuracy", "exact_match"
POSITIVE = "true"  # the label whose F1 over all answers is MultiRC's F1a

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("p_at_1", "P@1", _hits, in_task_files=False, by_default=True, primary=True),
        Metric("p_at_10", "P@10", _precision_at_10, False, by_default=True, needs_ranks=True),
        Metric("mrr", "MRR", _reciprocal_ranks, in_task_files=False, by_default=True, needs_ranks=True),
        Metric(ACCURACY, "accuracy", _hits),
        Metric("macro_f1", "macro F1", _macro_f1),
        Metric("f1a", "F1a", _f1a, needs_label=POSITIVE),
        Metric("f1", "F1", _word_f1s),
        Metric(EXACT_MATCH, "exact match", _exact_matches, by_default=True, primary=True),
    )
}
TASK_SCORE = "score"  # the mean of a task's own metrics, which a mean over tasks counts
# Names of scores in the order of tables, and in that of results.json: the ones by default first.
SCORES = (TASK_SCORE, *METRICS)
RESULT_SCORES = (TASK_SCORE, *sorted(METRICS, key=lambda name: not METRICS[name].by_default))
TASK_METRICS = tuple(name for name, metric in METRICS.items() if metric.in_task_files)
# Scores of generated texts that go up to 100, as in their libraries; all others go up to 1.
UP_TO_100 = ("bleu", "bleu-lc", "chrf")


def score_values(
    answers: Sequence[Answer], questions: Sequence[Scored] | None = None, metrics: Sequence[str] = ()
) -> dict[str, Values]:
    """Return score -> values of N answers; ``metrics`` of the task's own need the N questions, and a TaskError names an
    unknown one. Without ``metrics``, the default ones count, as far as the answers are ranked.
    """
    if not metrics or questions is None:
        is_ranked = all(answer.rank is not None for answer in answers)
        default = [metric for metric in METRICS.values() if metric.by_default and (is_ranked or not metric.needs_ranks)]
        return {metric.name: metric.compute(answers, ()) for metric in default}
    for name in metrics:
        if name not in TASK_METRICS:
            raise TaskError(f"unknown metric '{name}'; known: {', '.join(TASK_METRICS)}")
    scores = {name: METRICS[name].compute(answers, questions) for name in metrics}
    groups = _groups(questions)
    size = len(set(groups))
    if size < len(groups):
        # All of a task's scores are over groups if one is, so that a resample of groups is one of all of them.
        scores = {
            name: values if isinstance(values, Ratios) or len(values) == size else grouped(values, groups)
            for name, values in scores.items()
        }
    return {TASK_SCORE: blend(list(scores.values())), **scores}


def called(score: str) -> str:
    """Return the name of a score in tables."""
    return METRICS[score].shown_as if score in METRICS else score.replace("_", " ")


def most_of(score: str) -> float:
    """Return the highest possible value of a score."""
    return 100.0 if score in UP_TO_100 else 1.0


def in_order(scores: Iterable[str]) -> list[str]:
    """Return names of scores, each once, in the order of tables; those of texts last, as they are given."""
    present = dict.fromkeys(scores)
    return [name for name in SCORES if name in present] + [name for name in present if name not in SCORES]


def primary(scores: Iterable[str]) -> str:
    """Return the most important score: a task's own, else a primary metric, else the first."""
    present = list(scores)
    chosen = (name for name in SCORES if name in present and (name == TASK_SCORE or METRICS[name].primary))
    return next(chosen, present[0] if present else TASK_SCORE)
