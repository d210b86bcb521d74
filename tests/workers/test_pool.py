"""The driver of a pool of workers: jobs given out, lost workers, failures and stops; and what runs in a worker.

A stand-in for Ray runs the workers in this process; with Ray itself: tests/workers/test_with_ray.py.
"""

import itertools
import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.backbone.sources import LoadOptions
from ptuning.backbone.weights import Shards
from ptuning.errors import BackboneError, ConfigError, WorkerError
from ptuning.progress import Interrupted, Progress
from ptuning.workers.jobs import Job, JobResult, JobRun, JobSet
from ptuning.workers.pool import RETRIES, Attempts, Pool, PoolShape, PoolStatus, Ready, Worker, WorkerConfig, WorkerSpec
from tests.workers.fake_ray import ActorUnavailableError, FakeRay, RayError

JOBS = [Job(f"job {number}", (f"cells/{number}",)) for number in range(5)]
FOLDERS = [job.folders[0] for job in JOBS]


class Stub(JobSet[str]):
    """Jobs that write a file into each folder; one whose name is in ``failing`` raises."""

    summary = "results.json"

    def __init__(self, out: Path, backbone: Any = None, failing: Sequence[str] = ()) -> None:
        self.out, self.backbone, self.failing = out, backbone, failing
        self.statuses: list[str] = []

    def run_job(self, job: Job, run: JobRun) -> Iterator[JobResult[str]]:
        for folder in job.folders:
            run.check_stop()
            if run.report is not None:
                run.report(Progress("train", 1, 2, f"training {job.name}"))
            if job.name in self.failing:
                raise OSError(28, "No space left on device")
            (self.out / folder).mkdir(parents=True, exist_ok=True)
            (self.out / folder / "run.json").write_text(job.name)
            yield JobResult(folder, None, 1.5, "a value that stays in its process")

    def load(self, folder: str) -> str | None:
        return None

    def collect(self, result: JobResult[Any]) -> str:
        return result.folder

    def report_status(self, run: JobRun, status: str) -> None:
        self.statuses.append(status)


class NoBackbone(Worker):
    """A worker that needs no backbone."""

    def ready(self, jobs: Any) -> Ready:
        return Ready("here", 7, sees_folder=True)


def make_pool(
    tmp_path: Path,
    *,
    make: Callable[..., Any] = NoBackbone,
    deaths: dict[str, int] | None = None,
    count: int = 2,
    jobs: Stub | None = None,
    run: JobRun | None = None,
) -> tuple[FakeRay, Pool]:
    ray = FakeRay(make, dict(deaths or {}))
    spec = WorkerSpec("tiny", LoadOptions(), "a-b", tmp_path / "mark")
    return ray, Pool(ray, jobs or Stub(tmp_path), JOBS, PoolShape(count, 1, 0.0), spec, run or JobRun(JOBS))


def errors_of(pool: Pool) -> dict[str, str | None]:
    """Run all jobs; return folder -> error."""
    return {result.folder: result.error for result in pool.results()}


@pytest.fixture
def polled_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptuning.workers.pool.POLL_SECONDS", 0.0)


@pytest.mark.usefixtures("polled_always")
def test_every_job_is_done_once_and_progress_names_the_machines(tmp_path: Path) -> None:
    hosts = itertools.count(1)

    class Somewhere(NoBackbone):
        def ready(self, jobs: Any) -> Ready:
            return Ready(f"host-{next(hosts)}", 7, sees_folder=True)

    progress: list[Progress] = []
    jobs = Stub(tmp_path)
    ray, pool = make_pool(tmp_path, make=Somewhere, jobs=jobs, run=JobRun(JOBS, progress.append))
    results = list(pool.results())
    assert sorted(results, key=lambda result: result.folder) == [JobResult(folder, None, 1.5) for folder in FOLDERS]
    assert sorted(name for _, name in ray.begun) == [job.name for job in JOBS]
    assert {number for number, _ in ray.begun} == {1, 2}, "both workers work"
    assert {one.note for one in progress} <= {f"training {job.name}" for job in JOBS}
    assert any(re.match("2 at work: .*job 1 on host-2", status) for status in jobs.statuses)
    pool.end()
    assert ray.killed == 2


@pytest.mark.parametrize(("deaths", "failed"), [(RETRIES, []), (99, ["cells/1"])])
def test_a_job_whose_worker_ends_is_run_again_a_few_times(tmp_path: Path, deaths: int, failed: list[str]) -> None:
    """Ray itself would try for ever where a worker has too little memory."""
    ray, pool = make_pool(tmp_path, deaths={"job 1": deaths})
    errors = errors_of(pool)
    assert sorted(errors) == FOLDERS
    assert [folder for folder, error in errors.items() if error is not None] == failed
    assert [name for _, name in ray.begun].count("job 1") == RETRIES + 1
    if failed:
        assert re.search(r"4 times .*The actor died unexpectedly", str(errors["cells/1"]))


