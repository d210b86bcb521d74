"""Scores against scipy and numbers worked out by hand."""

import math
import random
import sys
import tracemalloc
from collections.abc import Sequence

import pytest
import scipy
from scipy import stats

from ptuning.metrics import f1_counts
from ptuning.statistics import (
    QUANTILE,
    Ratios,
    Score,
    blend,
    correlation,
    difference,
    grouped,
    majority,
    mean_difference,
    mean_score,
    rows_of,
    score,
    summary,
    value_of,
)


def macro_f1(texts: Sequence[str], targets: Sequence[str]) -> Ratios:
    return f1_counts(texts, targets, sorted({*texts, *targets}))


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's interval, written out: Wilson (1927)."""
    z = 1.959963984540054
    p = hits / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return middle - half, middle + half


@pytest.mark.parametrize(("hits", "n"), [(0, 20), (20, 20), (1, 3), (7, 20), (311, 1000)])
def test_a_proportion_has_wilsons_interval(hits: int, n: int) -> None:
    found = score([1.0] * hits + [0.0] * (n - hits))
    assert (found.value, found.n) == (hits / n, n)
    assert (found.low, found.high) == pytest.approx(wilson(hits, n), abs=1e-9)
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0


def test_wilsons_interval_is_that_of_scipy_to_the_bit() -> None:
    for n in (1, 2, 3, 7, 20, 141, 1000):
        for hits in {0, 1, n // 3, n // 2, n - 1, n}:
            found, wanted = (
                score([1.0] * hits + [0.0] * (n - hits)),
                stats.binomtest(hits, n).proportion_ci(0.95, "wilson"),
            )
            assert (found.low, found.high) == (wanted.low, wanted.high)
    assert stats.norm.ppf(0.975) == QUANTILE


def test_zeros_and_ones_load_nothing_that_takes_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(scipy, "stats")
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError):
        score([0.1 * number for number in range(100)])
    assert score([1.0, 0.0]).n == 2


def test_no_hit_in_twenty_is_no_certainty() -> None:
    """A bootstrap over twenty zeros would claim the interval [0, 0]."""
    found = score([0.0] * 20)
    assert found.low == 0.0
    assert found.high == pytest.approx(0.1611, abs=1e-4)


def test_other_values_have_a_percentile_bootstrap() -> None:
    draw = random.Random(0)
    values = [draw.gauss(0.4, 0.1) for _ in range(200)]
    found = score(values, seed=1)
    error = 1.96 * stats.tstd(values) / math.sqrt(200)
    assert found.value == pytest.approx(sum(values) / 200)
    assert found.low == pytest.approx(found.value - error, abs=0.1 * error)
    assert found.high == pytest.approx(found.value + error, abs=0.1 * error)
    assert score(values, seed=1) == found
    assert score(values, seed=2) != found


def test_a_mean_of_few_values_has_students_interval() -> None:
    """Percentiles of a bootstrap over 3 values hold the mean in 75 of 100 cases."""
    values = [0.2, 0.5, 0.4, 0.45]
    low, high = stats.t.interval(0.95, 3, loc=0.3875, scale=stats.sem(values))
    found = mean_score(values)
    assert (found.value, found.low, found.high, found.n) == pytest.approx((0.3875, low, high, 4))
    assert low > 0
    # No score lies beyond 0 and 1, and no difference beyond -1 and 1.
    assert mean_score([0.0, 0.9]) == Score(0.45, 0.0, 1.0, 2)
    assert mean_difference([0.1, 0.3]).low < 0
    assert mean_difference([0.0, 0.9]) == Score(0.45, -1.0, 1.0, 2)


def test_students_interval_holds_the_mean_as_often_as_it_says() -> None:
    draw = random.Random(5)
    held = 0
    for _ in range(400):
        found = mean_score([draw.gauss(0.5, 0.05) for _ in range(5)])
        held += found.low <= 0.5 <= found.high
    assert 0.92 <= held / 400 <= 0.98


def test_one_value_or_equal_values_have_no_interval_to_show() -> None:
    assert score([0.5]) == Score(0.5, 0.5, 0.5, 1)
    assert score([0.5, 0.5]) == Score(0.5, 0.5, 0.5, 2)
    assert score([0.5, 0.5]).to_json() == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 2}
    assert not score([0.5, 0.5]).has_interval
    assert not mean_difference([0.1 + 0.2, 0.3]).has_interval  # equal but for rounding
    assert score([0.5, 0.6]).has_interval
    assert score([0.0, 0.0]).has_interval  # Wilson's


