"""The tables of a report: each number in them is in the JSON files."""

import contextlib
import json
import re
from pathlib import Path

import pytest

from ptuning.report.results_file import read_results
from tests.report.conftest import METHODS, ROWS, SCORES, TRAINED, change, page_of

pytestmark = pytest.mark.usefixtures("undrawn")


def test_every_number_in_a_table_is_in_the_files(lama: Path) -> None:
    results = json.loads((lama / "results.json").read_text(encoding="utf-8"))
    known = {"95", "10"}
    for text in re.findall(r"-?\d[\d.e-]*", json.dumps(results)):
        with contextlib.suppress(ValueError):
            known |= {f"{100 * float(text):.1f}".lstrip("-"), f"{float(text):,g}"}
    for method in METHODS:
        seconds = [cell["seconds"] for cell in results["cells"] if cell["method"] == method]
        known |= {f"{sum(seconds) / len(seconds):,.1f}", str(len(seconds))}
    tables = [table for table in page_of(lama).tables if "P@1" in table[0] or "manual" in table[0]]
    cells = [cell for table in tables for row in table[1:] for cell in row[1:]]
    numbers = [text for cell in cells for text in re.findall(r"\d[\d,]*\.?\d*", re.split("<| city ", cell)[0])]
    assert len(tables) > 4
    assert len(numbers) > 150
    assert not [number for number in numbers if number.rstrip(",") not in known]


def test_every_score_has_its_interval_and_n(lama: Path) -> None:
    for table in page_of(lama).tables:
        for row in table[1:]:
            for cell in row:
                if "%" in cell:
                    assert re.fullmatch(r".*%( ★)?, (\[\d+\.\d, \d+\.\d\]|no interval), n = \d+(, sd .*)?", cell), cell


def test_the_main_table_holds_the_means_of_every_method(lama: Path) -> None:
    results = json.loads((lama / "results.json").read_text(encoding="utf-8"))
    table = next(table for table in page_of(lama).tables if "tried" in table[0])
    assert table[0] == ["method", "P@1", "P@10", "MRR", "exact match", "tried", "mean seconds"]
    assert [row[0].split(",")[0] for row in table[1:]] == list(METHODS)
    for row, method in zip(table[1:], METHODS, strict=True):
        for cell, name in zip(row[1:5], SCORES, strict=True):
            score = results["macro"][method].get(name)
            if score is None:
                assert cell == "–"
                continue
            best = max(scores[name]["value"] for scores in results["macro"].values() if name in scores)
            spread = f", sd {100 * score['std']:.1f}, 2 seeds" if score["std"] else ""
            assert cell == (
                f"{100 * score['value']:.1f}\N{NO-BREAK SPACE}%{' ★' if score['value'] == best else ''}, "
                f"[{100 * score['low']:.1f}, {100 * score['high']:.1f}], n = 3{spread}"
            )
        assert row[5] == ("4" if method in TRAINED else "1")


def test_answers_gained_and_lost_are_those_of_the_files(compare: Path) -> None:
    def hits(method: str) -> dict[str, bool]:
        path = compare / "cells" / "P36" / method / "seed-0" / "predictions.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {row["record"]["x"]: row["hit"] for row in rows}

    before, after = hits("manual"), hits("p-tuning")
    gained = {name for name in before if after[name] and not before[name]}
    lost = {name for name in before if before[name] and not after[name]}
    page = page_of(compare)
    assert f"P36 (capital): {len(gained)} gained and {len(lost)} lost of {ROWS} records" in page.text
    tables = [table for table in page.tables if table[0] == ["record", "target", "manual", "p-tuning"]]
    assert [len(table) - 1 for table in tables] == [10, 10]
    assert {row[0] for row in tables[0][1:]} < gained
    assert {row[0] for row in tables[1][1:]} < lost


def test_methods_are_columns_with_the_best_first(lama: Path) -> None:
    """On a phone two of them are visible."""
    table = next(table for table in page_of(lama).tables if table[0][0] == "task")
    macro = read_results(lama).macro
    assert table[0] == ["task", *sorted(METHODS, key=lambda method: -macro[method]["p_at_1"].value)]


def test_too_few_choices_have_no_correlation(lama: Path) -> None:
    cells = [{"task": "P36", "method": "manual", "seed": seed, "dev": 0.5, "test": 0.4} for seed in range(5)]
    for count, correlation, shown in ((4, 1.0, "unknown"), (5, None, "undefined"), (5, 0.5, "is 0.50")):
        choices = {"cells": cells[:count], "correlation": correlation, "mean_gap": 0.1}
        change(lama, lambda results, choices=choices: results.update(agreement=choices))  # type: ignore[misc]
        text = page_of(lama).text
        assert shown in text
        assert f"the mean difference is +10.0 points; n = {count} runs" in text


def test_equal_or_single_values_have_no_interval(lama: Path) -> None:
    """A width of zero would claim to know the mean exactly."""
    equal = {"value": 0.0, "low": 0.0, "high": 0.0, "n": 2}
    change(lama, lambda results: results["macro"]["majority"]["p_at_1"].update(equal))
    tables = page_of(lama).tables
    table = next(table for table in tables if "tried" in table[0])
    assert table[1][1] == "0.0\N{NO-BREAK SPACE}%, no interval, n = 2"
    table = next(table for table in tables if table[0] == ["method", "1-1", "N-1"])
    assert all("no interval, n = 1" in row[1] and "[" in row[2] for row in table[1:])
