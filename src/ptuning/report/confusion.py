"""Confusion matrices of the methods, counted from the answers of their cells."""

from __future__ import annotations

import itertools

from ptuning.metrics import Confusion
from ptuning.names import MAJORITY, PREDICTIONS_FILE
from ptuning.report import pictures
from ptuning.report.blocks import Block, Picture, counted
from ptuning.report.results_file import Results, read_answers

# Bounds of the pictures of a page.
MOST_TASKS, MOST_METHODS = 8, 6


def confusions(results: Results, task: str) -> dict[str, Confusion]:
    """Return method -> its confusion matrix over the test part of a task with labels, added up over seeds; without
    controls, and without the majority, which has one answer.
    """
    labels = results.task_info.get(task, {}).get("labels") or []
    shown = {*results.tasks.get(task, {})} - {MAJORITY, *results.controls}
    matrices = {}
    for method in results.ordered(shown) if labels else ():
        rows = [
            row
            for cell in results.done(method, task)
            if (path := results.folder_of(cell) / PREDICTIONS_FILE).is_file()
            for row in read_answers(path)
            if row.target is not None
        ]
        if rows:
            matrices[method] = Confusion.of(
                labels, [row.target or "" for row in rows], [row.answer.text for row in rows]
            )
    return matrices


def section(results: Results) -> list[Block]:
    """Return a picture for each task with labels."""
    drawn = ((task, matrices) for task in results.tasks if (matrices := confusions(results, task)))
    blocks: list[Block] = []
    for number, (task, matrices) in enumerate(itertools.islice(drawn, MOST_TASKS), start=1):
        first = {*results.pair, *results.ranked[:MOST_METHODS]}
        panels = {name: matrix.shortened() for name, matrix in matrices.items() if name in first}
        panels = dict(itertools.islice(panels.items(), MOST_METHODS))
        if not panels:
            continue
        seeds = max(len(results.done(method, task)) for method in panels)
        summed = f" Counts are sums over {counted(seeds, 'seed')}." if seeds > 1 else ""
        caption = (
            f"{results.named(task)}: a row for each target, a column for each answer, under its number. The darker a "
            f"square, the larger its share of the row.{summed}"
        )
        name = f"confusion-{number}"
        worst = "; ".join(f"{method}: {_worst(matrix)}" for method, matrix in panels.items())
        blocks.append(
            Picture(name, pictures.matrices(panels, name=name), caption, f"{caption} Most frequent: {worst}.")
        )
    return blocks


def _worst(matrix: Confusion) -> str:
    """Return the most frequent confusion in words."""
    count, target, answer = max(
        (
            (count, matrix.labels[row], matrix.labels[column])
            for row, counts in enumerate(matrix.counts)
            for column, count in enumerate(counts)
            if row != column
        ),
        key=lambda pair: pair[0],
    )
    return f"{target} predicted as {answer} {counted(count, 'time')}" if count else "no confusion"
