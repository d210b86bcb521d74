"""How long the cells of a suite will take: tokens to be run over a measured speed. Runs nothing but that measure."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ptuning.data.questions import Questions
from ptuning.engine.evaluate import evaluate
from ptuning.engine.learned import Learned
from ptuning.experiment.cells import Cell, Job
from ptuning.experiment.suite import Suite
from ptuning.method.base import Setup
from ptuning.method.items import task_items
from ptuning.names import LEARNED_BY_TUNE
from ptuning.template.fill import BoundTemplate

# Records scored to measure the machine's speed, after as many to warm it up.
MEASURED_RECORDS = 64
REPEATS = 3


@dataclass(frozen=True)
class Estimate:
    """Estimated seconds of a cell; None for one that is finished already."""

    cell: Cell
    seconds: float | None


def estimate(suite: Suite) -> list[Estimate]:
    """Estimate each cell of a suite from a short measurement of this machine."""
    cells = suite.cells
    waiting = {cell for cell in cells if suite.load(cell) is None}
    if not waiting:
        return [Estimate(cell, None) for cell in cells]
    lengths = {name: _mean_tokens(suite, job) for name, job in suite.jobs.items()}
    first = next(iter(suite.jobs.values()))
    speed = _tokens_per_second(suite, first)
    found = []
    for cell in cells:
        job, method = suite.jobs[cell.task], suite.methods[cell.method]
        answered = len(job.test) + len(job.unlabelled or ())
        if method.passes is None:
            found.append(Estimate(cell, 0.0 if cell in waiting else None))
            continue
        if method.tokens is not None:
            setup = Setup(suite.backbone, suite.config, seed=cell.seed)
            tokens = method.tokens(job.task_of(cell.seed), setup, answered) if cell in waiting else 0.0
            found.append(Estimate(cell, tokens / speed if cell in waiting else None))
            continue
        on_train, on_dev = method.passes
        repeats = suite.tries if method.trained else 1
        if cell.method.partition("@")[0] in LEARNED_BY_TUNE.values():  # what has slots has several starts
            repeats *= suite.config.starts
        epochs = suite.config.epochs if method.trained else 1
        rows = answered + repeats * epochs * (on_train * len(job.task.train) + on_dev * len(job.task.dev))
        found.append(Estimate(cell, rows * lengths[cell.task] / speed if cell in waiting else None))
    return found


def _mean_tokens(suite: Suite, job: Job) -> float:
    bound = BoundTemplate(job.task.template, tokenizer=suite.backbone.tokenizer, kind=suite.backbone.kind)
    items = task_items(bound, job.task.train, job.task)
    return sum(item.tokens for item in items) / len(items)


def _tokens_per_second(suite: Suite, job: Job) -> float:
    """Return the speed of a forward pass with the manual template."""
    backbone = suite.backbone
    bound = BoundTemplate(job.task.manual, tokenizer=backbone.tokenizer, kind=backbone.kind)
    items = task_items(bound, Questions(job.task.train[:MEASURED_RECORDS]), job.task)
    none = Learned.none(backbone.width)
    evaluate(backbone, items, none)
    spent = []
    for _ in range(REPEATS):
        began = time.monotonic()
        evaluate(backbone, items, none)
        spent.append(time.monotonic() - began)
    # The shortest: whatever else runs on the machine only ever makes it slower.
    return sum(item.tokens for item in items) / max(min(spent), 1e-9)
