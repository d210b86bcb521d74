"""Answers as they are written: server-sent events, ended by ``[DONE]``, with comments where it is quiet for long."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING

from starlette.responses import StreamingResponse

from ptuning.serve.engine.job import Job, Row
from ptuning.serve.http.errors import api_error, as_json
from ptuning.serve.http.replies import End, Event, begun, gone, unless_gone
from ptuning.serve.http.service import Service
from ptuning.serve.http.shapes import Shape, Told
from ptuning.serve.http.watch import seen_of

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

HEADERS = {"X-Accel-Buffering": "no"}  # a proxy must not collect the pieces
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


async def streamed(request: Request, rows: Sequence[Row], told: Told) -> EventStream:
    """Have rows answered piece by piece. What is wrong before anything is written is raised, and so has its own status;
    later it is told in the stream.
    """
    service = Service.of(request)
    replies = begun(request, rows)
    events = aiter(replies)
    first = asyncio.ensure_future(anext(events))

    async def wait() -> None:
        await asyncio.wait({first}, timeout=service.settings.keep_alive)

    try:
        await unless_gone(request, wait(), replies.job)
        if first.done() and isinstance(event := first.result(), End) and isinstance(event.outcome, Exception):
            raise event.outcome
    except BaseException:
        replies.job.cancel()
        first.cancel()
        raise
    return EventStream(request, events, first, replies.job, told)


class EventStream(StreamingResponse):
    """The response of a stream; it cancels its job if the client goes away, or does not read."""

    def __init__(
        self, request: Request, events: AsyncIterator[Event], first: asyncio.Future[Event], job: Job, told: Told
    ) -> None:
        super().__init__(iter(()), media_type="text/event-stream", headers=HEADERS)
        self._request = request
        self._events, self._first, self._job, self._told = events, first, job, told
        self._keep_alive = Service.of(request).settings.keep_alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send the chunks."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(gone(self._request))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._job.cancel()  # changes nothing once all is answered
            for one in (sending, leaving):
                one.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        async for data in self._data():
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _data(self) -> AsyncIterator[bytes]:
        coming: asyncio.Future[Event] = self._first
        try:
            while True:
                done, _ = await asyncio.wait({coming}, timeout=self._keep_alive)
                if not done:
                    yield KEEP_ALIVE
                    continue
                with contextlib.suppress(StopAsyncIteration):
                    event = coming.result()
                    coming = asyncio.ensure_future(anext(self._events))
                    yield _joined(self._told.chunks(event))
                    continue
                break
            yield _joined(self._told.last())
        except Exception as error:  # noqa: BLE001 - the status is sent, so the stream itself tells
            self._job.cancel()
            found = api_error(error, request_id=self._request.scope["state"]["request_id"])
            seen_of(self._request).refused(found.code)
            yield _joined(iter([{"error": found.to_json()}]))
        finally:
            coming.cancel()
        yield DONE


def _joined(chunks: Iterator[Shape]) -> bytes:
    return b"".join(b"data: " + as_json(chunk) + b"\n\n" for chunk in chunks)
