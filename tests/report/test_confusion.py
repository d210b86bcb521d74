"""Confusion matrices in the report: counted from the answers of the cells, where a task has labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ptuning.files import write_json_lines
from ptuning.metrics import Confusion
from ptuning.report.blocks import Picture
from ptuning.report.confusion import confusions, section
from ptuning.report.results_file import read_results
from ptuning.report.write import write_report
from tests.report.conftest import change, headings

LABELS = ["billing", "shipping"]
# Target and answer of each row, for the learned prompt; the others answer everything with "billing".
ANSWERS = [("billing", "billing"), ("billing", "shipping"), ("shipping", "shipping")]


@pytest.fixture
def labelled(compare: Path) -> Path:
    """The comparison of one task, as if it had labels; two seeds."""

    def name_labels(results: dict[str, Any]) -> None:
        results["task_info"]["P36"]["labels"] = LABELS

    change(compare, name_labels)
    for path in compare.glob("cells/P36/*/*/predictions.jsonl"):
        learned = path.parts[-3] == "p-tuning"
        given = [(target, answer if learned else "billing") for target, answer in ANSWERS]
        write_json_lines(
            path,
            [
                {"record": {"x": f"{at}", "y": target}, "target": target, "prediction": answer, "rank": None,
                 "hit": target == answer, "log_prob": -0.5}
                for at, (target, answer) in enumerate(given)
            ],
        )  # fmt: skip
    return compare


def test_counts_are_sums_over_seeds(labelled: Path) -> None:
    results = read_results(labelled)
    found = confusions(results, "P36")
    seeds = len(results.done("p-tuning", "P36"))
    assert seeds == 2
    assert found["p-tuning"] == Confusion(tuple(LABELS), ((seeds, seeds), (0, seeds)))
    assert found["manual"].counts[1] == (len(results.done("manual", "P36")), 0)
    assert not [method for method in found if method == "majority" or method.endswith("@random-weights")]


def test_the_picture_stands_in_the_report_and_says_what_it_shows(labelled: Path) -> None:
    assert "Confusion matrix" in headings(labelled)
    (picture,) = section(read_results(labelled))
    assert isinstance(picture, Picture)
    assert "Counts are sums over 2 seeds" in picture.caption
    assert "p-tuning: billing predicted as shipping 2 times" in picture.alt
    write_report(labelled)
    assert (labelled / "pictures" / "confusion-1.svg").is_file()

    def forget(results: dict[str, Any]) -> None:
        del results["task_info"]["P36"]["labels"]

    change(labelled, forget)
    write_report(labelled)
    assert not (labelled / "pictures" / "confusion-1.svg").exists()


def test_without_labels_there_is_no_section(compare: Path) -> None:
    assert section(read_results(compare)) == []
    assert "Confusion matrix" not in headings(compare)
