"""The table of metrics. One more entry in :data:`METRICS`, and task files, ``eval``, tables and reports have it."""

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


# More labels make a table or a picture that nobody reads. The others are counted together.
MOST_LABELS, OTHERS = 12, "(others)"


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
        found = Counter(zip(targets, answers, strict=True))
        return cls(tuple(labels), tuple(tuple(found[target, answer] for answer in labels) for target in labels))

    @property
    def scores(self) -> dict[str, LabelScore]:
        """Precision, recall and F1 of each label."""
        found = {}
        for at, label in enumerate(self.labels):
            hits, given, right = self.counts[at][at], sum(row[at] for row in self.counts), sum(self.counts[at])
            shares = (hits / given if given else 0.0, hits / right if right else 0.0)
            found[label] = LabelScore(*shares, 2 * hits / (given + right) if given + right else 0.0, right)
        return found

    def shortened(self, most: int = MOST_LABELS, *, others: str = OTHERS) -> Confusion:
        """Return the matrix of the ``most`` frequent targets, in their order, with all others as one label."""
        if len(self.labels) <= most:
            return self
        by_size = sorted(range(len(self.labels)), key=lambda at: -sum(self.counts[at]))
        groups = [*([at] for at in sorted(by_size[:most])), by_size[most:]]
        counts = [
            [sum(self.counts[row][at] for row in rows for at in columns) for columns in groups] for rows in groups
        ]
        return Confusion((*(self.labels[at] for (at,) in groups[:-1]), others), tuple(map(tuple, counts)))


class Asked(Protocol):
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
        primary: Whether it is the one to show where there is room for one. The first such in the table counts.
    """

    name: str
    shown_as: str
    compute: Callable[[Sequence[Answer], Sequence[Asked]], Sequence[float] | Ratios]
    in_task_files: bool = True
    by_default: bool = False
    needs_ranks: bool = False
    needs_label: str | None = None
    primary: bool = False
    only_in_report: bool = False


def precision_at(k: int, ranks: Sequence[int]) -> list[float]:
    """Return P@k per row; rank 0 was not ranked. Source: Petroni et al. (2019), LAMA, section 4."""
    return [float(0 < rank <= k) for rank in ranks]


def reciprocal_ranks(ranks: Sequence[int]) -> list[float]:
    """Return 1 / rank per row, 0 for rank 0; their mean is the MRR."""
    return [1.0 / rank if rank else 0.0 for rank in ranks]


def macro_f1(predictions: Sequence[str], targets: Sequence[str]) -> Ratios:
    """Return F1 per label that is predicted or right. Source: Wang et al. (2019), SuperGLUE, section 3 (CB)."""
    return _f1_counts(predictions, targets, sorted({*predictions, *targets}))


def f1_of(label: str, predictions: Sequence[str], targets: Sequence[str], groups: Sequence[str]) -> Ratios:
    """Return a label's F1 over all rows, added up by group. Source: Khashabi et al. (2018), MultiRC, section 4.1."""
    return grouped(_f1_counts(predictions, targets, [label]), groups)


