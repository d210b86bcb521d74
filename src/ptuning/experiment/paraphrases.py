"""How much one word of a prompt matters: every wording of a relation as it is, and learned from. Knows no statistics
beyond the spread.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig, listed_names
from ptuning.data.relations import Relation, read_relations
from ptuning.errors import RecordError
from ptuning.experiment.cells import Job
from ptuning.experiment.compare import relation_job
from ptuning.experiment.plan import Plan, Watch, run_jobs
from ptuning.experiment.results import Results
from ptuning.files import Json
from ptuning.method.baselines import REFERENCE
from ptuning.metrics import primary
from ptuning.names import LEARNED
from ptuning.template.language import Field, Target, Template

logger = logging.getLogger(__name__)

PARAPHRASE_METHODS = (REFERENCE, LEARNED)


def paraphrases(
    data: str | Path,
    *,
    backbone: Backbone,
    out: str | Path,
    relations: Sequence[str] | str = "all",
    wordings: int | None = None,
    limit: int | None = None,
    split_seed: int = 0,
    methods: Sequence[str] | str = PARAPHRASE_METHODS,
    seeds: int = 1,
    tries: int = 1,
    config: TrainConfig | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    command: str | None = None,
    watch: Watch | None = None,
) -> Results:
    """Measure how far the wordings of a relation's prompt differ, before and after each of them is learned from.

    Args:
        data: A folder in one of the layouts of :func:`ptuning.data.relations.read_relations` that holds paraphrases.
        backbone: The frozen backbone.
        out: Folder of the results.
        relations: Names, types, or ``all``; those with fewer than two usable wordings are left out with a notice.
        wordings: At most so many wordings of a relation, the first of its file.
        limit: At most so many facts of a relation.
        split_seed: Of the split of relations that come in one file.
        methods: Names of :data:`ptuning.methods`.
        seeds: How many seeds.
        tries: How many settings each trained method tries.
        config: Settings of training.
        overwrite: Replace results made with other settings.
        dry_run: Estimate the time, and run nothing.
        command: The command line, for the record.
        watch: Who is told how far it is.

    Returns:
        All scores; ``about["paraphrases"]`` holds the spread of each relation. The files lie in ``out``.

    Raises:
        PTuningError: Before anything is run, if the data or the settings cannot be used.

    Source: Liu et al. (2021), table 1 (P17); Elazar et al. (2021), ParaRel.
    """
    plan = Plan(
        *(Path(out), backbone, methods, seeds, tries, False, config or TrainConfig()),
        *(overwrite, dry_run, command, watch or Watch()),
    )
    patterns: dict[str, dict[str, str]] = {}
    jobs: list[Job] = []
    for relation in read_relations(data, which=listed_names(relations)):
        usable = usable_wordings(relation, kind=backbone.kind)[:wordings]
        if len(usable) < 2:
            logger.warning(
                "%s: fewer than two wordings that a %s model can use; left out", relation.name, backbone.kind
            )
            continue
        # Learned from the words alone, without the relation's label, which would give every wording the same help.
        pairs = [(parsed, Template.from_manual(str(parsed))) for parsed in map(Template.parse, usable)]
        every = [template for pair in pairs for template in pair]
        patterns[relation.name] = {f"{relation.name}.{place:02d}": pattern for place, pattern in enumerate(usable, 1)}
        for name, pair in zip(patterns[relation.name], pairs, strict=True):
            jobs.append(
                relation_job(
                    relation, pair, backbone=backbone, name=name, limit=limit, seed=split_seed, templates=every
                )
            )
    if not jobs:
        raise RecordError(f"{data}: none of the relations has two wordings; is there a folder of paraphrases?")
    settings: dict[str, Json] = {
        "data": str(data),
        "wordings": wordings,
        "limit": limit,
        "split_seed": split_seed,
        "template": "made of each wording",
    }
    return run_jobs(
        "paraphrases", jobs, plan=plan, settings=settings, more=lambda found: {"paraphrases": spread(found, patterns)}
    )


def usable_wordings(relation: Relation, *, kind: str) -> list[str]:
    """Return the different patterns of a relation, its own first; a causal model needs all fields before the target."""
    found: dict[str, str] = {}
    for pattern in (relation.template, *relation.paraphrases):
        if pattern is None:
            continue
        parsed = Template.parse(pattern)
        if kind == "causal":
            at = next(index for index, piece in enumerate(parsed.pieces) if isinstance(piece, Target))
            if any(isinstance(piece, Field) for piece in parsed.pieces[at:]):
                continue
            parsed, _ = parsed.without_tail()  # what differs behind the target is the same wording to such a model
        found.setdefault(str(parsed).strip(), pattern)
    return list(found.values())


def spread(results: Results, patterns: Mapping[str, Mapping[str, str]]) -> dict[str, Json]:
    """Return for each relation the scores of its wordings and, per method, how far they are apart."""
    found: dict[str, Json] = {}
    for relation, wordings in patterns.items():
        rows: list[Json] = []
        values: dict[str, list[float]] = {}
        for task, pattern in wordings.items():
            table = results.tasks.get(task, {})
            scores = {method: found[primary(found)] for method, found in table.items()}
            for method, score in scores.items():
                values.setdefault(method, []).append(score.value)
            rows.append({"pattern": pattern, "scores": {name: dict(score.to_json()) for name, score in scores.items()}})
        between: dict[str, Json] = {
            method: {
                "min": min(listed),
                "max": max(listed),
                "range": max(listed) - min(listed),
                "std": float(np.std(listed, ddof=1)) if len(listed) > 1 else None,
                "patterns": len(listed),
            }
            for method, listed in values.items()
        }
        found[relation] = {"patterns": rows, "spread": between}
    return found
