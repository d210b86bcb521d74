"""The paper's experiments as suites of comparisons: LAMA (each relation is a task) and SuperGLUE (with all training
data, or with a few examples).
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from ptuning.backbone.backbone import Backbone
from ptuning.config import listed_names
from ptuning.data.lama import Keeps, Relation, read_relations, split_relation
from ptuning.data.questions import Questions
from ptuning.data.splits import draw_few, draw_questions, draw_records, split_questions
from ptuning.data.task_files import TaskFile, find_split, load_task
from ptuning.errors import ConfigError, FileError, TemplateError
from ptuning.experiment.cells import CellJob, CellResult
from ptuning.experiment.compare import OneToken, are_listed, read_vocabulary, template_pair, unrestricted_methods
from ptuning.experiment.comparison import Comparison
from ptuning.files import Json
from ptuning.method.base import Method
from ptuning.method.tuned import bare
from ptuning.prompt.prompt import as_template
from ptuning.report.results_file import Agreement, ChosenSetting, Results, TrainingWarning
from ptuning.statistics import correlation
from ptuning.template.language import Field, Template

logger = logging.getLogger(__name__)

Targets = Literal["token", "any"]
PAPER_TEMPLATE = "[P*3] [X] [P*3] [Y]"  # to learn, for relations without a manual template
SUPERGLUE = "superglue"
SUPERGLUE_TASKS = ("BoolQ", "CB", "COPA", "MultiRC", "ReCoRD", "RTE", "WiC", "WSC")
SUPERGLUE_SEEDS = 3


def lama(
    data: str | Path,
    *,
    relations: Sequence[str] | str = "all",
    manual: str | Template | None = None,
    template: str | Template | None = None,
    limit: int | None = None,
    train_size: int | None = None,
    targets: Targets = "token",
    vocabulary: str | Path | None = None,
    split_seed: int = 0,
    fields: Mapping[str, str] | None = None,
    **options: Any,
) -> Results:
    """Run the paper's LAMA experiment. Finished cells of an earlier run are not run again.

    Args:
        data: A folder or a file in one of the layouts of :mod:`ptuning.data.lama`.
        relations: Names (``P36``), types (``1-1``, ``N-1``, ``N-M``), or ``all``.
        manual: A manual template for relations without one.
        template: The template to learn; by default made from each relation's manual one and its label.
        limit: Maximum number of facts per relation.
        train_size: Learn from a seeded draw of this many facts of the training part.
        targets: ``token`` keeps facts whose object is one token of the backbone, as LAMA does; ``any`` keeps all.
        vocabulary: A closed set of answers: ``objects`` of the relation, or a file (LAMA-29k, LAMA-34k).
        split_seed: Seed of the split of relations that come in one file.
        fields: New names of fields -> those in the files of facts, such as ``{"sub_label": "subject"}``.
        **options: ``out``, ``backbone``, ``methods`` and the others of
            :class:`ptuning.experiment.comparison.Comparison`.

    Returns all scores; the files are in ``out``. A PTuningError if the data or the settings cannot be used; nothing
    has been run then.

    Source: Liu et al. (2021), section 4.1; Petroni et al. (2019), section 4.
    """
    comparison = Comparison.of("lama", **options)
    learned = as_template(template) if template is not None else None
    written = as_template(manual) if manual is not None else None
    words = read_vocabulary(vocabulary)
    chosen = read_relations(data, which=listed_names(relations), fields=fields)
    if written is not None and all(relation.template is not None for relation in chosen):
        names = ", ".join(relation.name for relation in chosen[:5])
        raise ConfigError(f"a manual template is given for relations without one, and each of {names} has its own")
    jobs = [
        relation_job(
            relation,
            _pair(relation, written, learned, comparison.chosen.values()),
            backbone=comparison.backbone,
            name=relation.name,
            limit=limit,
            train_size=train_size,
            targets=targets,
            vocabulary=words,
            seed=split_seed,
        )
        for relation in chosen
    ]
    settings: dict[str, Json] = {
        "data": str(data),
        "fields": dict(fields or {}) or None,
        "manual": str(written) if written is not None else None,
        "template": str(learned) if learned is not None else "made of the manual template and the relation's label",
        "limit": limit,
        "train_size": train_size,
        "targets": targets,
        "vocabulary": str(vocabulary) if vocabulary else None,
        "split_seed": split_seed,
    }
    return comparison.run(jobs, settings=settings)


def _pair(
    relation: Relation, written: Template | None, learned: Template | None, methods: Iterable[Method]
) -> tuple[Template | None, Template]:
    """Return a relation's manual template, if it has one, and the template to learn. Without the former a TemplateError
    names the ``methods`` that need it.
    """
    manual = Template.parse(relation.template) if relation.template is not None else written
    if manual is None:
        needy = [m.name for m in methods if m.reads_manual or (learned is None and m.learns_slots)]
        if needy:
            raise TemplateError(
                f"{relation.name} has no manual template ({relation.source}), and {', '.join(needy)} "
                f'{"needs" if len(needy) == 1 else "need"} one. Give it as manual, as "The ... of [X] is [Y]"; or in '
                "relations.jsonl next to the facts, as "
                f'{{"relation": "{relation.name}", "template": "[X] ... [Y]"}}; or leave out these methods (methods)'
                + (", or give the template to learn" if learned is None else "")
            )
        return None, learned or Template.parse(PAPER_TEMPLATE)
    # The label is added only if the template starts with the subject; words before it already name the relation.
    about = relation.label if isinstance(manual.pieces[0], Field) else None
    return template_pair(manual, learned, about=about)


def relation_job(
    relation: Relation,
    pair: tuple[Template | None, Template],
    *,
    backbone: Backbone,
    name: str,
    limit: int | None = None,
    train_size: int | None = None,
    targets: Targets = "token",
    vocabulary: Sequence[str] | str | None = None,
    seed: int = 0,
    templates: Sequence[Template] = (),
) -> CellJob:
    """Return the job of a relation, with its facts filtered and split. The arguments are those of :func:`lama`.

    Objects must also be one token in each of ``templates``, so that several tasks over a relation have the same facts.
    A ConfigError if ``targets`` is neither; a RecordError if a part has no facts left.
    """
    if targets not in get_args(Targets):
        raise ConfigError(f"targets is '{targets}'; it must be {' or '.join(get_args(Targets))}")
    words = None if isinstance(vocabulary, str) else vocabulary
    keeps: Keeps | None = None
    reason = "object is not one token"
    if targets == "token":
        every = [pair[1], bare(pair[0] or pair[1]), *([pair[0]] if pair[0] is not None else []), *templates]
        keeps = OneToken(backbone, every, words=words)
        reason += " of the vocabulary" if words else ""
    elif words is not None:
        keeps, reason = partial(are_listed, words=words), "object is not in the vocabulary"
    split = split_relation(relation, keeps=keeps, reason=reason, seed=seed, limit=limit)
    parts = {"train": draw_records(split.train, train_size, seed=seed), "dev": split.dev, "test": split.test}
    info: dict[str, Json] = {
        "relation": relation.name,
        "label": relation.label,
        "type": relation.type,
        "rows": split.rows,
        "dropped": dict(split.dropped),
        "split": split.how,
    }
    return CellJob.of(name, parts, pair, info=info, vocabulary=vocabulary, single_token=targets == "token")


def superglue(
    data: str | Path,
    *,
    tasks: Sequence[str] | str = "all",
    few_shot: int | None = None,
    pattern: int = 1,
    limit: int | None = None,
    **options: Any,
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
        **options: ``out``, ``backbone`` and the others of :class:`ptuning.experiment.comparison.Comparison`. The
            default of ``seeds`` is 3 here.

    Returns all scores; the files are in ``out``. A PTuningError if the data or the settings cannot be used; nothing
    has been run then.

    Source: Liu et al. (2021), section 4.2; Schick and Schuetze (2021), arXiv:2009.07118, for the few-shot setting.
    """
    options["seeds"] = options.get("seeds") or SUPERGLUE_SEEDS
    options["methods"] = unrestricted_methods(options.get("methods"), SUPERGLUE)
    comparison = Comparison.of(SUPERGLUE, **options)
    counts = {"few_shot": few_shot, "pattern": pattern, "limit": limit}
    for name, value in counts.items():
        if name != "pattern" and value is not None and value < 2:
            raise ConfigError(f"{name} is {value}; it must be 2 or more")
    seed = comparison.config.seed
    jobs = [
        task_job(
            file,
            Path(data),
            few_shot=few_shot,
            pattern=pattern,
            limit=limit,
            seeds=range(seed, seed + comparison.seeds),
            dev_fraction=comparison.config.dev_fraction,
        )
        for file in superglue_tasks(Path(data), tasks)
    ]
    return comparison.run(jobs, settings={"data": str(data), **counts}, more=with_agreement_and_warnings)


