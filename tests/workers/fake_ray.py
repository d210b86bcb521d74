"""A stand-in for Ray: actors in this process, whose calls run when they are waited for, one after another."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.workers import pool
from ptuning.workers.jobs import JobSet
from ptuning.workers.pool import PoolShape, Ready, Worker, WorkerConfig


class RayError(Exception):
    """Of Ray itself: an actor has ended."""


class ActorUnavailableError(RayError):
    """Of Ray itself: an actor is started again."""


class RayTaskError(RayError):
    """What a call raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


@dataclass(eq=False)
class Ref:
    """The result of a call to be."""

    call: Callable[[], Any]

    def get(self) -> Any:
        try:
            return self.call()
        except RayError:
            raise
        except Exception as error:
            raise RayTaskError(error) from error


@dataclass
class FakeRay:
    """The part of Ray that the pool uses. ``deaths`` says how often a job ends its worker."""

    make: Callable[..., Any]
    deaths: dict[str, int] = field(default_factory=dict)
    begun: list[tuple[int, str]] = field(default_factory=list)
    killed: int = 0
    exceptions: Any = field(
        default_factory=lambda: SimpleNamespace(
            RayError=RayError, RayTaskError=RayTaskError, ActorUnavailableError=ActorUnavailableError
        )
    )
    _made: int = 0

    def remote(self, kind: type) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._actor))

    def _actor(self, asked: Any) -> Any:
        self._made += 1
        actor, number = self.make(asked), self._made

        def run(job: Any, work: Any) -> Any:
            self.begun.append((number, job.name))
            if self.deaths.get(job.name, 0):
                self.deaths[job.name] -= 1
                raise RayError("The actor died unexpectedly")
            return actor.run(job, work)

        def method(call: Callable[..., Any]) -> Any:
            return SimpleNamespace(remote=lambda *given: Ref(lambda: call(*given)))

        def at_once(call: Callable[..., Any]) -> Any:
            return SimpleNamespace(remote=call)

        return SimpleNamespace(
            ready=method(actor.ready), run=method(run), progress=method(actor.progress), stop=at_once(actor.stop)
        )

    def put(self, value: Any) -> Any:
        return copy.copy(value)  # as it is sent, without the backbone

    def wait(self, refs: Sequence[Ref], *, num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        return list(refs[:num_returns]), list(refs[num_returns:])

    def get(self, ref: Ref) -> Any:
        return ref.get()

    def kill(self, actor: Any) -> None:
        self.killed += 1


def use_fake_ray(patch: pytest.MonkeyPatch, backbone: Backbone, **deaths: int) -> FakeRay:
    """Let workers be actors of a stand-in, which have this backbone."""

    class Here(Worker):
        def _prepare(self, work: JobSet[Any]) -> Ready:
            self._jobs = work
            work.backbone, work.worker = backbone, {"engine": "fake"}
            return Ready("here", 1, sees_folder=self._spec.shared_folder is not False)

    ray = FakeRay(Here, {name.replace("_", " "): count for name, count in deaths.items()})

    @contextlib.contextmanager
    def connected(work: JobSet[Any], workers: WorkerConfig, count: int) -> Iterator[tuple[FakeRay, PoolShape]]:
        yield ray, PoolShape(min(count, workers.count or 1), 1, 0.0)

    patch.setattr(pool, "connected", connected)
    patch.setattr(WorkerConfig, "check", lambda _: None)
    return ray
