"""What comparisons print: a line per new cell, tables with intervals, and nothing that is not there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from ptuning.cli import show_experiments, terminal
from ptuning.cli.terminal import duration
from ptuning.experiment.cells import CellResult
from ptuning.experiment.dry_run import CellEstimate
from ptuning.experiment.results import Collector
from ptuning.experiment.suite import Suite
from ptuning.progress import Progress
from ptuning.report.results_file import Cell, Results
from tests.cli.test_terminal import Screen


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[str, str]]:
    """Return what was printed on the standard output and on the error stream, on 80 columns."""
    for name in ("results", "_errors"):
        monkeypatch.setattr(
            terminal, name, lambda name=name: Console(width=80, highlight=False, emoji=False, stderr=name == "_errors")
        )

    def read() -> tuple[str, str]:
        found = capsys.readouterr()
        return found.out, found.err

    return read


def done(task: str, method: str, hits: Sequence[float], **more: object) -> CellResult:
    values: Mapping[str, Sequence[float]] = {"p_at_1": hits, "p_at_10": [1.0] * len(hits), "mrr": hits}
    return CellResult(Cell(task, method, 0), "done", {**values, "exact_match": hits}, 3.4, **more)  # type: ignore[arg-type]


def collected(*cells: CellResult, types: Mapping[str, str | None] | None = None) -> Results:
    kinds = types or {cell.cell.task: None for cell in cells}
    names = ["majority", "manual", "p-tuning"]
    return Collector(Results("lama", folder=Path("runs/x")), names, kinds).collect(cells)


def test_a_line_per_new_cell(printed: Callable[[], tuple[str, str]]) -> None:
    show_experiments.cell(done("P36", "manual", [1, 0, 0, 0]), 2, 9)
    show_experiments.cell(done("P36", "majority", [1, 0], was_there=True), 3, 9)
    show_experiments.cell(CellResult(Cell("P36", "p-tuning", 1), "failed", error="no [room]"), 4, 9)
    assert printed() == (
        "",
        "2/9  P36  manual  seed 0: P@1 0.250  [0.046, 0.699], n = 4, 3 s\n"
        "4/9  P36  p-tuning  seed 1: failed: no [room]\n",
    )


def test_the_results_of_one_task(printed: Callable[[], tuple[str, str]]) -> None:
    show_experiments.results(collected(done("P36", "manual", [0, 0, 0, 1]), done("P36", "p-tuning", [1, 1, 0, 1])))
    out, err = printed()
    assert err == ""
    assert "P36 (n = records)\n" in out
    assert "mean over" not in out
    header = next(line for line in out.splitlines() if "method" in line)
    # P@1 is exact match here, and P@10 stands in the report.
    assert "P@1  [95 % interval]" in header
    assert "MRR  [95 % interval]" in header
    assert "exact match" not in header
    assert "P@10" not in header
    row = next(line for line in out.splitlines() if line.strip().startswith("p-tuning "))
    assert "0.750  [" in row
    assert row.split()[-1] == "4"
    assert "p-tuning - manual: P@1 +0.500  [" in out
    assert out.endswith("report:  runs/x/report.html  (report.md, results.json and cells/ beside it)\n")
    assert max(map(len, out.splitlines()[:-1])) <= 80


def test_the_results_of_many_tasks(printed: Callable[[], tuple[str, str]]) -> None:
    tasks = [f"P{number}" for number in range(4)]
    cells = [done(task, method, [1, 0]) for task in tasks for method in ("majority", "manual")]
    show_experiments.results(collected(*cells, types=dict.fromkeys(tasks[:2], "1-1") | dict.fromkeys(tasks[2:], None)))
    out, _ = printed()
    assert "mean over 4 tasks (n = tasks)" in out
    assert "1-1 (n = tasks)" in out
    assert "P0 (n = records)" not in out  # too many for a terminal
    assert "majority - manual" not in out


def test_nothing_but_failures(printed: Callable[[], tuple[str, str]]) -> None:
    show_experiments.results(collected(CellResult(Cell("P36", "manual", 0), "failed", error="no room")))
    out, _ = printed()
    assert out.startswith("failed: cells/P36/manual/seed-0: no room\n")


def test_estimates(printed: Callable[[], tuple[str, str]]) -> None:
    known = [
        CellEstimate(Cell("P36", "manual", 0), is_finished=True, seconds=3.0),
        CellEstimate(Cell("P36", "p-tuning", 0), is_finished=False, seconds=90.0),
        CellEstimate(Cell("P36", "p-tuning", 1), is_finished=False, seconds=4000.0),
    ]
    show_experiments.estimates(known)
    out, _ = printed()
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert rows["manual"] == ["1", "1", "0", "s"]
    assert rows["p-tuning"] == ["2", "0", "1", "h", "08", "min"]
    assert "P36  manual  seed 0: finished\nP36  p-tuning  seed 0: 2 min\nP36  p-tuning  seed 1: 1 h 07 min\n" in out
    assert out.endswith("2 of 3 cells to run, estimated time: 1 h 08 min; nothing was run\n")
    show_experiments.estimates([*known, CellEstimate(Cell("P36", "in-context", 0), is_finished=False, seconds=None)])
    out, _ = printed()
    assert "P36  in-context  seed 0: unknown\n" in out
    assert "3 of 4 cells to run, estimated time: 1 h 08 min + unknown; nothing was run\n" in out
    assert "unknown: no cell of this method is finished" in out


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0, "0 s"), (59.0, "59 s"), (60.0, "1 min"), (3570.0, "1 h 00 min"), (7500.0, "2 h 05 min")],
)
def test_times(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_a_terminal_has_a_bar_for_every_stage_that_a_suite_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every comparison on a terminal ended in a KeyError: tests do not run on one."""
    screen = Screen()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(terminal, "_errors", lambda: console)
    told: list[Progress] = []

    class Stub(Suite):
        def __init__(self) -> None:
            """Takes nothing: its cells are all there."""

        @property
        def cells(self) -> list[Cell]:
            return [Cell("P36", "manual", 0), Cell("P36", "p-tuning", 0)]

        def _trains_together(self, cells: Sequence[Cell]) -> bool:
            return False

        def load(self, cell: Cell) -> CellResult:
            return done(cell.task, cell.method, [1.0], was_there=True)

    with terminal.bar() as report:

        def tell(progress: Progress) -> None:
            told.append(progress)
            report(progress)

        for result in Stub().run(report=tell):
            show_experiments.cell(result, 1, 2)
        report(Progress("suite", 1, 2, "P36 p-tuning"))
        time.sleep(0.15)  # two frames
    assert [(progress.stage, progress.done, progress.total) for progress in told] == [
        ("suite", 0, 2), ("suite", 1, 2), ("suite", 2, 2),
    ]  # fmt: skip
    assert "comparing" in screen.getvalue()
