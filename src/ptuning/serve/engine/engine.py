"""The engine: one thread that owns the model and answers the rows of many jobs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch

from ptuning.errors import RecordError
from ptuning.prompt.predict import PromptModel
from ptuning.serve import CACHE_MEMORY, QUEUE_ROWS
from ptuning.serve.engine.batching import BatchRunner
from ptuning.serve.engine.job import CallRow, Job, Outcome, QueueFullError, Row, StoppedError, Token
from ptuning.serve.engine.prefix_cache import PrefixCache
from ptuning.serve.engine.preprocess import Preprocessor
from ptuning.serve.engine.queue import QueuedRow, RowCounts, RowQueue
from ptuning.serve.engine.scheduler import RunningBatch, Scheduler

logger = logging.getLogger(__name__)

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
        self._tally = RowCounts()
        self._queue = RowQueue(self._tally)
        self._changed = threading.Condition()  # guards what follows, and the queue
        self._closed = self._stopped = False
        self.has_failed = False
        self._unanswered = 0
        self._row_seconds = FIRST_ROW_SECONDS
        self._ticked = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="ptuning-engine", daemon=True)
        self._kept = PrefixCache(model.backbone, memory_share=cache_memory)
        self._passes = BatchRunner(model.backbone, self._kept)
        self._writing = RunningBatch(self._passes)
        self._scheduler = Scheduler(model, Preprocessor(model), self._passes, self._writing)

    @property
    def status(self) -> EngineStatus:
        """What it is doing, and has done."""
        return EngineStatus(
            rows_waiting=len(self._queue) + len(self._scheduler),
            rows_writing=len(self._writing),
            rows_done=self._tally.done,
            rows_failed=self._tally.failed,
            rows_cancelled=self._tally.cancelled,
            passes=self._passes.passes,
            tokens_read=self._passes.tokens_read,
            tokens_written=self._writing.tokens_written,
            cached_tokens=self._passes.cached_tokens,
            kept_texts=len(self._kept),
            kept_bytes=self._kept.bytes,
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
        waiting = len(self._queue) + len(self._scheduler)
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

    def _take(self) -> QueuedRow | None:
        with self._changed:
            return self._queue.take()

    def _tick(self) -> None:
        """Note that the thread comes round."""
        self._ticked = time.monotonic()

    def _note(self, seconds: float, done: int) -> None:
        """Learn how long a row takes."""
        if done:
            self._row_seconds += FOLLOWS * (seconds / done - self._row_seconds)

    @torch.no_grad()
    def _run(self) -> None:
        error: Exception = StoppedError("the engine was stopped before this row was answered")
        try:
            while self._wait():
                started, done = time.monotonic(), self._tally.done
                self._scheduler.once(self._take)
                self._tick()
                self._note(self._ticked - started, self._tally.done - done)
                self._count()
        except Exception as fault:
            logger.exception("the engine has failed")
            self.has_failed = True
            error = StoppedError(f"the engine has failed ({type(fault).__name__})")
        finally:
            with self._changed:
                self._stopped = True
                left = self._queue.take_all()
            for one in left:
                one.fail(error)
            self._scheduler.fail(error)
            self._count()

    def _wait(self) -> bool:
        """Wait for something to do, and drop what was cancelled; return whether to go on."""
        with self._changed:
            while not self._stopped and not (self._queue or len(self._scheduler) or len(self._writing)):
                self._tick()
                self._changed.wait()
            self._tick()
            gone = self._queue.take_cancelled()
            stopped = self._stopped
        for one in gone:
            one.drop()
        self._scheduler.drop_cancelled()
        self._count()
        return not stopped

    def _count(self) -> None:
        """Note how many rows are not answered."""
        with self._changed:
            self._unanswered = len(self._queue) + len(self._scheduler) + len(self._writing)
            self._changed.notify_all()


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
