"""Scores and their intervals, over plain lists of numbers. Knows nothing of models or records."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
BOOTSTRAP_RESAMPLES = 10_000
# Values drawn at a time: all resamples of 10,000 rows together would take gigabytes.
BOOTSTRAP_BATCH_VALUES = 2_000_000
# With fewer values than these the percentiles of a bootstrap lie too close: of intervals that should hold the mean in
# 95 cases of 100, those over 3 values do in 75 and those over 8 in 88. Source: docs/decisions.md, decision 15.
FEW_VALUES = 30
# What a score, and what a difference of two, cannot lie beyond.
SCORE_BOUNDS, DIFFERENCE_BOUNDS = (0.0, 1.0), (-1.0, 1.0)


@dataclass(frozen=True)
class Score:
    """A mean over rows with its 95 % interval; all values are fractions in [0, 1] unless the metric says otherwise."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | int]:
        """Return the score as it stands in ``run.json``."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


@dataclass(frozen=True, eq=False)
class Ratios:
    """A score that is no mean over rows: the mean over K classes of a ratio of sums over G rows, as F1 is.

    Args:
        over: (G, K) numerators, added up over the rows.
        under: (G, K) denominators; a class in which they add up to nothing is left out.
    """

    over: np.ndarray
    under: np.ndarray


@dataclass(frozen=True, eq=False)
class Blend:
    """The mean of several scores of the same rows, for a task that counts two of them as one."""

    parts: Sequence[Sequence[float] | Ratios]


# What a score is computed from: a value per row, whose mean it is, or sums over rows. A row is a record, or several
# that are scored together.
Values = Sequence[float] | Ratios | Blend


def rows_of(values: Values) -> int:
    """Return how many rows a score is over."""
    if isinstance(values, Blend):
        return rows_of(values.parts[0])
    return len(values.over) if isinstance(values, Ratios) else len(values)


def value_of(values: Values) -> float:
    """Return a score.

    Raises:
        ValueError: If there are no rows.
    """
    if isinstance(values, Ratios | Blend):
        if not rows_of(values):
            raise ValueError("a score needs at least one row")
        return float(_over(values, np.ones((1, rows_of(values))))[0])
    return sum(values) / len(_array(values))


def summary(seeds: Sequence[Values]) -> Score:
    """Return the mean of a score over trainings, with a 95 % interval over the rows that all of them answered."""
    if not any(isinstance(values, Ratios | Blend) for values in seeds):
        return score(np.array(seeds).mean(axis=0).tolist())
    return _resampled(
        lambda weights: np.mean([_over(values, weights) for values in seeds], axis=0), rows_of(seeds[0]), SCORE_BOUNDS
    )


def difference(left: Sequence[Values], right: Sequence[Values]) -> Score:
    """Return how far two methods' scores lie apart on the same rows, each a mean over its trainings, with the 95 %
    interval of their paired difference.
    """
    if not any(isinstance(values, Ratios | Blend) for values in (*left, *right)):
        return mean_difference((np.array(left).mean(axis=0) - np.array(right).mean(axis=0)).tolist())

    def apart(weights: np.ndarray) -> np.ndarray:
        means = [np.mean([_over(values, weights) for values in seeds], axis=0) for seeds in (left, right)]
        found: np.ndarray = means[0] - means[1]
        return found

    return _resampled(apart, rows_of(left[0]), DIFFERENCE_BOUNDS)


def blend(parts: Sequence[Sequence[float] | Ratios]) -> Values:
    """Return the mean of scores of the same rows as one score."""
    if len(parts) == 1:
        return parts[0]
    plain = [part for part in parts if not isinstance(part, Ratios)]
    return np.mean(plain, axis=0).tolist() if len(plain) == len(parts) else Blend(tuple(parts))


def _over(values: Values, weights: np.ndarray) -> np.ndarray:
    """Return the score of each of R resamples, given by how often every row is in them: (R, G) to (R,)."""
    if isinstance(values, Blend):
        mean: np.ndarray = np.mean([_over(part, weights) for part in values.parts], axis=0)
        return mean
    if not isinstance(values, Ratios):
        found: np.ndarray = weights @ _array(values) / weights.sum(axis=1)
        return found
    over, under = weights @ values.over, weights @ values.under  # (R, K)
    ratios = np.divide(over, under, out=np.zeros_like(over, dtype=np.float64), where=under > 0)
    kept: np.ndarray = ratios.sum(axis=1) / np.maximum(1, (under > 0).sum(axis=1))
    return kept


def _resampled(
    compute: Callable[[np.ndarray], np.ndarray], rows: int, bounds: tuple[float, float], *, seed: int = 0
) -> Score:
    """Return a score with the interval of its bootstrap over rows: percentiles, or, over few rows, Student's with the
    bootstrap's standard error.
    """
    value = float(compute(np.ones((1, rows)))[0])
    rng = np.random.default_rng(seed)
    found: list[float] = []
    while len(found) < BOOTSTRAP_RESAMPLES:
        count = min(max(1, BOOTSTRAP_BATCH_VALUES // rows), BOOTSTRAP_RESAMPLES - len(found))
        found += compute(rng.multinomial(rows, np.full(rows, 1 / rows), size=count).astype(np.float64)).tolist()
    if 1 < rows < FEW_VALUES:
        return _students(value, float(np.std(found)) * (rows / (rows - 1)) ** 0.5, rows, bounds)
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Score(value, min(value, float(low)), max(value, float(high)), rows)


def _students(mean: float, error: float, n: int, bounds: tuple[float, float]) -> Score:
    """Return a mean with Student's interval from its standard error."""
    from scipy import stats

    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    return Score(mean, max(mean - half, min(mean, bounds[0])), min(mean + half, max(mean, bounds[1])), n)


