"""Scores with confidence intervals (Wilson, Student, bootstrap) and paired differences, over plain numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np  # loaded by the functions that need it: it takes longer than the whole command line

CONFIDENCE = 0.95
QUANTILE = 1.959963984540054  # of the normal distribution, at (1 + CONFIDENCE) / 2
BOOTSTRAP_RESAMPLES = 10_000
# Values drawn at a time: all resamples of 10,000 rows together would take gigabytes.
BOOTSTRAP_BATCH_VALUES = 2_000_000
# With fewer values, percentile intervals of a bootstrap are too narrow: of intervals that should hold the mean in 95
# cases of 100, those over 3 values do in 75 and those over 8 in 88. Source: docs/decisions.md, decision 15.
FEW_VALUES = 30
FEWEST_PAIRS = 5  # of a rank correlation: two pairs always have 1 or -1
ROUNDING = 1e-9  # differences below this are those of sums of fractions
SCORE_BOUNDS = (0.0, 1.0)


@dataclass(frozen=True)
class Score:
    """A mean over rows with its 95 % interval; all values are fractions in [0, 1] unless the metric says otherwise."""

    value: float
    low: float
    high: float
    n: int

    @property
    def has_interval(self) -> bool:
        """Whether its interval says anything: values that are all equal, or a single one, show no spread."""
        return self.high - self.low > ROUNDING

    def to_json(self) -> dict[str, float | int]:
        """Return the score as ``run.json`` holds it."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


@dataclass(frozen=True, eq=False)
class Ratios:
    """The mean over K classes of a ratio of sums over G rows (F1): ``over`` are the (G, K) numerators, ``under`` the
    (G, K) denominators. Classes whose denominators sum to 0 are left out.
    """

    over: np.ndarray
    under: np.ndarray


@dataclass(frozen=True, eq=False)
class Sums:
    """A score of sums over G rows (BLEU): ``of`` makes it of K sums, and ``totals`` are what each row adds, (G, K)."""

    totals: np.ndarray
    of: Callable[[list[float]], float]


@dataclass(frozen=True, eq=False)
class Blend:
    """The mean of several scores of the same rows, for a task that counts two of them as one."""

    parts: Sequence[Sequence[float] | Ratios]


# Everything that a score can be computed from: a value per row, whose mean it is, or sums over rows. A row is a record,
# or several that are scored together.
Values = Sequence[float] | Ratios | Sums | Blend


def rows_of(values: Values) -> int:
    """Return the number of rows of a score."""
    if isinstance(values, Blend):
        return rows_of(values.parts[0])
    if isinstance(values, Sums):
        return len(values.totals)
    return len(values.over) if isinstance(values, Ratios) else len(values)


def value_of(values: Values) -> float:
    """Return a score; raise a ValueError if there are no rows."""
    if isinstance(values, Ratios | Sums | Blend):
        import numpy as np

        if not rows_of(values):
            raise ValueError("a score needs at least one row")
        return float(_over(values, np.ones((1, rows_of(values))))[0])
    return sum(values) / len(_array(values))


def summary(seeds: Sequence[Values], *, most: float = SCORE_BOUNDS[1]) -> Score:
    """Return a score's mean over trainings, with a 95 % interval over the rows that all of them answered. The score
    lies between 0 and ``most``.
    """
    import numpy as np

    if not any(isinstance(values, Ratios | Sums | Blend) for values in seeds):
        values = np.array(seeds).mean(axis=0).tolist()
        return score(values) if most == SCORE_BOUNDS[1] else mean_score(values, bounds=(0.0, most))
    return _resampled(
        lambda weights: np.mean([_over(values, weights) for values in seeds], axis=0), rows_of(seeds[0]), (0.0, most)
    )


def difference(left: Sequence[Values], right: Sequence[Values], *, most: float = SCORE_BOUNDS[1]) -> Score:
    """Return the difference of two methods' mean scores on the same rows, with the 95 % interval of the paired one.
    Scores lie between 0 and ``most``.
    """
    import numpy as np

    if not any(isinstance(values, Ratios | Sums | Blend) for values in (*left, *right)):
        apart_by_row = (np.array(left).mean(axis=0) - np.array(right).mean(axis=0)).tolist()
        return mean_difference(apart_by_row, most=most)

    def apart(weights: np.ndarray) -> np.ndarray:
        means = [np.mean([_over(values, weights) for values in seeds], axis=0) for seeds in (left, right)]
        found: np.ndarray = means[0] - means[1]
        return found

    return _resampled(apart, rows_of(left[0]), (-most, most))


def blend(parts: Sequence[Sequence[float] | Ratios]) -> Values:
    """Return the mean of scores of the same rows as one score."""
    if len(parts) == 1:
        return parts[0]
    import numpy as np

    plain = [part for part in parts if not isinstance(part, Ratios)]
    return np.mean(plain, axis=0).tolist() if len(plain) == len(parts) else Blend(tuple(parts))


def _over(values: Values, weights: np.ndarray) -> np.ndarray:
    """Return the score of each of R resamples, (R, G) counts of every row to (R,) scores."""
    import numpy as np

    if isinstance(values, Blend):
        mean: np.ndarray = np.mean([_over(part, weights) for part in values.parts], axis=0)
        return mean
    if isinstance(values, Sums):
        return np.array([values.of(row) for row in (weights @ values.totals).tolist()])
    if not isinstance(values, Ratios):
        found: np.ndarray = weights @ _array(values) / weights.sum(axis=1)
        return found
    over, under = weights @ values.over, weights @ values.under  # (R, K)
    ratios = np.divide(over, under, out=np.zeros_like(over, dtype=np.float64), where=under > 0)
    kept: np.ndarray = ratios.sum(axis=1) / np.maximum(1, (under > 0).sum(axis=1))
    return kept


