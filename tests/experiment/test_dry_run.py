"""A dry run: every cell is listed, finished ones give the times of the others, and nothing is run or written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.data.questions import as_questions
from ptuning.errors import FileError
from ptuning.experiment.cells import CellJob
from ptuning.experiment.suite import Suite
from ptuning.method.base import Task
from ptuning.records import Record
from ptuning.template.language import Template
from tests.conftest import WARM
from tests.experiment.test_compare import run_compare

WORDS = ("yes", "good", "great")
FACTS: list[Record] = [{"x": f"Kenya {at}", "y": WORDS[at % 3]} for at in range(30)]


def suite(backbone: Backbone, out: Path, methods: Sequence[str], *tasks: str, seeds: int = 1) -> Suite:
    train, dev = as_questions(FACTS[:20]), as_questions(FACTS[20:24])
    one = Task("P1", train, dev, Template.parse("[X] is [Y] ."), Template.parse(WARM), WORDS, single_token=True)
    jobs = [CellJob(replace(one, name=name), as_questions(FACTS[24:]), {}) for name in tasks or ("P1",)]
    config = TrainConfig(epochs=1, batch_size=4)
    return Suite(out, jobs=jobs, methods=methods, seeds=seeds, backbone=backbone, config=config, tries=1)


def test_nothing_is_known_of_methods_without_a_finished_cell(causal: Backbone, tmp_path: Path) -> None:
    found = suite(causal, tmp_path / "out", ["majority", "p-tuning"]).estimates()
    assert [(one.cell.method, one.is_finished, one.seconds) for one in found] == [
        ("majority", False, None), ("p-tuning", False, None),
    ]  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_dry_run_refuses_what_the_run_would_refuse(causal: Backbone, tmp_path: Path) -> None:
    """It used to say how long the cells would take that a run then refused to mix with those of other settings."""
    out = tmp_path / "out"
    options: dict[str, Any] = {"methods": "p-tuning", "config": TrainConfig(epochs=1, batch_size=8)}
    run_compare(causal, out, **options)
    options["config"] = options["config"].adapted(encoder="none")
    before = sorted(out.rglob("*"))
    with pytest.raises(FileError, match=r"other settings.*encoder was lstm and is none"):
        run_compare(causal, out, **options, dry_run=True)
    waiting = run_compare(causal, out, **options, dry_run=True, overwrite=True)
    assert [cell.status for cell in waiting.cells] == ["waiting"]
    assert sorted(out.rglob("*")) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(FileError, match="holds files, but no results of a comparison"):
        run_compare(causal, tmp_path / "other", **options, dry_run=True)


def test_finished_cells_give_the_times_of_the_others(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over the finished cells of the same method, whatever their task."""
    list(suite(causal, tmp_path, ["manual"], "P1", "P2").run())
    for name, seconds in (("P1", 3.0), ("P2", 5.0)):
        path = tmp_path / "cells" / name / "manual/seed-0/run.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**record, "seconds": seconds}), encoding="utf-8")
    monkeypatch.setattr(Suite, "run", None)  # would raise if it were called
    found = suite(causal, tmp_path, ["manual", "in-context"], "P1", "P2", "P3", seeds=2).estimates()
    manual = [one for one in found if one.cell.method == "manual"]
    assert [(one.cell.task, one.is_finished, one.seconds) for one in manual] == [
        ("P1", True, 3.0), ("P2", True, 5.0), ("P3", False, 4.0),
    ]  # fmt: skip
    assert {(one.is_finished, one.seconds) for one in found if one.cell.method == "in-context"} == {(False, None)}
    assert len(found) == 3 + 2 * 3
