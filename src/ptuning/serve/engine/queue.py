"""The rows that wait for the model, in the order in which they are taken, and what becomes of them."""

from __future__ import annotations

import heapq
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ptuning.serve.engine.job import CallRow, CancelledError, Job, Outcome, Row, Token

logger = logging.getLogger(__name__)

# A row is taken as if it had come so many seconds later for each row of its job in front of it. A small job does not
# wait for all rows of a large one before it, and no row waits for ever, since its own time stands still.
SECONDS_PER_ROW = 0.02


@dataclass
class RowCounts:
    """How many rows were answered, have failed and were cancelled."""

    done: int = 0
    failed: int = 0
    cancelled: int = 0


@dataclass(order=True)
class QueuedRow:
    """A row of a job that is not answered yet. ``due`` is the time by which rows are ordered."""

    due: float
    number: int
    job: Job = field(compare=False)
    index: int = field(compare=False)
    tally: RowCounts = field(compare=False)
    since: float = field(compare=False)
    waited: float = field(compare=False, default=0.0)
    told: bool = field(compare=False, default=False)

    @property
    def row(self) -> Row:
        """The row itself."""
        return self.job.rows[self.index]

    @property
    def counts(self) -> bool:
        """Whether it is a row that somebody asked, and not something else to do."""
        return not isinstance(self.row, CallRow)

    def taken(self) -> None:
        """Note that the engine has taken it."""
        self.waited = time.monotonic() - self.since
        self.job.is_begun = True

    def answer(self, outcome: Outcome) -> None:
        """Tell the job the answer."""
        self.told = True
        self.tally.done += self.counts
        self._tell(lambda: self.job.listener.answered(self.index, replace(outcome, waited=self.waited)))

    def piece(self, text: str, tokens: Sequence[Token]) -> None:
        """Tell the job a piece of the answer."""
        self._tell(lambda: self.job.listener.piece(self.index, text, tokens))

    def fail(self, error: Exception) -> None:
        """Tell the job that the row has failed, unless it was answered."""
        if self.told:
            return
        self.told = True
        if isinstance(error, CancelledError):
            self.tally.cancelled += self.counts
        else:
            self.tally.failed += self.counts
        self._tell(lambda: self.job.listener.failed(self.index, error))

    def drop(self) -> None:
        """Tell the job that the row was cancelled."""
        self.fail(CancelledError("the request was cancelled"))

    def _tell(self, tell: Callable[[], None]) -> None:
        try:
            tell()
        except Exception:  # whoever asked has a fault; the engine goes on
            logger.exception("a listener has failed")


class RowQueue:
    """Rows in the order of their time; something else to do (:class:`CallRow`) comes before all."""

    def __init__(self, tally: RowCounts) -> None:
        self._rows: list[QueuedRow] = []
        self._numbers = itertools.count()
        self._tally = tally

    def __len__(self) -> int:
        """Number of rows, without those that call something."""
        return sum(not isinstance(one.row, CallRow) for one in self._rows)

    def __bool__(self) -> bool:
        return bool(self._rows)

    def put(self, job: Job) -> None:
        """Put in all rows of a job."""
        now = time.monotonic()
        for index, row in enumerate(job.rows):
            due = float("-inf") if isinstance(row, CallRow) else now + index * SECONDS_PER_ROW
            heapq.heappush(self._rows, QueuedRow(due, next(self._numbers), job, index, self._tally, now))

    def take(self) -> QueuedRow | None:
        """Take out the next row; None if there is none."""
        return heapq.heappop(self._rows) if self._rows else None

    def take_cancelled(self) -> list[QueuedRow]:
        """Take out the rows of cancelled jobs."""
        gone = [one for one in self._rows if one.job.cancelled]
        if gone:
            self._rows = [one for one in self._rows if not one.job.cancelled]
            heapq.heapify(self._rows)
        return gone

    def take_all(self) -> list[QueuedRow]:
        """Take out all rows."""
        gone, self._rows = sorted(self._rows), []
        return gone
