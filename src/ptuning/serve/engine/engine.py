"""The engine: one thread that owns the model and answers the rows of many jobs."""

from __future__ import annotations

import logging
import time

import torch

from ptuning.prompt.predict import PromptModel
from ptuning.serve.engine.base import BaseEngine, EngineStatus
from ptuning.serve.engine.beginnings import Beginnings
from ptuning.serve.engine.filling import Filling
from ptuning.serve.engine.job import StoppedError
from ptuning.serve.engine.passes import Passes
from ptuning.serve.engine.scheduler import Scheduler
from ptuning.serve.engine.writing import Writing

logger = logging.getLogger(__name__)


class Engine(BaseEngine):
    """Collected rows of any prompts on one model, as ``PromptModel`` would answer each alone.

    One thread owns the model and its tokenizer. There is no waiting window: whenever the thread is free it takes what
    is queued, up to a number of tokens, and runs rows of all prompts together. Written answers take a token a step, and
    rows join and leave between steps; while answers are written, what is read between two steps is bounded.

    Args:
        model: The model; prompts with trained weights are refused.
        queue_rows: Most rows that wait; a job that does not fit is refused (:class:`QueueFullError`).
        cache_memory: Share of the free memory for keys and values of beginnings that come again.
    """

    def __init__(self, model: PromptModel, *, queue_rows: int = 256, cache_memory: float = 0.2) -> None:
        super().__init__(model, queue_rows=queue_rows)
        self._kept = Beginnings(model.backbone, memory_share=cache_memory)
        self._passes = Passes(model.backbone, self._kept)
        self._writing = Writing(self._passes)
        self._scheduler = Scheduler(model, Filling(model), self._passes, self._writing)

    @property
    def _held(self) -> int:
        return len(self._scheduler)

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
