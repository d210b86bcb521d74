"""What is printed of comparisons: cells as they finish, tables of scores, differences, and what a dry run would do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from ptuning.cli import terminal
from ptuning.cli.labels import show_confusion
from ptuning.metrics import EXACT_MATCH, METRICS, TASK_SCORE, best_of, called, in_order, primary
from ptuning.names import CELLS_FOLDER

if TYPE_CHECKING:
    from ptuning.experiment.cells import CellJob, CellResult
    from ptuning.progress import OnProgress, Progress
    from ptuning.report.results_file import Results, Scores
    from ptuning.workers.pool import WorkerConfig

# With more tasks than these the terminal shows means only; the report has each task.
SHOWN_TASKS = 3
# Methods beside each other in a table by the values of a field.
VALUE_METHODS = 2


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
    score = result.score(name)
    shown = f"{terminal.interval(score)}{f', n = {result.n}' * score.has_interval}"  # without one it has its n
    terminal.say(f"{where}{called(name)} {shown}, {result.seconds:.0f} s{more}")


def show_jobs(jobs: Sequence[CellJob]) -> None:
    """Print what a user should know of each task: its notes, how many facts of a relation were kept and why others were
    dropped.
    """
    for job in jobs:
        for note in job.notes:
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
    """Print the cells of a dry run with their estimated times, one line per method, and the sum."""
    table = terminal.table("method")
    for name in ("cells", "finished", "estimated time"):
        table.add_column(name, justify="right")
    left = [result for result in cells if not result.was_there]
    for method in dict.fromkeys(result.cell.method for result in cells):
        count = sum(result.cell.method == method for result in cells)
        waiting = [result for result in left if result.cell.method == method]
        table.add_row(escape(method), str(count), str(count - len(waiting)), _time(waiting))
    terminal.results().print(table)
    for result in cells:
        time = "finished" if result.was_there else _time([result])
        terminal.line(f"{result.cell.task}  {result.cell.method}  seed {result.cell.seed}: {time}")
    terminal.line(f"{len(left)} of {len(cells)} cells to run, estimated time: {_time(left)}; nothing was run")
    if not all(result.seconds for result in left):
        terminal.line("unknown: no cell of this method is finished; the mean of finished ones is the estimate")


def _time(cells: Sequence[CellResult]) -> str:
    known = sum(result.seconds for result in cells)
    if all(result.seconds for result in cells):
        return terminal.duration(known)
    return f"{terminal.duration(known)} + unknown" if known else "unknown"


def show_results(found: Results) -> None:
    """Print the main table, the learned prompt's confusion of labels, the differences, and where everything lies."""
    from ptuning.report.page import confusions

    if len(found.tasks) > 1:
        many = found.overall_unit
        _table(_means(found.macro), f"mean over {len(found.tasks)} {many} (n = {many})")
        for kind, scores in found.shown_types.items():
            _table(scores, f"{kind} (n = {many})")
    unit = "rows, or groups scored together" if found.suite == "superglue" else "records"
    for name, scores in found.tasks.items() if len(found.tasks) <= SHOWN_TASKS else ():
        _table(scores, f"{name} (n = {unit})")
        learned = confusions(found, name).get(found.pair[1])
        if learned is not None:
            seeds = len(found.done(found.pair[1], name))
            added = f", {seeds} seeds added up" if seeds > 1 else ""
            show_confusion(learned.shortened(), of=f"{name}, {found.pair[1]}{added}")
    _show_values(found)
    for name, differences in found.differences.items():
        method = name.partition(" - ")[0]
        if method not in found.controls and found.methods[method].learns_slots:
            first = primary(differences)
            score = differences[first]
            where = f"  [{score.low:+.3f}, {score.high:+.3f}]" if score.has_interval else ""
            terminal.line(f"{name}: {called(first)} {score.value:+.3f}{where}, n = {score.n}")
    for result in found.failed:
        terminal.line(f"failed: {result.folder}: {result.error}")
    terminal.line(f"report:  {found.folder}/report.html  (report.md, results.json and cells/ beside it)")


