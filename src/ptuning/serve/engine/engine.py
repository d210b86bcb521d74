"""The engine: one thread that owns the model and answers the rows of many jobs."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch

from ptuning.engine.prefix_store import PrefixStore
from ptuning.engine.runner import Runner
from ptuning.errors import RecordError
from ptuning.prompt.predict import PromptModel
from ptuning.serve import CACHE_MEMORY, QUEUE_ROWS
from ptuning.serve.engine.job import (
    CallRow,
    CancelledError,
    Job,
    Listener,
    Outcome,
    QueueFullError,
    Row,
    StoppedError,
)
from ptuning.serve.engine.scheduler import QueuedRow, RowCounts, RowQueue, Scheduler

logger = logging.getLogger(__name__)

T = TypeVar("T")

# The thread counts as hung after this many seconds without a turn while rows wait.
HUNG_SECONDS = 120.0
# Bounds of the seconds after which a client of a full queue is told to try again.
RETRY_SECONDS = (1.0, 60.0)
# Initial estimate of the seconds per row, and the smoothing factor of its moving average.
FIRST_ROW_SECONDS, SMOOTHING = 0.05, 0.2


@dataclass(frozen=True)
class EngineStatus:
    """Activity of the engine since its start."""

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


class Engine:
    """Collected rows of any prompts on one model, as ``PromptModel`` would answer each alone.

    One thread owns the model and its tokenizer. There is no waiting window: whenever the thread is free it takes what
    is queued, up to a number of tokens, and runs rows of all prompts together. Written answers take a token a step, and
    rows join and leave between steps; while answers are written, what is read between two steps is bounded.

    Args:
        model: The model; prompts with trained weights are refused.
        queue_rows: Most rows that wait; a job that does not fit is refused (:class:`QueueFullError`).
        cache_memory: Share of the free memory for keys and values of beginnings that come again.
    """

    def __init__(self, model: PromptModel, *, queue_rows: int = QUEUE_ROWS, cache_memory: float = CACHE_MEMORY) -> None:
        self.model = model
        self.queue_rows = queue_rows
        self._counts = RowCounts()
        self._queue = RowQueue(self._counts)
        self._changed = threading.Condition()  # guards what follows, and the queue
        self._closed = self._stopped = False
        self.has_failed = False
        self._unanswered = 0
        self._row_seconds = FIRST_ROW_SECONDS
        self._ticked = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="ptuning-engine", daemon=True)
        self._runner = Runner(model.backbone, PrefixStore(model.backbone, memory_share=cache_memory))
        self._scheduler = Scheduler(model.preprocessor, self._runner)

    @property
    def status(self) -> EngineStatus:
        """Activity since the start."""
        runner = self._runner
        return EngineStatus(
            rows_waiting=len(self._queue) + self._scheduler.held,
            rows_writing=self._scheduler.running,
            rows_done=self._counts.done,
            rows_failed=self._counts.failed,
            rows_cancelled=self._counts.cancelled,
            passes=runner.passes,
            tokens_read=runner.tokens_read,
            tokens_written=runner.tokens_written,
            cached_tokens=runner.cached_tokens,
            kept_texts=len(runner.store),
            kept_bytes=runner.store.bytes,
        )

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
        waiting = len(self._queue) + self._scheduler.held
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
        job = Job(rows, Listener(len(rows)))
        self.submit(job)
        if not job.listener.ready.wait(timeout):
            job.cancel()
            raise TimeoutError(f"no answer within {timeout} seconds")
        for outcome in job.listener.outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return cast("list[Outcome]", job.listener.outcomes)

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

    def _take(self) -> QueuedRow | None:
        with self._changed:
            return self._queue.take()

    @torch.no_grad()
    def _run(self) -> None:
        error: Exception = StoppedError("the engine was stopped before this row was answered")
        try:
            while self._wait():
                started, done = time.monotonic(), self._counts.done
                self._scheduler.once(self._take)
                self._ticked = time.monotonic()
                if rows := self._counts.done - done:
                    self._row_seconds += SMOOTHING * ((self._ticked - started) / rows - self._row_seconds)
                self._count()
        except Exception as fault:
            logger.exception("the engine has failed")
            self.has_failed = True
            error = StoppedError(f"the engine has failed ({type(fault).__name__})")
        finally:
            with self._changed:
                self._stopped = True
                left = self._queue.take_all()
            for queued in left:
                queued.end(error)
            self._scheduler.fail(error)
            self._count()

    def _wait(self) -> bool:
        """Wait for something to do, and drop what was cancelled; return whether to go on."""
        with self._changed:
            while not (self._stopped or self._queue or self._scheduler.held or self._scheduler.running):
                self._ticked = time.monotonic()
                self._changed.wait()
            self._ticked = time.monotonic()
            gone = self._queue.take_all(cancelled=True)
            stopped = self._stopped
        for queued in gone:
            queued.end(CancelledError("the request was cancelled"))
        self._scheduler.drop_cancelled()
        self._count()
        return not stopped

    def _count(self) -> None:
        """Note how many rows are not answered."""
        with self._changed:
            self._unanswered = len(self._queue) + self._scheduler.held + self._scheduler.running
            self._changed.notify_all()