def superglue_tasks(data: Path, tasks: Sequence[str] | str) -> list[TaskFile]:
    """Return the named tasks; ``all`` means the SuperGLUE tasks that have a folder.

    A FileError if a task is unknown, or no task has a folder; a ConfigError if no task is named, or two task files have
    the same name.
    """
    names = listed_names(tasks)
    if not names:
        raise ConfigError(f"there are no tasks to run; known: all, {', '.join(SUPERGLUE_TASKS)}")
    if names != ["all"]:
        files = {file.text: file for file in map(load_task, names)}  # a task named twice runs once
        doubled = [name for name, count in Counter(file.name for file in files.values()).items() if count > 1]
        if doubled:
            raise ConfigError(f"two task files have the name {doubled[0]}; it becomes a folder, so give each its own")
        return list(files.values())
    if not data.is_dir():
        raise FileError(f"no such data folder: {data}; give the folder that holds BoolQ, CB and the others")
    there = {entry.name.lower() for entry in data.iterdir() if entry.is_dir()}
    listed = [load_task(name) for name in SUPERGLUE_TASKS if name.lower() in there]
    if not listed:
        raise FileError(
            f"{data} holds no folder of a SuperGLUE task; it must hold some of {', '.join(SUPERGLUE_TASKS)}"
        )
    return listed


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
    dev, val = (_optional(file, folder, part) for part in ("dev", "val"))
    reported, where = val, "validation part"
    if val is None:
        # Without both, this raises an error that names the files.
        reported, where = (
            dev or file.read(find_split(folder, file, "val")),
            "development part, since there is no validation part",
        )
        dev = None
        logger.warning("%s has no validation part: reported on the development part", file.name)
    assert reported is not None
    first = seeds[0]
    if few_shot is not None:
        pool = Questions([*train, *(dev or [])], name=train.name)
        how = f"{few_shot} examples to learn from and {few_shot} to choose by, drawn anew by each seed"
        drawn = {seed: draw_few(pool, few_shot, file.answer_space.labels, seed=seed) for seed in seeds}
    elif dev is not None:
        drawn, how = {first: (train, dev)}, "training and development part as given"
    else:
        how = f"{dev_fraction:.0%} of the training part set aside to choose by, seed {first}"
        drawn = {first: split_questions(train, fraction=dev_fraction, seed=first)}
    test = draw_questions(reported, limit, seed=0)
    how += f"; reported on the {where}" + (f", {len(test)} of {len(reported)} rows" if limit is not None else "")
    labels = file.answer_space.labels
    parts = dict(zip(("train", "dev"), drawn[first], strict=True)) | {"test": test}
    info: dict[str, Json] = {
        "label": None,
        "type": None,
        "rows": sum(map(len, parts.values())),
        "dropped": {},
        "split": how,
        "labels": list(labels) or None,
        "metrics": list(file.metrics),
        "version": file.version,
        "benchmark": SUPERGLUE if file.name in SUPERGLUE_TASKS else None,
        "reported": "val" if val is not None else "dev",
    }
    pair = (file.manual[pattern - 1], file.learned[pattern - 1])
    job = CellJob.of(file.name, parts, pair, info=info, file=file)
    job = replace(job, task=replace(job.task, objects=labels))
    by_seed = {seed: replace(job.task, train=train, dev=dev) for seed, (train, dev) in drawn.items()}
    return replace(job, by_seed=by_seed if few_shot is not None else {})


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
        ChosenSetting(**vars(result.cell), dev=result.dev_score, test=result.hits)
        for result in cells
        if result.dev_score is not None and result.hits is not None
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
        warnings=[TrainingWarning(**vars(result.cell), text=text) for result in cells for text in result.warnings],
    )