def _table(rows: Mapping[str, Scores], title: str) -> None:
    """Print the scores of methods: as many beside each other as the terminal is wide for, the others below."""
    terminal.heading(title)
    present = in_order(name for scores in rows.values() for name in scores)
    first, names = present[0], _columns(present, rows)
    # Beside two scores with their intervals there is no room for more.
    spread = len(names) == 1 and any(scores[first].std is not None for scores in rows.values())
    best = best_of(first, (scores[first].value for scores in rows.values()))
    cells = {
        name: {method: terminal.interval(scores[name]) if name in scores else "" for method, scores in rows.items()}
        for name in names
    }
    for shown in _fitting({f"{called(name)}  [95 % interval]": cells[name] for name in names}, rows):
        table = terminal.table("method")
        for head in shown:
            table.add_column(escape(head), no_wrap=True)
        for name in ("sd", "lowest") if spread else ():
            table.add_column(name, justify="right")
        table.add_column("n", justify="right")
        for method, scores in rows.items():
            main = scores[first]
            more = [main.std, main.lowest] if spread else []
            beside = ["" if value is None else f"{value:.3f}" for value in more]
            own = (escape(column[method]) for column in shown.values())
            table.add_row(escape(method), *own, *beside, str(main.n), style=terminal.mark(main.value == best))
        terminal.results().print(table)


def _fitting(
    columns: Mapping[str, Mapping[str, str]], methods: Iterable[str]
) -> Iterator[Mapping[str, Mapping[str, str]]]:
    """Divide columns, each with a cell for each method, by what a terminal shows beside the methods' names and n."""
    room = terminal.results().width - max(map(len, methods)) - len("    n  12345  ")
    shown: dict[str, Mapping[str, str]] = {}
    taken = 0
    for head, column in columns.items():
        wide = 3 + max(len(head), *map(len, column.values()))
        if shown and taken + wide > room:
            yield shown
            shown, taken = {}, 0
        shown[head] = column
        taken += wide
    yield shown


def _show_values(found: Results) -> None:
    """Print the first score by each value of a field, the best methods first, as many as fit beside each other."""
    if not found.by_value:
        return
    score, methods = found.primary, found.best_first(name for one in found.by_value.values() for name in one)
    terminal.heading(f"{called(score)} by {found.settings.get('by')}  [95 % interval]")
    for at in range(0, len(methods), VALUE_METHODS):
        shown = methods[at : at + VALUE_METHODS]
        table = terminal.table(str(found.settings.get("by")), *shown)
        table.add_column("n", justify="right")
        for value, scores in found.by_value.items():
            own = [scores[name][score] if name in scores else None for name in shown]
            n = max(one.n for one in own if one is not None) if any(own) else 0
            cells = ["" if one is None else f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]" for one in own]
            table.add_row(escape(value), *map(escape, cells), str(n))
        terminal.results().print(table)


def _means(rows: Mapping[str, Scores]) -> dict[str, Scores]:
    """Return means over tasks without metrics that the mean score counts already."""
    return {
        method: {name: value for name, value in scores.items() if name == TASK_SCORE or TASK_SCORE not in scores}
        for method, scores in rows.items()
    }


def _columns(present: Sequence[str], rows: Mapping[str, Scores]) -> list[str]:
    """Return the scores that fit into 80 columns: a task's own or their mean, and P@1 only once."""
    if present[0] == TASK_SCORE:
        return list(present[1:]) if len(present) <= 3 and present[1:] else [TASK_SCORE]
    same = EXACT_MATCH in present and all(
        scores[present[0]].value == scores[EXACT_MATCH].value for scores in rows.values()
    )
    left_out = {name for name, metric in METRICS.items() if metric.only_in_report} | ({EXACT_MATCH} if same else set())
    return [name for name in present if name not in left_out]


def show_part(found: Results, part: str) -> None:
    """Print how many cells a part has, and what collects all parts."""
    for result in found.failed:
        terminal.line(f"failed: {result.folder}: {result.error}")
    done = len(found.cells) - len(found.failed)
    terminal.line(f"part {part}: {done} of {len(found.cells)} cells are done in {found.folder}/{CELLS_FOLDER}")
    terminal.line("once all parts are done, the same command without --part collects them into one report")


def shown(progress: OnProgress, workers: WorkerConfig | None) -> OnProgress:
    """Return what shows the progress. A line per epoch of dozens of trainings would bury the line per cell, and the bar
    of a training would jump between those of several workers.
    """

    def show(now: Progress) -> None:
        if now.stage == "suite" if workers is not None else now.stage != "epoch":
            progress(now)

    return show
