"""How a comparison is run: which methods, how many seeds and tries, where to, and in which order things are written.
Knows no benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig, listed_names
from ptuning.errors import ConfigError, FileError
from ptuning.experiment.cells import CellResult, Job
from ptuning.experiment.dry_run import Estimate, estimate
from ptuning.experiment.results import Collector
from ptuning.experiment.suite import Suite
from ptuning.files import Json, check_free, make_folder
from ptuning.method.base import METHODS
from ptuning.method.baselines import FREE_METHODS
from ptuning.method.tuned import tried_factors
from ptuning.names import ALL_METHODS, LEARNED, RANDOM_WEIGHTS, RESULTS_FILE
from ptuning.progress import OnProgress
from ptuning.provenance import versions
from ptuning.report.results_file import CELLS_FOLDER, MethodInfo, Results
from ptuning.report.write import write_report

# The list of methods with all of them on it: the modules that register them are loaded above.
methods = METHODS
# What is compared where nobody says; fine-tuning takes an hour and more on a CPU, so it is asked for.
DEFAULT_METHODS = (*FREE_METHODS, LEARNED)


@dataclass(frozen=True)
class Watch:
    """Who is told how far a comparison is, and who may stop it.

    Args:
        report: Called with progress inside a cell.
        should_stop: Asked now and then; if true, :class:`ptuning.progress.Interrupted` is raised.
        on_cell: Called with the result of each cell, its number from 1, and how many there are.
        on_estimate: Called with the estimate of a dry run.
    """

    report: OnProgress | None = None
    should_stop: Callable[[], bool] | None = None
    on_cell: Callable[[CellResult, int, int], None] | None = None
    on_estimate: Callable[[Sequence[Estimate]], None] | None = None


@dataclass(frozen=True)
class Plan:
    """How a comparison is run, whatever it is about.

    Args:
        out: Folder of the results.
        backbone: The frozen backbone.
        methods: Names of methods, or ``all``.
        seeds: How many seeds; the first is the configuration's.
        tries: How many settings each trained method tries.
        control: Whether each trained method also runs on a backbone with random weights.
        config: Settings of training.
        overwrite: Replace results made with other settings.
        dry_run: Estimate the time, and run nothing.
        command: The command line, for the record.
        watch: Who is told.

    Raises:
        ConfigError: If a method is unknown, or a setting is none that a comparison can have.
    """

    out: Path
    backbone: Backbone
    methods: Sequence[str] | str = DEFAULT_METHODS
    seeds: int = 1
    tries: int = 1
    control: bool = False
    config: TrainConfig = field(default_factory=TrainConfig)
    overwrite: bool = False
    dry_run: bool = False
    command: str | None = None
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"seeds is {self.seeds}; it must be 1 or more")
        tried_factors(self.tries)
        if self.config.tune != "frozen":
            raise ConfigError(
                f"tune is {self.config.tune!r}, and here each method says what it trains; leave it out, and ask for "
                "fine-tuning among the methods"
            )
        if not self.method_names:
            raise ConfigError(f"there are no methods to compare; known: {ALL_METHODS}, {', '.join(METHODS)}")

    @property
    def method_names(self) -> list[str]:
        """The methods in the order of the tables, their controls behind."""
        asked = listed_names(self.methods)
        chosen = [METHODS.find(name) for name in (METHODS if asked == [ALL_METHODS] else asked)]
        names = [method.name for method in chosen]
        if self.control:
            names += [
                f"{method.name}{RANDOM_WEIGHTS}" for method in chosen if method.trained and "@" not in method.name
            ]
        plain = list(METHODS)
        return sorted(set(names), key=lambda name: ("@" in name, plain.index(name.partition("@")[0])))


def run_jobs(
    suite_name: str,
    jobs: Sequence[Job],
    *,
    plan: Plan,
    settings: Mapping[str, Json],
    more: Callable[[Results, Sequence[CellResult]], Results] | None = None,
) -> Results:
    """Run all cells, writing ``results.json`` after each one, and the report in the end.

    Args:
        suite_name: ``compare``, ``lama`` or ``paraphrases``.
        jobs: The tasks.
        plan: How to run them.
        settings: What the suite was asked for, for the record.
        more: Adds what only this suite has to the results of the cells.

    Raises:
        FileError: If the folder holds something else, or results made with other settings.
        Interrupted: If it was asked to stop.
    """
    suite = Suite(
        plan.out,
        jobs=jobs,
        methods=plan.method_names,
        seeds=plan.seeds,
        backbone=plan.backbone,
        config=plan.config,
        tries=plan.tries,
    )
    types = {job.task.name: job.type for job in jobs}
    collector = Collector(_no_results(suite_name, suite, plan, settings), plan.method_names, types)
    if plan.dry_run:
        if plan.watch.on_estimate is not None:
            plan.watch.on_estimate(estimate(suite))
        return collector.collect([CellResult(cell, "waiting") for cell in suite.cells])
    if not (plan.out / RESULTS_FILE).is_file() and not (plan.out / CELLS_FOLDER).is_dir():
        check_free(plan.out, overwrite=True)
        if plan.out.is_dir() and any(plan.out.iterdir()):
            raise FileError(f"{plan.out} holds files, and no results of a benchmark; choose another folder (--out)")
    suite.check(overwrite=plan.overwrite)
    make_folder(plan.out)
    # With what is finished: whoever stops the first new cell must not find less than before.
    found = {cell: suite.load(cell) or CellResult(cell, "waiting") for cell in suite.cells}

    def write() -> Results:
        cells = list(found.values())
        results = collector.collect(cells)
        if more is not None:
            results = more(results, cells)
        results.write()
        return results

    results = write()
    for number, result in enumerate(suite.run(report=plan.watch.report, should_stop=plan.watch.should_stop), start=1):
        found[result.cell] = result
        if not result.was_there:
            results = write()
        if plan.watch.on_cell is not None:
            plan.watch.on_cell(result, number, len(found))
    write_report(plan.out)
    return results


def _no_results(name: str, suite: Suite, plan: Plan, settings: Mapping[str, Json]) -> Results:
    """Return the results before any cell has finished."""
    backbone = plan.backbone
    return Results(
        name,
        command=plan.command,
        backbone={
            **backbone.to_json(),
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "device": str(backbone.device),
        },
        settings={**settings, "seeds": plan.seeds, "tries": plan.tries, **plan.config.to_json()},
        versions=dict(versions()),
        task_info={name: job.info for name, job in suite.jobs.items()},
        methods={name: MethodInfo(method.describe, method.trained) for name, method in suite.methods.items()},
        folder=plan.out,
    )
