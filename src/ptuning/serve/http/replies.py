"""Between the engine's thread and the event loop: a job is handed over, and its outcomes come back.

Nothing here waits for the model on the event loop. Whoever goes away, in whatever way, has the job cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

from ptuning.serve.engine.job import CallRow, Job, Outcome, Row, Token
from ptuning.serve.http.errors import ClientGoneError, refused
from ptuning.serve.http.service import Service
from ptuning.serve.http.watch import Seen, seen_of

if TYPE_CHECKING:
    from starlette.requests import Request

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """A written answer has grown."""

    row: int
    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class End:
    """A row is answered, or has failed."""

    row: int
    outcome: Outcome | Exception


Event = Piece | End


class Replies:
    """What becomes of a job: told by the engine's thread, read on the event loop."""

    def __init__(self, rows: Sequence[Row], seen: Seen, *, most_pending: int) -> None:
        self.job = Job(rows, self)
        self._seen = seen
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._events: deque[Event] = deque()
        self._left = len(rows)
        self._most = most_pending + len(rows)

    def piece(self, row: int, text: str, tokens: Sequence[Token]) -> None:
        """Take a piece, in the engine's thread; with too many unread ones the client does not read, and it ends."""
        self._seen.first()
        if len(self._events) >= self._most:
            self.job.cancel()
            return
        self._put(Piece(row, text, tuple(tokens)))

    def answered(self, row: int, outcome: Outcome) -> None:
        """Take an outcome, in the engine's thread."""
        self._seen.answered(self.job.rows[row], outcome)
        self._end(row, outcome)

    def failed(self, row: int, error: Exception) -> None:
        """Take an error, in the engine's thread."""
        self._end(row, error)

    def _end(self, row: int, outcome: Outcome | Exception) -> None:
        self._events.append(End(row, outcome))
        self._left -= 1
        self._put(None)

    def _put(self, event: Event | None) -> None:
        if event is not None:
            self._events.append(event)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._wake.set)

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yield events until all rows have ended."""
        while True:
            self._wake.clear()
            is_over = self._left == 0  # before the look at the events, which come first
            while self._events:
                yield self._events.popleft()
            if is_over:
                return
            await self._wake.wait()


async def gone(request: Request) -> None:
    """Return when the client of a request has gone away; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def answered(request: Request, rows: Sequence[Row]) -> list[Outcome | Exception]:
    """Have rows answered, and return the outcome or the error of each. A ClientGoneError if the client goes away: the
    rows are cancelled then.
    """
    replies = begun(request, rows)

    async def collect() -> list[Outcome | Exception]:
        found: dict[int, Outcome | Exception] = {}
        async for event in replies:
            if isinstance(event, End):
                found[event.row] = event.outcome
        return [found[at] for at in range(len(rows))]

    return await unless_gone(request, collect(), replies.job)


async def unless_gone(request: Request, work: Coroutine[object, object, T], job: Job) -> T:
    """Wait for some work on a job's events; if the client goes away first, cancel the job, with a ClientGoneError."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        if not working.done():
            job.cancel()
        for one in (working, leaving):
            one.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def begun(request: Request, rows: Sequence[Row]) -> Replies:
    """Hand rows over. A QueueFullError if they must wait, an ApiError if there are more than ever fit."""
    service, seen = Service.of(request), seen_of(request)
    most = service.engine.queue_rows
    if len(rows) > most:
        raise refused("records", f"the request has {len(rows)} rows, and a request may have {most}", "too_many_rows")
    replies = Replies(rows, seen, most_pending=service.settings.pending_pieces)
    service.engine.submit(replies.job)
    seen.submitted(replies.job)
    return replies


async def called(request: Request, work: Callable[[], T]) -> T:
    """Do something short with the model or its tokenizer in the engine's thread, and return what it returned."""
    (outcome,) = await answered(request, [CallRow(work)])
    if isinstance(outcome, Exception):
        raise outcome
    return cast("T", outcome.value)
