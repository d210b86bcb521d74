"""The page of a report: its sections and their order, the main result in sentences, confusion matrices, and caveats."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptuning.files import write_json_lines
from ptuning.metrics import Confusion
from ptuning.report import page
from ptuning.report.page import build_page, confusion_pictures, confusions, limits
from ptuning.report.results_file import read_results
from ptuning.report.tables import Picture
from ptuning.report.write import write_report
from tests.report.conftest import change, headings, page_of, save

LABELS = ["billing", "shipping"]
# Target and answer of each row, for the learned prompt; the others answer everything with "billing".
ANSWERS = [("billing", "billing"), ("billing", "shipping"), ("shipping", "shipping")]


def test_the_order_of_the_sections(lama: Path) -> None:
    assert headings(lama) == [
        "Scores", "By type of relation", "Every task", "Manual and learned prompt", "Random-weights control",
        "Differences", "Learning curves", "Answers gained and lost", "Settings", "Limitations",
    ]  # fmt: skip


def test_one_task_has_no_table_of_every_task(compare: Path) -> None:
    assert headings(compare) == [
        "Scores", "Random-weights control", "Differences", "Learning curves", "Answers gained and lost", "Settings",
        "Limitations",
    ]  # fmt: skip
    page = page_of(compare)
    assert "Methods compared: P36 (capital), smollm2-135m" in page.text
    assert "n counts records" in page.text
    assert not (compare / "pictures" / "dots.svg").exists()


@pytest.mark.usefixtures("undrawn")
def test_the_answer_is_made_from_the_numbers(lama: Path) -> None:
    best = read_results(lama).macro["p-tuning"]["p_at_1"]
    answer = build_page(read_results(lama)).answer
    assert answer.startswith(f"Of 5 methods, p-tuning is best: P@1 {100 * best.value:.1f}\N{NO-BREAK SPACE}% (95 % ")
    # Of the best and the next, whichever way round the file has it.
    assert "is +1.0 points (95 % interval −2.0 to +4.0, n = 120); its interval includes zero." in answer
    back = {"p_at_1": {"value": -0.2, "low": -0.3, "high": -0.1, "n": 120}}
    change(lama, lambda results: results["differences"].pop("p-tuning - manual-restricted"))
    assert "The difference" not in build_page(read_results(lama)).answer
    change(lama, lambda results: results["differences"].update({"manual-restricted - p-tuning": back}))
    answer = build_page(read_results(lama)).answer
    assert "+20.0 points (95 % interval +10.0 to +30.0, n = 120); its interval is above zero." in answer
    back["p_at_1"].update(low=-0.2, high=-0.2, n=2)
    change(lama, lambda results: results["differences"].update({"manual-restricted - p-tuning": back}))
    assert build_page(read_results(lama)).answer.endswith("is +20.0 points (no interval, n = 2).")


@pytest.mark.usefixtures("undrawn")
def test_one_type_of_relation_repeats_nothing(lama: Path) -> None:
    def only(n: int) -> None:
        def edit(results: dict[str, Any]) -> None:
            scores = {name: {**score, "n": n} for name, score in results["macro"]["manual"].items()}
            results["by_type"] = {"N-1": {"manual": scores}}

        change(lama, edit)

    only(3)
    assert "By type of relation" not in headings(lama)
    only(2)
    assert "By type of relation" in headings(lama)


@pytest.mark.usefixtures("undrawn")
def test_a_task_of_ones_own_is_no_benchmark(lama: Path) -> None:
    change(lama, lambda results: results.update(suite="superglue"))
    assert "Methods compared on language understanding" in page_of(lama).text
    change(lama, lambda results: [info.update(benchmark=None) for info in results["task_info"].values()])
    assert "Methods compared:" in page_of(lama).text


@pytest.mark.usefixtures("undrawn")
def test_a_report_on_unfinished_work_says_so_first(lama: Path) -> None:
    def undo(results: dict[str, Any]) -> None:
        results["cells"][2] |= {"status": "failed", "error": "no <room> | on disk"}
        results["cells"][7] |= {"status": "waiting", "seconds": 0.0}

    assert "Not complete" not in page_of(lama).text
    change(lama, undo)
    page = page_of(lama)
    warning = "Not complete: of 30 runs, 1 failed and 1 still to run."
    assert page.text.index(warning) < page.text.index("Of 5 methods")
    assert "P36 (capital), manual, seed 0: failed: no <room> | on disk" in page.text
    assert "P36 (capital), p-tuning, seed 1: still to run" in page.text
    assert warning in (lama / "report.md").read_text(encoding="utf-8").split("##")[0]


def test_nothing_finished_and_nothing_optional_still_is_a_report(tmp_path: Path) -> None:
    save(tmp_path, {"format_version": 1, "suite": "lama", "cells": [], "tasks": {}})
    page = page_of(tmp_path)
    assert "No method has finished yet" in page.text
    assert headings(tmp_path) == ["Settings", "Limitations"]


def test_pictures_of_many_rows_have_the_first_and_the_last(lama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MAX_ROWS", 2)
    sections = build_page(read_results(lama)).sections
    drawn = {block.name: block for section in sections for block in section.blocks if isinstance(block, Picture)}
    assert "The picture has the first and the last 1 of them." in drawn["dots"].caption
    labels = [name for name in ("P36", "P103", "P17") if re.search(rf"<text[^>]*>{name} ", drawn["dots"].svg)]
    assert len(labels) == 2


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
    matrices = confusions(read_results(labelled), "P36")
    assert matrices["p-tuning"] == Confusion(tuple(LABELS), ((2, 2), (0, 2)))
    assert matrices["manual"].counts[1] == (2, 0)
    assert not [method for method in matrices if method == "majority" or method.endswith("@random-weights")]


def test_the_picture_of_confusions_and_its_description(labelled: Path) -> None:
    assert "Confusion matrix" in headings(labelled)
    (picture,) = confusion_pictures(read_results(labelled))
    assert isinstance(picture, Picture)
    assert "Counts are sums over 2 seeds" in picture.caption
    assert "p-tuning: billing predicted as shipping 2 times" in picture.alt
    write_report(labelled)
    assert (labelled / "pictures" / "confusion-1.svg").is_file()
    change(labelled, lambda results: results["task_info"]["P36"].pop("labels"))
    write_report(labelled)
    assert not (labelled / "pictures" / "confusion-1.svg").exists()
    assert "Confusion matrix" not in headings(labelled)


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
        (few_rows, "Fewer than 100 test facts in 1 task (P36 (capital))"),
        (lambda results: results["cells"][0].update(status="failed"), "1 run of 30 failed"),
        (lambda results: results["task_info"]["P17"].update(reported="dev"), "P17: without a validation part"),
    ],
)
def test_caveats_of_a_run(lama: Path, edit: Callable[[dict[str, Any]], object], part: str) -> None:
    assert part not in "\n".join(limits(read_results(lama)))
    change(lama, edit)
    assert part in "\n".join(limits(read_results(lama)))


def test_caveats_of_every_run(lama: Path) -> None:
    text = "\n".join(limits(read_results(lama)))
    for part in ("may contain the test facts", "different numbers of settings", "manual-restricted, which ranks"):
        assert part in text
