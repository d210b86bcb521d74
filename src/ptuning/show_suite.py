"""What comparisons print: a line per cell while they run, tables in the end. Computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from ptuning import show

if TYPE_CHECKING:
    from ptuning.estimate import Estimate
    from ptuning.results import Results, Scores
    from ptuning.suite import CellResult

TITLES = {"p_at_1": "P@1", "p_at_10": "P@10", "mrr": "MRR", "exact_match": "exact match"}


def cell(result: CellResult, number: int, total: int) -> None:
    """Print a finished cell; one that was finished by an earlier start is not worth a line."""
    if result.was_there:
        return
    cell = result.cell
    where = f"{number}/{total}  {cell.task}  {cell.method}  seed {cell.seed}: "
    if result.status == "failed":
        show.say(f"{where}failed: {result.error}")
        return
    show.say(f"{where}P@1 {show.interval(result.score('p_at_1'))}, n = {result.n}, {result.seconds:.0f} s")


def estimates(found: Sequence[Estimate]) -> None:
    """Print the cells of a dry run with their estimated times, one line per method, and the sum."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("method", "cells", "finished", "estimated time"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for method in dict.fromkeys(one.cell.method for one in found):
        own = [one for one in found if one.cell.method == method]
        seconds = sum(one.seconds or 0.0 for one in own)
        finished = sum(one.seconds is None for one in own)
        table.add_row(escape(method), str(len(own)), str(finished), duration(seconds))
    show.results().print(table)
    for one in found:
        text = "finished" if one.seconds is None else duration(one.seconds)
        show.line(f"{one.cell.task}  {one.cell.method}  seed {one.cell.seed}: {text}")
    total = sum(one.seconds or 0.0 for one in found)
    show.line(f"about {duration(total)} for {len(found)} cells on this machine; nothing was run")


def results(found: Results) -> None:
    """Print the main table, the differences, and where everything lies."""
    if len(found.tasks) > 1:
        _table(found.macro, f"mean over {len(found.tasks)} tasks (n = tasks)")
        for kind, scores in found.by_type.items():
            _table(scores, f"{kind} (n = tasks)")
    for name, scores in found.tasks.items() if len(found.tasks) <= SHOWN_TASKS else ():
        _table(scores, f"{name} (n = records)")
    for name, differences in found.differences.items():
        if name.startswith("p-tuning - ") and "p_at_1" in differences:
            score = differences["p_at_1"]
            show.line(f"{name}: P@1 {score.value:+.3f}  [{score.low:+.3f}, {score.high:+.3f}], n = {score.n}")
    for result in found.failed:
        show.line(f"failed: {result.cell.folder}: {result.error}")
    show.line(f"report:  {found.folder}/report.html  (report.md, results.json and cells/ beside it)")


# More tasks than these are read in the report, not on the terminal.
SHOWN_TASKS = 3


def _table(rows: Mapping[str, Scores], title: str) -> None:
    show.heading(title)
    names = [name for name in TITLES if any(name in scores for scores in rows.values())]
    # Where P@1 is exact match one column is enough; P@10 is for the report, so that a row fits into 80 columns.
    same = all(scores["p_at_1"].value == scores["exact_match"].value for scores in rows.values())
    names = [name for name in names if name != "p_at_10" and not (same and name == "exact_match")]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("method")
    for name in names:
        table.add_column(f"{TITLES[name]}  [95 % interval]", no_wrap=True)
    table.add_column("n", justify="right")
    best = max(scores["p_at_1"].value for scores in rows.values())
    for method, scores in rows.items():
        cells = [escape(show.interval(scores[name])) if name in scores else "" for name in names]
        first = scores["p_at_1"]
        table.add_row(escape(method), *cells, str(first.n), style="bold green" if first.value == best else "")
    show.results().print(table)


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
