"""The schema of results.json and predictions.jsonl: what is written is read back, and a wrong value is named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ptuning.errors import FileError
from ptuning.files import write_json_lines
from ptuning.metrics import Answer
from ptuning.report.results_file import (
    Agreement,
    AnsweredRow,
    Cell,
    CellRecord,
    ChosenSetting,
    MethodInfo,
    Results,
    ScoreWithSpread,
    TrainingWarning,
    read_answers,
    read_curve,
    read_results,
)
from ptuning.statistics import Score

SCORE = ScoreWithSpread(0.5, 0.25, 0.75, 8, 0.125, 2, 0.375)
ALL = Results(
    suite="superglue",
    command="ptuning superglue",
    backbone={"name": "tiny", "revision": None},
    settings={"lr": 0.001, "tasks": ["CB"]},
    versions={"torch": "2.4"},
    task_info={"CB": {"type": None, "data": {"train": {"rows": 3}}}},
    methods={"manual": MethodInfo("words"), "p-tuning": MethodInfo("slots", trained=True, learns_slots=True)},
    agreement=Agreement([ChosenSetting("CB", "p-tuning", 1, dev=0.5, test=0.25)], None, 0.25),
    warnings=[TrainingWarning("CB", "p-tuning", 1, text="stopped")],
    cells=[
        CellRecord("CB", "p-tuning", 1, "done", {"accuracy": 0.5}, 8, 2.5, 4, Cell("CB", "p-tuning", 1).folder, None),
        CellRecord("CB", "manual", 0, "failed", {}, 0, 0.0, 1, Cell("CB", "manual", 0).folder, "no room"),
    ],
    tasks={"CB": {"p-tuning": {"accuracy": SCORE}}},
    macro={"p-tuning": {"accuracy": ScoreWithSpread(0.5, 0.5, 0.5, 1)}},
    by_type={"1-1": {}},
    differences={"p-tuning - manual": {"accuracy": Score(0.5, -0.5, 1.0, 8)}},
)


def read(folder: Path, value: Any) -> Results:
    (folder / "results.json").write_text(json.dumps(value), encoding="utf-8")
    return read_results(folder)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    value = ALL.to_json()
    again = read(tmp_path, value)
    assert again == replace(ALL, folder=tmp_path)
    assert again.to_json() == value
    Results("lama", folder=tmp_path).write()
    assert read_results(tmp_path) == Results("lama", folder=tmp_path, cells=[])


def test_the_keys_of_the_file_and_their_order() -> None:
    """Other programs read the file: a key that changes its name or its place is a change for them."""
    value: Any = ALL.to_json()
    assert list(value) == [
        "format_version", "suite", "command", "backbone", "settings", "versions", "task_info", "methods",
        "agreement", "warnings", "cells", "tasks", "macro", "by_type", "differences",
    ]  # fmt: skip
    assert value["cells"][0] == {
        "task": "CB", "method": "p-tuning", "seed": 1, "status": "done", "scores": {"accuracy": 0.5}, "n": 8,
        "seconds": 2.5, "tried": 4, "run": "cells/CB/p-tuning/seed-1", "error": None,
    }  # fmt: skip
    assert list(value["cells"][0])[-1] == "error"
    assert value["tasks"]["CB"]["p-tuning"]["accuracy"] == {
        "value": 0.5, "low": 0.25, "high": 0.75, "n": 8, "std": 0.125, "seeds": 2, "lowest": 0.375,
    }  # fmt: skip
    assert value["differences"]["p-tuning - manual"]["accuracy"] == {"value": 0.5, "low": -0.5, "high": 1.0, "n": 8}
    assert value["agreement"] == {
        "cells": [{"task": "CB", "method": "p-tuning", "seed": 1, "dev": 0.5, "test": 0.25}],
        "correlation": None,
        "mean_gap": 0.25,
    }
    assert value["warnings"] == [{"task": "CB", "method": "p-tuning", "seed": 1, "text": "stopped"}]
    assert value["methods"]["p-tuning"] == {"describe": "slots", "trained": True, "learns_slots": True}
    # Parts that an experiment does not have are not in its file.
    assert not {"agreement", "warnings", "folder"} & Results("lama").to_json().keys()


@pytest.mark.parametrize(
    ("keys", "wrong", "named"),
    [
        (("format_version",), 2, "format_version 2"),
        (("cells",), None, "cells"),
        (("tasks",), [], "tasks"),
        (("agreement", "cells", 0, "dev"), None, r"agreement\.cells #1\.dev"),
        (("methods", "manual", "trained"), 1, r"methods\.manual\.trained"),
        (("cells", 0, "task"), 3, r"cells #1\.task"),
        (("cells", 0, "seed"), 0.5, r"cells #1\.seed"),
        (("cells", 0, "seed"), 10**400, r"cells #1\.seed"),
        (("cells", 0, "seed"), True, r"cells #1\.seed"),
        (("cells", 1, "status"), "lost", r"cells #2\.status"),
        (("cells", 1, "run"), "/tmp", r"cells #2\.run"),
        (("cells", 1, "run"), "../elsewhere", r"cells #2\.run"),
        (("macro", "p-tuning", "accuracy", "low"), float("nan"), "not finite"),
    ],
)
def test_a_wrong_value_is_named(keys: tuple[str | int, ...], wrong: object, named: str, tmp_path: Path) -> None:
    value: Any = json.loads(json.dumps(ALL.to_json()))
    inner = value
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = wrong
    with pytest.raises(FileError, match=rf"results\.json.*{named}"):
        read(tmp_path, value)


def test_answers_are_read_back(tmp_path: Path) -> None:
    rows = [
        AnsweredRow({"x": "Kenya", "y": "yes"}, "yes", Answer("no", False, 2, -1.5)),
        AnsweredRow({"x": "a"}, None, Answer("", False, None, float("-inf")), {"p": 1}, "g", ("yes", "no")),
        AnsweredRow({"x": "a"}, "b", Answer("b", False, known=False)),
    ]
    path = tmp_path / "predictions.jsonl"
    write_json_lines(path, (row.to_json() for row in rows))
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == (
        '{"record": {"x": "Kenya", "y": "yes"}, "target": "yes", "prediction": "no", "rank": 2, "hit": false, '
        '"log_prob": -1.5}'
    )
    assert list(json.loads(lines[1])) == [
        "record", "idx", "group", "choices", "target", "prediction", "rank", "hit", "log_prob",
    ]  # fmt: skip
    assert read_answers(path) == rows
    path.write_text('{"record": {}, "hit": "yes"}\n', encoding="utf-8")
    with pytest.raises(FileError, match=r"predictions\.jsonl, row 1.*hit"):
        read_answers(path)


def test_a_learning_curve_begins_at_the_start(tmp_path: Path) -> None:
    assert read_curve(tmp_path) is None
    path = tmp_path / "run.json"
    path.write_text("{}", encoding="utf-8")
    assert read_curve(tmp_path) == []
    record = {"start": {"dev_score": 0.25}, "history": [{"epoch": 1, "dev_score": 0.5}]}
    path.write_text(json.dumps(record), encoding="utf-8")
    assert read_curve(tmp_path) == [(0, 0.25), (1, 0.5)]
    path.write_text(json.dumps({**record, "history": [{"epoch": "one"}]}), encoding="utf-8")
    with pytest.raises(FileError, match=r"run\.json.*history #1\.epoch"):
        read_curve(tmp_path)
