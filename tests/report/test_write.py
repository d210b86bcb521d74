"""The report: everything in it stands in the JSON files, it shows any text as it is, and says what is missing."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ptuning.errors import FileError
from ptuning.report.pictures import mean_curve
from ptuning.report.results_file import read_results
from ptuning.report.sections import build_page
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
    found = {"value": value, "low": max(0.0, value - half), "high": min(1.0, value + half), "n": n}
    return {**found, "std": draw.uniform(0.005, 0.03) if std else None, "seeds": len(SEEDS) if std else 1}


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


def a_paraphrases(tasks: list[str]) -> dict[str, Any]:
    draw = random.Random(3)
    found = {}
    for task in tasks:
        scored = [
            {"manual": estimate(draw, draw.uniform(0.1, 0.45), ROWS), "p-tuning": estimate(draw, 0.55, ROWS)}
            for _ in range(6)
        ]
        patterns = [
            {"pattern": f"[X] has | the <i>capital</i> number {number} [Y].", "scores": scores}
            for number, scores in enumerate(scored)
        ]
        spread: dict[str, Any] = {}
        for method in ("manual", "p-tuning"):
            values = [scores[method]["value"] for scores in scored]
            spread[method] = {
                "min": min(values),
                "max": max(values),
                "range": max(values) - min(values),
                "std": 0.0421,
                "patterns": 6,
            }
        found[task] = {"patterns": patterns, "spread": spread}
    return found


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
    """A folder with three tasks, five methods, two seeds and paraphrases."""
    results = {**a_results(list(TASKS)), "paraphrases": a_paraphrases(list(TASKS))}
    save(tmp_path, results)
    write_cells(tmp_path, results)
    return tmp_path


@pytest.fixture
def compare(tmp_path: Path) -> Path:
    """A folder with one task, as the compare suite leaves it."""
    results = a_results(["P36"], suite="compare")
    save(tmp_path, results)
    write_cells(tmp_path, results)
    return tmp_path


class Page(HTMLParser):
    """Reads what stands in a page: its tags with their attributes, and its tables as rows of texts."""

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
            self.tables[-1][-1][-1] += ", "  # what stands on a line of its own in the page

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


def numbers_in(value: object) -> Iterator[float]:
    """Every number of a JSON value."""
    if isinstance(value, dict):
        for one in value.values():
            yield from numbers_in(one)
    elif isinstance(value, list):
        for one in value:
            yield from numbers_in(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def test_the_same_files_give_the_same_bytes(lama: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Neither another folder, nor a user's drawing settings, nor another run change a byte, or leave a trace."""
    import matplotlib

    other = tmp_path_factory.mktemp("other") / "copy"
    shutil.copytree(lama, other)
    write_report(lama)
    with matplotlib.rc_context():
        matplotlib.rc("font", size=30.0)
        matplotlib.rc("svg", hashsalt=None)
        before = dict(matplotlib.rcParams)
        write_report(other)
        assert dict(matplotlib.rcParams) == before
    names = ["report.html", "report.md", *(f"pictures/{name}.svg" for name in ("curves", "dots", "wordings"))]
    for name in names:
        assert (lama / name).read_bytes() == (other / name).read_bytes(), name
    write_report(other)
    assert sorted(path.name for path in other.iterdir()) == [
        "cells", "pictures", "report.html", "report.md", "results.json",
    ]  # fmt: skip
    assert (lama / "report.html").read_bytes() == (other / "report.html").read_bytes()


def test_every_number_in_a_table_stands_in_the_files(lama: Path) -> None:
    results = json.loads((lama / "results.json").read_text(encoding="utf-8"))
    known = {"95", "10"}
    for number in numbers_in(results):
        known |= {f"{100 * number:.1f}".lstrip("-"), f"{number:,}"}
    for method in METHODS:
        seconds = [cell["seconds"] for cell in results["cells"] if cell["method"] == method]
        known |= {f"{sum(seconds) / len(seconds):,.1f}", str(len(seconds))}
    tables = [table for table in page_of(lama).tables if "P@1" in table[0] or "manual" in table[0] or "min" in table[0]]
    assert len(tables) > 5
    found = 0
    for table in tables:
        for row in table[1:]:
            for cell in row[1:]:
                for number in re.findall(r"\d[\d,]*\.?\d*", cell.replace("<", " city ").split(" city ")[0]):
                    assert number.rstrip(",") in known, (number, cell)
                    found += 1
    assert found > 300


def test_no_score_stands_without_its_interval_and_n(lama: Path) -> None:
    """Of the spread of wordings, the intervals and n stand in the tables of every wording."""
    for table in page_of(lama).tables:
        for row in table[1:] if "min" not in table[0] else []:
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
            one = results["macro"][method].get(name)
            if one is None:
                assert cell == "–"
                continue
            best = max(scores[name]["value"] for scores in results["macro"].values() if name in scores)
            spread = f", sd {100 * one['std']:.1f}, 2 seeds" if one["std"] else ""
            assert cell == (
                f"{100 * one['value']:.1f}\N{NO-BREAK SPACE}%{' ★' if one['value'] == best else ''}, "
                f"[{100 * one['low']:.1f}, {100 * one['high']:.1f}], n = 3{spread}"
            )
        assert row[5] == ("4" if method in TRAINED else "1")


