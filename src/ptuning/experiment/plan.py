"""What every comparison is asked for (`Plan`), and how it runs: results are written after each cell, then a report."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from typing_extensions import Required, TypedDict, Unpack

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.lora import check_peft
from ptuning.config import NOT_VARIED, Setting, TrainConfig, listed_names
from ptuning.errors import ConfigError, FileError
from ptuning.experiment.cells import CellEstimate, CellJob, CellResult
from ptuning.experiment.jobs import check_known
from ptuning.experiment.results import Collector
from ptuning.experiment.suite import Suite
from ptuning.files import Json, make_folder
from ptuning.method.base import Method
from ptuning.method.registry import METHODS
from ptuning.method.tuned import tried_factors
from ptuning.names import ALL_METHODS, COMPARISON, REPORT, check_writable, remove_stale
from ptuning.progress import OnProgress
from ptuning.provenance import versions
from ptuning.report.results_file import MethodInfo, Results
from ptuning.report.write import write_report
from ptuning.workers.jobs import Job, WorkPart
from ptuning.workers.pool import WorkerConfig

# The files of a comparison beside its cells, which each unit keeps tidy itself: others may be at work in them.
# Settings that act in every comparison: draws, splits and the length of rows.
ALWAYS = ("seed", "dev_fraction", "max_length")
REPORT_FILES = replace(COMPARISON, folders=REPORT.folders)


@dataclass(frozen=True)
class Watch:
    """Callbacks of a comparison.

    ``report`` gets the progress inside a cell. If ``should_stop``, which is called regularly, returns true,
    :class:`ptuning.progress.Interrupted` is raised. ``on_cell`` gets the result of each cell, its number from 1, and
    the number of cells; ``on_jobs`` the tasks before anything runs, and ``on_estimate`` the cells of a dry run.
    """

    report: OnProgress | None = None
    should_stop: Callable[[], bool] | None = None
    on_cell: Callable[[CellResult, int, int], None] | None = None
    on_jobs: Callable[[Sequence[CellJob]], None] | None = None
    on_estimate: Callable[[Sequence[CellEstimate]], None] | None = None


class PlanOptions(TypedDict, total=False):
    """The keyword arguments of every comparison; :class:`Plan` describes them. None stands for the default."""

    out: Required[str | Path]
    backbone: Required[Backbone]
    methods: Sequence[str] | str | None
    seeds: int
    tries: int
    config: TrainConfig | None
    explicit: Collection[str]
    vary: Mapping[str, Sequence[Setting]]
    overwrite: bool
    dry_run: bool
    part: WorkPart | str | None
    workers: WorkerConfig | int | None
    command: str | None
    watch: Watch | None


@dataclass(frozen=True)
class Plan:
    """The description of a comparison, apart from its data.

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
        workers: Run the cells in several processes; a number stands for so many on this machine, and 1 for none.
        command: The command line, for the record.
        watch: Callbacks.

    A ConfigError if a method is unknown, or a setting cannot be used in a comparison.
    """

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

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"seeds is {self.seeds}; it must be 1 or more")
        tried_factors(self.tries)
        if self.config.train_backbone != "none":
            raise ConfigError(
                f"train_backbone is {self.config.train_backbone!r}, but in a comparison each method says what it "
                "trains; leave it out, and "
                "name fine-tuning among the methods"
            )
        check_varied(self.vary, self.config)
        if not self.method_names:
            raise ConfigError(f"there are no methods to compare; known: {ALL_METHODS}, {', '.join(METHODS)}")
        for setting in (*self.vary, *self.explicit):
            if not self.acts(setting):
                raise ConfigError(f"'{setting}' has no effect on the methods {', '.join(self.method_names)}")
        if self.tries > 1 and not any(METHODS.find(name).trained for name in self.method_names):
            raise ConfigError(f"tries is {self.tries}, and none of {', '.join(self.method_names)} is trained")

    def acts(self, setting: str) -> bool:
        """Whether a setting changes the results of any method."""
        return setting in ALWAYS or any(METHODS.find(name).depends_on(setting) for name in self.method_names)

    @classmethod
    def of(cls, suite: str, **options: Unpack[PlanOptions]) -> Plan:
        """Return the plan of keyword arguments; those that are missing or None get their defaults."""
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        if "out" in given:
            given["out"] = Path(given["out"])
        if isinstance(given.get("part"), str):
            given["part"] = WorkPart.parse(given["part"])
        given["workers"] = WorkerConfig.of(given.get("workers"))
        return cls(suite, **given)

    @property
    def method_names(self) -> list[str]:
        """The methods in the order of the tables, followed by their controls."""
        asked = METHODS.default_for(self.suite) if self.methods is None else listed_names(self.methods)
        chosen = [METHODS.find(name) for name in (METHODS.every if asked == [ALL_METHODS] else asked)]
        names = [name for method in chosen for name in (method.name, *self._variants(method))]
        plain = list(METHODS)
        # Variants stay in the order in which they are given.
        return sorted(
            dict.fromkeys(names), key=lambda name: ("@" in name, plain.index(re.split("[ @]", name)[0]), " " in name)
        )

    def _variants(self, method: Method) -> list[str]:
        if method.settings or "@" in method.name:
            return []
        own = self.config.to_json()
        depends = [setting for setting in self.vary if method.depends_on(setting)]
        return [method.varied(name, value).name for name in depends for value in self.vary[name] if value != own[name]]


def check_varied(vary: Mapping[str, Sequence[Setting]], config: TrainConfig) -> None:
    """Raise a ConfigError if a setting is unknown, is not varied by comparisons, or cannot have one of the values."""
    for name, values in vary.items():
        for value in values:
            config.with_settings({name: value})
        if name in NOT_VARIED:
            raise ConfigError(f"the setting '{name}' is not varied: {NOT_VARIED[name]}")
        if not values:
            raise ConfigError(f"no value is given to vary '{name}' by")


def run_jobs(
    jobs: Sequence[CellJob],
    *,
    plan: Plan,
    settings: Mapping[str, Json],
    more: Callable[[Results, Sequence[CellResult]], Results] | None = None,
) -> Results:
    """Run all cells. ``results.json`` is written after each of them, the report at the end.

    ``settings`` are those of this suite only, for the record. ``more`` adds entries of ``results.json`` of this suite.
    A FileError if the folder holds other files, or results that were made with other settings.
    """
    if plan.workers is not None and not plan.dry_run:
        plan.workers.check()
    for job in jobs:
        check_known(job, plan.backbone)
    suite = Suite(
        plan.out,
        jobs=jobs,
        methods=plan.method_names,
        seeds=plan.seeds,
        backbone=plan.backbone,
        config=plan.config,
        tries=plan.tries,
    )
    units = suite.units if plan.part is None else plan.part.share(suite.units)
    empty = _empty_results(suite, plan, settings)
    collector = Collector(empty, plan.method_names, {job.task.name: job.type for job in jobs})
    _check_folder(plan.out)
    if not (plan.dry_run and plan.overwrite):  # which would remove cells
        suite.check(None if plan.part is None else units, overwrite=plan.overwrite)
    if plan.watch.on_jobs is not None:
        plan.watch.on_jobs(jobs)
    if plan.dry_run:
        if plan.watch.on_estimate is not None:
            plan.watch.on_estimate(suite.estimates(units))
        return collector.collect([CellResult(cell, "waiting") for cell in suite.cells_of(units)])
    _check_installed(suite, units)

    def collected(cells: Sequence[CellResult]) -> Results:
        results = collector.collect(cells)
        return more(results, cells) if more is not None else results

    make_folder(plan.out)
    if plan.part is not None:
        return collected(list(_run(suite, units, plan)))
    remove_stale(plan.out, REPORT_FILES)
    return _run_and_report(suite, units, plan, collected)


def _check_installed(suite: Suite, units: Sequence[Job]) -> None:
    """Raise a ConfigError if a cell that is left needs a package that is missing: now, not after hours of others."""
    left = (cell for cell in suite.cells_of(units) if suite.methods[cell.method].train_backbone == "lora")
    if any(suite.load(cell.folder) is None for cell in left):
        check_peft()


def _run(suite: Suite, units: Sequence[Job], plan: Plan) -> Iterator[CellResult]:
    total = sum(len(unit.folders) for unit in units)
    watch = plan.watch
    ended = suite.run(units, workers=plan.workers, report=watch.report, should_stop=watch.should_stop)
    for number, result in enumerate(ended, start=1):
        yield result
        if watch.on_cell is not None:
            watch.on_cell(result, number, total)


def _run_and_report(
    suite: Suite, units: Sequence[Job], plan: Plan, collected: Callable[[Sequence[CellResult]], Results]
) -> Results:
    # Finished cells first: if this run is stopped before its first new cell, the file must not hold less than before.
    found = {cell: suite.load(cell.folder) or CellResult(cell, "waiting") for cell in suite.cells}

    def write() -> Results:
        results = collected(list(found.values()))
        results.write()
        return results

    results = write()
    for result in _run(suite, units, plan):
        found[result.cell] = result
        if not result.was_there:
            results = write()
    write_report(plan.out)
    return results


def _check_folder(out: Path) -> None:
    found = check_writable(out, COMPARISON, overwrite=True)
    if found.foreign and not found.ours:
        raise FileError(f"{out} holds files, but no results of a comparison; choose another folder (--out)")


def _empty_results(suite: Suite, plan: Plan, settings: Mapping[str, Json]) -> Results:
    backbone = plan.backbone
    return Results(
        plan.suite,
        command=plan.command,
        backbone={
            **backbone.to_json(),
            "device": str(backbone.device),
        },
        settings={
            **settings,
            "seeds": plan.seeds,
            **({"tries": plan.tries} if any(method.trained for method in suite.methods.values()) else {}),
            **({"vary": {name: list(values) for name, values in plan.vary.items()}} if plan.vary else {}),
            **{name: value for name, value in plan.config.to_json().items() if plan.acts(name)},
        },
        versions=dict(versions()),
        task_info={name: job.info for name, job in suite.jobs.items()},
        methods={
            name: MethodInfo(method.describe, method.trained, method.learns_slots)
            for name, method in suite.methods.items()
        },
        folder=plan.out,
    )
