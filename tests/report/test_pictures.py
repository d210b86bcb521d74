"""The pictures of a report."""

from __future__ import annotations

import re

from ptuning.report.pictures import curves, mean_curve


def test_a_stopped_training_stays_in_the_mean() -> None:
    trainings = [[(0, 0.1), (1, 0.3), (2, 0.5)], [(1, 0.1), (2, 0.2), (3, 0.4)]]
    assert [(epoch, round(value, 9)) for epoch, value in mean_curve(trainings)] == [(1, 0.2), (2, 0.35), (3, 0.45)]


def test_the_lowest_panel_of_each_column_names_the_epochs() -> None:
    """Of three panels in two columns, that is the second, too."""
    curve = [(epoch, 0.5) for epoch in range(7)]
    drawn = curves({name: [curve] for name in ("one", "two", "three")}, name="curves")
    assert len(re.findall(r">\s*6\s*</text>", drawn)) == 2
