"""Runs the cells of a comparison (task, method, seed). Each is written when it is done; finished ones are skipped."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.number_format import short_name
from ptuning.config import TrainConfig
from ptuning.data.questions import Questions
from ptuning.engine.processes import processes
from ptuning.errors import FileError, PTuningError, TrainingError
from ptuning.experiment.cells import (
    CellEstimate,
    CellJob,
    CellResult,
    answered_rows,
    digest,
    how_to_have_both,
    mean_seconds,
    saved_identity,
)
from ptuning.files import Json, Unchecked, make_folder, read_json, sha256, write_json, write_json_lines
from ptuning.method.base import Setup
from ptuning.method.registry import METHODS
from ptuning.metrics import Answer
from ptuning.names import (
    CELL,
    CHECKPOINT,
    COMPARISON,
    FLEETS_FOLDER,
    PREDICTIONS_FILE,
    RANDOM_WEIGHTS,
    RESULTS_FILE,
    RUN_FILE,
    STARTED_FILE,
    remove,
    remove_stale,
)
from ptuning.progress import Interrupted, OnProgress, Progress, named
from ptuning.provenance import described, versions
from ptuning.report.results_file import FORMAT_VERSION, Cell, read_answers
from ptuning.training.checkpoint import check_identity, identity
from ptuning.training.fleet import run_of
from ptuning.training.run import TrainingRun, train_together
from ptuning.workers.jobs import JOB_PROMPTS, Job, JobResult, JobRun, JobSet, job_lock, split_evenly
from ptuning.workers.pool import WorkerConfig, run_jobs

logger = logging.getLogger(__name__)

# What methods train of the backbone, the cheapest first.
CHEAP_FIRST = (None, "none", "head", "lora", "full")


class Suite(JobSet[CellResult]):
    """The cells of a comparison in a folder; the arguments are as in :class:`ptuning.experiment.plan.Plan`."""

    summary = RESULTS_FILE

    def __init__(
        self,
        out: Path,
        *,
        jobs: Sequence[CellJob],
        methods: Sequence[str],
        seeds: int,
        backbone: Backbone,
        config: TrainConfig,
        tries: int,
    ) -> None:
        self.out = out
        self.jobs = {job.task.name: job for job in jobs}
        self.methods = {name: METHODS.find(name) for name in methods}
        self.seeds = seeds
        self.backbone = backbone
        self.config = config
        self.tries = tries
        self._random: tuple[int, Backbone] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_random": None}

    def config_of(self, cell: Cell) -> TrainConfig:
        """Return the settings of a cell's trainings."""
        return self.config.with_settings(self.methods[cell.method].settings)

    @functools.cached_property
    def cells(self) -> list[Cell]:
        """All cells in the order in which they run: cheap methods first, so that a useful table exists early."""
        ordered = sorted(
            self.methods.values(), key=lambda method: (method.trained, CHEAP_FIRST.index(method.train_backbone))
        )
        return [
            Cell(name, method.name, self.config.seed + number)
            for number in range(self.seeds)
            for method in ordered
            for name, job in self.jobs.items()
            if number == 0 or method.seeded or (job.by_seed and method.reads_train)
        ]

    @property
    def units(self) -> list[Job]:
        """The cells, cut into what one worker does alone. It depends on what is compared, and on nothing else."""
        found: list[Job] = []
        for (seed, method), group in itertools.groupby(self.cells, key=lambda cell: (cell.seed, cell.method)):
            same = list(group)
            if not self._trains_together(same):
                found += [Job(f"{cell.task} {cell.method} seed {cell.seed}", (cell.folder,)) for cell in same]
                continue
            prompts = self.tries * self.config_of(same[0]).num_restarts
            for number, cells in enumerate(split_evenly(same, [prompts] * len(same), JOB_PROMPTS), start=1):
                name = f"{method}-seed-{seed}" + (f"-{number}" if number > 1 else "")
                found.append(Job(name, tuple(cell.folder for cell in cells), f"{FLEETS_FOLDER}/{name}"))
        return found

    def cells_of(self, units: Sequence[Job]) -> list[Cell]:
        """Return the cells of units, in the order in which they run."""
        return [self._by_folder[folder] for unit in units for folder in unit.folders]

    @functools.cached_property
    def _by_folder(self) -> dict[str, Cell]:
        return {cell.folder: cell for cell in self.cells}

    def check(self, units: Sequence[Job] | None = None, *, overwrite: bool) -> None:
        """Check that the cells of units were made with these settings; with ``overwrite`` remove the others.

        A FileError says what differs: settings, data or backbone.
        """
        for unit in self.units if units is None else units:
            for cell in self.cells_of([unit]):
                folder = self.out / cell.folder
                saved = saved_identity(folder)
                if saved is None:
                    if overwrite:
                        remove(folder, CELL)
                    continue  # it is missing or damaged, and will be made again
                now = self.identity(cell)
                try:
                    check_identity(now, saved, where=cell.folder)
                except TrainingError as error:
                    if not overwrite:
                        why = str(error).replace("resume from", "reuse")
                        raise FileError(
                            f"{self.out} holds results made with other settings. {why}{how_to_have_both(now, saved)}"
                        ) from error
                    remove(folder, CELL)
                    # Prompts that were trained together with it have other settings, too.
                    if units is None:
                        remove(self.out / FLEETS_FOLDER, COMPARISON.folders[FLEETS_FOLDER])
                    elif unit.checkpoint is not None:
                        remove(self.out / unit.checkpoint, CHECKPOINT)

    def run(
        self,
        units: Sequence[Job] | None = None,
        *,
        workers: WorkerConfig | None = None,
        report: OnProgress | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[CellResult]:
        """Run the cells of units, by default of all, that are not finished, and yield the result of each; here, or by
        ``workers``.

        A cell that fails is logged and yielded as failed; the others go on. When ``should_stop`` says so, it is
        interrupted (:class:`ptuning.progress.Interrupted`). A unit that another process works on is waited for.
        """
        units = self.units if units is None else units
        run = JobRun(units, report, should_stop)
        for ended in run_jobs(self, run, workers):
            result = ended.value
            assert result is not None
            if not result.was_there:
                self._report(run)
            yield result
        with contextlib.suppress(OSError):
            (self.out / FLEETS_FOLDER).rmdir()
        self._report(run)

    def run_job(self, job: Job, run: JobRun) -> Iterator[JobResult[CellResult]]:
        """Run the cells of a job that are left, and yield those that are there as well."""
        cells = self.cells_of([job])
        self._report(run, cells[0])
        with job_lock(self.out, job, run.check_stop):
            for cell in cells:  # left by killed processes
                remove_stale(self.out / cell.folder, CELL)
                mark = self.out / cell.folder / STARTED_FILE
                if mark.exists() and self.load(cell.folder) is not None:
                    mark.unlink()
            if job.checkpoint is None:
                results: Iterator[CellResult] = (self._load_or_run(cell, run) for cell in cells)
            else:
                remove_stale(self.out / job.checkpoint, CHECKPOINT)
                results = self._run_together(cells, self.out / job.checkpoint, run)
            for result in results:
                yield JobResult(result.cell.folder, result.error, result.seconds, result)

    def collect(self, result: JobResult[Any]) -> CellResult:
        """Return the result of a cell that a worker has run."""
        cell = self._by_folder[result.folder]
        if result.error is not None:
            return self._failed(cell, PTuningError(result.error), seconds=result.seconds)
        lost = CellResult(cell, "failed", seconds=result.seconds, error="its files cannot be read")
        return replace(self.load(cell.folder) or lost, was_there=False)

    def report_status(self, run: JobRun, status: str) -> None:
        """Report what the workers do just now."""
        self._report(run, note=status)

    def _report(self, run: JobRun, cell: Cell | None = None, note: str = "") -> None:
        """Report the number of finished cells, the cell that begins or a note, and the time that the others take."""
        if run.report is not None:
            finished = {ended.value.cell: ended.value for ended in run.done.values() if ended.value is not None}
            waiting = [other for other in self.cells_of(run.jobs) if other not in finished]
            means = mean_seconds({cell: result.seconds for cell, result in finished.items() if result.status == "done"})
            known = [means[other.method] for other in waiting if other.method in means]
            note, untimed = note if cell is None else f"{cell.task} {cell.method}", len(waiting) - len(known)
            left = sum(known) / min(run.workers, max(1, len(waiting)))
            run.report(Progress("suite", len(run.done), run.total, note, seconds_left=left, untimed=untimed))

    def _load_or_run(self, cell: Cell, run: JobRun) -> CellResult:
        done = self.load(cell.folder)
        if done is None:
            run.check_stop()
        return done or self._run(cell, run)

    def _trains_together(self, cells: Sequence[Cell]) -> bool:
        several = len(cells) * self.tries * self.config_of(cells[0]).num_restarts > 1
        return self.methods[cells[0].method].prompts is not None and several and processes().num_processes == 1

    def _run_together(self, cells: Sequence[Cell], place: Path, run: JobRun) -> Iterator[CellResult]:
        """Train the prompts of one method and seed together, and yield their cells in the order they finish."""
        done = {cell: result for cell in cells if (result := self.load(cell.folder)) is not None}
        yield from done.values()
        if len(done) == len(cells):
            return
        self._report(run, next(cell for cell in cells if cell not in done))
        runs: dict[str, TrainingRun] = {}
        owners: dict[str, Cell] = {}
        for cell in cells:
            if cell not in done:
                self._start(cell)
            elif not place.is_dir():
                continue  # otherwise its prompts may still be in the checkpoint, and are trained to their end again
            try:
                mine = self._prompts(cell, run)
            except PTuningError as error:
                if cell not in done:
                    yield self._failed(cell, error)
                continue
            runs |= mine
            owners |= dict.fromkeys(mine, cell)
        left = [cell for cell in dict.fromkeys(owners.values()) if cell not in done]
        try:
            for result in self._ended(runs, owners, place, run):
                if result.cell in left:
                    left.remove(result.cell)
                    yield result
        except Interrupted:
            raise
        except Exception as error:
            # For example too little memory, or a damaged checkpoint. One after another they may still succeed.
            logger.warning("training prompts at once failed: %s; going on one after another", error)
            logger.debug("the error in full", exc_info=error)
            remove(place, CHECKPOINT)
            for cell in left:
                self._report(run, cell)
                yield self._run(cell, run)

    def _ended(
        self, runs: Mapping[str, TrainingRun], owners: Mapping[str, Cell], place: Path, run: JobRun
    ) -> Iterator[CellResult]:
        waiting = {cell: [name for name, owner in owners.items() if owner == cell] for cell in owners.values()}
        seconds = dict.fromkeys(waiting, 0.0)
        failed: dict[Cell, PTuningError] = {}
        if not runs:
            return
        report = named(run.report, place.name)
        for name, outcome in train_together(
            runs, checkpoint=place, at_once=JOB_PROMPTS, resume=True, report=report, should_stop=run.should_stop
        ):
            cell = owners[name]
            waiting[cell].remove(name)
            if isinstance(outcome, PTuningError):
                failed[cell] = outcome
            else:
                seconds[cell] += cast("float", outcome.record["train_seconds"])
            if waiting[cell]:
                continue
            done = self.load(cell.folder)
            self._report(run, cell)
            if cell in failed:
                yield self._failed(cell, failed[cell], seconds=seconds[cell])
            else:
                yield done or self._run(cell, run, seconds=seconds[cell])

    def _prompts(self, cell: Cell, run: JobRun) -> dict[str, TrainingRun]:
        make, task = self.methods[cell.method].prompts, self.jobs[cell.task].task_of(cell.seed)
        assert make is not None, f"{cell.method} does not train together with others"
        setup, folder = self._setup(cell, run), self.out / cell.folder
        return {
            f"{cell.task}/{prompt.name}": run_of(prompt, setup.backbone, out=folder / prompt.name, resume=True)
            for prompt in make(task, setup)
        }

    def load(self, folder: str) -> CellResult | None:
        """Return the result of a finished cell; None if it is missing or damaged."""
        cell, path = self._by_folder[folder], self.out / folder
        try:
            record = read_json(path / RUN_FILE)
            answers = [row.answer for row in read_answers(path / PREDICTIONS_FILE)]
            if record["identity"] != self.identity(cell) or len(answers) != len(self.jobs[cell.task].test):
                return None
            seconds = Unchecked(record).at("seconds").number()
            return replace(self._result(cell, answers, record, seconds), was_there=True)
        except (PTuningError, ValueError, KeyError, TypeError):
            return None

    def estimates(self, units: Sequence[Job] | None = None) -> list[CellEstimate]:
        """Return the cells of units, by default all. Those that wait are estimated by the mean time of their method's
        finished cells.
        """
        taken = {cell: done.seconds for cell in self.cells if (done := self.load(cell.folder)) is not None}
        means = mean_seconds(taken)
        cells = self.cells if units is None else self.cells_of(units)
        return [CellEstimate(cell, cell in taken, taken.get(cell, means.get(cell.method))) for cell in cells]

    def _result(self, cell: Cell, answers: Sequence[Answer], record: Mapping[str, Json], seconds: float) -> CellResult:
        job = self.jobs[cell.task]
        chosen, tried = record.get("chosen"), record.get("tried")
        dev_score = chosen.get("dev_score") if isinstance(chosen, Mapping) else None
        return CellResult(
            cell,
            "done",
            job.values(answers),
            seconds,
            len(tried) if isinstance(tried, list) and tried else 1,
            hits=sum(answer.hit for answer in answers) / len(answers),
            dev_score=dev_score if isinstance(dev_score, float) else None,
            warnings=tuple(map(str, cast("Sequence[Json]", record.get("warnings", ())))),
            by=job.values_by(answers),
        )

    def identity(self, cell: Cell) -> dict[str, Json]:
        """Return what the result of a cell depends on."""
        job, method = self.jobs[cell.task], self.methods[cell.method]
        task, parts = job.task_of(cell.seed), self._parts(cell)
        settings: dict[str, Json] = dict(self.config_of(cell).to_json()) if method.trained else {}
        found = identity(
            {**settings, "seed": cell.seed},
            {part: digest(data) for part, data in parts.items()},
            fingerprint=self.backbone.fingerprint,
            task_file=task.file.text if task.file is not None else None,
        )
        found |= {
            "manual template": str(task.manual),
            "template": str(task.template),
            "possible answers (sha256)": sha256("\n".join(task.vocabulary or task.objects).encode()),
            "restricted": task.vocabulary is not None,
            "single token": task.single_token,
        }
        if task.words is not None:
            found["label words"] = task.words.to_json()
        found |= task.scoring
        if self.backbone.dtype != torch.float32:  # the fingerprint does not depend on the dtype
            found["dtype"] = short_name(self.backbone.dtype)
        if self.backbone.max_length is not None:
            found["max_length of the backbone"] = self.backbone.max_length
        if method.trained:
            found["tries"] = self.tries
        return found

    def _parts(self, cell: Cell) -> dict[str, Questions]:
        job = self.jobs[cell.task]
        task = job.task_of(cell.seed)
        return {"train": task.train, "dev": task.dev, "test": job.test}

    def _run(self, cell: Cell, run: JobRun, *, seconds: float = 0.0) -> CellResult:
        began = time.monotonic() - seconds
        try:
            return self._fit(cell, self._setup(cell, run), began)
        except Interrupted:
            raise
        except Exception as error:  # noqa: BLE001
            # A method of the user may raise anything; the other cells still run.
            return self._failed(cell, error, seconds=time.monotonic() - began)

    def _failed(self, cell: Cell, error: Exception, *, seconds: float = 0.0) -> CellResult:
        logger.warning("%s %s seed %d failed: %s", cell.task, cell.method, cell.seed, error)
        logger.debug("the error in full", exc_info=error)
        return CellResult(cell, "failed", seconds=seconds, error=str(error) or type(error).__name__)

    def _start(self, cell: Cell) -> None:
        make_folder(self.out / cell.folder)
        write_json(self.out / cell.folder / STARTED_FILE, {"identity": self.identity(cell)})

    def _setup(self, cell: Cell, run: JobRun) -> Setup:
        return Setup(
            self._backbone_of(cell),
            config=self.config_of(cell),
            seed=cell.seed,
            tries=self.tries,
            folder=self.out / cell.folder,
            report=named(run.report, f"{cell.method}-seed-{cell.seed}/{cell.task}"),
            should_stop=run.should_stop,
        )

    def _fit(self, cell: Cell, setup: Setup, began: float) -> CellResult:
        job, folder = self.jobs[cell.task], self.out / cell.folder
        self._start(cell)
        solution = self.methods[cell.method].fit(job.task_of(cell.seed), setup)
        answers = solution.answer(job.test)
        result = self._result(cell, answers, solution.record, time.monotonic() - began)
        write_json_lines(folder / PREDICTIONS_FILE, (row.to_json() for row in answered_rows(job.test, answers)))
        write_json(folder / RUN_FILE, self._record(cell, result, solution.record))
        (folder / STARTED_FILE).unlink(missing_ok=True)
        return result

    def _backbone_of(self, cell: Cell) -> Backbone:
        if not cell.method.endswith(RANDOM_WEIGHTS):
            return self.backbone
        if self._random is None or self._random[0] != cell.seed:
            self._random = cell.seed, self.backbone.with_random_weights(seed=cell.seed)
        return self._random[1]

    def _record(self, cell: Cell, result: CellResult, more: Mapping[str, Json]) -> dict[str, Json]:
        return {
            "format_version": FORMAT_VERSION,
            **dataclasses.asdict(cell),
            "describe": self.methods[cell.method].describe,
            "identity": self.identity(cell),
            "data": {part: described(data) for part, data in self._parts(cell).items()},
            "backbone": {"name": self.backbone.name, "fingerprint": self.backbone.fingerprint},
            "settings": dict(self.config_of(cell).to_json()),
            "versions": dict(versions()),
            **({"worker": self.worker} if self.worker is not None else {}),
            "scores": {name: result.score(name).to_json() for name in result.values},
            "n": result.n,
            "seconds": result.seconds,
            **more,
        }
