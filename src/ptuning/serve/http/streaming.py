"""Between the engine's thread and the event loop: jobs go in, outcomes come back, whole or as server-sent events.

Nothing here waits for the model on the event loop. If a client disconnects, its job is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

from starlette.responses import StreamingResponse

from ptuning.engine.decoding import Token
from ptuning.serve.engine.job import CallRow, Job, Listener, Outcome, Row
from ptuning.serve.http.errors import ClientGoneError, as_api_error, as_json, invalid
from ptuning.serve.http.metrics import RequestStats, stats_of
from ptuning.serve.http.openai_format import Event, Piece, ResponseBuilder, RowEnd
from ptuning.serve.http.service import Service

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

T = TypeVar("T")

HEADERS = {"X-Accel-Buffering": "no"}  # a proxy must not collect the chunks
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


class ReplyQueue(Listener):
    """Events of a job, written by the engine's thread and read on the event loop."""

    def __init__(self, rows: Sequence[Row], stats: RequestStats, *, max_pending: int) -> None:
        super().__init__(len(rows))
        self.job = Job(rows, self)
        self._stats = stats
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._events: deque[Event] = deque()
        self._unanswered = len(rows)
        self._max_events = max_pending + len(rows)

    def piece(self, row: int, text: str, tokens: Sequence[Token]) -> None:
        """Take a piece; with too many unread ones the client does not read, and the job is cancelled."""
        self._stats.note_first_token()
        if len(self._events) >= self._max_events:
            self.job.cancel()
        else:
            self._put(Piece(row, text, tuple(tokens)))

    def ended(self, row: int, outcome: Outcome | Exception) -> None:
        """Take an answer or an error."""
        if isinstance(outcome, Outcome):
            self._stats.add_outcome(self.job.rows[row], outcome)
        self._events.append(RowEnd(row, outcome))
        self._unanswered -= 1
        self._notify()

    def _put(self, event: Event) -> None:
        self._events.append(event)
        self._notify()

    def _notify(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._wake.set)

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yield events until all rows have ended."""
        while True:
            self._wake.clear()
            is_over = self._unanswered == 0  # read before the events, which are put first
            while self._events:
                yield self._events.popleft()
            if is_over:
                return
            await self._wake.wait()


def submit_rows(request: Request, rows: Sequence[Row]) -> ReplyQueue:
    """Hand rows to the engine.

    Raises:
        QueueFullError: If they do not fit into the queue now.
        ApiError: If they never will.
    """
    service, stats = Service.of(request), stats_of(request)
    limit = service.engine.queue_rows
    if len(rows) > limit:
        raise invalid("records", f"the request has {len(rows)} rows, and a request may have {limit}", "too_many_rows")
    replies = ReplyQueue(rows, stats, max_pending=service.settings.pending_pieces)
    service.engine.submit(replies.job)
    stats.add_job(replies.job)
    return replies


async def run_rows(request: Request, rows: Sequence[Row]) -> list[Outcome | Exception]:
    """Answer rows, and return the outcome or the error of each. A ClientGoneError if the client disconnects."""
    replies = submit_rows(request, rows)

    async def collect() -> list[Outcome | Exception]:
        outcomes: dict[int, Outcome | Exception] = {}
        async for event in replies:
            if isinstance(event, RowEnd):
                outcomes[event.row] = event.outcome
        return [outcomes[at] for at in range(len(rows))]

    return await _unless_gone(request, collect(), replies.job)


async def run_call(request: Request, work: Callable[[], T]) -> T:
    """Do something short with the model or its tokenizer in the engine's thread, and return its result."""
    (outcome,) = await run_rows(request, [CallRow(work)])
    if isinstance(outcome, Exception):
        raise outcome
    return cast("T", outcome.value)


async def _gone(request: Request) -> None:
    """Return when the client disconnects; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _unless_gone(request: Request, work: Coroutine[object, object, T], job: Job) -> T:
    """Wait for work on a job's events; if the client disconnects first, cancel the job and raise ClientGoneError."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        if not working.done():
            job.cancel()
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def stream_rows(request: Request, rows: Sequence[Row], builder: ResponseBuilder) -> EventStream:
    """Answer rows piece by piece. An error before the first piece is raised, and so has its own status; a later one is
    an event of the stream.
    """
    replies = submit_rows(request, rows)
    events = aiter(replies)
    first = asyncio.ensure_future(anext(events))

    async def wait() -> None:
        await asyncio.wait({first}, timeout=Service.of(request).settings.keep_alive)

    try:
        await _unless_gone(request, wait(), replies.job)
        if first.done() and isinstance(event := first.result(), RowEnd) and isinstance(event.outcome, Exception):
            raise event.outcome
    except BaseException:
        replies.job.cancel()
        first.cancel()
        raise
    return EventStream(request, events, first, replies.job, builder)


class EventStream(StreamingResponse):
    """Server-sent events of a job, which is cancelled if the client disconnects."""

    def __init__(
        self,
        request: Request,
        events: AsyncIterator[Event],
        first: asyncio.Future[Event],
        job: Job,
        builder: ResponseBuilder,
    ) -> None:
        super().__init__(iter(()), media_type="text/event-stream", headers=HEADERS)
        self._request = request
        self._events, self._first, self._job, self._builder = events, first, job, builder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send the chunks."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        sending, leaving = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(_gone(self._request))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._job.cancel()  # changes nothing once all is answered
            sending.cancel()
            leaving.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        async for data in self._data():
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _data(self) -> AsyncIterator[bytes]:
        pending, keep_alive = self._first, Service.of(self._request).settings.keep_alive
        try:
            while True:
                done, _ = await asyncio.wait({pending}, timeout=keep_alive)
                if not done:
                    yield KEEP_ALIVE
                    continue
                try:
                    event = pending.result()
                except StopAsyncIteration:
                    break
                pending = asyncio.ensure_future(anext(self._events))
                yield _encoded(self._builder.chunks(event))
            yield _encoded(self._builder.last_chunks())
        except Exception as error:  # noqa: BLE001 - the status is sent, so the error is an event
            self._job.cancel()
            api_error = as_api_error(error, request_id=self._request.scope["state"]["request_id"])
            stats_of(self._request).error = api_error.code
            yield _encoded([{"error": api_error.to_json()}])
        finally:
            pending.cancel()
        yield DONE


def _encoded(chunks: Iterable[dict[str, object]]) -> bytes:
    return b"".join(b"data: " + as_json(chunk) + b"\n\n" for chunk in chunks)
