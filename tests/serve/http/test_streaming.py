"""Between the engine's thread and the event loop: nothing is lost, nothing piles up, and who is gone is cancelled."""

from __future__ import annotations

import asyncio
import threading

from ptuning.serve.engine.job import CallRow, Outcome, StoppedError
from ptuning.serve.http.metrics import RequestStats
from ptuning.serve.http.openai_format import Event, Piece, RowEnd
from ptuning.serve.http.streaming import ReplyQueue

ROW = CallRow(lambda: None)


def test_pieces_that_nobody_takes_are_bounded_and_end_the_job() -> None:
    async def work() -> tuple[ReplyQueue, list[Event]]:
        replies = ReplyQueue([ROW], RequestStats("id", "POST"), max_pending=3)
        for at in range(10):
            replies.piece(0, str(at), [])
        replies.ended(0, StoppedError("cancelled"))
        return replies, [event async for event in replies]

    replies, events = asyncio.run(work())
    assert replies.job.cancelled
    assert [event.text for event in events if isinstance(event, Piece)] == ["0", "1", "2", "3"]
    assert isinstance(events[-1], RowEnd)


def test_events_of_another_thread_arrive_in_order_and_none_is_lost() -> None:
    async def work() -> list[Event]:
        replies = ReplyQueue([ROW] * 50, RequestStats("id", "POST"), max_pending=10_000)

        def answer() -> None:
            for row in range(50):
                for at in range(20):
                    replies.piece(row, str(at), [])
                replies.ended(row, Outcome(value=row))

        thread = threading.Thread(target=answer)
        thread.start()
        events = [event async for event in replies]
        thread.join()
        return events

    events = asyncio.run(work())
    assert [event.row for event in events if isinstance(event, RowEnd)] == list(range(50))
    assert [event.text for event in events if isinstance(event, Piece)] == [str(at) for at in range(20)] * 50


def test_a_loop_that_has_ended_hurts_no_engine() -> None:
    async def work() -> ReplyQueue:
        return ReplyQueue([ROW], RequestStats("id", "POST"), max_pending=3)

    replies = asyncio.run(work())
    replies.piece(0, "a", [])
    replies.ended(0, StoppedError("late"))