def test_the_markdown_says_the_same(lama: Path) -> None:
    """Read by a Markdown parser, the tables hold what those of the page hold, and the pictures are there."""
    from markdown_it import MarkdownIt

    page = page_of(lama)
    text = (lama / "report.md").read_text(encoding="utf-8")
    rendered = Page(MarkdownIt("commonmark").enable("table").render(text))

    def flat(tables: list[list[list[str]]]) -> list[list[list[str]]]:
        return [[[" ".join(cell.split()) for cell in row] for row in table] for table in tables]

    assert flat(rendered.tables) == flat(page.tables)
    images = [attributes["src"] for tag, attributes in rendered.tags if tag == "img"]
    assert images == [f"pictures/{name}.svg" for name in ("dots", "wordings", "curves")]
    assert all((lama / str(name)).is_file() for name in images)
    sections = [section.heading for section in build_page(read_results(lama)).sections]
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == sections


def test_names_are_shown_as_they_are_and_never_obeyed(lama: Path) -> None:
    page = page_of(lama)
    html = (lama / "report.html").read_text(encoding="utf-8")
    assert not {tag for tag, _ in page.tags} & {"script", "i", "link", "img", "iframe", "object", "form"}
    for text in ("P103 (native <b>language</b> | $x_1$)", "city <3>", "a <script>", "'<all>'", "the <i>capital</i>"):
        assert text in page.text
        assert text not in html
    for name in ("dots", "wordings", "curves"):
        root = ElementTree.parse(lama / "pictures" / f"{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "P103 (native <b>langu…" in "".join(ElementTree.parse(lama / "pictures" / "dots.svg").getroot().itertext())


def test_the_page_needs_nothing_but_itself(lama: Path) -> None:
    html = write_report(lama).read_text(encoding="utf-8")
    page = Page(html)
    ids = [str(attributes["id"]) for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "data", "action", "srcset"):
                assert str(value).startswith("#"), (tag, name, value)
                assert str(value)[1:] in ids, value
            if name == "aria-labelledby":
                assert value in ids
            assert not name.startswith("on"), (tag, name)
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", html))
    assert "@import" not in html
    assert set(re.findall(r"https?://[^\"' <]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_sections_stand_in_their_order(lama: Path, tmp_path: Path) -> None:
    assert headings(lama) == [
        "Settings",
        "Scores",
        "By type of relation",
        "Every task",
        "Written against learned",
        "Random weights: what the training facts teach alone",
        "Differences",
        "Wordings",
        "Learning curves",
        "Answers gained and lost",
        "What this run cannot show",
    ]


def test_one_task_is_told_once(compare: Path) -> None:
    assert headings(compare) == [
        "Settings",
        "Scores",
        "Random weights: what the training facts teach alone",
        "Differences",
        "Learning curves",
        "Answers gained and lost",
        "What this run cannot show",
    ]
    page = page_of(compare)
    assert "Methods compared: P36 (capital), smollm2-135m" in page.text
    assert "n counts records" in page.text
    assert not (compare / "pictures" / "dots.svg").exists()


def test_the_answer_is_made_from_the_numbers(lama: Path) -> None:
    results = json.loads((lama / "results.json").read_text(encoding="utf-8"))
    best = results["macro"]["p-tuning"]["p_at_1"]
    answer = build_page(read_results(lama)).answer
    shown = f"{100 * best['value']:.1f}\N{NO-BREAK SPACE}%"
    assert answer.startswith(f"Of 5 methods, p-tuning is best: P@1 {shown} (95 % interval ")
    difference = "The difference p-tuning − manual is +25.0 points (95 % interval +21.0 to +28.4, n = 120)"
    assert f"{difference}; its interval is above zero." in answer
    assert "With manual, the wordings of one relation lie up to 37.1 points apart" in answer
    change(lama, lambda found: found["differences"]["p-tuning - manual"]["p_at_1"].update(low=-0.01))
    answer = build_page(read_results(lama)).answer
    assert "its interval includes zero, so this run shows no difference." in answer


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
    assert headings(tmp_path) == ["Settings", "What this run cannot show"]


def test_one_wording_that_has_run_has_no_spread(lama: Path) -> None:
    """Its standard deviation is null, which used to pass for a damaged file."""
    spread = {"min": 0.25, "max": 0.25, "range": 0.0, "std": None, "patterns": 1}
    change(lama, lambda found: found["paraphrases"]["P36"]["spread"].update(manual=spread))
    write_report(lama)
    text = (lama / "report.md").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if "25.0 %" in line and "| manual | 1 |" in line)
    assert line.endswith("| 25.0 % | 25.0 % | 0.0 | – |")


def test_cells_without_tasks_still_are_a_report(lama: Path) -> None:
    change(lama, lambda found: found.update(tasks={}))
    assert write_report(lama).is_file()


def test_pictures_of_an_earlier_report_do_not_stay(lama: Path) -> None:
    write_report(lama)
    change(lama, lambda found: found.pop("paraphrases"))
    write_report(lama)
    assert sorted(path.name for path in (lama / "pictures").iterdir()) == ["curves.svg", "dots.svg"]


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


def test_a_single_value_has_no_interval(lama: Path) -> None:
    table = next(table for table in page_of(lama).tables if table[0] == ["method", "1-1", "N-1"])
    assert all("no interval, n = 1" in row[1] and "[" in row[2] for row in table[1:])


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
        (unrestricted, "Without manual-restricted, part of what a learned prompt gains may be this form"),
        (few_rows, "Fewer than 100 test facts in 1 task (P36 (capital))"),
        (lambda found: found["differences"].clear(), "The difference p-tuning − manual was not tested in pairs"),
        (lambda found: found["macro"].pop("p-tuning"), "A written or a learned prompt is missing"),
        (lambda found: found["cells"][0].update(status="failed"), "1 run of 30 failed or did not run yet"),
        (lambda found: found["cells"][0].update(run="cells/gone"), "The files of 1 finished run are not there"),
    ],
)
def test_it_says_what_the_run_cannot_show(lama: Path, edit: Callable[[dict[str, Any]], object], said: str) -> None:
    assert said not in page_of(lama).text
    change(lama, edit)
    assert said in page_of(lama).text


def test_what_no_run_can_show(lama: Path) -> None:
    text = page_of(lama).text
    for said in (
        "Test facts may stand in the text that the backbone was pretrained on",
        "There is one backbone (smollm2-135m)",
        "12 rows were dropped",
        "A mean over 3 tasks says little",
        "at most 2 seeds",
        "Methods chose from different numbers of settings",
        "manual-restricted, which ranks the task's answers only, is the fairer measure",
    ):
        assert said in text


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda found: found.update(format_version=2), "has format_version 2, and this version of ptuning reads 1"),
        (lambda found: found.pop("cells"), "is damaged: it has no cells; run the benchmark again"),
        (lambda found: found.update(tasks=[]), "'tasks' must be a table of names and values, and is []"),
        (lambda found: found.update(cells={}), "'cells' must be a list, and is {}"),
        (lambda found: found["cells"][0].pop("task"), "'cells #1.task' must be text in quotation marks, and is null"),
        (lambda found: found["cells"][0].update(status="lost"), 'must be one of done, failed, waiting, and is "lost"'),
        (lambda found: found["cells"][0].update(run="../elsewhere"), "must be a folder inside that of the results"),
        (lambda found: found["cells"][0].update(seed=0.5), "'cells #1.seed' must be a whole number, and is 0.5"),
        (
            lambda found: found["macro"]["manual"]["mrr"].update(low=float("nan")),
            "'macro.manual.mrr.low' must be a number, and is NaN",
        ),
    ],
)
def test_a_damaged_file_is_an_error(compare: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    change(compare, edit)
    with pytest.raises(FileError, match=re.escape(message)):
        write_report(compare)
    assert not (compare / "report.html").exists()


def test_a_missing_or_cut_file_is_an_error(compare: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"there is no .*results\.json; a report is built from the folder"):
        write_report(tmp_path / "nothing")
    predictions = compare / "cells" / "P36" / "p-tuning" / "seed-0" / "predictions.jsonl"
    predictions.write_bytes(predictions.read_bytes()[:-20])
    with pytest.raises(FileError, match=r"predictions\.jsonl is not valid JSONL .*; it is damaged or was cut off"):
        write_report(compare)
    results = compare / "results.json"
    results.write_bytes(results.read_bytes()[:-20])
    with pytest.raises(FileError, match=r"results\.json is not valid JSON .*; it is damaged or was cut off"):
        write_report(compare)


def test_a_stopped_training_stays_in_the_mean() -> None:
    trainings = [[(0, 0.1), (1, 0.3), (2, 0.5)], [(1, 0.1), (2, 0.2), (3, 0.4)]]
    assert [(epoch, round(value, 9)) for epoch, value in mean_curve(trainings)] == [(1, 0.2), (2, 0.35), (3, 0.45)]


def test_what_draws_is_loaded_only_to_draw() -> None:
    code = "import sys, ptuning.report.write; print({'matplotlib', 'jinja2', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


def test_the_templates_are_part_of_the_package() -> None:
    root = Path(__file__).resolve().parents[2]
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r'"([^"]+)"', re.findall(r"^ptuning = \[(.+?)\]$", text, flags=re.MULTILINE | re.DOTALL)[0])
    packaged = {path for pattern in listed for path in (root / "src" / "ptuning").glob(pattern)}
    files = set((root / "src" / "ptuning" / "report" / "pages").iterdir())
    assert {path.name for path in files} == {"report.html.jinja", "report.md.jinja"}
    assert files <= packaged
