"""Events between the engine's thread and the event loop: none is lost, and unread ones are bounded."""

from __future__ import annotations

import asyncio
import threading

from ptuning.serve.engine.job import CallRow, Outcome, StoppedError
from ptuning.serve.http.metrics import RequestStats
from ptuning.serve.http.openai_format import Event, Piece, RowEnd
from ptuning.serve.http.streaming import ReplyQueue


def replies_of(rows: int, *, max_pending: int = 3) -> ReplyQueue:
    return ReplyQueue([CallRow(lambda: None)] * rows, RequestStats("id", "POST"), max_pending=max_pending)


def test_unread_pieces_are_bounded_and_cancel_the_job() -> None:
    async def work() -> tuple[ReplyQueue, list[Event]]:
        replies = replies_of(1)
        for number in range(10):
            replies.piece(0, str(number), [])
        replies.ended(0, StoppedError("cancelled"))
        return replies, [event async for event in replies]

    replies, events = asyncio.run(work())
    assert replies.job.cancelled
    assert [event.text for event in events if isinstance(event, Piece)] == ["0", "1", "2", "3"]
    assert isinstance(events[-1], RowEnd)
    replies.piece(0, "late", [])  # the loop is closed


def test_events_of_another_thread_arrive_in_order() -> None:
    async def work() -> list[Event]:
        replies = replies_of(50, max_pending=10_000)

        def answer() -> None:
            for row in range(50):
                for number in range(20):
                    replies.piece(row, str(number), [])
                replies.ended(row, Outcome(value=row))

        thread = threading.Thread(target=answer)
        thread.start()
        events = [event async for event in replies]
        thread.join()
        return events

    events = asyncio.run(work())
    assert [event.row for event in events if isinstance(event, RowEnd)] == list(range(50))
    assert [event.text for event in events if isinstance(event, Piece)] == [str(number) for number in range(20)] * 50
