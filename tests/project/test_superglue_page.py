"""The figures of docs/evidence/superglue.md are those of docs/evidence/superglue.json."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import load_script


@pytest.fixture(scope="module")
def page() -> ModuleType:
    return load_script("superglue")


def metric(value: float, seeds: int = 1, n: int = 7) -> dict[str, Any]:
    spread = {"std": 0.1, "lowest": value - 0.1} if seeds > 1 else {"std": None, "lowest": None}
    return {"value": value, "low": 0.0, "high": 1.0, "n": n, "seeds": seeds, **spread}


def results(path: Path, task: str, n: int = 7, **methods: list[float]) -> Path:
    """Write what a suite would, with one score for each seed."""
    means = {name.replace("_", "-"): (scores, sum(scores) / len(scores)) for name, scores in methods.items()}
    tasks = {
        name: {key: metric(mean, len(scores), n) for key in ("score", "accuracy")}
        for name, (scores, mean) in means.items()
    }
    cells = [
        {"task": task, "method": name, "seed": seed, "status": "done", "scores": {"score": score}}
        for name, (scores, _) in means.items()
        for seed, score in enumerate(scores)
    ]
    path.write_text(json.dumps({"tasks": {task: tasks}, "cells": cells}), encoding="utf-8")
    return path


def test_the_documented_tables_are_those_of_the_documented_results(page: ModuleType) -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    made = page.tables(page.read_figures(page.FIGURES))
    assert len(made) == 4
    for table in made.values():
        assert table in text


def test_results_of_several_runs_are_put_together_and_the_last_counts(page: ModuleType, tmp_path: Path) -> None:
    known = page.gathered([results(tmp_path / "1", "CB", majority=[0.1], p_tuning=[0.5, 0.7])], {})
    files = [results(tmp_path / "2", "RTE", majority=[0.4]), results(tmp_path / "3", "CB", p_tuning=[0.6, 0.6, 0.9])]
    found = page.gathered(files, known)
    assert list(found) == ["CB", "RTE"]
    assert found["CB"]["methods"]["majority"]["scores"] == {"0": 0.1}
    assert found["CB"]["methods"]["p-tuning"]["scores"] == {"0": 0.6, "1": 0.6, "2": 0.9}
    assert known["CB"]["methods"]["p-tuning"]["scores"] == {"0": 0.5, "1": 0.7}
    with pytest.raises(ValueError, match="CB has 8 reported rows, and 7 elsewhere"):
        page.gathered([results(tmp_path / "4", "CB", n=8, manual=[0.1])], found)


def test_means_are_over_the_tasks_on_which_all_methods_ran(page: ModuleType, tmp_path: Path) -> None:
    files = [
        results(tmp_path / "1", "CB", majority=[0.1], p_tuning=[0.5, 0.7]),
        results(tmp_path / "2", "RTE", majority=[0.4], p_tuning=[0.4, 0.8, 0.9]),
        results(tmp_path / "3", "WSC", majority=[0.9]),
    ]
    tasks = page.gathered(files, {})
    lines = page.means(tasks, ("majority", "p-tuning")).splitlines()
    assert lines[0].startswith("| mean score of CB, RTE | mean |")
    assert lines[2].startswith("| majority | 0.250 |  |  | +0.400 [-0.871, +1.000]")
    # Over seeds 0 and 1, which both tasks have: means 0.45 and 0.75.
    assert lines[3] == "| **P-tuning, frozen** | 0.650 | 0.212 | 0.450 |  |"
    assert "0.600 [0.000, 1.000], sd 0.100, lowest 0.500 (2 seeds)" in page.each(tasks)


def test_tables_go_between_their_marks_and_nowhere_else(page: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("a\n<!-- s: one -->\n<!-- s: end -->\nb\n<!-- s: two -->\nold\n<!-- s: end -->\nc\n", "utf-8")
    page.fill(path, "s", {"one": "| 1 |", "two": "| 2 |"})
    filled = "a\n<!-- s: one -->\n| 1 |\n<!-- s: end -->\nb\n<!-- s: two -->\n| 2 |\n<!-- s: end -->\nc\n"
    assert path.read_text("utf-8") == filled
    page.fill(path, "other", {})
    assert path.read_text("utf-8") == filled
