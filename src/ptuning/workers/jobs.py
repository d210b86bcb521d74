"""Jobs: what one worker does alone, and the part (K/N) of them that a command runs.

A comparison and a fleet are a `JobSet` each: they say which jobs there are, and how one is run.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from ptuning.errors import ConfigError
from ptuning.files import Json, make_folder
from ptuning.names import locked
from ptuning.progress import Interrupted, OnProgress

if TYPE_CHECKING:
    from ptuning.backbone.backbone import Backbone

T = TypeVar("T")
# Maximum number of prompts of a job that trains several at once. Which prompts train together decides how sums are
# rounded, so this depends on neither the machine nor the command.
JOB_PROMPTS = 16
MAX_PARTS = 1_000_000


@dataclass(frozen=True)
class Job:
    """What one worker does alone: the results in ``folders``, relative to the output folder.

    ``checkpoint`` is the folder of the checkpoint if these are prompts that train together.
    """

    name: str
    folders: tuple[str, ...]
    checkpoint: str | None = None


@dataclass(frozen=True)
class JobResult(Generic[T]):
    """One result of a job: its folder, the error if it failed, and the seconds it took.

    The ``value`` stays in its process: what comes from a worker has None.
    """

    folder: str
    error: str | None = None
    seconds: float = 0.0
    value: T | None = None


@dataclass(frozen=True)
class WorkPart:
    """One of ``of`` equal parts of a command's jobs, by its ``number`` from 1.

    >>> WorkPart.parse("3/16")
    WorkPart(number=3, of=16)
    """

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.of <= MAX_PARTS:
            raise ConfigError(f"part {self}: the number of parts must be from 1 to {MAX_PARTS:,}")
        if not 1 <= self.number <= self.of:
            raise ConfigError(f"part {self}: parts are counted from 1 to {self.of}, so there is no part {self.number}")

    @classmethod
    def parse(cls, text: str) -> WorkPart:
        """Read ``K/N``; a ConfigError if the text is something else."""
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*/\s*([0-9]{1,9})\s*", text)
        if match is None:
            raise ConfigError(f"part {text!r} is not K/N with whole numbers, such as 3/16 for the third of 16 parts")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def share(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs of this part; a ConfigError if there are more parts than jobs."""
        if self.of > len(jobs):
            raise ConfigError(
                f"part {self}: there are only {len(jobs)} jobs to share (a job is a cell, or at most {JOB_PROMPTS} "
                "prompts that train together); give no more parts than jobs, or leave out the part"
            )
        return list(jobs[self.number - 1 :: self.of])


def split_evenly(items: Sequence[T], weights: Sequence[int], limit: int) -> list[list[T]]:
    """Split items in their order into as few groups as possible whose weights add up to at most ``limit``; a heavier
    item is a group of its own. Groups of equal items are about equally long.

    >>> split_evenly("abcdefg", [1] * 7, 3)
    [['a', 'b', 'c'], ['d', 'e'], ['f', 'g']]
    """
    if len(set(weights)) == 1:
        groups_needed = -(-len(items) // max(1, limit // weights[0]))
        size, longer = divmod(len(items), groups_needed)
        ends = [0, *(size * number + min(number, longer) for number in range(1, groups_needed + 1))]
        return [list(items[start:end]) for start, end in itertools.pairwise(ends)]
    groups: list[list[T]] = []
    total = limit + 1
    for item, weight in zip(items, weights, strict=True):
        if total + weight > limit:
            groups.append([])
            total = 0
        groups[-1].append(item)
        total += weight
    return groups


@contextlib.contextmanager
def job_lock(out: Path, job: Job, waiting: Callable[[], None]) -> Iterator[None]:
    """Keep other processes, such as another part of the command, out of the folders of a job. ``waiting`` is called
    while another one has them; it may raise.
    """
    from ptuning.engine.processes import this_writes  # takes seconds to import; parsing a part must not

    with contextlib.ExitStack() as locks:
        # Processes that share a training do a job together: one of them keeps others away.
        for folder in sorted(job.folders) if this_writes() else ():
            make_folder(out / folder)
            locks.enter_context(locked(out / folder, waiting=waiting))
        yield


@dataclass
class JobRun:
    """One run of jobs: its callbacks, and the results so far (by folder)."""

    jobs: Sequence[Job]
    report: OnProgress | None = None
    should_stop: Callable[[], bool] | None = None
    workers: int = 1  # at work just now
    done: dict[str, JobResult[Any]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The number of results that there will be."""
        return sum(len(job.folders) for job in self.jobs)

    def check_stop(self) -> None:
        """Raise Interrupted if the run is to stop."""
        if self.should_stop is not None and self.should_stop():
            raise Interrupted(f"stopped after {len(self.done)} of {self.total} results")


class JobSet(ABC, Generic[T]):
    """Jobs whose results go into the folder ``out``. Each worker gets a copy without the backbone, and sets its own."""

    out: Path
    backbone: Backbone
    worker: dict[str, Json] | None = None  # who works on it, for the record
    summary: ClassVar[str]  # the file that lists all results
    forwards_progress: ClassVar[bool] = True  # whether progress inside of a worker's jobs is reported

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "backbone": None}  # a worker loads its own

    @abstractmethod
    def run_job(self, job: Job, run: JobRun) -> Iterator[JobResult[T]]:
        """Do a job, or what is left of it, and yield each result once it is written; failures are yielded as well."""

    @abstractmethod
    def load(self, folder: str) -> T | None:
        """Return a result that was finished before this run; None if there is none."""

    @abstractmethod
    def collect(self, result: JobResult[Any]) -> T:
        """Return the value of a result that a worker has written, or whose worker failed."""

    @abstractmethod
    def report_status(self, run: JobRun, status: str) -> None:
        """Report what the workers do just now."""
