"""What comparisons print: a line per cell while they run, tables in the end. Computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from ptuning.cli import terminal
from ptuning.metrics import EXACT_MATCH, METRICS, TASK_SCORE, called, in_order, primary

if TYPE_CHECKING:
    from ptuning.experiment.cells import CellResult
    from ptuning.experiment.dry_run import CellEstimate
    from ptuning.report.results_file import Results, Scores


def cell(result: CellResult, number: int, total: int) -> None:
    """Print a finished cell; one that was finished by an earlier start is not worth a line."""
    if result.was_there:
        return
    cell = result.cell
    where = f"{number}/{total}  {cell.task}  {cell.method}  seed {cell.seed}: "
    if result.status == "failed":
        terminal.say(f"{where}failed: {result.error}")
        return
    name = result.primary
    terminal.say(
        f"{where}{called(name)} {terminal.interval(result.score(name))}, n = {result.n}, {result.seconds:.0f} s"
    )


def estimates(found: Sequence[CellEstimate]) -> None:
    """Print the cells of a dry run with the time they will take, one line per method, and the sum."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("method", "cells", "finished", "estimated time"):
        table.add_column(name, justify="left" if name == "method" else "right")
    left = [one for one in found if not one.is_finished]
    for method in dict.fromkeys(one.cell.method for one in found):
        own = [one for one in found if one.cell.method == method]
        finished = sum(one.is_finished for one in own)
        time = _time([one for one in own if not one.is_finished])
        table.add_row(escape(method), str(len(own)), str(finished), time)
    terminal.results().print(table)
    for one in found:
        time = "finished" if one.is_finished else _time([one])
        terminal.line(f"{one.cell.task}  {one.cell.method}  seed {one.cell.seed}: {time}")
    terminal.line(f"{len(left)} of {len(found)} cells to run, estimated time: {_time(left)}; nothing was run")
    if any(one.seconds is None for one in left):
        terminal.line("unknown: no cell of this method is finished; the mean of finished ones is the estimate")


def _time(cells: Sequence[CellEstimate]) -> str:
    """Return the estimated time of cells that are to be run."""
    known = [one.seconds for one in cells if one.seconds is not None]
    if len(known) == len(cells):
        return terminal.duration(sum(known))
    return f"{terminal.duration(sum(known))} + unknown" if known else "unknown"


def results(found: Results) -> None:
    """Print the main table, the differences, and where everything lies."""
    from ptuning.method.registry import METHODS

    if len(found.tasks) > 1:
        _table(_means(found.macro), f"mean over {len(found.tasks)} tasks (n = tasks)")
        for kind, scores in found.by_type.items():
            _table(scores, f"{kind} (n = tasks)")
    unit = "rows, or groups scored together" if found.suite == "superglue" else "records"
    for name, scores in found.tasks.items() if len(found.tasks) <= SHOWN_TASKS else ():
        _table(scores, f"{name} (n = {unit})")
    for name, differences in found.differences.items():
        method = METHODS.get(name.partition(" - ")[0])
        if method is not None and method.learns_slots:
            first = primary(differences)
            score = differences[first]
            where = f"[{score.low:+.3f}, {score.high:+.3f}]"
            terminal.line(f"{name}: {called(first)} {score.value:+.3f}  {where}, n = {score.n}")
    for result in found.failed:
        terminal.line(f"failed: {result.folder}: {result.error}")
    terminal.line(f"report:  {found.folder}/report.html  (report.md, results.json and cells/ beside it)")


# More tasks than these are read in the report, not on the terminal.
SHOWN_TASKS = 3


def _table(rows: Mapping[str, Scores], title: str) -> None:
    terminal.heading(title)
    present = in_order(name for scores in rows.values() for name in scores)
    first, names = present[0], _columns(present, rows)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("method")
    for name in names:
        table.add_column(f"{called(name)}  [95 % interval]", no_wrap=True)
    # Beside two scores with their intervals there is no room for more.
    spread = len(names) == 1 and any(scores[first].std is not None for scores in rows.values())
    for name in ("sd", "lowest") if spread else ():
        table.add_column(name, justify="right")
    table.add_column("n", justify="right")
    best = max(scores[first].value for scores in rows.values())
    for method, scores in rows.items():
        cells = [escape(terminal.interval(scores[name])) if name in scores else "" for name in names]
        main = scores[first]
        if spread:
            cells += ["" if value is None else f"{value:.3f}" for value in (main.std, main.lowest)]
        table.add_row(escape(method), *cells, str(main.n), style="bold green" if main.value == best else "")
    terminal.results().print(table)


def _means(rows: Mapping[str, Scores]) -> dict[str, Scores]:
    """Return means over tasks without a metric that all of them happen to have, which the mean score counts already."""
    return {
        method: {name: value for name, value in scores.items() if name == TASK_SCORE or TASK_SCORE not in scores}
        for method, scores in rows.items()
    }


def _columns(present: Sequence[str], rows: Mapping[str, Scores]) -> list[str]:
    """Return the scores that a table shows, so that a row fits into 80 columns: P@10 is for the report, and one column
    is enough where P@1 is exact match. Of a task's own metrics and their mean the metrics are shown, if they fit.
    """
    if present[0] == TASK_SCORE:
        return list(present[1:]) if len(present) <= 3 and present[1:] else [TASK_SCORE]
    same = all(scores[present[0]].value == scores[EXACT_MATCH].value for scores in rows.values())
    left_out = {name for name, metric in METRICS.items() if metric.only_in_report} | ({EXACT_MATCH} if same else set())
    return [name for name in present if name not in left_out]
