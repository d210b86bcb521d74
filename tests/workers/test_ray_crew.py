"""What the driver does with workers: units given out, results taken, workers that end, failures, and stopping.

A stand-in for Ray runs them here, in this process; with Ray itself: tests/workers/test_with_ray.py.
"""

from __future__ import annotations

import itertools
import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.backbone.placement.shards import Shards
from ptuning.backbone.sources import LoadOptions
from ptuning.errors import BackboneError, ConfigError, WorkerError
from ptuning.progress import Interrupted, OnProgress, Progress
from ptuning.workers.crew import Busy, Ended, Workers, WorkerSpec
from ptuning.workers.ray_crew import RETRIES, Attempts, Crew, CrewShape
from ptuning.workers.units import Unit
from ptuning.workers.worker import Done, Hello, Worker
from tests.workers.fake_ray import ActorUnavailableError, FakeRay

UNITS = [Unit(f"unit {number}", (f"cells/{number}",)) for number in range(5)]


@dataclass
class Stub:
    """Work that writes a file into each folder; a unit whose name is in ``failing`` raises."""

    out: Path
    backbone: Any = None
    worker: Any = None
    failing: Sequence[str] = ()
    summary: str = "results.json"

    def run_unit(
        self, unit: Unit, *, report: OnProgress | None, should_stop: Callable[[], bool] | None
    ) -> Iterator[Ended]:
        for folder in unit.folders:
            if should_stop is not None and should_stop():
                raise Interrupted("stopped")
            if report is not None:
                report(Progress("train", 1, 2, f"training {unit.name}"))
            if unit.name in self.failing:
                raise OSError(28, "No space left on device")
            (self.out / folder).mkdir(parents=True, exist_ok=True)
            (self.out / folder / "run.json").write_text(unit.name)
            yield Ended(folder, None, 1.5)


class Ready(Worker):
    """A worker that needs no backbone."""

    def ready(self, work: Any) -> Hello:
        return Hello("here", 7, sees_folder=True)


@dataclass
class Told:
    """What the driver is told."""

    progress: list[Progress] = field(default_factory=list)
    busy: list[Busy] = field(default_factory=list)


def asked(tmp_path: Path) -> WorkerSpec:
    return WorkerSpec("tiny", LoadOptions(), "a-b", tmp_path / "mark")


def crew(
    tmp_path: Path,
    *,
    make: Callable[..., Any] = Ready,
    deaths: dict[str, int] | None = None,
    count: int = 2,
    told: Told | None = None,
    **options: Any,
) -> tuple[FakeRay, Crew]:
    ray, told = FakeRay(make, dict(deaths or {})), told or Told()
    work = options.pop("work", Stub(tmp_path))
    return ray, Crew(
        ray,
        work,
        UNITS,
        CrewShape(count, 1, 0.0),
        asked(tmp_path),
        report=told.progress.append,
        tell=told.busy.append,
        **options,
    )


def test_every_unit_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptuning.workers.ray_crew.LOOK_SECONDS", 0.0)
    told = Told()
    ray, one = crew(tmp_path, told=told)
    ended = list(one.run())
    assert sorted(each.folder for each in ended) == [unit.folders[0] for unit in UNITS]
    assert all(each.error is None and each.seconds == 1.5 for each in ended)
    assert sorted(name for _, name in ray.begun) == [unit.name for unit in UNITS]
    assert {number for number, _ in ray.begun} == {1, 2}, "both workers work"
    assert {progress.note for progress in told.progress} <= {f"training {unit.name}" for unit in UNITS}
    assert any(len(busy.units) == 2 for busy in told.busy)
    one.end()
    assert ray.killed == 2


