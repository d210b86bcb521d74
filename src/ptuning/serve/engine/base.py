"""What takes jobs and answers their rows in a thread of its own: the queue, its bounds, and the end."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from ptuning.errors import RecordError
from ptuning.prompt.predict import PromptModel
from ptuning.serve.engine.job import CallRow, Job, Outcome, QueueFullError, Row, StoppedError, Token
from ptuning.serve.engine.waiting import Queue, Tally, Waiting

T = TypeVar("T")

# The thread counts as hung if it has not come round for so long while rows wait.
HUNG_SECONDS = 120.0
# Bounds of what a full queue says about the time until it has room.
RETRY_SECONDS = (1.0, 60.0)
# What a row is thought to take at first, in seconds, and how fast the measured time of a row follows the last turns.
FIRST_ROW_SECONDS, FOLLOWS = 0.05, 0.2


@dataclass(frozen=True)
class EngineStatus:
    """What the engine is doing and has done since its start."""

    rows_waiting: int
    rows_writing: int
    rows_done: int
    rows_failed: int
    rows_cancelled: int
    passes: int
    tokens_read: int
    tokens_written: int
    cached_tokens: int
    kept_texts: int
    kept_bytes: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the rows, whether they were read or kept."""
        return self.tokens_read + self.cached_tokens


class BaseEngine(ABC):
    """Takes jobs, and answers their rows in a thread that owns the tokenizer, and the model if it runs here."""

    def __init__(self, model: PromptModel, *, queue_rows: int) -> None:
        self.model = model
        self.queue_rows = queue_rows
        self._tally = Tally()
        self._queue = Queue(self._tally)
        self._changed = threading.Condition()  # guards what follows, and the queue
        self._closed = self._stopped = False
        self.has_failed = False
        self._unanswered = 0
        self._row_seconds = FIRST_ROW_SECONDS
        self._ticked = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="ptuning-engine", daemon=True)

    @abstractmethod
    def _run(self) -> None:
        """What the thread does."""

    @property
    @abstractmethod
    def status(self) -> EngineStatus:
        """What it is doing, and has done."""

    @property
    def _held(self) -> int:
        """Number of rows that were taken from the queue and have no room yet."""
        return 0

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Take a job; its listener hears of each row.

        Raises:
            QueueFullError: If its rows do not fit into the queue now.
            RecordError: If they never will.
            StoppedError: If the engine takes no more jobs.
        """
        rows = sum(not isinstance(row, CallRow) for row in job.rows)
        if rows > self.queue_rows:
            raise RecordError(f"the request has {rows} rows, and at most {self.queue_rows} wait at a time; send fewer")
        with self._changed:
            if self._closed or self._stopped:
                raise StoppedError("the engine takes no more requests; it is about to end")
            self._check_room(rows)
            self._queue.put(job)
            self._unanswered += len(job.rows)
            self._changed.notify_all()

    def check_room(self) -> None:
        """Raise a QueueFullError if not even one row fits into the queue now."""
        with self._changed:
            self._check_room(1)

    def _check_room(self, rows: int) -> None:
        waiting = len(self._queue) + self._held
        if rows and waiting + rows > self.queue_rows:
            least, most = RETRY_SECONDS
            raise QueueFullError(
                f"{waiting} rows wait already, of at most {self.queue_rows}; try again later",
                retry_after=min(most, max(least, waiting * self._row_seconds)),
            )

    def ask(self, rows: Sequence[Row], *, timeout: float | None = None) -> list[Outcome]:
        """Answer rows, and wait for that; raises the error of the first row that has failed. A job that is not
        answered within ``timeout`` seconds is cancelled, and a TimeoutError raised.
        """
        answers = Collected(len(rows))
        job = Job(rows, answers)
        self.submit(job)
        if not answers.ready.wait(timeout):
            job.cancel()
            raise TimeoutError(f"no answer within {timeout} seconds")
        for found in answers.found:
            if isinstance(found, Exception):
                raise found
        return cast("list[Outcome]", answers.found)

    def call(self, work: Callable[[], T], *, timeout: float | None = None) -> T:
        """Do something short in the engine's thread, before the rows that wait, and return its result."""
        (outcome,) = self.ask([CallRow(work)], timeout=timeout)
        return cast("T", outcome.value)

    def drain(self, seconds: float) -> bool:
        """Take no more jobs, and wait until all are answered; return whether they are."""
        with self._changed:
            self._closed = True
            return self._changed.wait_for(lambda: not self._unanswered or not self._thread.is_alive(), seconds)

    def stop(self) -> None:
        """End the thread after the pass that runs; rows that are not answered fail with a StoppedError."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread lives, and is not stuck with rows that wait."""
        return self._thread.is_alive() and (not self._unanswered or time.monotonic() - self._ticked < HUNG_SECONDS)

    def _take(self) -> Waiting | None:
        with self._changed:
            return self._queue.take()

    def _tick(self) -> None:
        """Note that the thread comes round."""
        self._ticked = time.monotonic()

    def _note(self, seconds: float, done: int) -> None:
        """Learn how long a row takes."""
        if done:
            self._row_seconds += FOLLOWS * (seconds / done - self._row_seconds)


class Collected:
    """Collects the outcomes of a job's rows for somebody who waits for them."""

    def __init__(self, rows: int) -> None:
        self.found: list[Outcome | Exception | None] = [None] * rows
        self.ready = threading.Event()
        self._left = rows
        if not rows:
            self.ready.set()

    def piece(self, row: int, text: str, tokens: Sequence[Token]) -> None:
        """Pieces are of no use here: the answer has them all."""

    def answered(self, row: int, outcome: Outcome) -> None:
        """Take an answer."""
        self._take(row, outcome)

    def failed(self, row: int, error: Exception) -> None:
        """Take an error."""
        self._take(row, error)

    def _take(self, row: int, found: Outcome | Exception) -> None:
        self.found[row] = found
        self._left -= 1
        if not self._left:
            self.ready.set()
