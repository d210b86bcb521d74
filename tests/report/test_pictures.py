"""The pictures of a report."""

from __future__ import annotations

from ptuning.report.pictures import mean_curve


def test_a_stopped_training_stays_in_the_mean() -> None:
    trainings = [[(0, 0.1), (1, 0.3), (2, 0.5)], [(1, 0.1), (2, 0.2), (3, 0.4)]]
    assert [(epoch, round(value, 9)) for epoch, value in mean_curve(trainings)] == [(1, 0.2), (2, 0.35), (3, 0.45)]
