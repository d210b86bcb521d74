"""What a report says that its run cannot show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.report.conftest import change, page_of

pytestmark = pytest.mark.usefixtures("undrawn")


def one_seed(results: dict[str, Any]) -> None:
    results["cells"] = [cell for cell in results["cells"] if cell["seed"] == 0]


def no_control(results: dict[str, Any]) -> None:
    del results["macro"]["p-tuning@random-weights"]


def unrestricted(results: dict[str, Any]) -> None:
    del results["macro"]["manual-restricted"]


def few_rows(results: dict[str, Any]) -> None:
    for scores in results["tasks"]["P36"].values():
        for one in scores.values():
            one["n"] = 40


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (one_seed, "Every method ran with one seed"),
        (no_control, "There is no control with random weights for p-tuning:"),
        (unrestricted, "Without manual-restricted, part of the gain of a learned prompt may be this form"),
        (few_rows, "Fewer than 100 test facts in 1 task (P36 (capital))"),
        (lambda found: found["differences"].clear(), "The difference p-tuning − manual has no paired test"),
        (lambda found: found["macro"].pop("p-tuning"), "A written or a learned prompt is missing"),
        (lambda found: found["cells"][0].update(status="failed"), "1 run of 30 failed or did not run yet"),
        (lambda found: found["cells"][0].update(run="cells/gone"), "The files of 1 finished run are missing"),
    ],
)
def test_it_says_what_the_run_cannot_show(lama: Path, edit: Callable[[dict[str, Any]], object], said: str) -> None:
    assert said not in page_of(lama).text
    change(lama, edit)
    assert said in page_of(lama).text


def test_what_no_run_can_show(lama: Path) -> None:
    text = page_of(lama).text
    for said in (
        "The backbone's pretraining text may contain the test facts",
        "There is one backbone (smollm2-135m)",
        "12 rows were dropped",
        "A mean over 3 tasks says little",
        "at most 2 seeds",
        "Methods tried different numbers of settings",
        "manual-restricted, which ranks the task's answers only, is the fairer comparison",
    ):
        assert said in text
