"""The paper's second experiment: SuperGLUE, with all of its training data or with a few examples. Folders -> tasks,
with nothing of the validation part in what a method sees.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig, Tune, listed_names
from ptuning.data.questions import Questions
from ptuning.data.splits import draw_few, draw_questions, split_questions
from ptuning.data.task_files import TaskFile, find_split, load_task
from ptuning.errors import ConfigError, FileError
from ptuning.experiment.cells import Job
from ptuning.experiment.plan import Plan, Watch, run_jobs
from ptuning.experiment.results import Results
from ptuning.experiment.superglue_server import SERVER_FOLDER, write_server_files
from ptuning.files import Json
from ptuning.method.base import METHODS, Task
from ptuning.names import ALL_METHODS, LEARNED, LEARNED_BY_TUNE
from ptuning.provenance import about_data
from ptuning.statistics import correlation

logger = logging.getLogger(__name__)

SUITE = "superglue"
TASKS = ("BoolQ", "CB", "COPA", "MultiRC", "ReCoRD", "RTE", "WiC", "WSC")
# A task that is closed anyway is asked the same with manual-restricted as with manual.
LEFT_OUT = ("manual-restricted",)
SUPERGLUE_METHODS = ("majority", "manual", "in-context", "fine-tuning", "manual+fine-tuning", LEARNED)
SEEDS = 3


def superglue(
    data: str | Path,
    *,
    backbone: Backbone,
    out: str | Path,
    tasks: Sequence[str] | str = "all",
    methods: Sequence[str] | str = SUPERGLUE_METHODS,
    few_shot: int | None = None,
    pattern: int = 1,
    limit: int | None = None,
    tune: Tune = "frozen",
    server: bool = True,
    seeds: int = SEEDS,
    tries: int = 1,
    control: bool = False,
    config: TrainConfig | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    command: str | None = None,
    watch: Watch | None = None,
) -> Results:
    """Run the paper's SuperGLUE experiment. Finished cells of an earlier start are not run again.

    A folder with a development part (FewGLUE's ``dev32``) is taken as it is; without one a seeded share of the training
    part is set aside to choose by. The validation part is what is reported and chooses nothing; a task that has none is
    reported on its development part, and chooses by a share of its training part.

    Args:
        data: The folder that holds a folder per task, as SuperGLUE and FewGLUE come.
        backbone: The frozen backbone.
        out: Folder of the results.
        tasks: Names of shipped tasks, paths of task files, or ``all`` of SuperGLUE's that are there.
        methods: Names of :data:`ptuning.methods`, or ``all``.
        few_shot: Learn from so many examples, and choose by as many others; each seed draws its own.
        pattern: Which of a task's patterns is used, from 1; none is chosen by its score.
        limit: Report on so many rows at most: a seeded draw.
        tune: What ``p-tuning`` trains besides the prompt: ``frozen`` nothing, ``tuned`` all weights, ``lora`` adapters.
        server: Whether the test split is answered where it is there, and files for the server are written.
        seeds: How many seeds.
        tries: How many settings each trained method tries.
        control: Whether each trained method also runs on a backbone with random weights.
        config: Settings of training.
        overwrite: Replace results made with other settings.
        dry_run: Estimate the time, and run nothing.
        command: The command line, for the record.
        watch: Who is told how far it is.

    Returns:
        All scores; the files lie in ``out``.

    Raises:
        PTuningError: Before anything is run, if the data or the settings cannot be used.

    Source: Liu et al. (2021), section 4.2; Schick and Schuetze (2021), arXiv:2009.07118, for the few-shot setting.
    """
    config = config or TrainConfig()
    plan = Plan(
        *(Path(out), backbone, chosen_methods(methods, tune=tune), seeds, tries, control, config),
        *(overwrite, dry_run, command, watch or Watch()),
    )
    for name, value in (("few_shot", few_shot), ("limit", limit)):
        if value is not None and value < 2:
            raise ConfigError(f"{name} is {value}; it must be 2 or more")
    files = asked_tasks(Path(data), tasks)
    numbers = range(config.seed, config.seed + seeds)
    jobs = [
        task_job(
            file,
            Path(data),
            few_shot=few_shot,
            pattern=pattern,
            limit=limit,
            server=server,
            seeds=numbers,
            dev_fraction=config.dev_fraction,
        )
        for file in files
    ]
    settings: dict[str, Json] = {
        "data": str(data),
        "few_shot": few_shot,
        "pattern": pattern,
        "limit": limit,
        "tune of p-tuning": tune,
    }
    results = run_jobs(SUITE, jobs, plan=plan, settings=settings, more=what_else)
    if overwrite and not dry_run:
        shutil.rmtree(results.folder / SERVER_FOLDER, ignore_errors=True)  # of answers that are no longer there
    if server and not dry_run:
        write_server_files(results, [job for job in jobs if job.task.name in TASKS], is_draw=limit is not None)
    return results


def chosen_methods(methods: Sequence[str] | str, *, tune: Tune) -> list[str]:
    """Return names of methods, with p-tuning as it is called where more than the prompt is trained.

    Raises:
        ConfigError: If the mode is unknown or cannot be used here.
    """
    if tune not in LEARNED_BY_TUNE:
        raise ConfigError(f"tune is '{tune}'; it must be one of {', '.join(LEARNED_BY_TUNE)}")
    asked = listed_names(methods)
    if asked == [ALL_METHODS]:
        return [name for name in METHODS if name not in LEFT_OUT]
    return [LEARNED_BY_TUNE[tune] + name.removeprefix(LEARNED) if _is_learned(name) else name for name in asked]


def _is_learned(name: str) -> bool:
    return name.partition("@")[0] == LEARNED


def asked_tasks(data: Path, tasks: Sequence[str] | str) -> list[TaskFile]:
    """Return the tasks of that name; with ``all`` those of SuperGLUE that have a folder.

    Raises:
        FileError: If a task is unknown, or there is none.
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
    server: bool = True,
    dev_fraction: float = 0.2,
) -> Job:
    """Return a task with the parts that its folder has.

    Args:
        file: The task.
        folder: Of its data, or of the folder that holds it.
        seeds: Of the cells; the first one's draws are those of whatever is the same for all.
        few_shot: Learn from so many examples, and choose by as many others.
        pattern: Which of the patterns is used, from 1.
        limit: Report on so many rows at most.
        server: Whether the test split is answered as well.
        dev_fraction: Share of the training part set aside where there is no part to choose by.

    Raises:
        FileError: If there is no training part, or nothing to report on.
        RecordError: If a row cannot be read, or there are too few to draw from.
    """
    if not 1 <= pattern <= len(file.manual):
        raise ConfigError(f"pattern is {pattern}, and the task {file.name} has {len(file.manual)}; give 1 or more")
    train = file.read(find_split(folder, file, "train"))
    dev, val = _optional(file, folder, "dev"), _optional(file, folder, "val")
    if val is None and dev is None:
        find_split(folder, file, "val")  # which says what was looked for
    reported = val if val is not None else cast("Questions", dev)
    to_choose = dev if val is not None else None
    where = "validation part" if val is not None else "development part, since there is no validation part"
    by_seed: dict[int, tuple[Questions, Questions]] = {}
    if few_shot is not None:
        pool = Questions([*train, *(to_choose or [])], name=train.name)
        labels = file.label_words.labels if file.label_words is not None else ()
        by_seed = {seed: draw_few(pool, few_shot, labels, seed=seed) for seed in seeds}
        how = f"{few_shot} examples to learn from and {few_shot} to choose by, drawn anew by each seed"
        train, to_choose = by_seed[seeds[0]]
    elif to_choose is not None:
        how = "training and development part as given"
    else:
        train, to_choose = split_questions(train, fraction=dev_fraction, seed=seeds[0])
        how = f"{dev_fraction:.0%} of the training part set aside to choose by, seed {seeds[0]}"
    test = draw_questions(reported, limit, seed=0)
    how += f"; reported on the {where}" + (f", {len(test)} of {len(reported)} rows" if limit is not None else "")
    if val is None:
        logger.warning("%s has no validation part: reported on the development part", file.name)
    parts = {"train": train, "dev": to_choose, "test": test}
    unlabelled = _optional(file, folder, "test", labelled=False) if server and limit is None else None
    if unlabelled is not None:
        parts["unlabelled"] = unlabelled
    made = {seed: _task(file, *drawn, pattern=pattern) for seed, drawn in by_seed.items()}
    task = made[seeds[0]] if made else _task(file, train, to_choose, pattern=pattern)
    about: dict[str, Json] = {part: about_data(rows, kept=len(rows)) for part, rows in parts.items()}
    info: dict[str, Json] = {
        "manual": str(task.manual),
        "template": str(task.template),
        "data": about,
        "label": None,
        "type": None,
        "rows": sum(map(len, parts.values())),
        "dropped": {},
        "split": how,
        "metrics": list(file.metrics),
        "version": file.version,
        "reported": "val" if val is not None else "dev",
    }
    return Job(task, test, info, by_seed=made, unlabelled=unlabelled)


