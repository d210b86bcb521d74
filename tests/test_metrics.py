"""Scores against scipy and numbers worked out by hand."""

from __future__ import annotations

import math
import random
import tracemalloc

import pytest
from scipy import stats

from ptuning.metrics import Score, majority, precision_at, ranks, reciprocal_ranks, score


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


def test_one_value_or_equal_values_have_no_interval_to_show() -> None:
    assert score([0.5]) == Score(0.5, 0.5, 0.5, 1)
    assert score([0.5, 0.5]) == Score(0.5, 0.5, 0.5, 2)
    assert score([0.5, 0.5]).to_json() == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 2}


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


@pytest.mark.parametrize(
    ("row", "gold", "rank"),
    [
        ([0.1, 0.9, 0.5], 1, 1),
        ([0.1, 0.9, 0.5], 2, 2),
        ([0.1, 0.9, 0.5], 0, 3),
        ([0.5, 0.5, 0.1], 0, 2),
        ([0.5, 0.5, 0.5], 1, 3),
        ([-math.inf, -math.inf], 0, 2),
        ([0.3], 0, 1),
        # What is no number is never in one's favour.
        ([math.nan, math.nan, math.nan], 1, 3),
        ([0.1, math.nan, 0.2], 1, 3),
        ([0.9, math.nan, 0.2], 0, 2),
    ],
)
def test_equal_scores_rank_behind(row: list[float], gold: int, rank: int) -> None:
    assert ranks([row], [gold]) == [rank]


def test_ranks_match_scipy_where_nothing_is_equal() -> None:
    draw = random.Random(0)
    rows = [[draw.random() for _ in range(9)] for _ in range(20)]
    gold = [draw.randrange(9) for _ in rows]
    expected = [int(stats.rankdata([-value for value in row])[right]) for row, right in zip(rows, gold, strict=True)]
    assert ranks(rows, gold) == expected


def test_precision_and_reciprocal_ranks() -> None:
    assert precision_at(1, [1, 2, 10, 11]) == [1.0, 0.0, 0.0, 0.0]
    assert precision_at(10, [1, 2, 10, 11]) == [1.0, 1.0, 1.0, 0.0]
    assert reciprocal_ranks([1, 2, 4]) == [1.0, 0.5, 0.25]
    assert score(reciprocal_ranks([1, 2, 4])).value == pytest.approx(7 / 12)


def test_the_majority_of_a_tie_is_the_first_in_the_alphabet() -> None:
    assert majority(["b", "c", "b", "c", "a"]) == "b"
    assert majority(["c", "b", "c", "b", "a"]) == "b"
    assert majority(["b", "a", "b"]) == "b"
    with pytest.raises(ValueError, match="at least one target"):
        majority([])
