"""Queue of rows and continuous batching: which rows run next, and what becomes of them."""

import heapq
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ptuning.engine.decoding import Token
from ptuning.engine.runner import Generation, Runner, Scoring, TextScoring, Work, by_kind
from ptuning.prompt.rows import Preprocessor, PromptRow, TextRow, check_finite, prediction_of
from ptuning.serve.engine.job import CallRow, CancelledError, Job, Outcome, Row, Usage

logger = logging.getLogger(__name__)

# A row's priority is its arrival time plus this many seconds per earlier row of its job. A small job does not wait for
# all rows of a large one before it, and no row waits for ever, since its own time does not change.
SECONDS_PER_ROW = 0.02
# Most tokens that are computed in a turn, on a CPU and on a GPU: more in a pass is not faster there, and a request
# waits for the pass before its own. During decoding fewer, so that answers go on meanwhile.
CPU_TOKENS, GPU_TOKENS = 1024, 8192
TOKENS_BETWEEN_STEPS = 512
# Most sequences that are decoded at a time.
MAX_SEQUENCES = 64


@dataclass
class RowCounts:
    """Number of rows that were answered, have failed and were cancelled."""

    done: int = 0
    failed: int = 0
    cancelled: int = 0


@dataclass(order=True)
class QueuedRow:
    """A row of a job that is not answered yet. Rows are ordered by ``due``; ``work`` is what the runner does for it."""

    due: float
    number: int
    job: Job = field(compare=False)
    index: int = field(compare=False)
    counts: RowCounts = field(compare=False)
    since: float = field(compare=False)
    waited: float = field(compare=False, default=0.0)
    has_ended: bool = field(compare=False, default=False)
    work: Work = field(compare=False, init=False)
    tokens_sent: int = field(compare=False, default=0)

    @property
    def row(self) -> Row:
        """The row itself."""
        return self.job.rows[self.index]

    def piece(self, text: str, tokens: Sequence[Token]) -> None:
        """Report a piece of the answer."""
        self._report(lambda: self.job.listener.piece(self.index, text, tokens))

    def end(self, outcome: Outcome | Exception) -> None:
        """Report the outcome or error, unless one was reported already."""
        if self.has_ended:
            return
        self.has_ended = True
        if not isinstance(self.row, CallRow):
            self.counts.done += isinstance(outcome, Outcome)
            self.counts.cancelled += isinstance(outcome, CancelledError)
            self.counts.failed += not isinstance(outcome, Outcome | CancelledError)
        if isinstance(outcome, Outcome):
            outcome = replace(outcome, waited=self.waited)
        self._report(lambda: self.job.listener.ended(self.index, outcome))

    def _report(self, report: Callable[[], None]) -> None:
        try:
            report()
        except Exception:  # a fault of the listener; the engine goes on
            logger.exception("a listener has failed")


class RowQueue:
    """Rows in the order of their priority; calls (:class:`CallRow`) come before all."""

    def __init__(self, counts: RowCounts) -> None:
        self._rows: list[QueuedRow] = []
        self._numbers = itertools.count()
        self._counts = counts

    def __len__(self) -> int:
        """Number of rows without calls."""
        return sum(not isinstance(queued.row, CallRow) for queued in self._rows)

    def __bool__(self) -> bool:
        return bool(self._rows)

    def put(self, job: Job) -> None:
        """Put in all rows of a job."""
        now = time.monotonic()
        for index, row in enumerate(job.rows):
            due = float("-inf") if isinstance(row, CallRow) else now + index * SECONDS_PER_ROW
            heapq.heappush(self._rows, QueuedRow(due, next(self._numbers), job, index, self._counts, now))

    def take(self) -> QueuedRow | None:
        """Take out the next row; None if there is none."""
        return heapq.heappop(self._rows) if self._rows else None

    def take_all(self, *, cancelled: bool = False) -> list[QueuedRow]:
        """Take out all rows, or those of cancelled jobs."""
        gone = [queued for queued in self._rows if queued.job.cancelled or not cancelled]
        if gone:
            self._rows = [queued for queued in self._rows if queued.job.cancelled < cancelled]
            heapq.heapify(self._rows)
        return sorted(gone)


