"""The loop that runs jobs: here, or in a pool of workers (actors of Ray), where lost ones are replaced."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import platform
import secrets
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch

from ptuning.backbone.number_format import short_name
from ptuning.backbone.sources import LoadOptions
from ptuning.backbone.weights import launched
from ptuning.errors import ConfigError, PTuningError, WorkerError
from ptuning.files import make_folder, new_path, write_bytes
from ptuning.names import RUN_FILE
from ptuning.progress import Interrupted, Progress
from ptuning.provenance import versions
from ptuning.workers.jobs import Job, JobResult, JobRun, JobSet

logger = logging.getLogger(__name__)

T = TypeVar("T")

AUTO = "auto"
ADDRESS_VARIABLE = "RAY_ADDRESS"
CONNECT_SECONDS = 10.0
SHARDED = (
    "workers have a whole backbone each: leave out shard=tp and shard=layers, or use shard=map or quantize, or "
    "no workers"
)
# How often a job that gets no further is run again, and a worker that cannot start is started again.
RETRIES = 3
# Time between two polls of the workers' progress; with many workers, polling is work, too.
POLL_SECONDS, POLL_SECONDS_OF_MANY, MANY = 1.0, 5.0, 100
# How long a worker may be unavailable: Ray says so while it starts and imports.
START_SECONDS = 300.0
# How long workers may take to write checkpoints when they are to stop.
STOP_SECONDS = 120.0
MAX_THREADS = 16
MAX_KEPT_PROGRESS = 10_000
SHOWN_JOBS = 3
# Settings of a local Ray: no usage statistics, and only who knows its token may give it work.
LOCAL_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}


@dataclass(frozen=True)
class WorkerConfig:
    """Processes that share the jobs of a comparison or a fleet, each with a backbone of its own. Ray runs them.

    Args:
        count: Number of workers; with an ``address``, by default as many as the cluster has GPUs (or nodes) for.
        address: A running Ray cluster, ``HOST:PORT`` or ``auto`` (then ``RAY_ADDRESS``, or one on this machine counts);
            None starts Ray on this machine, and ends it.
        gpus: GPUs for each worker, such as 0.25 for four workers on one; by default an equal share, one at most.
        loading: How workers load the backbone; by default as it was loaded.
        shared_folder: Whether workers see the folder of the results; by default that is found out.

    Raises:
        ConfigError: If a value is out of range.
    """

    count: int | None = None
    address: str | None = None
    gpus: float | None = None
    loading: LoadOptions | None = field(default=None, repr=False)
    shared_folder: bool | None = None

    def __post_init__(self) -> None:
        if self.count is None and self.address is None:
            raise ConfigError("give the number of workers (count) or the cluster that runs them (address)")
        if self.count is not None and self.count < 1:
            raise ConfigError(f"workers is {self.count}; it must be 1 or more")
        if self.gpus is not None and not (0 < self.gpus <= 1 or (self.gpus > 1 and float(self.gpus).is_integer())):
            raise ConfigError(
                f"GPUs per worker is {self.gpus:g}; it must be a share above 0 and up to 1, or a whole number"
            )
        if self.address is not None and not self.address.strip():
            raise ConfigError("the address of the cluster is empty; give HOST:PORT, or auto")

    @classmethod
    def of(cls, workers: WorkerConfig | int | None) -> WorkerConfig | None:
        """Return the config for a number of workers on this machine; None if a single process is enough."""
        config = cls(workers) if isinstance(workers, int) else workers
        return None if config == cls(1) else config

    @property
    def cluster(self) -> str | None:
        """The address to connect to; None for a local Ray."""
        return os.environ.get(ADDRESS_VARIABLE) or AUTO if self.address == AUTO else self.address

    def check(self) -> None:
        """Check that Ray is installed and that something listens at the address; Ray itself would try for minutes.

        Raises:
            WorkerError: If Ray is missing or the cluster does not answer.
            ConfigError: If the address is malformed, or a launcher has started several processes, which would each
                start workers.
        """
        if (processes := launched()) > 1:
            raise ConfigError(
                f"a launcher has started {processes} processes (WORLD_SIZE), and each would start workers of its own; "
                "start the command once, without torchrun, or leave out the workers"
            )
        if importlib.util.find_spec("ray") is None:
            raise WorkerError(
                'workers need the package ray, which is not installed: pip install -c constraints.txt "ptuning[ray]"'
            )
        if self.cluster in (None, AUTO):
            return
        host, _, port = str(self.cluster).removeprefix("ray://").rpartition(":")
        if not host or not (port.isascii() and port.isdigit() and int(port) < 2**16):
            raise ConfigError(f"the address '{self.cluster}' is not HOST:PORT, such as 10.0.0.5:6379, nor auto")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
        except (OSError, UnicodeError) as error:
            raise WorkerError(
                f"nothing answers at {self.cluster} ({error}); start a cluster there with 'ray start --head', or give "
                "another address"
            ) from error


@dataclass(frozen=True)
class PoolStatus:
    """The jobs that workers are at, and the number of workers that still start."""

    jobs: Sequence[str]
    starting: int = 0

    def __str__(self) -> str:
        names, more = ", ".join(self.jobs[:SHOWN_JOBS]), len(self.jobs) - SHOWN_JOBS
        parts = [f"{len(self.jobs)} at work: {names}" + (f" and {more} more" if more > 0 else "")] if self.jobs else []
        return "; ".join([*parts, *([f"{self.starting} starting"] if self.starting else [])])


@dataclass(frozen=True)
class PoolShape:
    """The number of workers, and the threads and GPUs of each."""

    count: int
    threads: int
    gpus: float


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker needs besides the jobs, and what must be equal there.

    ``mark`` is a file in the folder of the results: a worker that sees it writes there itself.
    """

    backbone: str
    loading: LoadOptions
    fingerprint: str
    mark: Path
    shared_folder: bool | None = None
    threads: int = 1
    dtype_reason: str | None = None
    folder: Path = field(default_factory=Path.cwd)
    versions: dict[str, str] = field(default_factory=versions)

    @classmethod
    def of(cls, jobs: JobSet[Any], workers: WorkerConfig, *, mark: Path, threads: int) -> WorkerSpec:
        """Return the spec of workers that load the backbone as it was loaded here."""
        backbone = jobs.backbone
        if backbone.shards is not None:
            raise ConfigError(SHARDED)
        loading = (
            workers.loading
            or backbone.load_options
            or LoadOptions(
                revision=backbone.revision,
                attn_implementation=backbone.loaded.get("attn_implementation"),
                max_length=backbone.max_length,
                device=backbone.device.type,
            )
        )
        # A worker on a GPU sees only its own, so the number of a device means nothing there.
        device = loading.device.partition(":")[0]
        return cls(
            backbone.name,
            replace(loading, dtype=short_name(backbone.dtype), device=device),
            backbone.fingerprint,
            mark,
            workers.shared_folder,
            threads,
            backbone.dtype_reason,
        )


