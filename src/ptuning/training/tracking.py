"""The numbers of trainings for TensorBoard, Weights & Biases, MLflow or a CSV file, through accelerate's trackers."""

from __future__ import annotations

import contextlib
import csv
import logging
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker

from ptuning.config import listed_names
from ptuning.engine.processes import this_writes
from ptuning.errors import ConfigError, FileError, closest
from ptuning.files import Json, make_folder, read_bytes, read_json, write_json, write_text
from ptuning.names import is_folder_name
from ptuning.progress import NUMBERS, Progress

logger = logging.getLogger(__name__)

CSV_FILE = "log.csv"
# The ids that services gave to runs, so that a resumed training goes on in the same one.
IDS_FILE = "ids.json"
# What services call all that is trained here: wandb's project, MLflow's experiment.
PROJECT = "ptuning"
# Most trainings with open trackers; the one that was silent for longest is closed, and opened again when it goes on.
OPEN = 32


class TrainingLog:
    """A callback (``report``) that writes the numbers of every step and epoch to trackers.

    A training that is resumed goes on in its log, and no step is in it twice. A tracker that fails in training is left
    out with a warning.

    Args:
        trackers: ``csv``, ``tensorboard``, ``wandb`` or ``mlflow``; several in a list, or with commas between them.
        folder: Folder of the logs, with one in it for each training that has a name (see
            :class:`~ptuning.progress.Progress`).
        settings: Settings of the training, which ``wandb`` and ``mlflow`` show.
        together: Whether several trainings run at a time, as in a fleet.

    Raises:
        ConfigError: If a tracker is unknown, its package is missing, or it cannot log several trainings at a time.

    Example:
        >>> with TrainingLog("csv,tensorboard", "capitals/log") as log:                     # doctest: +SKIP
        ...     train("[P*3] [X] [Y]", data, backbone=backbone, out="capitals", report=log)
    """

    def __init__(
        self,
        trackers: Sequence[str] | str,
        folder: str | Path,
        *,
        settings: Mapping[str, Json] | None = None,
        together: bool = False,
    ) -> None:
        self.trackers = [_known(name, together=together) for name in listed_names(trackers)]
        self.folder = Path(folder)
        _check_no_link(self.folder)
        self.settings = dict(settings or {})
        self._open: OrderedDict[str, list[GeneralTracker]] = OrderedDict()

    def __call__(self, progress: Progress) -> None:
        """Log the numbers of a progress, if it has any."""
        if not (self.trackers and progress.numbers and this_writes()):
            return
        name, step = progress.name, int(progress.numbers["step"])
        if name not in self._open:
            self._begin(name, step)
        self._open.move_to_end(name)
        values = {key: value for key, value in progress.numbers.items() if key != "step"}
        for tracker in list(self._open[name]):
            if not _works(lambda one=tracker: one.log(values, step=step)):  # type: ignore[misc]
                self._open[name].remove(tracker)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all trackers, so that everything is written."""
        while self._open:
            self._close_oldest()

    def _begin(self, name: str, step: int) -> None:
        most = 1 if any(tracker.one_at_a_time for tracker in self.trackers) else OPEN
        while len(self._open) >= most:
            self._close_oldest()
        found = self._open[name] = []
        parts = [part for part in name.split("/") if part]
        places = [self.folder.joinpath(*map(_folder_name, parts[:depth])) for depth in range(len(parts) + 1)]
        if not _works(lambda: list(map(_check_no_link, places))):
            return
        title = "/".join((self.folder.absolute().parent.name, *parts))
        for tracker in self.trackers:
            _works(lambda one=tracker: found.append(one.begin(places[-1], title, step, self.settings)))  # type: ignore[misc]

    def _close_oldest(self) -> None:
        for tracker in self._open.popitem(last=False)[1]:
            _works(tracker.finish)


def _works(work: Callable[[], object]) -> bool:
    """Do some work of a tracker, and return whether it has succeeded; an error is logged."""
    try:
        work()
    except Exception as error:  # noqa: BLE001 - a service may raise anything, and must not end a training
        logger.warning("a log is not written further, since its tracker failed: %s", error)
        return False
    return True


@dataclass(frozen=True)
class _Tracker:
    """A kind of tracker. ``begin`` opens one for a training, with the folder of its logs, its title, the step of the
    first numbers to come, and settings. ``package`` is what it needs, and the extra that installs this.
    """

    begin: Callable[[Path, str, int, Mapping[str, Json]], GeneralTracker]
    package: str | None = None
    one_at_a_time: bool = False


def _known(name: str, *, together: bool) -> _Tracker:
    if name not in TRACKERS:
        raise ConfigError(f"unknown tracker '{name}'.{closest(name, TRACKERS)} Known: {', '.join(TRACKERS)}")
    found = TRACKERS[name]
    if found.package is not None and find_spec(found.package) is None:
        raise ConfigError(
            f"logging to {name} needs the package {found.package}; install it with: pip install 'ptuning[{name}]'"
        )
    if together and found.one_at_a_time:
        raise ConfigError(f"{name} logs one training at a time, and here several run together; use csv or tensorboard")
    return found


class _Csv(GeneralTracker):  # type: ignore[misc]  # accelerate has no types
    """A table with a line per step and per epoch. Lines of steps that come again are dropped."""

    name = "csv"
    requires_logging_directory = True

    def __init__(self, file: Path, *, step: int) -> None:
        super().__init__()
        self.file = file
        head, kept = ",".join(NUMBERS) + "\n", ""
        if file.exists() or file.is_symlink():
            first, *lines = read_bytes(file).decode("utf-8", errors="replace").splitlines(keepends=True) or [""]
            if not head.startswith(first):
                raise FileError(f"{file} is not a log of ptuning; move it away")
            kept = "".join(line for line in lines if line.endswith("\n") and _step_of(line) < step)
        write_text(file, head + kept)

    @property
    def tracker(self) -> Path:
        """The file."""
        return self.file

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Do nothing: a table has no place for settings."""

    def log(self, values: dict[str, float], step: int | None = None, **_: object) -> None:
        """Write a line."""
        with self.file.open("a", encoding="utf-8", newline="") as lines:
            csv.DictWriter(lines, NUMBERS, lineterminator="\n").writerow({"step": step, **values})


