"""What runs inside the process of a worker: it loads the backbone once, does units, and says how far it is."""

from __future__ import annotations

import os
import platform
import tempfile
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ptuning.errors import WorkerError
from ptuning.progress import Interrupted, Progress
from ptuning.provenance import versions
from ptuning.workers.crew import Ended, Work, WorkerSpec
from ptuning.workers.units import Unit

# Steps that are kept until somebody asks for them.
KEPT_STEPS = 10_000


@dataclass(frozen=True)
class Hello:
    """A worker that is ready."""

    host: str
    pid: int
    sees_folder: bool


@dataclass(frozen=True)
class Done:
    """What a worker has done of a unit, and the files of it, if it cannot write them itself: path -> content."""

    ended: Sequence[Ended]
    files: Mapping[str, bytes] = field(default_factory=dict)
    stopped: bool = False


class Worker:
    """A worker; one thread calls :meth:`ready` and :meth:`run`, another one :meth:`told` and :meth:`stop`.

    Both of the former get the work, since a worker that has ended is started again without a word.
    """

    def __init__(self, asked: WorkerSpec) -> None:
        self._asked = asked
        self._work: Work | None = None
        self._stops = threading.Event()
        self._told: deque[Progress] = deque(maxlen=KEPT_STEPS)
        self._hello: Hello | None = None

    def ready(self, work: Work) -> Hello:
        """Load the backbone, unless that was done; a PTuningError if it cannot be, or is not the one of the others."""
        import torch

        torch.set_num_threads(self._asked.threads)  # it counts for the thread that calls it
        if self._hello is None:
            self._hello = self._prepare(work)
        return self._hello

    def _prepare(self, work: Work) -> Hello:
        from ptuning.backbone.loading import load_backbone

        asked, host = self._asked, platform.node()
        wrong = [
            f"{name} {own}, not {asked.versions.get(name)}"
            for name, own in versions().items()
            if own != asked.versions.get(name)
        ]
        if wrong:
            raise WorkerError(f"a worker on {host} has {'; '.join(wrong)}. Install the same versions on all machines")
        if asked.folder.is_dir():
            os.chdir(asked.folder)  # relative paths mean there what they mean here
        backbone = load_backbone(asked.backbone, **vars(asked.loading))
        if backbone.fingerprint != asked.fingerprint:
            raise WorkerError(
                f"the backbone {asked.backbone} on {host} is another one (fingerprint {backbone.fingerprint} and not "
                f"{asked.fingerprint}); put the same files on all machines"
            )
        backbone.dtype_reason = asked.dtype_reason
        sees = asked.mark.is_file() if asked.shared_folder is None else asked.shared_folder
        work.backbone = backbone
        work.worker = {"engine": "ray", "host": host, "pid": os.getpid()}
        self._work = work
        return Hello(host, os.getpid(), sees)

    def run(self, unit: Unit, work: Work) -> Done:
        """Do a unit. What stops all of it, such as a disk that is full, is the error of what is left."""
        sees_folder, own = self.ready(work).sees_folder, self._work or work
        if sees_folder:
            return self._run(unit, own)
        with tempfile.TemporaryDirectory(prefix="ptuning-", ignore_cleanup_errors=True) as place:
            own.out = Path(place)
            done = self._run(unit, own)
            return replace(done, files=_files(Path(place), done.ended))

    def _run(self, unit: Unit, work: Work) -> Done:
        ended: list[Ended] = []
        stopped = False
        try:
            ended += work.run_unit(unit, report=self._told.append, should_stop=self._stops.is_set)
        except Interrupted:
            stopped = True
        except Exception as error:  # noqa: BLE001
            text = str(error) or type(error).__name__
            left = {*unit.folders} - {one.folder for one in ended}
            ended += [Ended(folder, text) for folder in unit.folders if folder in left]
        return Done(ended, stopped=stopped)

    def told(self) -> list[Progress]:
        """Return the progress since this was asked for the last time."""
        return [self._told.popleft() for _ in range(len(self._told))]

    def stop(self) -> None:
        """Let the unit write a checkpoint and end."""
        self._stops.set()


def _files(out: Path, ended: Sequence[Ended]) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for one in ended
        for path in sorted((out / one.folder).rglob("*"))
        if path.is_file()
    }
