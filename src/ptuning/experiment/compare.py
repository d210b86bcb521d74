"""The paper's comparison of methods, on a user's own data and on LAMA: data -> tasks, with nothing of the test part in
what a method sees.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig, listed_names
from ptuning.data.questions import as_questions
from ptuning.data.relations import Relation, read_relations
from ptuning.data.splits import draw_records, split_records, split_relation
from ptuning.data.word_lists import read_vocabulary
from ptuning.errors import ConfigError, RecordError, TemplateError
from ptuning.experiment.cells import Job
from ptuning.experiment.lama import Listed, OneToken
from ptuning.experiment.plan import DEFAULT_METHODS, Plan, Watch, run_jobs
from ptuning.experiment.results import Results
from ptuning.files import Json
from ptuning.method.base import Task
from ptuning.method.tuned import bare
from ptuning.prompt.prompt import as_template
from ptuning.provenance import about_data
from ptuning.records import TARGET_FIELD, Record, Records, as_records, require_targets
from ptuning.template.language import Field, Template

logger = logging.getLogger(__name__)

OBJECTS = "objects"
Targets = Literal["token", "any"]


def compare(
    data: Sequence[Record],
    *,
    test: Sequence[Record],
    manual: str | Template,
    backbone: Backbone,
    out: str | Path,
    template: str | Template | None = None,
    dev: Sequence[Record] | None = None,
    vocabulary: str | Path | None = None,
    train_size: int | None = None,
    methods: Sequence[str] | str = DEFAULT_METHODS,
    seeds: int = 1,
    tries: int = 1,
    control: bool = False,
    config: TrainConfig | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    command: str | None = None,
    name: str = "task",
    watch: Watch | None = None,
) -> Results:
    """Compare methods on one's own data. Finished cells of an earlier start are not run again.

    Args:
        data: Records to learn from.
        test: Records to report on; nothing about them chooses anything.
        manual: A manual template.
        backbone: The frozen backbone.
        out: Folder of the results.
        template: The template to learn; by default made of the manual one.
        dev: Records to choose by; without them a seeded share of ``data`` is set aside.
        vocabulary: A closed set of answers: ``objects`` (all targets of the data), or a file of them.
        train_size: Learn from a seeded draw of so many records.
        methods: Names of :data:`ptuning.methods`, or ``all``.
        seeds: How many seeds.
        tries: How many settings each trained method tries.
        control: Whether each trained method also runs on a backbone with random weights.
        config: Settings of training.
        overwrite: Replace results made with other settings.
        dry_run: Estimate the time, and run nothing.
        command: The command line, for the record.
        name: Name of the task.
        watch: Who is told how far it is.

    Returns:
        All scores; the files lie in ``out``.

    Raises:
        PTuningError: Before anything is run, if the data or the settings cannot be used.
    """
    config = config or TrainConfig()
    plan = Plan(
        Path(out), backbone, methods, seeds, tries, control, config, overwrite, dry_run, command, watch or Watch()
    )
    parts = {"train": as_records(data), "test": as_records(test)}
    if dev is not None:
        parts["dev"] = as_records(dev)
    for part, rows in parts.items():
        if not rows:
            raise RecordError(f"the {part} data ({rows.name}) holds no records")
        require_targets(rows)
    how = "the parts given"
    if dev is None:
        parts["train"], parts["dev"] = split_records(parts["train"], fraction=config.dev_fraction, seed=config.seed)
        how = f"{config.dev_fraction:.0%} of the training part set aside to choose by, seed {config.seed}"
    parts["train"] = draw_records(parts["train"], train_size, seed=config.seed)
    pair = _templates(as_template(manual), template)
    one_token = OneToken(backbone, [*pair, bare(pair[0])])
    single = all(all(one_token(rows)) for rows in parts.values())
    info: dict[str, Json] = {"label": None, "type": None, "rows": sum(map(len, parts.values())), "dropped": {}}
    words = None if vocabulary in (None, OBJECTS) else read_vocabulary(Path(str(vocabulary)))
    for part, rows in parts.items() if words is not None else ():
        missing = Listed(words or ())(rows).count(False)
        if missing:
            logger.warning("%d of %d %s targets are not in %s: never right", missing, len(rows), part, vocabulary)
    job = _job(name, parts, pair, closed=words, vocabulary=vocabulary, single=single, info={**info, "split": how})
    settings: dict[str, Json] = {"vocabulary": str(vocabulary) if vocabulary else None, "train_size": train_size}
    return run_jobs("compare", [job], plan=plan, settings=settings)


def lama(
    data: str | Path,
    *,
    backbone: Backbone,
    out: str | Path,
    relations: Sequence[str] | str = "all",
    template: str | Template | None = None,
    limit: int | None = None,
    train_size: int | None = None,
    targets: Targets = "token",
    vocabulary: str | Path | None = None,
    split_seed: int = 0,
    methods: Sequence[str] | str = DEFAULT_METHODS,
    seeds: int = 1,
    tries: int = 1,
    control: bool = False,
    config: TrainConfig | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    command: str | None = None,
    watch: Watch | None = None,
) -> Results:
    """Run the paper's LAMA experiment. Finished cells of an earlier start are not run again.

    Args:
        data: A folder in one of the layouts of :func:`ptuning.data.relations.read_relations`.
        backbone: The frozen backbone.
        out: Folder of the results.
        relations: Names (``P36``), types (``1-1``, ``N-1``, ``N-M``), or ``all``.
        template: The template to learn; by default made of each relation's manual one and its label.
        limit: At most so many facts of a relation.
        train_size: Learn from a seeded draw of so many facts of the training part.
        targets: ``token`` keeps facts whose object is one token of the backbone, as LAMA does; ``any`` keeps all.
        vocabulary: A closed set of answers: ``objects`` of the relation, or a file of them (LAMA-29k, LAMA-34k).
        split_seed: Of the split of relations that come in one file.
        methods: Names of :data:`ptuning.methods`, or ``all``.
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

    Source: Liu et al. (2021), section 4.1; Petroni et al. (2019), section 4.
    """
    plan = Plan(
        *(Path(out), backbone, methods, seeds, tries, control, config or TrainConfig()),
        *(overwrite, dry_run, command, watch or Watch()),
    )
    if targets not in get_args(Targets):
        raise ConfigError(f"targets is '{targets}'; it must be {' or '.join(get_args(Targets))}")
    learned = as_template(template) if template is not None else None
    words = None if vocabulary in (None, OBJECTS) else read_vocabulary(Path(str(vocabulary)))
    jobs = []
    for relation in read_relations(data, which=listed_names(relations)):
        if relation.template is None:
            raise TemplateError(
                f"{relation.name} has no manual template ({relation.source}); leave it out with --relations"
            )
        parsed = Template.parse(relation.template)
        # Words in front of the subject say already what is asked for.
        about = relation.label if isinstance(parsed.pieces[0], Field) else None
        pair = _templates(parsed, learned, about=about)
        found = relation_job(
            relation,
            pair,
            backbone=backbone,
            name=relation.name,
            limit=limit,
            train_size=train_size,
            targets=targets,
            vocabulary=vocabulary,
            words=words,
            seed=split_seed,
        )
        jobs.append(found)
    settings: dict[str, Json] = {
        "data": str(data),
        "template": str(learned) if learned is not None else "made of the manual template and the relation's label",
        "limit": limit,
        "train_size": train_size,
        "targets": targets,
        "vocabulary": str(vocabulary) if vocabulary else None,
        "split_seed": split_seed,
    }
    return run_jobs("lama", jobs, plan=plan, settings=settings)


def relation_job(
    relation: Relation,
    pair: tuple[Template, Template],
    *,
    backbone: Backbone,
    name: str,
    limit: int | None = None,
    train_size: int | None = None,
    targets: Targets = "token",
    vocabulary: str | Path | None = None,
    words: Sequence[str] | None = None,
    seed: int = 0,
    templates: Sequence[Template] = (),
) -> Job:
    """Return a relation as a task: its facts filtered and split.

    Args:
        relation: The relation.
        pair: Its manual template and the one to learn.
        backbone: Whose tokens are meant.
        name: Name of the task.
        limit: At most so many facts.
        train_size: Learn from a seeded draw of so many of them.
        targets: ``token`` or ``any``.
        vocabulary: A closed set of answers: ``objects``, or a file.
        words: The words of ``vocabulary``, where that is a file.
        seed: Of the split.
        templates: Further templates in which an object must be one token, so that tasks over the same relation have
            the same facts.

    Raises:
        RecordError: If a part has no facts left.
    """
    keeps: OneToken | Listed | None = None
    reason = "object is not one token"
    if targets == "token":
        keeps = OneToken(backbone, [*pair, bare(pair[0]), *templates], words=words)
        reason += " of the vocabulary" if words else ""
    elif words is not None:
        keeps, reason = Listed(words), "object is not in the vocabulary"
    split = split_relation(relation, keeps=keeps, reason=reason, seed=seed, limit=limit)
    parts = {"train": draw_records(split.train, train_size, seed=seed), "dev": split.dev, "test": split.test}
    info: dict[str, Json] = {
        "label": relation.label,
        "type": relation.type,
        "rows": split.rows,
        "dropped": dict(split.dropped),
        "split": split.how,
    }
    return _job(name, parts, pair, closed=words, vocabulary=vocabulary, single=targets == "token", info=info)


def _job(
    name: str,
    parts: Mapping[str, Records],
    pair: tuple[Template, Template],
    *,
    closed: Sequence[str] | None,
    vocabulary: str | Path | None,
    single: bool,
    info: Mapping[str, Json],
) -> Job:
    objects = tuple(sorted({row[TARGET_FIELD].strip() for rows in parts.values() for row in rows}))
    if vocabulary == OBJECTS:
        closed = objects
    task = Task(
        name,
        as_questions(parts["train"]),
        as_questions(parts["dev"]),
        *pair,
        objects,
        tuple(closed) if closed is not None else None,
        single_token=single,
    )
    data: dict[str, Json] = {part: about_data(rows, kept=len(rows)) for part, rows in parts.items()}
    written: dict[str, Json] = {"manual": str(pair[0]), "template": str(pair[1]), "data": data}
    kind = info.get("type")
    return Job(task, as_questions(parts["test"]), {**written, **info}, kind if isinstance(kind, str) else None)


def _templates(
    manual: Template, template: str | Template | None, *, about: str | None = None
) -> tuple[Template, Template]:
    """Return the manual template and the one to learn, made of it where none is given."""
    if manual.has_slots:
        raise TemplateError(f"the manual template '{manual}' has slots; give it as the template to learn (--template)")
    learned = as_template(template) if template is not None else Template.from_manual(str(manual), about=about)
    if not learned.has_slots:
        raise TemplateError(f"the template '{learned}' has no slots, so there is nothing to learn; write [P:words]")
    return manual, learned
