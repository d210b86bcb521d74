"""The comparison of methods on a user's own data."""

from __future__ import annotations

import logging
from pathlib import Path

from typing_extensions import Unpack

from ptuning.data.splits import draw_records, split_records
from ptuning.errors import RecordError
from ptuning.experiment.jobs import OneToken, are_listed, fact_job, read_vocabulary, template_pair
from ptuning.experiment.plan import Plan, PlanOptions, run_jobs
from ptuning.files import Json
from ptuning.method.tuned import bare
from ptuning.prompt.prompt import as_template
from ptuning.records import Rows, as_records, require_targets
from ptuning.report.results_file import Results
from ptuning.template.language import Template

logger = logging.getLogger(__name__)


def compare(
    data: Rows,
    *,
    test: Rows,
    manual: str | Template,
    template: str | Template | None = None,
    dev: Rows | None = None,
    vocabulary: str | Path | None = None,
    train_size: int | None = None,
    name: str = "task",
    **options: Unpack[PlanOptions],
) -> Results:
    """Compare methods on your own data. Finished cells of an earlier run are not run again.

    Args:
        data: Records to learn from.
        test: Records to report on. Nothing is chosen by them.
        manual: A manual template.
        template: The template to learn; by default made from the manual one.
        dev: Records to choose settings by; without them a seeded share of ``data`` is set aside.
        vocabulary: A closed set of answers: ``objects`` (all targets of the data), or a file.
        train_size: Learn from a seeded draw of this many records.
        name: Name of the task.
        **options: ``out``, ``backbone``, ``methods`` and the others of :class:`ptuning.experiment.plan.Plan`.

    Returns all scores; the files are in ``out``. A PTuningError if the data or the settings cannot be used; nothing
    has been run then.
    """
    plan = Plan.of("compare", **options)
    config = plan.config
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
    pair = template_pair(as_template(manual), template)
    one_token = OneToken(plan.backbone, [*pair, bare(pair[0])])
    single = all(all(one_token(rows)) for rows in parts.values())
    closed = read_vocabulary(vocabulary)
    for part, rows in parts.items() if isinstance(closed, tuple) else ():
        missing = are_listed(rows, closed or ()).count(False)
        if missing:
            logger.warning("%d of %d %s targets are not in %s: never right", missing, len(rows), part, vocabulary)
    rows_read = sum(map(len, parts.values()))
    info: dict[str, Json] = {"label": None, "type": None, "rows": rows_read, "dropped": {}, "split": how}
    job = fact_job(name, parts, pair, vocabulary=closed, single_token=single, info=info)
    settings: dict[str, Json] = {"vocabulary": str(vocabulary) if vocabulary else None, "train_size": train_size}
    return run_jobs([job], plan=plan, settings=settings)
