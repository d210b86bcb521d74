"""How much the wording of a prompt matters: each wording of a relation as it is, and after learning from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from typing_extensions import Unpack

from ptuning.backbone.backbone import Backbone
from ptuning.config import listed_names
from ptuning.data.layouts import PATTERN_FOLDERS
from ptuning.data.relations import Relation, read_relations
from ptuning.errors import RecordError
from ptuning.experiment.cells import CellJob, CellResult
from ptuning.experiment.lama import relation_job
from ptuning.experiment.plan import Plan, PlanOptions, run_jobs
from ptuning.files import Json
from ptuning.metrics import primary
from ptuning.report.results_file import RelationWordings, Results, Wording, WordingSpread
from ptuning.template.language import Field, Target, Template

logger = logging.getLogger(__name__)


def paraphrases(
    data: str | Path,
    *,
    relations: Sequence[str] | str = "all",
    wordings: int | None = None,
    limit: int | None = None,
    split_seed: int = 0,
    fields: Mapping[str, str] | None = None,
    **options: Unpack[PlanOptions],
) -> Results:
    """Measure how far the scores of a relation's wordings differ, before and after learning from each of them.

    Args:
        data: A folder in one of the layouts of :mod:`ptuning.data.layouts`, with a folder of paraphrases.
        relations: Names, types, or ``all``. Relations with fewer than two usable wordings are left out with a warning.
        wordings: Use only this many wordings of a relation, the first of its file.
        limit: Maximum number of facts per relation.
        split_seed: Seed of the split of relations that come in one file.
        fields: New names of fields -> those in the files of facts, such as ``{"sub_label": "subject"}``.
        **options: ``out``, ``backbone``, ``methods`` and the others of :class:`ptuning.experiment.plan.Plan`.

    Returns all scores; ``paraphrases`` holds the spread of each relation, and the files are in ``out``. A PTuningError
    if the data or the settings cannot be used; nothing has been run then.

    Source: Liu et al. (2021), table 1 (P17); Elazar et al. (2021), ParaRel.
    """
    plan = Plan.of("paraphrases", **options)
    patterns: dict[str, dict[str, str]] = {}
    jobs: list[CellJob] = []
    found = read_relations(data, which=listed_names(relations), fields=fields)
    for relation in found:
        usable = usable_wordings(relation, kind=plan.backbone.kind)[:wordings]
        if len(usable) < 2:
            why = f"fewer than two wordings that a {plan.backbone.kind} model can use"
            logger.warning("%s: %s; left out", relation.name, why)
            continue
        named = {f"{relation.name}.{place:02d}": pattern for place, pattern in enumerate(usable, start=1)}
        patterns[relation.name] = named
        jobs += wording_jobs(relation, named, backbone=plan.backbone, limit=limit, seed=split_seed)
    if not jobs:
        base = Path(data).parent if Path(data).is_file() else Path(data)
        folders = " or ".join(str(base / one / f"{found[0].name}.jsonl") for one in PATTERN_FOLDERS)
        raise RecordError(
            f"{data}: none of the relations has two wordings. They are read from {folders}, or .csv, named after the "
            'relation: one {"pattern": "[X] is ruled from [Y] ."} a line'
        )
    settings: dict[str, Json] = {"data": str(data), "wordings": wordings, "limit": limit, "split_seed": split_seed}
    settings["template"] = "made of each wording"

    def more(results: Results, _: Sequence[CellResult]) -> Results:
        return replace(results, paraphrases=compare_wordings(results, patterns))

    return run_jobs(jobs, plan=plan, settings=settings, more=more)


def wording_jobs(
    relation: Relation, patterns: Mapping[str, str], *, backbone: Backbone, limit: int | None, seed: int
) -> list[CellJob]:
    """Return a job for each wording of a relation (name of the task -> manual template), all with the same facts."""
    # Without the relation's label, which would help every wording alike: only the words of the wording count.
    pairs = [(parsed, Template.from_manual(str(parsed))) for parsed in map(Template.parse, patterns.values())]
    every = [template for pair in pairs for template in pair]
    return [
        relation_job(relation, pair, backbone=backbone, name=name, limit=limit, seed=seed, templates=every)
        for name, pair in zip(patterns, pairs, strict=True)
    ]


def usable_wordings(relation: Relation, *, kind: str) -> list[str]:
    """Return a relation's wordings, its own first; a causal model can use those with all fields before the target."""
    found: dict[str, str] = {}
    for pattern in (relation.template, *relation.paraphrases):
        if pattern is None:
            continue
        parsed = Template.parse(pattern)
        if kind == "causal":
            at = next(index for index, piece in enumerate(parsed.pieces) if isinstance(piece, Target))
            if any(isinstance(piece, Field) for piece in parsed.pieces[at:]):
                continue
            parsed, _ = parsed.without_tail()  # a causal model does not see the text behind the target
        found.setdefault(str(parsed).strip(), pattern)
    return list(found.values())


def compare_wordings(results: Results, patterns: Mapping[str, Mapping[str, str]]) -> dict[str, RelationWordings]:
    """Return relation -> scores of its wordings, and spread per method; ``patterns``: relation -> task -> wording."""
    found = {}
    for relation, wordings in patterns.items():
        rows: list[Wording] = []
        values: dict[str, list[float]] = {}
        for task, pattern in wordings.items():
            scores = {method: all_[primary(all_)] for method, all_ in results.tasks.get(task, {}).items()}
            for method, score in scores.items():
                values.setdefault(method, []).append(score.value)
            rows.append(Wording(pattern, scores))
        found[relation] = RelationWordings(rows, {method: _spread(listed) for method, listed in values.items()})
    return found


def _spread(values: Sequence[float]) -> WordingSpread:
    low, high = min(values), max(values)
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return WordingSpread(low, high, high - low, std, len(values))
