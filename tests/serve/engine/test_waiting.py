"""The queue: who comes first, and what is taken out."""

from types import SimpleNamespace

import pytest

from ptuning.prompt.rows import TextRow
from ptuning.serve.engine import scheduler as waiting
from ptuning.serve.engine.job import CallRow, Job, Listener
from ptuning.serve.engine.scheduler import RowCounts, RowQueue


def test_first_come_first_served_and_a_large_request_makes_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small request stands behind the first rows of a large one, a late one behind all; a call before all."""
    queue, clock = RowQueue(RowCounts()), [0.0]
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    large, small, late = (Job([TextRow("a")] * rows, Listener(rows)) for rows in (4, 1, 1))
    for at, job in ((0.0, large), (0.03, small), (0.5, late)):
        clock[0] = at
        queue.put(job)
    call = Job([CallRow(lambda: None)], Listener(1))
    queue.put(call)
    assert len(queue) == 6
    order = []
    while (one := queue.take()) is not None:
        order.append((one.job, one.index))
    assert order == [(call, 0), (large, 0), (large, 1), (small, 0), (large, 2), (large, 3), (late, 0)]
    assert not queue


def test_cancelled_rows_are_taken_out_and_the_others_keep_their_order() -> None:
    queue = RowQueue(RowCounts())
    stays, goes = (Job([TextRow("a")] * 2, Listener(2)) for _ in range(2))
    for job in (goes, stays):
        queue.put(job)
    goes.cancel()
    assert [one.job for one in queue.take_all(cancelled=True)] == [goes, goes]
    assert queue.take_all(cancelled=True) == []
    assert [(one.job, one.index) for one in queue.take_all()] == [(stays, 0), (stays, 1)]