def all_right(hits: Sequence[float], groups: Sequence[str]) -> list[float]:
    """Return 1.0 for each group, in order of appearance, that holds no miss (MultiRC's exact match)."""
    found: dict[str, float] = {}
    for hit, group in zip(hits, groups, strict=True):
        found[group] = min(hit, found.get(group, 1.0))
    return list(found.values())


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
    words, right = normalised(prediction).split(), (normalised(one).split() for one in answers)
    return max((_word_f1(words, one) for one in right), default=0.0) if prediction.strip() else 0.0


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 for a right answer, both :func:`normalised`. Source: Zhang et al. (2018), ReCoRD, section 5.1.
    An empty text is no answer.
    """
    return float(bool(prediction.strip()) and normalised(prediction) in map(normalised, answers))


def _hits(answers: Sequence[Answer], _: Sequence[Asked]) -> list[float]:
    return [float(answer.hit) for answer in answers]


def _exact_matches(answers: Sequence[Answer], asked: Sequence[Asked]) -> list[float]:
    if not asked:
        return _hits(answers, asked)
    pairs = zip(answers, asked, strict=True)
    return all_right(
        [max(float(one.hit), exact_match(one.text, _right(one, row))) for one, row in pairs], _groups(asked)
    )


def _f1_counts(predictions: Sequence[str], targets: Sequence[str], labels: Sequence[str]) -> Ratios:
    """Return 2 x true positives over predicted plus right, per row and label."""
    import numpy as np

    said, right = ([[float(text == label) for label in labels] for text in texts] for texts in (predictions, targets))
    one, other = (np.array(rows, dtype=np.float64).reshape(len(predictions), len(labels)) for rows in (said, right))
    return Ratios(2 * one * other, one + other)


def _word_f1(words: Sequence[str], right: Sequence[str]) -> float:
    common = sum((Counter(words) & Counter(right)).values())
    return 2 * common / (len(words) + len(right)) if common else float(not words and not right)


def _ranks(answers: Sequence[Answer]) -> list[int]:
    return [answer.rank or 0 for answer in answers]


def _texts(answers: Sequence[Answer]) -> list[str]:
    return [answer.text if answer.known else "" for answer in answers]


def _right(answer: Answer, asked: Asked) -> Sequence[str]:
    return asked.right if answer.known else ()


def _targets(asked: Sequence[Asked]) -> list[str]:
    return [row.record[TARGET_FIELD].strip() for row in asked]


def _groups(asked: Sequence[Asked]) -> list[str]:
    return [f"row {at}" if row.group is None else f"group {row.group}" for at, row in enumerate(asked)]


# Share of answers that are right, chosen from a closed set, and written.
ACCURACY, EXACT_MATCH = "accuracy", "exact_match"
POSITIVE = "true"  # the label whose F1 over all answers is MultiRC's F1a

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("p_at_1", "P@1", _hits, in_task_files=False, by_default=True, primary=True),
        Metric(
            "p_at_10",
            "P@10",
            lambda answers, _: precision_at(10, _ranks(answers)),
            in_task_files=False,
            by_default=True,
            needs_ranks=True,
            only_in_report=True,
        ),
        Metric(
            "mrr",
            "MRR",
            lambda answers, _: reciprocal_ranks(_ranks(answers)),
            in_task_files=False,
            by_default=True,
            needs_ranks=True,
        ),
        Metric(ACCURACY, "accuracy", _hits),
        Metric(
            "macro_f1",
            "macro F1",
            lambda answers, asked: grouped(macro_f1(_texts(answers), _targets(asked)), _groups(asked)),
        ),
        Metric(
            "f1a",
            "F1a",
            lambda answers, asked: f1_of(POSITIVE, _texts(answers), _targets(asked), _groups(asked)),
            needs_label=POSITIVE,
        ),
        Metric(
            "f1",
            "F1",
            lambda answers, asked: [
                word_f1(one.text, _right(one, row)) for one, row in zip(answers, asked, strict=True)
            ],
        ),
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
LOWER_IS_BETTER = ("invented",)


def score_values(
    answers: Sequence[Answer], questions: Sequence[Asked] | None = None, metrics: Sequence[str] = ()
) -> dict[str, Values]:
    """Return score -> values of N answers; ``metrics`` of the task's own need the N questions, and a TaskError names an
    unknown one. Without ``metrics``, the default ones count, as far as the answers are ranked.
    """
    if not metrics or questions is None:
        is_ranked = all(answer.rank is not None for answer in answers)
        default = [one for one in METRICS.values() if one.by_default and (is_ranked or not one.needs_ranks)]
        return {one.name: one.compute(answers, ()) for one in default}
    for name in metrics:
        if name not in TASK_METRICS:
            raise TaskError(f"unknown metric '{name}'; known: {', '.join(TASK_METRICS)}")
    found = {name: METRICS[name].compute(answers, questions) for name in metrics}
    groups = _groups(questions)
    size = len(set(groups))
    if size < len(groups):
        # All of a task's scores are over groups if one is, so that a resample of groups is one of all of them.
        found = {
            name: values if isinstance(values, Ratios) or len(values) == size else grouped(values, groups)
            for name, values in found.items()
        }
    return {TASK_SCORE: blend(list(found.values())), **found}


def called(score: str) -> str:
    """Return the name of a score in tables."""
    return METRICS[score].shown_as if score in METRICS else score.replace("_", " ")


def most_of(score: str) -> float:
    """Return the most that a score can be."""
    return 100.0 if score in UP_TO_100 else 1.0


def best_of(score: str, values: Iterable[float]) -> float:
    """Return the best of the values of a score."""
    return min(values) if score in LOWER_IS_BETTER else max(values)


def in_order(scores: Iterable[str]) -> list[str]:
    """Return names of scores, each once, in the order of tables; those of texts last, as they are given."""
    present = dict.fromkeys(scores)
    return [name for name in SCORES if name in present] + [name for name in present if name not in SCORES]


def primary(scores: Iterable[str]) -> str:
    """Return the score to show where there is room for one: a task's own, else a primary metric, else the first."""
    present = list(scores)
    chosen = (name for name in SCORES if name in present and (name == TASK_SCORE or METRICS[name].primary))
    return next(chosen, present[0] if present else TASK_SCORE)
