"""Parts of a comparison: each runs its share of the cells, and together they leave what one process leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.errors import ConfigError, FileError
from ptuning.experiment import suite as suites
from ptuning.experiment.compare import compare
from ptuning.experiment.comparison import Watch
from ptuning.report.results_file import Results
from ptuning.workers.pool import WorkerConfig
from tests.conftest import WARM
from tests.experiment.test_suite import DEV, FAST, MANUAL, TEST, TRAIN, results_of, suite, timeless
from tests.processes import forked
from tests.workers.fake_ray import use_fake_ray

METHODS = ("majority", "manual", "p-tuning")


def run(backbone: Backbone, out: Path, **options: Any) -> Results:
    asked: dict[str, Any] = {"dev": DEV, "test": TEST, "methods": METHODS, "config": FAST, "template": WARM, "seeds": 2}
    return compare(TRAIN, manual=MANUAL, backbone=backbone, out=out, **{**asked, **options})


def files_of(out: Path) -> dict[str, Any]:
    """Return path -> content of every file that is kept, without what depends on the clock."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.suffix == ".json":
            found[name] = timeless(json.loads(path.read_text(encoding="utf-8")))
        # Reports are made of results.json, with times.
        elif path.is_file() and not name.startswith(("report", "pictures")):
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def whole(loaded: Callable[[str], Backbone], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process leaves."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(loaded("llama"), out)
    return out


@pytest.mark.parametrize("of", [1, 3])
def test_parts_leave_the_same_files_as_one_process(causal: Backbone, whole: Path, tmp_path: Path, of: int) -> None:
    """In any order; results.json comes from the command without a part, and nothing is run then."""
    for number in reversed(range(1, of + 1)):
        part = run(causal, tmp_path / "parts", part=f"{number}/{of}")
        assert {cell.status for cell in part.cells} == {"done"}
        assert not (tmp_path / "parts" / "results.json").exists()
        assert not (tmp_path / "parts" / "report.html").exists()
    was_there: list[bool] = []
    run(causal, tmp_path / "parts", watch=Watch(on_cell=lambda result, *_: was_there.append(result.was_there)))
    assert was_there == [True] * 4
    assert files_of(tmp_path / "parts") == files_of(whole)


@pytest.mark.parametrize("shared", [None, False])
def test_workers_leave_the_same_files_as_one_process(
    causal: Backbone, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool | None
) -> None:
    """Whether they see the folder or not, and though some of them end in the middle."""
    ray = use_fake_ray(monkeypatch, causal, task_manual_seed_0=1)
    told: list[str] = []
    watch = Watch(report=lambda now: told.append(now.stage), on_cell=lambda result, *_: told.append(result.status))
    found = run(causal, tmp_path / "workers", workers=WorkerConfig(3, shared_folder=shared), watch=watch)
    assert [name for _, name in ray.begun].count("task manual seed 0") == 2
    assert told.count("done") == len(found.cells) == 4
    files = files_of(tmp_path / "workers")
    assert {files[f"{cell.folder}/run.json"].pop("worker")["engine"] for cell in found.cells} == {"fake"}
    assert files == files_of(whole)
    again = run(causal, tmp_path / "workers", workers=3)
    assert len(ray.begun) == 5, "nothing was left to do"
    assert again.tasks == found.tasks


PROGRAM = """
import json, sys
from ptuning.backbone.loading import load_backbone
from ptuning.config import TrainConfig
from ptuning.experiment.compare import compare
train, dev, test = json.load(open(sys.argv[2]))
compare(train, manual=sys.argv[4], template=sys.argv[5], dev=dev, test=test, out=sys.argv[3], part=sys.argv[6],
        backbone=load_backbone(sys.argv[1], dtype="float32", device="cpu"), seeds=2,
        methods=["majority", "manual", "p-tuning"], config=TrainConfig(epochs=2, batch_size=4, lr=0.01, patience=9))
"""


def test_parts_may_run_at_once_and_be_killed(
    model_folder: Callable[[str], Path], loaded: Callable[[str], Backbone], whole: Path, tmp_path: Path
) -> None:
    """Two parts, one of them started twice, and one killed: the same files in the end."""
    (tmp_path / "data.json").write_text(json.dumps([TRAIN, DEV, TEST]))
    given = [model_folder("llama"), tmp_path / "data.json", tmp_path / "parts", MANUAL, WARM]
    with (
        forked(PROGRAM, *given, "1/2", folder=tmp_path / "said" / "1") as first,
        forked(PROGRAM, *given, "2/2", folder=tmp_path / "said" / "2") as second,
        forked(PROGRAM, *given, "2/2", folder=tmp_path / "said" / "3") as again,
        forked(PROGRAM, *given, "1/2", folder=tmp_path / "said" / "4") as killed,
    ):
        killed.wait_until(lambda: (tmp_path / "parts").exists())
        killed.kill()
        assert [one.wait() for one in (first, second, again)] == [0, 0, 0], first.err + second.err + again.err
    run(loaded("llama"), tmp_path / "parts")
    assert files_of(tmp_path / "parts") == files_of(whole)


def test_bad_parts_run_nothing(causal: Backbone, tmp_path: Path) -> None:
    for part, said in (("1/9", "only 4 jobs to share"), ("3/2", "no part 3"), ("half", "is not K/N")):
        with pytest.raises(ConfigError, match=said):
            run(causal, tmp_path / "out", part=part)
    assert not (tmp_path / "out").exists()


def test_a_part_looks_at_its_own_cells_only(causal: Backbone, tmp_path: Path) -> None:
    """Others may be of other settings while they are replaced part by part; its own are refused or replaced."""
    run(causal, tmp_path, seeds=1)
    (tmp_path / "cells/task/manual/seed-0/run.json").write_text('{"identity": {"seed": 5}}')
    run(causal, tmp_path, seeds=1, part="1/3")
    with pytest.raises(FileError, match="other settings"):
        run(causal, tmp_path, seeds=1, part="2/3")
    run(causal, tmp_path, seeds=1, part="2/3", overwrite=True)
    assert results_of(tmp_path)["cells"][1]["status"] == "done"


def test_a_dry_run_of_a_part_lists_its_cells(causal: Backbone, tmp_path: Path) -> None:
    listed: list[Any] = []
    run(causal, tmp_path / "out", part="3/3", dry_run=True, watch=Watch(on_estimate=listed.extend))
    assert [one.cell.method for one in listed] == ["p-tuning"]


def test_prompts_that_train_together_are_cut_by_the_suite_alone(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 16 to a fleet, whatever runs them; all of them in one process are the same bytes as in parts."""
    monkeypatch.setattr(suites, "JOB_PROMPTS", 2)
    units = suite(causal, tmp_path, counts=(5, 12, 8)).units
    assert [len(unit.folders) for unit in units] == [2, 1]
    assert [unit.checkpoint for unit in units] == ["fleets/p-tuning-seed-0", "fleets/p-tuning-seed-0-2"]
    whole, parts = (suite(causal, tmp_path / name, counts=(5, 12, 8)) for name in ("whole", "parts"))
    assert len(list(whole.run())) == 3
    for unit in reversed(parts.units):
        assert [one.status for one in parts.run([unit])] == ["done"] * len(unit.folders)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    assert not (tmp_path / "parts" / "fleets").exists()
