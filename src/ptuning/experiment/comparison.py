"""A comparison: its methods, seeds and settings, and its cells (task, method, seed), each written when it is done.

Finished cells are skipped. ``results.json`` is written after each cell, the report at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.lora import check_peft
from ptuning.backbone.number_format import short_name
from ptuning.config import NOT_VARIED, Setting, TrainConfig, listed_names
from ptuning.data.questions import Questions
from ptuning.engine.processes import processes
from ptuning.errors import ConfigError, FileError, PTuningError, TrainingError
from ptuning.experiment.cells import CellJob, CellResult, answered_rows, digest, mean_seconds
from ptuning.experiment.results import Collector
from ptuning.files import Json, make_folder, read_json, sha256, write_json, write_json_lines
from ptuning.method.base import Method, Setup
from ptuning.method.registry import METHODS
from ptuning.method.tuned import tried_factors
from ptuning.metrics import Answer
from ptuning.names import (
    ALL_METHODS,
    CELL,
    CHECKPOINT,
    COMPARISON,
    FLEETS_FOLDER,
    PREDICTIONS_FILE,
    RANDOM_WEIGHTS,
    REPORT,
    RESULTS_FILE,
    RUN_FILE,
    STARTED_FILE,
    check_writable,
    remove,
    remove_stale,
)
from ptuning.progress import Interrupted, OnProgress, Progress, named
from ptuning.provenance import described, versions
from ptuning.report.results_file import FORMAT_VERSION, Cell, MethodInfo, Results, read_answers
from ptuning.report.write import write_report
from ptuning.training.checkpoint import check_identity, identity
from ptuning.training.fleet import run_of
from ptuning.training.run import TrainingRun, train_together
from ptuning.workers.jobs import JOB_PROMPTS, Job, JobResult, JobRun, JobSet, WorkPart, job_lock, split_evenly
from ptuning.workers.pool import WorkerConfig, run_jobs

logger = logging.getLogger(__name__)

# What methods train of the backbone, the cheapest first.
CHEAP_FIRST = (None, "none", "head", "lora", "full")
# Settings that act in every comparison: draws, splits and the length of rows.
ALWAYS = ("seed", "dev_fraction", "max_length")


@dataclass(frozen=True)
class Watch:
    """Callbacks of a comparison.

    ``report`` gets the progress inside a cell. If ``should_stop``, which is called regularly, returns true,
    :class:`ptuning.progress.Interrupted` is raised. ``on_cell`` gets the result of each cell, its number from 1, and
    the number of cells; ``on_jobs`` the tasks before anything runs, and ``on_estimate`` the cells of a dry run with
    their estimated seconds (0 where no cell of the method is finished).
    """

    report: OnProgress | None = None
    should_stop: Callable[[], bool] | None = None
    on_cell: Callable[[CellResult, int, int], None] | None = None
    on_jobs: Callable[[Sequence[CellJob]], None] | None = None
    on_estimate: Callable[[Sequence[CellResult]], None] | None = None


@dataclass(eq=False)
class Comparison(JobSet[CellResult]):
    """A comparison. :meth:`run` runs it on tasks.

    Args:
        suite: The kind of comparison: ``compare``, ``lama`` or ``superglue``.
        out: Folder of the results. Finished cells in it are kept and not run again.
        backbone: The frozen backbone.
        methods: Names of :data:`ptuning.methods`, or ``all``; by default those that the suite runs.
        seeds: Number of seeds. The first one is the seed of ``config``.
        tries: Number of settings that each trained method tries.
        config: Training settings.
        explicit: Names of settings that a user gave; each must have an effect on one of the methods.
        vary: Setting -> other values of it. Each trained method that depends on it runs with each of them as well, as
            a method of its own (``p-tuning encoder=mlp``); one setting is varied at a time.
        overwrite: Whether to replace results that were made with other settings.
        dry_run: List the cells and the time they will take, and run nothing.
        part: Run only this part of the cells, such as ``3/16``, and write neither ``results.json`` nor a report. Parts
            may run at the same time, on several machines. The comparison without it then collects all.
        workers: Run the cells in several processes; a number of them on this machine, or a cluster.
        command: The command line, for the record.
        watch: Callbacks.

    A ConfigError if a method is unknown, or a setting cannot be used in a comparison.
    """

    summary = RESULTS_FILE

    suite: str
    out: Path
    backbone: Backbone
    methods: Sequence[str] | str | None = None
    seeds: int = 1
    tries: int = 1
    config: TrainConfig = field(default_factory=TrainConfig)
    explicit: Collection[str] = ()
    vary: Mapping[str, Sequence[Setting]] = field(default_factory=dict)
    overwrite: bool = False
    dry_run: bool = False
    part: WorkPart | None = None
    workers: WorkerConfig | None = None
    command: str | None = None
    watch: Watch = field(default_factory=Watch)
    tasks: Mapping[str, CellJob] = field(init=False, default_factory=dict)
    # The methods in the order of the tables, followed by their controls.
    chosen: Mapping[str, Method] = field(init=False)
    _random: tuple[int, Backbone] | None = field(init=False, default=None)

    @classmethod
    def of(cls, suite: str, **options: Any) -> Comparison:
        """Return the comparison of keyword arguments; those that are missing or None get their defaults."""
        given = {name: value for name, value in options.items() if value is not None}
        if isinstance(given.get("part"), str):
            given["part"] = WorkPart.parse(given["part"])
        return cls(suite, **{**given, "workers": WorkerConfig.of(given.get("workers"))})

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        if self.seeds < 1:
            raise ConfigError(f"seeds is {self.seeds}; it must be 1 or more")
        tried_factors(self.tries)
        if self.config.train_backbone != "none":
            raise ConfigError(
                f"train_backbone is {self.config.train_backbone!r}, and in a comparison each method sets it; leave it "
                "out, and name fine-tuning among the methods"
            )
        for name, values in self.vary.items():
            for value in values:
                self.config.with_settings({name: value})
            if name in NOT_VARIED:
                raise ConfigError(f"the setting '{name}' is not varied: {NOT_VARIED[name]}")
            if not values:
                raise ConfigError(f"no value is given to vary '{name}' by")
        self.chosen = self._methods()
        if not self.chosen:
            raise ConfigError(f"there are no methods to compare; known: {ALL_METHODS}, {', '.join(METHODS)}")
        for setting in (*self.vary, *self.explicit):
            if not self._acts(setting):
                raise ConfigError(f"'{setting}' has no effect on the methods {', '.join(self.chosen)}")
        if self.tries > 1 and not any(method.trained for method in self.chosen.values()):
            raise ConfigError(f"tries is {self.tries}, and none of {', '.join(self.chosen)} is trained")

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_random": None, "watch": Watch(), "workers": None}

    def _methods(self) -> dict[str, Method]:
        names = METHODS.default_for(self.suite) if self.methods is None else listed_names(self.methods)
        methods: dict[str, Method] = {}
        for method in map(METHODS.find, METHODS.every if names == [ALL_METHODS] else names):
            methods[method.name] = method
            if not method.settings and "@" not in method.name:
                own = self.config.to_json()
                settings = [name for name in self.vary if method.depends_on(name)]
                varied = [
                    method.varied(name, value) for name in settings for value in self.vary[name] if value != own[name]
                ]
                methods |= {variant.name: variant for variant in varied}
        plain = list(METHODS)
        # Variants stay in the order in which they are given.
        order = sorted(methods, key=lambda name: ("@" in name, plain.index(re.split("[ @]", name)[0]), " " in name))
        return {name: methods[name] for name in order}

    def _acts(self, setting: str) -> bool:
        """Whether a setting changes the results of any method."""
        return setting in ALWAYS or any(method.depends_on(setting) for method in self.chosen.values())

    def run(
        self,
        tasks: Sequence[CellJob],
        *,
        settings: Mapping[str, Json],
        more: Callable[[Results, Sequence[CellResult]], Results] | None = None,
    ) -> Results:
        """Run all cells. ``results.json`` is written after each of them, the report at the end.

        ``settings`` are those of this suite only, for the record. ``more`` adds entries of ``results.json``.
        A FileError if the folder holds other files, or results that were made with other settings.
        """
        if self.workers is not None and not self.dry_run:
            self.workers.check()
        for task in tasks:
            task.check_known(self.backbone)
        self.tasks = {task.task.name: task for task in tasks}
        jobs = self.jobs if self.part is None else self.part.share(self.jobs)
        collector = Collector(self._empty(settings), list(self.chosen), {task.task.name: task.type for task in tasks})
        scan = check_writable(self.out, COMPARISON, overwrite=True)
        if scan.foreign and not scan.ours:
            raise FileError(f"{self.out} holds files, but no results of a comparison; choose another folder (out)")
        if not (self.dry_run and self.overwrite):  # which would remove cells
            self.check(jobs)
        if self.watch.on_jobs is not None:
            self.watch.on_jobs(tasks)
        if self.dry_run:
            estimates = self.estimates(jobs)
            if self.watch.on_estimate is not None:
                self.watch.on_estimate(estimates)
            return collector.collect(estimates)
        left = (cell for cell in self.cells_of(jobs) if self.chosen[cell.method].train_backbone == "lora")
        if any(self.load(cell.folder) is None for cell in left):
            check_peft()  # now, not after hours of others

        def collected(cells: Sequence[CellResult]) -> Results:
            results = collector.collect(cells)
            return more(results, cells) if more is not None else results

        make_folder(self.out)
        if self.part is not None:
            return collected(list(self.results(jobs)))
        # Each job keeps its cells tidy itself: others may be at work in them.
        remove_stale(self.out, replace(COMPARISON, folders=REPORT.folders))
        # Finished cells first: if this run is stopped before its first new cell, the file must not hold less.
        known = {cell: self.load(cell.folder) or CellResult(cell, "waiting") for cell in self.cells}
        results = collected(list(known.values()))
        results.write()
        for result in self.results(jobs):
            known[result.cell] = result
            if not result.was_there:
                results = collected(list(known.values()))
                results.write()
        write_report(self.out)
        return results

    def _empty(self, settings: Mapping[str, Json]) -> Results:
        """Return results without cells."""
        own: dict[str, Json] = {"seeds": self.seeds}
        if any(method.trained for method in self.chosen.values()):
            own["tries"] = self.tries
        if self.vary:
            own["vary"] = {name: list(values) for name, values in self.vary.items()}
        return Results(
            self.suite,
            command=self.command,
            backbone={**self.backbone.to_json(), "device": str(self.backbone.device)},
            settings={
                **settings,
                **own,
                **{name: value for name, value in self.config.to_json().items() if self._acts(name)},
            },
            versions=dict(versions()),
            task_info={name: task.info for name, task in self.tasks.items()},
            methods={
                name: MethodInfo(method.describe, method.trained, method.learns_slots)
                for name, method in self.chosen.items()
            },
            folder=self.out,
        )

    def config_of(self, cell: Cell) -> TrainConfig:
        """Return the settings of a cell's trainings."""
        return self.config.with_settings(self.chosen[cell.method].settings)

    @functools.cached_property
    def cells(self) -> list[Cell]:
        """All cells in the order in which they run: cheap methods first, so that a useful table exists early."""
        ordered = sorted(
            self.chosen.values(), key=lambda method: (method.trained, CHEAP_FIRST.index(method.train_backbone))
        )
        return [
            Cell(name, method.name, self.config.seed + number)
            for number in range(self.seeds)
            for method in ordered
            for name, task in self.tasks.items()
            if number == 0 or method.seeded or (task.by_seed and method.reads_train)
        ]

    @property
    def jobs(self) -> list[Job]:
        """The cells, cut into what one worker does alone. It depends on what is compared, and on nothing else."""
        jobs: list[Job] = []
        for (seed, method), group in itertools.groupby(self.cells, key=lambda cell: (cell.seed, cell.method)):
            cells = list(group)
            if not self._trains_together(cells):
                jobs += [Job(f"{cell.task} {cell.method} seed {cell.seed}", (cell.folder,)) for cell in cells]
                continue
            prompts = self.tries * self.config_of(cells[0]).num_restarts
            for number, part in enumerate(split_evenly(cells, [prompts] * len(cells), JOB_PROMPTS), start=1):
                name = f"{method}-seed-{seed}" + (f"-{number}" if number > 1 else "")
                jobs.append(Job(name, tuple(cell.folder for cell in part), f"{FLEETS_FOLDER}/{name}"))
        return jobs

    def _trains_together(self, cells: Sequence[Cell]) -> bool:
        several = len(cells) * self.tries * self.config_of(cells[0]).num_restarts > 1
        return self.chosen[cells[0].method].prompts is not None and several and processes().num_processes == 1

    def cells_of(self, jobs: Sequence[Job]) -> list[Cell]:
        """Return the cells of jobs, in the order in which they run."""
        return [self._by_folder[folder] for job in jobs for folder in job.folders]

    @functools.cached_property
    def _by_folder(self) -> dict[str, Cell]:
        return {cell.folder: cell for cell in self.cells}

    def check(self, jobs: Sequence[Job]) -> None:
        """Check that the cells of jobs were made with these settings; with ``overwrite`` remove the others.

        A FileError says what differs: settings, data or backbone.
        """
        for job in jobs:
            for cell in self.cells_of([job]):
                folder = self.out / cell.folder
                saved = _saved_identity(folder)
                if saved is None:  # it is missing or damaged, and will be made again
                    if self.overwrite:
                        remove(folder, CELL)
                    continue
                now = self.identity(cell)
                try:
                    check_identity(now, saved, where=cell.folder)
                except TrainingError as error:
                    if not self.overwrite:
                        why = str(error).replace("resume from", "reuse")
                        raise FileError(
                            f"{self.out} holds results made with other settings. {why}{_how_to_have_both(now, saved)}"
                        ) from error
                    remove(folder, CELL)
                    if job.checkpoint is not None:  # of prompts that were trained together with it
                        remove(self.out / job.checkpoint, CHECKPOINT)

    def results(self, jobs: Sequence[Job] | None = None) -> Iterator[CellResult]:
        """Run the cells of jobs, by default of all, that are not finished, and yield the result of each.

        A cell that fails is logged and yielded as failed; the others go on. A job that another process works on is
        waited for.
        """
        run = JobRun(self.jobs if jobs is None else jobs, self.watch.report, self.watch.should_stop)
        for number, ended in enumerate(run_jobs(self, run, self.workers), start=1):
            result = ended.value
            assert result is not None
            if not result.was_there:
                self._report(run)
            yield result
            if self.watch.on_cell is not None:
                self.watch.on_cell(result, number, run.total)
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
                results = self._run_in_turn(cells, run)
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
            means = mean_seconds(finished.values())
            known = [means[other.method] for other in waiting if other.method in means]
            note, untimed = note if cell is None else f"{cell.task} {cell.method}", len(waiting) - len(known)
            left = sum(known) / min(run.workers, max(1, len(waiting)))
            run.report(Progress("suite", len(run.done), run.total, note, seconds_left=left, untimed=untimed))

    def _run_in_turn(self, cells: Sequence[Cell], run: JobRun) -> Iterator[CellResult]:
        for cell in cells:
            done = self.load(cell.folder)
            if done is None:
                run.check_stop()
            yield done or self._run(cell, run)

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
                trainings = self._trainings(cell, run)
            except PTuningError as error:
                if cell not in done:
                    yield self._failed(cell, error)
                continue
            runs |= trainings
            owners |= dict.fromkeys(trainings, cell)
        left = [cell for cell in dict.fromkeys(owners.values()) if cell not in done]
        waiting = Counter(owners.values())
        seconds = dict.fromkeys(owners.values(), 0.0)
        failed: dict[Cell, PTuningError] = {}
        report = named(run.report, place.name)
        try:
            trained = train_together(
                runs, checkpoint=place, at_once=JOB_PROMPTS, resume=True, report=report, should_stop=run.should_stop
            )
            for name, outcome in trained if runs else ():
                cell = owners[name]
                waiting[cell] -= 1
                if isinstance(outcome, PTuningError):
                    failed[cell] = outcome
                else:
                    seconds[cell] += cast("float", outcome.record["train_seconds"])
                if waiting[cell] or cell in done:
                    continue
                self._report(run, cell)
                result = (
                    self._failed(cell, failed[cell], seconds=seconds[cell])
                    if cell in failed
                    else self._run(cell, run, seconds=seconds[cell])
                )
                left.remove(cell)
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

    def _trainings(self, cell: Cell, run: JobRun) -> dict[str, TrainingRun]:
        make, task = self.chosen[cell.method].prompts, self.tasks[cell.task].task_of(cell.seed)
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
            record: Any = read_json(path / RUN_FILE)
            answers = [row.answer for row in read_answers(path / PREDICTIONS_FILE)]
            if record["identity"] != self.identity(cell) or len(answers) != len(self.tasks[cell.task].test):
                return None
            return replace(self._result(cell, answers, record, float(record["seconds"])), was_there=True)
        except (PTuningError, ValueError, LookupError, TypeError, AttributeError):
            return None

    def estimates(self, jobs: Sequence[Job]) -> list[CellResult]:
        """Return the cells of jobs as waiting. Those without files are estimated by the mean time of their method's
        finished cells, or have 0 seconds if there are none.
        """
        loaded = {cell: self.load(cell.folder) for cell in self.cells}
        finished = {cell: done for cell, done in loaded.items() if done is not None}
        means = mean_seconds(finished.values())
        return [
            CellResult(
                cell,
                "waiting",
                seconds=finished[cell].seconds if cell in finished else means.get(cell.method, 0.0),
                was_there=cell in finished,
            )
            for cell in self.cells_of(jobs)
        ]

    def _result(self, cell: Cell, answers: Sequence[Answer], record: Mapping[str, Any], seconds: float) -> CellResult:
        task = self.tasks[cell.task]
        return CellResult(
            cell,
            "done",
            task.values(answers),
            seconds,
            len(record.get("tried") or [None]),
            hits=sum(answer.hit for answer in answers) / len(answers),
            dev_score=record.get("chosen", {}).get("dev_score"),
            warnings=tuple(record.get("warnings", ())),
            by=task.values_by(answers),
        )

    def identity(self, cell: Cell) -> dict[str, Json]:
        """Return what the result of a cell depends on."""
        method, config = self.chosen[cell.method], self.config_of(cell)
        task = self.tasks[cell.task].task_of(cell.seed)
        settings: dict[str, Json] = dict(config.to_json()) if method.trained else {}
        values = identity(
            {**settings, "seed": cell.seed},
            {part: digest(data) for part, data in self._parts(cell).items()},
            fingerprint=self.backbone.fingerprint,
            task_file=task.file.text if task.file is not None else None,
        )
        values |= {
            "manual template": str(task.manual),
            "template": str(task.template),
            "possible answers (sha256)": sha256("\n".join(task.vocabulary or task.objects).encode()),
            "restricted": task.vocabulary is not None,
            "single token": task.single_token,
        }
        if task.words is not None:
            values["label words"] = task.words.to_json()
        values |= task.scoring
        if self.backbone.dtype != torch.float32:  # the fingerprint does not depend on the dtype
            values["dtype"] = short_name(self.backbone.dtype)
        if self.backbone.max_length is not None:
            values["max_length of the backbone"] = self.backbone.max_length
        if method.trained:
            values["tries"] = self.tries
        return values

    def _parts(self, cell: Cell) -> dict[str, Questions]:
        task = self.tasks[cell.task].task_of(cell.seed)
        return {"train": task.train, "dev": task.dev, "test": self.tasks[cell.task].test}

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
        backbone = self.backbone
        if cell.method.endswith(RANDOM_WEIGHTS):
            if self._random is None or self._random[0] != cell.seed:
                self._random = cell.seed, backbone.with_random_weights(seed=cell.seed)
            backbone = self._random[1]
        return Setup(
            backbone,
            config=self.config_of(cell),
            seed=cell.seed,
            tries=self.tries,
            folder=self.out / cell.folder,
            report=named(run.report, f"{cell.method}-seed-{cell.seed}/{cell.task}"),
            should_stop=run.should_stop,
        )

    def _fit(self, cell: Cell, setup: Setup, began: float) -> CellResult:
        task, method, folder = self.tasks[cell.task], self.chosen[cell.method], self.out / cell.folder
        self._start(cell)
        solution = method.fit(task.task_of(cell.seed), setup)
        answers = solution.answer(task.test)
        result = self._result(cell, answers, solution.record, time.monotonic() - began)
        record: dict[str, Json] = {
            "format_version": FORMAT_VERSION,
            **dataclasses.asdict(cell),
            "describe": method.describe,
            "identity": self.identity(cell),
            "data": {part: described(data) for part, data in self._parts(cell).items()},
            "backbone": {"name": self.backbone.name, "fingerprint": self.backbone.fingerprint},
            "settings": dict(setup.config.to_json()),
            "versions": dict(versions()),
            **({"worker": self.worker} if self.worker is not None else {}),
            "scores": {name: result.score(name).to_json() for name in result.values},
            "n": result.n,
            "seconds": result.seconds,
            **solution.record,
        }
        write_json_lines(folder / PREDICTIONS_FILE, (row.to_json() for row in answered_rows(task.test, answers)))
        write_json(folder / RUN_FILE, record)
        (folder / STARTED_FILE).unlink(missing_ok=True)
        return result


def _how_to_have_both(now: Mapping[str, Json], saved: Mapping[str, Json]) -> str:
    """Return how results with both settings come into one report, if nothing else differs."""
    changed = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if not (set(TrainConfig.model_fields) - set(NOT_VARIED)).issuperset(changed):
        return ""
    options = " ".join(f"vary {name}={now.get(name)}" for name in changed)
    return f". To have both in one report, leave the settings as they were and {options}"


def _saved_identity(folder: Path) -> Mapping[str, Json] | None:
    """Return the identity of a finished or started cell; None if there is none that can be read."""
    for name in (RUN_FILE, STARTED_FILE):
        try:
            saved = read_json(folder / name).get("identity")
        except FileError:
            continue
        if isinstance(saved, Mapping):
            return saved
    return None