def test_progress_says_where_units_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are several machines."""
    monkeypatch.setattr("ptuning.workers.ray_crew.LOOK_SECONDS", 0.0)
    hosts = itertools.count(1)

    class Somewhere(Ready):
        def ready(self, work: Any) -> Hello:
            return Hello(f"host-{next(hosts)}", 7, sees_folder=True)

    told = Told()
    _, one = crew(tmp_path, make=Somewhere, told=told)
    list(one.run())
    assert "unit 1 on host-2" in {unit for busy in told.busy for unit in busy.units}


def test_a_worker_that_ends_costs_its_unit_another_attempt(tmp_path: Path) -> None:
    ray, one = crew(tmp_path, deaths={"unit 1": RETRIES})
    assert sorted(each.folder for each in one.run() if each.error is None) == [unit.folders[0] for unit in UNITS]
    assert [name for _, name in ray.begun].count("unit 1") == RETRIES + 1


@pytest.mark.parametrize("seconds", [300.0, 0.0])
def test_a_worker_that_takes_long_to_be_there_again_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Ray says every two seconds that it is unavailable, which is no end of it; but not for ever."""
    monkeypatch.setattr("ptuning.workers.ray_crew.START_SECONDS", seconds)
    asked_again = itertools.count()

    class Slow(Ready):
        def ready(self, work: Any) -> Hello:
            if 0 < next(asked_again) <= 5 * RETRIES:
                raise ActorUnavailableError("The actor is temporarily unavailable")
            return super().ready(work)

    _, one = crew(tmp_path, make=Slow, deaths={"unit 1": 1}, count=1)
    if not seconds:
        with pytest.raises(WorkerError, match=r"no worker is left \(The actor is temporarily unavailable\)"):
            list(one.run())
        return
    assert sorted(each.folder for each in one.run() if each.error is None) == [unit.folders[0] for unit in UNITS]


def test_a_unit_that_ends_every_worker_fails_alone(tmp_path: Path) -> None:
    """Ray itself would try for ever where a worker has too little memory."""
    ray, one = crew(tmp_path, deaths={"unit 1": 99})
    ended = {each.folder: each.error for each in one.run()}
    assert [folder for folder, error in ended.items() if error is not None] == ["cells/1"]
    assert re.search(r"ended 4 times without getting further \(The actor died unexpectedly\)", str(ended["cells/1"]))
    assert len(ended) == len(UNITS)
    assert [name for _, name in ray.begun].count("unit 1") == RETRIES + 1


