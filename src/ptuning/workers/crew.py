"""What is asked of workers (`Workers`), what they work on (`Work`), and what they leave (`Ended`)."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.number_format import short_name
from ptuning.backbone.placement.shards import launched
from ptuning.backbone.sources import LoadOptions
from ptuning.errors import ConfigError, WorkerError
from ptuning.files import Json
from ptuning.progress import OnProgress
from ptuning.provenance import versions
from ptuning.workers.units import Unit

AUTO = "auto"
ADDRESS_VARIABLE = "RAY_ADDRESS"
ANSWER_SECONDS = 10.0  # that an address may take to answer
SHARDED = (
    "workers have a whole backbone each: leave out shard=tp and shard=layers, or use shard=map or quantize, or "
    "no workers (--workers, --ray)"
)
INSTALL = 'pip install -c constraints.txt "ptuning[ray]"'
SHOWN_UNITS = 3


@dataclass(frozen=True)
class Workers:
    """Processes that share the units of a comparison or a fleet, each with a backbone of its own. Ray runs them.

    Args:
        count: Number of workers; with an ``address``, by default as many as the cluster has GPUs (or nodes) for.
        address: A running Ray cluster, ``HOST:PORT`` or ``auto`` (then ``RAY_ADDRESS``, or one on this machine counts);
            None starts Ray on this machine, and ends it.
        gpus: GPUs for each worker, such as 0.25 for four workers on one; by default an equal share, one at most.
        loading: How workers load the backbone; by default as it was loaded.
        shared_folder: Whether workers see the folder of the results; by default that is found out.

    A ConfigError if a number cannot be.
    """

    count: int | None = None
    address: str | None = None
    gpus: float | None = None
    loading: LoadOptions | None = field(default=None, repr=False)
    shared_folder: bool | None = None

    def __post_init__(self) -> None:
        if self.count is None and self.address is None:
            raise ConfigError("say how many workers there are (--workers), or which cluster runs them (--ray)")
        if self.count is not None and self.count < 1:
            raise ConfigError(f"workers is {self.count}; it must be 1 or more")
        if self.gpus is not None and not (0 < self.gpus <= 1 or (self.gpus > 1 and float(self.gpus).is_integer())):
            raise ConfigError(
                f"gpus of a worker is {self.gpus:g}; it must be a share above 0 and up to 1, or a whole number"
            )
        if self.address is not None and not self.address.strip():
            raise ConfigError("the address of the cluster is empty; give HOST:PORT, or auto")

    @classmethod
    def of(cls, given: Workers | int | None) -> Workers | None:
        """Return the workers that are asked for, by their number on this machine, too; None for none."""
        found = cls(given) if isinstance(given, int) else given
        return None if found == cls(1) else found

    @property
    def place(self) -> str | None:
        """The address to connect to; None for this machine's own."""
        if self.address == AUTO:
            return os.environ.get(ADDRESS_VARIABLE) or AUTO
        return self.address

    def check(self) -> None:
        """Check, before anything else is done, that Ray is installed and that something listens at the address.

        A WorkerError says what is missing; a ConfigError that the address is none, or that a launcher has started
        several processes, which would each start workers. Ray itself would try for minutes.
        """
        if (processes := launched()) > 1:
            raise ConfigError(
                f"WORLD_SIZE says that a launcher has started {processes} processes, and each would start workers of "
                "its own; start the command once, without torchrun, or leave out the workers (--workers, --ray)"
            )
        if importlib.util.find_spec("ray") is None:
            raise WorkerError(f"workers need the package ray, which is not installed: {INSTALL}")
        if self.place in (None, AUTO):
            return
        host, _, port = str(self.place).removeprefix("ray://").rpartition(":")
        if not host or not (port.isascii() and port.isdigit() and int(port) < 2**16):
            raise ConfigError(f"the address '{self.place}' is not HOST:PORT, such as 10.0.0.5:6379, nor auto")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
        except (OSError, UnicodeError) as error:
            raise WorkerError(
                f"nothing answers at {self.place} ({error}); start a cluster there with 'ray start --head', or give "
                "another address (--ray)"
            ) from error


@dataclass(frozen=True)
class Ended:
    """A result that is there: its folder; or the error of one that failed, and the seconds that it took."""

    folder: str
    error: str | None = None
    seconds: float = 0.0


class Work(Protocol):
    """What units are units of. A copy of it goes to each worker, without its backbone, and gets the worker's own."""

    out: Path
    backbone: Backbone
    worker: dict[str, Json] | None  # who works on it, for the record
    summary: str  # the file that names all results, which the command writes

    def run_unit(
        self, unit: Unit, *, report: OnProgress | None, should_stop: Callable[[], bool] | None
    ) -> Iterator[Ended]:
        """Do a unit, or what is left of it, and yield each result once it is written.

        What fails is yielded as well. :class:`ptuning.progress.Interrupted` is raised if ``should_stop`` says so.
        """
        ...


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker needs beside the work, and what must be equal there.

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
    def of(cls, work: Work, workers: Workers, *, mark: Path, threads: int) -> WorkerSpec:
        """Return what workers are asked to do."""
        backbone = work.backbone
        if backbone.shards is not None:
            raise ConfigError(SHARDED)
        given = (
            workers.loading
            or backbone.asked
            or LoadOptions(
                revision=backbone.revision,
                attn_implementation=backbone.loaded.get("attn_implementation"),
                max_length=backbone.max_length,
                device=backbone.device.type,
            )
        )
        # A worker on a GPU sees only its own, so numbers of devices mean nothing there.
        device = given.device.partition(":")[0]
        loading = replace(given, dtype=short_name(backbone.dtype), device=device)
        return cls(
            backbone.name,
            loading,
            backbone.fingerprint,
            mark,
            workers.shared_folder,
            threads,
            backbone.dtype_reason,  # it was chosen before, and is asked for here
        )


@dataclass(frozen=True)
class Busy:
    """What workers do just now: the units that they are at, and how many of them still start."""

    units: Sequence[str]
    starting: int = 0

    def __str__(self) -> str:
        """What a line of progress says of them."""
        some, more = ", ".join(self.units[:SHOWN_UNITS]), len(self.units) - SHOWN_UNITS
        said = [f"{len(self.units)} at work: {some}" + (f" and {more} more" if more > 0 else "")] if self.units else []
        return "; ".join([*said, *([f"{self.starting} starting"] if self.starting else [])])
