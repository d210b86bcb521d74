"""Events between the engine's thread and the event loop: none is lost, and unread ones are bounded."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

from ptuning.serve.engine.job import CallRow, Outcome, StoppedError
from ptuning.serve.http.metrics import RequestStats
from ptuning.serve.http.responses import Event, Piece, Replies


def replies_of(rows: int, *, max_pending: int = 4) -> Replies:
    return Replies([CallRow(lambda: None)] * rows, RequestStats("id", "POST"), max_pending=max_pending)


async def events_of(replies: Replies) -> list[Event | None]:
    request: Any = SimpleNamespace(receive=asyncio.Event().wait)  # the client stays
    return [event async for event in replies.events(request)]


def test_unread_pieces_are_bounded_and_cancel_the_job() -> None:
    async def work() -> tuple[Replies, list[Event | None]]:
        replies = replies_of(1)
        for number in range(10):
            replies.piece(0, str(number), [])
        replies.ended(0, StoppedError("cancelled"))
        await asyncio.sleep(0)
        return replies, await events_of(replies)

    replies, events = asyncio.run(work())
    assert replies.job.cancelled
    *pieces, (_, last) = filter(None, events)
    assert pieces == [(0, Piece(str(number), ())) for number in range(4)]
    assert isinstance(last, StoppedError)
    replies.piece(0, "late", [])  # the loop is closed


def test_events_of_another_thread_arrive_in_order() -> None:
    async def work() -> list[Event | None]:
        replies = replies_of(50, max_pending=10_000)

        def answer() -> None:
            for row in range(50):
                for number in range(20):
                    replies.piece(row, str(number), [])
                replies.ended(row, Outcome(value=row))

        thread = threading.Thread(target=answer)
        thread.start()
        events = await events_of(replies)
        thread.join()
        return events

    pieces: list[Any] = [Piece(str(number), ()) for number in range(20)]
    assert asyncio.run(work()) == [(row, event) for row in range(50) for event in (*pieces, Outcome(value=row))]
