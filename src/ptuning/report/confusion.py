"""Which labels are taken for which: confusion matrices of the methods, counted from the answers of their cells."""

from __future__ import annotations

import itertools

from ptuning.files import Json
from ptuning.metrics import Confusion
from ptuning.names import MAJORITY, PREDICTIONS_FILE
from ptuning.report import pictures
from ptuning.report.blocks import Block, Picture, counted
from ptuning.report.cell_files import read_answers
from ptuning.report.results_file import Results

# More are not told apart in a picture, or make a page that nobody reads to its end.
MOST_TASKS, MOST_METHODS = 8, 6


def confusions(results: Results, task: str) -> dict[str, Confusion]:
    """Return method -> its confusion matrix over the test part of a task with labels, added up over seeds; without
    controls, and without the majority, which has one answer.
    """
    labels = _labels(results.task_info.get(task, {}).get("labels"))
    found = {}
    shown = {*results.tasks.get(task, {})} - {MAJORITY, *results.controls}
    for method in results.ordered(shown) if labels else ():
        rows = [
            row
            for cell in results.done(method, task)
            if (path := results.folder_of(cell) / PREDICTIONS_FILE).is_file()
            for row in read_answers(path)
            if row.target is not None
        ]
        if rows:
            found[method] = Confusion.of(labels, [row.target or "" for row in rows], [row.answer.text for row in rows])
    return found


def section(results: Results) -> list[Block]:
    """Return a picture for each task with labels."""
    drawn = ((task, found) for task in results.tasks if (found := confusions(results, task)))
    blocks: list[Block] = []
    for number, (task, found) in enumerate(itertools.islice(drawn, MOST_TASKS), start=1):
        first = {*results.pair, *results.ranked[:MOST_METHODS]}
        chosen = [method for method in found if method in first][:MOST_METHODS]
        panels = {method: found[method].shortened() for method in chosen}
        if not panels:
            continue
        seeds = max(len(results.done(method, task)) for method in chosen)
        summed = f" Counts are sums over {counted(seeds, 'seed')}." if seeds > 1 else ""
        caption = (
            f"{results.named(task)}: a row for each target, a column for each answer, under its number. The darker a "
            f"square, the larger its share of the row.{summed}"
        )
        name = f"confusion-{number}"
        worst = "; ".join(f"{method}: {_worst(one)}" for method, one in panels.items())
        blocks.append(
            Picture(name, pictures.matrices(panels, name=name), caption, f"{caption} Most frequent: {worst}.")
        )
    return blocks


def _labels(found: Json) -> list[str]:
    listed = found if isinstance(found, list) else []
    return [one for one in listed if isinstance(one, str)]


def _worst(one: Confusion) -> str:
    """Return the most frequent confusion in words."""
    pairs = [
        (count, one.labels[row], one.labels[column])
        for row, counts in enumerate(one.counts)
        for column, count in enumerate(counts)
        if row != column
    ]
    count, target, answer = max(pairs, key=lambda pair: pair[0])
    return f"{target} taken for {answer} {counted(count, 'time')}" if count else "no confusion"