class Scheduler:
    """Takes rows and answers them, turn by turn, with a runner: fairness, bounds of a turn, and reports to jobs."""

    def __init__(self, preprocessor: Preprocessor, runner: Runner) -> None:
        self._preprocessor, self._runner = preprocessor, runner
        self._most = CPU_TOKENS if runner.backbone.device.type == "cpu" else GPU_TOKENS
        self._held: deque[QueuedRow] = deque()  # preprocessed, but not begun
        self._in_hand: list[QueuedRow] = []
        self._running: dict[Work, QueuedRow] = {}

    @property
    def held(self) -> int:
        """Number of rows that were taken and are not begun."""
        return len(self._held)

    @property
    def running(self) -> int:
        """Number of rows whose answers are decoded now."""
        return len(self._running)

    def drop_cancelled(self) -> None:
        """Drop the rows of cancelled jobs."""
        gone = [queued for queued in [*self._held, *self._running.values()] if queued.job.cancelled]
        if gone:
            self._held = deque(queued for queued in self._held if not queued.job.cancelled)
            self._runner.drop([queued.work for queued in gone])
            for queued in gone:
                self._running.pop(queued.work, None)
                queued.end(CancelledError("the request was cancelled"))

    def fail(self, error: Exception) -> None:
        """Report to all jobs with rows that were taken and not answered that these have failed."""
        self._runner.fail_all()
        for queued in [*self._in_hand, *self._held, *self._running.values()]:
            queued.end(error)
        self._held.clear()
        self._running.clear()

    def once(self, take: Callable[[], QueuedRow | None]) -> None:
        """Take rows (``take`` returns the next one), answer them or begin to, and decode a token of each answer."""
        self._in_hand = self._take(take)
        rows = {queued.work: queued for queued in self._in_hand}
        for works in by_kind(list(rows)):
            self._begin(works, rows)
        self._in_hand = []
        grown = self._runner.step(isolated=True)
        for work in grown:
            self._report(work, self._running[work])

    def _begin(self, works: Sequence[Work], rows: dict[Work, QueuedRow]) -> None:
        """Begin work; if that fails, each alone, so that a failed row fails alone."""
        try:
            self._runner.begin(works)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to a row
            for work in works:
                if len(works) == 1:
                    rows[work].end(error)
                else:
                    self._begin([work], rows)
            return
        for work in works:
            if work.is_done:
                self._report(work, rows[work])
            else:
                self._running[work] = rows[work]

    def _report(self, work: Work, queued: QueuedRow) -> None:
        """Report what is new of an answer, and all of it if it has ended."""
        row = queued.row
        streams = isinstance(row, PromptRow | TextRow) and row.how.pieces
        if streams and isinstance(work, Generation) and work.lanes == 1 and work.error is None:
            sequence, sent = work.sequence, queued.tokens_sent
            queued.tokens_sent = len(sequence.hypothesis.ids)
            queued.piece(sequence.piece(), sequence.tokens(sent))
        if work.error is not None or work.is_done:
            self._running.pop(work, None)
            try:
                queued.end(work.error or self._outcome(work, row))
            except Exception as error:  # noqa: BLE001 - of this row
                queued.end(error)

    def _outcome(self, work: Work, row: Row) -> Outcome:
        usage = Usage(work.tokens, 0, work.cached)
        if isinstance(work, TextScoring):
            check_finite(token.log_prob for token in work.result if token.log_prob is not None)
            return Outcome(usage=usage, tokens=work.result)
        assert isinstance(row, PromptRow | TextRow)
        prediction, tokens = prediction_of(work, row.how), tuple[Token, ...]()
        if isinstance(work, Scoring):
            check_finite(work.log_probs)
        else:
            check_finite(candidate.log_prob for candidate in prediction.candidates)
            usage = replace(usage, completion_tokens=prediction.tokens or 0)
        if isinstance(work, Generation) and work.lanes == 1:
            usage = replace(usage, completion_tokens=len(work.sequence.hypothesis.ids))
            tokens = work.sequence.tokens()
        return Outcome(prediction, usage, "length" if prediction.stopped == "length" else "stop", tokens)

    def _take(self, take: Callable[[], QueuedRow | None]) -> list[QueuedRow]:
        """Take rows up to the bounds of a turn. Those that would be too many sequences wait, and others go first."""
        most = min(self._most, TOKENS_BETWEEN_STEPS) if self._running else self._most
        taken: list[QueuedRow] = []
        held: deque[QueuedRow] = deque()
        begun: set[bytes] = set()
        tokens, sequences = 0, sum(work.lanes for work in self._running if isinstance(work, Generation))
        while tokens < most:
            queued = self._held.popleft() if self._held else self._next(take)
            if queued is None:
                break
            work = queued.work
            lanes = work.lanes if isinstance(work, Generation) else 0
            if lanes and sequences and sequences + lanes > MAX_SEQUENCES:
                held.append(queued)
                continue
            size = sum(self._runner.store.to_read(row, begun) for row in work.rows)
            if taken and tokens + size > most:
                held.append(queued)
                break
            taken.append(queued)
            tokens += size
            sequences += lanes
        self._held = held + self._held
        return taken

    def _next(self, take: Callable[[], QueuedRow | None]) -> QueuedRow | None:
        """Return the next row, preprocessed; those that cannot be fail, and calls are made."""
        while (queued := take()) is not None:
            queued.waited, queued.job.is_begun = time.monotonic() - queued.since, True
            row = queued.row
            try:
                if not isinstance(row, CallRow):
                    queued.work = self._preprocessor.work(row)
                    return queued
                queued.end(Outcome(value=row.call()))
            except Exception as error:  # noqa: BLE001 - of this row
                queued.end(error)
        return None
