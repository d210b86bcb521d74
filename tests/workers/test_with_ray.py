"""Workers of Ray itself: one is killed, a cell fails, a folder is not shared; the files are those of one process."""

import importlib.util
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptuning.backbone.loading import load_backbone
from ptuning.config import TrainConfig
from ptuning.experiment.compare import compare
from ptuning.files import Json
from ptuning.method.registry import METHODS
from tests.conftest import WARM
from tests.experiment.test_comparison import DEV, MANUAL, TEST, TRAIN, files_of, has_checkpoint
from tests.processes import forked

# Imported here, Ray would keep the standard error that pytest has, which processes forked of the tests do not.
MISSING = importlib.util.find_spec("ray") is None
pytestmark = [pytest.mark.ray, pytest.mark.skipif(MISSING, reason="the extra ptuning[ray] is not installed")]

EPOCHS = 4
# A worker knows the methods that the command registers. One Ray does for all, as it takes its time to start.
PROGRAM = f"""
import json, logging, pathlib, sys
import ray  # before it is told what gives access to it
from types import SimpleNamespace
from ptuning import TrainConfig, compare, load_backbone, methods
from ptuning.experiment.comparison import Watch
from ptuning.workers import pool
from ptuning.workers.pool import WorkerConfig
logging.basicConfig(level=logging.INFO)
pool.POLL_SECONDS = 0.05  # tiny units end before the next second

@methods.register("failing", describe="of a test")
def failing(task, setup):
    raise RuntimeError("it always fails")

model, data, out, manual, template = sys.argv[1:]
train, dev, test = json.loads(pathlib.Path(data).read_text())
told = []

def run(name, workers):
    compare(
        train, dev=dev, test=test, manual=manual, template=template, out=pathlib.Path(out, name), seeds=2,
        backbone=load_backbone(model, device="cpu"), methods=["majority", "failing", "p-tuning"],
        config=TrainConfig(epochs={EPOCHS}, batch_size=1, lr=0.01, patience=99, checkpoint_seconds=0.0), tries=2,
        workers=workers, watch=Watch(report=told.append),
    )

with pool.connected(SimpleNamespace(backbone=load_backbone(model, device="cpu")), WorkerConfig(2), 2):
    run("together", WorkerConfig(2))
    pool._shape_of_cluster = lambda *_: pool.PoolShape(1, 1, 0.0)  # more threads would add in another order
    run("apart", WorkerConfig(1, shared_folder=False))
ray.init(address="local", num_cpus=1, include_dashboard=False)  # the user's own, which knows nothing of ours
print("nodes of the other", len(ray.nodes()))
ray.shutdown()
print("notes", sorted({{now.note for now in told if now.stage == "suite"}}))
print("steps of", sorted({{now.name.split("/")[0] for now in told if now.stage == "train"}}))
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
def test_a_killed_worker_changes_no_byte(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Invariant *Resume is exact*, with two workers, one of which is killed; then one that does not see the folder."""
    (tmp_path / "data.json").write_text(json.dumps([TRAIN, DEV, TEST]))
    model = model_folder("llama")
    given = [model, tmp_path / "data.json", tmp_path, MANUAL, WARM]
    home = {"HOME": str(tmp_path)}  # where a Ray of the user's own keeps what gives access to it
    with forked(PROGRAM, *given, folder=tmp_path / "said", environment=home) as program:
        program.wait_until(lambda: has_checkpoint(tmp_path / "together"))
        os.kill(next(pid for pid, unit in workers_of(program.err) if unit.startswith("p-tuning")), signal.SIGKILL)
        assert program.wait(250) == 0, program.err
        said, told = program.err, program.out
    assert "has ended in p-tuning" in said
    assert "does not see the folder" in said
    assert "nodes of the other 1" in told
    assert "at work: p-tuning-seed-" in told
    assert "steps of ['p-tuning-seed-0', 'p-tuning-seed-1']" in told

    def failing(task: Any, setup: Any) -> Any:
        raise RuntimeError("it always fails")

    METHODS.register("failing", describe="of a test")(failing)
    try:
        compare(
            TRAIN, dev=DEV, test=TEST, manual=MANUAL, template=WARM, out=tmp_path / "whole", seeds=2, tries=2,
            backbone=load_backbone(model, device="cpu"), methods=["majority", "failing", "p-tuning"],
            config=TrainConfig(epochs=EPOCHS, batch_size=1, lr=0.01, patience=99, checkpoint_seconds=0.0),
        )  # fmt: skip
    finally:
        del METHODS["failing"]
    whole = files_of(tmp_path / "whole")
    assert {cell["method"]: cell["status"] for cell in whole["results.json"]["cells"]} == {
        "majority": "done", "failing": "failed", "p-tuning": "done",
    }  # fmt: skip
    record: dict[str, Json] = files_of(tmp_path / "together")["cells/task/p-tuning/seed-0/run.json"]
    assert record["worker"]["engine"] == "ray"  # type: ignore[index,call-overload]
    for other in ("together", "apart"):
        assert without_workers(files_of(tmp_path / other)) == without_workers(whole)
