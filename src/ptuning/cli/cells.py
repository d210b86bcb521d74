"""Printing the cells of a comparison: those to run, each that has ended, and those of a part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from ptuning.cli import terminal
from ptuning.metrics import called
from ptuning.names import CELLS_FOLDER

if TYPE_CHECKING:
    from ptuning.experiment.cells import CellEstimate, CellJob, CellResult
    from ptuning.progress import OnProgress, Progress
    from ptuning.report.results_file import Results
    from ptuning.workers.crew import Workers


def show_cell(result: CellResult, number: int, total: int, *, more: str = "") -> None:
    """Print a finished cell, and ``more``; one that was finished by an earlier start is not worth a line."""
    if result.was_there:
        return
    cell = result.cell
    where = f"{number}/{total}  {cell.task}  {cell.method}  seed {cell.seed}: "
    if result.status == "failed":
        terminal.say(f"{where}failed: {result.error}{more}")
        return
    name = result.primary
    score = terminal.interval(result.score(name))
    terminal.say(f"{where}{called(name)} {score}, n = {result.n}, {result.seconds:.0f} s{more}")


def show_jobs(jobs: Sequence[CellJob]) -> None:
    """Print what a user should know of each task: its notes, how many facts of a relation were kept and why others were
    dropped. Wordings of one relation have the same facts, and are listed with the names of their cells.
    """
    for job in jobs:
        for note in job.notes:
            terminal.say(note)
    for text in dict.fromkeys(map(_facts_of, jobs)):
        if text:
            terminal.say(text)
    for job in jobs:
        if job.info.get("relation") not in (None, job.task.name):
            terminal.say(f"{job.task.name}: {job.task.manual}")


def _facts_of(job: CellJob) -> str:
    name, rows, dropped = job.info.get("relation"), job.info.get("rows"), job.info.get("dropped")
    if not (isinstance(name, str) and isinstance(rows, int) and isinstance(dropped, Mapping)):
        return ""  # of a comparison that drops nothing
    parts = {"train": job.task.train, "dev": job.task.dev, "test": job.test}
    kept = ", ".join(f"{len(part):,} {part_name}" for part_name, part in parts.items())
    lost = sum(count for count in dropped.values() if isinstance(count, int))
    remedies = {"object is not one token": " (--targets any keeps these)"} if name == job.task.name else {}
    why = ", ".join(f"{count:,} {reason}{remedies.get(reason, '')}" for reason, count in dropped.items())
    return f"{name}: {rows - lost:,} of {rows:,} facts kept: {kept}" + (f"; dropped: {why}" if why else "")


def show_estimates(found: Sequence[CellEstimate]) -> None:
    """Print the cells of a dry run with their estimated times, one line per method, and the sum."""
    table = terminal.table("method")
    for name in ("cells", "finished", "estimated time"):
        table.add_column(name, justify="right")
    left = [one for one in found if not one.is_finished]
    for method in dict.fromkeys(one.cell.method for one in found):
        own = [one for one in found if one.cell.method == method]
        waiting = [one for one in own if not one.is_finished]
        table.add_row(escape(method), str(len(own)), str(len(own) - len(waiting)), _time(waiting))
    terminal.results().print(table)
    for one in found:
        time = "finished" if one.is_finished else _time([one])
        terminal.line(f"{one.cell.task}  {one.cell.method}  seed {one.cell.seed}: {time}")
    terminal.line(f"{len(left)} of {len(found)} cells to run, estimated time: {_time(left)}; nothing was run")
    if any(one.seconds is None for one in left):
        terminal.line("unknown: no cell of this method is finished; the mean of finished ones is the estimate")


def _time(cells: Sequence[CellEstimate]) -> str:
    known = [one.seconds for one in cells if one.seconds is not None]
    if len(known) == len(cells):
        return terminal.duration(sum(known))
    return f"{terminal.duration(sum(known))} + unknown" if known else "unknown"


def show_part(found: Results, part: str) -> None:
    """Print how many cells a part has, and what collects all parts."""
    for result in found.failed:
        terminal.line(f"failed: {result.folder}: {result.error}")
    done = len(found.cells) - len(found.failed)
    terminal.line(f"part {part}: {done} of {len(found.cells)} cells are done in {found.folder}/{CELLS_FOLDER}")
    terminal.line("once all parts are done, the same command without --part collects them into one report")


def shown(progress: OnProgress, crew: Workers | None) -> OnProgress:
    """Return what shows the progress. A line per epoch of dozens of trainings would bury the line per cell, and the bar
    of a training would jump between those of several workers.
    """

    def show(now: Progress) -> None:
        if now.stage == "suite" if crew is not None else now.stage != "epoch":
            progress(now)

    return show
