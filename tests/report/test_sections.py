"""The sections of a report, their order, and the main result in sentences."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ptuning.report import sections
from ptuning.report.blocks import Picture
from ptuning.report.results_file import read_results
from ptuning.report.sections import build_page
from ptuning.report.write import write_report
from tests.report.conftest import change, headings, page_of, save


def test_the_order_of_the_sections(lama: Path, tmp_path: Path) -> None:
    assert headings(lama) == [
        "Scores",
        "By type of relation",
        "Every task",
        "Manual and learned prompt",
        "Random-weights control",
        "Differences",
        "Learning curves",
        "Answers gained and lost",
        "Settings",
        "Limitations",
    ]


def test_one_task_is_told_once(compare: Path) -> None:
    assert headings(compare) == [
        "Scores",
        "Random-weights control",
        "Differences",
        "Learning curves",
        "Answers gained and lost",
        "Settings",
        "Limitations",
    ]
    page = page_of(compare)
    assert "Methods compared: P36 (capital), smollm2-135m" in page.text
    assert "n counts records" in page.text
    assert not (compare / "pictures" / "dots.svg").exists()


@pytest.mark.usefixtures("undrawn")
def test_the_answer_is_made_from_the_numbers(lama: Path) -> None:
    results = json.loads((lama / "results.json").read_text(encoding="utf-8"))
    best = results["macro"]["p-tuning"]["p_at_1"]
    answer = build_page(read_results(lama)).answer
    shown = f"{100 * best['value']:.1f}\N{NO-BREAK SPACE}%"
    assert answer.startswith(f"Of 5 methods, p-tuning is best: P@1 {shown} (95 % interval ")
    # Of the best and the next, whoever they are, and whichever way round the file has it.
    difference = "The difference p-tuning − manual-restricted is +1.0 points (95 % interval −2.0 to +4.0, n = 120)"
    assert f"{difference}; its interval includes zero, so this run shows no difference." in answer
    back = {"p_at_1": {"value": -0.2, "low": -0.3, "high": -0.1, "n": 120}}
    change(lama, lambda found: found["differences"].pop("p-tuning - manual-restricted"))
    assert "The difference" not in build_page(read_results(lama)).answer
    change(lama, lambda found: found["differences"].update({"manual-restricted - p-tuning": back}))
    difference = "The difference p-tuning − manual-restricted is +20.0 points (95 % interval +10.0 to +30.0, n = 120)"
    assert f"{difference}; its interval is above zero." in build_page(read_results(lama)).answer
    back["p_at_1"].update(low=-0.2, high=-0.2, n=2)
    change(lama, lambda found: found["differences"].update({"manual-restricted - p-tuning": back}))
    answer = build_page(read_results(lama)).answer
    assert "The difference p-tuning − manual-restricted is +20.0 points (no interval, n = 2)." in answer


@pytest.mark.usefixtures("undrawn")
def test_one_type_of_relation_repeats_nothing(lama: Path) -> None:
    def only(n: int) -> None:
        def edit(results: dict[str, Any]) -> None:
            one = {name: {**score, "n": n} for name, score in results["macro"]["manual"].items()}
            results["by_type"] = {"N-1": {"manual": one}}

        change(lama, edit)

    only(3)
    assert "By type of relation" not in headings(lama)
    only(2)
    assert "By type of relation" in headings(lama)


@pytest.mark.usefixtures("undrawn")
def test_a_task_of_ones_own_is_no_benchmark(lama: Path) -> None:
    change(lama, lambda found: found.update(suite="superglue"))
    assert "Methods compared on language understanding" in page_of(lama).text
    change(lama, lambda found: [one.update(benchmark=None) for one in found["task_info"].values()])
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


@pytest.mark.usefixtures("undrawn")
def test_cells_without_tasks_still_are_a_report(lama: Path) -> None:
    change(lama, lambda found: found.update(tasks={}))
    assert write_report(lama).is_file()


def test_pictures_of_many_rows_have_the_first_and_the_last(lama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "MOST_ROWS", 2)
    page = build_page(read_results(lama))
    drawn = {block.name: block for section in page.sections for block in section.blocks if isinstance(block, Picture)}
    assert "The picture has the first and the last 1 of them." in drawn["dots"].caption
    labels = [name for name in ("P36", "P103", "P17") if re.search(rf"<text[^>]*>{name} ", drawn["dots"].svg)]
    assert len(labels) == 2