def _resampled(compute: Callable[[np.ndarray], np.ndarray], rows: int, bounds: tuple[float, float]) -> Score:
    """Return a score with a bootstrap interval over rows; for few rows, Student's with the bootstrap's error."""
    import numpy as np

    value = float(compute(np.ones((1, rows)))[0])
    rng = np.random.default_rng(0)
    found: list[float] = []
    while len(found) < BOOTSTRAP_RESAMPLES:
        count = min(max(1, BOOTSTRAP_BATCH_VALUES // rows), BOOTSTRAP_RESAMPLES - len(found))
        found += compute(rng.multinomial(rows, np.full(rows, 1 / rows), size=count).astype(np.float64)).tolist()
    if 1 < rows < FEW_VALUES:
        return _students(value, float(np.std(found)) * (rows / (rows - 1)) ** 0.5, rows, bounds)
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Score(value, min(value, float(low)), max(value, float(high)), rows)


def _students(mean: float, error: float, n: int, bounds: tuple[float, float]) -> Score:
    from scipy.special import stdtrit

    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * error
    return Score(mean, max(mean - half, min(mean, bounds[0])), min(mean + half, max(mean, bounds[1])), n)


def score(values: Sequence[float], *, seed: int = 0) -> Score:
    """Return the mean of per-row values with a 95 % interval, Wilson's (1927) for zeros and ones: it is not empty at 0
    of 20, where a bootstrap would be. Others get that of :func:`mean_score`. Without values, raise a ValueError.
    """
    import numpy as np

    array = _array(values)
    if not np.isin(array, (0.0, 1.0)).all():
        return mean_score(values, seed=seed)
    low, high = _wilson(int(array.sum()), len(array))
    return Score(float(array.mean()), low, high, len(array))


def _wilson(hits: int, n: int) -> tuple[float, float]:
    """Return Wilson's interval, as ``scipy.stats.binomtest`` has it, which takes over a second to load.

    Source: Newcombe (1998), method 3.
    """
    share, square = hits / n, QUANTILE**2
    under = 2 * (n + square)
    middle = (2 * n * share + square) / under
    half = QUANTILE / under * (4 * n * share * (1 - share) + square) ** 0.5
    return (0.0 if hits == 0 else middle - half), (1.0 if hits == n else middle + half)


def mean_score(values: Sequence[float], *, bounds: tuple[float, float] = SCORE_BOUNDS, seed: int = 0) -> Score:
    """Return the mean of scores other than zeros and ones, such as a mean over relations, with a 95 % interval:
    percentiles of a seeded bootstrap, or Student's interval for fewer than :data:`FEW_VALUES` values. The interval of a
    single value, or of equal ones, is that value; no values are a ValueError.

    Sources: Efron and Tibshirani (1993) and Student (1908), through ``scipy.stats``.
    """
    import numpy as np

    array = _array(values)
    mean = float(array.mean())
    if len(array) == 1 or np.ptp(array) == 0.0:
        return Score(mean, mean, mean, len(array))
    if len(array) < FEW_VALUES:
        return _students(mean, float(array.std(ddof=1)) / len(array) ** 0.5, len(array), bounds)
    from scipy import stats  # takes over a second to load

    interval = stats.bootstrap(
        (array,),
        np.mean,
        n_resamples=BOOTSTRAP_RESAMPLES,
        batch=max(1, BOOTSTRAP_BATCH_VALUES // len(array)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Score(mean, float(interval.low), float(interval.high), len(array))


def mean_difference(values: Sequence[float], *, most: float = SCORE_BOUNDS[1]) -> Score:
    """Return the mean difference of two methods on the same rows or tasks; the interval is :func:`mean_score`'s."""
    return mean_score(values, bounds=(-most, most))


def _array(values: Sequence[float]) -> np.ndarray:
    import numpy as np

    if not values:
        raise ValueError("a score needs at least one value")
    return np.asarray(values, dtype=np.float64)


def majority(targets: Sequence[str]) -> str:
    """Return the most frequent target, and of equally frequent ones the first in alphabetical order."""
    if not targets:
        raise ValueError("a majority needs at least one target")
    return min(Counter(targets).items(), key=lambda pair: (-pair[1], pair[0]))[0]


def grouped(values: Sequence[float] | Ratios, groups: Sequence[str]) -> Ratios:
    """Merge the rows of each group into one, in order of appearance: the score stays, its interval is over groups."""
    import numpy as np

    if not isinstance(values, Ratios):
        values = Ratios(_array(values)[:, None], np.ones((len(values), 1)))
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    at = [numbers[group] for group in groups]
    over, under = np.zeros((len(numbers), values.over.shape[1])), np.zeros((len(numbers), values.under.shape[1]))
    np.add.at(over, at, values.over)
    np.add.at(under, at, values.under)
    return Ratios(over, under)


def correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return Spearman's (1904) rank correlation; None for fewer than :data:`FEWEST_PAIRS` pairs, or where all values of
    one side are equal.
    """
    from scipy import stats

    if len(pairs) < FEWEST_PAIRS or any(len(set(side)) < 2 for side in zip(*pairs, strict=True)):
        return None
    left, right = zip(*pairs, strict=True)
    return float(stats.spearmanr(left, right).statistic)
