"""What a dry run lists: every cell, and how long it will take, judged by finished cells of the same method."""

from __future__ import annotations

from dataclasses import dataclass

from ptuning.experiment.suite import Suite
from ptuning.report.results_file import Cell


@dataclass(frozen=True)
class CellEstimate:
    """The state of a cell before a run.

    Args:
        cell: The cell.
        is_finished: Whether an earlier run finished it.
        seconds: The seconds it took or will take; None if no cell of its method is finished yet.
    """

    cell: Cell
    is_finished: bool
    seconds: float | None


def estimate_cells(suite: Suite) -> list[CellEstimate]:
    """Return the state of each cell. The estimate of a waiting cell is the mean time of its method's finished cells."""
    taken = {cell: done.seconds for cell in suite.cells if (done := suite.load(cell)) is not None}
    times: dict[str, list[float]] = {}
    for cell, seconds in taken.items():
        times.setdefault(cell.method, []).append(seconds)
    means = {method: sum(listed) / len(listed) for method, listed in times.items()}
    return [CellEstimate(cell, cell in taken, taken.get(cell, means.get(cell.method))) for cell in suite.cells]
