"""Scores and their intervals, over plain lists of numbers. Knows nothing of models or records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
BOOTSTRAP_RESAMPLES = 10_000
# Values drawn at a time: all resamples of 10,000 rows together would take gigabytes.
BOOTSTRAP_BATCH_VALUES = 2_000_000


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


def score(values: Sequence[float], *, seed: int = 0) -> Score:
    """Return the mean of per-row values with a 95 % interval.

    A row of zeros and ones is a proportion and gets Wilson's interval, which stays honest at 0 of 20, where a
    bootstrap would claim certainty. Anything else gets :func:`bootstrap`.

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
        return bootstrap(values, seed=seed)
    interval = stats.binomtest(int(array.sum()), len(array)).proportion_ci(CONFIDENCE, method="wilson")
    return Score(float(array.mean()), float(interval.low), float(interval.high), len(array))


def bootstrap(values: Sequence[float], *, seed: int = 0) -> Score:
    """Return the mean of values with a 95 % percentile bootstrap over them: for means that are no proportions, such as
    a mean over relations, or of differences between two methods on the same ones (a paired bootstrap).

    Raises:
        ValueError: If ``values`` is empty.

    Source: Efron and Tibshirani (1993), through ``scipy.stats``.
    """
    from scipy import stats

    array = _array(values)
    mean = float(array.mean())
    if len(array) == 1 or np.ptp(array) == 0.0:
        return Score(mean, mean, mean, len(array))
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


def ranks(scores: Sequence[Sequence[float]], gold: Sequence[int]) -> list[int]:
    """Return the one-based rank of each row's right candidate; equal scores rank behind (never in one's favour).

    A right candidate whose score is no number ranks last.

    Args:
        scores: One list of candidate scores per row, higher is better.
        gold: Index of the right candidate per row.
    """
    found = []
    for row, right in zip(scores, gold, strict=True):
        # "Not lower" rather than "higher or equal": comparing with a NaN is never true.
        found.append(1 + sum(1 for index, value in enumerate(row) if index != right and not value < row[right]))
    return found


def precision_at(k: int, rank_list: Sequence[int]) -> list[float]:
    """Return 1.0 for each rank within the first ``k`` (P@k per row).

    Source: Petroni et al. (2019), LAMA, section 4.
    """
    return [float(rank <= k) for rank in rank_list]


def reciprocal_ranks(rank_list: Sequence[int]) -> list[float]:
    """Return 1 / rank per row; their mean is the MRR."""
    return [1.0 / rank for rank in rank_list]


def majority(targets: Sequence[str]) -> str:
    """Return the most frequent target; of equally frequent ones the first in alphabetical order.

    Raises:
        ValueError: If ``targets`` is empty.
    """
    if not targets:
        raise ValueError("a majority needs at least one target")
    return min(Counter(targets).items(), key=lambda pair: (-pair[1], pair[0]))[0]
