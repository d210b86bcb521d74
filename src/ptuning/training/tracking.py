"""The numbers of trainings for TensorBoard, Weights & Biases, MLflow or a CSV file, through accelerate's trackers."""

from __future__ import annotations

import contextlib
import csv
import logging
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
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
# wandb's project and MLflow's experiment.
PROJECT = "ptuning"
# Maximum number of trainings with open trackers; the least recently used one is closed, and opened again.
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
        self.trackers = listed_names(trackers)
        for name in self.trackers:
            if name not in TRACKERS:
                raise ConfigError(f"unknown tracker '{name}'.{closest(name, TRACKERS)} Known: {', '.join(TRACKERS)}")
            if name != "csv" and find_spec(name) is None:
                raise ConfigError(f"the package {name} is missing; install it with: pip install 'ptuning[{name}]'")
            if together and name in ONE_AT_A_TIME:
                raise ConfigError(
                    f"{name} logs one training at a time, and here several run together; use csv or tensorboard"
                )
        self.folder = Path(folder)
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
            if not _succeeds(lambda tracker=tracker: tracker.log(values, step=step)):  # type: ignore[misc]
                self._open[name].remove(tracker)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, *, keep: int = 0) -> None:
        """Close all trackers but the ``keep`` most recently used ones, so that everything is written."""
        while len(self._open) > keep:
            for tracker in self._open.popitem(last=False)[1]:
                _succeeds(tracker.finish)

    def _begin(self, name: str, step: int) -> None:
        self.close(keep=0 if ONE_AT_A_TIME.intersection(self.trackers) else OPEN - 1)
        parts = [part for part in name.split("/") if part]
        # Data decides on names, but not where logs are.
        safe = [
            part if is_folder_name(part) else "".join(char if char.isalnum() else "_" for char in part)[:100] or "_"
            for part in parts
        ]
        folder, title = self.folder.joinpath(*safe), "/".join((self.folder.absolute().parent.name, *parts))
        own = self._open[name] = []

        def begin(tracker: str) -> None:
            make_folder(folder)
            own.append(TRACKERS[tracker](folder, title, step, self.settings))

        for tracker in self.trackers:
            _succeeds(lambda tracker=tracker: begin(tracker))  # type: ignore[misc]


def _succeeds(work: Callable[[], object]) -> bool:
    """Do some work of a tracker, and return whether it has succeeded; an error is logged."""
    try:
        work()
    except Exception as error:  # noqa: BLE001 - a service may raise anything, and must not end a training
        logger.warning("a log is not written further, since its tracker failed: %s", error)
        return False
    return True


class CsvTracker(GeneralTracker):  # type: ignore[misc]  # accelerate has no types
    """A table with a line per step and per epoch. Lines of steps that come again are dropped."""

    name = "csv"
    requires_logging_directory = True
    tracker: Path | None = None  # accelerate asks the class for it

    def __init__(self, file: Path, *, step: int) -> None:
        super().__init__()
        self.tracker = self._file = file
        head, kept = ",".join(NUMBERS) + "\n", ""
        if file.exists() or file.is_symlink():
            first, *lines = read_bytes(file).decode("utf-8", errors="replace").splitlines(keepends=True) or [""]
            if not head.startswith(first):
                raise FileError(f"{file} is not a log of ptuning; move it away")
            steps = [line.partition(",")[0] for line in lines if line.endswith("\n")]
            kept = "".join(line for line, at in zip(lines, steps, strict=False) if at.isdecimal() and int(at) < step)
        write_text(file, head + kept)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Do nothing: a table has no place for settings."""

    def log(self, values: dict[str, float], step: int | None = None, **_: object) -> None:
        """Write a line."""
        with self._file.open("a", encoding="utf-8", newline="") as lines:
            csv.DictWriter(lines, NUMBERS, lineterminator="\n").writerow({"step": step, **values})


class _WandB(WandBTracker):  # type: ignore[misc]
    def log(self, values: dict[str, float], step: int | None = None, **named: object) -> None:
        """Log numbers of a step that has none yet: a resumed run has those of its first process."""
        if step is None or step >= self.run.step:
            super().log(values, step=step, **named)


class _MLflow(MLflowTracker):  # type: ignore[misc]
    def __init__(self, experiment: str, *, run_id: str | None, run_name: str) -> None:
        super().__init__(experiment, run_id=run_id, run_name=run_name)
        self.last: dict[str, int] = {}  # step of each number that a resumed run has

    def log(self, values: dict[str, float], step: int | None = None, **named: object) -> None:
        """Log numbers of a step that has none yet: a resumed run has those of its first process."""
        import mlflow

        for name in values if self.run_id is not None else ():
            if name not in self.last:
                history = mlflow.MlflowClient().get_metric_history(self.run_id, name)
                self.last[name] = max((metric.step for metric in history), default=-1)
        new = {name: value for name, value in values.items() if step is None or step > self.last.get(name, -1)}
        if new:
            super().log(new, step=step, **named)


def _begin_tensorboard(folder: Path, _: str, step: int, __: Mapping[str, Json]) -> GeneralTracker:
    # TensorBoard then leaves out what earlier processes wrote of this step and later ones.
    return _started(TensorBoardTracker(folder.name, folder.parent, purge_step=step), {})


def _begin_wandb(folder: Path, title: str, step: int, settings: Mapping[str, Json]) -> GeneralTracker:
    run = (_ids(folder).get("wandb") if step else None) or uuid.uuid4().hex[:8]
    write_json(folder / IDS_FILE, {**_ids(folder), "wandb": run})
    tracker = _WandB(PROJECT, name=title, dir=str(folder), id=run, resume="allow")
    return _started(tracker, settings if not step else {})


def _begin_mlflow(folder: Path, title: str, step: int, settings: Mapping[str, Json]) -> GeneralTracker:
    run = _ids(folder).get("mlflow") if step else None
    tracker = _started(_MLflow(PROJECT, run_id=run, run_name=title), settings if not step else {})
    write_json(folder / IDS_FILE, {**_ids(folder), "mlflow": tracker.tracker.info.run_id})
    return tracker


def _started(tracker: GeneralTracker, settings: Mapping[str, Json]) -> GeneralTracker:
    if hasattr(tracker, "start"):  # earlier releases of accelerate start in the constructor
        tracker.start()
    if settings:
        tracker.store_init_configuration(dict(settings))
    return tracker


def _ids(folder: Path) -> dict[str, str]:
    """Return service -> id of the run that a training goes on in."""
    with contextlib.suppress(FileError):
        return {name: run for name, run in read_json(folder / IDS_FILE).items() if isinstance(run, str)}
    return {}


# Tracker -> function that opens one for a training, from the folder of its logs, its title, the step of the first
# numbers to come, and settings; in the order of messages.
TRACKERS: Mapping[str, Callable[[Path, str, int, Mapping[str, Json]], GeneralTracker]] = {
    "csv": lambda folder, _, step, __: CsvTracker(folder / CSV_FILE, step=step),
    "tensorboard": _begin_tensorboard,
    "wandb": _begin_wandb,
    "mlflow": _begin_mlflow,
}
ONE_AT_A_TIME = frozenset({"wandb", "mlflow"})
