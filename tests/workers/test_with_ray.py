"""Workers of Ray itself: one is killed, a cell fails, a folder is not shared; the files are those of one process."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.experiment.compare import compare
from ptuning.files import Json
from ptuning.method.registry import METHODS
from tests.conftest import WARM
from tests.experiment.test_parts import files_of
from tests.experiment.test_suite import DEV, MANUAL, TEST, TRAIN, has_checkpoint
from tests.processes import forked

pytestmark = pytest.mark.ray
pytest.importorskip("ray", reason="the extra ptuning[ray] is not installed")

# A worker knows the methods that the command registers.
PROGRAM = """
import json, logging, pathlib, sys
from ptuning import TrainConfig, compare, load_backbone, methods
from ptuning.progress import Interrupted
from ptuning.experiment.plan import Watch
from ptuning.workers.crew import Workers
logging.basicConfig(level=logging.INFO)

@methods.register("failing", describe="of a test")
def failing(task, setup):
    raise RuntimeError("it always fails")

model, data, out, manual, template, shared, stop = sys.argv[1:]
train, dev, test = json.loads(pathlib.Path(data).read_text())
told = []
try:
    found = compare(
        train, dev=dev, test=test, manual=manual, template=template, out=out, seeds=2,
        backbone=load_backbone(model, dtype="float32", device="cpu"), methods=["majority", "failing", "p-tuning"],
        config=TrainConfig(epochs=30, batch_size=1, lr=0.01, patience=99, checkpoint_seconds=0.0), tries=2,
        workers=Workers(2, shared_folder=None if shared == "shared" else False),
        watch=Watch(should_stop=pathlib.Path(stop).exists, report=told.append),
    )
    print("notes", sorted({now.note for now in told if now.stage == "suite"}))
except Interrupted as stopped:
    print("interrupted", stopped)
"""


def workers_of(said: str) -> list[tuple[int, str]]:
    """Return the processes that began a unit, and which."""
    return [(int(pid), unit) for pid, unit in re.findall(r"\(process (\d+)\) begins (\S+)", said)]


def without_workers(files: dict[str, Any]) -> dict[str, Any]:
    """Leave out who did what."""
    return {
        name: {key: one for key, one in value.items() if key != "worker"} if isinstance(value, dict) else value
        for name, value in files.items()
    }


@pytest.mark.timeout(300)
def test_a_killed_worker_changes_no_byte(
    model_folder: Callable[[str], Path], loaded: Callable[[str], Backbone], tmp_path: Path
) -> None:
    """Invariant *Resume is exact*, with two workers: one is killed in a fleet, and all are stopped once in between."""
    (tmp_path / "data.json").write_text(json.dumps([TRAIN, DEV, TEST]))
    out, stop = tmp_path / "workers", tmp_path / "stop"
    given = [model_folder("llama"), tmp_path / "data.json", out, MANUAL, WARM]
    with forked(PROGRAM, *given, "shared", stop, folder=tmp_path / "said") as first:
        first.wait_until(lambda: has_checkpoint(out))
        pid = next(pid for pid, unit in workers_of(first.err) if unit.startswith("p-tuning"))
        os.kill(pid, signal.SIGKILL)
        first.wait_until(lambda: "has ended in p-tuning" in first.err)
        first.wait_until(lambda: len([unit for _, unit in workers_of(first.err) if unit.startswith("p-tuning")]) > 2)
        stop.touch()
        assert first.wait() == 0, first.err
        assert "interrupted stopped" in first.out, first.out + first.err
    stop.unlink()
    with forked(PROGRAM, *given, "shared", stop, folder=tmp_path / "said") as second:
        assert second.wait() == 0, second.err
        assert "2 workers: " in second.out
    given[2] = tmp_path / "apart"
    with forked(PROGRAM, *given, "apart", stop, folder=tmp_path / "said") as apart:
        assert apart.wait() == 0, apart.err
        assert "does not see the folder" in apart.err

    def failing(task: Any, setup: Any) -> Any:
        raise RuntimeError("it always fails")

    METHODS.register("failing", describe="of a test")(failing)
    try:
        compare(
            TRAIN, dev=DEV, test=TEST, manual=MANUAL, template=WARM, out=tmp_path / "whole", seeds=2, tries=2,
            backbone=loaded("llama"), methods=["majority", "failing", "p-tuning"],
            config=TrainConfig(epochs=30, batch_size=1, lr=0.01, patience=99, checkpoint_seconds=0.0),
        )  # fmt: skip
    finally:
        del METHODS["failing"]
    whole = files_of(tmp_path / "whole")
    assert {cell["method"]: cell["status"] for cell in whole["results.json"]["cells"]} == {
        "majority": "done", "failing": "failed", "p-tuning": "done",
    }  # fmt: skip
    record: dict[str, Json] = files_of(out)["cells/task/p-tuning/seed-0/run.json"]
    assert record["worker"]["engine"] == "ray"  # type: ignore[index,call-overload]
    for other in (out, tmp_path / "apart"):
        assert without_workers(files_of(other)) == without_workers(whole)