def _task(file: TaskFile, train: Questions, dev: Questions, *, pattern: int) -> Task:
    labels = file.label_words.labels if file.label_words is not None else ()
    return Task(file.name, train, dev, file.manual[pattern - 1], file.learned[pattern - 1], labels, file=file)


def _optional(file: TaskFile, folder: Path, split: str, *, labelled: bool = True) -> Questions | None:
    try:
        path = find_split(folder, file, split)
    except FileError:
        return None
    return file.read(path, labelled=labelled)


def what_else(results: Results) -> dict[str, Json]:
    """Return what ``results.json`` holds of this suite only: how far the development score says what the reported one
    will be, and what went on in training that a reader should know.

    Both are shares of rows answered rightly, whatever the task's metrics are. The correlation is over all cells in
    which something was chosen, each task's means taken off: that some tasks are easier than others is no agreement.
    """
    chosen = [one for one in results.cells if one.dev_score is not None and one.hits is not None]
    rows: dict[str, list[tuple[float, float]]] = {}
    for one in chosen:
        rows.setdefault(one.cell.task, []).append((cast("float", one.dev_score), cast("float", one.hits)))
    centred = []
    for pairs in rows.values():
        means = [sum(side) / len(pairs) for side in zip(*pairs, strict=True)]
        centred += [(dev - means[0], test - means[1]) for dev, test in pairs]
    gaps = [dev - test for pairs in rows.values() for dev, test in pairs]
    return {
        "agreement": {
            "cells": [
                {
                    "task": one.cell.task,
                    "method": one.cell.method,
                    "seed": one.cell.seed,
                    "dev": one.dev_score,
                    "test": one.hits,
                }
                for one in chosen
            ],
            "correlation": correlation(centred) if len(centred) > len(rows) else None,
            "mean_gap": sum(gaps) / len(gaps) if gaps else None,
        },
        "warnings": [
            {"task": one.cell.task, "method": one.cell.method, "seed": one.cell.seed, "text": text}
            for one in results.cells
            for text in one.warnings
        ],
    }
