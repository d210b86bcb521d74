"""Made-up results with the files of their cells, and a reader of the pages that are made from them."""

import json
import random
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ptuning.report.page import build_page
from ptuning.report.results_file import read_results
from ptuning.report.write import write_report

# Names that would break a page or a table if they were not escaped.
TASKS = {"P36": "capital", "P103": "native <b>language</b> | $x_1$", "P17": "country & *state*"}
METHODS = {
    "majority": "always the most frequent answer",
    "manual": "the written sentence",
    "manual-restricted": "the same, with the relation's answers only",
    "p-tuning": "slots in place of the written words",
    "p-tuning@random-weights": "the same, without knowledge",
}
VALUES = {"majority": 0.08, "manual": 0.3, "manual-restricted": 0.38, "p-tuning": 0.55, "p-tuning@random-weights": 0.14}
TRAINED = ("p-tuning", "p-tuning@random-weights")
SCORES = ("p_at_1", "p_at_10", "mrr", "exact_match")
SEEDS = (0, 1)
ROWS = 120


def estimate(draw: random.Random, value: float, n: int, *, std: bool = False) -> dict[str, Any]:
    value = min(0.98, max(0.01, value + draw.uniform(-0.05, 0.05)))
    half = draw.uniform(0.02, 0.09) if n > 1 else 0.0
    score = {"value": value, "low": max(0.0, value - half), "high": min(1.0, value + half), "n": n}
    return {**score, "std": draw.uniform(0.005, 0.03) if std else None, "seeds": len(SEEDS) if std else 1}


def scores_of(draw: random.Random, method: str, n: int) -> dict[str, Any]:
    if method == "majority":
        return {"p_at_1": estimate(draw, VALUES[method], n)}
    return {
        name: estimate(draw, VALUES[method] + 0.15 * (name == "p_at_10"), n, std=method in TRAINED) for name in SCORES
    }


def a_results(tasks: list[str], suite: str = "lama") -> dict[str, Any]:
    """Made-up results in the form of ``results.json``."""
    draw = random.Random(7)
    cells: list[dict[str, Any]] = [
        {
            "task": task,
            "method": method,
            "seed": seed,
            "status": "done",
            "scores": {},
            "n": ROWS,
            "seconds": round(draw.uniform(2, 90), 2),
            "tried": 4 if method in TRAINED else 1,
            "run": f"cells/{task}/{method}/seed-{seed}",
            "error": None,
        }
        for task in tasks
        for method in METHODS
        for seed in SEEDS
    ]
    parts = {
        name: {"name": f"{{}}/{name}.jsonl", "sha256": "ab" * 32, "rows": 250, "kept": 240}
        for name in ("train", "test")
    }
    return {
        "format_version": 1,
        "suite": suite,
        "command": "ptuning lama --tasks '<all>'",
        "backbone": {
            "name": "smollm2-135m",
            "revision": None,
            "fingerprint": "0f" * 8,
            "kind": "causal",
            "parameters": 134515008,
        },
        "settings": {"epochs": 6, "learning_rate": 0.001, "start": ["text", "vocabulary"], "early_stopping": True},
        "versions": {"ptuning": "0.2.0", "torch": "2.13.0"},
        "task_info": {
            task: {
                "label": TASKS[task],
                "type": "1-1" if task == "P36" else "N-1",
                "manual": "The capital of [X] is [Y]",
                "template": "[P:The capital of] [X] [P:is] [Y]",
                "data": parts,
                "rows": ROWS,
                "dropped": {"no object": 3, "double": 1},
                "split": "by subject",
            }
            for task in tasks
        },
        "methods": {
            method: {"describe": text, "trained": method in TRAINED, "learns_slots": method in TRAINED}
            for method, text in METHODS.items()
        },
        "cells": cells,
        "tasks": {task: {method: scores_of(draw, method, ROWS) for method in METHODS} for task in tasks},
        "macro": {method: scores_of(draw, method, len(tasks)) for method in METHODS},
        "by_type": {
            kind: {method: scores_of(draw, method, n) for method in METHODS} for kind, n in (("1-1", 1), ("N-1", 2))
        },
        "differences": {
            "p-tuning - manual": {name: {"value": 0.25, "low": 0.21, "high": 0.284, "n": ROWS} for name in SCORES},
            "p-tuning - manual-restricted": {"p_at_1": {"value": 0.01, "low": -0.02, "high": 0.04, "n": ROWS}},
            "p-tuning - p-tuning@random-weights": {"p_at_1": {"value": 0.41, "low": 0.35, "high": 0.47, "n": ROWS}},
            "majority - manual": {"p_at_1": {"value": -0.22, "low": -0.3, "high": -0.14, "n": ROWS}},
        },
    }


def write_cells(folder: Path, results: dict[str, Any]) -> None:
    draw = random.Random(5)
    for cell in results["cells"]:
        out = folder / cell["run"]
        out.mkdir(parents=True)
        record: dict[str, Any] = {"format_version": 1}
        if cell["method"] in TRAINED:
            best = VALUES[cell["method"]]
            record["start"] = {"dev_loss": 3.0, "dev_score": draw.uniform(0.1, 0.25) * best}
            record["history"] = [
                {"epoch": epoch, "dev_score": best * (1 - 0.5**epoch) + draw.uniform(-0.02, 0.02)}
                for epoch in range(1, draw.choice((6, 7, 9)))
            ]
        (out / "run.json").write_text(json.dumps(record), encoding="utf-8")
        rows = []
        for number in range(ROWS):
            hit = draw.random() < VALUES[cell["method"]]
            target = f"city <{number % 17}>"
            rows.append(
                {
                    "record": {"x": f"Subject | {number}", "y": target},
                    "target": target,
                    "prediction": target if hit else "a <script>",
                    "rank": 1 if hit else draw.randint(2, 900),
                    "hit": hit,
                    "log_prob": -1.0,
                }
            )
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (out / "predictions.jsonl").write_text(text, encoding="utf-8")


def save(folder: Path, results: dict[str, Any]) -> None:
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")


@pytest.fixture
def lama(tmp_path: Path) -> Path:
    """A folder with three tasks, five methods and two seeds."""
    results = a_results(list(TASKS))
    save(tmp_path, results)
    write_cells(tmp_path, results)
    return tmp_path


@pytest.fixture
def compare(tmp_path: Path) -> Path:
    """A folder with one task, as ``ptuning compare`` writes it."""
    results = a_results(["P36"], suite="compare")
    save(tmp_path, results)
    write_cells(tmp_path, results)
    return tmp_path


class Page(HTMLParser):
    """Parses a page: its tags with their attributes, and its tables as rows of texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.in_cell = True
            self.tables[-1][-1].append("")
        elif tag == "small" and self.in_cell and self.tables[-1][-1][-1].strip():
            self.tables[-1][-1][-1] += ", "  # it has its own line in the page

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.tables[-1][-1][-1] += data


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def headings(folder: Path) -> list[str]:
    return [section.heading for section in build_page(read_results(folder)).sections]


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    edit(results)
    save(folder, results)