def _check_no_link(folder: Path) -> None:
    """Check that logs will not be written to where a link points."""
    if folder.is_symlink():
        raise FileError(f"{folder} is a link, and is not followed; choose another folder for the log, or remove it")


def _step_of(line: str) -> float:
    first = line.partition(",")[0]
    return int(first) if first.isdecimal() else float("inf")


class _WandB(WandBTracker):  # type: ignore[misc]
    def log(self, values: dict[str, float], step: int | None = None, **named: object) -> None:
        """Log numbers of a step that has none yet: a resumed run has those of its first process."""
        if step is None or step >= self.run.step:
            super().log(values, step=step, **named)


class _MLflow(MLflowTracker):  # type: ignore[misc]
    def __init__(self, experiment: str, *, run_id: str | None, run_name: str) -> None:
        super().__init__(experiment, run_id=run_id, run_name=run_name)
        self.known: dict[str, int] = {}  # the last step of each number that a resumed run has

    def log(self, values: dict[str, float], step: int | None = None, **named: object) -> None:
        """Log numbers of a step that has none yet: a resumed run has those of its first process."""
        new = {name: value for name, value in values.items() if step is None or step > self._last(name)}
        if new:
            super().log(new, step=step, **named)

    def _last(self, name: str) -> int:
        if self.run_id is None:
            return -1
        import mlflow

        if name not in self.known:
            found = mlflow.MlflowClient().get_metric_history(self.run_id, name)
            self.known[name] = max((metric.step for metric in found), default=-1)
        return self.known[name]


def _begin_csv(folder: Path, _: str, step: int, __: Mapping[str, Json]) -> GeneralTracker:
    make_folder(folder)
    return _Csv(folder / CSV_FILE, step=step)


def _begin_tensorboard(folder: Path, _: str, step: int, __: Mapping[str, Json]) -> GeneralTracker:
    make_folder(folder)
    # TensorBoard then leaves out what earlier processes wrote of this step and later ones.
    return _started(TensorBoardTracker(folder.name, folder.parent, purge_step=step))


def _begin_wandb(folder: Path, title: str, step: int, settings: Mapping[str, Json]) -> GeneralTracker:
    known = _known_id(folder, "wandb", step) or uuid.uuid4().hex[:8]
    _keep_id(folder, "wandb", known)
    found = _WandB(PROJECT, name=title, dir=str(folder), id=known, resume="allow")
    return _started(found, settings if not step else {})


def _begin_mlflow(folder: Path, title: str, step: int, settings: Mapping[str, Json]) -> GeneralTracker:
    known = _known_id(folder, "mlflow", step)
    found = _started(_MLflow(PROJECT, run_id=known, run_name=title), settings if not step else {})
    _keep_id(folder, "mlflow", found.tracker.info.run_id)
    return found


def _started(tracker: GeneralTracker, settings: Mapping[str, Json] | None = None) -> GeneralTracker:
    if hasattr(tracker, "start"):  # earlier releases of accelerate start in the constructor
        tracker.start()
    if settings:
        tracker.store_init_configuration(dict(settings))
    return tracker


def _known_id(folder: Path, service: str, step: int) -> str | None:
    """Return the id of the run that a training goes on in; None if it begins."""
    found: Json = None
    with contextlib.suppress(FileError):
        found = read_json(folder / IDS_FILE).get(service) if step else None
    return found if isinstance(found, str) else None


def _keep_id(folder: Path, service: str, known: str) -> None:
    make_folder(folder)
    others: Mapping[str, Json] = {}
    with contextlib.suppress(FileError):
        others = read_json(folder / IDS_FILE)
    write_json(folder / IDS_FILE, {**others, service: known})


def _folder_name(part: str) -> str:
    """Return a part of a training's name as the name of a folder; data decides on names, but not where logs lie."""
    return part if is_folder_name(part) else "".join(char if char.isalnum() else "_" for char in part)[:100] or "_"


# In the order of messages.
TRACKERS: Mapping[str, _Tracker] = {
    "csv": _Tracker(_begin_csv),
    "tensorboard": _Tracker(_begin_tensorboard, "tensorboard"),
    "wandb": _Tracker(_begin_wandb, "wandb", one_at_a_time=True),
    "mlflow": _Tracker(_begin_mlflow, "mlflow", one_at_a_time=True),
}