@dataclass(frozen=True)
class Ready:
    """A worker that has loaded its backbone."""

    host: str
    pid: int
    sees_folder: bool


class Worker:
    """Runs in the process of a worker. One thread calls :meth:`ready` and :meth:`run`, another one :meth:`progress` and
    :meth:`stop`. Both of the former get the jobs, since Ray restarts a worker that has ended.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._jobs: JobSet[Any] | None = None
        self._stops = threading.Event()
        self._progress: deque[Progress] = deque(maxlen=MAX_KEPT_PROGRESS)
        self._ready: Ready | None = None

    def ready(self, jobs: JobSet[Any]) -> Ready:
        """Load the backbone, unless that was done; a PTuningError if it is not the one of the command."""
        torch.set_num_threads(self._spec.threads)  # it counts for the thread that calls it
        if self._ready is None:
            self._ready = self._prepare(jobs)
        return self._ready

    def _prepare(self, jobs: JobSet[Any]) -> Ready:
        from ptuning.backbone.loading import load_backbone

        spec, host = self._spec, platform.node()
        wrong = [
            f"{name} {v}, not {spec.versions.get(name)}"
            for name, v in versions().items()
            if v != spec.versions.get(name)
        ]
        if wrong:
            raise WorkerError(f"a worker on {host} has {'; '.join(wrong)}. Install the same versions on all machines")
        if spec.folder.is_dir():
            os.chdir(spec.folder)  # relative paths mean there what they mean here
        backbone = load_backbone(spec.backbone, **vars(spec.loading))
        if backbone.fingerprint != spec.fingerprint:
            raise WorkerError(
                f"the backbone {spec.backbone} on {host} is another one (fingerprint {backbone.fingerprint} and not "
                f"{spec.fingerprint}); put the same files on all machines"
            )
        backbone.dtype_reason = spec.dtype_reason
        jobs.backbone, jobs.worker = backbone, {"engine": "ray", "host": host, "pid": os.getpid()}
        self._jobs = jobs
        sees_folder = spec.mark.is_file() if spec.shared_folder is None else spec.shared_folder
        return Ready(host, os.getpid(), sees_folder)

    def run(self, job: Job, jobs: JobSet[Any]) -> tuple[list[JobResult[Any]], dict[str, bytes]]:
        """Do a job; return the results, and path -> content of their files if this worker cannot write them itself.

        What stops the whole job, such as a full disk, is the error of the results that are left.
        """
        sees_folder, jobs = self.ready(jobs).sees_folder, self._jobs or jobs
        if sees_folder:
            return self._run(job, jobs), {}
        with tempfile.TemporaryDirectory(prefix="ptuning-", ignore_cleanup_errors=True) as temporary:
            jobs.out = Path(temporary)
            results = self._run(job, jobs)
            files = (path for result in results for path in sorted((jobs.out / result.folder).rglob("*")))
            return results, {
                path.relative_to(jobs.out).as_posix(): path.read_bytes() for path in files if path.is_file()
            }

    def _run(self, job: Job, jobs: JobSet[Any]) -> list[JobResult[Any]]:
        results: list[JobResult[Any]] = []
        try:
            for result in jobs.run_job(job, JobRun([job], self._progress.append, self._stops.is_set)):
                results.append(replace(result, value=None))
        except Interrupted:
            pass
        except Exception as error:  # noqa: BLE001
            text, done = str(error) or type(error).__name__, {result.folder for result in results}
            results += [JobResult(folder, text) for folder in job.folders if folder not in done]
        return results

    def progress(self) -> list[Progress]:
        """Return the progress since the last call."""
        return [self._progress.popleft() for _ in range(len(self._progress))]

    def stop(self) -> None:
        """Let the job write a checkpoint and end."""
        self._stops.set()


def run_jobs(jobs: JobSet[T], run: JobRun, workers: WorkerConfig | None = None) -> Iterator[JobResult[T]]:
    """Run all jobs, one after another in this process or on workers, and yield each result.

    Raises:
        Interrupted: If ``should_stop`` returned true.
    """
    in_turn = (result for job in run.jobs for result in jobs.run_job(job, run))
    for result in in_turn if workers is None else _run_on(workers, jobs, run):
        run.done[result.folder] = result
        yield result


def _run_on(workers: WorkerConfig, jobs: JobSet[T], run: JobRun) -> Iterator[JobResult[T]]:
    left: list[Job] = []
    for job in run.jobs:
        values = {folder: value for folder in job.folders if (value := jobs.load(folder)) is not None}
        yield from (JobResult(folder, value=value) for folder, value in values.items())
        left += [job] if len(values) < len(job.folders) else []
    for result in run_pool(jobs, left, workers, run) if left else ():
        if result.folder not in run.done:
            yield JobResult(result.folder, result.error, result.seconds, jobs.collect(result))


def run_pool(jobs: JobSet[Any], left: Sequence[Job], workers: WorkerConfig, run: JobRun) -> Iterator[JobResult[Any]]:
    """Let workers do the jobs that are ``left``, and yield each result, which is in the folder of the jobs then.

    Raises:
        WorkerError: If workers cannot be started, or cannot do the work.
        Interrupted: If the run is to stop; workers have written checkpoints.
    """
    make_folder(jobs.out)
    mark = new_path(jobs.out.absolute() / jobs.summary)  # swept if it is left over
    with connected(jobs, workers, len(left)) as (ray, shape):
        write_bytes(mark, b"")
        pool = Pool(ray, jobs, left, shape, WorkerSpec.of(jobs, workers, mark=mark, threads=shape.threads), run)
        try:
            yield from pool.results()
        finally:
            pool.end()
            mark.unlink(missing_ok=True)


@contextlib.contextmanager
def connected(jobs: JobSet[Any], workers: WorkerConfig, count: int) -> Iterator[tuple[Any, PoolShape]]:
    """Yield Ray, connected to the cluster or started here, and the shape of the pool for ``count`` jobs on it."""
    with contextlib.ExitStack() as last, contextlib.ExitStack() as after:
        if workers.cluster is None:
            settings = {**LOCAL_SETTINGS, "RAY_AUTH_TOKEN": _token()}
            after.enter_context(_environment(settings, without=ADDRESS_VARIABLE))
        workers.check()
        import ray

        if ray.is_initialized():
            yield ray, _shape_of_cluster(jobs, workers, count, ray)
            return
        after.enter_context(_signal_handlers_kept())
        if workers.cluster is None:
            _read_token()
            last.callback(_read_token)
            shape = _shape_here(jobs, workers, count)
            folder = after.enter_context(tempfile.TemporaryDirectory(prefix="ptuning-ray-", ignore_cleanup_errors=True))
            _start(ray, "local", num_cpus=shape.count * shape.threads, include_dashboard=False, _temp_dir=folder)
            after.callback(ray.shutdown)
        else:
            _start(ray, workers.cluster)
            after.callback(ray.shutdown)
            shape = _shape_of_cluster(jobs, workers, count, ray)
        yield ray, shape


@functools.cache
def _token() -> str:
    return secrets.token_hex(32)


def _read_token() -> None:
    """Make Ray read its token from the environment again: it does so only once, when a process imports it, which may be
    long before it is started here.
    """
    with contextlib.suppress(ImportError, AttributeError):  # a Ray that knows no tokens
        internals: Any = importlib.import_module("ray._raylet")
        tokens = internals.AuthenticationTokenLoader
        internals.Config.initialize("")
        tokens.instance().reset_cache()


def _start(ray: Any, address: str, **local: object) -> None:
    try:
        with _signal_handlers_kept():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except Exception as error:
        with contextlib.suppress(Exception):
            ray.shutdown()
        problem = f"Ray does not start on this machine: {_first_line(error)}. Use"
        if not local:
            problem = (
                f"Ray does not answer at {address}: {_first_line(error)}. Start a cluster with 'ray start --head', "
                "give its address (HOST:PORT), or use"
            )
        raise WorkerError(f"{problem} parts (part=K/N), which need no Ray") from error


@contextlib.contextmanager
def _environment(values: Mapping[str, str], *, without: str) -> Iterator[None]:
    """Set variables that are not set, and unset one, for the time of the block."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    removed = os.environ.pop(without, None)
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)
        if removed is not None:
            os.environ[without] = removed


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Restore the signal handlers, which Ray replaces."""
    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.getsignal(number) for number in signals}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _shape_here(jobs: JobSet[Any], workers: WorkerConfig, count: int) -> PoolShape:
    count = min(workers.count or 1, count)
    on_gpu = jobs.backbone.device.type == "cuda"
    available = torch.cuda.device_count() if on_gpu else 0
    if workers.gpus is not None and not on_gpu:
        raise ConfigError(
            f"GPUs per worker is {workers.gpus:g}, and the backbone is on {jobs.backbone.device}; leave it out "
            "(gpus), or load the backbone on a GPU (device=cuda)"
        )
    gpus = workers.gpus if workers.gpus is not None else min(1.0, available / count)
    if gpus * count > available + 1e-9:
        raise ConfigError(
            f"{count} workers with {gpus:g} GPUs each need {gpus * count:g}, and there are {available}; give fewer "
            f"workers or a smaller share (gpus={available / count:.3g})"
        )
    return PoolShape(count, max(1, torch.get_num_threads() // count), gpus)


def _shape_of_cluster(jobs: JobSet[Any], workers: WorkerConfig, count: int, ray: Any) -> PoolShape:
    resources: Mapping[str, float] = ray.cluster_resources()
    gpus = workers.gpus if workers.gpus is not None else float(jobs.backbone.device.type == "cuda")
    nodes = sum(bool(node.get("Alive")) for node in ray.nodes())
    fitting = int(resources.get("GPU", 0.0) / gpus + 1e-9) if gpus else nodes
    if gpus and not fitting:
        raise WorkerError(
            f"a worker needs {gpus:g} GPUs, and the cluster has {resources.get('GPU', 0.0):g}; give a smaller share "
            "(gpus), or run on its processors (device=cpu)"
        )
    count = min(workers.count or max(1, fitting), count)
    threads = int(resources.get("CPU", 1.0) // count)
    return PoolShape(count, max(1, min(threads, MAX_THREADS)), gpus)


@dataclass(eq=False)
class _Member:
    """A worker as the driver sees it."""

    actor: Any
    ready: Ready | None = None
    job: Job | None = None
    deaths: int = 0
    lost_at: float = field(default_factory=time.monotonic)  # or made

    @property
    def name(self) -> str:
        return "a worker" if self.ready is None else f"the worker on {self.ready.host} (process {self.ready.pid})"


@dataclass
class Attempts:
    """How often in a row a job has lost its worker without having got further than before, in optimizer steps."""

    steps: dict[str, float] = field(default_factory=dict)
    reached: float = 0.0
    lost: int = 0

    def saw(self, progress: Progress) -> None:
        """Record the progress of a job."""
        step = progress.numbers.get("step", 0)
        self.steps[progress.name] = max(self.steps.get(progress.name, 0), step)

    def lose(self) -> int:
        """Count a lost worker; return the number of losses since the job got further."""
        reached = sum(self.steps.values())
        self.lost = 1 if reached > self.reached else self.lost + 1
        self.reached = reached
        return self.lost


class Pool:
    """The workers of one run, and the jobs that wait."""

    def __init__(
        self, ray: Any, jobs: JobSet[Any], left: Sequence[Job], shape: PoolShape, spec: WorkerSpec, run: JobRun
    ) -> None:
        self.ray, self.jobs, self.run = ray, jobs, run
        self._waiting = deque(left)
        self._attempts = {job.name: Attempts() for job in left}
        self._last_error = ""
        actor = ray.remote(Worker).options(
            num_cpus=shape.threads, num_gpus=shape.gpus, max_restarts=-1, max_task_retries=0, max_concurrency=2
        )
        self._sent = ray.put(jobs)
        self._members = [_Member(actor.remote(spec)) for _ in range(shape.count)]
        self._running = {member.actor.ready.remote(self._sent): member for member in self._members}
        self._polled: dict[Any, _Member] = {}

    def results(self) -> Iterator[JobResult[Any]]:
        """Yield each result until all jobs are done."""
        polled_at = time.monotonic()
        pause = POLL_SECONDS if len(self._members) < MANY else POLL_SECONDS_OF_MANY
        while self._waiting or any(member.job is not None for member in self._members):
            if self.run.should_stop is not None and self.run.should_stop():
                yield from self._stopped()
            if not self._running:
                raise WorkerError(
                    f"no worker is left ({self._last_error}); finished results are kept, and the same command goes on"
                )
            done, _ = self.ray.wait(list(self._running), num_returns=1, timeout=POLL_SECONDS)
            for ref in done:
                yield from self._take(ref)
            for member in self._members:
                if self._waiting and member.ready is not None and member.job is None:
                    member.job = self._waiting.popleft()
                    logger.info("%s begins %s", member.name, member.job.name)
                    self._running[member.actor.run.remote(member.job, self._sent)] = member
            if time.monotonic() - polled_at >= pause:
                polled_at = time.monotonic()
                self._poll()

    def end(self) -> None:
        """End all workers."""
        for member in self._members:
            with contextlib.suppress(Exception):  # it may have ended
                self.ray.kill(member.actor)

    def _take(self, ref: Any) -> Iterator[JobResult[Any]]:
        member = self._running.pop(ref)
        try:
            answer = self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause
            text = str(cause) if isinstance(cause, PTuningError) else f"{type(cause).__name__}: {cause}"
            raise WorkerError(f"a worker cannot do its work: {text}") from error
        except self.ray.exceptions.RayError as error:
            yield from self._lost(member, error)
            return
        if isinstance(answer, Ready):
            member.ready = answer
            sees = "sees" if answer.sees_folder else "does not see"
            logger.info("%s is ready; it %s the folder", member.name, sees)
        else:
            member.job = None
            yield from self._write(*answer)

    def _lost(self, member: _Member, error: Exception) -> Iterator[JobResult[Any]]:
        """Start a worker that has ended again, and let another one do its job, a few times."""
        job, reason = member.job, _first_line(error)
        starts = isinstance(error, self.ray.exceptions.ActorUnavailableError)
        if job is None and starts and time.monotonic() - member.lost_at < START_SECONDS:
            self._running[member.actor.ready.remote(self._sent)] = member
            return
        self._last_error = reason
        logger.warning("%s has ended%s: %s", member.name, f" in {job.name}" if job is not None else "", reason)
        member.ready, member.job, member.lost_at = None, None, time.monotonic()
        member.deaths = 0 if job is not None else member.deaths + 1
        if member.deaths > RETRIES:
            return  # it cannot even start
        self._running[member.actor.ready.remote(self._sent)] = member
        if job is None:
            return
        losses = self._attempts[job.name].lose()
        if losses <= RETRIES:
            self._waiting.appendleft(job)
            return
        why = f"its worker ended {losses} times without getting further ({reason}); it may need more memory"
        yield from (JobResult(folder, why) for folder in job.folders)

    def _write(self, results: Sequence[JobResult[Any]], files: Mapping[str, bytes]) -> Iterator[JobResult[Any]]:
        """Write the files that a worker has sent, and yield the results."""
        for result in results:
            sent = {path: data for path, data in files.items() if PurePosixPath(path).is_relative_to(result.folder)}
            try:
                # The record comes last: with it a result counts as finished.
                for path in sorted(sent, key=lambda path: path == f"{result.folder}/{RUN_FILE}"):
                    if ".." in PurePosixPath(path).parts:
                        raise WorkerError(f"a worker sent a file outside of its folder: {path}")
                    make_folder((self.jobs.out / path).parent)
                    write_bytes(self.jobs.out / path, sent[path])
                yield result
            except PTuningError as error:
                yield JobResult(result.folder, str(error), result.seconds)

    def _poll(self) -> None:
        """Report the progress that workers have sent since the last poll, and ask for more."""
        ray, polled = self.ray, self._polled
        done, _ = ray.wait(list(polled), num_returns=len(polled), timeout=0) if polled else ([], [])
        for ref in done:
            member = polled.pop(ref)
            with contextlib.suppress(ray.exceptions.RayError):
                for progress in ray.get(ref):
                    if progress.stage == "suite":
                        continue
                    if member.job is not None:
                        self._attempts[member.job.name].saw(progress)
                    if self.run.report is not None and self.jobs.forwards_progress:
                        self.run.report(progress)
        busy = [member for member in self._members if member.job is not None]
        pending = set(map(id, polled.values()))
        polled.update({member.actor.progress.remote(): member for member in busy if id(member) not in pending})
        several = len({member.ready.host for member in self._members if member.ready is not None}) > 1
        names = [
            member.job.name + (f" on {member.ready.host}" if several and member.ready is not None else "")
            for member in busy
            if member.job is not None
        ]
        self.run.workers = max(1, len(busy))
        status = PoolStatus(names, sum(member.ready is None for member in self._members))
        self.jobs.report_status(self.run, str(status))

    def _stopped(self) -> Iterator[JobResult[Any]]:
        """Let workers write checkpoints and end; yield what they have finished."""
        for member in self._members:
            if member.job is not None:
                member.actor.stop.remote()
        until = time.monotonic() + STOP_SECONDS
        while time.monotonic() < until and any(member.job is not None for member in self._running.values()):
            done, _ = self.ray.wait(list(self._running), num_returns=1, timeout=POLL_SECONDS)
            for ref in done:
                member = self._running.pop(ref)
                was_at_work, member.job = member.job is not None, None
                with contextlib.suppress(self.ray.exceptions.RayError):
                    answer = self.ray.get(ref)
                    if was_at_work:
                        yield from self._write(*answer)
        raise Interrupted("stopped; the workers have written their checkpoints")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
