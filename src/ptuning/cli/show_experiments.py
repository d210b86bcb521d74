"""What comparisons print: a line per cell while they run, tables in the end. Computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from ptuning.cli import terminal
from ptuning.metrics import EXACT_MATCH, METRICS, TASK_SCORE, called, in_order, primary
from ptuning.names import LEARNED_BY_TUNE

if TYPE_CHECKING:
    from ptuning.experiment.cells import CellResult
    from ptuning.experiment.dry_run import Estimate
    from ptuning.experiment.results import Results, Scores


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


def estimates(found: Sequence[Estimate]) -> None:
    """Print the cells of a dry run with their estimated times, one line per method, and the sum."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("method", "cells", "finished", "estimated time"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for method in dict.fromkeys(one.cell.method for one in found):
        own = [one for one in found if one.cell.method == method]
        seconds = sum(one.seconds or 0.0 for one in own)
        finished = sum(one.seconds is None for one in own)
        table.add_row(escape(method), str(len(own)), str(finished), terminal.duration(seconds))
    terminal.results().print(table)
    for one in found:
        text = "finished" if one.seconds is None else terminal.duration(one.seconds)
        terminal.line(f"{one.cell.task}  {one.cell.method}  seed {one.cell.seed}: {text}")
    total = sum(one.seconds or 0.0 for one in found)
    terminal.line(f"about {terminal.duration(total)} for {len(found)} cells on this machine; nothing was run")


def results(found: Results) -> None:
    """Print the main table, the differences, and where everything lies."""
    if len(found.tasks) > 1:
        _table(_means(found.macro), f"mean over {len(found.tasks)} tasks (n = tasks)")
        for kind, scores in found.by_type.items():
            _table(scores, f"{kind} (n = tasks)")
    unit = "rows, or groups scored together" if found.suite == "superglue" else "records"
    for name, scores in found.tasks.items() if len(found.tasks) <= SHOWN_TASKS else ():
        _table(scores, f"{name} (n = {unit})")
    for name, differences in found.differences.items():
        if name.partition(" - ")[0] in LEARNED_BY_TUNE.values():
            first = primary(differences)
            score = differences[first]
            where = f"[{score.low:+.3f}, {score.high:+.3f}]"
            terminal.line(f"{name}: {called(first)} {score.value:+.3f}  {where}, n = {score.n}")
    for result in found.failed:
        terminal.line(f"failed: {result.cell.folder}: {result.error}")
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