def score(values: Sequence[float], *, seed: int = 0) -> Score:
    """Return the mean of per-row values with a 95 % interval.

    A row of zeros and ones is a proportion and gets Wilson's interval, which stays honest at 0 of 20, where a
    bootstrap would claim certainty. Anything else gets that of :func:`mean_score`.

    Args:
        values: One value per row, at least one.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If ``values`` is empty.

    Source: Wilson (1927), through ``scipy.stats``.
    """
    from scipy import stats  # loading scipy.stats costs half a second that only scoring should pay

    array = _array(values)
    if not np.isin(array, (0.0, 1.0)).all():
        return mean_score(values, seed=seed)
    interval = stats.binomtest(int(array.sum()), len(array)).proportion_ci(CONFIDENCE, method="wilson")
    return Score(float(array.mean()), float(interval.low), float(interval.high), len(array))


def mean_score(values: Sequence[float], *, seed: int = 0) -> Score:
    """Return the mean of scores that are no zeros and ones, such as a mean over relations, with a 95 % interval:
    percentiles of a bootstrap over them, or Student's where they are fewer than :data:`FEW_VALUES`.

    Args:
        values: At least one; a single one, or equal ones, have no interval.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If ``values`` is empty.

    Sources: Efron and Tibshirani (1993) and Student (1908), through ``scipy.stats``.
    """
    return _mean(values, SCORE_BOUNDS, seed)


def mean_difference(values: Sequence[float], *, seed: int = 0) -> Score:
    """Return the mean of differences between two methods on the same rows, or tasks, with the interval of
    :func:`mean_score`.
    """
    return _mean(values, DIFFERENCE_BOUNDS, seed)


