"""The paper's LAMA experiment: each relation is a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from typing_extensions import Unpack

from ptuning.backbone.backbone import Backbone
from ptuning.config import listed_names
from ptuning.data.lama import Keeps, Relation, read_relations, split_relation
from ptuning.data.splits import draw_records
from ptuning.errors import ConfigError, TemplateError
from ptuning.experiment.cells import CellJob
from ptuning.experiment.jobs import OneToken, Vocabulary, are_listed, fact_job, read_vocabulary, template_pair
from ptuning.experiment.plan import Plan, PlanOptions, run_jobs
from ptuning.files import Json
from ptuning.method.registry import METHODS
from ptuning.method.tuned import bare
from ptuning.prompt.prompt import as_template
from ptuning.report.results_file import Results
from ptuning.template.language import Field, Template

Targets = Literal["token", "any"]
UNWRITTEN = "[P*3] [X] [P*3] [Y]"  # to learn, where nothing is written: the paper's


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
    **options: Unpack[PlanOptions],
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
        **options: ``out``, ``backbone``, ``methods`` and the others of :class:`ptuning.experiment.plan.Plan`.

    Returns all scores; the files are in ``out``. A PTuningError if the data or the settings cannot be used; nothing
    has been run then.

    Source: Liu et al. (2021), section 4.1; Petroni et al. (2019), section 4.
    """
    plan = Plan.of("lama", **options)
    learned = as_template(template) if template is not None else None
    closed = read_vocabulary(vocabulary)
    found = read_relations(data, which=listed_names(relations), fields=fields)
    written = as_template(manual) if manual is not None else None
    if written is not None and all(relation.template is not None for relation in found):
        names = ", ".join(relation.name for relation in found[:5])
        raise ConfigError(f"a manual template is given for relations without one, and each of {names} has its own")
    jobs = [
        relation_job(
            relation,
            _pair(relation, written, learned, methods=plan.method_names),
            backbone=plan.backbone,
            name=relation.name,
            limit=limit,
            train_size=train_size,
            targets=targets,
            vocabulary=closed,
            seed=split_seed,
        )
        for relation in found
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
    return run_jobs(jobs, plan=plan, settings=settings)


def _pair(
    relation: Relation, written: Template | None, learned: Template | None, *, methods: Sequence[str]
) -> tuple[Template | None, Template]:
    """Return a relation's manual template, if it has one, and the template to learn. Without the former a TemplateError
    names the ``methods`` that read it.
    """
    if relation.template is None and written is None:
        of = [METHODS.find(name) for name in methods]
        readers = [one.name for one in of if one.reads_manual or (learned is None and one.learns_slots)]
        if readers:
            raise TemplateError(
                f"{relation.name} has no manual template ({relation.source}), and {', '.join(readers)} "
                f'{"needs" if len(readers) == 1 else "need"} one. Give it with --manual "The ... of [X] is [Y]"; or in '
                "relations.jsonl beside the facts, as "
                f'{{"relation": "{relation.name}", "template": "[X] ... [Y]"}}; or leave out these methods (--methods)'
                + (", or give the template to learn (--template)" if learned is None else "")
            )
        return None, learned or Template.parse(UNWRITTEN)
    manual = Template.parse(relation.template) if relation.template is not None else written
    assert manual is not None
    # The label is added only if the template starts with the subject; words in front of it already say what is asked.
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
    vocabulary: Vocabulary = None,
    seed: int = 0,
    templates: Sequence[Template] = (),
) -> CellJob:
    """Return the job of a relation, with its facts filtered and split. The arguments are those of :func:`lama`.

    Objects must also be one token in each of ``templates``, so that several tasks over a relation have the same facts.
    A ConfigError if ``targets`` is neither; a RecordError if a part has no facts left.
    """
    if targets not in get_args(Targets):
        raise ConfigError(f"targets is '{targets}'; it must be {' or '.join(get_args(Targets))}")
    words = vocabulary if isinstance(vocabulary, tuple) else None
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
    single = targets == "token"
    return fact_job(name, parts, pair, vocabulary=vocabulary, single_token=single, info=info)
