"""The caveats of a report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptuning.report.limits import limits
from ptuning.report.results_file import read_results
from tests.report.conftest import change


def text_of(folder: Path) -> str:
    return "\n".join(limits(read_results(folder)))


def one_seed(results: dict[str, Any]) -> None:
    results["cells"] = [cell for cell in results["cells"] if cell["seed"] == 0]


def few_rows(results: dict[str, Any]) -> None:
    for scores in results["tasks"]["P36"].values():
        for score in scores.values():
            score["n"] = 40


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (one_seed, "one seed"),
        (
            lambda results: results["macro"].pop("p-tuning@random-weights"),
            "no control with random weights for p-tuning:",
        ),
        (lambda results: results["macro"].pop("manual-restricted"), "without manual-restricted"),
        (few_rows, "Fewer than 100 test facts in 1 task (P36 (capital))"),
        (lambda results: results["cells"][0].update(status="failed"), "1 run of 30 failed or did not run yet"),
        (lambda results: results["task_info"]["P17"].update(reported="dev"), "P17: without a validation part"),
    ],
)
def test_caveats_of_a_run(lama: Path, edit: Callable[[dict[str, Any]], object], part: str) -> None:
    assert part not in text_of(lama)
    change(lama, edit)
    assert part in text_of(lama)


def test_caveats_of_every_run(lama: Path) -> None:
    text = text_of(lama)
    for part in (
        "pretraining text may contain the test facts", "one backbone (smollm2-135m)", "12 rows were dropped",
        "A mean over 3 tasks", "at most 2 seeds", "different numbers of settings", "manual-restricted, which ranks",
    ):  # fmt: skip
        assert part in text