@pytest.mark.usefixtures("polled_always")
def test_a_job_that_gets_further_each_time_is_not_given_up(tmp_path: Path) -> None:
    """Machines that are taken away again and again end a long job more often than a few times."""
    steps = itertools.count(1)

    class Reports(NoBackbone):
        def progress(self) -> list[Progress]:
            return [Progress("train", 0, 0, "", "one", {"step": next(steps)})]

    _, pool = make_pool(tmp_path, make=Reports, deaths={"job 1": 3 * RETRIES})
    assert set(errors_of(pool).values()) == {None}


def test_steps_that_were_reached_before_do_not_count() -> None:
    attempts = Attempts()
    for step, lost in ((10, 1), (10, 2), (9, 3), (11, 1), (3, 2)):
        attempts.saw(Progress("train", 0, 0, "", "one", {"step": step}))
        assert attempts.lose() == lost


@pytest.mark.parametrize("seconds", [300.0, 0.0])
def test_a_worker_that_is_unavailable_for_a_while_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Ray says every two seconds that a starting worker is unavailable; but it may not take for ever."""
    monkeypatch.setattr("ptuning.workers.pool.START_SECONDS", seconds)
    calls = itertools.count()

    class Slow(NoBackbone):
        def ready(self, jobs: Any) -> Ready:
            if 0 < next(calls) <= 5 * RETRIES:
                raise ActorUnavailableError("The actor is temporarily unavailable")
            return super().ready(jobs)

    _, pool = make_pool(tmp_path, make=Slow, deaths={"job 1": 1}, count=1)
    if seconds:
        assert errors_of(pool) == dict.fromkeys(FOLDERS)
    else:
        with pytest.raises(WorkerError, match=r"no worker is left \(The actor is temporarily unavailable\)"):
            list(pool.results())


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (RayError("out of memory"), r"no worker is left \(out of memory\)"),
        (BackboneError("no such: tiny"), "no such: tiny"),
    ],
)
def test_workers_that_cannot_start_end_the_run(tmp_path: Path, error: Exception, match: str) -> None:
    class Broken(Worker):
        def ready(self, jobs: Any) -> Ready:
            raise error

    _, pool = make_pool(tmp_path, make=Broken)
    with pytest.raises(WorkerError, match=match):
        list(pool.results())


def test_a_full_disk_on_a_worker_fails_its_job_alone(tmp_path: Path) -> None:
    _, pool = make_pool(tmp_path, jobs=Stub(tmp_path, failing=("job 3",)))
    errors = errors_of(pool)
    assert "No space left on device" in str(errors.pop("cells/3"))
    assert errors == dict.fromkeys(folder for folder in FOLDERS if folder != "cells/3")


def test_a_stop_lets_workers_write_checkpoints(tmp_path: Path) -> None:
    """What was finished before is kept."""
    stops = iter([False, False, False, True])
    ray, pool = make_pool(tmp_path, run=JobRun(JOBS, should_stop=lambda: next(stops)), count=1)
    results: list[JobResult[Any]] = []
    with pytest.raises(Interrupted):
        results.extend(pool.results())
    assert [result.folder for result in results] == ["cells/0", "cells/1"]
    assert [name for _, name in ray.begun] == ["job 0", "job 1", "job 2"]


def test_files_of_a_worker_without_the_folder_are_sent(tmp_path: Path) -> None:
    """And written only into the folders of its results."""

    class Away(NoBackbone):
        def run(self, job: Job, jobs: Any) -> tuple[list[JobResult[Any]], dict[str, bytes]]:
            folder = job.folders[0]
            files = {f"{folder}/run.json": b"{}", f"{folder}/try-1/x.bin": b"\x00", "results.json": b"mine"}
            if job.name == "job 4":
                files = {f"{folder}/../../../x": b"out"}
            return [JobResult(folder)], files

    _, pool = make_pool(tmp_path / "out", make=Away)
    errors = errors_of(pool)
    assert (tmp_path / "out/cells/0/try-1/x.bin").read_bytes() == b"\x00"
    assert not (tmp_path / "out/results.json").exists()
    assert [folder for folder, error in errors.items() if error is not None] == ["cells/4"]
    assert not (tmp_path / "x").exists()


class TestWorker:
    """The code in the process of a worker, run in this one."""

    def spec(self, loaded: Backbone, mark: Path, **changes: Any) -> WorkerSpec:
        spec = WorkerSpec.of(Stub(mark.parent, loaded), WorkerConfig(2), mark=mark, threads=1)
        return WorkerSpec(**{**vars(spec), **changes})

    def test_it_writes_where_it_sees_the_folder(self, causal: Backbone, tmp_path: Path) -> None:
        (tmp_path / "mark").touch()
        worker = Worker(self.spec(causal, tmp_path / "mark"))
        assert worker.ready(Stub(tmp_path)).sees_folder
        assert worker.run(JOBS[0], Stub(tmp_path)) == ([JobResult("cells/0", None, 1.5)], {})
        assert (tmp_path / "cells/0/run.json").read_text() == "job 0"
        assert [progress.note for progress in worker.progress()] == ["training job 0"]
        assert worker.progress() == []
        worker.stop()
        assert worker.run(JOBS[1], Stub(tmp_path)) == ([], {})

    def test_it_sends_the_files_where_it_does_not(self, causal: Backbone, tmp_path: Path) -> None:
        worker = Worker(self.spec(causal, tmp_path / "mark"))
        assert not worker.ready(Stub(tmp_path)).sees_folder
        assert worker.run(JOBS[0], Stub(tmp_path))[1] == {"cells/0/run.json": b"job 0"}
        assert not (tmp_path / "cells").exists()

    def test_it_loads_the_backbone_as_it_was_loaded(self, model_folder: Callable[[str], Path], tmp_path: Path) -> None:
        """With all options; a model in memory has its name, its number format and its device."""
        options: dict[str, Any] = {"device_map": {"": "cpu"}, "attn_implementation": "eager", "max_length": 50}
        backbone = load_backbone(model_folder("llama"), **options)
        spec = self.spec(backbone, tmp_path / "mark")
        assert spec.loading == LoadOptions(dtype="float32", **options)
        assert (spec.backbone, spec.fingerprint) == (str(model_folder("llama")), backbone.fingerprint)
        other = Backbone.from_model(backbone.model, backbone.tokenizer._tokenizer, name="mine")
        assert self.spec(other, tmp_path / "mark").loading == LoadOptions(
            dtype="float32", device="cpu", attn_implementation="eager"
        )

    def test_a_backbone_over_several_processes_is_refused(self, causal: Backbone, tmp_path: Path) -> None:
        causal.shards = Shards("tp", 2)
        with pytest.raises(ConfigError, match="shard=tp"):
            self.spec(causal, tmp_path / "mark")

    def test_another_version_or_backbone_is_refused(self, causal: Backbone, tmp_path: Path) -> None:
        mark = tmp_path / "mark"
        versions = {**self.spec(causal, mark).versions, "torch": "1.0"}
        for change, error, match in (
            ({"versions": versions}, WorkerError, r"torch .*, not 1\.0"),
            ({"fingerprint": "0-0"}, WorkerError, "fingerprint .* and not 0-0"),
            ({"backbone": str(tmp_path / "nowhere")}, BackboneError, "nowhere"),
        ):
            with pytest.raises(error, match=match):
                Worker(self.spec(causal, mark, **change)).ready(Stub(tmp_path))


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({}, "number of workers"),
        ({"count": 0}, "workers is 0"),
        *(
            ({"count": 2, "gpus": gpus}, f"GPUs per worker is {gpus:g}")
            for gpus in (0.0, 1.5, float("nan"), float("inf"))
        ),
        ({"address": " "}, "address of the cluster is empty"),
    ],
)
def test_bad_configs_are_refused(options: dict[str, Any], fact: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(fact)):
        WorkerConfig(**options)


def test_a_status_fits_into_a_line() -> None:
    assert str(PoolStatus([], 2)) == "2 starting"
    assert str(PoolStatus(["a", "b"])) == "2 at work: a, b"
    assert str(PoolStatus(list("abcdefgh"), 1)) == "8 at work: a, b, c and 5 more; 1 starting"


def test_one_worker_here_is_none() -> None:
    assert WorkerConfig.of(1) is WorkerConfig.of(None) is None
    assert WorkerConfig.of(2) == WorkerConfig(2)
    assert WorkerConfig.of(WorkerConfig(1, "auto")) == WorkerConfig(1, "auto")


def test_the_address_of_the_environment_counts_for_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert (WorkerConfig(address="auto").cluster, WorkerConfig(2).cluster) == ("auto", None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    assert (WorkerConfig(address="auto").cluster, WorkerConfig(2).cluster) == ("10.0.0.5:6379", None)
    assert WorkerConfig(address="other:1").cluster == "other:1"


def test_launchers_and_a_missing_ray_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process of torchrun would start workers of its own."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(WorkerError, match=r'"ptuning\[ray\]"'):
        WorkerConfig(2).check()
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="4 processes"):
        WorkerConfig(2).check()


def test_an_address_that_does_not_answer_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself would try for minutes."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: "there")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(WorkerError, match=address):
        WorkerConfig(address=address).check()
    with socket.create_server(("127.0.0.1", 0)) as server:
        WorkerConfig(address=f"127.0.0.1:{server.getsockname()[1]}").check()
    for wrong in ("somewhere", "host:", ":6379", "host:port", "host:99999", "host:6379/x"):
        with pytest.raises(ConfigError, match=f"'{wrong}' is not HOST:PORT"):
            WorkerConfig(address=wrong).check()
