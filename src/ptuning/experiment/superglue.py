"""The paper's SuperGLUE experiment, with all training data or with a few examples."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from typing_extensions import Unpack

from ptuning.config import listed_names
from ptuning.data.questions import Questions
from ptuning.data.splits import draw_few, draw_questions, split_questions
from ptuning.data.task_files import TaskFile, find_split, load_task
from ptuning.errors import ConfigError, FileError
from ptuning.experiment.cells import CellJob, CellResult
from ptuning.experiment.plan import Plan, PlanOptions, run_jobs
from ptuning.files import Json
from ptuning.method.base import Task
from ptuning.method.registry import METHODS
from ptuning.names import ALL_METHODS
from ptuning.provenance import described
from ptuning.report.results_file import Agreement, ChosenSetting, Results, TrainingWarning
from ptuning.statistics import correlation

logger = logging.getLogger(__name__)

SUITE = "superglue"
TASKS = ("BoolQ", "CB", "COPA", "MultiRC", "ReCoRD", "RTE", "WiC", "WSC")
SEEDS = 3


def superglue(
    data: str | Path,
    *,
    tasks: Sequence[str] | str = "all",
    few_shot: int | None = None,
    pattern: int = 1,
    limit: int | None = None,
    **options: Unpack[PlanOptions],
) -> Results:
    """Run the paper's SuperGLUE experiment. Finished cells of an earlier run are not run again.

    Settings are chosen on the development part (FewGLUE's ``dev32``), or on a seeded share of the training part if
    there is none. Scores are reported on the validation part. A task without that is reported on its development part,
    and its settings are chosen on a share of the training part.

    Args:
        data: The folder with one folder per task, the layout of SuperGLUE and FewGLUE.
        tasks: Names of shipped tasks, paths of task files, or ``all`` SuperGLUE tasks that have a folder.
        few_shot: Learn from this many examples, and choose by as many others. Each seed draws its own.
        pattern: The number of the task's pattern to use, from 1. No pattern is chosen by its score.
        limit: Report on a seeded draw of about this many rows.
        **options: ``out``, ``backbone`` and the others of :class:`Plan`. The default of ``seeds`` is 3 here.

    Returns all scores; the files are in ``out``. A PTuningError if the data or the settings cannot be used; nothing
    has been run then.

    Source: Liu et al. (2021), section 4.2; Schick and Schuetze (2021), arXiv:2009.07118, for the few-shot setting.
    """
    options["seeds"] = options.get("seeds") or SEEDS
    options["methods"] = chosen_methods(options.get("methods"))
    plan = Plan.of(SUITE, **options)
    for name, value in {"few_shot": few_shot, "limit": limit}.items():
        if value is not None and value < 2:
            raise ConfigError(f"{name} is {value}; it must be 2 or more")
    jobs = [
        task_job(
            file,
            Path(data),
            few_shot=few_shot,
            pattern=pattern,
            limit=limit,
            seeds=range(plan.config.seed, plan.config.seed + plan.seeds),
            dev_fraction=plan.config.dev_fraction,
        )
        for file in asked_tasks(Path(data), tasks)
    ]
    counts = {"few_shot": few_shot, "pattern": pattern, "limit": limit}
    settings: dict[str, Json] = {"data": str(data), **counts}
    return run_jobs(jobs, plan=plan, settings=settings, more=with_agreement_and_warnings)


def chosen_methods(methods: Sequence[str] | str | None) -> list[str]:
    """Return names of methods; ``all`` leaves out those that equal another one on tasks with labels or choices."""
    names = METHODS.default_for(SUITE) if methods is None else listed_names(methods)
    if names == [ALL_METHODS]:
        return [name for name in METHODS.every if not METHODS[name].open_only]
    return names


def asked_tasks(data: Path, tasks: Sequence[str] | str) -> list[TaskFile]:
    """Return the named tasks; ``all`` stands for the SuperGLUE tasks that have a folder.

    A FileError if a task is unknown, or no task has a folder; a ConfigError if no task is named, or two task files have
    the same name.
    """
    asked = listed_names(tasks)
    if asked != ["all"]:
        if not asked:
            raise ConfigError(f"there are no tasks to run; known: all, {', '.join(TASKS)}")
        files = {file.text: file for file in map(load_task, asked)}  # a task named twice runs once
        doubled = [name for name, count in Counter(file.name for file in files.values()).items() if count > 1]
        if doubled:
            raise ConfigError(f"two task files have the name {doubled[0]}; it becomes a folder, so give each its own")
        return list(files.values())
    if not data.is_dir():
        raise FileError(f"no such data folder: {data}; give the folder that holds BoolQ, CB and the others")
    there = {entry.name.lower() for entry in data.iterdir() if entry.is_dir()}
    found = [load_task(name) for name in TASKS if name.lower() in there]
    if not found:
        raise FileError(f"{data} holds no folder of a SuperGLUE task; it must hold some of {', '.join(TASKS)}")
    return found


def task_job(
    file: TaskFile,
    folder: Path,
    *,
    seeds: Sequence[int],
    few_shot: int | None = None,
    pattern: int = 1,
    limit: int | None = None,
    dev_fraction: float = 0.2,
) -> CellJob:
    """Return a task with the parts that its folder has. The arguments are those of :func:`superglue`.

    The first of ``seeds`` draws what all seeds share. Without a part to choose by, a share of ``dev_fraction`` of the
    training part is set aside.
    """
    if not 1 <= pattern <= len(file.manual):
        raise ConfigError(f"pattern is {pattern}, and the task {file.name} has {len(file.manual)}; give 1 or more")
    if file.text_metrics:
        raise ConfigError(
            f"the task {file.name} is scored by metrics for texts ({', '.join(file.text_metrics)}), which have no mean "
            "with those of other tasks; compare methods on it with ptuning compare --task"
        )
    train = file.read(find_split(folder, file, "train"))
    dev, val = _optional(file, folder, "dev"), _optional(file, folder, "val")
    if val is None and dev is None:
        find_split(folder, file, "val")  # raises an error that names the files
    reported, where, to_choose = val, "validation part", dev
    if reported is None:
        reported, where, to_choose = dev, "development part, since there is no validation part", None
        assert reported is not None
        logger.warning("%s has no validation part: reported on the development part", file.name)
    drawn, how = _to_learn(file, train, to_choose, few_shot=few_shot, seeds=seeds, dev_fraction=dev_fraction)
    test = draw_questions(reported, limit, seed=0)
    how += f"; reported on the {where}" + (f", {len(test)} of {len(reported)} rows" if limit is not None else "")
    pair, labels = (file.manual[pattern - 1], file.learned[pattern - 1]), file.answer_space.labels
    tasks = {seed: Task(file.name, *parts, *pair, labels, file=file) for seed, parts in drawn.items()}
    task = tasks[seeds[0]]
    parts = {"train": task.train, "dev": task.dev, "test": test}
    info: dict[str, Json] = {
        "manual": str(task.manual),
        "template": str(task.template),
        "data": {part: described(rows, kept=len(rows)) for part, rows in parts.items()},
        "label": None,
        "type": None,
        "rows": sum(map(len, parts.values())),
        "dropped": {},
        "split": how,
        "labels": list(labels) or None,
        "metrics": list(file.metrics),
        "version": file.version,
        "benchmark": SUITE if file.name in TASKS else None,
        "reported": "val" if val is not None else "dev",
    }
    return CellJob(task, test, info, by_seed=tasks if few_shot is not None else {})


def _to_learn(
    file: TaskFile,
    train: Questions,
    dev: Questions | None,
    *,
    few_shot: int | None,
    seeds: Sequence[int],
    dev_fraction: float,
) -> tuple[dict[int, tuple[Questions, Questions]], str]:
    """Return seed -> training and development part (of the first seed only, if all have the same), and their origin."""
    if few_shot is not None:
        pool = Questions([*train, *(dev or [])], name=train.name)
        how = f"{few_shot} examples to learn from and {few_shot} to choose by, drawn anew by each seed"
        return {seed: draw_few(pool, few_shot, file.answer_space.labels, seed=seed) for seed in seeds}, how
    if dev is not None:
        return {seeds[0]: (train, dev)}, "training and development part as given"
    how = f"{dev_fraction:.0%} of the training part set aside to choose by, seed {seeds[0]}"
    return {seeds[0]: split_questions(train, fraction=dev_fraction, seed=seeds[0])}, how


def _optional(file: TaskFile, folder: Path, split: str) -> Questions | None:
    try:
        path = find_split(folder, file, split)
    except FileError:
        return None
    return file.read(path)


def with_agreement_and_warnings(results: Results, cells: Sequence[CellResult]) -> Results:
    """Return the results with the agreement of development and reported scores, and the warnings of trainings.

    Scores are shares of rows answered correctly. Each task's means are subtracted before the correlation, because that
    some tasks are easier than others is not agreement.
    """
    chosen = [
        ChosenSetting(**vars(one.cell), dev=one.dev_score, test=one.hits)
        for one in cells
        if one.dev_score is not None and one.hits is not None
    ]
    rows: dict[str, list[tuple[float, float]]] = {}
    for choice in chosen:
        rows.setdefault(choice.task, []).append((choice.dev, choice.test))
    centred = []
    for pairs in rows.values():
        means = [sum(side) / len(pairs) for side in zip(*pairs, strict=True)]
        centred += [(dev - means[0], test - means[1]) for dev, test in pairs]
    gaps = [dev - test for pairs in rows.values() for dev, test in pairs]
    return replace(
        results,
        agreement=Agreement(
            chosen,
            correlation=correlation(centred) if len(centred) > len(rows) else None,
            mean_gap=sum(gaps) / len(gaps) if gaps else None,
        ),
        warnings=[TrainingWarning(**vars(one.cell), text=text) for one in cells for text in one.warnings],
    )
