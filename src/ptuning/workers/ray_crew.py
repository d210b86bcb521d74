"""Workers as actors of Ray: started, given units, asked how far they are, replaced when they end, and stopped."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import secrets
import signal
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from ptuning.errors import ConfigError, PTuningError, WorkerError
from ptuning.files import make_folder, new_path, write_bytes
from ptuning.names import RUN_FILE
from ptuning.progress import Interrupted, OnProgress, Progress
from ptuning.workers.crew import ADDRESS_VARIABLE, Busy, Ended, Work, Workers, WorkerSpec
from ptuning.workers.units import Unit
from ptuning.workers.worker import Done, Hello, Worker

logger = logging.getLogger(__name__)

# How often a unit is done again that gets no further, and a worker that cannot start is started again.
RETRIES = 3
# Between two looks at the workers; with many of them, the answers are work, too.
LOOK_SECONDS, LOOK_SECONDS_AT_MANY, MANY = 1.0, 5.0, 100
# How long a worker may take to be there again: while it starts and imports, Ray says that it is unavailable.
START_SECONDS = 300.0
# How long workers may take to write checkpoints when they are to stop.
STOP_SECONDS = 120.0
MOST_THREADS = 16
# Of a Ray that is our own: it tells nobody, and only who knows its token may give it work.
OWN_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}


@dataclass(frozen=True)
class CrewShape:
    """How many workers there are, and what each of them gets."""

    count: int
    threads: int
    gpus: float


def spread(
    work: Work,
    units: Sequence[Unit],
    workers: Workers,
    *,
    report: OnProgress | None = None,
    tell: Callable[[Busy], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[Ended]:
    """Let workers do units, and yield each result that ends; all of them are in the folder of the work then.

    ``report`` gets the progress inside of units, and ``tell`` regularly what each worker does. A unit whose worker ends
    is done again, a few times.

    Raises:
        WorkerError: If workers cannot be had, or cannot do the work.
        Interrupted: If ``should_stop`` returned true; workers have written checkpoints.
    """
    make_folder(work.out)
    mark = new_path(work.out.absolute() / work.summary)  # which is swept if it is left behind
    with connected(work, workers, len(units)) as (ray, shape), _marked(mark):
        asked = WorkerSpec.of(work, workers, mark=mark, threads=shape.threads)
        crew = Crew(ray, work, units, shape, asked, report=report, tell=tell, should_stop=should_stop)
        try:
            yield from crew.run()
        finally:
            crew.end()


@contextlib.contextmanager
def _marked(mark: Path) -> Iterator[None]:
    write_bytes(mark, b"")
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


@contextlib.contextmanager
def connected(work: Work, workers: Workers, units: int) -> Iterator[tuple[Any, CrewShape]]:
    """Yield Ray, connected to the cluster that is asked for, and the shape of the crew on it."""
    with contextlib.ExitStack() as last, contextlib.ExitStack() as after:
        if workers.place is None:
            own = {**OWN_SETTINGS, "RAY_AUTH_TOKEN": _token()}
            after.enter_context(_environment(own, without=ADDRESS_VARIABLE))
        workers.check()
        import ray

        if ray.is_initialized():
            yield ray, _shape_of_cluster(work, workers, units, ray)
            return
        after.enter_context(_handlers())
        if workers.place is None:
            _read_access()
            last.callback(_read_access)
            shape = _shape_here(work, workers, units)
            folder = after.enter_context(tempfile.TemporaryDirectory(prefix="ptuning-ray-", ignore_cleanup_errors=True))
            _start(ray, "local", num_cpus=shape.count * shape.threads, include_dashboard=False, _temp_dir=folder)
            after.callback(ray.shutdown)
        else:
            _start(ray, workers.place)
            after.callback(ray.shutdown)
            shape = _shape_of_cluster(work, workers, units, ray)
        yield ray, shape


@functools.cache
def _token() -> str:
    """Return what gives access to a Ray of our own."""
    return secrets.token_hex(32)


def _read_access() -> None:
    """Have Ray read from the environment what gives access to it. It does so once, when a process imports it, which may
    be long before it is started here, and is not undone when it has ended.
    """
    with contextlib.suppress(ImportError, AttributeError):  # a Ray that knows no tokens
        own: Any = importlib.import_module("ray._raylet")
        tokens = own.AuthenticationTokenLoader
        own.Config.initialize("")
        tokens.instance().reset_cache()


def _start(ray: Any, address: str, **own: object) -> None:
    try:
        with _handlers():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:
        with contextlib.suppress(Exception):  # what was started of it
            ray.shutdown()
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = "on this machine" if own else f"at {address}"
        what = "start" if own else "answer"
        raise WorkerError(
            f"Ray does not {what} {where}: {first}. "
            + ("" if own else "Start a cluster with 'ray start --head', give its address (--ray HOST:PORT), or ")
            + ("Use" if own else "use")
            + " --part K/N, which needs no Ray"
        ) from error


@contextlib.contextmanager
def _environment(values: Mapping[str, str], *, without: str) -> Iterator[None]:
    """Set variables that are not set, and unset one, for the time of the block."""
    own = {name: value for name, value in values.items() if name not in os.environ}
    kept = os.environ.pop(without, None)
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)
        if kept is not None:
            os.environ[without] = kept


@contextlib.contextmanager
def _handlers() -> Iterator[None]:
    """Keep what a signal does: Ray sets a handler of its own."""
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    kept = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _shape_here(work: Work, workers: Workers, units: int) -> CrewShape:
    count = min(workers.count or 1, units)
    on_gpu = work.backbone.device.type == "cuda"
    there = torch.cuda.device_count() if on_gpu else 0
    if workers.gpus is not None and not on_gpu:
        raise ConfigError(
            f"a worker is to have {workers.gpus:g} GPUs, and the backbone is on {work.backbone.device}; leave out the "
            "GPUs of a worker (--gpus-per-worker), or load it on a GPU (--device cuda)"
        )
    gpus = workers.gpus if workers.gpus is not None else min(1.0, there / count)
    if gpus * count > there + 1e-9:
        raise ConfigError(
            f"{count} workers with {gpus:g} GPUs each need {gpus * count:g}, and there are {there}; give fewer workers "
            f"or a smaller share (--gpus-per-worker {there / count:.3g})"
        )
    return CrewShape(count, max(1, torch.get_num_threads() // count), gpus)


def _shape_of_cluster(work: Work, workers: Workers, units: int, ray: Any) -> CrewShape:
    there: Mapping[str, float] = ray.cluster_resources()
    gpus = workers.gpus if workers.gpus is not None else float(work.backbone.device.type == "cuda" or 0)
    nodes = sum(bool(node.get("Alive")) for node in ray.nodes())
    room = int(there.get("GPU", 0.0) / gpus + 1e-9) if gpus else nodes
    if gpus and not room:
        raise WorkerError(
            f"a worker needs {gpus:g} GPUs, and the cluster has {there.get('GPU', 0.0):g}; give a smaller share "
            "(--gpus-per-worker), or run on its processors (--device cpu)"
        )
    count = min(workers.count or max(1, room), units)
    threads = int(there.get("CPU", 1.0) // count)
    return CrewShape(count, max(1, min(threads, MOST_THREADS)), gpus)


@dataclass(eq=False)
class _Member:
    """A worker as the driver sees it."""

    actor: Any
    hello: Hello | None = None
    unit: Unit | None = None
    deaths: int = 0
    lost_at: float = field(default_factory=time.monotonic)  # or made
    note: str = ""

    def at_work(self, several: bool) -> str:
        """Say which unit it is at, and on which of ``several`` machines."""
        where = f" on {self.hello.host}" if several and self.hello is not None else ""
        return (self.unit.name if self.unit is not None else "nothing") + where

    @property
    def name(self) -> str:
        return "a worker" if self.hello is None else f"the worker on {self.hello.host} (process {self.hello.pid})"


@dataclass
class Attempts:
    """How often in a row each unit has lost its worker without having got further than before, in optimizer steps."""

    _steps: dict[str, dict[str, float]] = field(default_factory=dict)
    _reached: dict[str, float] = field(default_factory=dict)
    _lost: Counter[str] = field(default_factory=Counter)

    def saw(self, unit: Unit, progress: Progress) -> None:
        """Note how far a unit is."""
        steps = self._steps.setdefault(unit.name, {})
        steps[progress.name] = max(steps.get(progress.name, 0), progress.numbers.get("step", 0))

    def lost(self, unit: Unit) -> int:
        """Count a worker that ended in a unit; return how many there were since it got further."""
        reached = sum(self._steps.get(unit.name, {}).values())
        if reached > self._reached.get(unit.name, 0):
            self._lost[unit.name] = 0
        self._reached[unit.name] = reached
        self._lost[unit.name] += 1
        return self._lost[unit.name]


@dataclass
class Crew:
    """The workers of one run, and the units that wait; the arguments are those of :func:`spread`."""

    ray: Any
    work: Work
    units: Sequence[Unit]
    shape: CrewShape
    asked: WorkerSpec
    report: OnProgress | None = None
    tell: Callable[[Busy], None] | None = None
    should_stop: Callable[[], bool] | None = None
    _members: list[_Member] = field(default_factory=list)
    _running: dict[Any, _Member] = field(default_factory=dict)
    _asking: dict[Any, _Member] = field(default_factory=dict)
    _attempts: Attempts = field(default_factory=Attempts)
    _waiting: deque[Unit] = field(default_factory=deque)
    _last: str = ""
    _sent: Any = None  # the work, where workers get it

    def run(self) -> Iterator[Ended]:
        """Start the workers, and yield what ends until all units are done."""
        ray, shape = self.ray, self.shape
        self._waiting.extend(self.units)
        actor = ray.remote(Worker).options(
            num_cpus=shape.threads, num_gpus=shape.gpus, max_restarts=-1, max_task_retries=0, max_concurrency=2
        )
        self._sent = ray.put(self.work)
        for _ in range(shape.count):
            member = _Member(actor.remote(self.asked))
            self._members.append(member)
            self._running[member.actor.ready.remote(self._sent)] = member
        looked = time.monotonic()
        pause = LOOK_SECONDS if shape.count < MANY else LOOK_SECONDS_AT_MANY
        while self._waiting or any(member.unit is not None for member in self._members):
            if self.should_stop is not None and self.should_stop():
                yield from self._stopped()
            if not self._running:
                raise WorkerError(
                    f"no worker is left ({self._last}); finished results are kept, and the same command goes on"
                )
            done, _ = ray.wait(list(self._running), num_returns=1, timeout=LOOK_SECONDS)
            for ref in done:
                yield from self._take(ref)
            self._give()
            if time.monotonic() - looked >= pause:
                looked = time.monotonic()
                self._look()

    def end(self) -> None:
        """End all workers."""
        for member in self._members:
            with contextlib.suppress(Exception):  # it may have ended
                self.ray.kill(member.actor)

    def _give(self) -> None:
        for member in self._members:
            if self._waiting and member.hello is not None and member.unit is None:
                member.unit = self._waiting.popleft()
                logger.info("%s begins %s", member.name, member.unit.name)
                self._running[member.actor.run.remote(member.unit, self._sent)] = member

    def _take(self, ref: Any) -> Iterator[Ended]:
        member = self._running.pop(ref)
        try:
            found = self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause
            said = str(cause) if isinstance(cause, PTuningError) else f"{type(cause).__name__}: {cause}"
            raise WorkerError(f"a worker cannot do its work: {said}") from error
        except self.ray.exceptions.RayError as error:
            yield from self._lost(member, error)
            return
        if isinstance(found, Hello):
            member.hello = found
            logger.info("%s is ready; it %s the folder", member.name, "sees" if found.sees_folder else "does not see")
            return
        member.unit, member.note = None, ""
        yield from self._landed(found)

    def _lost(self, member: _Member, error: Exception) -> Iterator[Ended]:
        """A worker has ended: it is started again, and another one may do its unit."""
        if member.unit is None and self._is_starting(member, error):
            self._running[member.actor.ready.remote(self._sent)] = member
            return
        unit, first = member.unit, (str(error).strip() or type(error).__name__).splitlines()[0]
        self._last = first
        logger.warning("%s has ended%s: %s", member.name, f" in {unit.name}" if unit is not None else "", first)
        member.hello, member.unit, member.note = None, None, ""
        member.deaths += 1
        member.lost_at = time.monotonic()
        if unit is None and member.deaths > RETRIES:
            return  # it cannot even start
        self._running[member.actor.ready.remote(self._sent)] = member
        if unit is None:
            return
        member.deaths = 0
        lost = self._attempts.lost(unit)
        if lost <= RETRIES:
            self._waiting.appendleft(unit)
            return
        why = f"its worker ended {lost} times without getting further ({first}); it may need more memory than there is"
        for folder in unit.folders:
            yield Ended(folder, why)

    def _is_starting(self, member: _Member, error: Exception) -> bool:
        unavailable = isinstance(error, self.ray.exceptions.ActorUnavailableError)
        return unavailable and time.monotonic() - member.lost_at < START_SECONDS

    def _landed(self, done: Done) -> Iterator[Ended]:
        """Write the files that came along, and yield the results."""
        for one in done.ended:
            own = {path: data for path, data in done.files.items() if PurePosixPath(path).is_relative_to(one.folder)}
            try:
                # The record comes last: with it a result counts as finished.
                for path in sorted(own, key=lambda path: path == f"{one.folder}/{RUN_FILE}"):
                    if ".." in PurePosixPath(path).parts:
                        raise WorkerError(f"a worker sent a file outside of its folder: {path}")
                    make_folder((self.work.out / path).parent)
                    write_bytes(self.work.out / path, own[path])
            except PTuningError as error:
                yield Ended(one.folder, str(error), one.seconds)
            else:
                yield one

    def _look(self) -> None:
        """Ask the workers how far they are; what they answer is read at the next look."""
        ray = self.ray
        done, _ = ray.wait(list(self._asking), num_returns=len(self._asking), timeout=0) if self._asking else ([], [])
        for ref in done:
            member = self._asking.pop(ref)
            with contextlib.suppress(ray.exceptions.RayError):
                for progress in ray.get(ref):
                    if progress.stage == "suite":
                        continue
                    member.note = progress.note
                    if member.unit is not None:
                        self._attempts.saw(member.unit, progress)
                    if self.report is not None:
                        self.report(progress)
        asked = set(map(id, self._asking.values()))
        for member in self._members:
            if member.unit is not None and id(member) not in asked:
                self._asking[member.actor.told.remote()] = member
        if self.tell is not None:
            loading = sum(member.hello is None for member in self._members)
            several = len({member.hello.host for member in self._members if member.hello is not None}) > 1
            self.tell(Busy([member.at_work(several) for member in self._members if member.unit is not None], loading))

    def _stopped(self) -> Iterator[Ended]:
        """Let workers write checkpoints and end; yield what they finished."""
        for member in self._members:
            if member.unit is not None:
                member.actor.stop.remote()
        until = time.monotonic() + STOP_SECONDS
        while time.monotonic() < until and any(member.unit is not None for member in self._running.values()):
            done, _ = self.ray.wait(list(self._running), num_returns=1, timeout=LOOK_SECONDS)
            for ref in done:
                member = self._running.pop(ref)
                unit, member.unit = member.unit, None
                with contextlib.suppress(self.ray.exceptions.RayError):
                    found = self.ray.get(ref)
                    if unit is not None:
                        yield from self._landed(found)
        raise Interrupted("stopped; the workers have written their checkpoints")