def test_a_bootstrap_over_many_rows_fits_into_memory() -> None:
    """All resamples of 3,000 rows at once would take half a gigabyte, and of 100,000 more than there is."""
    tracemalloc.start()
    score([0.5, 0.25, 1.0] * 1000)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1e8


def test_a_score_needs_a_value() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        score([])


def test_the_majority_of_a_tie_is_the_first_in_the_alphabet() -> None:
    assert majority(["b", "c", "b", "c", "a"]) == "b"
    assert majority(["c", "b", "c", "b", "a"]) == "b"
    assert majority(["b", "a", "b"]) == "b"
    with pytest.raises(ValueError, match="at least one target"):
        majority([])


# Ten rows of three labels, worked out by hand: label a 2 of (3 said, 3 right), b 2 of (4, 3), c 2 of (3, 4).
SAID = list("aaabbbbccc")
RIGHT = list("aacbbcabcc")


def test_the_interval_of_grouped_rows_is_over_groups() -> None:
    """Ten rows that agree within each of two groups are two draws, not ten."""
    hits, groups = [1.0] * 5 + [0.0] * 5, ["a"] * 5 + ["b"] * 5
    found = summary([grouped(hits, groups)])
    assert (found.value, found.low, found.high, found.n) == (0.5, 0.0, 1.0, 2)
    alone = summary([grouped(hits, [str(at) for at in range(10)])])
    assert 0.1 < alone.low < 0.5 < alone.high < 0.9


def test_rows_of_many_groups_take_memory_by_the_row() -> None:
    """A table of groups by rows took eight gigabytes for these."""
    rows = 32_000
    tracemalloc.start()
    found = grouped([1.0] * rows, [str(number) for number in range(rows)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.over.shape == (rows, 1)
    assert peak < 1e8


@pytest.mark.parametrize("size", [5, 40])
def test_the_interval_of_ratios_is_the_usual_one(size: int) -> None:
    """With one row per group and a denominator of one, it is that of a plain mean."""
    draw = random.Random(3)
    values = [draw.random() for _ in range(size)]
    plain = mean_score(values)
    found = summary([grouped(values, [str(at) for at in range(size)])])
    assert found.value == pytest.approx(plain.value)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=0.01)


def test_two_scores_that_count_as_one() -> None:
    assert blend([[1.0, 0.0], [0.5, 0.5]]) == [0.75, 0.25]
    plain = [1.0, 0.0, 1.0]
    assert blend([plain]) is plain
    both = blend([[float(one == other) for one, other in zip(SAID, RIGHT, strict=True)], macro_f1(SAID, RIGHT)])
    macro = value_of(macro_f1(SAID, RIGHT))
    assert value_of(both) == pytest.approx((0.6 + macro) / 2)
    assert rows_of(both) == 10


def test_means_over_trainings_and_differences_are_paired() -> None:
    worse = ["a"] * 10
    one, other = macro_f1(SAID, RIGHT), macro_f1(worse, RIGHT)
    mean = summary([one, other])
    assert mean.value == pytest.approx((value_of(one) + value_of(other)) / 2)
    assert mean.low <= mean.value <= mean.high
    gap = difference([one], [other])
    assert gap.value == pytest.approx(value_of(one) - value_of(other))
    assert gap.low > 0  # on the same rows
    same = difference([one], [one])
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    # Plain values are what they were: a mean per row, and the interval of it.
    assert summary([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]) == mean_score([1.0, 0.5, 0.0])
    assert difference([[1.0, 1.0]], [[0.0, 1.0]]) == mean_difference([1.0, 0.0])


def test_a_score_of_no_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        value_of(macro_f1([], []))
    with pytest.raises(ValueError, match="at least one"):
        value_of([])


def test_rank_correlation() -> None:
    assert correlation([(0.1, 1.0), (0.2, 3.0), (0.3, 4.0), (0.8, 5.0), (0.9, 9.0)]) == pytest.approx(1.0)
    assert correlation([(1, 2), (2, 1), (3, 3), (4, 4), (5, 5)]) == pytest.approx(0.9)
    assert correlation([(1, 2), (2, 1), (3, 3), (4, 4)]) is None  # of two pairs it would always be 1 or -1
    assert correlation([(1, number) for number in range(9)]) is None
    assert correlation([]) is None
