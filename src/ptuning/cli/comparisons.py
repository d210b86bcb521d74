"""Printing of comparisons: cells as they finish, the tables of the report, and the cells of a dry run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from ptuning.cli import terminal
from ptuning.cli.labels import show_confusion
from ptuning.metrics import called
from ptuning.names import CELLS_FOLDER

if TYPE_CHECKING:
    from ptuning.experiment.cells import CellJob, CellResult
    from ptuning.report.results_file import Results
    from ptuning.report.tables import Table

# With more tasks than these the terminal shows means only; the report has each task.
SHOWN_TASKS = 3


def show_cell(result: CellResult, number: int, total: int, *, more: str = "") -> None:
    """Print a finished cell, and ``more``; nothing for one that an earlier run finished."""
    if result.was_there:
        return
    cell = result.cell
    where = f"{number}/{total}  {cell.task}  {cell.method}  seed {cell.seed}: "
    if result.status == "failed":
        terminal.say(f"{where}failed: {result.error}{more}")
        return
    score = result.score(result.primary)
    n = f", n = {result.n}" if score.has_interval else ""  # without an interval, it has its n
    terminal.say(f"{where}{called(result.primary)} {terminal.interval(score)}{n}, {result.seconds:.0f} s{more}")


def show_jobs(jobs: Sequence[CellJob]) -> None:
    """Print the notes of each task, how many facts of a relation were kept, and why others were dropped."""
    for note in dict.fromkeys(note for job in jobs for note in job.notes):
        terminal.say(note)
    for text in dict.fromkeys(map(_facts_of, jobs)):
        if text:
            terminal.say(text)


def _facts_of(job: CellJob) -> str:
    name, rows, dropped = job.info.get("relation"), job.info.get("rows"), job.info.get("dropped")
    if not (isinstance(name, str) and isinstance(rows, int) and isinstance(dropped, Mapping)):
        return ""  # of a comparison that drops nothing
    parts = {"train": job.task.train, "dev": job.task.dev, "test": job.test}
    kept = ", ".join(f"{len(part):,} {part_name}" for part_name, part in parts.items())
    lost = sum(count for count in dropped.values() if isinstance(count, int))
    remedies = {"object is not one token": " (--arg targets=any keeps these)"} if name == job.task.name else {}
    why = ", ".join(f"{count:,} {reason}{remedies.get(reason, '')}" for reason, count in dropped.items())
    return f"{name}: {rows - lost:,} of {rows:,} facts kept: {kept}" + (f"; dropped: {why}" if why else "")


def show_estimates(cells: Sequence[CellResult]) -> None:
    """Print the cells of a dry run with their estimated times, and the sum."""
    left = [result for result in cells if not result.was_there]
    table = terminal.table("task", "method", "seed", "estimated time")
    for result in cells:
        cell, time = result.cell, "finished" if result.was_there else _time([result])
        table.add_row(escape(cell.task), escape(cell.method), str(cell.seed), time)
    terminal.results().print(table)
    terminal.line(f"{len(left)} of {len(cells)} cells to run, estimated time: {_time(left)}; nothing was run")
    if not all(result.seconds for result in left):
        terminal.line("unknown: no cell of this method is finished; the mean of finished ones is the estimate")


def _time(cells: Sequence[CellResult]) -> str:
    known = sum(result.seconds for result in cells)
    if all(result.seconds for result in cells):
        return terminal.duration(known)
    return f"{terminal.duration(known)} + unknown" if known else "unknown"


def show_results(results: Results) -> None:
    """Print the tables of the report, the learned prompt's confusion of labels, failed cells, and the report's file."""
    from ptuning.report import tables
    from ptuning.report.page import confusions

    sections = [tables.main, tables.by_type, tables.by_value, tables.differences]
    if len(results.tasks) <= SHOWN_TASKS:
        sections.append(tables.per_task)
    for section in sections:
        for block in section(results):
            if isinstance(block, tables.Table):
                _show_table(block)
    for name in results.tasks if len(results.tasks) <= SHOWN_TASKS else ():
        learned = confusions(results, name).get(results.pair[1])
        if learned is not None:
            seeds = len(results.done(results.pair[1], name))
            added = f", {seeds} seeds added up" if seeds > 1 else ""
            show_confusion(learned.shortened(), of=f"{name}, {results.pair[1]}{added}")
    for result in results.failed:
        terminal.line(f"failed: {result.folder}: {result.error}")
    terminal.line(f"report:  {results.folder}/report.html  (with report.md, results.json and cells/)")


def _show_table(block: Table) -> None:
    terminal.heading(block.caption)
    table = terminal.table(*map(escape, block.columns))
    table.columns[0].no_wrap = True
    for name, *entries in block.rows:
        cells = (escape("\n".join((entry.text, *entry.small))) for entry in entries)
        styles = ("bold green" if entry.best else "default" for entry in entries)
        table.add_row(escape(name.text), *(f"[{style}]{cell}[/]" for style, cell in zip(styles, cells, strict=True)))
    terminal.results().print(table)


def show_part(results: Results, part: str) -> None:
    """Print how many cells a part has, and what collects all parts."""
    for result in results.failed:
        terminal.line(f"failed: {result.folder}: {result.error}")
    done = len(results.cells) - len(results.failed)
    terminal.line(f"part {part}: {done} of {len(results.cells)} cells are done in {results.folder}/{CELLS_FOLDER}")
    terminal.line("once all parts are done, the same command without --part collects them into one report")