def _mean(values: Sequence[float], bounds: tuple[float, float], seed: int) -> Score:
    from scipy import stats

    array = _array(values)
    mean = float(array.mean())
    if len(array) == 1 or np.ptp(array) == 0.0:
        return Score(mean, mean, mean, len(array))
    if len(array) < FEW_VALUES:
        return _students(mean, float(array.std(ddof=1)) / len(array) ** 0.5, len(array), bounds)
    found = stats.bootstrap(
        (array,),
        np.mean,
        n_resamples=BOOTSTRAP_RESAMPLES,
        batch=max(1, BOOTSTRAP_BATCH_VALUES // len(array)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Score(mean, float(found.low), float(found.high), len(array))


def _array(values: Sequence[float]) -> np.ndarray:
    if not values:
        raise ValueError("a score needs at least one value")
    return np.asarray(values, dtype=np.float64)


def precision_at(k: int, rank_list: Sequence[int]) -> list[float]:
    """Return 1.0 for each rank within the first ``k`` (P@k per row); rank 0 is that of what is not among the answers.

    Source: Petroni et al. (2019), LAMA, section 4.
    """
    return [float(0 < rank <= k) for rank in rank_list]


def reciprocal_ranks(rank_list: Sequence[int]) -> list[float]:
    """Return 1 / rank per row, 0 for rank 0; their mean is the MRR."""
    return [1.0 / rank if rank else 0.0 for rank in rank_list]


def majority(targets: Sequence[str]) -> str:
    """Return the most frequent target; of equally frequent ones the first in alphabetical order.

    Raises:
        ValueError: If ``targets`` is empty.
    """
    if not targets:
        raise ValueError("a majority needs at least one target")
    return min(Counter(targets).items(), key=lambda pair: (-pair[1], pair[0]))[0]


def macro_f1(predictions: Sequence[str], targets: Sequence[str]) -> Ratios:
    """Return the F1 of every label that is predicted or right somewhere; their mean is the macro F1.

    Source: Wang et al. (2019), SuperGLUE, section 3 (CB).
    """
    labels = sorted({*predictions, *targets})
    return _f1_counts(predictions, targets, labels)


def f1_of(label: str, predictions: Sequence[str], targets: Sequence[str], groups: Sequence[str]) -> Ratios:
    """Return the F1 of one label over all rows, those of a group added up to one (F1a, with answers as rows and
    questions as groups: the answers to one question are no independent draws).

    Source: Khashabi et al. (2018), MultiRC, section 4.1.
    """
    return grouped(_f1_counts(predictions, targets, [label]), groups)


def grouped(values: Sequence[float] | Ratios, groups: Sequence[str]) -> Ratios:
    """Return a score with the rows of each group as one row, in order of appearance: the same score with the interval
    of a bootstrap over groups.
    """
    if not isinstance(values, Ratios):
        values = Ratios(_array(values)[:, None], np.ones((len(values), 1)))
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    at = [numbers[group] for group in groups]
    over, under = np.zeros((len(numbers), values.over.shape[1])), np.zeros((len(numbers), values.under.shape[1]))
    np.add.at(over, at, values.over)
    np.add.at(under, at, values.under)
    return Ratios(over, under)


def all_right(hits: Sequence[float], groups: Sequence[str]) -> list[float]:
    """Return 1.0 for each group, in order of appearance, that holds no miss (MultiRC's exact match)."""
    found: dict[str, float] = {}
    for hit, group in zip(hits, groups, strict=True):
        found[group] = min(hit, found.get(group, 1.0))
    return list(found.values())


def normalised(text: str) -> str:
    """Return a text in lower case without punctuation, articles and extra spaces.

    Source: Rajpurkar et al. (2016), SQuAD, section 6.1.

    Example:
        >>> normalised("The  U.S. Senate,")
        'us senate'
    """
    bare = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def word_f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the F1 of a prediction's words against those of the right answer that is closest to it.

    Source: Zhang et al. (2018), ReCoRD, section 5.1.
    """
    return max((_word_f1(normalised(prediction).split(), normalised(one).split()) for one in answers), default=0.0)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 if a prediction is one of the right answers, both :func:`normalised`.

    Source: Zhang et al. (2018), ReCoRD, section 5.1.
    """
    return float(normalised(prediction) in map(normalised, answers))


def correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return Spearman's rank correlation; None where one side has a single value only.

    Source: Spearman (1904), through ``scipy.stats``.
    """
    from scipy import stats

    if any(len(set(side)) < 2 for side in zip(*pairs, strict=True)) or not pairs:
        return None
    left, right = zip(*pairs, strict=True)
    return float(stats.spearmanr(left, right).statistic)


def _f1_counts(predictions: Sequence[str], targets: Sequence[str], labels: Sequence[str]) -> Ratios:
    """Return 2 x true positives over predicted plus right, per row and label."""
    said, right = ([[float(text == label) for label in labels] for text in texts] for texts in (predictions, targets))
    one, other = (np.array(rows, dtype=np.float64).reshape(len(predictions), len(labels)) for rows in (said, right))
    return Ratios(2 * one * other, one + other)


def _word_f1(words: Sequence[str], right: Sequence[str]) -> float:
    common = sum((Counter(words) & Counter(right)).values())
    return 2 * common / (len(words) + len(right)) if common else float(not words and not right)