def test_a_unit_that_gets_further_each_time_is_not_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines that are taken away again and again end a long unit more often than a few times."""
    monkeypatch.setattr("ptuning.workers.ray_crew.LOOK_SECONDS", 0.0)
    steps = itertools.count(1)

    class Reports(Ready):
        def told(self) -> list[Progress]:
            return [Progress("train", 0, 0, "", "one", {"step": next(steps)})]

    _, one = crew(tmp_path, make=Reports, deaths={"unit 1": 3 * RETRIES})
    assert [each.folder for each in one.run() if each.error is not None] == []


def test_steps_that_were_reached_before_do_not_count() -> None:
    attempts, unit = Attempts(), UNITS[0]
    for step, lost in ((10, 1), (10, 2), (9, 3), (11, 1), (3, 2)):
        attempts.saw(unit, Progress("train", 0, 0, "", "one", {"step": step}))
        assert attempts.lost(unit) == lost


def test_a_full_disk_on_a_worker_fails_its_unit_alone(tmp_path: Path) -> None:
    _, one = crew(tmp_path, work=Stub(tmp_path, failing=("unit 3",)))
    ended = {each.folder: each.error for each in one.run()}
    assert {folder for folder, error in ended.items() if error is None} == {f"cells/{at}" for at in (0, 1, 2, 4)}
    assert "No space left on device" in str(ended["cells/3"])


def test_a_backbone_that_cannot_be_loaded_is_said_once(tmp_path: Path) -> None:
    class Broken(Worker):
        def ready(self, work: Any) -> Hello:
            raise BackboneError("no such backbone: tiny; give a folder")

    _, one = crew(tmp_path, make=Broken)
    with pytest.raises(WorkerError, match=r"^a worker cannot do its work: no such backbone: tiny; give a folder$"):
        list(one.run())


def test_workers_that_end_while_they_start_are_given_up(tmp_path: Path) -> None:
    from tests.workers.fake_ray import RayError

    class Dying(Worker):
        def ready(self, work: Any) -> Hello:
            raise RayError("out of memory")

    _, one = crew(tmp_path, make=Dying)
    with pytest.raises(WorkerError, match=r"no worker is left \(out of memory\)"):
        list(one.run())


def test_a_stop_lets_workers_write_checkpoints(tmp_path: Path) -> None:
    """What was finished before is kept."""
    ends = iter([False, False, False, True])
    ray, one = crew(tmp_path, should_stop=lambda: next(ends), count=1)
    ended: list[Ended] = []
    with pytest.raises(Interrupted, match="stopped"):
        ended.extend(one.run())
    assert [each.folder for each in ended] == ["cells/0", "cells/1"]
    assert [name for _, name in ray.begun] == ["unit 0", "unit 1", "unit 2"]


def test_files_of_a_worker_without_the_folder_come_along(tmp_path: Path) -> None:
    """And only into the folders of its results."""

    class Away(Ready):
        def run(self, unit: Unit, work: Any) -> Done:
            folder = unit.folders[0]
            files = {f"{folder}/run.json": b"{}", f"{folder}/try-1/x.bin": b"\x00", "results.json": b"mine"}
            if unit.name == "unit 4":
                files = {f"{folder}/../../../x": b"out"}
            return Done([Ended(folder)], files)

    _, one = crew(tmp_path / "out", make=Away)
    ended = {each.folder: each.error for each in one.run()}
    assert (tmp_path / "out/cells/0/try-1/x.bin").read_bytes() == b"\x00"
    assert not (tmp_path / "out/results.json").exists()
    assert [folder for folder, error in ended.items() if error is not None] == ["cells/4"]
    assert not (tmp_path / "x").exists()


class TestWorker:
    """What runs in the process of a worker, in this one."""

    def asked(self, loaded: Backbone, mark: Path, **options: Any) -> WorkerSpec:
        found = WorkerSpec.of(Stub(mark.parent, loaded), Workers(2), mark=mark, threads=1)
        return type(found)(**{**vars(found), **options})

    def test_it_loads_the_backbone_and_writes_where_it_sees_the_folder(self, causal: Backbone, tmp_path: Path) -> None:
        (tmp_path / "mark").touch()
        worker = Worker(self.asked(causal, tmp_path / "mark"))
        assert worker.ready(Stub(tmp_path)).sees_folder
        assert worker.run(UNITS[0], Stub(tmp_path)) == Done([Ended("cells/0", None, 1.5)])
        assert (tmp_path / "cells/0/run.json").read_text() == "unit 0"
        assert [progress.note for progress in worker.told()] == ["training unit 0"]
        assert worker.told() == []
        worker.stop()
        assert worker.run(UNITS[1], Stub(tmp_path)).stopped

    def test_it_sends_the_files_where_it_does_not(self, causal: Backbone, tmp_path: Path) -> None:
        worker = Worker(self.asked(causal, tmp_path / "mark"))
        assert not worker.ready(Stub(tmp_path)).sees_folder
        assert worker.run(UNITS[0], Stub(tmp_path)).files == {"cells/0/run.json": b"unit 0"}
        assert not (tmp_path / "cells").exists()

    def test_it_loads_the_backbone_as_it_was_loaded(self, model_folder: Callable[[str], Path], tmp_path: Path) -> None:
        """With all that was asked for; a model in memory has its name, its number format and its device."""
        options: dict[str, Any] = {"device_map": {"": "cpu"}, "attn_implementation": "eager", "max_length": 50}
        backbone = load_backbone(model_folder("llama"), **options)
        asked = self.asked(backbone, tmp_path / "mark")
        assert asked.loading == LoadOptions(dtype="float32", **options)
        assert (asked.backbone, asked.fingerprint) == (str(model_folder("llama")), backbone.fingerprint)
        other = Backbone.from_model(backbone.model, backbone.tokenizer._tokenizer, name="mine")
        assert self.asked(other, tmp_path / "mark").loading == LoadOptions(
            dtype="float32", device="cpu", attn_implementation="eager"
        )

    def test_a_backbone_over_several_processes_is_refused(self, causal: Backbone, tmp_path: Path) -> None:
        causal.shards = Shards("tp", 2)
        with pytest.raises(ConfigError, match="workers have a whole backbone each: leave out shard"):
            self.asked(causal, tmp_path / "mark")

    def test_another_version_or_backbone_is_refused(self, causal: Backbone, tmp_path: Path) -> None:
        mark = tmp_path / "mark"
        given = self.asked(causal, mark)
        with pytest.raises(WorkerError, match=r"has torch .*, not 1\.0\. Install the same versions"):
            Worker(self.asked(causal, mark, versions={**given.versions, "torch": "1.0"})).ready(Stub(tmp_path))
        with pytest.raises(WorkerError, match=r"is another one \(fingerprint .* and not 0-0\)"):
            Worker(self.asked(causal, mark, fingerprint="0-0")).ready(Stub(tmp_path))
        with pytest.raises(BackboneError, match="nowhere"):
            Worker(self.asked(causal, mark, backbone=str(tmp_path / "nowhere"))).ready(Stub(tmp_path))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "say how many workers"),
        ({"count": 0}, "workers is 0; it must be 1 or more"),
        ({"count": 2, "gpus": 0.0}, "gpus of a worker is 0"),
        ({"count": 2, "gpus": 1.5}, "gpus of a worker is 1.5"),
        ({"count": 2, "gpus": float("nan")}, "gpus of a worker is nan"),
        ({"count": 2, "gpus": float("inf")}, "gpus of a worker is inf"),
        ({"address": " "}, "the address of the cluster is empty"),
    ],
)
def test_workers_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        Workers(**options)


def test_a_line_of_progress_fits() -> None:
    assert str(Busy([], 2)) == "2 starting"
    assert str(Busy(["a", "b"])) == "2 at work: a, b"
    assert str(Busy(list("abcdefgh"), 1)) == "8 at work: a, b, c and 5 more; 1 starting"


def test_one_worker_here_is_none() -> None:
    assert Workers.of(1) is None
    assert Workers.of(None) is None
    assert Workers.of(2) == Workers(2)
    assert Workers.of(Workers(1, "auto")) == Workers(1, "auto")


def test_the_address_of_the_environment_counts_for_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert (Workers(address="auto").place, Workers(2).place) == ("auto", None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    assert (Workers(address="auto").place, Workers(2).place) == ("10.0.0.5:6379", None)
    assert Workers(address="other:1").place == "other:1"


def test_workers_are_not_started_by_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process of torchrun would start its own, which would believe that they are those of torchrun."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"started 4 processes, .* start the command once, without torchrun"):
        Workers(2).check()


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(WorkerError, match=r'need the package ray, .*pip install .*"ptuning\[ray\]"'):
        Workers(2).check()


def test_an_address_that_does_not_answer_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself would try for minutes."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: "there")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(WorkerError, match=f"nothing answers at {address}"):
        Workers(address=address).check()
    with socket.create_server(("127.0.0.1", 0)) as server:
        Workers(address=f"127.0.0.1:{server.getsockname()[1]}").check()
    for wrong in ("somewhere", "host:", ":6379", "host:port", "host:99999", "host:6379/x"):
        with pytest.raises(ConfigError, match=f"'{wrong}' is not HOST:PORT"):
            Workers(address=wrong).check()
